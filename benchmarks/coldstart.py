"""Cold start: from the start of a process to the text of a short clip.

    python benchmarks/coldstart.py --model NAME [--peers faster-whisper,openai-whisper,transformers]

Every run is a new process that imports, loads the model and transcribes the clip; engines take
turns, and the median over the rounds counts. The first round finds the files in no cache that
the machine does not keep anyway: it is left out, and --rounds come after it.

The last line is JSON: ``ours_s``, ``peers`` by name, and ``stages``: where ours spends its time
(``import``: from the start of the process until the engine is asked, then the receipt's stages).
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import OURS, ROOT, Bench, Reply, bench_from, parser, print_json, print_table, say

CLIP = ROOT / "tests/data/speech/LJ001-0001.flac"


def run_once(bench: Bench, name: str, audio: Path, language: str) -> tuple[float, Reply]:
    """Seconds from starting the process to its answer, and the answer."""
    began = time.perf_counter()
    with bench.start(name, cold=True) as engine:
        engine.request(audio, language)
        engine.ready()
        reply = engine.reply()
        seconds = time.perf_counter() - began
    if "text" not in reply:
        raise SystemExit(f"{name} failed: {reply.get('error') or reply.get('crash')}")
    return seconds, reply


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--audio", type=Path, default=CLIP, help="a clip of about ten seconds")
    arguments_of.add_argument("--language", default="en", help="told to all engines")
    arguments_of.add_argument("--rounds", type=int, default=3)
    arguments = arguments_of.parse_args()

    bench = bench_from(arguments)
    engines = [OURS, *arguments.peers]
    seconds: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, list[float]] = defaultdict(list)
    for number in range(arguments.rounds + 1):
        for name in engines:
            took, reply = run_once(bench, name, arguments.audio, arguments.language)
            say(f"round {number}: {name}: {took:.2f} s")
            if number == 0:
                continue
            seconds[name].append(took)
            if name == OURS:
                receipt = reply["receipt"]["stages"]
                stages["import"].append(took - receipt["total"])
                for stage, value in receipt.items():
                    stages[stage].append(value)

    medians = {name: round(median(values), 2) for name, values in seconds.items()}
    ours_stages = {stage: round(median(values), 2) for stage, values in stages.items()}
    print(f"{bench.files.name}, {bench.threads} threads, medians of {arguments.rounds} rounds\n")
    print_table(
        ["engine", "process start to text, s", "ours/peer"],
        [[name, value, medians[OURS] / value] for name, value in medians.items()],
    )
    print()
    print_table(["stage of ours", "s"], list(ours_stages.items()))
    ours_s = medians.pop(OURS)
    print_json({"ours_s": ours_s, "peers": medians, "stages": ours_stages})


if __name__ == "__main__":
    main()
