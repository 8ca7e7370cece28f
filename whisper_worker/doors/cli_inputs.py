"""What the command is given to transcribe, and the names of what it writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from whisper_worker.errors import InvalidInput, TooLarge, WhisperWorkerError
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource

MEDIA = frozenset(
    ".3ga .3gp .aac .ac3 .aif .aiff .amr .ape .au .avi .awb .caf .dts .eac3 .flac .flv .gsm .m2ts .m4a .m4b .m4v .mka "
    ".mkv .mov .mp2 .mp3 .mp4 .mpeg .mpg .mpga .mts .mxf .oga .ogg .ogv .opus .ra .spx .ts .tta .vob .voc .w64 .wav "
    ".weba .webm .wma .wmv .wv".split()
)
"""What is taken out of a directory. A file named by itself may be called anything: its content decides."""

NOTHING = Path(os.devnull)
"""Asked to transcribe this, the command makes the model ready and writes nothing."""


@dataclass(frozen=True, slots=True)
class Input:
    """One recording. ``stem`` is where its outputs go, below the output directory and without an extension."""

    shown: str
    stem: PurePath
    source: AudioSource

    @property
    def is_nothing(self) -> bool:
        return self.source.path == NOTHING


def expand(words: Sequence[str], spool: Path, settings: Settings) -> Iterator[Input | tuple[str, WhisperWorkerError]]:
    """Every recording that the arguments stand for, or the argument and what is wrong with it.

    Standard input is written into ``spool`` first: decoding needs to seek in it, and a
    service may have to be sent it twice. Outputs of equal names are kept apart by the
    recordings' extensions, and by numbers where those are equal too.
    """
    taken: set[PurePath] = set()
    for word in words:
        try:
            for found in _expand(word, spool, settings):
                stem = found.stem
                if stem in taken and found.source.path is not None:
                    stem = stem.with_name(found.source.path.name)
                first, number = stem, 1
                while stem in taken:
                    number += 1
                    stem = first.with_name(f"{first.name}-{number}")
                taken.add(stem)
                yield Input(found.shown, stem, found.source)
        except WhisperWorkerError as error:
            yield word, error


def _expand(word: str, spool: Path, settings: Settings) -> Iterator[Input]:
    if word == "-":
        yield Input("standard input", PurePath("stdin"), AudioSource(path=_spooled(spool, settings)))
        return
    if word.lower().startswith(("http://", "https://")):
        name = PurePath(unquote(urlsplit(word).path)).name
        yield Input(name or "address", PurePath(PurePath(name).stem or "audio"), AudioSource(url=word))
        return
    path = Path(word)
    if not is_directory(word):
        try:
            path.stat()
        except (OSError, ValueError):
            raise InvalidInput("There is no such file, or it may not be read.") from None
        yield Input(path.name or word, PurePath(path.stem or "audio"), AudioSource(path=path))
        return
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in MEDIA and file.is_file() and not _is_hidden(file.relative_to(path))
    )
    if not found:
        raise InvalidInput("The directory holds no file that is called like audio or video.")
    for file in found:
        below = file.relative_to(path)
        yield Input(str(below), below.with_suffix(""), AudioSource(path=file))


def _is_hidden(below: PurePath) -> bool:
    """Trash, and the ``._call.wav`` that other systems put beside a recording: nobody means them."""
    return any(part.startswith(".") for part in below.parts)


def is_directory(word: str) -> bool:
    try:
        return Path(word).is_dir()
    except OSError:
        return False


def _spooled(spool: Path, settings: Settings) -> Path:
    path = spool / "stdin"
    n_bytes = 0
    with path.open("wb") as file:
        while block := sys.stdin.buffer.read(1 << 20):
            n_bytes += len(block)
            if n_bytes > settings.max_download_bytes:
                raise TooLarge("Standard input is larger than WHISPER_MAX_DOWNLOAD_BYTES allows.")
            file.write(block)
    if not n_bytes:
        raise InvalidInput("Standard input is empty.")
    return path
