"""Is this decode to be believed? The ladder of attempts and the guards against invented text."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum

from whisper_worker.engine.recognizer import DecodingOptions, DecodingResult
from whisper_worker.types import TranscribeOptions

_BEAM = 5
"""Beams where the caller names none, and of the second search."""

_DOUBTFUL_LOGPROB = -0.7
_DOUBTFUL_NO_SPEECH = 0.3
"""Where the voice detector is unsure, the model must be surer than usual for its text to stand."""

_TOKENS_PER_SECOND = 8.0
"""Whoever repeats a phrase that often speaks slower than this (fast English is about 6 tokens a second)."""

_LOOP_RATIO = 2.4
"""Compression ratio of repetition, openai/whisper's: loops of whole sentences have no short repeats."""


_LEAST_AGREEMENT = 0.3
"""Share of a text's words that the other attempts must have too, on average, where none of them was likely. Of
windows in noise of 0 and -5 dB that had less, a tenth of the words were right; of those with more, a fifth."""
_ATTEMPTS_COMPARED = 3
"""Least number of attempts whose contradiction means something."""

# Thai, Lao, Tibetan and Burmese; Khmer; kana; Chinese characters; kana of half width; rarer Chinese characters.
_NO_BLANKS = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_NO_BLANKS}]|[^\\s{_NO_BLANKS}]+")


class Verdict(Enum):
    ACCEPT = "accept"
    RETRY = "retry"
    SILENCE = "silence"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One decode of a window with what its quality is judged by."""

    result: DecodingResult
    text: str
    compression_ratio: float
    loop: bool = False
    """Repeats itself faster than anyone could speak: see :func:`is_loop`."""


def attempt(result: DecodingResult, text: str, *, loop: bool = False) -> Attempt:
    return Attempt(result, text, compression_ratio(text), loop)


def compression_ratio(text: str) -> float:
    """Bytes of ``text`` over its bytes deflated: high where the text repeats itself (openai/whisper's measure)."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def ladder(
    options: TranscribeOptions, suppress_tokens: tuple[int, ...], *, beams: int = _BEAM
) -> tuple[DecodingOptions, ...]:
    """The attempts in order: as asked, with ``beams`` if no number of them was asked for; a second search by beams, but
    for a caller who chose how many; rising temperatures."""
    if isinstance(options.temperature, tuple):
        temperatures = options.temperature
    elif options.temperature_increment_on_fallback:
        step, first = options.temperature_increment_on_fallback, options.temperature
        rises = max(0, int((1.0 - first) / step + 1e-6))
        temperatures = tuple(round(first + i * step, 6) for i in range(rises + 1))
    else:
        temperatures = (options.temperature,)
    steps: list[DecodingOptions] = []
    for temperature in temperatures or (0.0,):
        searches: tuple[int | None, ...] = (None,)
        if temperature == 0:
            # One beam is greedy decoding, which has a cheaper way of its own.
            first = options.beam_size or beams
            searches = (first if first > 1 else None,)
            if (options.beam_size or 0) <= 1 and len(temperatures) > 1:
                searches = (*searches, _BEAM)
        steps.extend(
            DecodingOptions(
                task=options.task,
                temperature=temperature,
                beam_size=beam,
                best_of=options.best_of if temperature > 0 else None,
                patience=options.patience if beam else None,
                length_penalty=options.length_penalty,
                suppress_tokens=suppress_tokens,
                without_timestamps=options.without_timestamps,
                seed=options.seed or 0,
            )
            for beam in searches
        )
    return tuple(steps)


def judge(
    tried: Sequence[Attempt],
    steps: Sequence[DecodingOptions],
    options: TranscribeOptions,
    *,
    doubtful: bool,
) -> Verdict:
    """Judge the last attempt by openai/whisper's rules, a doubtful window by stricter ones.

    ``steps`` is the ladder; RETRY is said even where there is no further step.
    """
    last = tried[-1]
    logprob, no_speech = last.result.avg_logprob, last.result.no_speech_prob
    low = options.logprob_threshold is not None and logprob < options.logprob_threshold
    silent = options.no_speech_threshold is not None and no_speech > options.no_speech_threshold
    if silent and (low or options.logprob_threshold is None):
        return Verdict.SILENCE
    if doubtful and (logprob < _DOUBTFUL_LOGPROB or no_speech > _DOUBTFUL_NO_SPEECH):
        return Verdict.SILENCE
    limit = options.compression_ratio_threshold
    repeats = limit is not None and (last.compression_ratio > limit or last.loop)
    ways = [(step.temperature, step.beam_size) for step in steps[: len(tried)]]
    agreed = any(
        way != ways[-1] and _folded(other.text) == _folded(last.text)
        for way, other in zip(ways[:-1], tried[:-1], strict=True)
    )
    if repeats and not low and not last.loop and agreed:
        # Two ways of searching agree on the repetition, at a speaker's pace: it was really said. The same way in
        # other context is not a second one: beams end repetitions early, and do so twice.
        return Verdict.ACCEPT
    return Verdict.RETRY if repeats or low else Verdict.ACCEPT


def best(tried: Sequence[Attempt], options: TranscribeOptions) -> Attempt:
    """The likeliest of the attempts that do not repeat themselves; of those that do if there is no other."""
    limit = options.compression_ratio_threshold
    calm = [one for one in tried if not one.loop]
    plain = [one for one in calm if limit is None or one.compression_ratio <= limit]
    return max(plain or calm or tried, key=lambda one: one.result.avg_logprob)


def is_invented(tried: Sequence[Attempt], options: TranscribeOptions) -> bool:
    """Whether all attempts failed, the best for being unlikely, and tell different stories.

    Such are windows of voices that hold no words which the model could know: a crowd, speech drowned in noise or
    played backwards. In speech that is only hard, attempts have words in common.
    """
    limit = options.logprob_threshold
    kept = best(tried, options)
    if limit is None or len(tried) < _ATTEMPTS_COMPARED or kept.result.avg_logprob >= limit:
        return False
    words = _words(kept.text)
    others = [_words(one.text) for one in tried if one is not kept]
    return bool(words) and sum(_shared(words, other) for other in others) < _LEAST_AGREEMENT * len(words) * len(others)


def is_loop(tokens: Sequence[int], text: str, speech_seconds: float) -> bool:
    """Whether the text tokens repeat themselves, and more quickly than anyone could say them."""
    hurried = len(tokens) > _TOKENS_PER_SECOND * max(speech_seconds, 1.0)
    return hurried and (longest_repeat(tokens) >= 4 or compression_ratio(text) > _LOOP_RATIO)


def longest_repeat(tokens: Sequence[int]) -> int:
    """Greatest number of times that a run of 1 to 12 tokens stands in a row."""
    most = 1
    for size in range(1, 13):
        same = 0
        for place in range(size, len(tokens)):
            same = same + 1 if tokens[place] == tokens[place - size] else 0
            most = max(most, same // size + 1)
    return most


def is_prompt_echo(text: str, prompt: str | None) -> bool:
    """Whether the text is the prompt read back: all of it, or four of its words or more in a row."""
    said, given = _folded(text), _folded(prompt or "")
    if not said or not given:
        return False
    return said == given or (said.count(" ") >= 3 and f" {said} " in f" {given} ")


def _words(text: str) -> Sequence[str]:
    """Words; characters where a script puts no blanks between them."""
    return _WORD.findall(_folded(text))


def _shared(words: Sequence[str], other: Sequence[str]) -> int:
    """How many of ``words`` are in ``other`` too, in the same order."""
    matcher = SequenceMatcher(None, words, other, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks())


def _folded(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
