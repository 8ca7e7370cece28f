"""Join a manifest's recordings into a long one, to measure speed on.

    python benchmarks/join.py --manifest FILE --category librispeech --minutes 13 --out DIR

Writes joined.wav (16 kHz, mono), joined.txt (the text) and manifest.jsonl (one entry with the
place of every recording) into DIR. Recordings are put one after another with a pause
between them, in the manifest's order, and once more from the first where they do not suffice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import wave
from functools import cache
from pathlib import Path

from common import print_json, read_manifest

SAMPLE_RATE = 16_000


@cache
def ffmpeg() -> str:
    """The system's ffmpeg, or the one that a package carries."""
    found = shutil.which("ffmpeg")
    if found is None:
        import imageio_ffmpeg

        found = str(imageio_ffmpeg.get_ffmpeg_exe())
    return found


def decode(path: Path) -> bytes:
    """16-bit samples at 16 kHz, mono."""
    command = [ffmpeg(), "-nostdin", "-v", "error", "-i", f"file:{path}", "-map", "0:a:0"]
    command += ["-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-"]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def audio_seconds(path: Path) -> float:
    """Decoded length of a recording."""
    return len(decode(path)) / 2 / SAMPLE_RATE


def main() -> None:
    arguments_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments_of.add_argument("--manifest", type=Path, required=True)
    arguments_of.add_argument("--audio-root", type=Path, help="folder of the files; default: the manifest's")
    arguments_of.add_argument("--category", action="append", default=[], help="only this category; may be repeated")
    arguments_of.add_argument("--language", default="en")
    arguments_of.add_argument("--minutes", type=float, default=13.0, help="stop at the first recording beyond")
    arguments_of.add_argument("--gap", type=float, default=0.6, help="seconds of silence after each recording")
    arguments_of.add_argument("--out", type=Path, required=True)
    arguments = arguments_of.parse_args()

    entries = [
        entry
        for entry in read_manifest(arguments.manifest, arguments.audio_root, arguments.category)
        if entry.scored and entry.language == arguments.language
    ]
    if not entries:
        raise SystemExit("The manifest has no transcribed recording of this language in these categories.")
    gap = bytes(2 * round(arguments.gap * SAMPLE_RATE))
    samples = bytearray()
    segments = []
    for entry in itertools.cycle(entries):
        start = len(samples) / 2 / SAMPLE_RATE
        samples += decode(entry.path)
        end = len(samples) / 2 / SAMPLE_RATE
        segments.append({"start": round(start, 3), "end": round(end, 3), "text": entry.text})
        samples += gap
        if end >= arguments.minutes * 60:
            break

    arguments.out.mkdir(parents=True, exist_ok=True)
    with wave.open(str(arguments.out / "joined.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples)
    text = " ".join(str(segment["text"]) for segment in segments)
    (arguments.out / "joined.txt").write_text(text + "\n", encoding="utf-8")
    duration = round(len(samples) / 2 / SAMPLE_RATE, 3)
    line = {"file": "joined.wav", "text": text, "language": arguments.language, "duration_s": duration}
    line |= {"category": "joined", "clips": segments}
    (arguments.out / "manifest.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    print_json({"audio_s": duration, "recordings": len(segments), "different": min(len(entries), len(segments))})


if __name__ == "__main__":
    main()
