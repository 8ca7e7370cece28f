#!/usr/bin/env python3
"""Show, check and mend the model cache's pipeline_config.pkl. Nothing in it is executed.

python scripts/inspect_config.py              show it, and what is wrong with it
python scripts/inspect_config.py --diff       what --fix would change
python scripts/inspect_config.py --fix        remove torch_dtype, dtype, device, device_map and
                                              batch_size: the worker decides these when it starts.
                                              The old file stays beside it (.bak, .bak.1, ...)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the package lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from whisper_worker.cache.config_pickle import read_config, without_runtime_keys, write_config
from whisper_worker.cache.layout import (
    MODEL_DIR,
    PIPELINE_CONFIG,
    PROCESSOR_DIR,
    Manifest,
    default_cache,
    read_model_config,
)
from whisper_worker.cache.names import has_sizes_of, resolve, same_model
from whisper_worker.errors import InvalidInput, ModelError
from whisper_worker.settings import Settings

FINE, PROBLEMS, UNREADABLE = 0, 1, 2

EXIT_CODES = """exit codes:
  0  nothing is wrong (with --fix: nothing is wrong any more)
  1  something is wrong; it is listed
  2  the file is missing, damaged or hostile and was not taken; or wrong arguments
"""

_TASK = "automatic-speech-recognition"
_LONGEST_CHUNK_S = 30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--path",
        type=Path,
        metavar="PATH",
        help="the file, or the cache directory that holds it; default: WHISPER_MODEL_CACHE, else whisper_model_cache "
        "beside handler.py",
    )
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--fix", action="store_true", help="remove what the worker decides itself; keeps a backup")
    change.add_argument("--diff", action="store_true", help="show what --fix would remove, and change nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)

    try:
        given: Path = options.path or default_cache(Settings.from_env())
    except InvalidInput as error:
        parser.error(error.message)
    path = given / PIPELINE_CONFIG if given.is_dir() else given
    try:
        config = read_config(path)
        kept, removable = without_runtime_keys(config)
        problems = _problems(kept, path.parent)
        backup = None
        if options.fix and removable:
            backup = _replace(path, kept)
            config, removable = kept, ()
    except FileNotFoundError:
        where = "fill the cache with save_pipeline.py, or say with --path where it is"
        return _unreadable(f"there is no {PIPELINE_CONFIG} here; {where}.", as_json=options.json)
    except (ModelError, OSError) as error:
        message = error.message if isinstance(error, ModelError) else f"{PIPELINE_CONFIG}: {error.strerror}"
        return _unreadable(message, as_json=options.json)

    if options.json:
        report = {
            "config": _plain(config),
            "removable": list(removable),
            "problems": problems,
            "backup": backup.name if backup else None,
        }
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        _print(config, removable, problems, backup, only_diff=options.diff)
    return PROBLEMS if removable or problems else FINE


def _unreadable(message: str, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message}))
    else:
        print(f"error: {message}", file=sys.stderr)
    return UNREADABLE


def _print(
    config: Mapping[str, object],
    removable: tuple[str, ...],
    problems: list[str],
    backup: Path | None,
    *,
    only_diff: bool,
) -> None:
    for name, value in _lines(config, removable):
        if name in removable:
            print(f"- {name}: {value}")
        elif not only_diff:
            print(f"  {name}: {value}")
    if removable and not only_diff:
        print("Lines with a minus conflict with what the worker decides itself: --fix removes them.")
    if backup is not None:
        print(f"Fixed; the old file is {backup.name}.")
    elif not removable:
        print("Nothing conflicts with what the worker decides itself: there is nothing to fix.")
    for problem in problems:
        print(f"problem: {problem}")


def _lines(config: Mapping[str, object], whole: tuple[str, ...], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values; a mapping's are named one by one, but for those in ``whole``."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value and prefix + key not in whole:
            lines += _lines(value, whole, f"{prefix}{key}.")
        else:
            lines.append((prefix + key, repr(value)))
    return lines


def _plain(value: object) -> object:
    """For JSON: torch values by their names, tuples and sets as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _problems(config: Mapping[str, object], cache: Path) -> list[str]:
    """What is wrong beyond the removable keys: within the configuration, and against the model beside it."""
    problems = []
    if config.get("task", _TASK) != _TASK:
        problems.append(f"task is {config['task']!r}; a Whisper pipeline's is {_TASK!r}")
    chunk = config.get("chunk_length_s", _LONGEST_CHUNK_S)
    if isinstance(chunk, bool) or not isinstance(chunk, (int, float)) or not 0 <= chunk <= _LONGEST_CHUNK_S:
        problems.append(f"chunk_length_s is {chunk!r}; Whisper hears at most {_LONGEST_CHUNK_S} seconds at a time")
    try:
        model = read_model_config(cache / MODEL_DIR)
        manifest = Manifest.read(cache)
        if manifest is not None:
            manifest.check_sizes(cache)
    except ModelError as error:
        return [*problems, error.message]
    return [*problems, *_naming_problems(config, model, manifest), *_processor_problems(model, cache / PROCESSOR_DIR)]


def _naming_problems(config: Mapping[str, object], model: Mapping[str, object], manifest: Manifest | None) -> list[str]:
    named = config.get("model_id", config.get("model"))
    if not isinstance(named, str):
        return []
    if manifest is not None:
        if same_model(named, manifest.model):
            return []
        return [f"it names the model {named!r}; the cache holds {manifest.model!r}"]
    try:
        fits = has_sizes_of(model, resolve(named).short)
    except ModelError:  # a directory, or somebody's own name
        return []
    return [] if fits else [f"it names the model {named!r}; the weights have other sizes"]


def _processor_problems(model: Mapping[str, object], processor: Path) -> list[str]:
    separate, joined = processor / "preprocessor_config.json", processor / "processor_config.json"
    try:
        if separate.is_file():
            mels = json.loads(separate.read_text(encoding="utf-8"))["feature_size"]
        else:  # how transformers saves it since version 5
            mels = json.loads(joined.read_text(encoding="utf-8"))["feature_extractor"]["feature_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["the feature extractor's configuration is missing or damaged"]
    if mels != model.get("num_mel_bins"):
        return [f"the feature extractor makes {mels} mel bands; the model takes {model.get('num_mel_bins')}"]
    return []


def _replace(path: Path, config: Mapping[str, object]) -> Path:
    """Write the mended configuration; gives the backup of the old one."""
    number = 0
    backup = path.with_name(path.name + ".bak")
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.bak.{number}")
    shutil.copy2(path, backup)
    write_config(path, config)
    return backup


if __name__ == "__main__":
    sys.exit(main())
