"""The token loop on a scripted model: rules, beams, sampling, rows that leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from whisper_worker.engine.decoding import _topk, decode_batch, initial_tokens
from whisper_worker.engine.recognizer import DecodingOptions, DecodingResult, DecodingRow
from whisper_worker.types import CancelToken

EOT, SOT, PREV, NO_SPEECH, NO_STAMPS, BEGIN = 10, 11, 12, 13, 14, 15
N_VOCAB = BEGIN + 1501


class Tokens:
    """Text tokens 0 to 9, then the special ones in Whisper's order. Token 9 is a blank."""

    eot, sot, sot_prev, no_speech, no_timestamps, timestamp_begin = EOT, SOT, PREV, NO_SPEECH, NO_STAMPS, BEGIN
    control_tokens = (SOT, PREV, NO_SPEECH, NO_STAMPS)
    blank_tokens = (9, EOT)

    def sot_sequence(self, language: str | None, task: str, *, timestamps: bool) -> list[int]:
        return [SOT] if timestamps else [SOT, NO_STAMPS]


@dataclass
class Dims:
    n_text_ctx: int = 64


Script = Callable[[float, list[int]], dict[int, float]]
"""Logits of a row by token: from the window's state (a number) and what the row holds so far."""


class State:
    def __init__(self, model: Model, states: Sequence[float], group: int) -> None:
        self.model, self.group = model, group
        self.windows = list(states)
        self.rows: list[list[int]] = []

    def begin(self, prompts: Sequence[Sequence[int]], logits_at: Sequence[Sequence[int]]) -> torch.Tensor:
        self.rows = [list(prompt) for prompt in prompts for _ in range(self.group)]
        return self._logits()[:: self.group, None].repeat(1, len(logits_at[0]), 1)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        for row, new in zip(self.rows, tokens.tolist(), strict=True):
            row.extend(new)
        return self._logits()

    def _logits(self) -> torch.Tensor:
        self.model.rows_stepped.append(len(self.rows))
        out = torch.full((len(self.rows), N_VOCAB), -20.0)
        for place, row in enumerate(self.rows):
            for token, logit in self.model.script(self.windows[place // self.group], list(row)).items():
                out[place, token] = logit
        return out

    def reorder_rows(self, index: torch.Tensor) -> None:
        self.rows = [list(self.rows[i]) for i in index.tolist()]

    def keep_windows(self, index: torch.Tensor) -> None:
        kept = index.tolist()
        self.rows = [self.rows[i * self.group + j] for i in kept for j in range(self.group)]
        self.windows = [self.windows[i] for i in kept]


class Model:
    device = torch.device("cpu")
    dims = Dims()

    def __init__(self, script: Script) -> None:
        self.script = script
        self.rows_stepped: list[int] = []

    def new_state(self, states: Sequence[float], group: int, max_tokens: int) -> State:
        return State(self, states, group)


def stamp(seconds: float) -> int:
    return BEGIN + round(seconds / 0.02)


def decode(
    script: Script,
    states: Sequence[float] = (0.0,),
    cancel: Sequence[CancelToken | None] = (),
    max_timestamp: float = 30.0,
    **options: object,
) -> tuple[list[DecodingResult], Model]:
    model = Model(script)
    rows = [DecodingRow(state, "en", max_timestamp=max_timestamp) for state in states]
    results = decode_batch(model, Tokens(), rows, DecodingOptions(**options), cancel)  # type: ignore[arg-type]
    return results, model


def follow(*sequence: int) -> Script:
    """The model wants exactly these tokens, then the end."""

    def script(_: float, row: list[int]) -> dict[int, float]:
        place = len(row) - 1 - row.index(SOT)
        return {8: 1.0, sequence[place] if place < len(sequence) else EOT: 5.0}

    return script


def test_greedy_follows_the_model_and_counts_the_end() -> None:
    wanted = (stamp(0), 1, 2, stamp(2))
    (result,), _ = decode(follow(*wanted))
    assert result.tokens == wanted
    assert -0.5 < result.avg_logprob < 0.0
    assert 0.0 <= result.no_speech_prob < 0.1


def test_the_first_token_is_an_early_timestamp() -> None:
    """A model that wants to begin with text, or late, is made to begin with a timestamp up to 1 s."""
    (result,), _ = decode(lambda _, row: {stamp(5): 10.0, 1: 9.0, stamp(0.4): 2.0} if len(row) == 1 else {EOT: 9.0})
    assert result.tokens[0] == stamp(0.4)


def test_timestamps_never_fall_and_pairs_close() -> None:
    steps: list[dict[int, float]] = [
        {stamp(0.5): 9.0},
        {1: 9.0},
        {stamp(0.2): 12.0, stamp(3): 9.0},  # going back is refused
        {1: 12.0, stamp(3): 9.0},  # after a lone closing stamp only a stamp or the end may come
        {stamp(4): 12.0, 2: 9.0},  # after a pair only text may come
        {EOT: 9.0},
    ]
    (result,), _ = decode(lambda _, row: steps[len(row) - 1])
    assert result.tokens == (stamp(0.5), 1, stamp(3), stamp(3), 2)


def test_no_timestamp_lies_behind_the_window() -> None:
    steps = [{stamp(0): 9.0}, {1: 9.0}, {stamp(9): 12.0, stamp(4): 9.0}, {EOT: 9.0}]
    (result,), _ = decode(lambda _, row: steps[len(row) - 1], max_timestamp=5.0)
    assert result.tokens == (stamp(0), 1, stamp(4))


def test_many_weak_timestamps_beat_one_text_token() -> None:
    def script(_: float, row: list[int]) -> dict[int, float]:
        if len(row) == 1:
            return {stamp(0): 9.0}
        if len(row) == 2:
            return {1: 5.0}
        if len(row) == 3:
            return {2: 5.0, **{stamp(1 + i * 0.02): 4.0 for i in range(20)}}
        return {EOT: 9.0}

    (result,), _ = decode(script)
    assert result.tokens[:2] == (stamp(0), 1)
    assert result.tokens[2] >= BEGIN


def test_suppressed_and_control_tokens_are_never_said() -> None:
    steps = [{stamp(0): 9.0}, {3: 12.0, SOT: 13.0, NO_STAMPS: 13.0, 4: 9.0}, {stamp(1): 9.0}, {EOT: 9.0}]
    (result,), _ = decode(lambda _, row: steps[len(row) - 1], suppress_tokens=(3,))
    assert result.tokens == (stamp(0), 4, stamp(1))


def test_without_timestamps_only_text_comes_and_not_a_blank_first() -> None:
    def script(_: float, row: list[int]) -> dict[int, float]:
        said = row[2:]
        return {9: 12.0, stamp(0): 11.0, 1: 9.0} if not said else {EOT: 9.0}

    (result,), _ = decode(script, without_timestamps=True)
    assert result.tokens == (1,)


def test_windows_that_are_done_leave_the_batch() -> None:
    def script(state: float, row: list[int]) -> dict[int, float]:
        said = len(row) - 1
        if said == 0:
            return {stamp(0): 9.0}
        return {1: 9.0} if said <= state else {EOT: 9.0}

    results, model = decode(script, states=(2.0, 30.0, 2.0, 2.0))
    assert [len(result.tokens) for result in results] == [3, 31, 3, 3]
    assert model.rows_stepped[0] == 4
    assert model.rows_stepped[-1] == 1


@pytest.mark.parametrize("beam_size", [None, 3])
def test_a_window_is_told_when_it_is_done_and_once(beam_size: int | None) -> None:
    def script(state: float, row: list[int]) -> dict[int, float]:
        said = len(row) - 1
        return {stamp(0): 9.0} if said == 0 else {1: 9.0} if said <= state else {EOT: 9.0}

    model = Model(script)
    told: list[tuple[int, DecodingResult, int]] = []
    results = decode_batch(
        model,  # type: ignore[arg-type]
        Tokens(),  # type: ignore[arg-type]
        [DecodingRow(state, "en") for state in (20.0, 2.0, 9.0)],
        DecodingOptions(beam_size=beam_size),
        done=lambda place, result: told.append((place, result, len(model.rows_stepped))),
    )
    assert [place for place, _, _ in told] == [1, 2, 0]
    assert [result for _, result, _ in sorted(told, key=lambda one: one[0])] == results
    assert told[0][2] < told[1][2] < told[2][2]


def test_a_row_alone_and_in_a_batch_gives_the_same() -> None:
    def script(state: float, row: list[int]) -> dict[int, float]:
        said = len(row) - 1
        if said == 0:
            return {stamp(0): 9.0}
        if said > 6 + state:
            return {EOT: 9.0}
        return {int(state) + 1: 2.0, 5: 1.8, 6: 1.5}

    for options in ({}, {"temperature": 0.8, "best_of": 3, "seed": 5}, {"beam_size": 3}):
        together, _ = decode(script, states=(0.0, 1.0, 2.0), **options)
        alone = [decode(script, states=(state,), **options)[0][0] for state in (0.0, 1.0, 2.0)]
        assert [result.tokens for result in together] == [result.tokens for result in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-5)


def test_sampling_varies_with_the_seed_and_only_with_it() -> None:
    def script(_: float, row: list[int]) -> dict[int, float]:
        if len(row) == 1:
            return {stamp(0): 9.0}
        return dict.fromkeys(range(8), 1.0) if len(row) < 12 else {EOT: 9.0}

    runs = [decode(script, temperature=1.0, best_of=1, seed=seed)[0][0].tokens for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def garden_path(_: float, row: list[int]) -> dict[int, float]:
    """Token 1 looks better at first, but what follows token 2 is far likelier."""
    said = row[1:]
    if not said:
        return {stamp(0): 15.0}
    if len(said) == 1:
        return {1: 3.0, 2: 2.6}
    if len(said) == 2:
        return {3: 15.0} if said[1] == 2 else dict.fromkeys((3, 4, 5, 6, 7), 1.0)
    return {EOT: 15.0}


def test_beam_search_sees_past_the_garden_path() -> None:
    (greedy,), _ = decode(garden_path)
    (beam,), _ = decode(garden_path, beam_size=3)
    assert greedy.tokens[1] == 1
    assert beam.tokens == (stamp(0), 2, 3)
    assert beam.avg_logprob > greedy.avg_logprob


def test_patience_lets_later_candidates_in() -> None:
    """With patience 1 the short end wins; with more, a longer and likelier sequence is still found."""

    def script(_: float, row: list[int]) -> dict[int, float]:
        said = row[1:]
        if not said:
            return {stamp(0): 15.0}
        if len(said) == 1:
            return {1: 4.0, 2: 3.0}
        if len(said) < 6:
            return {3: 15.0, EOT: 14.0}
        return {EOT: 15.0}

    (short,), _ = decode(script, beam_size=2, patience=1.0, length_penalty=0.0)
    (patient,), model = decode(script, beam_size=2, patience=3.0)
    assert len(patient.tokens) >= len(short.tokens)
    assert len(model.rows_stepped) > 3


def test_length_penalty_changes_the_ranking() -> None:
    def script(_: float, row: list[int]) -> dict[int, float]:
        said = row[1:]
        if not said:
            return {stamp(0): 15.0}
        return {EOT: 2.6, 1: 3.0} if len(said) < 6 else {EOT: 15.0}

    (plain,), _ = decode(script, beam_size=4, length_penalty=0.0)
    (normalised,), _ = decode(script, beam_size=4)
    assert len(normalised.tokens) > len(plain.tokens)


def test_no_sequence_is_longer_than_the_bound() -> None:
    (result,), model = decode(lambda _, row: {stamp(0): 9.0} if len(row) == 1 else {1: 9.0}, max_new_tokens=8)
    assert len(result.tokens) == 8
    (result,), _ = decode(lambda _, row: {stamp(0): 9.0} if len(row) == 1 else {1: 9.0}, max_new_tokens=500)
    assert len(result.tokens) == Dims.n_text_ctx - 1
    assert model.rows_stepped


def test_a_cancelled_row_stops_and_the_others_go_on() -> None:
    token = CancelToken()

    def script(state: float, row: list[int]) -> dict[int, float]:
        if state == 1.0 and len(row) == 4:
            token.cancel()
        return {stamp(0): 9.0} if len(row) == 1 else {1: 9.0} if len(row) < 20 else {EOT: 9.0}

    results, model = decode(script, states=(1.0, 2.0), cancel=(token, None))
    assert len(results[0].tokens) < 8
    assert len(results[1].tokens) == 19
    assert model.rows_stepped[-1] == 1


def test_prompt_and_prefix_stand_around_the_start_sequence() -> None:
    row = DecodingRow(0.0, "en", prompt=tuple(range(5)) * 20, prefix=(7, 8))
    tokens = initial_tokens(Tokens(), row, DecodingOptions(), 64)  # type: ignore[arg-type]
    assert tokens[0] == PREV
    assert tokens[-3:] == [SOT, 7, 8]
    assert len(tokens) == 1 + 31 + 1 + 2
    assert math.isclose(tokens[1:-3].count(4), 6, abs_tol=1)


@pytest.mark.parametrize("n_vocab", [100, 1024, 1500])
def test_the_greatest_are_found_block_by_block(n_vocab: int) -> None:
    logits = torch.rand(5, n_vocab).log()
    logits[1, : n_vocab // 2] = -math.inf
    logits[2, 10:13] = 1.0 + torch.arange(3)
    logits[3, -2:] = 1.0 + torch.arange(2)
    assert torch.equal(_topk(logits, 4), logits.topk(4, dim=-1).indices)
