"""The second thread that encodes: what it does early, what it leaves alone, and whose its errors are."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from whisper_worker.engine.encode_ahead import EncodeAhead
from whisper_worker.engine.recognizer import DecodingOptions, DecodingResult, DecodingRow
from whisper_worker.engine.scheduler import Scheduler, Work
from whisper_worker.errors import EngineError

OPTIONS = DecodingOptions()


class Encoder:
    """A recognizer whose states are the windows' own numbers; it notes which thread encoded each."""

    encodes_aside = True

    def __init__(self) -> None:
        self.by: dict[int, str] = {}
        self.times: dict[int, int] = {}
        self.began = threading.Semaphore(0)
        self.gates: dict[int, threading.Event] = {}
        self.failing: set[int] = set()

    def default_batch_size(self) -> int:
        return 2

    def encode(self, mels: Sequence[torch.Tensor]) -> list[Any]:
        numbers = [int(mel.item()) for mel in mels]
        for number in numbers:
            self.by[number] = threading.current_thread().name
            self.times[number] = self.times.get(number, 0) + 1
            self.began.release()
            if number in self.gates:
                assert self.gates[number].wait(10)
            if number in self.failing:
                raise EngineError("no")
        return numbers

    def decode(self, rows: Sequence[DecodingRow], options: DecodingOptions, cancel: object) -> list[DecodingResult]:
        if 100 in self.gates:
            assert self.gates[100].wait(10)
        return [DecodingResult((row.state,), 0.0, 0.0, 0.0) for row in rows]


def work(number: int) -> Work:
    return Work(key=number, mel=lambda: torch.tensor(float(number)), seconds=20.0, options=OPTIONS)


@pytest.fixture(autouse=True)
def the_same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


@pytest.fixture
def ahead(encoder: Encoder) -> Iterator[EncodeAhead]:
    made = EncodeAhead(encoder, threads=2)  # type: ignore[arg-type]
    yield made
    for gate in encoder.gates.values():
        gate.set()
    made.close()


def test_what_was_requested_is_encoded_by_the_other_thread_once(encoder: Encoder, ahead: EncodeAhead) -> None:
    works = [work(number) for number in range(3)]
    ahead.request(works)
    for _ in works:
        assert encoder.began.acquire(timeout=10)
    ahead.encode(works)
    assert [one.state for one in works] == [0, 1, 2]
    assert set(encoder.by.values()) == {"encode-ahead"}
    assert set(encoder.times.values()) == {1}


def test_several_windows_are_shared_between_both_threads(encoder: Encoder, ahead: EncodeAhead) -> None:
    encoder.gates[0] = threading.Event()
    works = [work(number) for number in range(2)]
    ahead.request(works[:1])
    assert encoder.began.acquire(timeout=10)
    # Window 0 is held up in the other thread; the caller meanwhile does the rest and then waits for it.
    threading.Timer(0.05, encoder.gates[0].set).start()
    ahead.encode(works)
    assert encoder.by == {0: "encode-ahead", 1: threading.current_thread().name}
    assert [one.state for one in works] == [0, 1]


def test_a_new_request_replaces_the_old(encoder: Encoder, ahead: EncodeAhead) -> None:
    encoder.gates[0] = threading.Event()
    works = [work(number) for number in range(4)]
    ahead.request(works[:3])
    assert encoder.began.acquire(timeout=10)
    ahead.request(works[3:])
    encoder.gates[0].set()
    assert encoder.began.acquire(timeout=10)
    ahead.encode(works[3:])
    assert encoder.by.keys() == {0, 3}


def test_an_error_is_the_callers_who_needs_the_window(encoder: Encoder, ahead: EncodeAhead) -> None:
    encoder.failing = {0}
    works = [work(number) for number in range(2)]
    ahead.request(works)
    for _ in works:
        assert encoder.began.acquire(timeout=10)
    ahead.encode(works[1:])
    assert works[1].state == 1
    with pytest.raises(EngineError):
        ahead.encode(works[:1])


def test_one_thread_of_torch_encodes_nothing_aside(encoder: Encoder) -> None:
    ahead = EncodeAhead(encoder, threads=1)  # type: ignore[arg-type]
    works = [work(number) for number in range(2)]
    ahead.request(works)
    ahead.encode(works)
    ahead.close()
    assert set(encoder.by.values()) == {threading.current_thread().name}


def test_the_threads_of_torch_are_shared_only_while_both_work(encoder: Encoder, ahead: EncodeAhead) -> None:
    ahead.encode([work(0)])
    assert torch.get_num_threads() == 2
    encoder.gates[1] = threading.Event()
    ahead.request([work(1)])
    assert torch.get_num_threads() == 1
    encoder.gates[1].set()


def test_the_scheduler_encodes_the_next_batch_while_it_decodes(encoder: Encoder) -> None:
    encoder.gates = {0: threading.Event(), 100: threading.Event()}
    scheduler = Scheduler(encoder, threads=2)  # type: ignore[arg-type]
    job = scheduler.open()
    try:
        for number in range(8):
            job.submit(work(number))
        encoder.gates[0].set()
        while 2 not in encoder.by:
            assert encoder.began.acquire(timeout=10)
        # The scheduler's thread is held up in decoding the first batch.
        assert encoder.by[2] == "encode-ahead"
        encoder.gates[100].set()
        done = [job.next_done() for _ in range(8)]
    finally:
        for gate in encoder.gates.values():
            gate.set()
        scheduler.close()
    assert sorted(one.result.tokens[0] for one in done) == list(range(8))
    assert set(encoder.times.values()) == {1}
