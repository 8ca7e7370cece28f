"""Word errors by category and language.

    python benchmarks/wer.py --manifest FILE --model NAME [--category C ...]
        [--engine NAME] [--peers faster-whisper,faster-whisper-greedy]

Every file with a reference is transcribed and scored after Whisper's normalisation (its
English one for English, its basic one elsewhere; characters for ja, ko, zh). Files in which
nobody speaks count the words invented there. Engines are told the language that the manifest
gives, unless --detect-language; an English-only model gets English and silent files alone.

The last line is JSON, in percent of the reference's words: ``wer``, ``deletions`` and
``insertions`` by ``category/language``, ``words_in_silence``, ``rtfx`` (audio seconds per wall
second, files one after another), ``failed`` files; the same under ``peers`` for each peer, and
``margin``: the error rate less that of the best peer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    OURS,
    PEERS,
    Bench,
    Entry,
    Score,
    bench_from,
    count_words,
    parser,
    print_json,
    print_table,
    read_manifest,
    run_files,
    say,
    score,
)

WORST_SHOWN = 8


@dataclass(slots=True)
class Result:
    """What one engine made of all files."""

    scores: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    files: list[tuple[Entry, Score, str]] = field(default_factory=list)
    """What each scored file came to, with the text."""
    words_in_silence: int = 0
    failed: list[str] = field(default_factory=list)
    audio_s: float = 0.0
    wall_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        scores = sorted(self.scores.items())
        return {
            "wer": {group: counted.error_rate for group, counted in scores},
            "deletions": {group: counted.percent(counted.deletions) for group, counted in scores},
            "insertions": {group: counted.percent(counted.insertions) for group, counted in scores},
            "words_in_silence": self.words_in_silence,
            "rtfx": round(self.audio_s / self.wall_s, 1) if self.wall_s else 0.0,
            "failed": self.failed,
        }


def measure(bench: Bench, engine_name: str, entries: list[Entry], detect_language: bool) -> Result:
    """Run one engine over all entries. A file that fails has all its words missing."""
    result = Result()
    say(f"{engine_name}: {len(entries)} files")
    with bench.start(engine_name) as engine:
        engine.ready()
        for entry, reply in run_files(engine, entries, detect_language=detect_language):
            result.audio_s += entry.duration
            result.wall_s += reply["wall_s"]
            text = reply.get("text", "")
            if entry.scored:
                if "text" not in reply:
                    result.failed.append(entry.name)
                counted = score(entry.text, text, entry.language)
                result.scores[entry.group] += counted
                result.files.append((entry, counted, text))
            elif words := count_words(text):
                result.words_in_silence += words
                say(f"  {words} words in silence: {entry.name}: {text.strip()[:200]}")
    return result


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--manifest", type=Path, required=True)
    arguments_of.add_argument("--audio-root", type=Path, help="folder of the files; default: the manifest's")
    arguments_of.add_argument("--category", action="append", default=[], help="only this category; may be repeated")
    arguments_of.add_argument("--engine", choices=[OURS, *PEERS], default=OURS, help="measure this one as the first")
    arguments_of.add_argument("--detect-language", action="store_true", help="do not tell engines the language")
    arguments_of.add_argument("--beam-size", type=int, default=0, help="of ours; 0: its own choice")
    arguments_of.add_argument("--batch-size", type=int, default=0, help="of ours; 0: from free memory")
    arguments = arguments_of.parse_args()

    bench = bench_from(arguments)
    languages = ("en", None) if bench.english_only else ()
    entries = [
        entry
        for entry in read_manifest(arguments.manifest, arguments.audio_root, arguments.category)
        if (entry.scored or entry.silent) and (not languages or entry.language in languages)
    ]
    engines = [arguments.engine, *(name for name in arguments.peers if name != arguments.engine)]
    results = {name: measure(bench, name, entries, arguments.detect_language) for name in engines}

    main_result, peers = results[engines[0]], engines[1:]
    margin = {
        group: round(counted.error_rate - min(results[peer].scores[group].error_rate for peer in peers), 2)
        for group, counted in sorted(main_result.scores.items())
        if peers
    }
    header = ["category/language", "files", "units", *(f"{name} (del/ins)" for name in engines)]
    rows: list[list[object]] = []
    for group, counted in sorted(main_result.scores.items()):
        n_files = sum(entry.scored and entry.group == group for entry in entries)
        row: list[object] = [group, n_files, counted.reference]
        for name in engines:
            own = results[name].scores[group]
            row.append(f"{own.error_rate:.2f} ({own.percent(own.deletions):.1f}/{own.percent(own.insertions):.1f})")
        rows.append([*row, margin[group]] if peers else row)
    totals: list[tuple[str, list[object]]] = [
        ("words in silence", [results[name].words_in_silence for name in engines]),
        ("x real time", [results[name].to_dict()["rtfx"] for name in engines]),
        ("failed files", [len(results[name].failed) for name in engines]),
    ]
    rows += [[label, None, None, *values, *([None] if peers else [])] for label, values in totals]
    print(f"Error rates in percent; {bench.files.name}, {bench.threads} threads\n")
    print_table([*header, "margin"] if peers else header, rows)
    print(f"\nMost errors of {engines[0]}:")
    for entry, counted, text in sorted(main_result.files, key=lambda item: -item[1].errors)[:WORST_SHOWN]:
        print(f"  {counted.errors} of {counted.reference}  {entry.name}: {text.strip()[:160]}")
    print_json(
        main_result.to_dict()
        | ({"peers": {name: results[name].to_dict() for name in peers}, "margin": margin} if peers else {})
    )


if __name__ == "__main__":
    main()
