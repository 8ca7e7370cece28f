"""The ladder of attempts and the guards against invented text."""

from __future__ import annotations

import pytest

from whisper_worker.engine import quality
from whisper_worker.engine.quality import Attempt, Verdict
from whisper_worker.engine.recognizer import DecodingResult
from whisper_worker.types import TranscribeOptions


def tried(text: str, logprob: float = -0.3, no_speech: float = 0.01, temperature: float = 0.0) -> Attempt:
    return quality.attempt(DecodingResult((1, 2), logprob, no_speech, temperature), text)


def judge(*attempts: Attempt, doubtful: bool = False, options: TranscribeOptions | None = None) -> Verdict:
    options = options or TranscribeOptions()
    return quality.judge(attempts, quality.ladder(options, ()), options, doubtful=doubtful)


def test_the_ladder_has_two_searches_by_beams_then_heat() -> None:
    steps = quality.ladder(TranscribeOptions(), ())
    assert [(step.temperature, step.beam_size, step.best_of) for step in steps] == [
        (0.0, 5, None),
        (0.0, 5, None),
        (0.2, None, 5),
        (0.4, None, 5),
        (0.6, None, 5),
        (0.8, None, 5),
        (1.0, None, 5),
    ]


def test_asked_for_beams_and_temperatures_are_taken_as_they_are() -> None:
    steps = quality.ladder(TranscribeOptions(beam_size=3, patience=2.0, temperature=(0.0, 0.5)), (9,))
    assert [(step.temperature, step.beam_size, step.patience) for step in steps] == [(0.0, 3, 2.0), (0.5, None, None)]
    assert all(step.suppress_tokens == (9,) for step in steps)


def test_one_beam_is_greedy_and_still_has_beams_to_fall_back_on() -> None:
    steps = quality.ladder(TranscribeOptions(beam_size=1), ())
    assert [(step.temperature, step.beam_size) for step in steps][:3] == [(0.0, None), (0.0, 5), (0.2, None)]


def test_a_caller_of_the_engine_may_search_less_widely_at_first() -> None:
    assert [step.beam_size for step in quality.ladder(TranscribeOptions(), (), beams=3)][:3] == [3, 5, None]
    assert quality.ladder(TranscribeOptions(beam_size=4), (), beams=3)[0].beam_size == 4


def test_no_increment_means_one_attempt() -> None:
    assert len(quality.ladder(TranscribeOptions(temperature_increment_on_fallback=None), ())) == 1
    assert len(quality.ladder(TranscribeOptions(temperature=0.4, temperature_increment_on_fallback=0), ())) == 1


def test_plain_text_is_accepted_and_a_weak_one_tried_again() -> None:
    assert judge(tried("a plain sentence")) is Verdict.ACCEPT
    assert judge(tried("a weak sentence", logprob=-1.4)) is Verdict.RETRY
    assert judge(tried("loop " * 60)) is Verdict.RETRY


def test_two_searches_that_run_in_the_same_loop_prove_nothing() -> None:
    """Greedy and beam once agreed on 170 invented words, and were believed."""
    loop = quality.attempt(DecodingResult((1,), -0.1, 0.0, 0.0), "and then " * 80, loop=True)
    assert judge(loop, loop) is Verdict.RETRY
    assert quality.best([loop, tried("what was said", -0.9)], TranscribeOptions()).text == "what was said"


def test_thresholds_can_be_turned_off() -> None:
    off = TranscribeOptions(compression_ratio_threshold=None, logprob_threshold=None, no_speech_threshold=None)
    assert judge(tried("loop " * 60, logprob=-3.0, no_speech=0.99), options=off) is Verdict.ACCEPT


def test_silence_needs_both_signs_but_a_doubtful_window_only_one() -> None:
    assert judge(tried("thanks", logprob=-1.4, no_speech=0.9)) is Verdict.SILENCE
    assert judge(tried("thanks", logprob=-0.2, no_speech=0.9)) is Verdict.ACCEPT
    assert judge(tried("thanks", logprob=-0.9), doubtful=True) is Verdict.SILENCE
    assert judge(tried("thanks", no_speech=0.5), doubtful=True) is Verdict.SILENCE
    assert judge(tried("thanks"), doubtful=True) is Verdict.ACCEPT


def test_a_repetition_that_two_searches_agree_on_was_said() -> None:
    said = "he could wait no longer " * 12
    assert judge(tried(said), tried(said)) is Verdict.RETRY, "twice by beams is one way of searching"
    assert judge(tried(said), tried(said), tried(said)) is Verdict.ACCEPT
    assert judge(tried(said), tried(said), tried(said + "he")) is Verdict.RETRY
    assert judge(tried(said), tried(said), options=TranscribeOptions(beam_size=1)) is Verdict.ACCEPT


def test_when_all_fail_the_likeliest_that_does_not_repeat_is_kept() -> None:
    loop, plain, weak = tried("loop " * 60, -0.1), tried("something", -1.2), tried("else", -2.0)
    assert quality.best([loop, plain, weak], TranscribeOptions()) is plain
    assert quality.best([loop], TranscribeOptions()) is loop


def test_loops_are_told_from_repetition_by_their_speed() -> None:
    phrase = [5, 6, 7, 8]
    assert quality.longest_repeat([1, 2, *phrase * 6, 9]) == 6
    assert quality.longest_repeat([1, 2, 3, 4]) == 1
    assert quality.is_loop(phrase * 50, "he could wait " * 50, speech_seconds=3.0)
    assert not quality.is_loop(phrase * 8, "he could wait " * 8, speech_seconds=20.0)


def test_a_loop_of_whole_sentences_is_a_loop() -> None:
    """One of 25 tokens once passed for speech, since no short run of tokens stood twice in a row."""
    sentence = list(range(25))
    text = "and then she wept and cried to the eunuch and said to him what is it that thou art saying to me now "
    assert quality.is_loop(sentence * 9, text * 9, speech_seconds=12.0)
    assert not quality.is_loop(sentence * 2, text * 2, speech_seconds=12.0)


def test_prompt_echo() -> None:
    prompt = "Glossary: Kubernetes, Whisper and RunPod are product names."
    assert quality.is_prompt_echo("Kubernetes Whisper, and RunPod", prompt)
    assert quality.is_prompt_echo(prompt, prompt)
    assert not quality.is_prompt_echo("Kubernetes", prompt)
    assert not quality.is_prompt_echo("We deploy with Kubernetes and RunPod", prompt)
    assert not quality.is_prompt_echo("", prompt)
    assert not quality.is_prompt_echo("anything at all here", None)


def test_a_start_hotter_than_any_rise_is_taken_as_it_is() -> None:
    assert [step.temperature for step in quality.ladder(TranscribeOptions(temperature=1.5), ())] == [1.5]


def test_stories_that_differ_at_every_attempt_were_not_said() -> None:
    options = TranscribeOptions()
    stories = ("see you in the next video", "so this is my brother", "thank you for joining us", "he never did it")
    assert quality.is_invented([tried(story, -1.2) for story in stories], options)
    assert not quality.is_invented([tried(story, -1.2) for story in stories[:2]], options), "too few to tell"
    assert not quality.is_invented([tried(story, -1.2) for story in stories], TranscribeOptions(logprob_threshold=None))
    assert not quality.is_invented([*(tried(story, -1.2) for story in stories), tried("hello", -0.9)], options)


def test_speech_that_is_only_hard_is_kept() -> None:
    heard = (
        "of the deafness of the lady they watched",
        "of deafness to the lady they washed",
        "the lady they watch it",
    )
    assert not quality.is_invented([tried(text, -1.1) for text in heard], TranscribeOptions())
    heard = ("彼は昨日学校へ行きました", "彼女は昨日学校に行った", "彼は昨夜学校へ行きます")
    assert not quality.is_invented([tried(text, -1.1) for text in heard], TranscribeOptions())


@pytest.mark.parametrize(
    "heard",
    [
        ("彼は昨日、学校へ行きました。", "彼女は昨日、学校に行った。", "彼は昨夜、学校へ行きます。"),
        (
            "我昨天在 GitHub 上看到了，这个很好。",
            "他昨天在GitHub上看到，那个很好。",
            "我昨天 在 git hub 上看了，这个好。",
        ),
    ],
    ids=["Japanese", "Chinese with a name"],
)
def test_marks_and_blanks_do_not_make_words_of_clauses(heard: tuple[str, ...]) -> None:
    """Of text in such a script that had a comma, whole clauses had to agree; hard speech was left out."""
    assert not quality.is_invented([tried(text, -1.1) for text in heard], TranscribeOptions())
    others = ("ご視聴、ありがとう。", "次の動画で、お会いしましょう。")
    assert quality.is_invented([tried(text, -1.1) for text in (heard[0], *others)], TranscribeOptions())
