"""Results within the platform's limits, by way of the bucket, or refused with their size."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.unit.runpod_fakes import FakeService, transcript
from whisper_worker.doors import runpod_delivery
from whisper_worker.doors.runpod import Platform, RunPodDoor
from whisper_worker.doors.runpod_delivery import RUN_BYTES, RUNSYNC_BYTES, Whole, encode
from whisper_worker.errors import TooLarge
from whisper_worker.settings import Settings

URL = "https://example.com/a.mp3"


class Bucket:
    def __init__(self, error: Exception | None = None) -> None:
        self.stored: dict[str, bytes] = {}
        self.error = error

    def __call__(self, name: str, data: bytes) -> str:
        if self.error:
            raise self.error
        self.stored[name] = data
        return f"https://bucket.example.com/{name}"


def sized(n_bytes: int) -> dict[str, Any]:
    """A result that is ``n_bytes`` long as JSON; its letters take two bytes each."""
    empty = len(encode({"text": "", "language": "en"})[0])
    half, odd = divmod(n_bytes - empty, 2)
    return {"text": "é" * half + "e" * odd, "language": "en"}


@pytest.mark.parametrize(
    ("job_id", "setting", "limit"),
    [("abc-1", 0, RUN_BYTES), ("sync-abc", 0, RUNSYNC_BYTES), ("abc-1", 5000, 5000), ("sync-abc", 5000, 5000)],
)
def test_the_limit_is_on_the_encoded_bytes(job_id: str, setting: int, limit: int) -> None:
    settings = Settings(max_result_bytes=setting)
    fits = sized(limit - 100)
    assert Whole(job_id, settings, None).finish(fits) == [fits]
    with pytest.raises(TooLarge):
        Whole(job_id, settings, None).finish(sized(limit - 99))


def test_without_a_bucket_the_error_says_the_size_and_what_to_do() -> None:
    with pytest.raises(TooLarge) as caught:
        Whole("abc", Settings(), None).finish(sized(12_340_000))
    assert not caught.value.retryable
    for part in ("12.3 MB", "10 MB", "return_chunks=false", "BUCKET_ENDPOINT_URL"):
        assert part in caught.value.message


def test_the_bucket_takes_what_is_too_large() -> None:
    bucket = Bucket()
    result = sized(RUN_BYTES + 1) | {"receipt": {"rtfx": 3.0}, "warnings": ["w"], "segments": [{"id": 0}]}
    (stand_in,) = Whole("../a b-1", Settings(), bucket).finish(result)
    ((name, stored),) = bucket.stored.items()
    assert json.loads(stored) == result
    assert name == ".._a_b-1.json"
    assert stand_in == {
        "result_url": f"https://bucket.example.com/{name}",
        "result_bytes": len(stored),
        "language": "en",
        "warnings": ["w"],
        "receipt": {"rtfx": 3.0},
    }


def test_a_bucket_that_fails_gives_a_retryable_error_without_its_address() -> None:
    bucket = Bucket(OSError("https://bucket.internal/secret"))
    with pytest.raises(TooLarge) as caught:
        Whole("abc", Settings(), bucket).finish(sized(RUN_BYTES))
    assert caught.value.retryable
    assert "internal" not in caught.value.message


def test_what_would_break_the_sending_is_mended() -> None:
    encoded, value = encode({"text": "a\ud800b", "score": float("nan"), "list": [float("inf"), 1.5]})
    assert value == {"text": "a?b", "score": None, "list": [None, 1.5]}
    assert json.loads(encoded) == value
    untouched = {"text": "é"}
    assert encode(untouched) == ('{"text": "é"}'.encode(), untouched)


async def stream_of(service: FakeService, payload: dict[str, Any], bucket: Bucket | None, limit: int = 0) -> list[Any]:
    door = RunPodDoor(service, Settings(max_result_bytes=limit), Platform(upload=bucket))
    try:
        return [piece async for piece in door.stream({"id": "abc", "input": payload})]
    finally:
        door.close()


def long_service(n_segments: int) -> FakeService:
    long = transcript(*(f" segment number {n}" for n in range(n_segments)))
    return FakeService(lambda job, cancel: long)


def n_bytes(pieces: list[Any]) -> int:
    return len(json.dumps({"output": pieces}, ensure_ascii=False).encode())


async def test_a_stream_that_fits_is_streamed_to_its_end() -> None:
    pieces = await stream_of(long_service(100), {"audio_url": URL}, None)
    assert sum(len(piece.get("segments", [])) for piece in pieces) == 100
    assert pieces[-1]["text"].endswith("number 99")


@pytest.mark.parametrize("n_segments", [100, 300], ids=["the rest would fit", "nor would the rest"])
async def test_the_sum_of_a_stream_stays_within_the_limit_and_the_bucket_has_it_all(n_segments: int) -> None:
    bucket = Bucket()
    limit = 20_000
    pieces = await stream_of(long_service(n_segments), {"audio_url": URL}, bucket, limit)
    assert n_bytes(pieces) <= limit
    assert 0 < sum(len(piece.get("segments", [])) for piece in pieces) < n_segments
    assert pieces[-1]["result_url"].startswith("https://bucket")
    (stored,) = bucket.stored.values()
    assert len(json.loads(stored)["segments"]) == n_segments


async def test_a_stream_over_the_limit_without_a_bucket_is_an_error() -> None:
    pieces = await stream_of(long_service(300), {"audio_url": URL}, None, 20_000)
    assert json.loads(pieces[-1]["error"])["code"] == "TOO_LARGE"


async def test_pieces_of_a_stream_are_small_and_what_is_long_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_delivery, "PIECE_BYTES", 4_000)
    payload = {"audio_url": URL, "formats": "txt,tsv", "transcription": "formatted_text"}
    pieces = await stream_of(long_service(60), payload, None)
    assert all(len(json.dumps(piece, ensure_ascii=False).encode()) <= 4_000 for piece in pieces)
    merged: dict[str, Any] = {"segments": [], "formats": {}}
    for piece in pieces:
        merged["segments"] += piece.pop("segments", [])
        merged["formats"] |= piece.pop("formats", {})
        assert not set(piece) & set(merged), "no key comes twice"
        merged |= piece
    door = RunPodDoor(long_service(60), Settings())
    whole = await door.run({"id": "abc", "input": {**payload, "return_chunks": False}})
    door.close()
    assert merged == whole


async def test_a_piece_that_cannot_be_cut_goes_to_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_delivery, "PIECE_BYTES", 1_000)
    bucket = Bucket()
    pieces = await stream_of(long_service(60), {"audio_url": URL}, bucket)
    assert "result_url" in pieces[-1]
    assert len(bucket.stored) == 1


async def test_results_of_several_inputs_are_cut_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_delivery, "PIECE_BYTES", 3_000)
    pieces = await stream_of(long_service(20), {"audio_urls": [URL] * 4}, None)
    results = [one for piece in pieces for one in piece.get("results", [])]
    assert [one["index"] for one in results] == [0, 1, 2, 3]
    assert all(len(json.dumps(piece).encode()) <= 3_000 for piece in pieces)


async def test_an_oversized_job_does_not_touch_its_neighbour() -> None:
    door = RunPodDoor(
        FakeService(lambda job, cancel: transcript(" x" * (9000 if job.options.initial_prompt else 1))),
        Settings(max_result_bytes=8_000),
    )
    large, small = await asyncio.gather(
        door.run({"id": "a", "input": {"audio_url": URL, "initial_prompt": "long"}}),
        door.run({"id": "b", "input": {"audio_url": URL}}),
    )
    door.close()
    assert json.loads(large["error"])["code"] == "TOO_LARGE"
    assert small["text"] == "x"
