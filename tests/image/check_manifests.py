"""Linters of the Dockerfile and the manifests, and the Deployment run by podman."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.setup_venv import make_venv
from tests.image import engine
from tests.image.engine import podman, run
from tests.image.waiting import ready, stop, until, within
from tests.models import model_cache

K8S = engine.ROOT / "deploy/k8s"
OVERLAYS = ("cpu", "gpu")


@pytest.fixture(scope="session")
def linters() -> Path:
    """Directory with the linters' programs; made once, and anew when their versions change."""
    wanted = (engine.ROOT / "tests/image/requirements.txt").read_text(encoding="utf-8")
    venv = engine.CACHE / "linters"
    record = venv / "installed.txt"
    if not record.is_file() or record.read_text(encoding="utf-8") != wanted:
        venv.parent.mkdir(parents=True, exist_ok=True)
        make_venv(venv)
        pip = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--no-input"]
        engine.must([*pip, "-r", str(engine.ROOT / "tests/image/requirements.txt")], seconds=900)
        record.write_text(wanted, encoding="utf-8")
    return venv / "bin"


@pytest.fixture(scope="session")
def rendered(linters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each overlay, and the Job with a name as the API server would give it one."""
    directory = tmp_path_factory.mktemp("manifests")
    files = {}
    for overlay in OVERLAYS:
        files[overlay] = directory / f"{overlay}.yaml"
        made = engine.must([str(linters / "kubectl"), "kustomize", str(K8S / "overlays" / overlay)])
        files[overlay].write_text(made, encoding="utf-8")
    job = yaml.safe_load((K8S / "job.yaml").read_text(encoding="utf-8"))
    job["metadata"]["name"] = job["metadata"].pop("generateName") + "x7k2p"
    files["job"] = directory / "job.yaml"
    files["job"].write_text(yaml.safe_dump(job), encoding="utf-8")
    return files


def test_the_dockerfile(linters: Path) -> None:
    found = run([str(linters / "hadolint"), str(engine.ROOT / "Dockerfile")])
    assert found.code == 0 and found.out == "", found.both


def test_the_single_file_is_the_cpu_overlay(rendered: dict[str, Path]) -> None:
    shipped = (K8S / "k8s-deployment.yaml").read_text(encoding="utf-8")
    assert shipped.partition("\n")[2] == rendered["cpu"].read_text(encoding="utf-8")


def test_the_schemas_know_every_field(linters: Path, rendered: dict[str, Path]) -> None:
    for name, path in rendered.items():
        checked = run([str(linters / "kubernetes-validate"), "--strict", str(path)])
        assert checked.code == 0 and "ERROR" not in checked.both, (name, checked.both)


def test_checkov_finds_nothing_without_a_reason(linters: Path, rendered: dict[str, Path], tmp_path: Path) -> None:
    files = [word for path in rendered.values() for word in ("--file", str(path))]
    command = [str(linters / "checkov"), "--config-file", str(K8S / ".checkov.yaml"), "--output", "json"]
    found = json.loads(run([*command, "--quiet", "--skip-download", *files]).out)
    assert found["summary"]["passed"] > 100
    failed = [(check["check_id"], check["resource"]) for check in found["results"]["failed_checks"]]
    assert failed == []


def _for_podman(deployment: dict[str, Any], image: str, models: Path) -> dict[str, Any]:
    """What podman lacks of a cluster: a registry, a claim for volumes, ports without a bridge.

    podman 4.3 restarts an init container that has ended well as often as the pod's restart policy
    says, so that policy goes too.
    """
    changed = copy.deepcopy(deployment)
    pod = changed["spec"]["template"]["spec"]
    pod["restartPolicy"] = "Never"
    (cache,) = [volume for volume in pod["volumes"] if volume["name"] == "model-cache"]
    del cache["emptyDir"]
    cache["hostPath"] = {"path": str(models)}
    for part in (*pod["initContainers"], *pod["containers"]):
        part["image"], part["imagePullPolicy"] = image, "Never"
        ports = {port["name"]: port["containerPort"] for port in part.pop("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if probe in part:
                part[probe]["httpGet"]["port"] = ports[part[probe]["httpGet"]["port"]]
    return changed


@pytest.fixture
def pod(serve: str, rendered: dict[str, Path], tmp_path: Path) -> Iterator[str]:
    """The Deployment as one pod; gives the name of its container."""
    models = tmp_path / "cache"
    shutil.copytree(model_cache("base"), models / "models/base")
    for path in (tmp_path, models, *models.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)  # what fsGroup does in a cluster
    manifests = yaml.safe_load_all(rendered["cpu"].read_text(encoding="utf-8"))
    (deployment,) = [manifest for manifest in manifests if manifest["kind"] == "Deployment"]
    path = tmp_path / "pod.yaml"
    path.write_text(yaml.safe_dump(_for_podman(deployment, serve, models)), encoding="utf-8")
    name = f"{deployment['metadata']['name']}-pod-0"
    podman("pod", "rm", "--force", "--time", "0", name)
    try:
        played = podman("play", "kube", "--network", "none", str(path))
        assert played.code == 0, played.both
        yield f"{name}-whisper"
    finally:
        podman("pod", "rm", "--force", "--time", "0", name)


def test_the_deployment_runs_transcribes_and_drains(pod: str) -> None:
    url = "http://localhost:5000"
    until(lambda: within(pod, "curl", "-fsS", f"{url}/health").code == 0, "healthy", 30)
    state = within(pod, "curl", "-sS", "-w", " %{http_code}", f"{url}/ready").out
    assert state.endswith(" 503") and "loading" in state, "ready before the model was there"
    until(lambda: ready(pod, url), "ready")
    assert within(pod, "sh", "-c", "touch /x").code != 0, "the root can be written to"
    assert within(pod, "printenv", "WHISPER_THREADS").out.strip() == "2", "threads are not the limit's"

    speech = (engine.ROOT / "tests/data/speech/LJ001-0001.flac").resolve()
    assert podman("cp", str(speech), f"{pod}:/tmp/call.flac").code == 0
    asked = ["curl", "-fsS", "-F", "audio=@/tmp/call.flac", "-F", "language=en", f"{url}/transcribe"]
    assert "printing" in json.loads(within(pod, *asked).out)["text"].lower()

    seen = podman("logs", pod).both.count("Starting transcription")
    last = subprocess.Popen(engine.within(pod, *asked), stdout=subprocess.PIPE, text=True, env=engine.environment())
    until(lambda: podman("logs", pod).both.count("Starting transcription") > seen, "a second transcription")
    status, took = stop(pod, 55)
    assert status == 0 and took < 50, (status, took)
    assert "printing" in json.loads(last.communicate(timeout=30)[0])["text"].lower()
