"""pipeline_config.pkl: read without executing anything, mended by scripts/inspect_config.py."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_worker.cache.config_pickle import TorchValue, read_config, without_runtime_keys, write_config
from whisper_worker.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]

SEED_CONFIG: dict[str, object] = {
    "task": "automatic-speech-recognition",
    "model_id": "openai/whisper-base",
    "torch_dtype": torch.float16,
    "device": torch.device("cuda", 0),
    "batch_size": 16,
    "chunk_length_s": 30,
    "return_timestamps": True,
    "model_kwargs": {"attn_implementation": "sdpa", "torch_dtype": torch.bfloat16},
    "generate_kwargs": {"task": "transcribe", "temperature": (0.0, 0.2)},
}
"""What a server pickled that kept device and type in its configuration."""


class _Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._call


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_torch_values_are_read_without_torch(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "pipeline_config.pkl"
    path.write_bytes(pickle.dumps(SEED_CONFIG, protocol=protocol))
    config = read_config(path)
    assert config["torch_dtype"] == TorchValue("dtype", "float16")
    assert config["device"] == TorchValue("device", "cuda:0")
    assert str(config["torch_dtype"]) == str(torch.float16)
    assert config["generate_kwargs"] == SEED_CONFIG["generate_kwargs"]


def test_reading_imports_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pipeline_config.pkl"
    path.write_bytes(pickle.dumps(SEED_CONFIG))
    program = (
        "import sys; from pathlib import Path; from whisper_worker.cache.config_pickle import read_config;"
        "read_config(Path(sys.argv[1])); print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HOSTILE: dict[str, Callable[[Path], object]] = {
    "posix.system": lambda canary: _Calls(os.system, f"touch {canary}"),
    "builtins.eval": lambda canary: _Calls(builtins.eval, f"open({str(canary)!r}, 'w')"),
    "shutil.copy": lambda canary: _Calls(shutil.copy, __file__, str(canary)),
    "torch.serialization.load": lambda canary: _Calls(torch.load, str(canary)),
    "builtins.getattr": lambda canary: _Calls(getattr, _Calls(os.system, f"touch {canary}"), "x"),
    "posix.mkdir": lambda canary: [{"deep": (1, {"er": _Calls(os.mkdir, str(canary))})}],
    "pathlib.PosixPath": lambda canary: canary,
    "collections.OrderedDict": lambda canary: OrderedDict(a=1),
}
"""By the name of what is asked for first."""


@pytest.mark.parametrize("tried", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_is_refused_by_the_name_of_what_it_tried(tmp_path: Path, tried: str, protocol: int) -> None:
    path, canary = tmp_path / "pipeline_config.pkl", tmp_path / "canary"
    path.write_bytes(pickle.dumps({"task": "x", "value": HOSTILE[tried](canary)}, protocol=protocol))
    with pytest.raises(ModelError, match="nothing was executed") as caught:
        read_config(path)
    told = caught.value.message.replace("__builtin__.", "builtins.").replace("pathlib._local.", "pathlib.")
    assert f"asks for {tried}," in told and "save_pipeline.py --model" in told
    assert not canary.exists()


def test_the_same_pickle_would_have_run(tmp_path: Path) -> None:
    """The attack of the test above is a real one: plain pickle falls for it."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(_Calls(os.system, f"touch {canary}")))
    assert canary.exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "damaged"),
        (b"not a pickle", "damaged"),
        (pickle.dumps({"a": 1})[:-1], "damaged"),
        (pickle.dumps([1, 2]), "no dict"),
        (pickle.dumps({1: 2}), "no dict"),
        (b"x" * 70_000, "larger than"),
        (pickle.dumps({"a": 1 + 2j}), "builtins.complex"),
        (b"\x80\x02\x82\x01.", "extension 1"),
        (b"Pmine\n.", "persistent object"),
        (b"}r\xff\xff\xff\x7f.", "reserves memory"),
        (b"}p999999999\n.", "reserves memory"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "damaged"),
        (b"(S'touch canary'\nios\nsystem\n.", "os.system"),
        # Values set on what stands for torch.device, on a type, and on a torch value.
        (_global("torch", "device") + b"}(S'x'\nI1\nub.", "damaged"),
        (_global("builtins", "set") + b"}(S'x'\nI1\nub.", "damaged"),
        (b"}S'a'\n" + _global("torch", "float16") + b"((lI1\ntbs.", "value of type"),
        (b"}S'a'\n" + _global("torch", "device") + b"(I3\ntRs.", "wrong kind"),
    ],
)
def test_damaged_and_oversized_files_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "pipeline_config.pkl"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=reason):
        read_config(path)
    assert not Path("canary").exists()


def test_shared_values_do_not_unfold_without_end(tmp_path: Path) -> None:
    """A few hundred bytes of lists of the same list would print as 10**30 values."""
    value: object = "x"
    for _ in range(15):
        value = [value] * 100
    path = tmp_path / "pipeline_config.pkl"
    path.write_bytes(pickle.dumps({"a": value}))
    begin = time.monotonic()
    with pytest.raises(ModelError, match="too many or too deeply"):
        read_config(path)
    assert time.monotonic() - begin < 1

    endless: list[object] = []
    endless.append(endless)
    path.write_bytes(pickle.dumps({"a": endless}))
    with pytest.raises(ModelError, match="too many or too deeply"):
        read_config(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_dict_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary.pkl"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        assert isinstance(read_config(path), dict)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "written.pkl"
    write_config(path, config)
    assert read_config(path) == config
    assert pickle.loads(path.read_bytes()) == config


def test_torch_values_and_objects_are_not_written(tmp_path: Path) -> None:
    for value in (TorchValue("dtype", "float16"), io.StringIO()):
        with pytest.raises(ModelError):
            write_config(tmp_path / "pipeline_config.pkl", {"inner": [value]})
    assert not list(tmp_path.iterdir())


def test_runtime_keys_go_at_any_depth() -> None:
    config: dict[str, object] = {
        "task": "t",
        "torch_dtype": None,
        "device_map": "auto",
        "model_kwargs": {"dtype": "float16", "use_safetensors": True},
        "dtypes": [TorchValue("dtype", "float16")],
    }
    kept, removed = without_runtime_keys(config)
    assert kept == {"task": "t", "model_kwargs": {"use_safetensors": True}}
    assert removed == ("torch_dtype", "device_map", "model_kwargs.dtype", "dtypes")


# --- scripts/inspect_config.py, as a person runs it


def _inspect(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "inspect_config.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache directory with the sizes of base, and no weights: the script never opens them."""
    for name in ("model", "processor"):
        (tmp_path / name).mkdir()
    sizes = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 51865, "num_mel_bins": 80}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "whisper", **sizes}))
    (tmp_path / "processor" / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80}))
    (tmp_path / "pipeline_config.pkl").write_bytes(pickle.dumps(SEED_CONFIG))
    return tmp_path


def test_show_and_fix(cache: Path) -> None:
    original = (cache / "pipeline_config.pkl").read_bytes()
    shown = _inspect("--path", cache)
    assert shown.returncode == 1
    assert "- torch_dtype: torch.float16" in shown.stdout
    assert "  chunk_length_s: 30" in shown.stdout

    assert _inspect(WHISPER_MODEL_CACHE=str(cache)).stdout == shown.stdout

    diff = _inspect("--path", cache, "--diff")
    assert diff.returncode == 1
    assert [line.split(":")[0] for line in diff.stdout.splitlines()] == [
        "- torch_dtype",
        "- device",
        "- batch_size",
        "- model_kwargs.torch_dtype",
    ]
    assert (cache / "pipeline_config.pkl").read_bytes() == original

    fixed = _inspect("--path", cache / "pipeline_config.pkl", "--fix")
    assert fixed.returncode == 0, fixed.stdout
    assert (cache / "pipeline_config.pkl.bak").read_bytes() == original
    kept = pickle.loads((cache / "pipeline_config.pkl").read_bytes())
    assert kept == {
        **{key: SEED_CONFIG[key] for key in ("task", "model_id", "chunk_length_s", "return_timestamps")},
        "model_kwargs": {"attn_implementation": "sdpa"},
        "generate_kwargs": SEED_CONFIG["generate_kwargs"],
    }

    again = _inspect("--path", cache, "--fix")
    assert again.returncode == 0
    assert not (cache / "pipeline_config.pkl.bak.1").exists()


def test_a_whole_mapping_that_goes_is_shown_to_go(cache: Path) -> None:
    """Its entries were shown as if they stayed, and --diff left them out."""
    config = {"task": "t", "device_map": {"": 0}, "model_kwargs": {"device_map": {"a": "cpu"}, "b": 1}}
    (cache / "pipeline_config.pkl").write_bytes(pickle.dumps(config))
    diff = _inspect("--path", cache, "--diff").stdout.splitlines()
    assert diff[:2] == ["- device_map: {'': 0}", "- model_kwargs.device_map: {'a': 'cpu'}"]


def test_torch_values_inside_a_list_are_shown_as_torch_spells_them(cache: Path) -> None:
    (cache / "pipeline_config.pkl").write_bytes(pickle.dumps({"dtypes": [torch.float16, torch.device("cuda:0")]}))
    assert "- dtypes: [torch.float16, torch.device('cuda:0')]" in _inspect("--path", cache).stdout


def test_a_file_that_is_not_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    for arguments in ((), ("--json",)):
        told = _inspect("--path", tmp_path, *arguments)
        assert told.returncode == 2
        assert "save_pipeline.py" in told.stdout + told.stderr and "--path" in told.stdout + told.stderr


def test_older_backups_are_kept(cache: Path) -> None:
    (cache / "pipeline_config.pkl.bak").write_bytes(b"older")
    report = json.loads(_inspect("--path", cache, "--fix", "--json").stdout)
    assert report["backup"] == "pipeline_config.pkl.bak.1"
    assert report["removable"] == report["problems"] == []
    assert (cache / "pipeline_config.pkl.bak").read_bytes() == b"older"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"task": "text-generation"}, "task is"),
        ({"chunk_length_s": 60}, "chunk_length_s is 60"),
        ({"model_id": "openai/whisper-large-v3"}, "other sizes"),
    ],
)
def test_what_does_not_fit_the_model_is_told(cache: Path, change: dict[str, object], problem: str) -> None:
    write_config(cache / "pipeline_config.pkl", {"task": "automatic-speech-recognition", **change})
    done = _inspect("--path", cache)
    assert done.returncode == 1
    assert problem in done.stdout.split("problem: ")[1]


def test_a_feature_extractor_of_another_model_is_told(cache: Path) -> None:
    write_config(cache / "pipeline_config.pkl", {"task": "automatic-speech-recognition"})
    assert _inspect("--path", cache).returncode == 0
    (cache / "processor" / "preprocessor_config.json").write_text(json.dumps({"feature_size": 128}))
    done = _inspect("--path", cache)
    assert done.returncode == 1
    assert "128 mel bands; the model takes 80" in done.stdout


def test_a_hostile_file_is_neither_shown_nor_fixed(cache: Path, tmp_path: Path) -> None:
    data = pickle.dumps({"x": _Calls(os.system, f"touch {tmp_path / 'canary'}")})
    (cache / "pipeline_config.pkl").write_bytes(data)
    for arguments in (["--fix"], ["--json"], []):
        done = _inspect("--path", cache, *arguments)
        assert done.returncode == 2
        assert "posix.system" in done.stdout + done.stderr
    assert (cache / "pipeline_config.pkl").read_bytes() == data
    assert not (tmp_path / "canary").exists()
    assert _inspect("--path", tmp_path / "nowhere.pkl").returncode == 2
