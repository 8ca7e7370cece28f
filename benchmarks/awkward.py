"""Awkward files: is what came back what has to come back?

    python benchmarks/awkward.py --manifest FILE [--model NAME]

Of a manifest's entries with an ``expect`` field, each must come back as it says:

ok                 the text, with a third of the words wrong at most (60 % where the note
                   tolerates errors), and speech times within a second of the reference's
                   where it gives ``segments``
ok_partial         a part of the text: a third of its characters or more, and little else
ok_or_documented   ok, or a transcript with a warning that says what is missing
ok_or_clean_error  ok, or a typed error about the audio
empty              no words (a sound named in brackets is none)
empty_or_error     no words, or a typed error about the audio
error              a typed error about the audio
no_crash           any transcript, or any typed error but a defect of ours

In every transcript the times must rise and lie inside the recording, and in every error the
message must not name the file. A file that takes longer than --timeout fails, and so do
those that end the engine's process; it is started again for the next one.

The last line is JSON: ``passed`` and ``failed``, the names of files.
"""

from __future__ import annotations

from pathlib import Path

from common import (
    OURS,
    EngineDied,
    EngineProcess,
    Entry,
    Reply,
    Score,
    bench_from,
    count_words,
    parser,
    print_json,
    print_table,
    read_manifest,
    score,
)

ABOUT_THE_AUDIO = frozenset({"DECODE", "FORBIDDEN", "INVALID_INPUT", "TOO_LARGE"})
OWN_DEFECTS = frozenset({"INTERNAL", "ENGINE", "MODEL"})
MOST_ERRORS = 34.0
MOST_TOLERATED_ERRORS = 60.0
NEAR_SECONDS = 1.0
ROUNDING_SECONDS = 0.05


def complaint(entry: Entry, reply: Reply) -> str | None:
    """What is wrong with an answer, None if it is as expected."""
    if "crash" in reply:
        return f"an untyped exception: {reply['crash']}"
    if "error" in reply:
        return _about_error(entry, str(reply["error"]["code"]), str(reply["error"]["message"]))
    return _about_times(entry, reply) or _about_text(entry, reply)


def _about_error(entry: Entry, code: str, message: str) -> str | None:
    if entry.path.name in message or str(entry.path.parent) in message:
        return f"{code}: the message names the file"
    if entry.expect == "no_crash" and code not in OWN_DEFECTS:
        return None
    if entry.expect in ("error", "empty_or_error", "ok_or_clean_error") and code in ABOUT_THE_AUDIO:
        return None
    return f"{code}: {message}"


def _about_times(entry: Entry, reply: Reply) -> str | None:
    before = 0.0
    for segment in reply["segments"]:
        if not before - ROUNDING_SECONDS <= segment["start"] <= segment["end"]:
            return f"times do not rise at {segment['start']:.2f} s"
        before = segment["end"]
    if before > reply["duration"] + ROUNDING_SECONDS:
        return f"a time of {before:.2f} s in a recording of {reply['duration']:.2f} s"
    return None


def _about_text(entry: Entry, reply: Reply) -> str | None:
    text = reply["text"]
    words = count_words(text)
    if entry.expect == "no_crash":
        return None
    if entry.expect == "error":
        return "a transcript where an error is due"
    if entry.expect in ("empty", "empty_or_error"):
        return f"{words} words: {text.strip()[:80]}" if words else None
    if entry.expect == "ok_partial":
        # Of a few words one misheard says little; by characters, nonsense and a part can be told apart.
        return _about_part(score(entry.text, text, entry.language, by_character=True), text)
    counted = score(entry.text, text, entry.language)
    if entry.expect == "ok_or_documented" and reply["warnings"]:
        return None
    most = MOST_TOLERATED_ERRORS if "tolerable" in entry.note else MOST_ERRORS
    if counted.error_rate > most:
        return f"{counted.error_rate:.0f} % errors: {text.strip()[:80]}"
    return _about_place(entry, reply)


def _about_part(counted: Score, text: str) -> str | None:
    right = counted.reference - counted.deletions - counted.substitutions
    wrong = counted.substitutions + counted.insertions
    if right * 3 < counted.reference or wrong * 2 > right:
        return f"{right} of {counted.reference} characters right and {wrong} wrong: {text.strip()[:80]}"
    return None


def _about_place(entry: Entry, reply: Reply) -> str | None:
    """Speech must be placed where it is in the recording."""
    if not entry.segments:
        return None
    first, last = reply["segments"][0]["start"], reply["segments"][-1]["end"]
    if abs(first - entry.segments[0].start) > NEAR_SECONDS:
        return f"speech starts at {first:.2f} s, not at {entry.segments[0].start:.2f} s"
    if abs(last - entry.segments[-1].end) > NEAR_SECONDS:
        return f"speech ends at {last:.2f} s, not at {entry.segments[-1].end:.2f} s"
    return None


def main() -> None:
    arguments_of = parser(__doc__, peers=False)
    arguments_of.add_argument("--manifest", type=Path, required=True)
    arguments_of.add_argument("--audio-root", type=Path, help="folder of the files; default: the manifest's")
    arguments_of.add_argument("--timeout", type=float, default=120.0, help="seconds for one file")
    arguments = arguments_of.parse_args()

    entries = [entry for entry in read_manifest(arguments.manifest, arguments.audio_root) if entry.expect]
    bench = bench_from(arguments)
    rows: list[tuple[str, str, str]] = []
    engine: EngineProcess | None = None
    for entry in entries:
        try:
            if engine is None:
                engine = bench.start(OURS)
                engine.ready()
            language = None if entry.language == "multi" else entry.language
            wrong = complaint(entry, engine.transcribe(entry.path, language, timeout=arguments.timeout))
        except EngineDied as death:
            wrong = str(death)
            if engine is not None:
                engine.stop()
            engine = None
        rows.append((entry.name, str(entry.expect), "as expected" if wrong is None else f"FAILED: {wrong}"))
    if engine is not None:
        engine.stop()

    width = max(len(name) for name, _, _ in rows)
    for name, expect, outcome in rows:
        print(f"{name.ljust(width)}  {expect.ljust(17)}  {outcome}")
    failed = [name for name, _, outcome in rows if outcome != "as expected"]
    print()
    print_table(["expected", "files", "passed"], _summary(rows))
    print_json({"passed": len(rows) - len(failed), "failed": failed})


def _summary(rows: list[tuple[str, str, str]]) -> list[tuple[str, int, int]]:
    kinds = sorted({expect for _, expect, _ in rows})
    outcomes = {kind: [outcome for _, expect, outcome in rows if expect == kind] for kind in kinds}
    return [(kind, len(outcomes[kind]), outcomes[kind].count("as expected")) for kind in kinds]


if __name__ == "__main__":
    main()
