"""Write a manifest's recordings in several versions, to measure word errors with less chance in them.

    python benchmarks/vary.py --manifest FILE --out DIR [--category C ...]
    python benchmarks/wer.py --manifest DIR/manifest.jsonl --model NAME --peers faster-whisper

A search among near ties falls one way or the other by the last bits of the sound: of a few hundred
words, three or four. Each recording with a reference is therefore written as it is and five times
with up to half a second of silence before it, at another level, two of them with noise that
nobody would hear. Every engine gets the same versions; their words count together.
"""

from __future__ import annotations

import argparse
import json
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import print_json, read_manifest
from join import SAMPLE_RATE, decode


@dataclass(frozen=True, slots=True)
class Version:
    """What is done to a recording."""

    lead_s: float = 0.0
    gain_db: float = 0.0
    noise_dbfs: float | None = None

    def of(self, samples: npt.NDArray[np.int16], seed: int) -> npt.NDArray[np.int16]:
        """The recording in this version; ``seed`` is the noise's. Peaks are clipped."""
        sound = np.concatenate([np.zeros(round(self.lead_s * SAMPLE_RATE), np.float32), samples / np.float32(32768)])
        sound *= 10 ** (self.gain_db / 20)
        if self.noise_dbfs is not None:
            noise = np.random.default_rng(seed).standard_normal(len(sound), np.float32)
            sound += noise * np.float32(10 ** (self.noise_dbfs / 20))
        varied: npt.NDArray[np.int16] = np.clip(np.rint(sound * 32768), -32768, 32767).astype(np.int16)
        return varied


VERSIONS = (
    Version(),
    Version(lead_s=0.113, gain_db=-4),
    Version(lead_s=0.271, gain_db=2),
    Version(lead_s=0.437, gain_db=-9),
    Version(lead_s=0.059, gain_db=-1, noise_dbfs=-62),
    Version(lead_s=0.193, gain_db=-6, noise_dbfs=-66),
)


def main() -> None:
    arguments_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments_of.add_argument("--manifest", type=Path, required=True)
    arguments_of.add_argument("--audio-root", type=Path, help="folder of the files; default: the manifest's")
    arguments_of.add_argument("--category", action="append", default=[], help="only this category; may be repeated")
    arguments_of.add_argument("--out", type=Path, required=True)
    arguments = arguments_of.parse_args()

    entries = [e for e in read_manifest(arguments.manifest, arguments.audio_root, arguments.category) if e.scored]
    if not entries:
        raise SystemExit("The manifest has no transcribed recording in these categories.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, entry in enumerate(entries):
        recording = np.frombuffer(decode(entry.path), np.int16)
        for place, version in enumerate(VERSIONS):
            samples = version.of(recording, seed=len(VERSIONS) * number + place)
            name = f"{number:04}-{place}.wav"
            with wave.open(str(arguments.out / name), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(SAMPLE_RATE)
                file.writeframes(samples.tobytes())
            line: dict[str, Any] = {"file": name, "text": entry.text, "language": entry.language}
            line |= {"category": entry.category, "duration_s": round(len(samples) / SAMPLE_RATE, 3), "note": entry.name}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (arguments.out / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    print_json({"recordings": len(entries), "files": len(lines)})


if __name__ == "__main__":
    main()
