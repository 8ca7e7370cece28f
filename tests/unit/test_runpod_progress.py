"""The order and the end of progress updates."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from whisper_worker.doors import runpod_progress
from whisper_worker.doors.runpod_progress import ProgressReport
from whisper_worker.types import Progress


class Posts:
    """An address that takes each update only when it is let."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.arrived: list[dict[str, Any]] = []
        self.let = asyncio.Semaphore(0)

    async def __call__(self, update: dict[str, Any]) -> None:
        self.begun.append(update)
        await self.let.acquire()
        self.arrived.append(update)


def at(done: float, total: float = 10.0) -> Progress:
    return Progress("recognize", done, total)


async def test_updates_wait_for_each_other_and_only_the_latest_is_sent() -> None:
    posts = Posts()
    report = ProgressReport(posts, interval=0.0)
    report.update(None, 0, 1, at(1))
    await asyncio.sleep(0.01)
    for done in range(2, 8):
        report.update(None, 0, 1, at(done))
    await asyncio.sleep(0.01)
    assert [update["percent"] for update in posts.begun] == [10.0]
    posts.let.release()
    await asyncio.sleep(0.01)
    assert [update["percent"] for update in posts.begun] == [10.0, 70.0]
    posts.let.release()
    await report.close()
    assert posts.arrived == posts.begun


async def test_closing_waits_for_the_update_under_way_and_lets_none_follow() -> None:
    posts = Posts()
    report = ProgressReport(posts, interval=0.0)
    report.update(None, 0, 1, at(1))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(report.close())
    report.update(None, 0, 1, at(2))
    await asyncio.sleep(0.01)
    assert not closing.done()
    posts.let.release()
    await closing
    report.update(None, 0, 1, at(3))
    await asyncio.sleep(0.01)
    assert len(posts.begun) == len(posts.arrived) == 1


async def test_an_update_that_never_arrives_does_not_hold_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_progress, "_LAST_UPDATE_SECONDS", 0.05)
    posts = Posts()
    report = ProgressReport(posts, interval=0.0)
    report.update(None, 0, 1, at(1))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(report.close(), 2)
    posts.let.release()
    await asyncio.sleep(0.01)
    assert posts.arrived == []


async def test_updates_keep_their_distance_but_closing_does_not_wait_for_it() -> None:
    posts = Posts()
    for _ in range(9):
        posts.let.release()
    report = ProgressReport(posts, interval=60.0)
    report.update(None, 0, 1, at(1))
    await asyncio.sleep(0.01)
    report.update(None, 0, 1, at(2))
    await asyncio.sleep(0.02)
    assert len(posts.arrived) == 1
    await asyncio.wait_for(report.close(), 1)
    assert len(posts.arrived) == 1


async def test_percent_counts_inputs_and_passes_and_never_shrinks() -> None:
    posts = Posts()
    for _ in range(9):
        posts.let.release()
    report = ProgressReport(posts, interval=0.0)
    report.expect(2)
    steps = [(0, 0, at(5)), (0, 1, at(10)), (1, 0, at(10)), (1, 0, at(10, 20)), (1, 1, at(0, 0))]
    for index, step, progress in steps:
        report.update(index, step, 2, progress)
        await asyncio.sleep(0.01)
    await report.close()
    assert [update["percent"] for update in posts.arrived] == [12.5, 50.0, 75.0, 75.0, 75.0]
    assert posts.arrived[-1]["index"] == 1


async def test_updates_come_from_any_thread_and_after_the_loop_is_gone() -> None:
    posts = Posts()
    posts.let.release()
    report = ProgressReport(posts, interval=0.0)
    thread = threading.Thread(target=report.update, args=(None, 0, 1, at(10)))
    thread.start()
    await asyncio.to_thread(thread.join)
    await asyncio.sleep(0.01)
    await report.close()
    assert [update["percent"] for update in posts.arrived] == [100.0]


def test_a_cancelled_jobs_thread_may_report_to_a_loop_that_has_ended() -> None:
    async def make() -> ProgressReport:
        return ProgressReport(Posts(), interval=0.0)

    report = asyncio.run(make())
    report.update(None, 0, 1, at(1))


async def test_nobody_listens() -> None:
    report = ProgressReport(None, interval=0.0)
    report.update(None, 0, 1, at(1))
    await report.close()
    report.abandon()
