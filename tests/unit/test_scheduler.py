"""The scheduler with a recognizer that only counts: sharing, fairness, isolation, memory."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from whisper_worker.engine.recognizer import DecodingOptions, DecodingResult, DecodingRow
from whisper_worker.engine.scheduler import Job, Priority, Scheduler, Work
from whisper_worker.errors import Busy, Cancelled, EngineError, OutOfMemory
from whisper_worker.types import CancelToken

OPTIONS = DecodingOptions()


class Recorder:
    """A recognizer whose result is the window's own name; it notes every batch."""

    max_workers = 1

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.encoded: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.before: Callable[[Sequence[Any]], None] = lambda names: None
        self.early: set[int] = set()

    def default_batch_size(self) -> int:
        return 4

    def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
        self.encoded.append(len(mels))
        return [mel.item() for mel in mels]

    def detect_language(self, states: Sequence[Any]) -> list[dict[str, float]]:
        return [{"en": 1.0} for _ in states]

    def decode(
        self,
        rows: Sequence[DecodingRow],
        options: DecodingOptions,
        cancel: object,
        done: Callable[[int, DecodingResult], None],
    ) -> list[DecodingResult]:
        names = [row.state for row in rows]
        self.gate.wait(5)
        for place, name in enumerate(names):
            if name in self.early:
                done(place, DecodingResult((int(name),), 0.0, 0.0, options.temperature))
        self.before(names)
        self.batches.append(names)
        return [DecodingResult((int(name),), 0.0, 0.0, options.temperature) for name in names]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def scheduler(recorder: Recorder) -> Iterator[Scheduler]:
    made = Scheduler(recorder)  # type: ignore[arg-type]
    yield made
    recorder.gate.set()
    made.close()


def work(name: int, options: DecodingOptions | None = OPTIONS, seconds: float = 20.0) -> Work:
    return Work(key=name, mel=lambda: torch.tensor(float(name)), seconds=seconds, options=options)


def submit(job: Job, *names: int) -> None:
    for name in names:
        job.submit(work(name))


def drain(job: Job, n: int) -> list[int]:
    return [job.next_done().key for _ in range(n)]


def test_every_window_comes_back_with_its_own_result(scheduler: Scheduler) -> None:
    job = scheduler.open()
    submit(job, *range(10))
    done = [job.next_done() for _ in range(10)]
    assert sorted(one.key for one in done) == list(range(10))
    assert all(one.result.tokens == (one.key,) for one in done)


def test_windows_of_several_jobs_share_batches_and_a_short_job_is_not_kept_waiting(
    scheduler: Scheduler, recorder: Recorder
) -> None:
    recorder.gate.clear()
    long, short = scheduler.open(), scheduler.open()
    submit(long, *range(100, 140))
    time.sleep(0.05)  # The first batch is taken by now, and waits at the gate.
    submit(short, 1, 2)
    recorder.gate.set()
    drain(short, 2)
    seen = [name for batch in recorder.batches for name in batch]
    assert seen.index(1.0) < 10
    assert seen.index(2.0) < 10
    assert any(len({name >= 100 for name in batch}) == 2 for batch in recorder.batches)
    drain(long, 40)
    assert all(len(batch) <= 4 for batch in recorder.batches)


@pytest.mark.parametrize("priority", [Priority.LIVE_FINAL, Priority.BULK])
def test_an_idle_job_does_not_let_a_newcomer_overtake_a_long_one(
    scheduler: Scheduler, recorder: Recorder, priority: Priority
) -> None:
    idle, long, newcomer = scheduler.open(priority), scheduler.open(), scheduler.open()
    submit(idle, 1)
    drain(idle, 1)
    submit(long, *range(100, 120))
    drain(long, 20)
    recorder.batches.clear()
    recorder.gate.clear()
    submit(long, *range(100, 112))
    submit(newcomer, *range(200, 212))
    recorder.gate.set()
    drain(long, 12)
    drain(newcomer, 12)
    shares = [sum(name >= 200 for name in batch) for batch in recorder.batches[1:4]]
    assert shares == [2, 2, 2]


def test_what_is_next_up_does_not_wait_for_the_rest_of_its_job(scheduler: Scheduler, recorder: Recorder) -> None:
    recorder.gate.clear()
    job = scheduler.open()
    submit(job, *range(100, 120))
    while not recorder.encoded:
        time.sleep(0.001)  # The first batch waits at the gate.
    job.submit(work(1), next_up=True)
    recorder.gate.set()
    drain(job, 21)
    assert 1.0 in recorder.batches[1]


def test_urgent_work_goes_first(scheduler: Scheduler, recorder: Recorder) -> None:
    recorder.gate.clear()
    bulk, live = scheduler.open(Priority.BULK), scheduler.open(Priority.LIVE_FINAL)
    submit(bulk, *range(100, 120))
    time.sleep(0.05)
    submit(live, 1)
    recorder.gate.set()
    drain(live, 1)
    assert recorder.batches[1][0] == 1.0
    drain(bulk, 20)


def test_only_like_work_shares_a_batch(scheduler: Scheduler, recorder: Recorder) -> None:
    recorder.gate.clear()
    job = scheduler.open()
    submit(job, 0)
    time.sleep(0.05)
    hot = DecodingOptions(temperature=0.4)
    for name in range(1, 5):
        job.submit(work(name, hot if name % 2 else OPTIONS))
    recorder.gate.set()
    drain(job, 5)
    assert {frozenset(batch) for batch in recorder.batches[1:]} == {frozenset({1.0, 3.0}), frozenset({2.0, 4.0})}


def test_a_state_is_encoded_once(scheduler: Scheduler, recorder: Recorder) -> None:
    job = scheduler.open()
    job.submit(work(3, None))
    first = job.next_done()
    assert first.result == {"en": 1.0}
    again = work(3)
    again.state = first.state
    job.submit(again)
    job.next_done()
    assert recorder.encoded == [1]


def test_encoded_windows_do_not_pile_up_behind_those_still_to_encode(scheduler: Scheduler, recorder: Recorder) -> None:
    """What a window needs after its decoding, such as the times of its words, comes soon: it holds memory till then."""
    recorder.gate.clear()
    job = scheduler.open()
    submit(job, *range(10))
    time.sleep(0.05)
    held = [work(name) for name in (20, 21)]
    for one in held:
        one.state = float(one.key)
        job.submit(one)
    recorder.gate.set()
    drain(job, 12)
    assert recorder.batches[1][0] == 20.0


def test_a_failing_window_fails_its_own_job_only(scheduler: Scheduler, recorder: Recorder) -> None:
    def fail_on_seven(names: Sequence[Any]) -> None:
        if 7.0 in names:
            raise ValueError("bad window")

    recorder.before = fail_on_seven
    good, bad = scheduler.open(), scheduler.open()
    recorder.gate.clear()
    submit(good, 0, 1, 2)
    submit(bad, 7)
    recorder.gate.set()
    assert sorted(drain(good, 3)) == [0, 1, 2]
    with pytest.raises(EngineError):
        bad.next_done()


def test_a_window_that_is_done_leaves_before_its_batch_and_once(scheduler: Scheduler, recorder: Recorder) -> None:
    go_on = threading.Event()

    def stand_then_fail(names: Sequence[Any]) -> None:
        assert go_on.wait(10)
        if len(names) > 1:
            raise ValueError("after the first was given away")

    recorder.before, recorder.early = stand_then_fail, {1}
    short, long = scheduler.open(), scheduler.open()
    with scheduler._wake:
        submit(short, 1)
        submit(long, 2)
    assert drain(short, 1) == [1]
    go_on.set()
    assert drain(long, 1) == [2]
    assert recorder.batches == [[2.0]], "only what was not given away is run again"
    assert short._done.empty()


def test_out_of_memory_halves_the_batch_and_is_remembered(scheduler: Scheduler, recorder: Recorder) -> None:
    def at_most_two(names: Sequence[Any]) -> None:
        if len(names) > 2:
            raise OutOfMemory("full")

    recorder.before = at_most_two
    job = scheduler.open()
    recorder.gate.clear()
    submit(job, *range(12))
    recorder.gate.set()
    assert sorted(drain(job, 12)) == list(range(12))
    assert scheduler.batch_size == 2
    submit(job, *range(4))
    drain(job, 4)
    assert all(len(batch) <= 2 for batch in recorder.batches)


def test_a_batch_that_did_not_fit_is_let_go_before_its_halves_run(scheduler: Scheduler, recorder: Recorder) -> None:
    class Caches:
        pass

    held: list[weakref.ref[Caches]] = []
    still_there: list[bool] = []

    def full(names: Sequence[Any]) -> None:
        still_there.append(any(one() is not None for one in held))
        caches = Caches()
        held.append(weakref.ref(caches))
        if len(names) > 1 or 3.0 in names:
            try:
                raise RuntimeError("can't allocate memory")
            except RuntimeError as error:
                raise OutOfMemory("full") from error

    recorder.before = full
    job, bad = scheduler.open(), scheduler.open()
    with scheduler._wake:
        submit(job, 0, 1, 2)
        submit(bad, 3)
    drain(job, 3)
    with pytest.raises(OutOfMemory) as caught:
        bad.next_done()
    assert len(still_there) > 4
    assert not any(still_there)
    assert held[-1]() is None, "nor does the error keep it"
    assert caught.value.__cause__ is None


def test_no_room_for_even_one_window_is_an_error(scheduler: Scheduler, recorder: Recorder) -> None:
    def never(names: Sequence[Any]) -> None:
        raise OutOfMemory("full")

    recorder.before = never
    job = scheduler.open()
    submit(job, 1)
    with pytest.raises(OutOfMemory):
        job.next_done()


def test_cancel_withdraws_what_waits(scheduler: Scheduler, recorder: Recorder) -> None:
    token = CancelToken()
    recorder.gate.clear()
    job, other = scheduler.open(cancel=token), scheduler.open()
    submit(job, *range(20))
    submit(other, 99)
    token.cancel()
    recorder.gate.set()
    with pytest.raises(Cancelled):
        while True:
            job.next_done()
    drain(other, 1)
    assert sum(len(batch) for batch in recorder.batches) <= 6


def test_a_job_that_is_cancelled_and_closed_does_not_come_back(scheduler: Scheduler) -> None:
    token = CancelToken()
    job = scheduler.open(cancel=token)
    submit(job, 1)
    drain(job, 1)
    token.cancel()
    job.close()
    with pytest.raises(Cancelled):
        submit(job, 2)
    assert not scheduler._jobs


def test_close_fails_what_waits_as_retryable(recorder: Recorder) -> None:
    scheduler = Scheduler(recorder)  # type: ignore[arg-type]
    recorder.gate.clear()
    job = scheduler.open()
    submit(job, *range(8))
    time.sleep(0.05)
    threading.Timer(0.05, recorder.gate.set).start()
    scheduler.close()
    errors = 0
    for _ in range(8):
        try:
            job.next_done()
        except Busy as error:
            assert error.retryable
            errors += 1
    assert errors == 4
    with pytest.raises(Busy):
        job.submit(work(1))


def test_many_beams_of_one_window_weigh_like_windows(scheduler: Scheduler, recorder: Recorder) -> None:
    recorder.gate.clear()
    job = scheduler.open()
    submit(job, 0)
    for name in range(1, 5):
        job.submit(work(name, DecodingOptions(beam_size=10)))
    job.submit(work(5, DecodingOptions(beam_size=100)))
    recorder.gate.set()
    drain(job, 6)
    assert sorted(map(len, recorder.batches)) == [1, 1, 2, 2]


def test_a_window_too_wide_for_memory_costs_nobody_else_the_batch_size(
    scheduler: Scheduler, recorder: Recorder
) -> None:
    def full(names: Sequence[Any]) -> None:
        if 9 in names:
            raise OutOfMemory("full")

    recorder.before = full
    job = scheduler.open()
    job.submit(work(9, DecodingOptions(beam_size=100)))
    with pytest.raises(OutOfMemory):
        job.next_done()
    assert scheduler.batch_size == 4


class Pair(Recorder):
    """Serves two workers; a batch that holds 0 stands still until it is let go."""

    max_workers = 2

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.threads: dict[str, set[int]] = {"encode": set(), "decode": set()}
        self.before = self._stand

    def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
        self.threads["encode"].add(torch.get_num_threads())
        return super().encode(mels)

    def _stand(self, names: Sequence[Any]) -> None:
        self.threads["decode"].add(torch.get_num_threads())
        self.begun.release()
        if 0.0 in names:
            assert self.let_go.wait(10)


@pytest.fixture
def pair() -> Iterator[tuple[Pair, Scheduler]]:
    threads = torch.get_num_threads()
    recorder = Pair()
    made = Scheduler(recorder, threads=4)  # type: ignore[arg-type]
    yield recorder, made
    recorder.let_go.set()
    made.close()
    torch.set_num_threads(threads)


def test_a_second_worker_goes_on_while_the_first_is_busy(pair: tuple[Pair, Scheduler]) -> None:
    recorder, scheduler = pair
    held, quick = scheduler.open(), scheduler.open()
    submit(held, 0)
    assert recorder.begun.acquire(timeout=10)
    submit(quick, 1, 2)
    assert sorted(drain(quick, 2)) == [1, 2]
    recorder.let_go.set()
    assert drain(held, 1) == [0]


def test_workers_share_what_waits(pair: tuple[Pair, Scheduler]) -> None:
    recorder, scheduler = pair
    job = scheduler.open()
    recorder.gate.clear()
    with scheduler._wake:
        for name in range(6):
            job.submit(work(name))
    recorder.gate.set()
    for _ in range(2):
        assert recorder.begun.acquire(timeout=10)
    recorder.let_go.set()
    assert sorted(drain(job, 6)) == list(range(6))
    assert max(map(len, recorder.batches)) == 3
    assert recorder.threads["decode"] == {2}


def test_a_worker_alone_encodes_with_all_threads_and_decodes_as_ever(pair: tuple[Pair, Scheduler]) -> None:
    recorder, scheduler = pair
    job = scheduler.open()
    submit(job, 1)
    drain(job, 1)
    assert recorder.threads == {"encode": {4}, "decode": {2}}


def test_one_thread_is_one_worker() -> None:
    scheduler = Scheduler(Pair(), threads=1)  # type: ignore[arg-type]
    assert len(scheduler._workers) == 1
    scheduler.close()
