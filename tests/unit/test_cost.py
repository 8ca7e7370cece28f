"""The arithmetic of benchmarks/cost.py, held against sums done by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from cost import HOUR, MONTH_HOURS, Machine, Wake, bill  # noqa: E402


def test_without_waking_and_idling_only_the_work_is_paid() -> None:
    one = bill(Machine("gpu", 0.72, 36.0), Wake(0, 0, 1, HOUR))
    assert one.cost_per_audio_hour == pytest.approx(0.02)
    assert one.busy_share == 1


def test_a_wake_is_shared_by_its_jobs() -> None:
    # Two jobs of 10 minutes at 60 times real time work 20 s; 15 s of waking and 5 s of idling make it 40.
    one = bill(Machine("gpu", 3.6, 60.0), Wake(15, 5, 2, 600))
    assert one.busy_share == pytest.approx(0.5)
    assert one.cost_per_audio_hour == pytest.approx(40 * 0.001 * 3)


def test_by_the_month_is_cheaper_from_where_both_cost_the_same() -> None:
    one = bill(Machine("node", 0.10, 2.0), Wake(0, 0, 1, HOUR), monthly=12.0)
    assert one.break_even_hours * one.cost_per_audio_hour == pytest.approx(12.0)
    # By the hour the whole month, a machine without idle time is never cheaper than what it works.
    busy = bill(Machine("node", 0.10, 2.0), Wake(0, 0, 1, HOUR))
    assert busy.break_even_hours == pytest.approx(MONTH_HOURS * 2.0)
    assert math.isinf(bill(Machine("node", 0.10, 2.0), Wake(0, 0, 1, HOUR), monthly=80.0).break_even_hours)


def test_the_last_line_is_json_and_nonsense_is_refused() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "benchmarks/cost.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    good = run("--machine", "a:b:0.5:25", "--service", "api:0.36", "--hours", "10")
    told = json.loads(good.stdout.splitlines()[-1])
    assert told["machines"]["a:b"]["cost"] == pytest.approx(0.2)
    assert told["services"] == {"api": 3.6}
    for wrong in (["--price", "1", "--rtfx", "0"], ["--price", "-1", "--rtfx", "5"], ["--price", "1"]):
        assert run(*wrong).returncode == 2
