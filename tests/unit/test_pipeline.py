"""A job's way through the pipeline, with the real tokenizer, scripted decodes and a detector that is told."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import model_cache
from whisper_worker.audio.vad import FRAME_SAMPLES, SpeechSpan
from whisper_worker.cache.layout import find_model
from whisper_worker.engine.pipeline import Pipeline, PipelineResult, _within
from whisper_worker.engine.recognizer import DecodingOptions, DecodingResult, DecodingRow, ModelInfo
from whisper_worker.engine.scheduler import Scheduler
from whisper_worker.engine.tokenizer import Tokenizer
from whisper_worker.errors import Cancelled, InvalidInput
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE, CancelToken, Progress, Segment, TranscribeOptions

Said = list[tuple[float, float | None, str]]
"""What a decode says: start, end (None: left unfinished) and text of each piece, in the window's seconds."""
Script = Callable[[float, DecodingRow, DecodingOptions], tuple[Said, float, float]]
"""From the window's length, its row and the attempt: what is said, avg_logprob, no_speech_prob."""


class Detector:
    def __init__(self, *speech: tuple[float, float], doubtful: Sequence[tuple[float, float]] = ()) -> None:
        self.speech, self.doubtful = speech, doubtful

    def probabilities(self, waveform: Any) -> Any:
        probabilities = np.zeros(len(waveform) // FRAME_SAMPLES + 1, dtype=np.float32)
        for spans, value in ((self.doubtful, 0.3), (self.speech, 0.95)):
            for low, high in spans:
                probabilities[int(low * SAMPLE_RATE / FRAME_SAMPLES) : int(high * SAMPLE_RATE / FRAME_SAMPLES)] = value
        return probabilities


class Scripted:
    """A recognizer whose state is the length of what it encoded in seconds; it notes what it was asked."""

    max_workers = 1

    def __init__(self, tokenizer: Tokenizer, script: Script, languages: dict[str, float] | None = None) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.languages = languages or {"en": 0.9, "de": 0.1}
        multilingual = tokenizer.is_multilingual
        self.info = ModelInfo("scripted", None, 80, multilingual, 448, "cpu", "float32", "scripted")
        self.rows: list[DecodingRow] = []
        self.steps: list[DecodingOptions] = []
        self.encoded = 0

    def default_batch_size(self) -> int:
        return 4

    def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
        self.encoded += len(mels)
        return [mel.shape[1] / 100 for mel in mels]

    def detect_language(self, states: Sequence[Any]) -> list[dict[str, float]]:
        return [dict(self.languages) for _ in states]

    def decode(
        self, rows: Sequence[DecodingRow], options: DecodingOptions, cancel: Sequence[CancelToken | None], done: object
    ) -> list[DecodingResult]:
        results = []
        for row in rows:
            self.rows.append(row)
            self.steps.append(options)
            said, logprob, no_speech = self.script(row.max_timestamp, row, options)
            tokens: list[int] = []
            for start, end, text in said:
                tokens += [self._stamp(start), *self.tokenizer.encode(text)]
                tokens += [self._stamp(end)] if end is not None else []
            results.append(DecodingResult(tuple(tokens), logprob, no_speech, options.temperature))
        return results

    def _stamp(self, seconds: float) -> int:
        return self.tokenizer.timestamp_begin + round(seconds / 0.02)

    def cross_attention(
        self, rows: Sequence[DecodingRow], tokens: Sequence[Sequence[int]], options: DecodingOptions
    ) -> list[tuple[torch.Tensor, list[float]]]:
        """Each token attends to an equal share of the window, one after another."""
        results = []
        for row, sequence in zip(rows, tokens, strict=True):
            n, positions = len(sequence) + 1, round(row.max_timestamp * 50)
            attention = torch.full((2, n, positions), 1e-4)
            for place in range(n):
                attention[:, place, place * positions // n : (place + 1) * positions // n] = 1.0
            results.append((attention, [0.9] * len(sequence)))
        return results


@pytest.fixture(scope="module")
def english() -> Tokenizer:
    return tokenizer("tiny.en")


@pytest.fixture(scope="module")
def multilingual() -> Tokenizer:
    return tokenizer("base")


def tokenizer(model: str) -> Tokenizer:
    files = find_model(Settings(model_cache=model_cache(model)))
    return Tokenizer.load(files.processor_dir / "tokenizer.json", files.model_dir / "generation_config.json")


@pytest.fixture
def run() -> Iterator[Callable[..., PipelineResult]]:
    schedulers = []

    def transcribe(
        recognizer: Scripted, detector: Detector, seconds: float, options: TranscribeOptions, **callbacks: Any
    ) -> PipelineResult:
        scheduler = Scheduler(recognizer)  # type: ignore[arg-type]
        schedulers.append(scheduler)
        pipeline = Pipeline(recognizer.info, recognizer.tokenizer, scheduler, detector)  # type: ignore[arg-type]
        waveform = np.random.default_rng(0).integers(-2000, 2000, round(seconds * SAMPLE_RATE)).astype(np.int16)
        return pipeline.transcribe(waveform, options, **callbacks)

    yield transcribe
    for scheduler in schedulers:
        scheduler.close()


def plainly(text: str = " All is well.") -> Script:
    return lambda seconds, row, options: ([(0.0, seconds - 0.3, text)], -0.2, 0.01)


PLAIN = TranscribeOptions()


def test_silence_is_never_decoded(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    recognizer = Scripted(english, plainly())
    result = run(recognizer, Detector(), 60.0, PLAIN)
    assert result.segments == ()
    assert recognizer.encoded == 0


def test_times_are_those_of_the_recording(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    result = run(Scripted(english, plainly()), Detector((10.0, 14.0), (40.0, 43.0)), 60.0, PLAIN)
    assert [(round(s.start), round(s.end), s.id) for s in result.segments] == [(10, 14, 0), (40, 43, 1)]
    assert result.language == "en"
    assert result.gaps == ()


def test_an_unfinished_rest_is_decoded_as_a_new_window(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        if seconds > 15:
            return [(0.0, 5.0, " First half."), (5.0, None, " Sec")], -0.2, 0.01
        return [(0.0, seconds - 0.3, " Second half.")], -0.2, 0.01

    result = run(Scripted(english, script), Detector((0.0, 18.0)), 18.0, PLAIN)
    assert [segment.text for segment in result.segments] == [" First half.", " Second half."]
    assert result.segments[1].start >= 4.5
    assert result.windows == 2


def test_reading_stops_where_no_speech_follows(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        return [(0.0, 5.0, " All of it.")], -0.2, 0.01

    result = run(Scripted(english, script), Detector((0.0, 5.2)), 9.0, PLAIN)
    assert result.windows == 1


def test_only_the_failing_window_is_tried_again_in_full_context(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        if seconds > 6 and row.state < 30:
            return [(0.0, seconds - 0.3, " la" * 60)], -0.2, 0.01
        return [(0.0, seconds - 0.3, " Plain words.")], -0.3, 0.01

    recognizer = Scripted(english, script)
    result = run(recognizer, Detector((0.0, 3.0), (20.0, 28.0)), 30.0, PLAIN)
    assert [segment.text for segment in result.segments] == [" Plain words."] * 2
    assert [segment.flags for segment in result.segments] == [(), ("fallback",)]
    assert result.retried_windows == 1
    assert [round(row.max_timestamp) for row in recognizer.rows] in ([9, 3, 9], [3, 9, 9])
    assert [row.state for row in recognizer.rows] == [12, 12, 30], "short windows are heard with silence behind them"
    assert recognizer.encoded == 3


def test_what_fails_to_the_end_is_kept_and_doubted(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        return [(0.0, seconds - 0.3, " Perhaps this.")], -1.5 - options.temperature, 0.01

    result = run(Scripted(english, script), Detector((0.0, 4.0)), 5.0, PLAIN)
    (segment,) = result.segments
    assert segment.flags == ("fallback", "low_logprob")
    assert segment.temperature == 0.0


def test_doubtful_sound_is_decoded_but_must_convince(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    weak = Scripted(english, lambda seconds, row, options: ([(0.0, 1.0, " Thank you.")], -0.9, 0.2))
    assert run(weak, Detector(doubtful=[(3.0, 6.0)]), 10.0, PLAIN).segments == ()
    assert weak.encoded == 1
    sure = Scripted(english, plainly(" Quiet words."))
    assert len(run(sure, Detector(doubtful=[(3.0, 6.0)]), 10.0, PLAIN).segments) == 1


def test_a_prompt_read_back_is_decoded_without_the_prompt(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        text = " A glossary of product names." if row.prompt else " What was really said."
        return [(0.0, seconds - 0.3, text)], -0.2, 0.01

    options = TranscribeOptions(initial_prompt="A glossary of product names.")
    result = run(Scripted(english, script), Detector((0.0, 4.0)), 5.0, options)
    assert [segment.text for segment in result.segments] == [" What was really said."]


def test_hotwords_and_prompt_reach_every_window(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    recognizer = Scripted(english, plainly())
    options = TranscribeOptions(hotwords="RunPod", initial_prompt="Names:")
    run(recognizer, Detector((0.0, 4.0), (20.0, 24.0)), 30.0, options)
    assert {english.decode(row.prompt) for row in recognizer.rows} == {" RunPod Names:"}


def test_each_window_is_prompted_with_the_one_before_when_asked(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    recognizer = Scripted(english, plainly(" One more."))
    options = TranscribeOptions(condition_on_previous_text=True)
    run(recognizer, Detector((0.0, 4.0), (20.0, 24.0)), 30.0, options)
    assert [english.decode(row.prompt) for row in recognizer.rows] == ["", " One more."]


def test_the_rest_of_a_window_and_the_next_one_are_prompted_with_what_was_read_of_it(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    texts = iter([" First.", " Rest.", " Next."])

    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        end = 10.0 if seconds > 18 else seconds - 0.3
        said: Said = [(0.0, end, next(texts))]
        return ([*said, (end, None, " and")] if seconds > 18 else said), -0.2, 0.01

    recognizer = Scripted(english, script)
    options = TranscribeOptions(condition_on_previous_text=True, hotwords="RunPod")
    result = run(recognizer, Detector((0.0, 20.0), (40.0, 44.0)), 50.0, options)
    assert [segment.text for segment in result.segments] == [" First.", " Rest.", " Next."]
    prompts = [english.decode(row.prompt) for row in recognizer.rows]
    assert prompts == [" RunPod", " RunPod First.", " RunPod First. Rest."]


def test_few_windows_stay_encoded_while_the_language_of_all_is_detected(
    run: Callable[..., PipelineResult], multilingual: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State(float):
        pass

    class Counting(Scripted):
        def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
            states = [State(seconds) for seconds in super().encode(mels)]
            alive.update(states)
            return states

        def detect_language(self, states: Sequence[Any]) -> list[dict[str, float]]:
            most.append(len(alive))
            return super().detect_language(states)

    alive: weakref.WeakSet[State] = weakref.WeakSet()
    most: list[int] = []
    monkeypatch.setattr("whisper_worker.engine.pipeline._STATES_KEPT", 4)
    spans = [(i * 10.0, i * 10.0 + 2 + i / 20) for i in range(40)]
    result = run(Counting(multilingual, plainly()), Detector(*spans), 400.0, TranscribeOptions(multilingual=True))
    assert len(result.segments) == 40
    assert max(most) < 20


def test_language_is_voted_within_the_allow_list(run: Callable[..., PipelineResult], multilingual: Tokenizer) -> None:
    recognizer = Scripted(multilingual, plainly(), {"la": 0.6, "it": 0.3, "es": 0.1})
    result = run(recognizer, Detector((0.0, 4.0)), 5.0, TranscribeOptions(languages=("it", "es")))
    assert result.language == "it"
    assert result.language_probability == pytest.approx(0.75)
    assert recognizer.encoded == 1
    assert {row.language for row in recognizer.rows} == {"it"}


def test_a_language_that_the_model_lacks_is_refused_and_named_in_an_allow_list(
    run: Callable[..., PipelineResult], multilingual: Tokenizer
) -> None:
    with pytest.raises(InvalidInput, match="language"):
        run(Scripted(multilingual, plainly()), Detector(), 5.0, TranscribeOptions(language="yue"))
    options = TranscribeOptions(languages=("yue", "de"))
    result = run(Scripted(multilingual, plainly()), Detector((0.0, 4.0)), 5.0, options)
    assert result.language == "de"
    assert [warning.split(",")[0] for warning in result.warnings] == ["languages names yue"]


def test_an_english_model_refuses_what_it_cannot_do(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    for options in (TranscribeOptions(task="translate"), TranscribeOptions(language="de")):
        with pytest.raises(InvalidInput):
            run(Scripted(english, plainly()), Detector((0.0, 4.0)), 5.0, options)


def test_clips_are_all_that_is_heard(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    options = TranscribeOptions(clip_timestamps=(10.0, 12.0))
    result = run(Scripted(english, plainly()), Detector((0.0, 30.0)), 30.0, options)
    assert all(segment.start >= 9.5 and segment.end <= 12.5 for segment in result.segments)
    with pytest.raises(InvalidInput):
        run(Scripted(english, plainly()), Detector(), 30.0, TranscribeOptions(clip_timestamps=(5.0, 1.0)))


@pytest.mark.parametrize("vad", [True, False])
def test_what_lies_between_and_around_clips_is_not_decoded(
    run: Callable[..., PipelineResult], english: Tokenizer, vad: bool
) -> None:
    recognizer = Scripted(english, plainly())
    options = TranscribeOptions(clip_timestamps=(2.0, 4.0, 5.0, 8.0, 29.0), vad=vad)
    run(recognizer, Detector((0.0, 30.0)), 30.0, options)
    assert sorted(row.max_timestamp for row in recognizer.rows) == pytest.approx([1.0, 2.0, 3.0], abs=0.02)


@pytest.mark.parametrize(("times", "warned"), [((2.0, 90.0), False), ((2.0, 4.0, 30.0), True), ((40.0, 50.0), True)])
def test_clips_behind_the_end_are_told(
    run: Callable[..., PipelineResult], english: Tokenizer, times: tuple[float, ...], warned: bool
) -> None:
    result = run(Scripted(english, plainly()), Detector(), 30.0, TranscribeOptions(clip_timestamps=times))
    assert any("behind the end of the recording (30.00 s)" in warning for warning in result.warnings) == warned


def test_many_clips_of_a_long_recording_are_cut_at_once() -> None:
    spans = [SpeechSpan(start, start + 7) for start in range(0, 200_000, 10)]
    clips = [SpeechSpan(start, start + 5) for start in range(0, 200_000, 10)]
    begun = time.process_time()
    parts = _within(spans, [*clips, SpeechSpan(199_993, 300_000)])
    assert time.process_time() - begun < 5
    assert parts == [*([clip] for clip in clips), [SpeechSpan(199_993, 199_997)]]
    assert _within(spans[:2], [SpeechSpan(5, 12), SpeechSpan(17, 18)]) == [[SpeechSpan(5, 7), SpeechSpan(10, 12)], []]


def test_without_vad_everything_is_decoded(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    recognizer = Scripted(english, plainly())
    run(recognizer, Detector(), 45.0, TranscribeOptions(vad=False))
    assert sum(row.max_timestamp for row in recognizer.rows) == pytest.approx(45.0, abs=0.5)


def test_words_stay_in_their_sound_and_a_long_pause_ends_a_segment(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    text = " eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
    recognizer = Scripted(english, plainly(text))
    detector = Detector((0.5, 4.2), (5.4, 8.0))
    result = run(recognizer, detector, 9.0, TranscribeOptions(word_timestamps=True))
    assert len(result.segments) == 2
    words = [word for segment in result.segments for word in segment.words or ()]
    assert "".join(word.word for word in words) == text
    for word in words:
        assert word.end <= 4.4 or word.start >= 5.2
    assert "".join(segment.text for segment in result.segments) == text
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)


def test_no_word_ends_among_the_next_windows_words(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    class Drifting(Scripted):
        """The end of text is seen two seconds behind the window, as three of silence are encoded with it."""

        def cross_attention(self, *asked: Any) -> list[tuple[torch.Tensor, list[float]]]:
            results = []
            for attention, probabilities in super().cross_attention(*asked):
                padded = torch.nn.functional.pad(attention, (0, 150), value=1e-4)
                padded[:, -1] = 1e-4
                padded[:, -1, -50:] = 1.0
                results.append((padded, probabilities))
            return results

    recognizer = Drifting(english, plainly(" eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"))
    options = TranscribeOptions(word_timestamps=True)
    result = run(recognizer, Detector((0.0, 19.5), (20.0, 40.0)), 41.0, options)
    words = [word for segment in result.segments for word in segment.words or ()]
    assert len(words) == 16
    assert words[7].end <= 19.8
    assert words[8].start < 20.5


def test_segments_arrive_in_order_and_progress_ends_at_the_end(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    heard: list[Segment] = []
    progress: list[Progress] = []
    spans = [(i * 25.0, i * 25.0 + 3.0 + i) for i in range(8)]
    result = run(
        Scripted(english, plainly()),
        Detector(*spans),
        210.0,
        PLAIN,
        on_segment=heard.append,
        on_progress=progress.append,
    )
    assert tuple(heard) == result.segments
    assert [segment.id for segment in heard] == list(range(8))
    assert progress[-1].done_seconds == progress[-1].total_seconds
    assert [one.done_seconds for one in progress] == sorted(one.done_seconds for one in progress)


def test_a_cancelled_job_ends_at_once(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    token = CancelToken()

    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        token.cancel()
        return [], -0.1, 0.0

    spans = [(i * 25.0, i * 25.0 + 3.0) for i in range(40)]
    recognizer = Scripted(english, script)
    with pytest.raises(Cancelled):
        run(recognizer, Detector(*spans), 1000.0, PLAIN, cancel=token)
    assert len(recognizer.rows) <= 8


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_recording_is_let_go_with_its_job(
    run: Callable[..., PipelineResult], english: Tokenizer, cancelled: bool
) -> None:
    class Listening(Detector):
        def probabilities(self, waveform: Any) -> Any:
            heard.append(weakref.ref(waveform))
            return super().probabilities(waveform)

    def progressed(progress: Progress) -> None:
        if cancelled:
            token.cancel()

    heard: list[weakref.ref[Any]] = []
    token = CancelToken()
    spans = [(i * 25.0, i * 25.0 + 3.0) for i in range(12)]
    options = TranscribeOptions(word_timestamps=True)
    gc.disable()
    try:
        with contextlib.suppress(Cancelled):
            run(Scripted(english, plainly()), Listening(*spans), 300.0, options, cancel=token, on_progress=progressed)
        deadline = time.monotonic() + 5
        while heard[0]() is not None and time.monotonic() < deadline:
            time.sleep(0.01)  # The batch in hand is still to end.
        assert heard[0]() is None
    finally:
        gc.enable()


def test_what_is_encoded_is_let_go_when_a_trial_is_cancelled(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    class State(float):
        pass

    class Watched(Scripted):
        def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
            states = [State(length) for length in super().encode(mels)]
            alive.update(states)
            return states

    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        if seconds < 6:
            token.cancel()
        return said_once(seconds, row, options)

    alive: weakref.WeakSet[State] = weakref.WeakSet()
    token = CancelToken()
    gc.disable()
    try:
        recognizer = Watched(english, script)
        with pytest.raises(Cancelled):
            run(recognizer, Detector((0.0, 4.0), (4.6, 8.6)), 10.0, PLAIN, cancel=token)
        recognizer.rows.clear()
        deadline = time.monotonic() + 5
        while alive and time.monotonic() < deadline:
            time.sleep(0.01)  # The batch in hand is still to end.
        assert not alive
    finally:
        gc.enable()


def test_the_receipt_knows_speech_that_gave_no_text(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        return ([], -0.1, 0.0) if seconds > 6 else ([(0.0, seconds - 0.3, " Heard.")], -0.1, 0.0)

    result = run(Scripted(english, script), Detector((0.0, 4.0), (20.0, 28.0)), 30.0, PLAIN)
    assert len(result.gaps) == 1
    assert result.gaps[0][0] == pytest.approx(20.0, abs=0.3)
    assert result.transcribed_seconds < result.speech_seconds


SENTENCE = " The party you are trying to reach does not accept calls."


def said_once(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
    """As Whisper does it: however often the sentence is said in a window, one piece with times that cover it all."""
    return [(0.0, seconds - 0.3, SENTENCE)], -0.2, 0.01


THRICE = Detector((0.5, 4.5), (5.0, 9.0), (9.4, 13.4), (30.0, 34.0))


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_sentence_said_thrice_is_written_thrice(
    run: Callable[..., PipelineResult], english: Tokenizer, words: bool, conditioned: bool
) -> None:
    heard: list[Segment] = []
    progress: list[Progress] = []
    options = TranscribeOptions(word_timestamps=words, condition_on_previous_text=conditioned)
    result = run(
        Scripted(english, said_once), THRICE, 40.0, options, on_segment=heard.append, on_progress=progress.append
    )
    assert "".join(segment.text for segment in result.segments).count("The party") == 4
    assert tuple(heard) == result.segments
    assert result.windows == 4
    assert progress[-1].done_seconds == pytest.approx(progress[-1].total_seconds, abs=0.02)
    if not words:  # scripted attention knows nothing of the places of words
        assert [segment.start for segment in result.segments] == pytest.approx([0.5, 5.0, 9.4, 30.0], abs=0.15)
        assert [segment.end for segment in result.segments] == pytest.approx([4.5, 9.0, 13.4, 34.0], abs=0.15)


def test_slow_speech_keeps_the_text_that_was_decoded_in_one(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        return [(0.0, seconds - 0.3, " I am slow of speech." if seconds > 6 else " I am slow.")], -0.2, 0.01

    recognizer = Scripted(english, script)
    result = run(recognizer, Detector((0.0, 4.0), (4.6, 8.0)), 10.0, PLAIN)
    assert [segment.text for segment in result.segments] == [" I am slow of speech."]
    assert len(recognizer.rows) == 3
    assert result.windows == 1


@pytest.mark.parametrize("logprob", [-1.5, -0.2])
def test_parts_that_are_doubted_replace_nothing(
    run: Callable[..., PipelineResult], english: Tokenizer, logprob: float
) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        if seconds > 6:
            return [(0.0, seconds - 0.3, SENTENCE)], -0.2, 0.01
        return [(0.0, seconds - 0.3, SENTENCE)], logprob, 0.9 if logprob > -1 else 0.01

    result = run(Scripted(english, script), Detector((0.0, 4.0), (4.6, 8.6)), 10.0, PLAIN)
    assert len(result.segments) == (1 if logprob < -1 else 2)
    assert result.segments[0].flags == ()


def test_parts_are_believed_for_what_they_say_where_the_whole_was_read(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    """Slow speech, and behind it more that the whole left unread: that is no text which the parts had found."""
    fast = " And then there is quite a lot of text that is said at a rather normal speed, all in a breath."

    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        if seconds > 12:
            return [(0.0, 8.8, " I am slow of speech."), (8.8, None, " And")], -0.2, 0.01
        text = fast if seconds > 6 else " I am slow." if seconds < 4 else " Of speech."
        return [(0.0, seconds - 0.3, text)], -0.2, 0.01

    result = run(Scripted(english, script), Detector((0.5, 3.5), (4.0, 9.0), (9.6, 17.0)), 18.0, PLAIN)
    assert [segment.text for segment in result.segments] == [" I am slow of speech.", fast]


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        (SENTENCE, [(0.0, " To reach."), (None, " And so on and so on, as nobody ever said it, at length.")]),
        (" ...", [(0.0, " .")]),
        (" No.", [(0.0, " Nope.")]),
    ],
    ids=["unfinished", "no letters", "another spelling"],
)
def test_parts_that_hardly_say_more_replace_nothing(
    run: Callable[..., PipelineResult], english: Tokenizer, whole: str, parts: list[tuple[float | None, str]]
) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        if seconds > 6:
            return [(0.0, seconds - 0.3, whole)], -0.2, 0.01
        end = seconds - 0.4
        said: Said = [(0.0, end, text) if finished is not None else (end, None, text) for finished, text in parts]
        return said, -0.2, 0.01

    result = run(Scripted(english, script), Detector((0.0, 4.0), (4.6, 8.6)), 10.0, PLAIN)
    assert [segment.text for segment in result.segments] == [whole]


def test_a_lost_trial_is_soon_over(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        return [(0.0, seconds - 0.3, SENTENCE)], -0.2 if seconds > 6 else -1.5, 0.01

    recognizer = Scripted(english, script)
    result = run(recognizer, Detector((0.0, 4.0), (4.6, 8.6)), 10.0, PLAIN)
    assert len(recognizer.rows) <= 1 + 2 * 4
    assert max(options.temperature for options in recognizer.steps) < 0.5
    assert (result.windows, result.retried_windows) == (1, 0)


def test_parts_of_parts_are_passed_on_in_order(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    names = {
        3.0: " The quick fox jumps.",
        3.5: " She sells shells.",
        4.0: " Hands make work.",
        4.5: " It always pours.",
    }

    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        place = min(names, key=lambda length: abs(length + 0.3 - seconds)) if seconds < 6 else 3.0
        return [(0.0, seconds - 0.3, names[place])], -0.2, 0.01

    recognizer = Scripted(english, script)
    detector = Detector((0.5, 3.5), (3.9, 7.4), (8.2, 12.2), (12.6, 17.1), (30.0, 32.6))
    result = run(recognizer, detector, 40.0, TranscribeOptions(condition_on_previous_text=True))
    texts = [segment.text for segment in result.segments]
    assert texts == [*names.values(), names[3.0]]
    assert english.decode(recognizer.rows[-1].prompt) == "".join(texts[:-1])
    for row in recognizer.rows:
        assert "".join(texts).startswith(english.decode(row.prompt)), "nothing is prompted with what comes later"


def test_a_window_is_retried_once(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    def script(seconds: float, row: DecodingRow, options: DecodingOptions) -> tuple[Said, float, float]:
        text = " A glossary of product names." if row.prompt else " What was really said."
        return [(0.0, seconds - 0.3, text)], -0.2 if row.state > 29 else -1.5, 0.01

    options = TranscribeOptions(initial_prompt="A glossary of product names.")
    result = run(Scripted(english, script), Detector((0.0, 4.0)), 5.0, options)
    assert result.segments[0].text == " What was really said."
    assert (result.windows, result.retried_windows) == (1, 1)


def test_options_an_engine_lacks_are_named(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    recognizer = Scripted(english, plainly())
    recognizer.info = replace(recognizer.info, not_honoured=("patience",))
    result = run(recognizer, Detector((0.0, 4.0)), 5.0, TranscribeOptions(beam_size=2, patience=2.0))
    assert any("patience" in warning for warning in result.warnings)


def test_suppress_tokens_are_checked(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    recognizer = Scripted(english, plainly())
    run(recognizer, Detector((0.0, 4.0)), 5.0, TranscribeOptions(suppress_tokens="5,7"))
    assert recognizer.steps[0].suppress_tokens == (5, 7)
    for bad in ("x", "99999999", "-7"):
        with pytest.raises(InvalidInput):
            run(recognizer, Detector(), 5.0, TranscribeOptions(suppress_tokens=bad))


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_prefix_stands_before_the_first_window_alone(
    run: Callable[..., PipelineResult], english: Tokenizer, conditioned: bool
) -> None:
    recognizer = Scripted(english, plainly())
    options = replace(PLAIN, prefix="As I said", condition_on_previous_text=conditioned)
    run(recognizer, Detector((0.0, 8.0), (20.0, 27.0), (40.0, 46.0)), 50.0, options)
    with_prefix = [row for row in recognizer.rows if row.prefix]
    assert [round(row.max_timestamp) for row in with_prefix] == [8]
    assert len(recognizer.rows) == 3


def test_a_prefix_that_leaves_no_room_is_refused(run: Callable[..., PipelineResult], english: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="prefix"):
        run(Scripted(english, plainly()), Detector((0.0, 8.0)), 10.0, replace(PLAIN, prefix="and so on " * 200))


def test_what_an_english_model_and_a_short_prompt_cannot_hold_is_named(
    run: Callable[..., PipelineResult], english: Tokenizer
) -> None:
    options = replace(PLAIN, languages=("de",), multilingual=True, initial_prompt="and so on " * 200)
    warnings = run(Scripted(english, plainly()), Detector((0.0, 8.0)), 10.0, options).warnings
    assert [warning.split()[0] for warning in warnings] == ["hotwords", "languages", "multilingual"]
    with pytest.raises(InvalidInput, match=r"multilingual has no effect .* strict=false"):
        run(Scripted(english, plainly()), Detector((0.0, 8.0)), 10.0, replace(options, strict=True))
