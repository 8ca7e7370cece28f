"""The token loop: windows already encoded, in; sampled tokens, out.

The rules are openai/whisper's (decoding.py there): what may not be said, how timestamps
pair and rise, how a beam is kept, how sequences are ranked. What differs is the batch:
windows of any length and job run side by side, and a window that is finished leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from whisper_worker.engine.recognizer import POSITION_SECONDS, DecodingOptions, DecodingResult, DecodingRow
from whisper_worker.types import CancelToken

if TYPE_CHECKING:
    from whisper_worker.engine.model import WhisperModel
    from whisper_worker.engine.tokenizer import Tokenizer

MAX_INITIAL_TIMESTAMP = 1.0
"""Latest first timestamp, in seconds: text that starts later means the model skipped speech."""

_COMPACT_SHARE = 0.25
"""Share of finished windows at which the caches are compacted. Each compaction copies what
remains, so doing it for every single window costs more than the idle rows it saves."""

_TOPK_BLOCK = 128


@dataclass(slots=True)
class _Hypothesis:
    """One finished or running sequence of a window."""

    tokens: list[int]
    sum_logprob: float


@dataclass(slots=True)
class _Window:
    """What is known of one window while it is in the batch."""

    index: int
    """Position in the caller's list."""
    no_speech_prob: float
    limit: int
    """Tokens that may be sampled."""
    running: list[_Hypothesis]
    finished: list[_Hypothesis] = field(default_factory=list)
    done: bool = False


class _Rules:
    """Masks logits in place so that only admissible tokens remain.

    The state of a row is its last timestamp and whether its last two tokens were
    timestamps; it moves with the row when rows are reordered or leave.
    """

    def __init__(self, tokenizer: Tokenizer, options: DecodingOptions, rows: Sequence[DecodingRow], group: int) -> None:
        self._eot = tokenizer.eot
        self._begin = tokenizer.timestamp_begin
        self._timestamps = not options.without_timestamps
        self._blank = torch.tensor(tokenizer.blank_tokens if options.suppress_blank else (), dtype=torch.long)
        self._suppressed = torch.tensor(sorted({*options.suppress_tokens, *tokenizer.control_tokens}))
        self._max_initial = self._begin + round(MAX_INITIAL_TIMESTAMP / POSITION_SECONDS)
        limits = [self._begin + math.ceil(round(row.max_timestamp / POSITION_SECONDS, 3)) for row in rows]
        self._limit = torch.tensor(limits).repeat_interleave(group)
        n_rows = len(rows) * group
        self._last_timestamp = torch.full((n_rows,), self._begin - 1)
        """Greatest timestamp so far; ``begin - 1`` while there is none."""
        # Before anything is sampled, openai/whisper counts both earlier tokens as timestamps.
        self._was_timestamp = torch.ones(n_rows, dtype=torch.bool)
        self._was_timestamp_before = torch.ones(n_rows, dtype=torch.bool)
        self._first = True

    def to(self, device: torch.device) -> _Rules:
        for name in ("_blank", "_suppressed", "_limit", "_last_timestamp", "_was_timestamp", "_was_timestamp_before"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def apply(self, logits: torch.Tensor) -> None:
        """``logits``: float32 ``(rows, n_vocab)``, masked in place with -inf."""
        begin = self._begin
        logits[:, self._suppressed] = -math.inf
        if self._first:
            logits[:, self._blank] = -math.inf
        if not self._timestamps:
            logits[:, begin:] = -math.inf
            return
        stamps = logits[:, begin:]
        position = torch.arange(begin, begin + stamps.shape[1], device=logits.device)
        pair_open = self._was_timestamp & ~self._was_timestamp_before
        if self._first:
            logits[:, :begin] = -math.inf
            stamps[:, self._max_initial - begin + 1 :] = -math.inf
        else:
            pair_closed = self._was_timestamp & self._was_timestamp_before
            # A closing timestamp may equal the opening one of the next pair, so an open pair admits its own value.
            least = torch.where(pair_open, self._last_timestamp, self._last_timestamp + 1)
            least = torch.where(self._last_timestamp < begin, torch.full_like(least, begin), least)
            least = torch.where(pair_closed, torch.full_like(least, begin + stamps.shape[1]), least)
            stamps.masked_fill_(position < least[:, None], -math.inf)
            # Few rows at a time: a mask over all rows of the vocabulary takes as long as a layer's attention.
            logits[pair_open.nonzero()[:, 0], : self._eot] = -math.inf
        stamps.masked_fill_(position > self._limit[:, None], -math.inf)
        # Where timestamps together are likelier than any one text token, a timestamp it is.
        # Their logsumexp (NaN, which exceeds nothing, where none is admitted) at a fifth of torch's own price.
        stamp_mass = stamps.amax(dim=-1) - torch.log_softmax(stamps, dim=-1).amax(dim=-1)
        best_text = logits[:, :begin].amax(dim=-1)
        logits[(stamp_mass > best_text).nonzero()[:, 0], :begin] = -math.inf

    def accept(self, tokens: torch.Tensor) -> None:
        """Record the tokens ``(rows,)`` that were chosen."""
        is_timestamp = tokens >= self._begin
        self._was_timestamp_before = torch.ones_like(is_timestamp) if self._first else self._was_timestamp
        self._was_timestamp = is_timestamp
        self._last_timestamp = torch.where(is_timestamp, tokens, self._last_timestamp)
        self._first = False

    def select(self, rows: torch.Tensor) -> None:
        """Keep or reorder rows."""
        for name in ("_limit", "_last_timestamp", "_was_timestamp", "_was_timestamp_before"):
            setattr(self, name, getattr(self, name)[rows])


def initial_tokens(tokenizer: Tokenizer, row: DecodingRow, options: DecodingOptions, n_text_ctx: int) -> list[int]:
    """Everything before the first sampled token: previous text, start sequence, prefix."""
    sequence = tokenizer.sot_sequence(row.language, options.task, timestamps=not options.without_timestamps)
    tokens: list[int] = []
    if row.prompt:
        tokens = [tokenizer.sot_prev, *row.prompt[-(n_text_ctx // 2 - 1) :]]
    return [*tokens, *sequence, *row.prefix]


@torch.inference_mode()
def decode_batch(
    model: WhisperModel,
    tokenizer: Tokenizer,
    rows: Sequence[DecodingRow],
    options: DecodingOptions,
    cancel: Sequence[CancelToken | None] = (),
    done: Callable[[int, DecodingResult], None] | None = None,
) -> list[DecodingResult]:
    """Decode windows side by side; see :meth:`Recognizer.decode` for the contract."""
    beam = options.beam_size if options.temperature == 0 and options.beam_size and options.beam_size > 1 else None
    group = beam or ((options.best_of or 1) if options.temperature > 0 else 1)
    prompts = [initial_tokens(tokenizer, row, options, model.dims.n_text_ctx) for row in rows]
    limits = [min(options.max_new_tokens, model.dims.n_text_ctx - len(prompt)) for prompt in prompts]
    state = model.new_state([row.state for row in rows], group, max(map(len, prompts)) + max(limits))
    device = model.device
    logits = state.begin(prompts, [(prompt.index(tokenizer.sot), len(prompt) - 1) for prompt in prompts])
    no_speech = torch.softmax(logits[:, 0], dim=-1)[:, tokenizer.no_speech].tolist()
    windows = [
        _Window(index, probability, limit, [_Hypothesis([], 0.0) for _ in range(group)])
        for index, (probability, limit) in enumerate(zip(no_speech, limits, strict=True))
    ]
    rules = _Rules(tokenizer, options, rows, group).to(device)
    noise = _Noise(options.seed, group, len(rows), device) if options.temperature > 0 else None
    chooser = _Beam(beam, options.patience or 1.0, tokenizer.eot) if beam else None
    results: list[DecodingResult | None] = [None] * len(rows)
    sums = torch.zeros(len(rows) * group, device=device)
    logits = logits[:, -1].repeat_interleave(group, dim=0)

    def finish(window: _Window) -> None:
        if results[window.index] is None:
            results[window.index] = result = _finish(window, options, group, tokenizer.eot)
            if done is not None:
                done(window.index, result)

    for step in range(max(limits)):
        rules.apply(logits)
        if chooser is None:
            chosen, sums = _pick(logits, sums, windows, options.temperature, noise, tokenizer.eot)
        else:
            order, chosen = chooser.advance(logits, windows, first=step == 0)
            state.reorder_rows(order)
            rules.select(order)
        rules.accept(chosen)
        for window in windows:
            token = cancel[window.index] if cancel else None
            if (token is not None and token.cancelled) or step + 1 == window.limit:
                window.done = True
            if window.done:
                finish(window)
        n_done = sum(window.done for window in windows)
        if n_done == len(windows):
            break
        if n_done >= max(1.0, _COMPACT_SHARE * len(windows)):
            kept = [place for place, window in enumerate(windows) if not window.done]
            windows = [windows[place] for place in kept]
            keep = torch.tensor(kept, device=device)
            state.keep_windows(keep)
            keep_rows = (keep[:, None] * group + torch.arange(group, device=device)).flatten()
            rules.select(keep_rows)
            chosen, sums = chosen[keep_rows], sums[keep_rows]
            if noise is not None:
                noise.select(kept)
        logits = state.step(chosen[:, None])
    return [result for result in results if result is not None]


def _pick(
    logits: torch.Tensor,
    sums: torch.Tensor,
    windows: list[_Window],
    temperature: float,
    noise: _Noise | None,
    eot: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy choice, or sampling at a temperature, for every row; appends to the windows' hypotheses."""
    scores = logits if noise is None else logits / temperature + noise.draw(logits.shape[1])
    chosen = scores.argmax(dim=-1)
    gained = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0]
    sums = sums + gained
    picked, totals = chosen.tolist(), sums.tolist()
    place = 0
    for window in windows:
        unfinished = False
        for hypothesis in window.running:
            if not hypothesis.tokens or hypothesis.tokens[-1] != eot:
                hypothesis.tokens.append(picked[place])
                hypothesis.sum_logprob = totals[place]
                unfinished |= picked[place] != eot
            place += 1
        window.done |= not unfinished
    return chosen, sums


class _Noise:
    """Gumbel noise with one generator a row, so that a window's samples do not depend on its batch."""

    def __init__(self, seed: int, group: int, n_windows: int, device: torch.device) -> None:
        self._device = device
        self._generators = [
            [torch.Generator().manual_seed(seed + sample) for sample in range(group)] for _ in range(n_windows)
        ]

    def draw(self, n: int) -> torch.Tensor:
        """Gumbel(0, 1) noise ``(rows, n)``: adding it before argmax samples from the softmax."""
        uniform = [torch.rand(n, generator=generator) for row in self._generators for generator in row]
        return -torch.log(-torch.log(torch.stack(uniform).clamp_(1e-20, 1 - 1e-7))).to(self._device)

    def select(self, windows: list[int]) -> None:
        self._generators = [self._generators[window] for window in windows]


class _Beam:
    """Beam search as openai/whisper's: a window is done once ``beam * patience`` sequences ended."""

    def __init__(self, size: int, patience: float, eot: int) -> None:
        self._size = size
        self._max_candidates = max(1, round(size * patience))
        self._eot = eot

    def advance(
        self, logits: torch.Tensor, windows: list[_Window], *, first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose each window's next beams: the rows they continue ``(rows,)`` and their tokens ``(rows,)``."""
        size = self._size
        candidates = _topk(logits, size + 1)
        gains, tokens = torch.log_softmax(logits, dim=-1).gather(1, candidates).tolist(), candidates.tolist()
        order: list[int] = []
        chosen: list[int] = []
        for place, window in enumerate(windows):
            base = place * size
            # At the first step all beams are the same row; looking at one keeps them from being copies.
            parents = range(1 if first else size)
            ranked = sorted(
                (
                    (window.running[beam].sum_logprob + gains[base + beam][k], beam, tokens[base + beam][k])
                    for beam in parents
                    for k in range(size + 1)
                    if gains[base + beam][k] > -math.inf
                ),
                key=lambda candidate: -candidate[0],
            )
            running: list[_Hypothesis] = []
            ended: list[_Hypothesis] = []
            for score, beam, token in ranked:
                grown = _Hypothesis([*window.running[beam].tokens, token], score)
                if token == self._eot:
                    ended.append(grown)
                    continue
                running.append(grown)
                order.append(base + beam)
                chosen.append(token)
                if len(running) == size:
                    break
            for _ in range(size - len(running)):
                # Fewer admissible continuations than beams: an idle beam that can never win.
                running.append(_Hypothesis([self._eot], -math.inf))
                order.append(base)
                chosen.append(self._eot)
            window.running = running
            if not window.done:
                window.finished.extend(ended[: self._max_candidates - len(window.finished)])
                window.done = len(window.finished) >= self._max_candidates or running[0].sum_logprob == -math.inf
        device = logits.device
        return torch.tensor(order, device=device), torch.tensor(chosen, device=device)


def _topk(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Places of the k greatest of every row, greatest first: the blocks with the k greatest maxima hold them all."""
    rows, n = logits.shape
    n_blocks = n // _TOPK_BLOCK
    if n_blocks < k:
        return logits.topk(k, dim=-1).indices
    whole = n_blocks * _TOPK_BLOCK
    blocks = logits[:, :whole].view(rows, n_blocks, _TOPK_BLOCK).amax(dim=-1).topk(k, dim=-1).indices
    within = torch.arange(_TOPK_BLOCK, device=logits.device)
    rest = torch.arange(whole, n, device=logits.device).expand(rows, -1)
    places = torch.cat([(blocks[:, :, None] * _TOPK_BLOCK + within).flatten(1), rest], dim=1)
    return places.gather(1, logits.gather(1, places).topk(k, dim=-1).indices)


def _finish(window: _Window, options: DecodingOptions, group: int, eot: int) -> DecodingResult:
    """Keep the best of a window's sequences: those that ended, and of those cut off the likeliest where they are too
    few for the group."""
    running = sorted(window.running, key=lambda hypothesis: -hypothesis.sum_logprob)
    candidates = [*window.finished, *running[: max(0, group - len(window.finished))]]
    best = max(candidates, key=lambda hypothesis: _score(hypothesis, options.length_penalty, eot))
    tokens = _without_end(best.tokens, eot)
    return DecodingResult(
        tokens=tuple(tokens),
        avg_logprob=best.sum_logprob / (len(tokens) + 1),
        no_speech_prob=window.no_speech_prob,
        temperature=options.temperature,
    )


def _without_end(tokens: list[int], eot: int) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] == eot else tokens


def _score(hypothesis: _Hypothesis, length_penalty: float | None, eot: int) -> float:
    """Log probability over length, or over Google NMT's penalty where ``length_penalty`` is given."""
    length = max(1, len(_without_end(hypothesis.tokens, eot)))
    return hypothesis.sum_logprob / (length if length_penalty is None else ((5 + length) / 6) ** length_penalty)
