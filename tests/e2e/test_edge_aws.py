"""210, 220 and 040 against a stand-in for AWS, driven by the real AWS command line."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.edge_kit import Process, free_ports, get, until
from tests.e2e.test_edge_scripts import script, write_config
from tests.models import MODELS

pytestmark = pytest.mark.long
"""The stand-in takes longer to install and start than everything that is tested with it."""

TOOLS = MODELS.parent / "moto-venv"
PORTS = {"9090", "9999"}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """In an environment of its own: its dependencies are nobody else's business."""
    TOOLS.parent.mkdir(parents=True, exist_ok=True)
    with (TOOLS.parent / ".moto.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (TOOLS / ".done").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(TOOLS)], check=True, timeout=120)
            pip = [str(TOOLS / "bin" / "pip"), "install", "--quiet", "moto[ec2,server]", "awscli"]
            subprocess.run(pip, check=True, capture_output=True, timeout=600)
            (TOOLS / ".done").touch()
    (port,) = free_ports(1)
    command = [str(TOOLS / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = Process(command, {}, tmp_path_factory.mktemp("moto") / "log")
    server.start()
    try:
        until(lambda: get(f"http://127.0.0.1:{port}/moto-api/")[0] == 200, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        assert server.child is not None
        server.child.terminate()
        server.child.wait(30)


@pytest.fixture
def environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-2",
        "PATH": f"{TOOLS / 'bin'}:{os.environ['PATH']}",
        "GPU_WAIT": "0",
        "EDGE_IP": "198.51.100.7",
    }


@pytest.fixture
def aws(environment: dict[str, str]) -> Any:
    def call(*arguments: str) -> Any:
        command = [str(TOOLS / "bin" / "aws"), "ec2", "--region", "us-east-2", "--output", "json", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout or "null")

    return call


def instance(aws: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = aws("describe-instances", "--instance-ids", name)["Reservations"][0]["Instances"][0]
    return found


@pytest.fixture
def box(aws: Any) -> str:
    image = aws("describe-images")["Images"][0]["ImageId"]
    made = aws("run-instances", "--image-id", image, "--instance-type", "g4dn.xlarge")
    name: str = made["Instances"][0]["InstanceId"]
    return name


def test_stop_and_start(aws: Any, box: str, environment: dict[str, str], tmp_path: Path) -> None:
    """The address is another one afterwards, and everything that names it follows; twice is as good as once."""
    config = write_config(
        tmp_path / ".env-http",
        EDGE_HOST="edge.example",
        GPU_URL="http://192.0.2.1:9090",
        GPU_HEALTH_URL="http://192.0.2.1:9999",
        GPU_INSTANCE_ID=box,
        GPU_ADDRESS="public",
        EDGE_DIR=str(tmp_path / "edge"),
    )
    del environment["GPU_WAIT"]
    wait = {"GPU_WAIT": "1"}
    for told in ("Stopped.", "stopped already"):
        done = script("210", "--force", config=config, **environment)
        assert done.returncode == 0 and told in done.stdout, done.stdout + done.stderr
        assert instance(aws, box)["State"]["Name"] == "stopped"
    before = config.read_text()
    done = script("220", "--dry-run", config=config, **environment)
    assert done.returncode == 0 and instance(aws, box)["State"]["Name"] == "stopped"
    assert config.read_text() == before
    for told in ("Its address is now", "Its address is the same"):
        done = script("220", config=config, **environment, **wait)
        # Nothing listens there, and that is said.
        assert done.returncode == 1 and told in done.stdout and "run 315" in done.stderr, done.stdout + done.stderr
        found = instance(aws, box)
        assert found["State"]["Name"] == "running"
        assert f"GPU_URL=http://{found['PublicIpAddress']}:9090\n" in config.read_text()
    assert config.stat().st_mode & 0o777 == 0o600
    assert "192.0.2.1" not in config.read_text()
    assert config.read_text().count("GPU_URL=") == 1 and "EDGE_HOST=edge.example\n" in config.read_text()

    write_config(config, GPU_URL="https://name.salad.cloud", GPU_INSTANCE_ID=box)
    done = script("220", config=config, **environment, **wait)
    assert done.returncode == 0 and "gateway" in done.stderr and "name.salad.cloud" in config.read_text()


def test_unknown_instances(environment: dict[str, str], tmp_path: Path) -> None:
    config = write_config(tmp_path / ".env-http", GPU_INSTANCE_ID="i-00000000000000000")
    for number in ("210", "220"):
        done = script(number, config=config, **environment)
        assert done.returncode == 1 and "AWS_REGION and GPU_INSTANCE_ID" in done.stderr


def test_nobody_is_cut_off(box: str, environment: dict[str, str], aws: Any, tmp_path: Path) -> None:
    """A page such as the health port's, with two people speaking."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "healthy", "whisperlive": {"ready": true, "clients": 2, "max_clients": 4}}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        config = write_config(
            tmp_path / ".env-http", GPU_URL="http://127.0.0.1:9090", GPU_HEALTH_URL=url, GPU_INSTANCE_ID=box
        )
        done = script("210", config=config, **environment)
        assert done.returncode == 1 and "2 clients are connected" in done.stderr
        assert instance(aws, box)["State"]["Name"] == "running"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_ports_open_to_the_edge_alone(aws: Any, environment: dict[str, str], tmp_path: Path) -> None:
    group = aws("create-security-group", "--group-name", tmp_path.name, "--description", "GPU box")["GroupId"]
    allow = ["authorize-security-group-ingress", "--group-id", group, "--protocol", "tcp"]
    aws(*allow, "--port", "22", "--cidr", "198.51.100.7/32")
    aws(*allow, "--port", "9090", "--cidr", "0.0.0.0/0")
    aws(*allow, "--port", "9999", "--cidr", "198.51.100.99/32")
    aws(*allow, "--port", "9000-9100", "--cidr", "203.0.113.0/24")
    config = write_config(tmp_path / ".env-http", GPU_SECURITY_GROUP=group)

    def rules() -> set[tuple[str, str]]:
        listed = aws("describe-security-group-rules", "--filters", f"Name=group-id,Values={group}")
        return {
            (f"{rule['FromPort']}-{rule['ToPort']}", rule["CidrIpv4"])
            for rule in listed["SecurityGroupRules"]
            if not rule["IsEgress"]
        }

    before = rules()
    done = script("040", "--dry-run", config=config, **environment)
    assert done.returncode == 0 and rules() == before and "would run" in done.stderr
    for _ in range(2):
        done = script("040", config=config, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert rules() == {
            ("22-22", "198.51.100.7/32"),
            ("9090-9090", "198.51.100.7/32"),
            ("9999-9999", "198.51.100.7/32"),
            ("9000-9100", "203.0.113.0/24"),
        }
        assert "also opens port 9090 to 203.0.113.0/24" in done.stderr
    # The edge moved: its old address loses what the new one gets.
    done = script("040", config=config, **{**environment, "EDGE_IP": "198.51.100.8"})
    assert {source for ports, source in rules() if ports in ("9090-9090", "9999-9999")} == {"198.51.100.8/32"}
