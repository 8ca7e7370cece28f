"""How far times are from the truth, for segments and for words.

    python benchmarks/times.py --manifest FILE --model NAME [--peers faster-whisper]

Every file whose manifest entry has ``words`` or ``segments`` is transcribed with word times.
Reference and transcript are aligned on normalised words; where a word was recognised rightly
and the reference knows when it was said, its start and end are compared. A segment's start is
compared where its first word was recognised, with the start of the reference segment that
begins with that word, or of the word itself; its end likewise. Reference times are themselves
true to about 50 ms.

The last line is JSON: ``segment_start``, ``segment_end``, ``word_start``, ``word_end`` with
``median``, ``p95`` (absolute errors in seconds) and ``n``; ``violations``: times that run
backwards or lie outside the file; the same under ``peers`` for each peer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    OURS,
    Bench,
    Entry,
    Reply,
    bench_from,
    normalize,
    parser,
    print_json,
    print_table,
    read_manifest,
    run_files,
    say,
)

MEASURES = ("segment_start", "segment_end", "word_start", "word_end")
ROUNDING_SECONDS = 0.02
LENGTH_TOLERANCE = 0.05
"""Seconds by which a decoded length may differ between decoders."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A word and what is known about when it is said: its own times, and its segment's where it stands at an edge."""

    text: str
    start: float | None = None
    end: float | None = None
    opens: float | None = None
    """Start of the segment whose first word this is."""
    closes: float | None = None
    """End of the segment whose last word this is."""


@dataclass(slots=True)
class Errors:
    """Absolute errors of one engine in seconds, by measure."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    violations: int = 0
    failed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        import numpy as np

        figures: dict[str, Any] = {}
        for measure in MEASURES:
            values = self.seconds[measure]
            median, p95 = np.percentile(values, [50, 95]) if values else (None, None)
            figures[measure] = {
                "median": None if median is None else round(float(median), 3),
                "p95": None if p95 is None else round(float(p95), 3),
                "n": len(values),
            }
        return figures | {"violations": self.violations, "failed": self.failed}


def reference_marks(entry: Entry) -> list[Mark]:
    """The words of the reference with all that the manifest says about their times."""
    if not entry.segments:
        return [Mark(word.text, word.start, word.end) for word in entry.words]
    marks: list[Mark] = []
    for segment in entry.segments:
        words = [Mark(word.text, word.start, word.end) for word in segment.words]
        marks += _with_edges(words or [Mark(text) for text in segment.text.split()], segment.start, segment.end)
    return marks


def heard_marks(reply: Reply) -> list[Mark]:
    """The words of a transcript; without word times, just those at the edges of segments have any."""
    marks: list[Mark] = []
    for segment in reply["segments"]:
        words = [Mark(word["word"], word["start"], word["end"]) for word in segment.get("words") or ()]
        marks += _with_edges(
            words or [Mark(text) for text in segment["text"].split()], segment["start"], segment["end"]
        )
    return marks


def _with_edges(words: list[Mark], start: float, end: float) -> list[Mark]:
    last = len(words) - 1
    return [
        Mark(word.text, word.start, word.end, start if number == 0 else None, end if number == last else None)
        for number, word in enumerate(words)
    ]


def matched(reference: Sequence[Mark], heard: Sequence[Mark], language: str | None) -> Iterator[tuple[Mark, Mark]]:
    """Pairs of words that are the same after normalisation and stand at the same place of the text."""
    import jiwer

    reference_tokens, heard_tokens = _tokens(reference, language), _tokens(heard, language)
    if not reference_tokens or not heard_tokens:
        return
    aligned = jiwer.process_words(
        " ".join(token for token, _ in reference_tokens), " ".join(token for token, _ in heard_tokens)
    )
    partner: dict[int, int] = {}
    for chunk in aligned.alignments[0]:
        if chunk.type == "equal":
            for step in range(chunk.ref_end_idx - chunk.ref_start_idx):
                partner[chunk.ref_start_idx + step] = chunk.hyp_start_idx + step
    token_range = _ranges(reference_tokens)
    heard_range = _ranges(heard_tokens)
    for number, (first, last) in token_range.items():
        if first in partner and last in partner:
            other = heard_tokens[partner[first]][1]
            if heard_range[other] == (partner[first], partner[last]):
                yield reference[number], heard[other]


def _tokens(marks: Sequence[Mark], language: str | None) -> list[tuple[str, int]]:
    """Normalised tokens with the number of the word each comes from: one word may give several, or none."""
    return [(token, number) for number, mark in enumerate(marks) for token in normalize(mark.text, language).split()]


def _ranges(tokens: Sequence[tuple[str, int]]) -> dict[int, tuple[int, int]]:
    """First and last token of every word that has any."""
    ranges: dict[int, tuple[int, int]] = {}
    for position, (_, number) in enumerate(tokens):
        ranges[number] = (ranges.get(number, (position, position))[0], position)
    return ranges


def add_errors(errors: Errors, entry: Entry, reply: Reply) -> None:
    """Compare one transcript with its reference."""
    for truth, heard in matched(reference_marks(entry), heard_marks(reply), entry.language):
        opens = truth.start if truth.opens is None else truth.opens
        closes = truth.end if truth.closes is None else truth.closes
        for measure, true, found in (
            ("word_start", truth.start, heard.start),
            ("word_end", truth.end, heard.end),
            ("segment_start", opens, heard.opens),
            ("segment_end", closes, heard.closes),
        ):
            if true is not None and found is not None:
                errors.seconds[measure].append(abs(found - true))
    errors.violations += violations(reply["segments"], entry.duration)
    errors.violations += violations([word for s in reply["segments"] for word in s.get("words") or ()], entry.duration)


def violations(spans: Sequence[dict[str, Any]], duration: float) -> int:
    """Spans that end before they start, start before the one before ended, or lie outside the file."""
    count = 0
    before = 0.0
    for span in spans:
        start, end = span["start"], span["end"]
        count += end < start or start < before - ROUNDING_SECONDS or end > duration + LENGTH_TOLERANCE
        before = end
    return count


def measure(bench: Bench, engine_name: str, entries: list[Entry], *, word_timestamps: bool) -> Errors:
    errors = Errors()
    say(f"{engine_name}: {len(entries)} files")
    with bench.start(engine_name) as engine:
        engine.ready()
        for entry, reply in run_files(engine, entries, word_timestamps=word_timestamps):
            if "text" in reply:
                add_errors(errors, entry, reply)
            else:
                errors.failed.append(entry.name)
    return errors


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--manifest", type=Path, required=True)
    arguments_of.add_argument("--audio-root", type=Path, help="folder of the files; default: the manifest's")
    arguments_of.add_argument("--category", action="append", default=[], help="only this category; may be repeated")
    arguments_of.add_argument("--no-words", action="store_true", help="measure segments as they are without word times")
    arguments_of.add_argument("--batch-size", type=int, default=0, help="of ours; 0: from free memory")
    arguments = arguments_of.parse_args()

    bench = bench_from(arguments)
    entries = [
        entry
        for entry in read_manifest(arguments.manifest, arguments.audio_root, arguments.category)
        if entry.scored and (entry.words or entry.segments) and (entry.language == "en" or not bench.english_only)
    ]
    results = {
        name: measure(bench, name, entries, word_timestamps=not arguments.no_words).to_dict()
        for name in (OURS, *arguments.peers)
    }
    print(f"Absolute errors in seconds: median / p95 (number compared); {bench.files.name}\n")
    print_table(
        ["engine", *MEASURES, "violations"],
        [
            [
                name,
                *(
                    f"{result[measure]['median']} / {result[measure]['p95']} ({result[measure]['n']})"
                    for measure in MEASURES
                ),
                result["violations"],
            ]
            for name, result in results.items()
        ],
    )
    ours = results.pop(OURS)
    print_json(ours | ({"peers": results} if results else {}))


if __name__ == "__main__":
    main()
