"""Filling a directory so that it is whole at every moment.

Work happens in siblings of the target whose names begin with ``.<target>~``: what is
downloaded (kept when a run breaks off, so that the next one goes on) and the new content,
which takes the target's place in one step at the end. A lock on the parent directory
keeps two runs apart; whatever is left of a killed one is removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from whisper_worker.cache.layout import OWN_ENTRIES
from whisper_worker.errors import ModelError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class NotEnoughSpace(ModelError):
    """The disk has no room for the model."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """``download`` outlives a run that breaks off; ``fresh`` becomes the target."""

    download: Path
    fresh: Path


@contextmanager
def replacing(target: Path, key: str) -> Iterator[Workspace]:
    """Directories to work in; leaving without an error puts ``fresh`` in the target's place.

    ``key`` says what is being downloaded: only a download with the same key is gone on
    with. What else lies in the target (a README, models side by side) is carried over.
    Waits while another run fills a directory beside it.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}~"
    work = Workspace(parent / f"{prefix}download~{key}", parent / f"{prefix}new")
    old = parent / f"{prefix}old"
    lock = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if old.exists() and not target.exists():
            old.rename(target)  # a run was killed between the two renames
        for leftover in parent.glob(f"{glob.escape(prefix)}*"):
            if leftover != work.download:
                shutil.rmtree(leftover)
        work.download.mkdir(exist_ok=True)
        work.fresh.mkdir()
        try:
            yield work
            _carry_over(target, work.fresh)
            _swap(work.fresh, target, old)
            shutil.rmtree(work.download)
        finally:
            shutil.rmtree(work.fresh, ignore_errors=True)
            if work.download.exists() and not any(work.download.iterdir()):
                work.download.rmdir()
    finally:
        os.close(lock)


def require_space(directory: Path, n_bytes: int) -> None:
    """Raise :class:`NotEnoughSpace` where ``directory`` (or where it will be made) has less free than ``n_bytes``."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise NotEnoughSpace(
            f"Not enough disk space: {_size(n_bytes)} are needed while the model is saved, {_size(free)} are free. "
            "Make room, or choose another place with --output."
        )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def _carry_over(target: Path, fresh: Path) -> None:
    """Bring along what is not ours, as hard links: the old directory stays whole until the swap."""
    for path in target.iterdir() if target.exists() else ():
        if path.name in OWN_ENTRIES:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, fresh / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, fresh / path.name)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _swap(fresh: Path, target: Path, old: Path) -> None:
    try:
        if not target.exists():
            fresh.rename(target)
        elif not _exchange(fresh, target):
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise ModelError(
                "The model cache cannot be replaced in one step: it is a mount point or part of an image. "
                "Save into a directory inside it instead: --output CACHE/models/NAME"
            ) from error
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot
        return False
    raise OSError(number, os.strerror(number))
