"""Job directories go with their job, and those of killed processes with the next start."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from whisper_worker.audio import jobdir
from whisper_worker.audio.jobdir import clean_leftovers, job_directory
from whisper_worker.errors import InternalError
from whisper_worker.settings import Settings

HOLD = """
import sys, time
from pathlib import Path
from whisper_worker.audio.jobdir import job_directory
from whisper_worker.settings import Settings
with job_directory(Settings(tmp_dir=Path(sys.argv[1]))) as directory:
    (directory / "audio.mp3").write_bytes(b"x")
    print("ready", flush=True)
    time.sleep(60)
"""


def hold_directory(base: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(base)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_job_has_a_directory_of_its_own_and_leaves_none(tmp_path: Path) -> None:
    settings = Settings(tmp_dir=tmp_path / "not" / "yet")
    with job_directory(settings) as one, job_directory(settings) as two:
        assert one != two
        assert one.parent == settings.tmp_dir
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
        (one / "sub").mkdir()
        (one / "sub" / "file").write_bytes(b"x")
    assert settings.tmp_dir is not None and list(settings.tmp_dir.iterdir()) == []


def test_a_failing_job_leaves_none_either(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), job_directory(Settings(tmp_dir=tmp_path)):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_where_no_directory_can_be_made_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(InternalError, match="WHISPER_TMPDIR") as caught,
        job_directory(Settings(tmp_dir=tmp_path / "file")),
    ):
        pass
    assert str(tmp_path) not in caught.value.message


def test_leftovers_of_a_killed_process_are_removed_those_of_a_live_one_kept(tmp_path: Path) -> None:
    settings = Settings(tmp_dir=tmp_path)
    killed, alive = hold_directory(tmp_path), hold_directory(tmp_path)
    try:
        assert clean_leftovers(settings) == 0
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with job_directory(settings) as mine:
            assert clean_leftovers(settings) == 1
            (of_living,) = (path for path in tmp_path.iterdir() if path != mine)
            assert f"-{alive.pid}-" in of_living.name
            assert (of_living / "audio.mp3").exists()
    finally:
        end(killed)
        end(alive)
    assert clean_leftovers(settings) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_used_again_does_not_protect_a_leftover(tmp_path: Path) -> None:
    """Process 1 of a container is process 1 again after the restart, but started later."""
    (tmp_path / f"whisper-job-{os.getpid()}-1-abcdefgh").mkdir()
    assert clean_leftovers(Settings(tmp_dir=tmp_path)) == 1


def test_a_lock_protects_a_directory_whose_maker_cannot_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers that share a volume do not see each other's processes."""
    settings = Settings(tmp_dir=tmp_path)
    with job_directory(settings) as directory:
        monkeypatch.setattr(jobdir, "_start_time", lambda pid: None)
        assert clean_leftovers(settings) == 0
        assert directory.exists()


@pytest.mark.parametrize(
    "name", ["whisper-job-999999999", "whisper-job-x-1-abc", "other", "my-whisper-job-999999999-1-a"]
)
def test_what_has_another_name_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert clean_leftovers(Settings(tmp_dir=tmp_path)) == 0
    assert (tmp_path / name).exists()


def test_links_and_files_are_not_followed_or_removed(tmp_path: Path) -> None:
    base, precious = tmp_path / "base", tmp_path / "precious"
    base.mkdir()
    precious.mkdir()
    (base / "whisper-job-999999999-1-link").symlink_to(precious)
    (base / "whisper-job-999999999-1-file").write_bytes(b"x")
    assert clean_leftovers(Settings(tmp_dir=base)) == 0
    assert precious.exists() and len(list(base.iterdir())) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's directory")
def test_another_users_directory_is_left_alone(tmp_path: Path) -> None:
    strange = tmp_path / "whisper-job-999999999-1-abc"
    strange.mkdir()
    os.chown(strange, 12345, 12345)
    assert clean_leftovers(Settings(tmp_dir=tmp_path)) == 0
    assert strange.exists()


def test_no_directory_no_leftovers(tmp_path: Path) -> None:
    assert clean_leftovers(Settings(tmp_dir=tmp_path / "missing")) == 0
