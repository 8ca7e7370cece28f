"""The image for GPUs, built and run without a card; `make image-test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.image import engine
from tests.image.check_image import result_of, words_of
from tests.image.engine import container, run

MAX_BYTES = 4_800_000_000
"""Without a model; most of it is NVIDIA's libraries, which torch links to."""

LOOK = """
import ctypes, importlib.util, json, pathlib, shutil, torch
libraries = pathlib.Path(torch.__file__).parent / "lib"
for name in ("libtorch_cuda.so", "libtorch_cuda_linalg.so"):
    ctypes.CDLL(str(libraries / name))
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    "architectures": torch._C._cuda_getArchFlags(),
    "triton": importlib.util.find_spec("triton") is not None, "compiler": shutil.which("cc") or shutil.which("gcc"),
}))
"""


@pytest.fixture(scope="session")
def gpu(context: Path) -> str:
    return engine.build("whisper-worker:gpu", "runpod", TORCH="cuda")


@pytest.fixture(scope="session")
def found(gpu: str) -> dict[str, Any]:
    ran = run(container(gpu, "python", "-c", LOOK))
    assert ran.code == 0, ran.both
    print(ran.out.strip())
    return dict(json.loads(ran.out))


def test_size_and_layers(gpu: str) -> None:
    size = int(engine.inspect(gpu)["Size"])
    for layer, made_by in engine.layers(gpu):
        if layer > 100_000:
            print(f"{layer / 1e6:8.1f} MB  {made_by.replace('/bin/sh -c #(nop) ', '')[:90]}")
    print(f"{size / 1e6:8.1f} MB  together")
    parts = (
        "cd /opt/venv/lib/python3*/site-packages && du -sm nvidia torch imageio_ffmpeg transformers numpy* nvidia/*/lib"
    )
    print(run(container(gpu, "sh", "-c", parts)).out)
    assert size <= MAX_BYTES


def test_it_holds_the_cuda_build_and_every_library_that_it_links_to(found: dict[str, Any]) -> None:
    """Loading torch's libraries for cards loads all of NVIDIA's that they name, but the driver's."""
    assert found["cuda"] and "+cpu" not in found["torch"]
    assert found["cudnn"]


def test_nothing_in_it_waits_for_a_compiler(found: dict[str, Any]) -> None:
    """torch hands some products on a card to triton where that is installed, and triton calls a C compiler first."""
    assert not found["triton"] and not found["compiler"]


def test_the_default_job_without_a_card(gpu: str, mounted: list[str]) -> None:
    ran = run(container(*mounted, gpu))
    assert ran.code == 0, ran.both
    assert "ask what you can do for your country" in words_of(result_of(ran.both)["text"])


def test_a_card_that_is_asked_for_and_not_there_is_named(gpu: str, mounted: list[str]) -> None:
    ran = run(container("-e", "WHISPER_DEVICE=cuda", *mounted, gpu))
    assert ran.code == 1
    assert "CUDA" in ran.both and "Traceback" not in ran.both
