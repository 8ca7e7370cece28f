"""Text that is too short for its speech."""

from __future__ import annotations

import pytest

from whisper_worker.audio.windows import Window
from whisper_worker.engine import omissions
from whisper_worker.engine.timestamps import Piece, Spans

SENTENCE = " The party you are trying to reach does not accept calls."


def test_letters_are_alike_in_all_scripts() -> None:
    assert omissions.letters(" Hello, world!") == 10
    assert omissions.letters("Привет") == 6
    assert omissions.letters("明日は") == 7.5
    assert omissions.letters("안녕") == 5
    assert omissions.letters("in 1642") == 2 + 16
    assert omissions.letters(" ... ") == 0
    assert omissions.letters("वणक्कम்") == 7, "vowels upon consonants count"
    assert omissions.letters("ሰላም") == 7.5


def test_sparse_text_is_too_short_for_its_speech() -> None:
    assert not omissions.is_sparse(SENTENCE, 4.0)
    assert omissions.is_sparse(SENTENCE, 8.0)
    assert not omissions.is_sparse(" Yes.", 2.0), "a drawn-out word"
    assert omissions.is_sparse("客観的実在の判断的知識が成立するのである。", 9.0)
    assert not omissions.is_sparse("客観的実在の判断的知識が成立するのである。", 4.5)


def test_a_window_is_cut_around_what_may_be_said_twice() -> None:
    """Said three times from 10.5 s on: a piece over the first two, written once, and a third that is whole."""
    window = Window(160_000, 384_000)
    sure = Spans([(10.5, 14.5), (15.0, 19.0), (19.4, 23.4)])
    pieces = [Piece(0.4, 9.2, ()), Piece(9.2, 13.6, ())]
    hearing = omissions.again(window, 14.0, pieces, [SENTENCE, SENTENCE], sure)
    assert hearing is not None
    bounds = [(part.start / 16_000, part.stop / 16_000) for part in hearing.parts]
    assert bounds == [(10.0, 14.75), (14.75, 19.2), (19.2, 24.0)]
    assert hearing.least_letters == pytest.approx(2.4 * omissions.letters(SENTENCE))


def test_a_window_with_text_enough_is_left_alone() -> None:
    sure = Spans([(0.5, 4.5), (5.0, 9.0)])
    assert omissions.again(Window(0, 160_000), 10.0, [Piece(0.4, 9.2, ())], [2 * SENTENCE], sure) is None
    unbroken = Spans([(0.5, 9.0)])
    assert omissions.again(Window(0, 160_000), 10.0, [Piece(0.4, 9.2, ())], [SENTENCE], unbroken) is None


def test_each_edge_is_one_cut_and_the_sparsest_piece_is_the_one() -> None:
    """Slow speech, and what may be said twice, with two pauses near its end: the nearer one is cut."""
    sure = Spans([(0.5, 3.5), (4.0, 7.0), (8.0, 12.0), (12.5, 16.5), (16.7, 17.0), (17.2, 21.0)])
    pieces = [Piece(0.4, 7.5, ()), Piece(7.5, 16.6, ()), Piece(17.1, 21.2, ())]
    texts = [SENTENCE, SENTENCE, SENTENCE]
    hearing = omissions.again(Window(0, 340_800), 21.3, pieces, texts, sure)
    assert hearing is not None
    assert [part.stop / 16_000 for part in hearing.parts] == [7.3, 12.25, 16.6, 21.3]


def test_a_few_letters_are_no_more_text() -> None:
    sure = Spans([(0.5, 4.5), (5.0, 9.0)])
    hearing = omissions.again(Window(0, 160_000), 10.0, [Piece(0.4, 9.2, ())], [" No."], sure)
    assert hearing is not None
    assert hearing.least_letters == 10
