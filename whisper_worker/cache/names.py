"""What people call a model, and what it is called on the Hugging Face hub.

``resolve`` takes openai/whisper's short names, the distilled models' short names, hub
names and the names of well-known CTranslate2 conversions, and gives one record.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from whisper_worker.errors import ModelError

DEFAULT_MODEL = "openai/whisper-large-v3-turbo"

_REPOSITORIES: dict[str, tuple[str, str]] = {
    "tiny": ("openai/whisper-tiny", "169d4a4341b33bc18d8881c4b69c2e104e1cc0af"),
    "tiny.en": ("openai/whisper-tiny.en", "87c7102498dcde7456f24cfd30239ca606ed9063"),
    "base": ("openai/whisper-base", "e37978b90ca9030d5170a5c07aadb050351a65bb"),
    "base.en": ("openai/whisper-base.en", "911407f4214e0e1d82085af863093ec0b66f9cd6"),
    "small": ("openai/whisper-small", "973afd24965f72e36ca33b3055d56a652f456b4d"),
    "small.en": ("openai/whisper-small.en", "e8727524f962ee844a7319d92be39ac1bd25655a"),
    "medium": ("openai/whisper-medium", "abdf7c39ab9d0397620ccaea8974cc764cd0953e"),
    "medium.en": ("openai/whisper-medium.en", "2e98eb6279edf5095af0c8dedb36bdec0acd172b"),
    # The hub keeps the first large model under the bare name; openai/whisper's `large` is the third.
    "large-v1": ("openai/whisper-large", "4ef9b41f0d4fe232daafdb5f76bb1dd8b23e01d7"),
    "large-v2": ("openai/whisper-large-v2", "ae4642769ce2ad8fc292556ccea8e901f1530655"),
    "large-v3": ("openai/whisper-large-v3", "06f233fe06e710322aca913c1bc4249a0d71fce1"),
    "large-v3-turbo": (DEFAULT_MODEL, "41f01f3fe87f28c78e2fbf8b568835947dd65ed9"),
    "distil-small.en": ("distil-whisper/distil-small.en", "9e4a67ca4569c30be43a3fe7fba1621e504f0093"),
    "distil-medium.en": ("distil-whisper/distil-medium.en", "6e61418885eaf4d5cc9f64e508e80ac5b4c052b7"),
    "distil-large-v2": ("distil-whisper/distil-large-v2", "97d2c8f9cae1b0f6c8fc2e173495ee4cedc05843"),
    "distil-large-v3": ("distil-whisper/distil-large-v3", "8031d2e6ce6631b7fc45629dddfc00271116d981"),
    "distil-large-v3.5": ("distil-whisper/distil-large-v3.5", "728a7691f3ff1d3d971528d3203a6e9559165d41"),
}
"""Short name -> hub repository and the commit of it that is downloaded unless told otherwise."""

_SIZES: dict[str, tuple[int, int, int, int]] = {
    "tiny": (384, 4, 4, 51865),
    "tiny.en": (384, 4, 4, 51864),
    "base": (512, 6, 6, 51865),
    "base.en": (512, 6, 6, 51864),
    "small": (768, 12, 12, 51865),
    "small.en": (768, 12, 12, 51864),
    "medium": (1024, 24, 24, 51865),
    "medium.en": (1024, 24, 24, 51864),
    "large-v1": (1280, 32, 32, 51865),
    "large-v2": (1280, 32, 32, 51865),
    "large-v3": (1280, 32, 32, 51866),
    "large-v3-turbo": (1280, 32, 4, 51866),
    "distil-small.en": (768, 12, 4, 51864),
    "distil-medium.en": (1024, 24, 2, 51864),
    "distil-large-v2": (1280, 32, 2, 51865),
    "distil-large-v3": (1280, 32, 2, 51866),
    "distil-large-v3.5": (1280, 32, 2, 51866),
}
"""Width, encoder layers, decoder layers and vocabulary: what tells nameless checkpoints apart."""

_ALIASES = {"large": "large-v3", "turbo": "large-v3-turbo"}

_BY_REPOSITORY = {repository.lower(): short for short, (repository, _) in _REPOSITORIES.items()}

_CONVERSION = re.compile(r"faster-(?:distil-)?whisper-(?P<short>.+?)(?:-ct2)?")
"""How CTranslate2 conversions of the known models are named, whoever made them."""

_REPOSITORY_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model by all its names.

    ``short`` is what two names of the same model share; for a repository that is none of
    the known models it is the repository with ``--`` for the slash. ``revision`` is the
    commit pinned here, None where none is known: then the source's newest is taken and recorded.
    """

    repository: str
    short: str
    revision: str | None
    is_ct2: bool


def resolve(name: str) -> ModelName:
    """The record of a model name. Raises :class:`ModelError` for what cannot be one."""
    name = name.strip()
    lowered = name.lower()
    bare = _short_of_conversion(f"/{lowered}") or lowered.removeprefix("whisper-")
    short = _BY_REPOSITORY.get(lowered, _ALIASES.get(bare, bare))
    if short in _REPOSITORIES:
        repository, revision = _REPOSITORIES[short]
        return ModelName(repository, short, revision, is_ct2=False)
    if not _REPOSITORY_NAME.fullmatch(name):
        close = difflib.get_close_matches(lowered, [*_REPOSITORIES, *_ALIASES], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ModelError(
            f"No model has the name asked for, and no directory.{hint} "
            "Give one of openai/whisper's names (tiny.en, base, turbo, ...), a hub name (organisation/model) "
            "or a directory that exists."
        )
    return ModelName(name, _short_of_conversion(lowered) or name.replace("/", "--"), None, _looks_like_ct2(lowered))


def canonical(label: str) -> str:
    """The hub name of a known model, and any other label as it is."""
    try:
        return resolve(label).repository
    except ModelError:
        return label


def known_short(name: str) -> str | None:
    """The short name of a known model, None for all others."""
    try:
        short = resolve(name).short
    except ModelError:
        return None
    return short if short in _REPOSITORIES else None


def same_model(one: str, other: str) -> bool:
    """Whether two names mean the same weights, e.g. ``turbo`` and ``openai/whisper-large-v3-turbo``."""
    try:
        return resolve(one).short == resolve(other).short
    except ModelError:
        return one == other


def has_sizes_of(config: Mapping[str, object], short: str) -> bool:
    """Whether a checkpoint's config.json has the sizes of the model ``short``; any will do for an unknown one."""
    keys = ("d_model", "encoder_layers", "decoder_layers", "vocab_size")
    return short not in _SIZES or tuple(config.get(key) for key in keys) == _SIZES[short]


def _looks_like_ct2(repository: str) -> bool:
    return repository.endswith("-ct2") or "/faster-" in repository


def _short_of_conversion(repository: str) -> str | None:
    organisation, _, model = repository.partition("/")
    if organisation == "distil-whisper" and model.endswith("-ct2"):
        candidate = model.removesuffix("-ct2")
    elif match := _CONVERSION.fullmatch(model):
        candidate = ("distil-" if "-distil-" in model else "") + match["short"]
    else:
        return None
    candidate = _ALIASES.get(candidate, candidate)
    return candidate if candidate in _REPOSITORIES else None
