"""The house of docs/ARCHITECTURE.md, held by reading every import, those inside functions too.

Imports under ``if TYPE_CHECKING`` count for the floors, since they couple as well, but not
for cycles: Python never follows them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "whisper_worker"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__", "types", "errors", "settings", "log", "metrics", "languages"),
    ("audio", "formats", "cache"),
    ("engine",),
    ("schema", "service"),
    ("doors", "web"),
)
"""Names directly under the package, lowest floor first; a folder stands for all that is in it."""

TOP_FLOOR = len(FLOORS)
"""Scripts beside the package: they may use every floor, and no module may use them."""

HEAVY = ("torch", "transformers", "runpod", "numpy", "requests", "ffmpeg")


@dataclass(frozen=True, slots=True)
class Import:
    importer: str
    imported: str
    for_types: bool


def modules() -> dict[str, Path]:
    """Module name to file, of the package and of the scripts that people start."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]):
        found[path.stem] = path
    return found


MODULES = modules()


def floor_of(module: str) -> int:
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return TOP_FLOOR
    room = parts[1] if len(parts) > 1 else "__init__"
    if room == "__main__":
        return TOP_FLOOR
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS, where the design wants it")


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    """Imports of our own modules, resolved to the module's full name."""
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for_types.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *([source] if source else [])])
            names = [
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            ]
        for name in names:
            if name in MODULES or name.split(".")[0] == PACKAGE:
                yield Import(module, name, node in for_types)


def all_imports() -> list[Import]:
    return [
        found
        for module, path in MODULES.items()
        for found in imports_of(module, ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
    ]


IMPORTS = all_imports()


def upward(imports: list[Import]) -> list[str]:
    return [
        f"{found.importer} imports {found.imported} from a floor above"
        for found in imports
        if floor_of(found.imported) > floor_of(found.importer)
    ]


def test_the_reader_sees_imports() -> None:
    service = {found.imported for found in IMPORTS if found.importer == f"{PACKAGE}.service"}
    assert f"{PACKAGE}.types" in service, "an import at the top of a module was missed"
    assert any(name.startswith(f"{PACKAGE}.engine.") for name in service), "an import in a function was missed"


def test_an_import_upwards_is_found() -> None:
    inside_function = ast.parse("def f():\n    from whisper_worker import service\n")
    assert upward(list(imports_of(f"{PACKAGE}.types", inside_function)))
    relative = ast.parse("from ..service import Service\n")
    assert upward(list(imports_of(f"{PACKAGE}.audio.windows", relative)))


def test_every_module_stands_on_a_floor() -> None:
    for module in MODULES:
        floor_of(module)


def test_imports_point_down() -> None:
    assert not upward(IMPORTS)


def test_nobody_imports_a_script() -> None:
    scripts = {module for module in MODULES if module.split(".")[0] != PACKAGE}
    assert not [found for found in IMPORTS if found.imported in scripts and found.importer not in scripts]


SECOND_ENTRANCES = {"remote": "cli"}
"""Modules by which a door is entered under another name."""


def door_of(module: str) -> str | None:
    """A door may be several files: ``doors/NAME.py`` and ``doors/NAME_*.py``."""
    prefix = f"{PACKAGE}.doors."
    if not module.startswith(prefix):
        return None
    name = module.removeprefix(prefix).partition(".")[0].partition("_")[0]
    return SECOND_ENTRANCES.get(name, name)


def test_doors_do_not_know_each_other() -> None:
    assert not [
        f"{found.importer} imports {found.imported}"
        for found in IMPORTS
        if None not in (door_of(found.importer), door_of(found.imported))
        and door_of(found.importer) != door_of(found.imported)
    ]


def test_there_is_no_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        if not found.for_types:
            graph[found.importer].add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a cycle of imports: " + " -> ".join(error.args[1]))


def test_importing_the_handler_is_light_and_starts_nothing() -> None:
    program = (
        "import sys, threading\n"
        "import handler\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(heavy, [t.name for t in threading.enumerate() if t is not threading.main_thread()])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"
