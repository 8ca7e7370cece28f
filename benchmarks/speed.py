"""Speed and memory on one long recording, ours and peers on the same weights.

    python benchmarks/speed.py --audio FILE --model NAME --rounds N
        [--peers faster-whisper,openai-whisper,transformers] [--text FILE]

In every round each engine is started anew and transcribes the file once, one engine after the
other, so that a change in the machine's load hits all of them; medians over the rounds are
reported. Loading the model is not part of wall and CPU time (coldstart.py measures it); memory
is the peak of the engine's process. Here faster-whisper stands for its sequential mode with
beam 5, its greedy one, and its batched ones with 8 and 16 windows, all in int8; openai-whisper
and transformers run in float32, greedy, the latter with batches of 8. ``ours-greedy`` and
``ours-beam5`` among the peers are the worker with that many beams asked for.

The last line is JSON: ``audio_s``, ``ours`` and each of ``peers`` with ``wall_s``, ``cpu_s``,
``peak_mb``, ``load_s`` and, if --text is given, ``wer``; ``ratio_wall`` and ``ratio_cpu``: ours
divided by each peer's.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from pathlib import Path
from statistics import median

from common import OURS, PEERS, Reply, bench_from, parser, print_json, print_table, say, score
from join import audio_seconds

FASTER_WHISPER_MODES = [
    name for name, spec in PEERS.items() if spec["engine"] == "faster-whisper" and "compute_type" not in spec
]
MEASURES = ("wall_s", "cpu_s", "peak_mb", "load_s")


def main() -> None:
    arguments_of = parser(__doc__)
    arguments_of.add_argument("--audio", type=Path, required=True)
    arguments_of.add_argument("--rounds", type=int, default=3)
    arguments_of.add_argument("--text", type=Path, help="reference text, for word errors")
    arguments_of.add_argument("--language", default="en", help="told to all engines")
    arguments_of.add_argument("--beam-size", type=int, default=0, help="of ours; 0: its own choice")
    arguments_of.add_argument("--batch-size", type=int, default=0, help="of ours; 0: from free memory")
    arguments = arguments_of.parse_args()

    bench = bench_from(arguments)
    audio_s = audio_seconds(arguments.audio)
    peers = [
        name for peer in arguments.peers for name in (FASTER_WHISPER_MODES if peer == "faster-whisper" else [peer])
    ]
    replies: dict[str, list[Reply]] = defaultdict(list)
    for number in range(arguments.rounds):
        for name in (OURS, *dict.fromkeys(peers)):
            with bench.start(name) as engine:
                load_s = engine.ready()
                reply = engine.transcribe(arguments.audio, arguments.language)
            if "text" not in reply:
                raise SystemExit(f"{name} failed: {reply.get('error') or reply.get('crash')}")
            replies[name].append(reply | {"load_s": load_s})
            say(f"round {number + 1}: {name}: {reply['wall_s']:.2f} s wall, {reply['cpu_s']:.2f} s CPU")

    results: dict[str, dict[str, float]] = {}
    reference = arguments.text.read_text(encoding="utf-8") if arguments.text else None
    for name, runs in replies.items():
        results[name] = {key: round(median(run[key] for run in runs), 2) for key in MEASURES}
        if reference is not None:
            rates = [score(reference, run["text"], arguments.language).error_rate for run in runs]
            results[name]["wer"] = median(rates)

    ours = results.pop(OURS)
    print(
        f"{audio_s:.0f} s of audio, {bench.files.name}, {bench.threads} threads, "
        f"medians of {arguments.rounds} rounds, {platform.machine()}\n"
    )
    print_table(
        ["engine", "wall s", "x real time", "CPU s", "peak MB", "load s", "WER %", "ours/peer wall", "ours/peer CPU"],
        [
            [
                name,
                measured["wall_s"],
                audio_s / measured["wall_s"],
                measured["cpu_s"],
                measured["peak_mb"],
                measured["load_s"],
                measured.get("wer"),
                ours["wall_s"] / measured["wall_s"],
                ours["cpu_s"] / measured["cpu_s"],
            ]
            for name, measured in [(OURS, ours), *results.items()]
        ],
    )
    print_json(
        {
            "audio_s": round(audio_s, 2),
            "ours": ours,
            "peers": results,
            "ratio_wall": {name: round(ours["wall_s"] / peer["wall_s"], 3) for name, peer in results.items()},
            "ratio_cpu": {name: round(ours["cpu_s"] / peer["cpu_s"], 3) for name, peer in results.items()},
        }
    )


if __name__ == "__main__":
    main()
