"""A live session without a model: what is decoded when, what settles, what never changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_worker.engine.live import (
    MAX_PENDING_SECONDS,
    STALL_SECONDS,
    Hypothesis,
    LiveSession,
    LiveWord,
    Request,
)
from whisper_worker.types import SAMPLE_RATE, Segment, Word

FRAME = 1600
Spoken = list[tuple[str, float, float]]


def spoken(text: str, start: float = 1.0, pace: float = 0.3) -> Spoken:
    """Words said one after another from ``start`` on."""
    return [(f" {word}", start + pace * i, start + pace * (i + 1)) for i, word in enumerate(text.split())]


@dataclass
class Stage:
    """A speaker, a detector that hears them and a model that understands them, all by the script."""

    words: Spoken
    decode_seconds: float = 0.05
    misheard: Callable[[int, int], str | None] = lambda word, decode: None
    """Number of the word and of the decode; what is heard instead."""
    probability: Callable[[int], float] = lambda word: 0.9
    now: float = 0.0
    heard: int = 0
    n_decodes: int = 0
    decoded_seconds: float = 0.0
    requests: list[Request] = field(default_factory=list)
    completed: list[Segment] = field(default_factory=list)
    settled: list[str] = field(default_factory=list)
    """The settled text after each step."""

    def __post_init__(self) -> None:
        self.session = LiveSession(self, lambda: self.now)

    def feed(self, samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        """The detector: sure where somebody speaks."""
        first, self.heard = self.heard // 512, self.heard + len(samples)
        middles = [(512 * frame + 256) / SAMPLE_RATE for frame in range(first, self.heard // 512)]
        speaking = [any(start <= middle < end for _, start, end in self.words) for middle in middles]
        return np.where(speaking, 0.9, 0.01).astype(np.float32)

    def hear(self, request: Request) -> Hypothesis:
        """The model: the words that end inside the window, behind the prefix."""
        self.requests.append(request)
        self.n_decodes += 1
        self.decoded_seconds += request.seconds
        stop = request.start + request.seconds
        found = []
        for number, (text, start, end) in enumerate(self.words):
            if start >= request.start - 0.01 and end <= stop + 0.01 and number not in request.prefix:
                said = self.misheard(number, self.n_decodes) or text
                found.append(LiveWord(Word(said, start, end, self.probability(number)), (number,)))
        return Hypothesis(tuple(found))

    def step(self) -> bool:
        request = self.session.request()
        if request is not None:
            hypothesis = self.hear(request)
            self.now += self.decode_seconds
            self.session.apply(request, hypothesis)
        self.look()
        return request is not None

    def look(self) -> None:
        self.completed.extend(self.session.take_completed())
        opened = self.session.open_segment
        words = [word.word for segment in self.completed for word in segment.words or ()]
        words += [word.word for word in opened.words[: opened.n_settled]] if opened else []
        self.settled.append("".join(words))

    def play(self, seconds: float, *, realtime: bool = True) -> None:
        """Sound for so long, decoded as it comes."""
        target = self.heard + round(seconds * SAMPLE_RATE)
        while self.heard < target:
            n = min(FRAME, target - self.heard, self.session.room)
            if n:
                self.session.feed(np.zeros(n, dtype=np.int16))
            if realtime:
                self.now = max(self.now, self.heard / SAMPLE_RATE)
            if not self.step():
                assert n, "the session takes no sound and asks for no decode"

    def end(self) -> None:
        self.session.finish()
        while not self.session.done:
            assert self.step(), "sound is left over that nobody asks to have decoded"
        self.look()

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.completed)


def test_every_word_comes_once_and_in_order() -> None:
    stage = Stage(spoken("it was the best of times it was the worst of times"))
    stage.play(6)
    stage.end()
    assert stage.text == " it was the best of times it was the worst of times"


def test_a_word_settles_soon_after_it_was_said() -> None:
    stage = Stage(spoken("one two three four five six seven eight nine ten"))
    stage.play(3.0)
    # Said until 2.8 s at three words a second; the last two still wait for what follows them.
    assert stage.settled[-1].startswith(" one two three")


def test_a_pause_settles_all_and_completes_the_segment() -> None:
    stage = Stage(spoken("hello there"))
    stage.play(2.4)
    assert [segment.text for segment in stage.completed] == [" hello there"]
    assert stage.session.open_segment is None


def test_settled_text_never_changes_though_the_model_wavers() -> None:
    def misheard(word: int, decode: int) -> str | None:
        return f" noise{decode}" if (word * 7 + decode) % 3 == 0 else None

    stage = Stage(spoken("a b c d e f g h i j k l m n o p q r s t", pace=0.25), misheard=misheard)
    stage.play(8)
    stage.end()
    for before, after in zip(stage.settled, stage.settled[1:], strict=False):
        assert after.startswith(before)


def test_a_word_heard_differently_twice_waits_for_agreement() -> None:
    stage = Stage(
        spoken("yes no perhaps certainly never", pace=0.5), misheard=lambda word, n: f" {n}" if word == 0 else None
    )
    stage.play(2.6)
    assert stage.n_decodes >= 2
    assert stage.settled[-1] == ""


def test_a_doubtful_word_waits_for_more_of_its_context() -> None:
    """Two decodes in a row agreed on a wrong word, which then stood there though the next one would have mended it."""
    text = "one two three four five six seven eight nine ten"
    sure, unsure = Stage(spoken(text)), Stage(spoken(text), probability=lambda word: 0.2 if word == 2 else 0.9)
    for stage in (sure, unsure):
        stage.play(3.2)
    assert sure.settled[-1].startswith(" one two three four")
    assert unsure.settled[-1] == " one two"
    unsure.play(1.2)
    assert unsure.settled[-1].startswith(" one two three four")


def test_case_and_punctuation_do_not_hinder_agreement() -> None:
    stage = Stage(
        spoken("yes no perhaps certainly never", pace=0.5),
        misheard=lambda word, n: (" Yes.", " yes")[n % 2] if word == 0 else None,
    )
    stage.play(2.6)
    assert stage.settled[-1].strip().lower().startswith("yes")


def test_a_repeated_phrase_survives() -> None:
    words = [*spoken("never again", 1.0), *spoken("never again", 2.6), *spoken("never again", 4.2)]
    stage = Stage(words)
    stage.play(6)
    stage.end()
    assert [segment.text for segment in stage.completed] == [" never again"] * 3


def test_silence_is_not_decoded() -> None:
    stage = Stage([])
    stage.play(60)
    stage.end()
    assert stage.n_decodes == 0
    assert stage.completed == []


def test_nothing_is_decoded_while_a_pause_lasts() -> None:
    stage = Stage(spoken("hello there"))
    stage.play(3)
    decodes = stage.n_decodes
    stage.play(20)
    assert stage.n_decodes == decodes


def test_memory_stays_flat() -> None:
    stage = Stage([])
    stage.play(300)
    assert len(stage.session._audio) < 5 * SAMPLE_RATE
    long = Stage([word for i in range(60) for word in spoken("on and on it goes", 1.0 + 2.5 * i)])
    long.play(150)
    assert len(long.session._audio) < 25 * SAMPLE_RATE
    assert len(long.session._history) < 100


def test_speech_without_a_pause_is_cut_and_loses_nothing() -> None:
    numbers = " ".join(str(i) for i in range(200))
    stage = Stage(spoken(numbers, pace=0.3))
    stage.play(62)
    stage.end()
    # A cut may go through a word, which this model then does not hear; it understands whole ones only.
    said = stage.text.split()
    assert said == sorted(said, key=int)
    assert len(set(said)) == len(said) >= 195
    assert max(request.seconds for request in stage.requests) < 25


def test_segments_stay_short_and_break_at_sentences() -> None:
    text = "this is it. and this is more of it, " + "word " * 40
    stage = Stage(spoken(text))
    stage.play(20)
    stage.end()
    assert stage.completed[0].text == " this is it."
    assert max(segment.end - segment.start for segment in stage.completed) <= 6.5


def test_times_rise_and_do_not_overlap() -> None:
    stage = Stage([*spoken("one two three. four five six", 0.5), *spoken("seven eight", 4.0)])
    stage.play(6)
    stage.end()
    floor = 0.0
    for segment in stage.completed:
        for word in segment.words or ():
            assert floor <= word.start <= word.end
            floor = word.end
        assert float(f"{segment.start:.3f}") == segment.start


def test_words_there_was_no_time_for_are_dropped() -> None:
    class Chatty(Stage):
        def hear(self, request: Request) -> Hypothesis:
            heard = super().hear(request)
            end = heard.words[-1].word.end if heard.words else 0.0
            extra = [LiveWord(Word(" again", end, end + 0.01 * i, 0.9), (90 + i,)) for i in range(4)]
            return Hypothesis((*heard.words, *extra)) if heard.words else heard

    stage = Chatty(spoken("said it once"))
    stage.play(4)
    stage.end()
    assert stage.text == " said it once"


def test_a_stalled_client_gets_its_text() -> None:
    stage = Stage(spoken("are you still there"))
    stage.play(2.2)
    assert stage.text == ""
    wake_at = stage.session.wake_at()
    assert wake_at is not None
    stage.now = wake_at
    assert wake_at - 2.2 == pytest.approx(STALL_SECONDS, abs=0.2)
    assert stage.step()
    assert stage.text == " are you still there"


def test_the_end_flushes_what_was_said_last() -> None:
    stage = Stage(spoken("the tail is not lost"))
    stage.play(2.5)
    stage.end()
    assert stage.text == " the tail is not lost"


def test_a_flush_settles_without_ending() -> None:
    stage = Stage(spoken("first part second part", pace=0.5))
    stage.play(2.05)
    stage.session.flush()
    assert stage.step()
    assert stage.text == " first part"
    stage.play(2)
    stage.end()
    assert stage.text == " first part second part"


def test_a_discarded_decode_takes_nothing_away() -> None:
    stage = Stage(spoken("one two three four five six seven eight"))
    stage.play(2.6)
    shown = stage.session.open_segment
    assert shown is not None
    request = stage.session.request()
    while request is None:
        stage.session.feed(np.zeros(FRAME, dtype=np.int16))
        request = stage.session.request()
    stage.session.apply(request, Hypothesis((), discarded=True))
    assert stage.session.open_segment == shown


def test_a_backlog_is_bounded_and_worked_off() -> None:
    words = [word for i in range(40) for word in spoken("some words here", 1.0 + 2 * i)]
    stage = Stage(words, decode_seconds=1.0)
    session = stage.session
    while session.room:
        session.feed(np.zeros(min(FRAME, session.room), dtype=np.int16))
    assert session.seconds == pytest.approx(MAX_PENDING_SECONDS, abs=0.2)
    stage.play(82 - session.seconds, realtime=False)
    stage.end()
    assert stage.text == " some words here" * 40


def test_a_backlog_makes_no_window_longer_than_a_model_hears() -> None:
    """After a broken connection 28 s of speech came at once behind 12 s that were settled. Its pause came last, the
    window was cut there, at 41 s, and of what lay behind its thirtieth second the model heard nothing."""
    first = spoken("word " * 36, 0.5, 0.33)
    start = first[-1][2] + 0.6
    stage = Stage([*first, *spoken("more " * 93, start)])
    stage.play(start)
    assert stage.session.settled_seconds > 12
    backlog = np.zeros(stage.session.room, dtype=np.int16)
    stage.session.feed(backlog)
    assert len(backlog) > 28 * SAMPLE_RATE
    stage.end()
    assert max(request.seconds for request in stage.requests) < 25
    # The model on this stage understands no word that a cut goes through.
    assert len(stage.text.split()) >= 36 + 93 - 2


def test_a_slow_machine_decodes_less_often() -> None:
    text = " ".join(f"w{i}" for i in range(60))
    quick, slow = Stage(spoken(text)), Stage(spoken(text), decode_seconds=1.5)
    quick.play(19)
    slow.play(19)
    assert slow.n_decodes < quick.n_decodes / 2
    assert slow.now < 19 + 5 * 1.5


def test_the_window_is_prefixed_with_what_is_settled() -> None:
    stage = Stage(spoken("a b c d e f g h i j"))
    stage.play(4)
    grown = [request for request in stage.requests if request.prefix]
    assert grown
    for request in grown:
        assert list(request.prefix) == list(range(len(request.prefix)))


@settings(max_examples=40, deadline=None)
@given(
    pauses=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=12),
    lengths=st.lists(st.integers(1, 9), min_size=12, max_size=12),
    decode_seconds=st.floats(0.01, 1.0),
)
def test_any_rhythm_gives_every_word_once(
    pauses: Sequence[float], lengths: Sequence[int], decode_seconds: float
) -> None:
    words: Spoken = []
    at = 0.5
    for pause, length in zip(pauses, lengths, strict=False):
        for _ in range(length):
            words.append((f" w{len(words)}", at, at + 0.3))
            at += 0.3
        at += pause
    stage = Stage(words, decode_seconds=decode_seconds)
    stage.play(at + 0.5)
    stage.end()
    said = stage.text.split()
    assert said == sorted(said, key=lambda word: int(word[1:]))
    assert len(set(said)) == len(said)
    # Unbroken speech longer than a window may lose the word it is cut in; nothing else may be lost.
    assert len(said) >= len(words) - 1 - at / 12


def test_a_word_stays_inside_the_window_it_was_heard_in() -> None:
    """The model let the last word before a pause end behind its window, in the silence that fills it up. It was
    then moved into the speech after the pause, which was known already, and what was said there had no room left."""

    class Late(Stage):
        def hear(self, request: Request) -> Hypothesis:
            heard = super().hear(request)
            if not request.final or not heard.words:
                return heard
            *others, last = heard.words
            return Hypothesis((*others, replace(last, word=replace(last.word, end=last.word.end + 2.5))))

    stage = Late([*spoken("one two three", 1.0), *spoken("four five six seven", 3.0)])
    # All of it at once, as after a connection that broke.
    stage.session.feed(np.zeros(round(4.5 * SAMPLE_RATE), dtype=np.int16))
    stage.end()
    assert stage.text == " one two three four five six seven"
    first = stage.completed[0]
    assert first.words is not None and first.words[-1].end <= 3.0
