"""Models of the Hugging Face hub (or of the mirror that HF_ENDPOINT names)."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_worker.cache.checkpoint import MODEL_FILES, PROCESSOR_FILES
from whisper_worker.cache.layout import CT2_WEIGHTS, WEIGHTS, WEIGHTS_INDEX, sha256_of
from whisper_worker.errors import DownloadError, ModelError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_PATIENCE_SECONDS = 8.0
"""A hub that has not answered by then counts as out of reach: name resolution alone can hang for minutes."""

_WEIGHTS = (
    (WEIGHTS,),
    (WEIGHTS_INDEX, r"model-\d+-of-\d+\.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", r"pytorch_model-\d+-of-\d+\.bin"),
    (CT2_WEIGHTS,),
)
"""Weights by preference: one must be there by its exact name, with what matches the pattern."""

_CT2_FILES = ("vocabulary.json", "vocabulary.txt")


@dataclass(frozen=True, slots=True)
class Found:
    """A repository at one commit, and what of it is wanted."""

    repository: str
    commit: str
    files: tuple[str, ...]
    n_bytes: int
    sums: dict[str, str] = field(repr=False)
    """SHA-256 of the large files, as the hub states them."""


def look_up(repository: str, revision: str | None) -> Found:
    """Ask the hub for a repository; tells within seconds whether it can be reached.

    Raises :class:`DownloadError` where it cannot, :class:`ModelError` where it has no such
    model, or no leave to give it.
    """
    outcome: list[ModelInfo | Exception] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            api = HfApi()
            outcome.append(
                api.model_info(repository, revision=revision, files_metadata=True, timeout=_PATIENCE_SECONDS)
            )
        except Exception as error:  # handed to the caller's thread below
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE_SECONDS)
    if not outcome:
        raise DownloadError("The Hugging Face hub did not answer in time.")
    if isinstance(outcome[0], Exception):
        raise _explained(outcome[0]) from outcome[0]
    return _wanted(repository, outcome[0])


def fetch(found: Found, download: Path) -> Path:
    """Download what is wanted into ``download`` (files that are whole there are kept) and check the hub's sums.

    Raises :class:`DownloadError` where it breaks off, :class:`ModelError` where a sum differs.
    """
    from huggingface_hub import snapshot_download

    for piece in download.rglob("*.incomplete"):  # of a killed run; the library begins such a file anew
        piece.unlink()
    try:
        snapshot_download(
            found.repository,
            revision=found.commit,
            allow_patterns=list(found.files),
            local_dir=download,
            etag_timeout=_PATIENCE_SECONDS,
            max_workers=4,
        )
    except Exception as error:
        raise _explained(error) from error
    for name, expected in found.sums.items():
        if sha256_of(download / name) != expected:
            (download / name).unlink()
            raise ModelError(f"{name} did not arrive as the hub has it. Run this again.")
    return download


def _wanted(repository: str, info: ModelInfo) -> Found:
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    for exact, *patterns in _WEIGHTS:
        if exact in siblings:
            weights = [exact, *(name for name in siblings if any(re.fullmatch(one, name) for one in patterns))]
            break
    else:
        raise ModelError(f"The hub's {repository} has no weights that can be taken.")
    files = tuple(name for name in (*weights, *MODEL_FILES, *PROCESSOR_FILES, *_CT2_FILES) if name in siblings)
    large = {name: siblings[name].lfs for name in files}
    sums = {name: lfs.sha256 for name, lfs in large.items() if lfs is not None}
    n_bytes = sum(siblings[name].size or 0 for name in files)
    if info.sha is None:
        raise ModelError(f"The hub names no commit of {repository}.")
    return Found(repository, info.sha, files, n_bytes, sums)


def _explained(error: Exception) -> DownloadError | ModelError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelError("The model is gated: accept its terms on the hub and set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError("The hub has no such model, or it is private: check the name, or set HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("The hub's repository has no such revision: give another with --revision, e.g. main.")
    if isinstance(error, errors.HFValidationError):
        return ModelError("The hub takes no such name of a repository.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DownloadError("The Hugging Face hub is switched off here (HF_HUB_OFFLINE).")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return DownloadError(f"The Hugging Face hub answered with status {error.response.status_code}.")
    return DownloadError(f"The Hugging Face hub cannot be reached ({type(error).__name__}).")
