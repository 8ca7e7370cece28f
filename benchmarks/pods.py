"""What a small machine makes of one long recording: time, memory and cost, by model and number of cores.

    python benchmarks/pods.py --audio FILE --models NAME,NAME --cores 1,2 [--price 0.04] [--hours 100] [--text FILE]

Every run is a new process that may use so many cores and no more, and is told so
(WHISPER_THREADS); the time runs from its start, with the model yet to be loaded, to the text. Runs take
turns, medians over the rounds count. ``--price`` is that of one core for an hour, with the memory that
comes with it; the cost is that of the core hours that ``--hours`` of audio take, since work that is
queued keeps a machine busy, and one that idles should be given back.

The last line is JSON: ``audio_s`` and ``runs``, each with ``model``, ``cores``, ``wall_s``, ``rtfx``, ``cpu_s``,
``peak_mb``, ``core_hours``, ``cost`` and, with --text, ``wer``.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

from coldstart import run_once
from common import OURS, Bench, Reply, bench_from, parser, print_json, print_table, say, score
from join import audio_seconds


def main() -> None:
    arguments_of = parser(__doc__, peers=False)
    arguments_of.add_argument("--audio", type=Path, required=True)
    arguments_of.add_argument("--text", type=Path, help="reference text, for word errors")
    arguments_of.add_argument("--language", default="en")
    arguments_of.add_argument("--models", default="", help="comma-separated; default: the cached model")
    arguments_of.add_argument("--cores", default="1,2", help="comma-separated numbers of cores")
    arguments_of.add_argument("--rounds", type=int, default=1)
    arguments_of.add_argument("--price", type=float, default=0.04, help="of a core and its memory for an hour")
    arguments_of.add_argument("--hours", type=float, default=100.0, help="of audio a month")
    arguments = arguments_of.parse_args()

    allowed = sorted(os.sched_getaffinity(0))
    cores = [int(number) for number in arguments.cores.split(",")]
    if max(cores) > len(allowed):
        raise SystemExit(f"This machine lends {len(allowed)} cores, not {max(cores)}.")
    benches = [(name, _bench(arguments, name)) for name in arguments.models.split(",")]
    audio_s = audio_seconds(arguments.audio)
    replies: dict[tuple[str, int], list[Reply]] = defaultdict(list)
    for number in range(arguments.rounds):
        for name, bench in benches:
            for n_cores in cores:
                os.sched_setaffinity(0, allowed[:n_cores])
                try:
                    took, reply = run_once(replace(bench, threads=n_cores), OURS, arguments.audio, arguments.language)
                finally:
                    os.sched_setaffinity(0, allowed)
                label = name or bench.files.name
                say(f"round {number + 1}: {label}, {n_cores} cores: {took:.1f} s")
                replies[label, n_cores].append(reply | {"wall_s": took})

    reference = arguments.text.read_text(encoding="utf-8") if arguments.text else None
    runs = []
    for (name, n_cores), done in replies.items():
        wall = median(reply["wall_s"] for reply in done)
        core_hours = n_cores * arguments.hours * wall / audio_s
        run = {
            "model": Path(name).name,
            "cores": n_cores,
            "wall_s": round(wall, 1),
            "rtfx": round(audio_s / wall, 1),
            "cpu_s": round(median(reply["cpu_s"] for reply in done), 1),
            "peak_mb": round(max(reply["peak_mb"] for reply in done)),
            "core_hours": round(core_hours, 2),
            "cost": round(core_hours * arguments.price, 3),
        }
        if reference is not None:
            run["wer"] = median(score(reference, reply["text"], arguments.language).error_rate for reply in done)
        runs.append(run)
    print(
        f"{audio_s:.0f} s of audio; core hours and cost of {arguments.hours:g} h at {arguments.price:g} a core hour\n"
    )
    print_table(list(runs[0]), [list(run.values()) for run in runs])
    print_json({"audio_s": round(audio_s, 2), "runs": runs})


def _bench(arguments: argparse.Namespace, name: str) -> Bench:
    return bench_from(argparse.Namespace(**{**vars(arguments), "model": name or arguments.model}))


if __name__ == "__main__":
    main()
