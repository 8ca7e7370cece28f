"""How models lie on disk, and finding the one that is wanted.

A cache directory holds ``model/`` (weights, config.json, generation_config.json),
``processor/`` (tokenizer, feature extractor), ``pipeline_config.pkl`` and
``manifest.json``; further models lie beside it under ``models/<short name>/`` in the same
layout. Plain Hugging Face checkpoints and the hub's own cache are used where they are.
Nothing here needs more than the standard library: finding a model takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from whisper_worker.cache.config_pickle import read_config, without_runtime_keys
from whisper_worker.cache.names import ModelName, canonical, has_sizes_of, known_short, resolve, same_model
from whisper_worker.errors import ModelError
from whisper_worker.settings import Settings

MODEL_DIR = "model"
PROCESSOR_DIR = "processor"
PIPELINE_CONFIG = "pipeline_config.pkl"
MANIFEST = "manifest.json"
OWN_ENTRIES = (MODEL_DIR, PROCESSOR_DIR, PIPELINE_CONFIG, MANIFEST)
SIDE_BY_SIDE = "models"

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CT2_WEIGHTS = "model.bin"

PLATFORM_HUB = Path("/runpod-volume/huggingface-cache/hub")
"""Where RunPod keeps models that an endpoint names."""

_CACHE_NAME = "whisper_model_cache"
_REPOSITORY_ROOT = Path(__file__).parents[2]
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ModelNotHere(ModelError):
    """The model is not on this machine: fetching it would help."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model found on disk, ready to be loaded from where it lies.

    ``processor_dir`` may equal ``model_dir``. ``pipeline_config`` is what
    pipeline_config.pkl says, less what the worker decides itself (types, devices, sizes).
    """

    model_dir: Path
    processor_dir: Path
    name: str
    revision: str | None
    source: str
    pipeline_config: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and SHA-256 of one file."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What save_pipeline.py wrote down: names are hub names, ``files`` are relative to the cache directory."""

    model: str
    revision: str | None
    source: str
    dtype: str
    files: Mapping[str, FileSum]

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The directory's manifest, None where it has none. Raises :class:`ModelError` where it is damaged."""
        try:
            content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            files = {
                name: FileSum(int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()
            }
            return cls(str(content["model"]), content["revision"], str(content["source"]), str(content["dtype"]), files)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                "The model cache's manifest.json is damaged. Fill the cache anew: "
                "python save_pipeline.py --force --model NAME."
            ) from error

    def write(self, directory: Path) -> None:
        content = {
            "model": self.model,
            "revision": self.revision,
            "source": self.source,
            "dtype": self.dtype,
            "files": {name: {"bytes": entry.n_bytes, "sha256": entry.sha256} for name, entry in self.files.items()},
        }
        (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def check_sizes(self, directory: Path) -> None:
        """Raise :class:`ModelError` where a file is missing or has another size; reads no content."""
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry.n_bytes:
                raise _damaged(name, self.model, self.source)

    def check_sums(self, directory: Path) -> None:
        """Raise :class:`ModelError` where a file's content is not what was written."""
        self.check_sizes(directory)
        for name, entry in self.files.items():
            if sha256_of(directory / name) != entry.sha256:
                raise _damaged(name, self.model, self.source)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_model(settings: Settings) -> ModelFiles:
    """The model that the settings ask for, found in the cache, in a directory, or in a hub cache.

    Looked at in this order: a directory named by ``settings.model``; the cache directory and
    the models beside it; the platform's volume; the user's own hub cache (by name only).
    Raises :class:`ModelNotHere` that says how to get it, :class:`ModelError` where what is there is no use.
    """
    wanted = settings.model
    roots = _cache_directories(settings)
    if wanted is None:
        return _only_model(roots)
    if _is_path(wanted):
        directory = Path(wanted).expanduser()
        if not directory.is_dir():
            raise ModelError("WHISPER_MODEL names a directory that does not exist.")
        return _open(directory)
    cached = []
    for directory in _models_in(roots):
        recorded = recorded_name(directory)
        if same_model(recorded, wanted) if recorded else _has_sizes_of(directory, known_short(wanted)):
            return _open(directory, recorded or resolve(wanted).repository)
        cached.append(recorded or "a model without a name")
    name = resolve(wanted)
    snapshots = [snapshot for hub in (PLATFORM_HUB, _own_hub()) for snapshot in _snapshots(hub, name)]
    # A conversion cannot be used, but opening it tells what to do with it.
    for is_taken in (_has_weights, _is_conversion):
        for snapshot in filter(is_taken, snapshots):
            return _open_snapshot(snapshot)
    there = f" (the cache holds {', '.join(cached)})" if cached else ""
    called = known_short(wanted) or name.repository
    raise ModelNotHere(
        f"The model {called} is not on this machine{there}. Run: python save_pipeline.py --model {called}"
    )


def verify(files: ModelFiles) -> int:
    """Check the SHA-256 sums that are on record for a model's files; gives how many were checked.

    On record are a manifest's, and in a hub cache the names of large files' contents.
    A plain directory has none (0). Raises :class:`ModelError` for the first that differs.
    """
    cache = files.model_dir.parent
    manifest = Manifest.read(cache) if files.model_dir.name == MODEL_DIR else None
    if manifest is not None:
        manifest.check_sums(cache)
        return len(manifest.files)
    checked = 0
    for path in sorted(files.model_dir.iterdir()):
        content = path.resolve()
        if path.is_symlink() and _SHA256.fullmatch(content.name):
            if sha256_of(content) != content.name:
                raise _damaged(path.name, files.name, files.source)
            checked += 1
    return checked


def read_model_config(model_dir: Path) -> dict[str, object]:
    """config.json of a Whisper checkpoint. Raises :class:`ModelError` where it is missing, damaged or foreign."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("The model's directory has no config.json.") from None
    except ValueError as error:
        raise ModelError("The model's config.json is damaged. Get the model again.") from error
    if not isinstance(config, dict) or config.get("model_type") != "whisper":
        raise ModelError("The model is no Whisper checkpoint of Hugging Face's kind (config.json: model_type).")
    return config


def default_cache(settings: Settings) -> Path:
    """The directory that save_pipeline.py fills unless told otherwise; by itself the one beside handler.py."""
    return settings.model_cache or _REPOSITORY_ROOT / _CACHE_NAME


def _cache_directories(settings: Settings) -> tuple[Path, ...]:
    if settings.model_cache is not None:
        return (settings.model_cache,)
    return (default_cache(settings), Path("/") / _CACHE_NAME)


def _models_in(roots: tuple[Path, ...]) -> Iterator[Path]:
    for root in roots:
        beside = root / SIDE_BY_SIDE
        for directory in (root, *(sorted(beside.iterdir()) if beside.is_dir() else ())):
            if (directory / MODEL_DIR / "config.json").is_file() or (directory / "config.json").is_file():
                yield directory


def _only_model(roots: tuple[Path, ...]) -> ModelFiles:
    for root in roots:
        directories = list(_models_in((root,)))
        if directories and (directories[0] == root or len(directories) == 1):
            return _open(directories[0])
        if directories:
            names = ", ".join(directory.name for directory in directories)
            raise ModelError(f"The model cache holds several models: set WHISPER_MODEL to one of {names}.")
    on_volume = [path for path in _repositories(PLATFORM_HUB) if "whisper" in path.name.lower()]
    if len(on_volume) == 1:
        name = resolve(_repository_of(on_volume[0]))
        for snapshot in _snapshots(PLATFORM_HUB, name):
            if _has_weights(snapshot):
                return _open_snapshot(snapshot)
    raise ModelNotHere(
        "No model is on this machine. Run: python save_pipeline.py (the default model), "
        "or python save_pipeline.py --model tiny.en (the smallest)."
    )


def _open(directory: Path, name: str | None = None) -> ModelFiles:
    """A cache directory or a plain checkpoint; ``name`` where it is known already."""
    if not (directory / MODEL_DIR).is_dir():
        _check_files(directory, directory)
        name = name or recorded_name(directory) or directory.name
        return ModelFiles(directory, directory, name, None, "directory", _no_config())
    manifest = Manifest.read(directory)
    if manifest is not None:
        manifest.check_sizes(directory)
    model_dir, processor_dir = directory / MODEL_DIR, directory / PROCESSOR_DIR
    if not processor_dir.is_dir():
        processor_dir = model_dir
    _check_files(model_dir, processor_dir)
    config = _pipeline_config(directory)
    name = name or recorded_name(directory) or directory.name
    if manifest is None:
        return ModelFiles(model_dir, processor_dir, name, None, "directory", config)
    return ModelFiles(model_dir, processor_dir, name, manifest.revision, manifest.source, config)


def _open_snapshot(snapshot: Path) -> ModelFiles:
    _check_files(snapshot, snapshot)
    name = _repository_of(snapshot.parents[1])
    return ModelFiles(snapshot, snapshot, name, snapshot.name, "hub cache", _no_config())


def _repository_of(folder: Path) -> str:
    """The hub name that a folder of a hub cache stands for."""
    return folder.name.removeprefix("models--").replace("--", "/", 1)


def _check_files(model_dir: Path, processor_dir: Path) -> None:
    if _is_conversion(model_dir) and not _has_weights(model_dir):
        raise ModelError(
            "The model's directory holds a CTranslate2 conversion. "
            "Import it with: python save_pipeline.py --from DIRECTORY"
        )
    read_model_config(model_dir)
    if not _has_weights(model_dir):
        raise ModelError(
            "The model's directory has no complete safetensors weights. "
            "Import it with: python save_pipeline.py --from DIRECTORY"
        )
    if not (processor_dir / "tokenizer.json").is_file():
        raise ModelError(
            "The model's directory has no tokenizer.json. Import it with: python save_pipeline.py --from DIRECTORY"
        )


def _has_weights(model_dir: Path) -> bool:
    if (model_dir / WEIGHTS).is_file():
        return True
    index = model_dir / WEIGHTS_INDEX
    return index.is_file() and all((model_dir / shard).is_file() for shard in shards(index))


def _is_conversion(model_dir: Path) -> bool:
    return (model_dir / CT2_WEIGHTS).is_file()


def shards(index: Path) -> tuple[str, ...]:
    """File names of sharded weights. Raises :class:`ModelError` where the index is damaged."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("no plain file names")
        return tuple(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} is damaged. Get the model again.") from error


def _pipeline_config(directory: Path) -> Mapping[str, object]:
    path = directory / PIPELINE_CONFIG
    if not path.is_file():
        return _no_config()
    return MappingProxyType(without_runtime_keys(read_config(path))[0])


def _no_config() -> Mapping[str, object]:
    return MappingProxyType({})


def recorded_name(directory: Path) -> str | None:
    """The name on record: the manifest's, the pipeline configuration's, or the one transformers wrote."""
    manifest = Manifest.read(directory)
    if manifest is not None:
        return manifest.model
    if _is_conversion(directory):
        return None
    config = _pipeline_config(directory)
    written = read_model_config(_model_dir(directory)).get("_name_or_path")
    for candidate in (config.get("model_id"), config.get("model"), written):
        if isinstance(candidate, str) and candidate and not _is_path(candidate):
            return candidate
    return None


def _has_sizes_of(directory: Path, short: str | None) -> bool:
    return short is not None and has_sizes_of(read_model_config(_model_dir(directory)), short)


def _model_dir(directory: Path) -> Path:
    return directory / MODEL_DIR if (directory / MODEL_DIR).is_dir() else directory


def _is_path(name: str) -> bool:
    """A known model's name wins over a directory that happens to be called the same."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    return known_short(name) is None and Path(name).is_dir()


def _own_hub() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _repositories(hub: Path) -> list[Path]:
    return sorted(hub.glob("models--*--*")) if hub.is_dir() else []


def _snapshots(hub: Path, name: ModelName) -> Iterator[Path]:
    """Snapshots of the model in a hub cache: the pinned commit first, then the branch's, then the newest."""
    for repository in sorted(
        {name.repository, canonical(name.short)} if known_short(name.short) else {name.repository}
    ):
        folder = hub / f"models--{repository.replace('/', '--')}"
        present = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        main = folder / "refs" / "main"
        first = (resolve(repository).revision, main.read_text().strip() if main.is_file() else None)
        yield from sorted(present, key=lambda path: first.index(path.name) if path.name in first else len(first))


def _damaged(name: str, model: str, source: str) -> ModelError:
    # Without the model's name the default one would take its place.
    again = "--from DIRECTORY" if source.startswith("directory") else f"--model {known_short(model) or model}"
    return ModelError(
        f"The model cache is damaged: {name} is missing or not what was written. "
        f"Fill it anew: python save_pipeline.py --force {again}"
    )
