"""A cache directory is whole at every moment: replaced in one step, whatever happens on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from whisper_worker.cache import store
from whisper_worker.cache.layout import FileSum, Manifest, sha256_of
from whisper_worker.cache.store import NotEnoughSpace, replacing, require_space
from whisper_worker.errors import ModelError


def fill(directory: Path, content: str) -> None:
    """A stand-in of a model, with a manifest that tells whether it is whole."""
    (directory / "model").mkdir()
    (directory / "processor").mkdir()
    for name in ("model/model.safetensors", "model/config.json", "processor/tokenizer.json"):
        (directory / name).write_text(content * 1000)
    files = {
        path.relative_to(directory).as_posix(): FileSum(path.stat().st_size, sha256_of(path))
        for path in directory.rglob("*")
        if path.is_file()
    }
    Manifest(content, None, "test", "float16", files).write(directory)


def held(directory: Path) -> str:
    """What a whole cache directory holds; fails for anything less."""
    manifest = Manifest.read(directory)
    assert manifest is not None
    manifest.check_sums(directory)
    return manifest.model


def hidden(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A cache that holds the old model, a README and a model beside it."""
    directory = tmp_path / "cache"
    with replacing(directory, "first") as work:
        fill(work.fresh, "old")
    (directory / "README.md").write_text("read me")
    (directory / "models" / "base").mkdir(parents=True)
    fill(directory / "models" / "base", "beside")
    return directory


@pytest.fixture(params=[True, False], ids=["exchange", "renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system call that swaps two directories, and without it."""
    if not request.param:
        monkeypatch.setattr(store, "_exchange", lambda one, other: False)


def test_a_directory_is_made(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep" / "cache", "x") as work:
        fill(work.fresh, "new")
        assert not (tmp_path / "deep" / "cache").exists()
    assert held(tmp_path / "deep" / "cache") == "new"
    assert hidden(tmp_path / "deep") == []


@pytest.mark.usefixtures("either_way")
def test_the_model_is_replaced_and_the_rest_carried_over(target: Path) -> None:
    with replacing(target, "x") as work:
        fill(work.fresh, "new")
        (work.fresh / "model" / "only_new").write_text("")
        assert held(target) == "old"
    assert held(target) == "new"
    assert (target / "model" / "only_new").exists()
    assert (target / "README.md").read_text() == "read me"
    assert held(target / "models" / "base") == "beside"
    assert hidden(target.parent) == []


@pytest.mark.usefixtures("either_way")
def test_an_error_changes_nothing_and_keeps_the_download(target: Path) -> None:
    with pytest.raises(ModelError), replacing(target, "x") as work:
        (work.download / "part").write_text("half")
        fill(work.fresh, "new")
        raise ModelError("no")
    assert held(target) == "old"
    assert hidden(target.parent) == [".cache~download~x"]
    with replacing(target, "x") as work:
        assert (work.download / "part").read_text() == "half"
        fill(work.fresh, "new")
    assert held(target) == "new"
    assert hidden(target.parent) == []


def test_what_a_killed_run_left_goes_whatever_the_directory_is_called(tmp_path: Path) -> None:
    """Brackets in the name were read as a pattern: what was left behind stayed, and every further run failed on it."""
    (tmp_path / ".c[1]~new" / "model").mkdir(parents=True)
    with replacing(tmp_path / "c[1]", "x") as work:
        fill(work.fresh, "new")
    assert held(tmp_path / "c[1]") == "new"
    assert hidden(tmp_path) == []


def test_another_models_download_is_not_gone_on_with(target: Path) -> None:
    neighbour = target.parent / ".cache.en~download~y"
    neighbour.mkdir()
    with pytest.raises(ModelError), replacing(target, "x") as work:
        (work.download / "part").write_text("half")
        raise ModelError("no")
    with pytest.raises(ModelError), replacing(target, "y") as work:
        assert not any(work.download.iterdir())
        raise ModelError("no")
    assert hidden(target.parent) == [neighbour.name]


def kill_at_many_steps(target: Path) -> set[str]:
    """Replace the cache in a child process, over and over, each time killed at another step.

    A step is anything the interpreter reports of its work on files: every fifth of them, and
    all around renames and system calls. After each kill the cache must be whole, and the next
    run leaves nothing behind. Gives what the cache held after the kills. Forks: only for a
    process with a single thread.
    """
    original = target.parent / "original"
    shutil.copytree(target, original)
    log = target.parent / "steps"
    assert _status_of_run(target, 0, log) == 0
    assert held(target) == "new"
    steps = log.read_text().split()
    assert len(steps) > 30
    swaps = [number for number, step in enumerate(steps, 1) if step == "os.rename" or step.startswith("ctypes")]
    moments = {*range(1, len(steps) + 1, 5), *(number + near for number in swaps for near in (-1, 0, 1))}
    outcomes: set[str] = set()
    for moment in sorted(moments & set(range(1, len(steps) + 1))):
        shutil.rmtree(target)
        shutil.copytree(original, target)
        assert _status_of_run(target, moment, log) == -signal.SIGKILL
        if not target.exists():
            outcomes.add("none")  # between two renames; the old one is beside, and the next run puts it back
            with contextlib.suppress(ModelError), replacing(target, "x"):
                assert held(target) == "old"
                raise ModelError("no")
        outcomes.add(held(target))
        assert (target / "README.md").read_text() == "read me"
        assert held(target / "models" / "base") == "beside"
        with replacing(target, "x") as work:
            fill(work.fresh, "newer")
        assert held(target) == "newer"
        assert held(target / "models" / "base") == "beside"
        assert hidden(target.parent) == []
    return outcomes


def _status_of_run(target: Path, moment: int, log: Path) -> int:
    """Replace the cache in a child that is killed at step ``moment``; 0 lets it end and write its steps down."""
    child = os.fork()
    if child == 0:
        steps: list[str] = []

        def step(event: str, arguments: tuple[object, ...]) -> None:
            if event.split(".")[0] in ("os", "shutil", "open", "ctypes"):
                steps.append(event)
                if len(steps) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        with replacing(target, "x") as work:
            (work.download / "part").write_text("all")
            fill(work.fresh, "new")
        log.write_text("\n".join(steps))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_at_any_moment_leaves_a_whole_cache(target: Path, way: str) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "import test_cache_store as test;"
        "test.store._exchange = test.store._exchange if sys.argv[3] == 'exchange' else lambda one, other: False;"
        "print(sorted(test.kill_at_many_steps(Path(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(target), way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("['new', 'old']" if way == "exchange" else "['new', 'none', 'old']")


def test_two_runs_do_not_mix(target: Path) -> None:
    """The second waits for the first, though both work on the same directory."""
    order: list[str] = []
    inside = threading.Event()

    def first() -> None:
        with replacing(target, "x") as work:
            inside.set()
            fill(work.fresh, "one")
            time.sleep(0.2)
            order.append("one")

    running = threading.Thread(target=first)
    running.start()
    assert inside.wait(5)
    with replacing(target, "x") as work:
        order.append("two")
        fill(work.fresh, "two")
    running.join()
    assert order == ["one", "two"]
    assert held(target) == "two"


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_mount_point_is_told(target: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(one: Path, other: Path) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "_exchange", refuse)
    with pytest.raises(ModelError, match="--output CACHE/models/NAME"), replacing(target, "x") as work:
        fill(work.fresh, "new")
    assert held(target) == "old"
    assert hidden(target.parent) == []


def test_space_is_asked_for_before_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(NotEnoughSpace, match=r"1000000000\.00 GB are needed.* GB are free") as caught:
        require_space(tmp_path / "not" / "yet" / "there", 10**18)
    assert str(tmp_path) not in caught.value.message
