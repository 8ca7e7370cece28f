"""A private directory for each job, gone when the job is.

A killed process cannot clean up, so the next one does. A directory's name holds the process
that made it (its id and start time, since ids are used again), and the process keeps a lock
on it: only when both say that the maker is gone is the directory removed. The lock also
tells apart processes of two containers that share a volume, whose ids mean nothing to each other.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from whisper_worker import log
from whisper_worker.errors import InternalError
from whisper_worker.settings import Settings

_NAME = re.compile(r"whisper-job-(\d+)-(\d+)-\w+")
_log = log.get_logger("jobdir")


@contextmanager
def job_directory(settings: Settings) -> Iterator[Path]:
    """A new directory that only this user may enter; removed on the way out, whatever happened.

    Raises :class:`InternalError` where none can be made.
    """
    pid = os.getpid()
    try:
        base = _base(settings)
        base.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f"whisper-job-{pid}-{_start_time(pid) or 0}-", dir=base))
    except OSError as error:
        raise InternalError(
            f"No directory for the job's files could be made ({error.strerror}); check WHISPER_TMPDIR."
        ) from error
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)
        if directory.exists():
            _log.warning("A job directory could not be removed")


def clean_leftovers(settings: Settings) -> int:
    """Remove job directories whose process is gone; returns how many. Call it once at start."""
    n_removed = 0
    with suppress(OSError), os.scandir(_base(settings)) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match and _is_ours(entry) and _is_abandoned(entry, int(match[1]), int(match[2])):
                shutil.rmtree(entry.path, ignore_errors=True)
                n_removed += 1
    if n_removed:
        _log.info("Removed leftovers of a process that was killed", extra={"fields": {"directories": n_removed}})
    return n_removed


def _base(settings: Settings) -> Path:
    return settings.tmp_dir or Path(tempfile.gettempdir())


def _is_ours(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid()
    return False


def _is_abandoned(entry: os.DirEntry[str], pid: int, start_time: int) -> bool:
    running_since = _start_time(pid)
    if running_since is not None and (running_since == start_time or 0 in (running_since, start_time)):
        return False
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the process id alone decides
        pass
    finally:
        os.close(descriptor)
    return True


def _start_time(pid: int) -> int | None:
    """Start of process ``pid`` in clock ticks since boot; 0 where the system does not tell; None if not running."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return 0
    # The second field is the program's name in brackets and may hold blanks and brackets itself.
    return int(stat.rpartition(")")[2].split()[19])
