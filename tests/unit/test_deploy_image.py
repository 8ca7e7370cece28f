"""What the image and the manifests promise, as far as reading them tells; tests/image runs them."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "deploy/k8s"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def manifests() -> dict[str, dict[str, Any]]:
    text = (K8S / "k8s-deployment.yaml").read_text(encoding="utf-8")
    return {f"{found['kind']}/{found['metadata']['name']}": found for found in yaml.safe_load_all(text)}


MANIFESTS = manifests()
POD = MANIFESTS["Deployment/whisper-service"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM \S+ AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_what_is_copied_reaches_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [rule[1:].rstrip("/") for rule in rules if rule.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    sources = {source.rstrip("/") for line in copied for source in line.split()}
    assert sources == set(allowed)
    assert all((ROOT / source).exists() for source in sources)
    assert any(fnmatch.fnmatch("whisper_worker/__pycache__", rule) for rule in rules)


def test_each_door_has_its_target_and_the_last_one_is_the_platforms() -> None:
    found = stages()
    assert list(found)[-1] == "runpod"
    commands = {
        name: json.loads(re.findall(r"^CMD (\[.+\])$", found[name], re.MULTILINE)[-1]) for name in list(found)[-3:]
    }
    assert commands == {
        "serve": ["whisper-worker", "serve"],
        "live": ["whisper-worker", "live"],
        "runpod": ["python", "-u", "/handler.py"],
    }
    assert all("HEALTHCHECK" in found[name] for name in commands)
    assert 'ENTRYPOINT ["tini", "--"]' in found["runtime"] and "USER 10001:10001" in found["runtime"]


def test_the_names_that_callers_know() -> None:
    service = MANIFESTS["Service/whisper-service"]
    assert service["spec"]["selector"] == {"app": "whisper-service"}
    assert service["spec"]["ports"] == [{"name": "http", "port": 5000, "targetPort": "http"}]
    deployment = MANIFESTS["Deployment/whisper-service"]
    assert deployment["spec"]["selector"]["matchLabels"] == {"app": "whisper-service"}
    assert deployment["spec"]["template"]["metadata"]["labels"] == {"app": "whisper-service"}
    assert all(found["metadata"].get("namespace", "default") == "default" for found in MANIFESTS.values())


def test_resources_and_scaling() -> None:
    assert CONTAINER["resources"] == {
        "requests": {"cpu": "1000m", "memory": "2Gi"},
        "limits": {"cpu": "2000m", "memory": "4Gi"},
    }
    scaler = MANIFESTS["HorizontalPodAutoscaler/whisper-service"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (1, 3)
    targets = {m["resource"]["name"]: m["resource"]["target"]["averageUtilization"] for m in scaler["metrics"]}
    assert targets == {"cpu": 70, "memory": 80}
    assert "replicas" not in MANIFESTS["Deployment/whisper-service"]["spec"], "each apply would undo the autoscaler"


def test_only_the_video_service_comes_in() -> None:
    (rule,) = MANIFESTS["NetworkPolicy/whisper-service-policy"]["spec"]["ingress"]
    assert rule == {
        "from": [{"podSelector": {"matchLabels": {"app": "video-transcription"}}}],
        "ports": [{"protocol": "TCP", "port": 5000}],
    }


def test_probes_ask_what_the_service_answers() -> None:
    from whisper_worker.doors.http import DEFAULT_PORT

    assert {port["name"]: port["containerPort"] for port in CONTAINER["ports"]} == {"http": DEFAULT_PORT}
    paths = {name: CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/ready", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert CONTAINER["startupProbe"]["periodSeconds"] * CONTAINER["startupProbe"]["failureThreshold"] >= 300


def test_the_grace_is_enough_to_drain() -> None:
    drain = next(float(entry["value"]) for entry in CONTAINER["env"] if entry["name"] == "WHISPER_DRAIN_TIMEOUT")
    before = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before + drain + 5 <= POD["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("manifest", ["base/deployment.yaml", "job.yaml"])
def test_every_variable_is_a_setting(manifest: str) -> None:
    from dataclasses import fields

    from whisper_worker.settings import Settings

    known = {variable for spec in fields(Settings) for variable in spec.metadata["variables"]}
    pod = yaml.safe_load((K8S / manifest).read_text(encoding="utf-8"))["spec"]["template"]["spec"]
    used = {entry["name"] for part in (*pod["initContainers"], *pod["containers"]) for entry in part["env"]}
    assert used - known <= {"HF_HUB_OFFLINE", "HF_TOKEN"}


def test_the_job_gives_up_on_statuses_that_trying_again_does_not_change() -> None:
    rules = yaml.safe_load((K8S / "job.yaml").read_text(encoding="utf-8"))["spec"]["podFailurePolicy"]["rules"]
    from whisper_worker.doors.cli_run import EXIT_STATUS

    final = sorted({2, *EXIT_STATUS.values()} - {4, 130})
    assert [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"] == [final]


def read_json(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / ".runpod" / name).read_text(encoding="utf-8")))


def test_what_the_platforms_hub_offers_are_settings_with_their_own_defaults() -> None:
    from whisper_worker.settings import Settings

    config = read_json("hub.json")["config"]
    offered = {entry["key"]: entry["input"] for entry in config["env"]}
    defaults = {key: str(entry["default"]).lower() for key, entry in offered.items()}
    assert Settings.from_env(defaults) == Settings()
    for key, entry in offered.items():
        for value in (entry.get("min"), entry.get("max"), *(option["value"] for option in entry.get("options", []))):
            if value is not None:
                Settings.from_env({key: str(value)})
    for preset in config["presets"]:
        assert preset["defaults"].keys() <= offered.keys()


def test_the_hubs_files_have_the_shape_that_it_documents() -> None:
    """docs.runpod.io/hub/publishing-guide, the tables of hub.json and tests.json."""
    hub, tests = read_json("hub.json"), read_json("tests.json")
    assert hub.keys() == {"title", "description", "type", "category", "config"}
    assert (hub["type"], hub["category"]) == ("serverless", "audio")
    config = hub["config"]
    needed = {"runsOn", "containerDiskInGb", "gpuCount", "gpuIds"}
    assert needed <= config.keys() <= needed | {"allowedCudaVersions", "env", "presets"}
    assert config["runsOn"] == "GPU" and isinstance(config["containerDiskInGb"], int)
    for entry in config["env"]:
        assert entry.keys() == {"key", "input"}
        kinds = {"string": str, "number": int, "boolean": bool}
        assert type(entry["input"]["default"]) is kinds[entry["input"]["type"]]
        assert entry["input"].keys() >= {"name", "description"}
    for test in tests["tests"]:
        assert test.keys() == {"name", "input", "timeout"}
        assert isinstance(test["timeout"], int) and test["timeout"] >= 1000, "it is in milliseconds"
    assert tests["config"].keys() <= {"gpuTypeId", "gpuCount", "env", "allowedCudaVersions"}
    # A test on hosts that the endpoint would not take waits for ever.
    assert set(tests["config"]["allowedCudaVersions"]) <= set(config["allowedCudaVersions"])


def test_the_batch_sizes_of_the_hub_are_those_of_the_readme() -> None:
    table = re.findall(r"^\| (\d+ GB) \| (\d+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    presets = read_json("hub.json")["config"]["presets"]
    assert [(p["name"].partition(" (")[0], str(p["defaults"]["MODEL_BATCH_SIZE"])) for p in presets] == table


def test_what_the_hub_sends_is_a_request_that_we_take() -> None:
    from whisper_worker.doors.runpod_dialects import Order, read_request
    from whisper_worker.settings import Settings

    for test in read_json("tests.json")["tests"]:
        (order,) = read_request(test["input"], Settings(strict=True), lambda: "none").orders
        assert isinstance(order, Order), order
