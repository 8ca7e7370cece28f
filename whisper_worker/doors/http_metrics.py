"""What the service counts, in Prometheus' text format."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable

_HELP = {
    "whisper_http_requests_total": ("counter", "Requests answered, by route, method and status."),
    "whisper_http_request_seconds": ("histogram", "Seconds from a request's first byte to the end of its answer."),
    "whisper_audio_seconds_total": ("counter", "Seconds of audio transcribed."),
    "whisper_transcribe_seconds_total": ("counter", "Seconds that those transcriptions took, waiting included."),
    "whisper_errors_total": ("counter", "Requests and jobs that failed, by error code."),
    "whisper_jobs_total": ("counter", "Jobs that ended, by status."),
    "whisper_requests_in_hand": ("gauge", "Requests with audio being received, waiting or transcribed."),
    "whisper_jobs_queued": ("gauge", "Jobs that wait."),
    "whisper_jobs_running": ("gauge", "Jobs being transcribed."),
    "whisper_model_ready": ("gauge", "1 when the model is loaded and warm."),
    "whisper_uptime_seconds": ("gauge", "Seconds since the start."),
    "whisper_peak_memory_bytes": ("gauge", "Largest resident size of the process so far."),
}
_BOUNDS = (0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters that only rise. Safe across threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[_Labels, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            self._values[name][tuple(labels.items())] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Sort a value into the histogram's cumulative buckets."""
        key = tuple(labels.items())
        with self._lock:
            for bound in (*_BOUNDS, math.inf):
                within = (*key, ("le", "+Inf" if bound == math.inf else f"{bound:g}"))
                self._values[f"{name}_bucket"][within] += value <= bound
            self._values[f"{name}_sum"][key] += value
            self._values[f"{name}_count"][key] += 1

    def text(self, gauges: Iterable[tuple[str, float]]) -> str:
        """All of it, with ``gauges`` as they stand now."""
        lines: list[str] = []
        now = dict(gauges)
        with self._lock:
            for name, (kind, meaning) in _HELP.items():
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
                suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
                if name in now:
                    lines.append(f"{name} {now[name]:.10g}")
                for suffix in suffixes:
                    for labels, value in self._values[name + suffix].items():
                        written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                        lines.append(f"{name}{suffix}{{{written}}} {value:.10g}" if written else f"{name} {value:.10g}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
