"""The command's arguments: openai/whisper's flags by name and meaning, and a few of ours.

What the engine decides is read into the common payload, so that the same arguments mean the
same whether this process transcribes or a service does. An option that was not given is not
in the payload: the engine's default holds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from whisper_worker import __version__
from whisper_worker.errors import InvalidInput
from whisper_worker.formats import SubtitleLayout
from whisper_worker.languages import language_code
from whisper_worker.settings import COMPUTE_TYPES
from whisper_worker.types import FORMATS

VERBOSE_JSON = "verbose_json"

EXIT_CODES = """exit status:
  0    every file was transcribed
  1    a file could not be; sending it again would not help
  2    wrong arguments
  3    the model or the device is not there
  4    a file could not be transcribed now; trying again may help (busy, out of memory, no connection, too late)
  130  interrupted
With several files the others are still done, and the first failure gives the status."""

KEEP_WARM_SECONDS = 600.0
_KEEP_WARM = ("--keep-warm", "--keep_warm")

_PAYLOAD = (
    "task language temperature best_of beam_size patience length_penalty suppress_tokens initial_prompt "
    "condition_on_previous_text temperature_increment_on_fallback compression_ratio_threshold logprob_threshold "
    "no_speech_threshold word_timestamps prepend_punctuations append_punctuations clip_timestamps "
    "hallucination_silence_threshold vad vad_threshold hotwords languages multilingual prefix without_timestamps "
    "seed strict"
).split()
"""Options that become fields of the request, under their own names."""

_HERE_ONLY = ("model_dir", "device", "fp16", "compute_type", "threads", "keep_warm")
_THERE_ONLY = ("timeout", "retries", "key_file", "client_cert")
_OFF = {
    "beam_size": 1,
    "temperature_increment_on_fallback": 0.0,
    "compression_ratio_threshold": 1e6,
    "logprob_threshold": -1e6,
    "no_speech_threshold": 1.0,
}
"""What ``None`` stands for: greedy decoding, a bound that nothing passes. A form that is sent cannot carry null."""


@dataclass(frozen=True, slots=True)
class Command:
    """One call of the command, checked as far as arguments can be."""

    inputs: tuple[str, ...]
    payload: Mapping[str, object]
    formats: tuple[str, ...]
    output_dir: Path
    layout: SubtitleLayout
    verbose: bool | None
    """True prints segments as they come, False a progress bar, None nothing."""
    model: str | None
    model_dir: Path | None
    device: str | None
    compute_type: str | None
    threads: int | None
    keep_warm: float | None
    """Seconds that the local service stays after its last job."""
    server: str | None
    timeout: float
    """Seconds for one file at the service, retries included."""
    retries: int
    key_file: Path | None
    client_cert: Path | None
    carry_initial_prompt: bool | None
    given: frozenset[str]

    def without_effect(self, *, remote: bool) -> tuple[str, ...]:
        """A line for each option that was given and does nothing at the chosen place."""
        where = "where a service transcribes" if remote else "without a service"
        idle = [name for name in (_HERE_ONLY if remote else _THERE_ONLY) if name in self.given]
        lines = [f"--{name} has no effect {where} and was ignored." for name in idle]
        if self.carry_initial_prompt is False and "initial_prompt" in self.given:
            lines.append("--carry_initial_prompt is always True here: the prompt stands before every window.")
        if "max_line_count" in self.given and "max_line_width" not in self.given and not self.layout.natural_breaks:
            lines.append("--max_line_count has no effect without --max_line_width.")
        if "max_words_per_line" in self.given and ("max_line_width" in self.given or self.layout.natural_breaks):
            lines.append("--max_words_per_line has no effect with --max_line_width or --natural_breaks.")
        if self.layout.max_chars_per_second and self.layout.highlight_words:
            lines.append("--max_chars_per_second has no effect with --highlight_words.")
        return tuple(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print its whole usage first."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parse(argv: Sequence[str] | None, prog: str) -> Command:
    """Read the arguments; leaves by SystemExit as argparse does (0 after --help, 2 for a wrong one)."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(prog)
    values = vars(parser.parse_args(_with_seconds(given)))
    _check_words(parser, values)
    payload = {name: values[name] for name in _PAYLOAD if name in values}
    for name, off in _OFF.items():
        if name in payload and payload[name] is None:
            payload[name] = off
    payload = {name: value for name, value in payload.items() if value is not None}
    fmt = values.get("output_format", "all")
    fp16 = values.get("fp16", True)
    return Command(
        inputs=tuple(values["audio"]),
        payload=payload,
        formats=FORMATS if fmt == "all" else (fmt,),
        output_dir=values.get("output_dir", Path()),
        layout=SubtitleLayout(
            max_line_width=values.get("max_line_width"),
            max_line_count=values.get("max_line_count"),
            max_words_per_line=values.get("max_words_per_line"),
            highlight_words=values.get("highlight_words", False),
            natural_breaks=values.get("natural_breaks", False),
            max_chars_per_second=values.get("max_chars_per_second"),
        ),
        verbose=values.get("verbose", True),
        model=values.get("model"),
        model_dir=values.get("model_dir"),
        device=values.get("device"),
        compute_type=values.get("compute_type", None if fp16 else "float32"),
        threads=values.get("threads"),
        keep_warm=values.get("keep_warm"),
        server=values.get("server"),
        timeout=values.get("timeout", 1200.0),
        retries=values.get("retries", 4),
        key_file=values.get("key_file"),
        client_cert=values.get("client_cert"),
        carry_initial_prompt=values.get("carry_initial_prompt"),
        given=frozenset(values),
    )


def _with_seconds(given: Sequence[str]) -> list[str]:
    """Each ``--keep-warm`` with its seconds; argparse would take the file behind it for them."""
    words: list[str] = []
    for word in given:
        if words and words[-1] in _KEEP_WARM and re.fullmatch(r"[0-9]+(\.[0-9]+)?", word) and not Path(word).exists():
            words[-1] += f"={word}"
        else:
            words.append(word)
    return [f"{word}={KEEP_WARM_SECONDS:g}" if word in _KEEP_WARM else word for word in words]


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Nothing has a default here: what was not given is not among the parsed values."""
    parser = _Parser(
        prog=prog,
        description="Transcribe recordings into text and subtitles.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"whisper-worker {__version__}")
    parser.add_argument(
        "audio",
        nargs="+",
        help="files, directories, http(s) addresses, or - for standard input; /dev/null only loads the model",
    )
    _add_model(parser.add_argument_group("model"))
    _add_output(parser.add_argument_group("output"))
    _add_decoding(parser.add_argument_group("decoding"))
    _add_service(parser.add_argument_group("service"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="short name, hub name or directory (default: WHISPER_MODEL, the cached model)")
    group.add_argument("--model_dir", type=Path, help="model cache to look in and save to (WHISPER_MODEL_CACHE)")
    group.add_argument("--device", type=_device, help="cpu, cuda or auto (WHISPER_DEVICE, auto)")
    group.add_argument("--fp16", type=_flag, help="False computes in float32 (default: True, the device's fastest)")
    group.add_argument("--compute_type", choices=COMPUTE_TYPES, help="precision by name; wins over --fp16")
    group.add_argument("--threads", type=_count(0), help="CPU threads (WHISPER_THREADS, 0: all cores)")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output_dir", "-o", type=Path, help="directory for the outputs (default: .)")
    group.add_argument(
        "--output_format", "-f", choices=(*FORMATS, VERBOSE_JSON, "all"), help="(default: all, but verbose_json)"
    )
    group.add_argument(
        "--verbose", type=_optional(_flag), help="True prints segments, False a progress bar, None nothing (True)"
    )
    words = "(needs --word_timestamps True)"
    group.add_argument("--highlight_words", type=_flag, help=f"{words} underline each word as it is spoken (False)")
    group.add_argument("--max_line_width", type=_optional(_count(1)), help=f"{words} characters in a line")
    group.add_argument("--max_line_count", type=_optional(_count(1)), help=f"{words} lines in a cue")
    group.add_argument("--max_words_per_line", type=_optional(_count(1)), help=f"{words} words in a cue")
    group.add_argument(
        "--natural_breaks",
        type=_flag,
        help=f"{words} break lines and cues where a sentence or a clause ends; "
        "42 characters in 2 lines unless told otherwise (False)",
    )
    group.add_argument(
        "--max_chars_per_second",
        type=_optional(_number),
        help="reading speed: let a cue stand longer, as far as the next one allows",
    )


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--task", choices=("transcribe", "translate"), help="(default: transcribe)")
    group.add_argument("--language", type=_language, help="code or English name; None detects it (default)")
    group.add_argument("--temperature", help="temperature of sampling, or several with commas (0)")
    group.add_argument("--best_of", type=_optional(_count(1)), help="candidates at temperatures above 0 (5)")
    group.add_argument(
        "--beam_size",
        type=_optional(_count(1)),
        help="beams at temperature 0; None or 1 is greedy (the engine chooses)",
    )
    group.add_argument("--patience", type=_optional(_number), help="patience of the beam search (1.0)")
    group.add_argument("--length_penalty", type=_optional(_number), help="token length penalty (by length)")
    group.add_argument("--suppress_tokens", help="token ids with commas; -1 is the list of non-speech symbols (-1)")
    group.add_argument("--initial_prompt", help="text given to the model before every window")
    group.add_argument("--carry_initial_prompt", type=_flag, help="always True: windows are decoded side by side")
    group.add_argument(
        "--condition_on_previous_text", type=_flag, help="True decodes one window at a time, after the other (False)"
    )
    group.add_argument(
        "--temperature_increment_on_fallback",
        type=_optional(_number),
        help="step of the temperature where decoding failed; None never tries again (0.2)",
    )
    group.add_argument("--compression_ratio_threshold", type=_optional(_number), help="above it: failed (2.4)")
    group.add_argument("--logprob_threshold", type=_optional(_number), help="mean log probability below: failed (-1.0)")
    group.add_argument(
        "--no_speech_threshold", type=_optional(_number), help="above it a failed window is silent (0.6)"
    )
    group.add_argument("--word_timestamps", type=_flag, help="times of words (False)")
    group.add_argument("--prepend_punctuations", help="signs joined to the word behind them")
    group.add_argument("--append_punctuations", help="signs joined to the word before them")
    group.add_argument("--clip_timestamps", help="start,end,start,end,... in seconds: the parts to transcribe (0)")
    group.add_argument(
        "--hallucination_silence_threshold",
        type=_optional(_number),
        help="with word times: seconds of silence around a doubtful text that are skipped",
    )
    group.add_argument("--vad", type=_flag, help="look for speech first and leave silence out (True)")
    group.add_argument("--vad_threshold", type=_number, help="probability from which a sound is speech (0.5)")
    group.add_argument("--hotwords", help="words to expect: names, terms")
    group.add_argument("--languages", help="codes with commas: the only ones that detection may choose")
    group.add_argument("--multilingual", type=_flag, help="detect the language again in every window (False)")
    group.add_argument("--prefix", help="text that each window's transcript begins with")
    group.add_argument("--without_timestamps", type=_flag, help="text without times inside windows (False)")
    group.add_argument("--seed", type=_count(0), help="seed of sampling")
    group.add_argument("--strict", type=_flag, help="refuse an option that would be ignored (WHISPER_STRICT, False)")


def _add_service(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--server", metavar="URL", help="send the files to this HTTP service (WHISPER_SERVICE_URL)")
    group.add_argument("--timeout", type=_seconds, help="seconds for one file there, retries included (1200)")
    group.add_argument("--retries", type=_count(0), help="further attempts where the service is busy or away (4)")
    group.add_argument(
        "--key-file", "--key_file", type=Path, help="file with the service's key (WHISPER_SERVICE_KEY_FILE)"
    )
    group.add_argument(
        "--client-cert", "--client_cert", type=Path, help="PEM file with certificate and key, for mutual TLS"
    )
    group.add_argument(
        *_KEEP_WARM,
        type=_seconds,
        metavar="SECONDS",
        help="leave the model loaded in a local service for the next calls, until it was idle for so long; "
        f"--keep-warm alone: {KEEP_WARM_SECONDS:g}",
    )


def _check_words(parser: argparse.ArgumentParser, values: Mapping[str, object]) -> None:
    if values.get("word_timestamps"):
        return
    for name in ("highlight_words", "max_line_width", "max_line_count", "max_words_per_line", "natural_breaks"):
        if values.get(name):
            parser.error(f"--{name} requires --word_timestamps True")


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return lowered == "true"


def _optional(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A value, or the word None."""
    return lambda text: None if text == "None" else parse(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _seconds(text: str) -> float:
    seconds = _number(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError("expected seconds above 0")
    return seconds


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return parse


def _device(text: str) -> str:
    name = text.strip().lower()
    if name == "cuda:0":
        return "cuda"
    if name not in ("cpu", "cuda", "auto"):
        raise argparse.ArgumentTypeError("expected cpu, cuda or auto; CUDA_VISIBLE_DEVICES chooses among cards")
    return name


def _language(text: str) -> str | None:
    if text.strip().lower() in ("none", "auto", ""):
        return None
    try:
        return language_code(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(error.message) from None
