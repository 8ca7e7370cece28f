"""Make a virtual environment and install pinned packages, without root.

    python3 scripts/setup_venv.py run|test|peers

``run`` fills .venv with what the worker needs, ``test`` adds what the tests and benchmarks
need, ``peers`` fills .venv-peers with the implementations that benchmarks compare with. A
finished environment is recognised in milliseconds; one whose installation broke off is made
anew; changed requirements are installed into the one that is there.

Standard library only: it runs before anything is installed. Exit codes: 0 done, 1 failed,
with the reason and what to do on standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = {
    "run": ["requirements.txt"],
    "test": ["requirements.txt", "requirements-test.txt"],
    "peers": ["requirements-peers.txt"],
}
UNFINISHED = "unfinished"  # a file of this name marks an environment whose installation has not ended
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def has_nvidia_card() -> bool:
    """True where a driver answers: a card without one is of no use to torch."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def debian_pip_wheel(folder: Path) -> Path:
    """Fetch the pip wheel that Debian and Ubuntu package for their own venv module.

    ``apt-get download`` needs no root. A machine that never ran ``apt-get update``, such as a
    fresh container, gets package lists of its own under ``folder``.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SetupError(
            "this Python has no ensurepip: install the venv module of your system's Python, then try again"
        )
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    own_lists = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder / 'cache'}"]
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)

    def apt(*arguments: str) -> bool:
        return subprocess.run(["apt-get", "-qq", *arguments], cwd=folder, stderr=subprocess.DEVNULL).returncode == 0

    if not apt("download", "python3-pip-whl"):
        apt(*own_lists, "update")
        apt(*own_lists, "download", "python3-pip-whl")
    for package in folder.glob("python3-pip-whl_*.deb"):
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=folder, check=True)
    wheels = sorted(folder.glob("unpacked/usr/share/python-wheels/pip-*.whl"))
    if not wheels:
        raise SetupError(
            "this Python has no ensurepip and apt could not fetch a replacement: "
            "run 'apt-get install python3-venv' as root, then try again"
        )
    return wheels[0]


def make_venv(venv: Path) -> None:
    """Make an environment with nothing but pip, in the place of whatever was there."""
    if venv.exists():
        shutil.rmtree(venv)
    venv.mkdir()
    (venv / UNFINISHED).touch()
    if importlib.util.find_spec("ensurepip") is not None:
        say(f"Making {venv.name}")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        return
    say(f"Making {venv.name} with pip from the system's package archive (python3-venv is not installed)")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = debian_pip_wheel(Path(folder))
        subprocess.run(
            [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--no-index", str(wheel)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(wheel)},
        )


def pip_install(venv: Path, *arguments: str, hide_errors: bool = False) -> bool:
    """Run pip in the environment; True if it succeeded."""
    command = [str(venv / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    errors = subprocess.DEVNULL if hide_errors else None
    return subprocess.run([*command, *arguments], cwd=ROOT, stderr=errors).returncode == 0


def install_torch(venv: Path, cuda: bool) -> None:
    """Install torch alone and first, so that no other package chooses its build."""
    match = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise SetupError("constraints.txt does not pin torch")
    version = match[1]
    if cuda:
        say(f"Installing torch {version} with CUDA (several gigabytes)")
        if pip_install(venv, "--no-deps", f"torch=={version},!={version}+cpu"):
            return
    elif not sys.platform.startswith("linux"):
        say(f"Installing torch {version}")
        if pip_install(venv, "--no-deps", f"torch=={version}"):
            return
    else:
        say(f"Installing torch {version} for CPUs")
        pinned = f"torch=={version}+cpu"
        # pip's own configuration may know a folder or mirror that has the CPU build; PyPI has not.
        if pip_install(venv, "--no-deps", pinned, hide_errors=True):
            return
        if pip_install(venv, "--no-deps", pinned, "--index-url", TORCH_CPU_INDEX):
            return
        say("PyTorch's CPU index did not answer: taking the CUDA build from the package index (several gigabytes)")
        if pip_install(venv, "--no-deps", f"torch=={version}"):
            return
    raise SetupError("torch could not be installed: see pip's message above")


def fingerprint(group: str, cuda: bool) -> str:
    """Everything that decides what the environment holds, as one digest."""
    digest = hashlib.sha256()
    for part in (PYTHON_VERSION, str(ROOT), str(cuda)):
        digest.update(part.encode() + b"\0")
    for name in [*REQUIREMENTS[group], CONSTRAINTS.name, "pyproject.toml", "scripts/setup_venv.py"]:
        digest.update((ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def set_up(group: str) -> None:
    venv = ROOT / (".venv-peers" if group == "peers" else ".venv")
    record, unfinished = venv / "installed.json", venv / UNFINISHED
    cuda = has_nvidia_card()
    wanted = fingerprint(group, cuda)
    installed: dict[str, str] = {}
    if record.is_file():
        installed = json.loads(record.read_text(encoding="utf-8"))
    sound = (venv / "bin/python").exists() and not unfinished.exists()
    if sound and installed.get(group) == wanted:
        return
    if not sound or installed.get("python", PYTHON_VERSION) != PYTHON_VERSION:
        installed = {}
        make_venv(venv)
    unfinished.touch()
    install_torch(venv, cuda)
    say("Installing " + " and ".join(REQUIREMENTS[group]))
    arguments = [word for name in REQUIREMENTS[group] for word in ("-r", name)]
    if group != "peers":
        arguments += ["-c", CONSTRAINTS.name, "setuptools"]
    if not pip_install(venv, *arguments):
        raise SetupError("the packages could not be installed: see pip's message above")
    if group != "peers" and not pip_install(venv, "--quiet", "--no-deps", "--no-build-isolation", "-e", "."):
        raise SetupError("the worker's own package could not be installed: see pip's message above")
    installed |= {"python": PYTHON_VERSION, group: wanted}
    if group == "test":
        installed["run"] = fingerprint("run", cuda)
    record.write_text(json.dumps(installed, indent=2), encoding="utf-8")
    unfinished.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a virtual environment with pinned packages.")
    parser.add_argument("group", choices=sorted(REQUIREMENTS))
    group = parser.parse_args().group
    if sys.version_info < (3, 10):  # noqa: UP036 - this file is run by whatever python3 there is
        print("Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 run", file=sys.stderr)
        return 1
    try:
        set_up(group)
    except SetupError as error:
        print(f"setup: {error}.", file=sys.stderr)
        return 1
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"setup: {error}. Remove the environment's folder and try again.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
