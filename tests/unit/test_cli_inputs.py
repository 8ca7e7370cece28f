"""What the command's arguments stand for, and where the outputs go."""

from __future__ import annotations

import io
import os
import types
from pathlib import Path, PurePath

import pytest

from whisper_worker.doors.cli_inputs import Input, expand
from whisper_worker.doors.cli_outputs import write_outputs
from whisper_worker.errors import InvalidInput, TooLarge
from whisper_worker.formats import SubtitleLayout
from whisper_worker.settings import Settings
from whisper_worker.types import AudioSource, Transcript

SETTINGS = Settings(max_download_bytes=100)


def stems(words: list[str], spool: Path) -> list[str]:
    return [str(item.stem) if isinstance(item, Input) else f"{item[0]}!" for item in expand(words, spool, SETTINGS)]


def test_a_directory_gives_its_recordings_in_order_with_their_places(tmp_path: Path) -> None:
    for name in ("b/two.MP3", "b/notes.txt", "one.wav", "one.srt", "c/deep/three.opus"):
        path = tmp_path / "calls" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert stems([str(tmp_path / "calls")], tmp_path) == ["b/two", "c/deep/three", "one"]
    for name in ("._one.wav", "b/._two.MP3", ".Trash/old.wav"):
        path = tmp_path / "calls" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert stems([str(tmp_path / "calls")], tmp_path) == ["b/two", "c/deep/three", "one"], "hidden ones are not meant"
    (tmp_path / "empty").mkdir()
    assert stems([str(tmp_path / "empty")], tmp_path) == [f"{tmp_path / 'empty'}!"]


def test_outputs_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    for name in ("a.wav", "a.mp3", "b.wav"):
        (tmp_path / name).write_bytes(b"x")
    words = [str(tmp_path / name) for name in ("a.wav", "a.mp3", "b.wav")]
    assert stems(words, tmp_path) == ["a", "a.mp3", "b"]
    for place in ("one", "two", "three"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "call.wav").write_bytes(b"x")
    calls = [str(tmp_path / place / "call.wav") for place in ("one", "two", "three")]
    assert stems(calls, tmp_path) == ["call", "call.wav", "call.wav-2"]
    assert stems(["http://a.example/t.mp3", "http://b.example/t.mp3"], tmp_path) == ["t", "t-2"]


@pytest.mark.parametrize(
    ("address", "shown", "stem"),
    [
        ("https://example.com/talks/A%20talk.mp3?token=secret", "A talk.mp3", "A talk"),
        ("http://example.com/", "address", "audio"),
        ("https://example.com/..%2F..%2Fetc%2Fpasswd", "passwd", "passwd"),
    ],
)
def test_an_address_is_named_by_its_last_part_alone(address: str, shown: str, stem: str, tmp_path: Path) -> None:
    """Neither its query nor a path out of the output directory comes of it."""
    (item,) = expand([address], tmp_path, SETTINGS)
    assert isinstance(item, Input)
    assert (item.shown, str(item.stem), item.source.url) == (shown, stem, address)


def test_dev_null_is_nothing_and_what_is_missing_is_told(tmp_path: Path) -> None:
    found = list(expand([os.devnull, "nowhere.wav", "nul\0.wav"], tmp_path, SETTINGS))
    assert isinstance(found[0], Input)
    assert found[0].is_nothing
    assert [error.code for _, error in found[1:]] == ["INVALID_INPUT"] * 2  # type: ignore[misc]


@pytest.mark.parametrize(("content", "error"), [(b"", InvalidInput), (b"x" * 101, TooLarge), (b"x" * 100, None)])
def test_standard_input_has_the_limits_of_a_file(
    content: bytes, error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))
    (item,) = expand(["-"], tmp_path, SETTINGS)
    if error is None:
        assert isinstance(item, Input)
        assert item.source.path is not None
        assert item.source.path.read_bytes() == content
    else:
        assert not isinstance(item, Input)
        assert isinstance(item[1], error)


def test_an_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """Who watches the directory never reads half of a file, and a place that cannot be written is one error."""
    transcript = Transcript("Hi.", "en", 1.0, 1.0, ())
    target = tmp_path / "call.json"
    target.write_text("old")
    before = target.stat().st_ino
    write_outputs(transcript, tmp_path, PurePath("call"), ("json",), SubtitleLayout(), "transcribe")
    assert target.stat().st_ino != before, "it was written over, not replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["call.json"]
    with pytest.raises(InvalidInput, match="cannot be written"):
        write_outputs(transcript, target, PurePath("call"), ("json",), SubtitleLayout(), "transcribe")


def test_names_with_dots_keep_them(tmp_path: Path) -> None:
    source = tmp_path / "call.2026-11-21.wav"
    source.write_bytes(b"x")
    (item,) = expand([str(source)], tmp_path, SETTINGS)
    assert isinstance(item, Input)
    assert item.source == AudioSource(path=source)
    write_outputs(Transcript("", "en", 1.0, 1.0, ()), tmp_path, item.stem, ("txt",), SubtitleLayout(), "transcribe")
    assert (tmp_path / "call.2026-11-21.txt").exists()
