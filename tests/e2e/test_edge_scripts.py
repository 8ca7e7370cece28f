"""The numbered scripts and the debugging client: against real services on loopback, and as --dry-run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tests.e2e.edge_kit import EDGE, ROOT, Caddy, LiveService, free_ports, get, running, write_wav
from whisper_worker.settings import Settings

SCRIPTS = ROOT / "scripts"
NUMBERED = sorted(SCRIPTS.glob("[0-9]*.sh"))
CLIENT = EDGE / "test_client.py"


def script(
    number: str, *arguments: str, config: Path, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the script of that number with that .env-http."""
    (path,) = SCRIPTS.glob(f"{number}-*.sh")
    plain = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", str(path), *arguments],
        env={**plain, "EDGE_CONFIG": str(config), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd="/",
    )


def write_config(path: Path, **settings: str) -> Path:
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    with running(LiveService(tmp_path_factory.mktemp("live"), WHISPER_API_KEYS="a-key")) as service:
        yield service


@pytest.fixture(scope="module")
def caddy(live: LiveService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    with running(Caddy(tmp_path_factory.mktemp("caddy"), live.url, live.health_url)) as process:
        yield process


# -- written well --------------------------------------------------------------------------


@pytest.mark.long
def test_shellcheck() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("NO SHELLCHECK, the shell scripts are unread: install it (apt-get install shellcheck)")
    files = [*SCRIPTS.glob("*.sh"), *EDGE.glob("*.sh"), *(ROOT / "deploy" / "salad").glob("*.sh")]
    done = subprocess.run([program, "-x", "-P", str(SCRIPTS), *map(str, files)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.name[:3])
def test_help_and_dry_run(path: Path, tmp_path: Path) -> None:
    """Says what it is for; changes nothing and asks nobody when it is only tried."""
    number = path.name[:3]
    config = tmp_path / ".env-http"
    shutil.copy(EDGE / "env-http.example", config)
    told = script(number, "--help", config=config)
    assert told.returncode == 0 and len(told.stdout.splitlines()) > 3
    if number == "300":
        assert all(other.name in told.stdout for other in NUMBERED)
        return
    # Only the tools that read; whatever a script would change it would have to find first.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "aws").write_text('#!/bin/sh\ncase "$*" in *Name*) echo stopped;; *) echo None;; esac\n')
    for forbidden in ("ssh", "docker", "sudo", "apt-get", "install", "mv", "rm"):
        (tools / forbidden).write_text(f'#!/bin/sh\necho "{forbidden} was called" >&2\nexit 99\n')
    (tools / "docker").write_text(
        '#!/bin/sh\n[ "$*" = "compose version" ] || { echo "docker was called" >&2; exit 99; }\n'
    )
    (tools / "rm").write_text('#!/bin/sh\ncase "$*" in "-f /tmp/"*) ;; *) echo "rm was called" >&2; exit 99;; esac\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    before = config.read_bytes()
    done = script(
        number,
        "--dry-run",
        config=config,
        PATH=f"{tools}:{os.environ['PATH']}",
        EDGE_DIR=str(tmp_path / "edge"),
        GPU_INSTANCE_ID="i-0",
        GPU_SECURITY_GROUP="sg-0",
        EDGE_IP="192.0.2.1",
        GPU_HEALTH_URL="http://127.0.0.1:1",
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "was called" not in said
    assert config.read_bytes() == before and not (tmp_path / "edge").exists()
    assert "would " in said or number == "210"


@pytest.mark.parametrize(
    ("archive", "installed"),
    [
        ({"docker-compose-v2": "2.24"}, "docker.io docker-compose-v2 "),  # Ubuntu
        ({"docker-compose": "2.26.1-4"}, "docker.io docker-compose "),  # Debian 13
        ({"docker-compose": "1.29.2-3"}, None),  # Debian 12 has the version that docker itself does not know
        ({"docker-compose": "1.29.2-3", "docker-compose-plugin": "5.1", "docker-ce": "5:29.0"}, "docker-ce docker-com"),
    ],
)
def test_compose_has_another_name_everywhere(archive: dict[str, str], installed: str | None, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    cases = "".join(f'{name}) echo "Version: {version}";;' for name, version in archive.items())
    (tools / "apt-cache").write_text(f'#!/bin/sh\ncase "$3$4" in {cases} *) exit 100;; esac\n')
    (tools / "apt-get").write_text("#!/bin/sh\nexit 99\n")
    for name in ("bash", "sh", "dirname", "sed", "grep", "mktemp", "rm", "id", "cat", "basename", "head", "cmp"):
        (tools / name).symlink_to(shutil.which(name) or name)
    for tool in ("apt-cache", "apt-get"):
        (tools / tool).chmod(0o755)
    config = write_config(tmp_path / ".env-http", EDGE_HOST="192.0.2.1", GPU_URL="http://192.0.2.2:9090")
    done = script("305", "--dry-run", config=config, PATH=str(tools), EDGE_DIR=str(tmp_path / "edge"))
    said = done.stdout + done.stderr
    if installed is None:
        assert done.returncode == 1 and "docs.docker.com" in said
    else:
        assert f"install -y -qq {installed}" in said


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "deploy" / "salad").glob("[bp]*.sh"), *(ROOT / "deploy" / "recorder").glob("*.sh")]),
    ids=lambda p: p.name,
)
def test_whoever_asks_for_help_gets_no_work_done(path: Path, tmp_path: Path) -> None:
    """``--help`` was taken for a model, and installed."""
    plain = {"PATH": os.environ["PATH"], "DOCKER": "false", "PYTHON": "false", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", str(path), "--help"], env=plain, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0 and path.name in done.stdout
    assert not list(tmp_path.iterdir())


def test_configuration_is_data(tmp_path: Path) -> None:
    """Nothing in .env-http is executed, a wrong line is named, and not what it holds."""
    config = tmp_path / ".env-http"
    config.write_text(f"EDGE_HOST=$(touch {tmp_path}/harm)`touch {tmp_path}/harm`\nGPU_URL=http://127.0.0.1:9\n")
    script("315", "--dry-run", config=config)
    assert not (tmp_path / "harm").exists()
    config.write_text("EDGE_HOST=a\nWHISPER API_KEYS=secret\n")
    done = script("315", config=config)
    assert done.returncode == 2 and "NAME=VALUE" in done.stderr and "secret" not in done.stderr
    done = script("315", config=write_config(config, EDGE_HOST="a", GPU_URL="127.0.0.1:9090"))
    assert done.returncode == 2 and "GPU_URL must be" in done.stderr
    done = script("315", config=write_config(config, EDGE_HOST="https://a/", GPU_URL="http://127.0.0.1:9"))
    assert done.returncode == 2 and "EDGE_HOST must be" in done.stderr
    done = script("315", config=tmp_path / "none")
    assert done.returncode == 2 and "env-http.example" in done.stderr
    assert script("310", config=tmp_path / "none").returncode == 1


def test_configuration_as_people_write_it(tmp_path: Path) -> None:
    """Line ends of Windows and single quotes became part of the values; what the box was to be told was left out."""
    config = tmp_path / ".env-http"
    lines = ["# a comment", "", "GPU_URL=http://127.0.0.1:9", "WHISPER_MODEL='small.en'", 'LOG_LEVEL="DEBUG"']
    lines.append("WHISPER_LIVE_RECORDINGS=/var/cache/whisperlive/kept")
    config.write_bytes("\r\n".join([*lines, ""]).encode())
    done = script("310", "--dry-run", config=config)
    assert done.returncode == 0, done.stderr
    told = {line.strip() for line in done.stdout.splitlines()}
    assert {"WHISPER_MODEL=small.en", "LOG_LEVEL=DEBUG", lines[-1]} <= told and "\r" not in done.stdout


def test_the_examples_edge_is_not_set_up(tmp_path: Path) -> None:
    config = tmp_path / ".env-http"
    done = script("305", "--dry-run", config=config)
    assert done.returncode == 0 and "Made" not in done.stdout and not config.exists()
    assert script("305", config=config).returncode == 0 and config.exists()
    tools = tmp_path / "bin"
    tools.mkdir()
    for forbidden in ("docker", "apt-get", "sudo", "mkdir", "install"):
        (tools / forbidden).write_text("#!/bin/sh\nexit 99\n")
        (tools / forbidden).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    done = script("305", config=config, EDGE_DIR=str(tmp_path / "edge"), PATH=path)
    assert done.returncode == 1 and "still the example's" in done.stderr and not (tmp_path / "edge").exists()


@pytest.mark.parametrize("arguments", [["--audio"], ["--nonsense"], []])
def test_what_cannot_be_tested_is_not_broken(arguments: list[str], tmp_path: Path) -> None:
    done = script("315", *arguments, config=write_config(tmp_path / ".env-http", EDGE_HOST="a"))
    assert done.returncode == 2 and "ERROR: " in done.stderr


@pytest.fixture
def aws(tmp_path: Path) -> dict[str, str]:
    """An AWS command line that knows one running instance, and of no rules."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "aws").write_text(
        '#!/bin/sh\ncase "$*" in *State.Name*) echo running;; *IpAddress*) echo 10.0.1.21;; esac\n'
    )
    (tools / "aws").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "AWS_REGION": "us-east-2", "GPU_INSTANCE_ID": "i-0"}


def test_a_box_that_does_not_tell_its_clients_is_not_stopped(aws: dict[str, str], tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    for settings in ({}, {"GPU_URL": "http://127.0.0.1:9090", "GPU_HEALTH_URL": f"http://127.0.0.1:{nobody}"}):
        config = write_config(tmp_path / ".env-http", **settings)
        done = script("210", config=config, **aws)
        assert done.returncode == 1 and "could not be learned" in done.stderr, done.stdout + done.stderr
        assert script("210", "--force", config=config, **aws).returncode == 0


def test_the_port_is_that_of_gpu_url(aws: dict[str, str], tmp_path: Path) -> None:
    settings = {"GPU_URL": "http://10.0.1.20:9191", "GPU_SECURITY_GROUP": "sg-0", "EDGE_IP": "192.0.2.1"}
    for more in ({}, {"WHISPERLIVE_PORT": "9090"}):
        config = write_config(tmp_path / ".env-http", **settings, **more)
        done = script("040", "--dry-run", config=config, **aws)
        assert "Opening port 9191" in done.stdout and "9090" not in done.stdout + done.stderr
        done = script("220", "--dry-run", config=config, EDGE_DIR=str(tmp_path), **aws)
        assert "would set: GPU_URL=http://10.0.1.21:9191" in done.stdout, done.stdout + done.stderr


# -- 315: all hops, and each of them broken ------------------------------------------------


def config_for(path: Path, caddy: Caddy, live: LiveService, **changes: str) -> Path:
    settings = {
        "EDGE_HOST": "127.0.0.1",
        "EDGE_HTTPS_PORT": str(caddy.port),
        "GPU_URL": live.url,
        "GPU_HEALTH_URL": live.health_url,
        "WHISPER_API_KEYS": "a-key",
    }
    return write_config(path, **{**settings, **changes})


def test_every_hop_works(caddy: Caddy, live: LiveService, tmp_path: Path) -> None:
    done = script("315", config=config_for(tmp_path / ".env-http", caddy, live))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^ok ", done.stdout, re.MULTILINE)) == 7 and "fellow Americans" in done.stdout
    assert "All hops work" in done.stdout and "a-key" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("connection", "upgrade"), [("Upgrade", "websocket"), ("keep-alive, upgrade", "WebSocket"), ("close", "websocket")]
)
def test_an_upgrade_is_one_in_any_case(caddy: Caddy, connection: str, upgrade: str) -> None:
    """``Connection: upgrade``, as proxies write it, got the page's 404."""
    context = ssl.create_default_context(cafile=str(caddy.ca))
    with (
        socket.create_connection(("127.0.0.1", caddy.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        lines = [f"Connection: {connection}", f"Upgrade: {upgrade}", "Sec-WebSocket-Version: 13"]
        lines += [
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Protocol: whisper-live, bearer.a-key",
        ]
        request = "\r\n".join(["GET /ws HTTP/1.1", f"Host: 127.0.0.1:{caddy.port}", *lines, "", ""])
        secure.sendall(request.encode())
        assert secure.recv(1024).split()[1] == (b"404" if connection == "close" else b"101")


class _Page(BaseHTTPRequestHandler):
    """A health port whose service never gets ready."""

    def do_GET(self) -> None:
        status = 200 if self.path == "/health" else 503
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"healthy" if status == 200 else b"not_ready")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def loading() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_broken_hop_is_named(caddy: Caddy, live: LiveService, loading: str, tmp_path: Path) -> None:
    nobody, other = free_ports(2)
    config = tmp_path / ".env-http"

    def broken(**changes: str) -> str:
        done = script("315", config=config_for(config, caddy, live, **changes))
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    assert broken(GPU_URL=f"http://127.0.0.1:{nobody}").startswith("BROKEN HOP: 1 edge -> GPU box, port. Is the box")
    assert broken(GPU_HEALTH_URL=f"http://127.0.0.1:{nobody}").startswith("BROKEN HOP: 2 ")
    assert broken(GPU_HEALTH_URL=loading).startswith("BROKEN HOP: 3 ")
    # The health page's port answers, but not to WebSockets.
    assert broken(GPU_URL=live.health_url).startswith("BROKEN HOP: 4 ")
    assert broken(WHISPER_API_KEYS="wrong").startswith("BROKEN HOP: 4 ")
    assert broken(EDGE_HTTPS_PORT=str(nobody)).startswith("BROKEN HOP: 5 ")
    with running(Caddy(tmp_path, live.url, f"http://127.0.0.1:{nobody}")) as astray:
        assert broken(EDGE_HTTPS_PORT=str(astray.port)).startswith("BROKEN HOP: 6 ")
        assert "Americans" not in astray.output() and "a-key" not in astray.output()
        assert '"request"' in astray.output()
        assert "remote_ip" not in astray.output() and "client_ip" not in astray.output()
    (tmp_path / "2").mkdir()
    with running(Caddy(tmp_path / "2", f"http://127.0.0.1:{other}", live.health_url)) as astray:
        assert broken(EDGE_HTTPS_PORT=str(astray.port)).startswith("BROKEN HOP: 7 ")
        assert "a-key" not in astray.output()


def test_a_gateway_with_one_port(live: LiveService, tmp_path: Path) -> None:
    """As Salad's: what is behind Caddy is behind TLS itself, chosen by name, and its health is on the same port."""
    assert get(f"{live.url}/health")[0] == get(f"{live.url}/ready")[0] == 200
    gateway = Caddy(tmp_path, live.url, live.url, host="localhost")
    (tmp_path / "edge").mkdir()
    with running(gateway):
        url = gateway.url
        edge = Caddy(tmp_path / "edge", url, url)
        edge.environment = {**edge.environment, "SSL_CERT_FILE": str(gateway.ca)}
        with running(edge):
            config = config_for(tmp_path / ".env-http", edge, live, GPU_URL=url, GPU_HEALTH_URL="")
            done = script("315", config=config)
            assert done.returncode == 0 and "All hops work" in done.stdout, done.stdout + done.stderr


# -- the debugging client ------------------------------------------------------------------


def client(*arguments: object, key: str = "a-key") -> subprocess.CompletedProcess[str]:
    """Isolated: the standard library must do."""
    return subprocess.run(
        ["python3", "-I", str(CLIENT), *map(str, arguments)],
        env={"PATH": os.environ["PATH"], "WHISPER_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_the_client_says_what_is_wrong(caddy: Caddy, live: LiveService, tmp_path: Path) -> None:
    edge, gpu = caddy.url.replace("http", "ws") + "/ws", live.url.replace("http", "ws")
    (nobody,) = free_ports(1)
    done = client(edge, "--ca", caddy.ca, "--speed", 2, "--expect", "fellow americans")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ *\d+\.\d\d partial .* s behind\)", done.stdout, re.MULTILINE)
    assert "fellow americans" in done.stdout.splitlines()[-1].lower()
    silence = write_wav(tmp_path / "silence.wav", np.zeros(16000, dtype=np.int16))
    other_rate = write_wav(tmp_path / "other.wav", np.zeros(8000, dtype=np.int16), 8000)
    cases = [
        (2, (gpu, "--audio", other_rate)),
        (2, (gpu, "--audio", tmp_path / "none.wav")),
        (2, (live.url,)),
        (3, (f"ws://127.0.0.1:{nobody}",)),
        (4, (edge,)),
        (4, (gpu.replace("ws:", "wss:"), "--insecure")),
        (5, (live.health_url.replace("http", "ws"),)),
        (6, (gpu, "--language", "xx")),
        (7, (gpu, "--audio", silence, "--speed", 4)),
        (7, (gpu, "--speed", 4, "--expect", "something else")),
    ]
    for status, arguments in cases:
        done = client(*arguments)
        assert (done.returncode, done.stderr.count("Traceback")) == (status, 0), (arguments, done.stderr)
        assert f"exit status {status}" in done.stderr or "usage:" in done.stderr
    done = client(gpu, key="wrong")
    assert done.returncode == 5 and "a key is wanted" in done.stderr


# -- 305, 320, 310: what lies on the machines afterwards -----------------------------------


def test_pages_are_brought_up_to_date(live: LiveService, tmp_path: Path) -> None:
    """What is old is replaced, what is foreign is removed, what is current is not touched; Caddy serves it at once."""
    edge = tmp_path / "edge"
    site = edge / "site"
    site.mkdir(parents=True)
    (site / "main.js").write_text("old")
    (site / "gone.js").write_text("old")
    process = Caddy(tmp_path, live.url, live.health_url)
    process.environment = {**process.environment, "EDGE_SITE": str(site)}
    config = tmp_path / ".env-http"
    settings = {"EDGE_HOST": "127.0.0.1", "EDGE_DIR": str(edge)}
    (site / "index.html").write_text("old")
    with running(process):
        write_config(config, **settings, EDGE_HTTPS_PORT=str(process.port))
        done = script("320", config=config)
        assert done.returncode == 0 and "serves this version" in done.stdout, done.stdout + done.stderr
        names = {path.name for path in (EDGE / "site").iterdir()}
        assert {path.name for path in site.iterdir()} == names
        assert all((site / name).read_bytes() == (EDGE / "site" / name).read_bytes() for name in names)
        assert done.stdout.count("==> ") == len(names) + 2
        assert script("320", config=config).stdout.splitlines() == ["==> The edge serves this version."]
        process.end(signal.SIGTERM)
        done = script("320", config=config)
        assert done.returncode == 1 and "run 305" in done.stderr


def test_the_unit_is_understood_and_hardened() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("NO SYSTEMD-ANALYZE, the unit is unread: install systemd")
    unit = EDGE / "whisperlive.service"
    done = subprocess.run([program, "verify", str(unit)], capture_output=True, text=True, timeout=60)
    # It answers 0 whatever it finds. The program is not installed here, and nothing else may be wrong.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "whisper-worker is not executable" not in line]
    assert said == []
    security = [program, "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(security, capture_output=True, text=True, timeout=60)
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None and float(exposure[1]) <= 2.0, done.stdout[-500:]


@pytest.mark.long
def test_the_gpu_box_is_installed_over_ssh(tmp_path: Path) -> None:
    """A stand-in for SSH runs the commands here, in a root of their own; packages and model are really installed."""
    box = tmp_path / "box"
    tools = tmp_path / "bin"
    tools.mkdir()
    box.mkdir()
    (tools / "ssh").write_text(
        f"#!/bin/bash\nfor last; do :; done\nlast=${{last//\\/opt\\/whisper-worker/{box}/code}}\n"
        f'GPU_ROOT={box} exec bash -c "$last"\n'
    )
    (tools / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")  # a driver that torch can do nothing with
    for tool in tools.iterdir():
        tool.chmod(0o755)
    config = write_config(
        tmp_path / ".env-http",
        GPU_URL="http://10.0.1.20:9191",
        WHISPER_MODEL="tiny.en",
        WHISPER_COMPUTE_TYPE="int8",
        WHISPER_API_KEYS="a-key",
    )
    path = {"PATH": f"{tools}:{os.environ['PATH']}"}
    for _ in range(2):
        done = script("310", config=config, timeout=900, **path)
        assert done.returncode == 0 and "not started: GPU_ROOT" in done.stdout, done.stdout + done.stderr
        assert "a-key" not in done.stdout + done.stderr
        assert "torch does not see the card" in done.stderr
    settings = box / "etc" / "whisperlive.env"
    assert settings.stat().st_mode & 0o777 == 0o600
    lines = settings.read_text().splitlines()
    assert {"WHISPERLIVE_PORT=9191", "WHISPER_API_KEYS=a-key", "WHISPER_MODEL=tiny.en"} <= set(lines)
    unit = (box / "etc" / "systemd" / "system" / "whisperlive.service").read_text()
    # What the unit would start, with the settings that it would be given, transcribes.
    command = re.search(r"^ExecStart=/opt/whisper-worker/(.*)$", unit, re.MULTILINE)
    assert command is not None
    service = LiveService(tmp_path)
    ports = ["--host", "127.0.0.1", "--port", str(service.port), "--health-port", str(service.health_port)]
    service.command = [str(box / "code" / command[1].split()[0]), "live", *ports]
    service.environment = dict(line.split("=", 1) for line in lines) | {"HF_HUB_OFFLINE": "1"}
    with running(service):
        done = client(service.url.replace("http", "ws"), "--expect", "fellow americans")
        assert done.returncode == 0, done.stderr


# -- Salad ---------------------------------------------------------------------------------

SALAD = ROOT / "deploy" / "salad"


def test_salads_start_is_told_in_the_log(tmp_path: Path) -> None:
    """One JSON object a line, whatever the card is called; then the service, on both families of addresses."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nprintf 'A \"T4\" \\\\ card, 15360, 535.1, 7.5\\n'\n")
    (tools / "whisper-worker").write_text(f'#!/bin/sh\nexec {sys.executable} -m whisper_worker "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    service = LiveService(tmp_path)
    service.command = ["sh", str(SALAD / "entrypoint.sh")]
    service.environment = {
        **service.environment,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "WHISPERLIVE_PORT": str(service.port),
        "HEALTH_CHECK_PORT": str(service.health_port),
        "WHISPER_API_KEYS": "a-key",
        "LOG_FORMAT": "json",
    }
    with running(service):
        assert get(f"http://127.0.0.1:{service.port}/ready")[0] == 200
        if socket.has_ipv6 and Path("/proc/net/if_inet6").read_text():
            assert get(f"http://[::1]:{service.port}/ready")[0] == 200
        lines = [json.loads(line) for line in service.output().splitlines()]
    assert "a-key" not in service.output()
    assert all({"timestamp", "level", "component", "message"} <= set(line) for line in lines)
    told = [line["message"] for line in lines if line["component"] == "entrypoint"]
    assert told[:2] == ["Container starting", 'GPU: A "T4" \\ card, 15360, 535.1, 7.5']
    assert told[2].startswith("Python 3.") and "CUDA available: " in told[2]
    assert told[-1].startswith(f"Starting the live service on port {service.port}")
    # It became the service: the signal reached it.
    assert "Stopping; sessions are flushed" in service.output()


@pytest.mark.parametrize(
    ("target", "status", "says"),
    [
        ("docker.io/user/live:v1", 0, "push docker.io/user/live:v1"),
        ("registry:5000/live", 2, "no version"),
        ("docker.io/user/live:latest", 2, "instead of latest"),
    ],
)
def test_salads_push_wants_a_version(target: str, status: int, says: str) -> None:
    done = subprocess.run(["sh", str(SALAD / "push.sh"), "--dry-run", target], capture_output=True, text=True)
    assert done.returncode == status and says in done.stdout + done.stderr


def test_salads_group_is_the_services() -> None:
    group = json.loads((SALAD / "container-group.json").read_text(encoding="utf-8"))
    known = {variable for spec in fields(Settings) for variable in spec.metadata["variables"]}
    assert set(group["container"]["environment_variables"]) <= known
    assert group["networking"] == {"protocol": "http", "port": Settings().live_port, "auth": False}
    probes = [group[f"{name}_probe"]["http"] for name in ("startup", "readiness", "liveness")]
    assert {probe["port"] for probe in probes} == {Settings().health_port}
    assert [probe["path"] for probe in probes] == ["/ready", "/ready", "/health"]
