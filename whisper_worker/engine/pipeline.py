"""Read this first: a waveform becomes a transcript.

    waveform ─ voice detector ─▶ spans ─ windows.py ─▶ windows ─ features.py ─▶ mel
                                                                                 │
    segments ◀─ assembly.py ◀─ tokens ◀─ quality.py judges ◀─ scheduler.py ◀────┘

A job runs in its caller's thread: it cuts the waveform, hands windows to the scheduler and
takes the decoded ones back in whatever order they are done. A window that fails its checks
goes back for the next attempt, encoded anew in full context; the rest of a window that was
not read to its end goes back as a new window; one whose text is short for its speech is heard
again in parts.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from whisper_worker.audio.vad import SpeechSpan, VoiceDetector, speech_spans
from whisper_worker.audio.windows import PAD_SECONDS, Window, plan_windows
from whisper_worker.engine import omissions, quality
from whisper_worker.engine.assembly import Assembler, Decoded
from whisper_worker.engine.quality import Attempt, Verdict
from whisper_worker.engine.recognizer import N_FRAMES, DecodingOptions, ModelInfo
from whisper_worker.engine.scheduler import Job, Priority, Scheduler, Work
from whisper_worker.engine.timestamps import Piece, Spans, cut_pieces
from whisper_worker.errors import InvalidInput
from whisper_worker.types import SAMPLE_RATE, CancelToken, Progress, Segment, TranscribeOptions

if TYPE_CHECKING:
    import torch

    from whisper_worker.engine.tokenizer import Tokenizer

DOUBT_THRESHOLD = 0.15
"""Sound that the voice detector gives at least this probability is decoded, though held to stricter guards."""

_DETECT_WINDOWS = 4
"""Windows, spread over the file, that vote on its language."""

_STATES_KEPT = 64
"""Windows whose encoder output is kept between detecting their language and decoding them; others are
encoded again, or hours of it would be held."""

_REST_SECONDS = (0.3, 1.0)
"""Speech that must follow the last timestamp for the rest to be decoded: after a piece the model had
begun and not finished, and after one that it closed (its closing time may be a little early)."""

_SHORT_REST_SECONDS = 2.0
"""Speech in a rest below which its text must be surer than usual."""

_PART_ATTEMPTS = 4
"""Of a part of a window; what it takes a high temperature to say replaces nothing."""

_DOUBTS = frozenset({"low_logprob", "loop", "prompt_echo"})
"""Flags of text that does not replace another."""

_GAP_SECONDS = 1.0
"""Least length of detected speech without text that the receipt reports."""


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """The transcript's substance with what the receipt wants to know."""

    segments: tuple[Segment, ...]
    language: str | None
    language_probability: float | None
    speech_seconds: float
    transcribed_seconds: float
    gaps: tuple[tuple[float, float], ...]
    windows: int
    retried_windows: int
    warnings: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Pending:
    """A window on its way: what was tried, and what was kept."""

    window: Window
    language: str | None
    state: Any = None
    """What its encoding gave, while it is of use."""
    tried: list[Attempt] = field(default_factory=list)
    decoded: Decoded | None = None
    with_prompt: bool = True
    wide: bool = False
    """Encoded with silence up to 30 s behind it, as in Whisper's training."""
    retried: bool = False
    probabilities: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Trial:
    """A window whose text is short for its speech is heard again in parts, which replace it if they say more."""

    whole: Decoded
    pending: _Pending
    parts: tuple[_Pending, ...]
    least_letters: float
    """What the parts' text must come to."""
    n_settled: int = 0
    lost: bool = False
    """A part that is silent or in doubt decides it: the whole stands."""


class Pipeline:
    """Turns waveforms into segments with one scheduler's model. Thread-safe: a call is a job."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer, scheduler: Scheduler, detector: VoiceDetector) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.detector = detector

    def transcribe(
        self,
        waveform: npt.NDArray[np.int16],
        options: TranscribeOptions,
        *,
        cancel: CancelToken | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_segment: Callable[[Segment], None] | None = None,
        priority: Priority = Priority.BULK,
    ) -> PipelineResult:
        """Transcribe int16 mono samples at 16 kHz.

        ``on_segment`` gets each segment once, in order, as soon as nothing before it is
        pending. Raises :class:`InvalidInput` for options that this model cannot honour,
        :class:`Cancelled`, or what the model failed with.
        """
        cancel = cancel or CancelToken()
        job = self.scheduler.open(priority, cancel)
        try:
            return _Run(self, job, waveform, options, on_progress, on_segment).run()
        finally:
            job.close()

    def detect_language(
        self,
        waveform: npt.NDArray[np.int16],
        options: TranscribeOptions,
        *,
        cancel: CancelToken | None = None,
        priority: Priority = Priority.BULK,
    ) -> tuple[str | None, float | None]:
        """The language that :meth:`transcribe` would settle on, with its probability, and nothing decoded.

        None where no speech is heard. Raises as :meth:`transcribe` does.
        """
        job = self.scheduler.open(priority, cancel or CancelToken())
        try:
            return _Run(self, job, waveform, options, None, None).detect_language()
        finally:
            job.close()


class _Run:
    """One job's state."""

    def __init__(
        self,
        pipeline: Pipeline,
        job: Job,
        waveform: npt.NDArray[np.int16],
        options: TranscribeOptions,
        on_progress: Callable[[Progress], None] | None,
        on_segment: Callable[[Segment], None] | None,
    ) -> None:
        self.tokenizer = pipeline.tokenizer
        self.info = pipeline.info
        self.detector = pipeline.detector
        self.job = job
        self.waveform = waveform
        self.options = options
        self.on_progress = on_progress
        self.on_segment = on_segment
        self.warnings = [
            f"{name} is not honoured by the {self.info.engine} engine and was ignored."
            for name in self.info.not_honoured
            if getattr(options, name) is not None
        ]
        self.attempts = quality.ladder(options, self._suppressed())
        self.prompt_text = " ".join(text for text in (options.hotwords, options.initial_prompt) if text) or None
        self.given = tuple(self.tokenizer.encode(" " + self.prompt_text.strip())) if self.prompt_text else ()
        self.told: list[tuple[int, tuple[int, ...] | None]] = []
        """What ``condition_on_previous_text`` passes on: where windows begin, and their text; None of a hot decode."""
        self.prefix = tuple(self.tokenizer.encode(" " + options.prefix.strip())) if options.prefix else ()
        most = self.info.max_target_positions // 4
        if len(self.prefix) > most:
            raise InvalidInput(
                f"The field prefix is longer than {most} tokens (about {most * 2 // 3} words); shorten it."
            )
        most = self.info.max_target_positions // 2 - 1
        if len(self.given) > most:
            self.warnings.append(
                f"hotwords and initial_prompt are longer than {most} tokens together; only the last {most} were used."
            )
        if not self.info.is_multilingual:
            self.warnings += [
                f"{name} has no effect with an English-only model and was ignored."
                for name in ("languages", "multilingual")
                if getattr(options, name)
            ]
        elif unknown := sorted(set(options.languages) - set(self.tokenizer.languages)):
            self.warnings.append(f"languages names {', '.join(unknown)}, unknown to the loaded model, and ignored.")
        if self.warnings and options.strict:
            raise InvalidInput(" ".join(self.warnings) + " Correct or remove it, or send strict=false.")
        self.outstanding: list[_Pending] = []
        # By part. Were it a part's own field, what they hold would wait for the collector of garbage.
        self.trials: dict[_Pending, _Trial] = {}
        self.waiting_segments: list[tuple[int, list[Segment]]] = []
        self.segments: list[Segment] = []
        self.retried = 0
        self.first_start = 0
        self.n_windows = 0

    def run(self) -> PipelineResult:
        options = self.options
        if options.task == "translate" and not self.info.is_multilingual:
            raise InvalidInput("The loaded model is English-only and cannot translate; load a multilingual one.")
        if options.language not in (None, "en") and not self.info.is_multilingual:
            raise InvalidInput("The loaded model knows English only; load a multilingual one or leave language out.")
        if options.language is not None and self.info.is_multilingual:
            self.tokenizer.language_token(options.language)
        spans, sure, windows = self._cut()
        self.sure = _seconds(sure)
        duration = len(self.waveform) / SAMPLE_RATE
        self.assembler = Assembler(self.tokenizer, self.options, _seconds(spans), self.sure, duration)
        self.total_seconds = sum(window.seconds for window in windows)
        self.done_seconds = 0.0
        self.first_start = windows[0].start if windows else 0
        pending = [_Pending(window, options.language) for window in windows]
        self.n_windows = len(pending)
        language, probability = self._settle_language(pending)
        if options.condition_on_previous_text:
            self._one_after_another(pending)
        else:
            # Rows of like length waste least; a caller who listens wants them in order instead.
            order = pending if self.on_segment else sorted(pending, key=lambda one: -one.window.seconds)
            self.outstanding.extend(pending)
            for one in order:
                self._submit(one)
            while self.outstanding:
                self._handle(self.job.next_done())
        return self._result(language, probability)

    # -- cutting ---------------------------------------------------------------------------

    def _cut(self) -> tuple[tuple[SpeechSpan, ...], tuple[SpeechSpan, ...], tuple[Window, ...]]:
        """Spans to decode (speech, doubtful speech too), those of sure speech, and the windows over the former."""
        from whisper_worker.engine.features import log_mel_peak

        n = len(self.waveform)
        if n == 0:
            return (), (), ()
        probabilities = self.detector.probabilities(self.waveform)
        clips = self._clips(n)
        if self.options.vad:
            threshold = self.options.vad_threshold
            sure = _within(speech_spans(probabilities, n, threshold=threshold), clips)
            heard = _within(speech_spans(probabilities, n, threshold=min(threshold, DOUBT_THRESHOLD)), clips)
        else:
            sure = heard = [[clip] for clip in clips]
        windows = tuple(
            window
            for clip, spans, known in zip(clips, heard, sure, strict=True)
            for window in plan_windows(spans, probabilities, clip.end, first_sample=clip.start, sure=known)
        )
        self.peak = log_mel_peak(self.waveform, self.info.n_mels) if windows else 0.0
        return tuple(itertools.chain(*heard)), tuple(itertools.chain(*sure)), windows

    def _clips(self, n_samples: int) -> tuple[SpeechSpan, ...]:
        """The parts that ``clip_timestamps`` asks for; all of it by default."""
        times = self.options.clip_timestamps
        if not times:
            return (SpeechSpan(0, n_samples),)
        bounds = [min(n_samples, max(0, round(time * SAMPLE_RATE))) for time in times]
        if len(bounds) % 2:
            bounds.append(n_samples)
        if any(second < first for first, second in itertools.pairwise(bounds)):
            raise InvalidInput("clip_timestamps must rise: start, end, start, end, in seconds.")
        if max(times[::2]) * SAMPLE_RATE >= n_samples:
            end = n_samples / SAMPLE_RATE
            self.warnings.append(f"clip_timestamps asks for parts behind the end of the recording ({end:.2f} s).")
        return tuple(SpeechSpan(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if b > a)

    # -- language --------------------------------------------------------------------------

    def detect_language(self) -> tuple[str | None, float | None]:
        _, _, windows = self._cut()
        return self._settle_language([_Pending(window, None) for window in windows]) if windows else (None, None)

    def _settle_language(self, pending: Sequence[_Pending]) -> tuple[str | None, float | None]:
        """Give each window its language; the file's language with its probability."""
        options = self.options
        if not self.info.is_multilingual:
            for one in pending:
                one.language = "en"
            return "en", 1.0
        if options.language is not None and not options.multilingual:
            return options.language, 1.0
        if not pending:
            return options.language, None
        asked = list(pending) if options.multilingual else _spread(pending, _DETECT_WINDOWS)
        for one in asked:
            self.job.submit(self._work(one, None))
        for n_done in range(len(asked)):
            work = self.job.next_done()
            work.key.probabilities = self._allowed(work.result)
            if n_done < _STATES_KEPT:
                work.key.state = work.state
        votes: dict[str, float] = {}
        total = sum(one.window.seconds for one in asked)
        for one in asked:
            for code, share in one.probabilities.items():
                votes[code] = votes.get(code, 0.0) + share * one.window.seconds / total
        language = max(votes, key=votes.__getitem__)
        for one in pending:
            own = max(one.probabilities, key=one.probabilities.__getitem__) if one.probabilities else language
            one.language = own if options.multilingual else language
        return language, round(votes[language], 4)

    def _allowed(self, probabilities: dict[str, float]) -> dict[str, float]:
        """Probabilities within the allow-list, scaled to sum to 1."""
        allowed = set(self.options.languages) & set(probabilities) or set(probabilities)
        total = sum(probabilities[code] for code in allowed) or 1.0
        return {code: probabilities[code] / total for code in allowed}

    # -- decoding --------------------------------------------------------------------------

    def _suppressed(self) -> tuple[int, ...]:
        """Token ids of ``suppress_tokens``, -1 standing for the non-speech symbols."""
        try:
            ids = [int(part) for part in self.options.suppress_tokens.split(",") if part.strip()]
        except ValueError:
            raise InvalidInput("suppress_tokens must be token ids separated by commas, such as -1 or 50,257.") from None
        if any(not -1 <= token < self.tokenizer.eot for token in ids):
            raise InvalidInput("suppress_tokens holds an id that is no text token of this model.")
        plain = {token for token in ids if token >= 0}
        return tuple(sorted(plain.union(self.tokenizer.non_speech_tokens) if -1 in ids else plain))

    def _work(self, one: _Pending, options: DecodingOptions | None, tokens: tuple[int, ...] | None = None) -> Work:
        window = one.window
        return Work(
            key=one,
            mel=partial(_features, self.waveform, self.info.n_mels, window, self.peak, wide=one.wide),
            seconds=window.seconds,
            options=options,
            tokens=tokens,
            language=one.language,
            prompt=self._prompt(window) if options and one.with_prompt and tokens is None else (),
            prefix=self.prefix if options and tokens is None and window.start == self.first_start else (),
            state=one.state,
        )

    def _submit(self, one: _Pending, *, next_up: bool = False) -> None:
        """``next_up``: nothing behind it is told before it is done."""
        if len(one.tried) == 1 and not one.wide:
            # The short context that made the first attempt cheap may be what made it unsure.
            one.wide, one.state = True, None
        self.job.submit(self._work(one, self.attempts[len(one.tried)]), next_up=next_up)

    def _one_after_another(self, pending: Sequence[_Pending]) -> None:
        """``condition_on_previous_text``: each window is prompted with the text before it, so none can share
        a batch with another planned window of this job."""
        last = self.first_start
        for one in pending:
            self.told = [(start, tokens) for start, tokens in self.told if start >= last]
            last = one.window.start
            self.outstanding.append(one)
            self._submit(one)
            while self.outstanding:
                self._handle(self.job.next_done())

    def _prompt(self, window: Window) -> tuple[int, ...]:
        """What is decoded before a window: what the caller gave, and the text before it since the last hot decode."""
        previous: tuple[int, ...] = ()
        for start, tokens in sorted(self.told, key=lambda told: told[0]):
            if start < window.start:
                previous = () if tokens is None else (*previous, *tokens)
        return (*self.given, *previous)[-(self.info.max_target_positions // 2 - 1) :]

    def _handle(self, work: Work) -> None:
        """Take one finished piece of work a step further."""
        one: _Pending = work.key
        one.state = work.state
        if work.tokens is not None:
            assert one.decoded is not None
            self._complete(one, self.assembler.with_words(one.decoded, *work.result))
            return
        text = self.tokenizer.decode(work.result.tokens).strip()
        said = [token for token in work.result.tokens if token < self.tokenizer.eot]
        loop = quality.is_loop(said, text, self._sure_seconds(one.window))
        one.tried.append(quality.attempt(work.result, text, loop=loop))
        verdict = quality.judge(one.tried, self.attempts, self.options, doubtful=one.window.doubtful)
        if verdict is Verdict.RETRY and len(one.tried) < self._most_attempts(one):
            one.retried = True
            self._submit(one, next_up=True)
            return
        if verdict is Verdict.SILENCE or (verdict is Verdict.RETRY and quality.is_invented(one.tried, self.options)):
            self._settle(one)
            return
        repeated = verdict is Verdict.ACCEPT and one.tried[-1].compression_ratio > (
            self.options.compression_ratio_threshold or float("inf")
        )
        kept = one.tried[-1] if repeated else quality.best(one.tried, self.options)
        if one.with_prompt and quality.is_prompt_echo(kept.text, self.prompt_text):
            # Was it said, or is it the prompt read back? Without the prompt only the first can happen.
            one.with_prompt = False
            one.tried.clear()
            if one.wide:
                # Else its second search would be the first over again.
                one.wide, one.state = False, None
            self._submit(one, next_up=True)
            return
        pieces, read = self._pieces(one, kept)
        flags = self._flags(one, kept, failed=verdict is Verdict.RETRY)
        one.decoded = Decoded(one.window, one.language, kept, pieces, read, flags)
        self._settle(one)

    def _most_attempts(self, one: _Pending) -> int:
        """A part that stays unsure replaces nothing, nor does any once one of them has lost."""
        trial = self.trials.get(one)
        if trial is None:
            return len(self.attempts)
        return 0 if trial.lost else min(_PART_ATTEMPTS, len(self.attempts))

    def _settle(self, one: _Pending) -> None:
        """No more is decoded of a window as such; it has no ``decoded`` where nothing was said."""
        trial = self.trials.pop(one, None)
        if trial is not None:
            trial.lost |= one.decoded is None or bool(_DOUBTS & one.decoded.flags)
            trial.n_settled += 1
            if trial.n_settled == len(trial.parts):
                self._decide(trial)
        elif one.decoded is None:
            self._complete(one, [])
        elif not self._try_parts(one, one.decoded):
            self._keep(one, one.decoded)

    def _keep(self, one: _Pending, decoded: Decoded) -> None:
        """Take a window's text as it is."""
        tokens = self._said(decoded)
        if self.options.condition_on_previous_text:
            hot = decoded.attempt.result.temperature > 0.5
            self.told.append((decoded.window.start, None if hot else tokens))
        self._queue_rest(one, decoded)
        if self.options.word_timestamps and tokens:
            aligned = self._work(one, DecodingOptions(task=self.options.task), tokens)
            self.job.submit(aligned)
        else:
            self._complete(one, [self.assembler.segment(decoded, piece) for piece in decoded.pieces])

    # -- what may have been left out -------------------------------------------------------

    def _try_parts(self, one: _Pending, decoded: Decoded) -> bool:
        """Have a window whose text may have left something out decoded in parts."""
        hearing = omissions.again(one.window, decoded.read, decoded.pieces, self._texts(decoded), self.sure)
        if hearing is None:
            return False
        parts = tuple(_Pending(part, one.language, with_prompt=one.with_prompt) for part in hearing.parts)
        self.trials |= dict.fromkeys(parts, _Trial(decoded, one, parts, hearing.least_letters))
        self.outstanding += parts
        for part in reversed(parts):
            self._submit(part, next_up=True)
        return True

    def _decide(self, trial: _Trial) -> None:
        """Keep the whole or its parts, all of which are decoded."""
        found = [(part, part.decoded) for part in trial.parts if part.decoded is not None]
        letters = sum(omissions.letters(text) for _, decoded in found for text in self._texts(decoded))
        if trial.lost or letters < trial.least_letters:
            for part in trial.parts:
                self.outstanding.remove(part)
            self._keep(trial.pending, trial.whole)
            return
        self.outstanding.remove(trial.pending)
        self.n_windows += len(found) - 1
        self.total_seconds += sum(part.window.seconds for part, _ in found) - trial.pending.window.seconds
        for part, decoded in found:
            if not self._try_parts(part, decoded):
                self._keep(part, decoded)

    def _texts(self, decoded: Decoded) -> list[str]:
        return [self.tokenizer.decode(piece.tokens) for piece in decoded.pieces]

    def _said(self, decoded: Decoded) -> tuple[int, ...]:
        return tuple(token for piece in decoded.pieces for token in piece.tokens if token < self.tokenizer.eot)

    def _flags(self, one: _Pending, kept: Attempt, *, failed: bool) -> set[str]:
        options = self.options
        flags = set()
        if len(one.tried) > 1:
            flags.add("fallback")
        if not one.with_prompt and quality.is_prompt_echo(kept.text, self.prompt_text):
            flags.add("prompt_echo")
        if failed and options.logprob_threshold is not None and kept.result.avg_logprob < options.logprob_threshold:
            flags.add("low_logprob")
        limit = options.compression_ratio_threshold
        if kept.loop or (failed and limit is not None and kept.compression_ratio > limit):
            flags.add("loop")
        return flags

    def _pieces(self, one: _Pending, kept: Attempt) -> tuple[list[Piece], float]:
        seconds = one.window.seconds
        if self.options.without_timestamps:
            return ([Piece(0.0, seconds, kept.result.tokens)] if kept.text else []), seconds
        pieces, read = cut_pieces(kept.result.tokens, self.tokenizer, seconds)
        return [piece for piece in pieces if self.tokenizer.decode(piece.tokens).strip()], read

    def _queue_rest(self, one: _Pending, decoded: Decoded) -> None:
        """Decode again what lies behind the last timestamp, if there is speech in it."""
        window, tokens = one.window, decoded.attempt.result.tokens
        at, end = window.start / SAMPLE_RATE + decoded.read, window.stop / SAMPLE_RATE
        unfinished = tokens and not (len(tokens) > 1 and tokens[-1] >= self.tokenizer.timestamp_begin > tokens[-2])
        speech = self.sure.seconds(at, end)
        first = self.sure.after(at)
        if decoded.read <= 0 or not decoded.pieces or first is None or speech < _REST_SECONDS[0 if unfinished else 1]:
            return
        start = round(max(at, first - PAD_SECONDS) * SAMPLE_RATE)
        # The model saw the end of a short rest and said nothing: what it says now must be all the surer.
        rest = Window(start - start % 160, window.stop, window.doubtful or speech < _SHORT_REST_SECONDS)
        if rest.start <= window.start:
            return
        again = _Pending(rest, one.language, with_prompt=one.with_prompt)
        self.n_windows += 1
        self.total_seconds += rest.seconds
        self.outstanding.append(again)
        self._submit(again, next_up=True)

    def _sure_seconds(self, window: Window) -> float:
        return self.sure.seconds(window.start / SAMPLE_RATE, window.stop / SAMPLE_RATE)

    # -- segments --------------------------------------------------------------------------

    def _complete(self, one: _Pending, segments: list[Segment]) -> None:
        """Book a window as done and let go of all segments that nothing pending precedes."""
        self.outstanding.remove(one)
        one.state = None
        self.retried += one.retried
        self.done_seconds += one.window.seconds
        self.waiting_segments.append((one.window.start, self.assembler.without_silence(segments)))
        first_pending = min((other.window.start for other in self.outstanding), default=len(self.waveform) + 1)
        ready = sorted((item for item in self.waiting_segments if item[0] < first_pending), key=lambda item: item[0])
        self.waiting_segments = [item for item in self.waiting_segments if item[0] >= first_pending]
        for _, group in ready:
            for segment in group:
                self._emit(segment)
        if self.on_progress:
            self.on_progress(Progress("recognize", round(self.done_seconds, 2), round(self.total_seconds, 2)))

    def _emit(self, segment: Segment) -> None:
        floor = self.segments[-1].end if self.segments else 0.0
        done = self.assembler.placed(segment, len(self.segments), floor)
        self.segments.append(done)
        if self.on_segment:
            self.on_segment(done)

    def _result(self, language: str | None, probability: float | None) -> PipelineResult:
        missed = self.sure.without(Spans([(segment.start, segment.end) for segment in self.segments]))
        speech = sum(high - low for low, high in self.sure.all)
        gaps = [(round(low, 2), round(high, 2)) for low, high in missed if high - low >= _GAP_SECONDS]
        missing = sum(high - low for low, high in missed)
        return PipelineResult(
            segments=tuple(self.segments),
            language=language,
            language_probability=probability,
            speech_seconds=round(speech, 2),
            transcribed_seconds=round(speech - missing, 2),
            gaps=tuple(gaps),
            windows=self.n_windows,
            retried_windows=self.retried,
            warnings=tuple(self.warnings),
        )


def _features(waveform: npt.NDArray[np.int16], n_mels: int, window: Window, peak: float, *, wide: bool) -> torch.Tensor:
    """A window's mel with silence behind it where it is short; ``wide``: up to 30 s."""
    from whisper_worker.engine.features import LEAST_FRAMES, log_mel, with_silence

    mel = log_mel(waveform, n_mels, window.start, window.stop, peak=peak)
    return with_silence(mel, N_FRAMES if wide else LEAST_FRAMES)


def _seconds(spans: Sequence[SpeechSpan]) -> Spans:
    return Spans([(span.start / SAMPLE_RATE, span.end / SAMPLE_RATE) for span in spans])


def _within(spans: Sequence[SpeechSpan], clips: Sequence[SpeechSpan]) -> list[list[SpeechSpan]]:
    """For each of ``clips`` the parts of ``spans`` inside it; both are rising and disjoint, and may be many."""
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    return [
        [
            SpeechSpan(max(span.start, clip.start), min(span.end, clip.end))
            for span in spans[bisect_right(ends, clip.start) : bisect_left(starts, clip.end)]
        ]
        for clip in clips
    ]


def _spread(pending: Sequence[_Pending], n: int) -> list[_Pending]:
    """The longest, surest window of each of ``n`` equal parts of the list."""
    bounds = np.linspace(0, len(pending), min(n, len(pending)) + 1).round().astype(int)
    parts = [pending[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    return [max(part, key=lambda one: (not one.window.doubtful, one.window.seconds)) for part in parts]
