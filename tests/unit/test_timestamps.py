"""Segments, the seek rule and word times, on scripted tokens and attention."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from whisper_worker.engine.timestamps import Spans, clip_segment, clip_word, cut_pieces, token_times, warp


class Script:
    """A tokenizer of three kinds of token: text below 100, end at 100, timestamps from 200."""

    eot = 100
    timestamp_begin = 200

    @staticmethod
    def timestamp(token: int) -> float:
        return (token - 200) * 0.02


def stamp(seconds: float) -> int:
    return 200 + round(seconds / 0.02)


def cut(*tokens: int, seconds: float = 20.0) -> tuple[list[tuple[float, float, tuple[int, ...]]], float]:
    pieces, read = cut_pieces(tokens, Script(), seconds)  # type: ignore[arg-type]
    return [(piece.start, piece.end, tuple(t for t in piece.tokens if t < 100)) for piece in pieces], read


def test_pairs_close_pieces_and_a_single_stamp_ends_the_reading() -> None:
    pieces, read = cut(stamp(0), 1, 2, stamp(3), stamp(4), 3, stamp(7))
    assert pieces == [(0.0, 3.0, (1, 2)), (4.0, 7.0, (3,))]
    assert read == pytest.approx(7.0)


def test_an_unfinished_piece_is_dropped_and_read_again() -> None:
    pieces, read = cut(stamp(0), 1, stamp(3), stamp(3), 9, 9)
    assert pieces == [(0.0, 3.0, (1,))]
    assert read == pytest.approx(3.0)


def test_text_without_a_closing_stamp_is_the_whole_window() -> None:
    pieces, read = cut(stamp(0.4), 1, 2, seconds=12.0)
    assert pieces == [(0.4, 12.0, (1, 2))]
    assert read == 12.0


def test_no_stamps_at_all() -> None:
    assert cut(1, 2, seconds=5.0) == ([(0.0, 5.0, (1, 2))], 5.0)


def test_nothing_said_reads_the_whole_window() -> None:
    assert cut(seconds=5.0) == ([], 5.0)
    assert cut(stamp(0), stamp(0), seconds=5.0)[0] == []


def test_times_stay_inside_the_window() -> None:
    pieces, read = cut(stamp(1), 1, stamp(29.9), seconds=10.0)
    assert pieces == [(1.0, 10.0, (1,))]
    assert read == 10.0


def brute_force(cost: np.ndarray) -> float:
    n, m = cost.shape
    total = np.full((n, m), np.inf)
    for i, j in itertools.product(range(n), range(m)):
        before = 0.0 if i == j == 0 else np.inf
        if i:
            before = min(before, total[i - 1, j])
        if j:
            before = min(before, total[i, j - 1])
        if i and j:
            before = min(before, total[i - 1, j - 1])
        total[i, j] = cost[i, j] + before
    return float(total[-1, -1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (5, 9), (9, 5), (12, 40)])
def test_warp_finds_the_cheapest_monotonic_path(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(7).normal(size=shape)
    rows, columns = warp(cost)
    assert (rows[0], columns[0]) == (0, 0)
    assert (rows[-1], columns[-1]) == (shape[0] - 1, shape[1] - 1)
    assert set(zip(np.diff(rows), np.diff(columns), strict=True)) <= {(0, 1), (1, 0), (1, 1)}
    assert cost[rows, columns].sum() == pytest.approx(brute_force(cost))


def test_token_times_follow_the_attention() -> None:
    """Three tokens attend to positions 20, 60 and 100: their boundaries lie between those."""
    attention = torch.full((2, 4, 150), 1e-4)
    for row, centre in enumerate((20, 60, 100, 140)):
        attention[:, row, centre - 8 : centre + 8] = 1.0
    times = token_times(attention / attention.sum(-1, keepdim=True))
    assert times.shape == (4,)
    assert times[0] == 0.0, "nothing was said before that the attention could run ahead of"
    assert 0.5 < times[1] < 1.1
    assert 1.3 < times[2] < 1.9
    assert (np.diff(times) > 0).all()


def test_a_word_moves_into_its_sound() -> None:
    spans = [(1.0, 2.0), (5.0, 6.0)]
    assert clip_word(2.5, 5.8, spans) == (5.0, 5.8)
    assert clip_word(1.5, 4.9, spans) == (1.5, 2.0)
    assert clip_word(3.0, 4.0, spans) == (3.0, 4.0)


def test_a_word_on_both_sides_of_a_pause_is_said_after_it() -> None:
    spans = [(0.0, 2.0), (2.4, 6.0)]
    assert clip_word(1.7, 2.55, spans) == (2.4, 2.55)
    assert clip_word(1.1, 2.46, spans) == (1.1, 2.0), "but not if nearly all of it lies before"


def test_a_segment_keeps_all_of_its_speech() -> None:
    """A sentence with a pause inside was once cut down to its longer half."""
    spans = [(1.0, 2.0), (3.0, 6.0)]
    assert clip_segment(0.0, 7.0, spans) == (1.0, 6.0)
    assert clip_segment(0.0, 2.5, spans) == (1.0, 2.0)
    assert clip_segment(8.0, 9.0, spans) == (8.0, 9.0)


def test_a_segment_lets_go_of_its_neighbours_speech() -> None:
    spans = [(3.1, 4.2), (5.7, 6.8), (8.3, 9.4)]
    assert clip_segment(4.0, 7.0, spans) == (5.7, 6.8)
    assert clip_segment(2.0, 5.8, spans) == (3.1, 4.2)
    assert clip_segment(4.1, 4.3, spans) == (4.1, 4.2)


def test_spans_are_found_by_place() -> None:
    spans = Spans([(1.0, 2.0), (5.0, 6.0), (8.0, 9.5)])
    assert spans.near(1.5, 5.0) == [(1.0, 2.0)]
    assert spans.near(2.0, 5.0) == []
    assert spans.seconds(1.5, 8.5) == pytest.approx(2.0)
    assert [spans.after(at) for at in (0.0, 1.5, 2.5, 9.5)] == [1.0, 1.5, 5.0, None]
    assert spans.silence(3.0, 4.0, 20.0) == pytest.approx(3.0)
    assert spans.silence(12.0, 13.0, 20.0) == pytest.approx(10.5)
    assert spans.without(Spans([(1.5, 5.5), (8.2, 8.4)])) == [(1.0, 1.5), (5.5, 6.0), (8.0, 8.2), (8.4, 9.5)]


def test_a_pause_has_speech_on_either_side() -> None:
    spans = Spans([(0.0, 2.0), (2.3, 4.0), (4.5, 6.0), (9.0, 9.3), (9.4, 12.0)])
    assert spans.pauses(0.0, 6.0) == [(2.0, 2.3), (4.0, 4.5)]
    assert spans.pauses(0.0, 9.3) == [(2.0, 2.3), (4.0, 4.5)], "what lies behind 6.0 is another's beginning"
    assert spans.pauses(5.7, 12.0) == [(9.3, 9.4)]
    assert spans.pauses(2.5, 3.5) == spans.pauses(6.5, 8.0) == []
