"""Several jobs of mixed length at once against the same audio as one job.

    python benchmarks/jobs.py --audio FILE --model NAME [--jobs 8] [--rounds 3]

The recording is cut into as many parts as there are jobs, each a good deal longer than the one
before. In every round it is transcribed as one job, and then by all parts handed in together, the
longest first; everything runs in one process with one model, as behind every door. Medians over
the rounds are reported.

The last line is JSON: ``audio_s``, ``one_s``, ``jobs_s`` and their ratio (wall and CPU), ``lengths_s``
of the jobs and ``done_s`` after which each was done, in the same order, ``shortest_first``: whether
the shortest was done before all others in every round.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import parser, print_json, print_table, say
from numpy.typing import NDArray

from whisper_worker.audio.decode import decode
from whisper_worker.audio.vad import VoiceDetector
from whisper_worker.cache.layout import find_model
from whisper_worker.engine.native import NativeRecognizer
from whisper_worker.engine.pipeline import Pipeline
from whisper_worker.engine.scheduler import Scheduler
from whisper_worker.engine.tokenizer import Tokenizer
from whisper_worker.settings import Settings
from whisper_worker.types import SAMPLE_RATE, TranscribeOptions

GROWTH = 1.5
"""Each job's length over that of the next shorter one."""


def main() -> None:
    arguments_of = parser(__doc__, peers=False)
    arguments_of.add_argument("--audio", type=Path, required=True)
    arguments_of.add_argument("--jobs", type=int, default=8)
    arguments_of.add_argument("--rounds", type=int, default=3)
    arguments_of.add_argument("--language", default="en")
    arguments = arguments_of.parse_args()

    settings = Settings.from_env()
    waveform = decode(arguments.audio, settings).waveform
    pipeline = load(arguments, settings)
    options = TranscribeOptions(language=arguments.language)
    parts = cut(waveform, arguments.jobs)
    pipeline.transcribe(parts[0], options)

    one: list[tuple[float, float]] = []
    many: list[tuple[float, float]] = []
    done: list[list[float]] = []
    for number in range(arguments.rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        pipeline.transcribe(waveform, options)
        one.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = time.perf_counter(), time.process_time()
        done.append(together(pipeline, parts, options))
        many.append((time.perf_counter() - wall, time.process_time() - cpu))
        say(f"round {number + 1}: one job {one[-1][0]:.2f} s, {len(parts)} jobs {many[-1][0]:.2f} s")

    one_s, one_cpu = (median(values) for values in zip(*one, strict=True))
    jobs_s, jobs_cpu = (median(values) for values in zip(*many, strict=True))
    lengths = [len(part) / SAMPLE_RATE for part in parts]
    after = [median(times) for times in zip(*done, strict=True)]
    print_table(
        ["job", "audio s", "done after s"], [[n, *pair] for n, pair in enumerate(zip(lengths, after, strict=True), 1)]
    )
    print_json(
        {
            "audio_s": round(len(waveform) / SAMPLE_RATE, 2),
            "one_s": round(one_s, 2),
            "jobs_s": round(jobs_s, 2),
            "ratio_wall": round(jobs_s / one_s, 3),
            "ratio_cpu": round(jobs_cpu / one_cpu, 3),
            "lengths_s": [round(length, 1) for length in lengths],
            "done_s": [round(value, 2) for value in after],
            "shortest_first": all(times[0] == min(times) for times in done),
        }
    )


def load(arguments: argparse.Namespace, settings: Settings) -> Pipeline:
    files = find_model(settings)
    tokenizer = Tokenizer.load(files.processor_dir / "tokenizer.json", files.model_dir / "generation_config.json")
    recognizer = NativeRecognizer.load(
        files.model_dir,
        tokenizer,
        files.name,
        files.revision,
        settings.compute_type,
        settings.device,
        arguments.threads,
    )
    scheduler = Scheduler(recognizer, settings.batch_size, torch.get_num_threads())
    return Pipeline(recognizer.info, tokenizer, scheduler, VoiceDetector())


def cut(waveform: NDArray[np.int16], n: int) -> list[NDArray[np.int16]]:
    """``n`` parts of the recording, shortest first."""
    shares = np.cumsum(GROWTH ** np.arange(n))
    bounds = [0, *(shares / shares[-1] * len(waveform)).astype(int)]
    return [waveform[first:last] for first, last in itertools.pairwise(bounds)]


def together(pipeline: Pipeline, parts: list[NDArray[np.int16]], options: TranscribeOptions) -> list[float]:
    """Seconds after which each part was done, all handed in at once, the longest first."""
    done = [0.0] * len(parts)
    begun = time.perf_counter()

    def run(number: int) -> None:
        pipeline.transcribe(parts[number], options)
        done[number] = time.perf_counter() - begun

    threads = [threading.Thread(target=run, args=(number,)) for number in reversed(range(len(parts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


if __name__ == "__main__":
    main()
