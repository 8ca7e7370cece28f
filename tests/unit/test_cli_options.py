"""The command's arguments against openai/whisper's, and what becomes of them in a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from whisper_worker import errors
from whisper_worker.doors.cli_options import Command, build_parser, parse
from whisper_worker.doors.cli_run import EXIT_STATUS
from whisper_worker.schema import job_input_from_dict
from whisper_worker.settings import Settings
from whisper_worker.types import FORMATS, AudioSource, TranscribeOptions

OPENAI_WHISPER = (
    "--help --model --model_dir --device --output_dir --output_format --verbose --task --language --temperature "
    "--best_of --beam_size --patience --length_penalty --suppress_tokens --initial_prompt --carry_initial_prompt "
    "--condition_on_previous_text --fp16 --temperature_increment_on_fallback --compression_ratio_threshold "
    "--logprob_threshold --no_speech_threshold --word_timestamps --prepend_punctuations --append_punctuations "
    "--highlight_words --max_line_width --max_line_count --max_words_per_line --threads --clip_timestamps "
    "--hallucination_silence_threshold -h -o -f"
).split()
"""Every flag of openai-whisper 20250625."""

MISSING: dict[str, str] = {}
"""Flags of theirs that ours has not, each with the reason."""


def command(*arguments: str) -> Command:
    return parse(["call.wav", *arguments], "whisper")


def options(*arguments: str) -> TranscribeOptions:
    return job_input_from_dict(command(*arguments).payload, Settings(), AudioSource(path=Path("call.wav"))).options


def test_every_flag_of_openai_whisper_is_here_or_its_absence_explained() -> None:
    ours = {flag for action in build_parser("whisper")._actions for flag in action.option_strings}
    assert set(OPENAI_WHISPER) - ours == set(MISSING)


def test_the_defaults_are_openai_whispers_but_for_two() -> None:
    """Theirs, as its --help states them; conditioning on earlier text is off here, since windows are decoded
    side by side, and the number of beams is the engine's, so that every door gives the same text."""
    assert options() == TranscribeOptions(beam_size=None, condition_on_previous_text=False)
    assert TranscribeOptions().best_of == 5
    assert TranscribeOptions().temperature_increment_on_fallback == 0.2
    plain = command()
    assert (plain.formats, plain.output_dir, plain.verbose) == (FORMATS, Path(), True)


def test_what_is_given_reaches_the_engine() -> None:
    given = options(
        *("--language", "German", "--task", "translate", "--temperature", "0.4", "--best_of", "3", "--beam_size", "2"),
        *("--patience", "1.5", "--length_penalty", "0.6", "--suppress_tokens=-1,5", "--initial_prompt", "Hello."),
        *("--condition_on_previous_text", "True", "--temperature_increment_on_fallback", "0.3"),
        *("--compression_ratio_threshold", "2", "--logprob_threshold", "-0.5", "--no_speech_threshold", "0.4"),
        *("--word_timestamps", "true", "--prepend_punctuations", "(", "--append_punctuations", ")"),
        *("--clip_timestamps", "1,2,3", "--hallucination_silence_threshold", "2", "--vad", "False"),
        *("--hotwords", "Kubernetes", "--seed", "7"),
    )
    assert given == TranscribeOptions(
        language="de",
        task="translate",
        temperature=0.4,
        best_of=3,
        beam_size=2,
        patience=1.5,
        length_penalty=0.6,
        suppress_tokens="-1,5",
        initial_prompt="Hello.",
        condition_on_previous_text=True,
        temperature_increment_on_fallback=0.3,
        compression_ratio_threshold=2.0,
        logprob_threshold=-0.5,
        no_speech_threshold=0.4,
        word_timestamps=True,
        prepend_punctuations="(",
        append_punctuations=")",
        clip_timestamps=(1.0, 2.0, 3.0),
        hallucination_silence_threshold=2.0,
        vad=False,
        hotwords="Kubernetes",
        seed=7,
    )


def test_none_turns_off_and_forms_can_carry_it() -> None:
    thresholds = (
        *("--compression_ratio_threshold", "None", "--logprob_threshold", "None", "--no_speech_threshold", "None"),
        *("--temperature_increment_on_fallback", "None", "--beam_size", "None", "--language", "None"),
    )
    off = options(*thresholds)
    assert off.beam_size == 1
    assert off.language is None
    assert off.temperature_increment_on_fallback == 0.0
    assert off.compression_ratio_threshold == 1e6
    assert off.logprob_threshold == -1e6
    assert off.no_speech_threshold == 1.0
    assert None not in command(*thresholds).payload.values()


@pytest.mark.parametrize(
    ("arguments", "compute_type"),
    [
        ((), None),
        (("--fp16", "True"), None),
        (("--fp16", "False"), "float32"),
        (("--fp16", "False", "--compute_type", "int8"), "int8"),
    ],
)
def test_fp16_chooses_the_precision(arguments: tuple[str, ...], compute_type: str | None) -> None:
    assert command(*arguments).compute_type == compute_type


def test_keep_warm_without_seconds_leaves_the_file_behind_it_alone() -> None:
    assert parse(["--keep-warm", "call.wav"], "whisper").inputs == ("call.wav",)
    assert parse(["--keep-warm", "call.wav"], "whisper").keep_warm == 600.0
    assert command("--keep-warm=30").keep_warm == 30.0
    spaced = parse(["--keep-warm", "30", "call.wav"], "whisper")
    assert (spaced.keep_warm, spaced.inputs) == (30.0, ("call.wav",)), "it is how --help shows it"
    assert command().keep_warm is None


def test_options_that_do_nothing_are_named() -> None:
    there = ("--device", "cuda", "--fp16", "True", "--threads", "2", "--timeout", "60")
    assert [line.split()[0] for line in command(*there).without_effect(remote=True)] == [
        "--device",
        "--fp16",
        "--threads",
    ]
    assert [line.split()[0] for line in command(*there).without_effect(remote=False)] == ["--timeout"]
    words = ("--word_timestamps", "True")
    named = command(*words, "--max_line_count", "2").without_effect(remote=False)
    assert "--max_line_width" in named[0]
    assert command(*words, "--max_line_count", "2", "--max_line_width", "40").without_effect(remote=False) == ()
    named = command("--initial_prompt", "x", "--carry_initial_prompt", "False").without_effect(remote=False)
    assert "every window" in named[0]
    named = command(*words, "--highlight_words", "True", "--max_chars_per_second", "17").without_effect(remote=False)
    assert "--max_chars_per_second" in named[0]


def test_every_code_has_an_exit_status() -> None:
    assert set(EXIT_STATUS) == errors.ERROR_CODES
