"""Finding models: cache directories, checkpoints, hub caches; and what is said where there is none."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from whisper_worker.cache import layout
from whisper_worker.cache.layout import FileSum, Manifest, find_model, sha256_of, verify
from whisper_worker.errors import ModelError
from whisper_worker.service import Service
from whisper_worker.settings import Settings

SIZES = {
    "base": {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 51865},
    "turbo": {"d_model": 1280, "encoder_layers": 32, "decoder_layers": 4, "vocab_size": 51866},
}


def checkpoint(directory: Path, size: str = "base", **config: object) -> Path:
    """A plain checkpoint in one directory; finding reads no weights, so these are a stand-in."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "whisper", **SIZES[size], **config}))
    (directory / "model.safetensors").write_bytes(b"weights of " + size.encode())
    (directory / "tokenizer.json").write_text("{}")
    return directory


def cache(directory: Path, model: str | None, size: str = "base") -> Path:
    """A cache directory; with a manifest where ``model`` names it, as a seed's script left it where not."""
    checkpoint(directory / "model", size)
    (directory / "processor").mkdir()
    (directory / "model" / "tokenizer.json").rename(directory / "processor" / "tokenizer.json")
    (directory / "pipeline_config.pkl").write_bytes(pickle.dumps({"task": "t", "batch_size": 8}))
    if model is not None:
        files = {
            path.relative_to(directory).as_posix(): FileSum(path.stat().st_size, sha256_of(path))
            for path in directory.rglob("*")
            if path.is_file() and path.suffix != ".pkl"
        }
        Manifest(model, "0" * 40, "Hugging Face hub", "float16", files).write(directory)
    return directory


def snapshot(hub: Path, repository: str, commit: str, size: str = "base", *, main: bool = False) -> Path:
    """A snapshot of a hub cache: names that link to contents called by their sums."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    directory = checkpoint(folder / "snapshots" / commit, size)
    for path in list(directory.iterdir()):
        content = folder / "blobs" / sha256_of(path)
        path.rename(content)
        path.symlink_to(content)
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return directory


@pytest.fixture(autouse=True)
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The platform's volume and the user's hub cache, both empty at first; nothing of this machine is seen."""
    platform, own = tmp_path / "volume" / "hub", tmp_path / "home" / "hub"
    monkeypatch.setattr(layout, "PLATFORM_HUB", platform)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(own))
    return platform, own


def test_the_cache_is_taken_where_no_name_is_given(tmp_path: Path) -> None:
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    files = find_model(Settings(model_cache=directory))
    assert (files.model_dir, files.processor_dir) == (directory / "model", directory / "processor")
    assert (files.name, files.revision, files.source) == ("openai/whisper-base", "0" * 40, "Hugging Face hub")
    assert dict(files.pipeline_config) == {"task": "t"}


@pytest.mark.parametrize("name", ["base", "openai/whisper-base", "Systran/faster-whisper-base"])
def test_the_cache_is_found_by_any_of_its_names(tmp_path: Path, name: str) -> None:
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    assert find_model(Settings(model=name, model_cache=directory)).model_dir == directory / "model"


def test_models_side_by_side(tmp_path: Path) -> None:
    root = cache(tmp_path / "cache", "openai/whisper-base")
    turbo = cache(root / "models" / "turbo", "openai/whisper-large-v3-turbo", "turbo")
    assert find_model(Settings(model_cache=root)).name == "openai/whisper-base"
    assert find_model(Settings(model="turbo", model_cache=root)).model_dir == turbo / "model"


def test_several_models_and_none_named(tmp_path: Path) -> None:
    for name, size in (("base", "base"), ("turbo", "turbo")):
        cache(tmp_path / "cache" / "models" / name, name, size)
    with pytest.raises(ModelError, match="set WHISPER_MODEL to one of base, turbo"):
        find_model(Settings(model_cache=tmp_path / "cache"))


def test_a_single_model_in_a_folder_beside_is_the_model(tmp_path: Path) -> None:
    only = cache(tmp_path / "cache" / "models" / "base", "openai/whisper-base")
    assert find_model(Settings(model_cache=tmp_path / "cache")).model_dir == only / "model"


def test_another_model_than_the_one_asked_for_is_not_taken(tmp_path: Path) -> None:
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    with pytest.raises(ModelError) as caught:
        find_model(Settings(model="turbo", model_cache=directory))
    assert "the cache holds openai/whisper-base" in caught.value.message
    assert "python save_pipeline.py --model large-v3-turbo" in caught.value.message
    assert str(tmp_path) not in caught.value.message


def test_a_cache_without_a_manifest_is_known_by_its_sizes(tmp_path: Path) -> None:
    """What a server's own script saved in the same layout, with no word about which model it is."""
    directory = cache(tmp_path / "cache", None, "turbo")
    assert find_model(Settings(model="turbo", model_cache=directory)).name == "openai/whisper-large-v3-turbo"
    with pytest.raises(ModelError, match="not on this machine"):
        find_model(Settings(model="base", model_cache=directory))


def test_a_cache_without_a_manifest_is_known_by_its_configuration(tmp_path: Path) -> None:
    directory = cache(tmp_path / "cache", None)
    (directory / "pipeline_config.pkl").write_bytes(pickle.dumps({"model_id": "org/tuned"}))
    assert find_model(Settings(model="org/tuned", model_cache=directory)).name == "org/tuned"
    with pytest.raises(ModelError, match="not on this machine"):
        find_model(Settings(model="base", model_cache=directory))


def test_a_label_of_ones_own_is_found_beside_a_nameless_model(tmp_path: Path) -> None:
    root = cache(tmp_path / "cache", None, "turbo")
    mine = cache(root / "models" / "mine", "my-tune")
    assert find_model(Settings(model="my-tune", model_cache=root)).model_dir == mine / "model"


def test_a_hostile_configuration_stops_the_search(tmp_path: Path) -> None:
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    (directory / "pipeline_config.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(ModelError, match=r"os\.system"):
        find_model(Settings(model_cache=directory))


def test_a_plain_checkpoint_is_used_where_it_lies(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "tuned", _name_or_path="org/tuned")
    files = find_model(Settings(model=str(directory)))
    assert files.model_dir == files.processor_dir == directory
    assert (files.name, files.source) == ("org/tuned", "directory")
    assert find_model(Settings(model_cache=directory)).model_dir == directory
    assert verify(files) == 0


def test_a_known_name_wins_over_a_directory_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "base", "turbo")
    checkpoint(tmp_path / "tuned")
    with pytest.raises(ModelError, match="save_pipeline"):
        find_model(Settings(model="base", model_cache=tmp_path / "empty"))
    assert find_model(Settings(model="./base")).name == "base"
    assert find_model(Settings(model="tuned")).name == "tuned"


def test_the_platforms_volume_is_used_in_place(tmp_path: Path, hubs: tuple[Path, Path]) -> None:
    snapshot(hubs[0], "openai/whisper-base", "a" * 40)
    main = snapshot(hubs[0], "openai/whisper-large-v3-turbo", "b" * 40, "turbo", main=True)
    snapshot(hubs[0], "openai/whisper-large-v3-turbo", "c" * 40, "turbo")
    files = find_model(Settings(model="turbo", model_cache=tmp_path / "empty"))
    assert files.model_dir == files.processor_dir == main
    assert (files.name, files.revision) == ("openai/whisper-large-v3-turbo", "b" * 40)
    assert verify(files) == 3


def test_the_pinned_commit_is_preferred(tmp_path: Path, hubs: tuple[Path, Path]) -> None:
    pinned = "e37978b90ca9030d5170a5c07aadb050351a65bb"
    snapshot(hubs[1], "openai/whisper-base", "b" * 40, main=True)
    snapshot(hubs[1], "openai/whisper-base", pinned)
    assert find_model(Settings(model="base", model_cache=tmp_path / "empty")).revision == pinned


def test_the_only_whisper_on_the_volume_needs_no_name(tmp_path: Path, hubs: tuple[Path, Path]) -> None:
    snapshot(hubs[0], "openai/whisper-base", "a" * 40)
    snapshot(hubs[0], "org/llama", "b" * 40)
    settings = Settings(model_cache=tmp_path / "empty")
    assert find_model(settings).name == "openai/whisper-base"
    snapshot(hubs[0], "org/whisper-tuned", "c" * 40)
    with pytest.raises(ModelError, match="No model is on this machine"):
        find_model(settings)


def test_a_snapshot_that_is_not_all_there_is_passed_over(tmp_path: Path, hubs: tuple[Path, Path]) -> None:
    (snapshot(hubs[0], "openai/whisper-base", "a" * 40) / "model.safetensors").unlink()
    whole = snapshot(hubs[1], "openai/whisper-base", "b" * 40)
    assert find_model(Settings(model="base", model_cache=tmp_path / "empty")).model_dir == whole


def test_sharded_weights_must_be_complete(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "large")
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="no complete safetensors"):
        find_model(Settings(model=str(directory)))
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"x")
    assert find_model(Settings(model=str(directory))).model_dir == directory
    index["weight_map"]["b"] = "../../elsewhere.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="damaged"):
        find_model(Settings(model=str(directory)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model/config.json", None, "damaged"),
        ("model/model.safetensors", b"cut", "damaged"),
        ("manifest.json", b"{", "manifest.json is damaged"),
        ("manifest.json", b'{"files": []}', "manifest.json is damaged"),
    ],
)
def test_damage_is_noticed_without_reading_weights(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    kept = directory / "model"
    if content is None:
        (directory / name).write_bytes((directory / name).read_bytes() + b" ")
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        find_model(Settings(model_cache=directory))
    assert str(kept) not in caught.value.message


def test_a_ctranslate2_conversion_is_told_to_be_imported(tmp_path: Path, hubs: tuple[Path, Path]) -> None:
    directory = tmp_path / "faster-whisper-base"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.bin").write_bytes(b"x")
    on_volume = snapshot(hubs[0], "Systran/faster-whisper-base", "a" * 40)
    (on_volume / "model.safetensors").rename(on_volume / "model.bin")
    for name in (str(directory), "Systran/faster-whisper-base"):
        with pytest.raises(ModelError, match=r"CTranslate2 conversion.*--from"):
            find_model(Settings(model=name, model_cache=tmp_path / "empty"))
    whole = snapshot(hubs[1], "openai/whisper-base", "b" * 40)
    found = find_model(Settings(model="Systran/faster-whisper-base", model_cache=tmp_path / "empty"))
    assert (found.model_dir, found.name) == (whole, "openai/whisper-base")


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "llama"}'])
def test_foreign_checkpoints_are_refused(tmp_path: Path, config: str) -> None:
    directory = checkpoint(tmp_path / "foreign")
    (directory / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json"):
        find_model(Settings(model=str(directory)))


def test_verify_reads_the_content(tmp_path: Path) -> None:
    files = find_model(Settings(model_cache=cache(tmp_path / "cache", "openai/whisper-base")))
    assert verify(files) == 3
    weights = files.model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])  # same size, other content
    with pytest.raises(ModelError, match=r"model/model\.safetensors"):
        verify(files)
    with pytest.raises(ModelError, match=r"model/model\.safetensors"):
        Service(Settings(model_cache=tmp_path / "cache", verify_model=True)).load()


@pytest.mark.parametrize(
    ("source", "again"),
    [("Hugging Face hub", "--model base"), ("directory (CTranslate2 conversion)", "--from DIRECTORY")],
)
def test_what_to_run_for_a_damaged_cache_brings_the_same_model_back(tmp_path: Path, source: str, again: str) -> None:
    """The command that was given would have put the default model in its place."""
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    manifest = Manifest.read(directory)
    assert manifest is not None
    replace(manifest, source=source).write(directory)
    (directory / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=again):
        find_model(Settings(model_cache=directory))


def test_verify_reads_a_snapshots_content(tmp_path: Path, hubs: tuple[Path, Path]) -> None:
    directory = snapshot(hubs[0], "openai/whisper-base", "a" * 40)
    files = find_model(Settings(model="base", model_cache=tmp_path / "empty"))
    (directory / "model.safetensors").resolve().write_bytes(b"something else")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        verify(files)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(model="./nowhere"), "does not exist"),
        (Settings(model="/secret/place"), "does not exist"),
        (Settings(model="tinny"), "Did you mean tiny"),
        (Settings(model="org/unknown"), r"save_pipeline\.py --model org/unknown"),
    ],
)
def test_what_is_missing_is_told_without_paths(tmp_path: Path, settings: Settings, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        find_model(Settings(model=settings.model, model_cache=tmp_path / "empty"))
    assert "secret" not in caught.value.message
    assert not caught.value.retryable


def test_finding_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    directory = cache(tmp_path / "cache", "openai/whisper-base")
    program = (
        "import sys, time; from pathlib import Path; from whisper_worker.cache.layout import find_model;"
        "from whisper_worker.settings import Settings;"
        "find_model(Settings(model='base', model_cache=Path(sys.argv[1])));"
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    begin = time.perf_counter()
    for _ in range(20):
        find_model(Settings(model="base", model_cache=directory))
    assert (time.perf_counter() - begin) / 20 < 0.02


def test_sums_are_those_of_the_standard_tool(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
