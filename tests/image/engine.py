"""Builds the image with buildah and runs it with podman; both work without a daemon.

All they keep lies under ``.cache/image``: layers, so that a second build takes seconds, and
the base image, which debootstrap makes where no registry answers.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "image"
CONTEXT = CACHE / "context"
BASE = "localhost/whisper-worker-base:bookworm"
PACKAGES = ("buildah", "podman", "conmon", "crun", "runc", "catatonit", "debootstrap")
PROGRAMS = ("buildah", "podman", "conmon", "runc", "debootstrap")
SLIM_WITHOUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian")
"""What Debian's slim images leave out too; the copyright files in doc stay."""

_CONTAINERS_CONF = """[containers]
default_ulimits=["nofile=4096:4096","nproc=4096:4096"]
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
events_logger="file"
"""


class Unavailable(Exception):
    """The image cannot be built here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One command's end."""

    code: int
    out: str
    err: str

    @property
    def both(self) -> str:
        return self.out + self.err


def run(command: Sequence[str], *, seconds: float = 600, stdin: str | None = None) -> Ran:
    """Run to the end, whatever the end is; raises ``TimeoutExpired`` after ``seconds``."""
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(),
        cwd=CACHE,  # conmon leaves a file named oom where it was started
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def must(command: Sequence[str], *, seconds: float = 600, stdin: str | None = None) -> str:
    """Standard output of a command that has to succeed."""
    ran = run(command, seconds=seconds, stdin=stdin)
    assert ran.code == 0, f"{' '.join(command)[:300]} exited {ran.code}:\n{ran.both[-4000:]}"
    return ran.out


def environment() -> dict[str, str]:
    conf = CACHE / "containers.conf"
    # Volatile state goes by the storage options; the rest of podman's directories follow these.
    return {**os.environ, "CONTAINERS_CONF": str(conf), "BUILDAH_LAYERS": "true", "TMPDIR": str(CACHE / "tmp")}


def _storage() -> list[str]:
    return ["--root", str(CACHE / "storage"), "--runroot", str(CACHE / "run"), "--storage-driver", "overlay"]


def podman(*arguments: str, seconds: float = 600, stdin: str | None = None) -> Ran:
    return run(["podman", *_storage(), *arguments], seconds=seconds, stdin=stdin)


def buildah(*arguments: str) -> list[str]:
    return ["buildah", *_storage(), *arguments]


def prepare() -> None:
    """Install what builds and runs images, and make the base. Raises :class:`Unavailable`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        if os.getuid() != 0 or shutil.which("apt-get") is None:
            raise Unavailable(
                f"{', '.join(missing)} not found, and only root may install them: "
                f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
            )
        must(["apt-get", "-qq", "update"])
        must(["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *PACKAGES])
    for directory in (CACHE / "storage", CACHE / "run", CACHE / "tmp"):
        directory.mkdir(parents=True, exist_ok=True)
    (CACHE / "containers.conf").write_text(_CONTAINERS_CONF, encoding="utf-8")
    if podman("image", "exists", BASE).code != 0:
        _make_base()


def _make_base() -> None:
    """Debian with Python, in the size of the official slim image, whose place it takes."""
    tree = CACHE / "base"
    if tree.exists():
        shutil.rmtree(tree)
    must(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", "bookworm", str(tree)],
        seconds=1800,
    )
    for name in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        shutil.rmtree(tree / name)
        (tree / name).mkdir()
    for name in SLIM_WITHOUT:
        for path in sorted((tree / name).rglob("*"), reverse=True):
            if path.is_file() and path.name != "copyright":
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    must(["tar", "--numeric-owner", "-C", str(tree), "-cf", str(CACHE / "base.tar"), "."])
    shutil.rmtree(tree)
    must(
        buildah("bud", "--format", "docker", "--isolation", "chroot", "--tag", BASE, "-f", "-", str(CACHE)),
        stdin='FROM scratch\nADD base.tar /\nCMD ["python3"]\n',
    )
    (CACHE / "base.tar").unlink()


def make_context() -> Path:
    """The checkout without what git ignores: so the images are built without any model of this machine."""
    listed = must(["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"])
    if CONTEXT.exists():
        shutil.rmtree(CONTEXT)
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, CONTEXT / name
        if source.is_file() and not name.startswith("tests/"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return CONTEXT


def pip_mounts() -> list[str]:
    """Volumes that let pip inside the build reach what pip outside reaches, whatever that is configured to be."""
    options: dict[str, str] = {}
    for line in must([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if key.startswith((":env:", "global.", "install.")) and not (name in options and not key.startswith(":env:")):
            options[name] = str(ast.literal_eval(value))
    wanted: set[Path] = set()
    for value in options.values():
        for word in value.split():
            local = urlsplit(word).path if word.startswith("file://") else word if word.startswith("/") else ""
            if local and Path(local).exists():
                # An index refers to files beside it.
                wanted.add(Path(local).parent if word.startswith("file://") else Path(local))
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT"):
        if (path := os.environ.get(variable)) and Path(path).is_file():
            wanted.add(Path(path))
            options.setdefault("cert", path)
    lines = ["[global]"]
    lines += [f"{name} = {value.replace(chr(10), chr(10) + '    ')}" for name, value in sorted(options.items())]
    conf = CACHE / "pip.conf"
    conf.write_text("\n".join(lines) + "\n", encoding="utf-8")
    mounts = [f"{path}:{path}:ro" for path in sorted(wanted)]
    return [word for mount in (*mounts, f"{conf}:/etc/pip.conf:ro") for word in ("--volume", mount)]


def build(tag: str, target: str, context: Path = CONTEXT, **arguments: str) -> str:
    """Build one target for CPUs, without a model unless told so; gives the image's full name."""
    name = f"localhost/{tag}"
    given = {"BASE_IMAGE": BASE, "TORCH": "cpu", "MODEL": "none", "REVISION": "image-test", **arguments}
    command = buildah(
        "bud", "--format", "docker", "--isolation", "chroot", "--network", "host", "--pull-never", "--layers",
        *(word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")),
        *pip_mounts(), "--target", target, "--tag", name, str(context),
    )  # fmt: skip
    must(["nice", *command], seconds=3000)
    return name


def inspect(image: str) -> dict[str, Any]:
    (described,) = json.loads(must(["podman", *_storage(), "image", "inspect", image]))
    return dict(described)


def layers(image: str) -> list[tuple[int, str]]:
    """Bytes and instruction of each layer, the base first."""
    history = json.loads(must(["podman", *_storage(), "history", "--format", "json", "--no-trunc", image]))
    return [(int(entry["size"]), str(entry["CreatedBy"])) for entry in reversed(history)]


def container(*arguments: str, network: str = "none") -> list[str]:
    """The command that runs a container in the foreground; its options and image follow.

    ``network="host"`` shares this machine's loopback; else the container has one of its own.
    """
    return ["podman", *_storage(), "run", "--rm", "--network", network, "--no-healthcheck", *arguments]


def within(name: str, *arguments: str) -> list[str]:
    """The command that runs another program in a container."""
    return ["podman", *_storage(), "exec", "-i", name, *arguments]


@contextlib.contextmanager
def running(image: str, *command: str, options: Sequence[str] = (), network: str = "none") -> Iterator[str]:
    """A container in the background, by its name; it is gone at the end."""
    name = f"image-test-{uuid.uuid4().hex[:12]}"
    placed = ["--detach", "--no-healthcheck", "--network", network, "--name", name]
    started = podman("run", *placed, *options, image, *command)
    try:
        assert started.code == 0, started.both
        yield name
    finally:
        podman("rm", "--force", "--time", "0", name)
