"""The command against a scripted service on loopback: what goes over the wire, and what bad days look like."""

from __future__ import annotations

import email.parser
import email.policy
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from whisper_worker import __version__
from whisper_worker.doors.remote import main

ANSWER: dict[str, Any] = {
    "text": "Grüß Gott.",
    "language": "de",
    "language_probability": 0.9,
    "duration": 2.0,
    "segments": [
        {
            "id": 0,
            "seek": 0,
            "start": 0.0,
            "end": 1.5,
            "text": " Grüß Gott.",
            "tokens": [1, 2],
            "temperature": 0.0,
            "avg_logprob": -0.1,
            "compression_ratio": 1.0,
            "no_speech_prob": 0.0,
        }
    ],
    "warnings": ["The field best_of was ignored."],
    "receipt": None,
}


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: bytes

    def form(self) -> dict[str, tuple[str | None, bytes]]:
        """Name to file name and content, read by the standard library's mail parser."""
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + self.body)
        return {
            str(part.get_param("name", header="content-disposition")): (
                part.get_filename(),
                part.get_payload(decode=True),
            )
            for part in message.iter_parts()
        }


@dataclass
class Script:
    """What the service does, one entry a request; the last one again and again. ``None`` hangs up."""

    answers: list[tuple[int, dict[str, str], bytes] | None]
    requests: list[Request] = field(default_factory=list)
    url: str = ""


def ok() -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(ANSWER).encode()


def refusal(status: int, code: str, *, retryable: bool, **headers: str) -> tuple[int, dict[str, str], bytes]:
    error = {"code": code, "message": f"It is {code}.", "retryable": retryable}
    return (
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps({"error": error}).encode(),
    )


@pytest.fixture
def serve() -> Iterator[Callable[..., Script]]:
    servers: list[ThreadingHTTPServer] = []

    def start(*answers: tuple[int, dict[str, str], bytes] | None, tls: ssl.SSLContext | None = None) -> Script:
        script = Script(list(answers))

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(int(headers["content-length"]))
                script.requests.append(Request(self.path, headers, body))
                answer = script.answers[min(len(script.requests), len(script.answers)) - 1]
                if answer is None:
                    self.close_connection = True
                    return
                status, more, content = answer
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        script.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        return script

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording of a few blocks, in a directory that the command runs in."""
    monkeypatch.chdir(tmp_path)
    for name in ("WHISPER_SERVICE_URL", "WHISPER_SERVICE_KEY_FILE", "WHISPER_STRICT"):
        monkeypatch.delenv(name, raising=False)
    recording = tmp_path / "call of Mr X.wav"
    recording.write_bytes(bytes(range(256)) * 4096)
    return recording


def test_a_file_goes_out_as_a_form_and_comes_back_as_files(
    serve: Callable[..., Script], call: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = serve(ok())
    monkeypatch.setenv("WHISPER_SERVICE_URL", script.url + "/speech/")
    key = call.with_name("key")
    key.write_text("s3cret\nsecond line\n")
    arguments = ["--model", "small", "--output_dir", "out", "--task", "transcribe", "--word_timestamps", "False"]
    assert main([str(call), *arguments, "--key-file", str(key), "--initial_prompt", 'ü "quoted"\r\nline']) == 0

    (request,) = script.requests
    assert request.path == "/speech/transcribe"
    assert request.headers["authorization"] == "Bearer s3cret"
    assert request.headers["user-agent"] == f"whisper-worker/{__version__}"
    form = request.form()
    assert form.pop("audio") == ("audio.wav", call.read_bytes()), "content whole, the recording's name kept back"
    assert {name: content.decode() for name, (_, content) in form.items()} == {
        "task": "transcribe",
        "word_timestamps": "false",
        "initial_prompt": 'ü "quoted"\r\nline',
        "model": "small",
    }
    out = call.parent / "out"
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".srt", ".tsv", ".txt", ".vtt"]
    assert (out / f"{call.stem}.txt").read_text(encoding="utf-8") == "Grüß Gott.\n"
    assert json.loads((out / f"{call.stem}.json").read_text())["language"] == "de"
    said = capsys.readouterr()
    assert said.out.splitlines() == ["[00:00.000 --> 00:01.500]  Grüß Gott.", "Detected language: German"]
    assert said.err.splitlines() == [f"whisper-remote: {call.name}: warning: The field best_of was ignored."]


def test_the_recorders_call_names_what_a_service_does_not_take(
    serve: Callable[..., Script], call: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = serve(ok())
    arguments = "--output_format json --language en --device cuda --fp16 True".split()
    assert main([str(call), *arguments, "--server", script.url]) == 0
    assert set(script.requests[0].form()) == {"audio", "language"}
    told = capsys.readouterr().err
    assert "--device has no effect" in told
    assert "--fp16 has no effect" in told


@pytest.mark.parametrize(
    "first",
    [
        refusal(429, "BUSY", retryable=True, Retry_After="0"),
        refusal(503, "OUT_OF_MEMORY", retryable=True, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        (503, {"Retry-After": "soon"}, b"<html>the proxy says no</html>"),
        (502, {}, b""),
        None,
    ],
)
def test_what_is_busy_or_away_is_asked_again(
    serve: Callable[..., Script], call: Path, first: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script = serve(first, ok())
    assert main([str(call), "--server", script.url, "-f", "txt"]) == 0
    one, two = (request.form() for request in script.requests)
    assert one == two
    assert "Trying again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (refusal(415, "DECODE", retryable=False), 1, "It is DECODE."),
        (refusal(413, "TOO_LARGE", retryable=False), 1, "It is TOO_LARGE."),
        (refusal(503, "MODEL", retryable=False), 3, "It is MODEL."),
        ((401, {}, b'{"detail": "no"}'), 1, "--key-file"),
        ((404, {}, b"nothing here"), 1, "404"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), 1, "302"),
        ((500, {}, b"oops"), 4, "500"),
        ((200, {}, b"<html>a login page</html>"), 1, "not a transcript"),
        ((200, {}, b'{"text": "x"}'), 1, "not a transcript"),
    ],
)
def test_what_will_not_change_is_told_at_once(
    serve: Callable[..., Script], call: Path, answer: Any, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = serve(answer)
    assert main([str(call), "--server", script.url]) == status
    assert len(script.requests) == 1
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert "127.0.0.1" not in err
    assert [path.name for path in call.parent.iterdir()] == [call.name]


def events(*pairs: tuple[str, Any]) -> tuple[int, dict[str, str], bytes]:
    body = "".join(f": still here\n\nevent: {name}\ndata: {json.dumps(data)}\n\n" for name, data in pairs)
    return 200, {"Content-Type": "text/event-stream; charset=utf-8"}, body.encode()


def test_a_stream_of_events_shows_how_far_it_is_and_repeats_nothing(
    serve: Callable[..., Script], call: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first attempt breaks off behind its first segment; the second one goes on from there."""
    one = ANSWER["segments"][0]
    two = {**one, "id": 1, "start": 1.5, "end": 2.0, "text": " Servus."}
    progress = ("progress", {"stage": "recognize", "done_seconds": 1.0, "total_seconds": 2.0})
    whole = {**ANSWER, "segments": [one, two]}
    script = serve(
        events(progress, ("segment", one)),
        events(("segment", one), ("segment", {"no": "segment"}), progress, ("done", whole)),
    )
    assert main([str(call), "--server", script.url, "-f", "txt"]) == 0
    assert "text/event-stream" in script.requests[0].headers["accept"]
    assert len(script.requests) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[:-1] == ["[00:00.000 --> 00:01.500]  Grüß Gott.", "[00:01.500 --> 00:02.000]  Servus."]
    assert call.with_suffix(".txt").read_text(encoding="utf-8") == "Grüß Gott.\nServus.\n"

    script = serve(events(progress, ("done", whole)))
    assert main([str(call), "--server", script.url, "--verbose", "False"]) == 0
    said = capsys.readouterr()
    assert (said.out, "50%" in said.err) == ("", True)

    script = serve(events(("error", {"code": "DECODE", "message": "It is no audio.", "retryable": False})))
    assert main([str(call), "--server", script.url]) == 1
    assert "It is no audio." in capsys.readouterr().err


def test_a_reader_that_leaves_does_not_end_the_job(serve: Callable[..., Script], call: Path) -> None:
    """``whisper call.wav | head -1`` writes its files."""
    script = serve(ok())
    process = subprocess.Popen(
        [sys.executable, "-m", "whisper_worker.doors.remote", str(call), "--server", script.url, "-f", "txt"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert told.count("\n") == 1, told
    assert call.with_suffix(".txt").exists()


def test_retry_after_is_honoured_up_to_the_timeout(
    serve: Callable[..., Script], call: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told to come again in an hour, the command does not wait for it."""
    script = serve(refusal(429, "BUSY", retryable=True, Retry_After="3600"))
    assert main([str(call), "--server", script.url, "--timeout", "5"]) == 4
    assert len(script.requests) == 1
    script = serve(refusal(429, "BUSY", retryable=True, Retry_After="1.2"), ok())
    assert main([str(call), "--server", script.url, "--timeout", "60", "-f", "txt"]) == 0
    assert "Trying again in 1.2 s" in capsys.readouterr().err


def test_retries_end(serve: Callable[..., Script], call: Path) -> None:
    script = serve(refusal(429, "BUSY", retryable=True, Retry_After="0"))
    assert main([str(call), "--server", script.url, "--retries", "1"]) == 4
    assert len(script.requests) == 2


def test_a_service_that_is_not_there(call: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(call), "--server", "http://127.0.0.1:1", "--retries", "1"]) == 4
    first, last = capsys.readouterr().err.splitlines()
    assert "Trying again" in first
    assert "cannot be reached" in last


def test_a_service_that_never_answers_is_left_at_the_timeout(call: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert main([str(call), "--server", url, "--timeout", "1"]) == 4
    assert "--timeout" in capsys.readouterr().err


def test_a_refusal_before_the_upload_is_over_is_heard(call: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A service may say that it takes no such file after its first bytes, and read no more of it."""
    call.write_bytes(bytes(64 << 20))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.shutdown(socket.SHUT_WR)
                heard = 0
                while block := connection.recv(1 << 20):
                    heard += len(block)
                assert heard < 64 << 20

        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert main([str(call), "--server", url]) == 1
        thread.join(30)
        assert not thread.is_alive()
    assert "takes no file of this size" in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_others(serve: Callable[..., Script], call: Path) -> None:
    script = serve(refusal(415, "DECODE", retryable=False), ok())
    other = call.with_name("other.wav")
    other.write_bytes(b"x")
    assert main(["missing.wav", str(call), str(other), "--server", script.url, "-f", "txt"]) == 1
    assert other.with_suffix(".txt").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--server URL"),
        (["--server", "ftp://example.com"], "http://"),
        (["--server", "http://user:pw@example.com"], "--key-file"),
        (["--server", "http://example.com", "--key-file", "nowhere"], "key file"),
        (["--server", "http://example.com", "--beam_size", "1000"], "beam_size"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_sent(
    call: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(call), *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert "pw" not in err


def test_it_starts_with_little_but_the_standard_library(tmp_path: Path) -> None:
    """Who calls it for every call of a day must not wait for imports: only the standard library and ours, and
    none of our floors that bring more."""
    program = (
        "import sys\n"
        "from whisper_worker.doors.remote import main\n"
        "main(['nothing.wav', '--server', 'http://127.0.0.1:1'])\n"
        "tops = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "tops -= {'whisper_worker'}\n"
        "print(sorted(top for top in tops if not top.startswith('_')))\n"
        "print(sorted(name for name in sys.modules if name.startswith(('whisper_worker.engine', 'asyncio'))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n[]\n"


RECORDER = Path(__file__).parents[2] / "deploy" / "recorder"


def test_packed_into_one_file_it_needs_no_package(serve: Callable[..., Script], call: Path) -> None:
    """What a recorder's machine gets: it keeps the exit status, and needs no site-packages."""
    packed = call.with_name("whisper-remote")
    subprocess.run(
        ["sh", str(RECORDER / "build-remote.sh"), str(packed)],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert os.access(packed, os.X_OK)
    script = serve(ok(), refusal(415, "DECODE", retryable=False))
    for status in (0, 1):
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(packed), str(call), "-f", "json", "--verbose", "False"],
            env={"WHISPER_SERVICE_URL": script.url},
            cwd=call.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
    assert json.loads(call.with_suffix(".json").read_text())["text"] == ANSWER["text"]


def test_the_container_wrapper_hands_arguments_on_whole(call: Path) -> None:
    """A name with blanks stays one argument, which a wrapper that builds a command line would split."""
    docker = call.with_name("docker")
    docker.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\nexit 3\n')
    docker.chmod(0o755)
    done = subprocess.run(
        ["sh", str(RECORDER / "whisper-container"), call.name, "--initial_prompt", "two  words; $HOME"],
        env={"PATH": f"{call.parent}:{os.environ['PATH']}", "WHISPER_CONTAINER": "engine"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    words = done.stdout.splitlines()
    assert words[-4:] == ["whisper", call.name, "--initial_prompt", "two  words; $HOME"]
    assert "engine" in words


def certificate(directory: Path, name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """Key and certificate of ``name``, signed by ``issuer`` or by itself; ``NAME.pem`` holds both."""
    from datetime import datetime, timedelta, timezone
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(timezone.utc)
    signer, signed_by = issuer or (key, None)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by.subject if signed_by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / f"{name}.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(pem)
    )
    return key, built


def test_mutual_tls(
    serve: Callable[..., Script], call: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service whose authority is unknown hears nothing; one that asks for a certificate is shown ours."""
    authority = certificate(call.parent, "authority")
    certificate(call.parent, "service", authority)
    certificate(call.parent, "recorder", authority)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(call.parent / "authority.pem"))
    context.load_cert_chain(call.parent / "service.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    script = serve(ok(), tls=context)
    arguments = [str(call), "--server", script.url, "-f", "txt", "--retries", "0"]

    assert main(arguments) == 1
    assert "SSL_CERT_FILE" in capsys.readouterr().err
    monkeypatch.setenv("SSL_CERT_FILE", str(call.parent / "authority.pem"))
    assert main(arguments) == 4, "without a certificate of its own"
    assert script.requests == []
    assert main([*arguments, "--client-cert", str(call.parent / "recorder.pem")]) == 0
    assert script.requests[0].form()["audio"][1] == call.read_bytes()
    assert main([*arguments, "--client-cert", str(call)]) == 1
    assert "--client-cert" in capsys.readouterr().err
