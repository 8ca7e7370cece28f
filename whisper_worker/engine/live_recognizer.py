"""What a live session asks, answered by the scheduler's model.

A window that is still growing is decoded once, and believed only where a second decode
agrees; a finished one is judged as a file's windows are, and tried again by beams.
Windows of all sessions share batches, finished ones before growing ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from whisper_worker.engine import quality
from whisper_worker.engine.live import Hypothesis, LiveWord, Request, folded
from whisper_worker.engine.memory import give_back_unused
from whisper_worker.engine.quality import Attempt, Verdict
from whisper_worker.engine.recognizer import N_FRAMES, DecodingOptions, DecodingResult
from whisper_worker.engine.scheduler import Priority, Work
from whisper_worker.engine.timestamps import token_times, words_of
from whisper_worker.errors import InvalidInput
from whisper_worker.types import CancelToken, TranscribeOptions

if TYPE_CHECKING:
    import torch

    from whisper_worker.engine.pipeline import Pipeline

_SURE_OF_LANGUAGE = 0.5
_LEAST_FOR_LANGUAGE_SECONDS, _ENOUGH_FOR_LANGUAGE_SECONDS = 1.0, 3.0
_TOKEN_LIMITS = (32, 64, 128, 224)
_TOKENS_PER_SECOND = 8.0
"""More text tokens than this a second are invented; steps, because windows of one batch share the limit."""
_FINAL_ATTEMPTS = 3
_BEAM = 3
"""Fewer than for a file: a live window is decoded many times before it is final."""
_UNSURE_LOGPROB = -0.5
_SHORT_SECONDS = 10.0
"""A short final window's decode less likely than this is searched again, in full context, though it passes the
thresholds. A file's short windows have more context at once, which here would have to be paid for at every decode."""


class LiveRecognizer:
    """Answers one session's requests, one at a time, from any thread."""

    def __init__(self, pipeline: Pipeline, options: TranscribeOptions, cancel: CancelToken) -> None:
        """Raises :class:`InvalidInput` where the model cannot do what is asked."""
        info = pipeline.info
        if options.task == "translate" and not info.is_multilingual:
            raise InvalidInput("The loaded model is English-only and cannot translate; load a multilingual one.")
        if options.language not in (None, "en") and not info.is_multilingual:
            raise InvalidInput("The loaded model knows English only; load a multilingual one or leave language out.")
        if options.language is not None and info.is_multilingual:
            pipeline.tokenizer.language_token(options.language)
        self.language = options.language if info.is_multilingual else "en"
        self.language_probability: float | None = None
        """Set when the language was detected."""
        self._info = info
        self._tokenizer = pipeline.tokenizer
        self._options = options
        self._final = pipeline.scheduler.open(Priority.LIVE_FINAL, cancel)
        self._partial = pipeline.scheduler.open(Priority.LIVE_PARTIAL, cancel)
        self._steps = quality.ladder(options, pipeline.tokenizer.non_speech_tokens, beams=_BEAM)[:_FINAL_ATTEMPTS]
        given = " ".join(text for text in (options.hotwords, options.initial_prompt) if text).strip()
        self._prompt = tuple(self._tokenizer.encode(" " + given)) if given else ()
        self._peak = -10.0

    def close(self) -> None:
        self._final.close()
        self._partial.close()

    def recognize(self, request: Request) -> Hypothesis:
        """Decode in the calling thread. Raises what the scheduler raises; the same request may be tried again."""
        try:
            return self._recognize(request)
        finally:
            # A pause follows what is final, or nothing: what the decode used would be held all that while.
            give_back_unused(idle=request.final)

    def _recognize(self, request: Request) -> Hypothesis:
        one = _Window(self, request)
        if self.language is None and not self._detect(one, request):
            return Hypothesis((), discarded=True)
        steps = self._steps if request.final else self._steps[:1]
        tried: list[Attempt] = []
        verdict = Verdict.RETRY
        while verdict is Verdict.RETRY and len(tried) < len(steps):
            tried.append(one.decode(steps[len(tried)], wide=bool(tried)))
            verdict = quality.judge(tried, steps, self._options, doubtful=request.doubtful)
            unsure = request.seconds < _SHORT_SECONDS and tried[0].result.avg_logprob < _UNSURE_LOGPROB
            if verdict is Verdict.ACCEPT and unsure and len(tried) == 1 < len(steps):
                verdict = Verdict.RETRY
        kept = tried[-1] if verdict is Verdict.ACCEPT else quality.best(tried, self._options)
        limit = self._options.compression_ratio_threshold
        repeats = kept.loop or (limit is not None and kept.compression_ratio > limit)
        failed = verdict is Verdict.RETRY
        untrue = failed and (repeats or not request.final or quality.is_invented(tried, self._options))
        if verdict is Verdict.SILENCE or untrue:
            return Hypothesis((), discarded=True)
        result = kept.result
        return Hypothesis(
            words=one.words(result),
            avg_logprob=result.avg_logprob,
            no_speech_prob=result.no_speech_prob,
            compression_ratio=kept.compression_ratio,
            temperature=result.temperature,
        )

    def _detect(self, one: _Window, request: Request) -> bool:
        """Settle the language where the sound is enough for it; False: wait for more."""
        if not request.final and request.speech_seconds < _LEAST_FOR_LANGUAGE_SECONDS:
            return False
        probabilities = one.detect()
        allowed = {code: probabilities[code] for code in self._options.languages if code in probabilities}
        language = max(allowed or probabilities, key=probabilities.__getitem__)
        enough = request.final or request.speech_seconds >= _ENOUGH_FOR_LANGUAGE_SECONDS
        if probabilities[language] <= _SURE_OF_LANGUAGE and not enough:
            return False
        self.language, self.language_probability = language, probabilities[language]
        return True


class _Window:
    """One request at the scheduler."""

    def __init__(self, owner: LiveRecognizer, request: Request) -> None:
        self._owner = owner
        self._request = request
        self._job = owner._final if request.final else owner._partial
        self._state: Any = None
        self._wide = False
        # Behind a full stop the model likes to end. Whether there is one, it shall judge by what it hears now.
        n_prefix = len(request.prefix)
        while n_prefix and _is_punctuation(owner._tokenizer.decode(request.prefix[n_prefix - 1 : n_prefix])):
            n_prefix -= 1
        self._prefix = request.prefix[:n_prefix]

    def detect(self) -> dict[str, float]:
        """The probability of each language."""
        probabilities: dict[str, float] = self._run(None, None)
        return probabilities

    def decode(self, options: DecodingOptions, *, wide: bool) -> Attempt:
        """Text behind the prefix, judged together with it. ``wide``: encoded with silence up to 30 s behind it."""
        if wide != self._wide:
            self._wide, self._state = wide, None
        request, tokenizer = self._request, self._owner._tokenizer
        least = request.speech_seconds * _TOKENS_PER_SECOND + _TOKEN_LIMITS[0] / 2 - len(self._prefix)
        limit = next((limit for limit in _TOKEN_LIMITS if limit >= least), _TOKEN_LIMITS[-1])
        # Behind a prefix there may be nothing more to say.
        options = replace(options, max_new_tokens=limit, suppress_blank=not self._prefix)
        result: DecodingResult = self._run(options, None)
        said = [*self._prefix, *(token for token in result.tokens if token < tokenizer.eot)]
        text = tokenizer.decode(said).strip()
        return quality.attempt(result, text, loop=quality.is_loop(said, text, request.speech_seconds))

    def words(self, result: DecodingResult) -> tuple[LiveWord, ...]:
        """The words behind the prefix, with times."""
        request, owner = self._request, self._owner
        n_prefix = len(self._prefix)
        tokens = (*self._prefix, *(token for token in result.tokens if token < owner._tokenizer.eot))
        if len(tokens) == n_prefix:
            return ()
        attention, probabilities = self._run(DecodingOptions(task=owner._options.task), tokens)
        timed = words_of(
            tokens,
            token_times(attention),
            probabilities,
            owner._tokenizer,
            owner.language,
            owner._options.prepend_punctuations,
            owner._options.append_punctuations,
        )
        words: list[LiveWord] = []
        place = 0
        for word, n_tokens in timed:
            # What only grows onto the last settled word came too late: that word was shown as it is.
            if place >= n_prefix and word.word.strip():
                start, end = request.start + word.start, request.start + word.end
                words.append(LiveWord(replace(word, start=start, end=end), tokens[place : place + n_tokens]))
            place += n_tokens
        return tuple(words)

    def _run(self, options: DecodingOptions | None, tokens: tuple[int, ...] | None) -> Any:
        owner, request = self._owner, self._request
        decoding = options is not None and tokens is None
        work = Work(
            key=None,
            mel=self._mel,
            seconds=request.seconds,
            options=options,
            tokens=tokens,
            language=owner.language,
            prompt=(*owner._prompt, *request.history) if decoding else (),
            prefix=self._prefix if decoding else (),
            state=self._state,
        )
        self._job.submit(work)
        done = self._job.next_done()
        self._state = done.state
        return done.result

    def _mel(self) -> torch.Tensor:
        from whisper_worker.engine.features import log_mel, log_mel_peak, with_silence

        owner, waveform = self._owner, self._request.waveform
        owner._peak = max(owner._peak, log_mel_peak(waveform, owner._info.n_mels))
        mel = log_mel(waveform, owner._info.n_mels, peak=owner._peak)
        return with_silence(mel, N_FRAMES) if self._wide else mel


def _is_punctuation(text: str) -> bool:
    # Part of a character, which a token may be, is none.
    return not folded(text) and "\ufffd" not in text
