"""The whisper command as people and recorders call it: a process, files in, files out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models import model_cache

TESTS = Path(__file__).parents[1]
SPEECH = TESTS / "data" / "speech"
JFK = SPEECH / "jfk.flac"
GOLDEN = TESTS / "golden" / "cli"
WHISPER = (sys.executable, "-m", "whisper_worker", "transcribe")
SECONDS = 120


def environment(**more: str) -> dict[str, str]:
    """No variable of whoever runs the tests, no network for the hub."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": str(TESTS.parent),
        "WHISPER_MODEL_CACHE": str(model_cache("tiny.en")),
        "WHISPER_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def whisper(
    *arguments: str | Path, cwd: Path, stdin: bytes | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*WHISPER, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def masked(text: str) -> str:
    """Shape and words, without digits and commas: two engines hear the same, but for a comma or a millisecond."""
    return re.sub(r"\d", "0", re.sub(r"^\d+\t\d+\t", "0\t0\t", text, flags=re.MULTILINE)).replace(",", "")


def shape(value: Any) -> Any:
    """A JSON value with its types for its leaves, its keys in order."""
    if isinstance(value, dict):
        return [(key, shape(entry)) for key, entry in value.items()]
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return float if isinstance(value, (int, float)) else type(value)


def golden(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


def test_every_format_has_the_shape_that_openai_whisper_gives_it(tmp_path: Path) -> None:
    done = whisper(JFK, "--language", "English", "--model", "tiny.en", "--fp16", "False", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"jfk.{x}" for x in ("json", "srt", "tsv", "txt", "vtt")
    ]
    for name in ("jfk.txt", "jfk.srt", "jfk.vtt", "jfk.tsv"):
        assert masked((tmp_path / name).read_text(encoding="utf-8")) == masked(golden(name)), name
    ours, theirs = json.loads((tmp_path / "jfk.json").read_text()), json.loads(golden("jfk.json"))
    assert shape(ours) == shape(theirs)
    assert masked(ours["text"]) == masked(theirs["text"].strip())
    texts = [[masked(segment["text"]) for segment in one["segments"]] for one in (ours, theirs)]
    assert texts[0] == texts[1]
    for mine, other in zip(ours["segments"], theirs["segments"], strict=True):
        assert (mine["start"], mine["end"]) == pytest.approx((other["start"], other["end"]), abs=0.6)
    lines = done.stdout.splitlines()
    assert [masked(line) for line in lines] == [f"[00:00.000 --> 00:00.000] {text}" for text in texts[1]]


def test_word_times_lay_out_subtitles_as_openai_whisper_does(tmp_path: Path) -> None:
    """Two files in one call, so that the model is loaded once."""
    other = tmp_path / "again.flac"
    other.symlink_to(JFK)
    words = ("--language", "en", "--word_timestamps", "True", "--verbose", "None", "--fp16", "False")
    done = whisper(JFK, other, *words, "--max_line_width", "24", "--max_line_count", "2", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert masked((tmp_path / "jfk.srt").read_text()) == masked(golden("lines.srt"))
    assert (tmp_path / "jfk.srt").read_text() == (tmp_path / "again.srt").read_text()
    ours, theirs = json.loads((tmp_path / "jfk.json").read_text()), json.loads(golden("words.json"))
    assert shape(ours) == shape(theirs)
    words_of = [
        [masked(word["word"]) for segment in one["segments"] for word in segment["words"]] for one in (ours, theirs)
    ]
    assert words_of[0] == words_of[1]

    done = whisper(
        JFK, *words, "--max_words_per_line", "5", "--highlight_words", "True", "-f", "vtt", "-o", "high", cwd=tmp_path
    )
    assert done.returncode == 0
    highlighted = [
        [masked(line) for line in text.splitlines() if "<u>" in line]
        for text in ((tmp_path / "high" / "jfk.vtt").read_text(), golden("highlight.vtt"))
    ]
    assert highlighted[0] == highlighted[1]


def test_the_recorders_call(tmp_path: Path) -> None:
    """``BINARY call.wav --model small ...``, with a model that is here and the card that is not."""
    out = tmp_path / "out"
    (tmp_path / "call.wav").write_bytes(SPEECH.joinpath("LJ001-0001.flac").read_bytes())  # content decides
    call = "call.wav --model tiny.en --output_format json --task transcribe --language en --fp16 True".split()
    done = whisper(*call, "--device", "cpu", "--output_dir", out, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in out.iterdir()] == ["call.json"]
    result = json.loads((out / "call.json").read_text())
    assert result["text"].startswith("Printing")
    assert result["language"] == "en"
    assert result["segments"]

    import torch

    if not torch.cuda.is_available():
        done = whisper(*call, "--device", "cuda", "--output_dir", tmp_path / "none", cwd=tmp_path)
        assert done.returncode == 3
        assert done.stderr.count("\n") == 1
        assert "--device cpu" in done.stderr
        assert not (tmp_path / "none").exists()


def test_a_model_that_cannot_be_had_is_told_with_what_to_run(tmp_path: Path) -> None:
    done = whisper(JFK, JFK, "--model", "small", "--model_dir", tmp_path / "models", cwd=tmp_path)
    assert done.returncode == 3
    fetching, failed = done.stderr.splitlines()
    assert "small is not on this machine" in fetching
    assert "python save_pipeline.py --model small" in failed
    assert str(tmp_path) not in done.stderr
    done = whisper(JFK, "--model", "smal", cwd=tmp_path)
    assert done.returncode == 3
    assert "Did you mean small" in done.stderr


def test_many_inputs_of_which_some_are_bad(tmp_path: Path) -> None:
    """A directory, standard input, the silent, the broken and the missing, in one call."""
    calls = tmp_path / "calls"
    (calls / "monday").mkdir(parents=True)
    shutil.copy(SPEECH / "silence_3s.flac", calls / "monday" / "silence.flac")
    shutil.copy(SPEECH / "LJ001-0001.flac", calls / "call.flac")
    (calls / "call.wav").write_bytes(b"no audio at all")
    (calls / "notes.txt").write_text("not a recording")
    done = whisper("missing.wav", calls, "-", "-o", "out", "--verbose", "False", cwd=tmp_path, stdin=JFK.read_bytes())
    assert done.returncode == 1
    assert done.stdout == ""
    out = tmp_path / "out"
    texts = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.txt")}
    assert set(texts) == {"call.txt", "monday/silence.txt", "stdin.txt"}
    assert texts["call.txt"].startswith("Printing")
    assert "fellow Americans" in texts["stdin.txt"]
    assert texts["monday/silence.txt"] == ""
    told = [line for line in re.split(r"[\r\n]", done.stderr) if line.startswith("whisper: ")]
    assert [line.split(":")[1].strip() for line in told] == ["missing.wav", "call.wav", "monday/silence.flac"]
    assert "Traceback" not in done.stderr
    assert "100%" in done.stderr
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = whisper(JFK, "-o", "taken", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--output_dir" in done.stderr and done.stderr.count("\n") == 1


def test_lines_that_nobody_can_take_do_not_end_the_work(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*WHISPER, str(JFK), str(JFK), "-f", "txt"],
            cwd=tmp_path,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
        )
    assert done.returncode == 0
    assert {path.name for path in tmp_path.glob("*.txt")} == {"jfk.txt", "jfk.flac.txt"}
    told = done.stderr.decode()
    assert told.count("standard output") == told.count("\n") == 1, told


def test_dev_null_makes_the_model_ready_and_writes_nothing(tmp_path: Path) -> None:
    done = whisper("--model", "tiny.en", "--task", "transcribe", os.devnull, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "whisper: the model is ready\n")
    assert list(tmp_path.iterdir()) == []


def test_verbose_json_is_openais_shape(tmp_path: Path) -> None:
    done = whisper(JFK, "-f", "verbose_json", "--word_timestamps", "True", "--beam_size", "None", cwd=tmp_path)
    assert done.returncode == 0
    assert "Detected language: English" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["jfk.json"]
    result = json.loads((tmp_path / "jfk.json").read_text())
    assert list(result)[:6] == ["task", "language", "duration", "text", "segments", "words"]
    assert (result["task"], result["language"], result["duration"]) == ("transcribe", "english", 11.0)
    assert result["words"][0]["word"].strip() == "And"
    assert result["receipt"]["model"] == "openai/whisper-tiny.en"


def test_asked_to_stop_it_leaves_nothing_behind(tmp_path: Path) -> None:
    """Interrupted while it reads standard input: its temporary files go, and the status says why."""
    process = subprocess.Popen(
        [*WHISPER, "-"],
        cwd=tmp_path,
        env=environment(TMPDIR=str(tmp_path)),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write("the beginning of something")
        process.stdin.flush()
        while not list(tmp_path.glob("whisper-job-*/stdin")):
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert told.splitlines() == ["whisper: interrupted; what was finished is written"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_for_temporary_files_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    done = whisper(JFK, cwd=tmp_path, WHISPER_TMPDIR=str(tmp_path / "file"))
    assert done.returncode == 4
    assert "WHISPER_TMPDIR" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--version"], 0, "whisper-worker "),
        (["--help"], 0, "exit status"),
        ([], 2, "audio"),
        (["a.wav", "--beam-size", "5"], 2, "--beam-size"),
        (["a.wav", "--language", "klingon"], 2, "language"),
        (["a.wav", "--device", "cuda:3"], 2, "CUDA_VISIBLE_DEVICES"),
        (["a.wav", "--max_line_width", "30"], 2, "--word_timestamps True"),
        (["a.wav", "--no_speech_threshold", "3"], 2, "no_speech_threshold"),
        (["a.wav", "--fp16", "maybe"], 2, "True or False"),
    ],
)
def test_arguments_are_answered_in_one_line_and_without_the_engine(
    tmp_path: Path, arguments: list[str], status: int, told: str
) -> None:
    program = "import sys; from whisper_worker.doors.cli import main\n" + (
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as left: status = left.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'fastapi', 'requests'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == status, done.stderr
    assert told in done.stdout + done.stderr
    if status:
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
