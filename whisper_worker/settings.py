"""The only reader of the environment.

``Settings.from_env()`` reads it once; everything else gets a ``Settings`` passed in. Each
field carries its variable, its meaning and its check; README's table is written from them
(``python -m whisper_worker.settings``) and a test holds the two together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from whisper_worker.errors import InvalidInput

COMPUTE_TYPES = ("auto", "int8", "int8_float16", "float16", "bfloat16", "float32")
ENGINES = ("native", "transformers")


def _text(value: str) -> str:
    return value


def _path(value: str) -> Path:
    return Path(value).expanduser()


def _flag(value: str) -> bool:
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("must be true or false")


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = float(value)
        if not low <= number <= high:
            raise ValueError(f"must be between {low:g} and {high:g}")
        return number

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    return parse


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        lowered = value.strip().lower()
        if lowered not in choices:
            raise ValueError("must be one of " + ", ".join(choices))
        return lowered

    return parse


def _words(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _setting(
    default: Any,
    parse: Callable[[str], Any],
    meaning: str,
    *variables: str,
    shown: str | None = None,
    secret: bool = False,
) -> Any:
    """A field read from the first of ``variables`` that is set; the first one is its documented name.

    The value of a ``secret`` one is left out of ``repr``.
    """
    metadata = {"parse": parse, "meaning": meaning, "variables": variables, "shown": shown, "secret": secret}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, validated. Units: seconds and bytes unless the name says otherwise."""

    model: str | None = _setting(
        None,
        _text,
        "Model to load: a short name (`base`, `turbo`), a hub name or a directory. "
        "Unset: whatever `whisper_model_cache/` holds.",
        "WHISPER_MODEL",
        shown="the cached model",
    )
    model_cache: Path | None = _setting(
        None,
        _path,
        "Directory that `save_pipeline.py` fills and the worker reads.",
        "WHISPER_MODEL_CACHE",
        shown="`whisper_model_cache` beside `handler.py`, else `/whisper_model_cache`",
    )
    engine: str = _setting(
        "native",
        _choice(*ENGINES),
        "`native` (this project's forward pass) or `transformers` (the reference).",
        "WHISPER_ENGINE",
    )
    device: str = _setting(
        "auto",
        _choice("auto", "cpu", "cuda"),
        "Where the model runs: `cpu`, `cuda`, or `auto`: a card if there is one.",
        "WHISPER_DEVICE",
    )
    compute_type: str = _setting(
        "auto",
        _choice(*COMPUTE_TYPES),
        "Precision: `int8`, `int8_float16`, `float16`, `bfloat16`, `float32`; what the device lacks becomes its "
        "nearest. `auto` takes the fastest that keeps the text: float16 on a GPU; on a CPU int8 "
        "decoder weights with a bfloat16 (where the processor has it) or float32 encoder.",
        "WHISPER_COMPUTE_TYPE",
    )
    verify_model: bool = _setting(
        False,
        _flag,
        "Check the digests on record for the model's files before it is loaded (seconds for each gigabyte).",
        "WHISPER_VERIFY_MODEL",
    )
    threads: int = _setting(
        0, _integer(0, 1024), "CPU threads of the model; 0 takes the cores this process may use.", "WHISPER_THREADS"
    )
    batch_size: int = _setting(
        0,
        _integer(0, 65536),
        "Upper bound of windows decoded side by side; unset: sized from free memory.",
        "MODEL_BATCH_SIZE",
        shown="from free memory",
    )
    concurrency: int = _setting(
        4,
        _integer(1, 1024),
        "Jobs that a RunPod worker, or `/jobs` of the HTTP service, runs at a time; their windows share batches.",
        "WHISPER_CONCURRENCY",
    )
    stream: bool = _setting(
        False, _flag, "RunPod handler yields segments as they come (the aggregate is kept).", "WHISPER_STREAM"
    )
    strict: bool = _setting(
        False, _flag, "Refuse a request with an option that would be ignored, rather than warn.", "WHISPER_STRICT"
    )
    max_download_bytes: int = _setting(
        5 * 1024**3,
        _integer(1, 1 << 50),
        "Largest audio file taken.",
        "WHISPER_MAX_DOWNLOAD_BYTES",
        "RUNPOD_MAX_DOWNLOAD_BYTES",
        shown="5 GiB",
    )
    max_audio_seconds: float = _setting(
        12 * 3600.0, _number(1, 1e7), "Longest audio taken.", "WHISPER_MAX_AUDIO_SECONDS", shown="43200 (12 h)"
    )
    download_timeout: float = _setting(
        600.0, _number(1, 86400), "Time for one download, retries included.", "WHISPER_DOWNLOAD_TIMEOUT"
    )
    download_retries: int = _setting(
        3,
        _integer(0, 20),
        "Further attempts after a download that broke off; each resumes.",
        "WHISPER_DOWNLOAD_RETRIES",
    )
    max_redirects: int = _setting(5, _integer(0, 20), "Redirects followed; each is checked.", "WHISPER_MAX_REDIRECTS")
    allow_private_urls: bool = _setting(
        False,
        _flag,
        "Allow downloads from private, loopback and link-local addresses (inside a trusted network).",
        "WHISPER_ALLOW_PRIVATE_URLS",
        "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS",
    )
    decode_timeout: float = _setting(
        900.0, _number(1, 86400), "Time for ffmpeg to decode one file.", "WHISPER_DECODE_TIMEOUT"
    )
    tmp_dir: Path | None = _setting(
        None,
        _path,
        "Where job directories are made; they are removed with the job.",
        "WHISPER_TMPDIR",
        "TMPDIR",
        shown="the system's",
    )
    max_result_bytes: int = _setting(
        0,
        _integer(0, 1 << 40),
        "Largest JSON result sent back directly; above it the result goes to the bucket of `BUCKET_ENDPOINT_URL`, "
        "or the job fails saying its size.",
        "WHISPER_MAX_RESULT_BYTES",
        shown="the platform's: 10 MB, 20 MB for `/runsync`",
    )
    price_per_hour: float = _setting(
        0.0,
        _number(0, 1e6),
        "Price of this machine per hour; when set, receipts carry a cost.",
        "WHISPER_PRICE_PER_HOUR",
    )
    service_url: str | None = _setting(
        None,
        _text,
        "HTTP service that the `whisper` command sends its files to; unset: it transcribes them itself.",
        "WHISPER_SERVICE_URL",
        shown="none",
        secret=True,
    )
    service_key_file: Path | None = _setting(
        None,
        _path,
        "File with the key that the `whisper` command shows to that service.",
        "WHISPER_SERVICE_KEY_FILE",
        shown="none",
    )
    runtime_dir: Path | None = _setting(
        None,
        _path,
        "Where `whisper --keep-warm` keeps its socket; a directory of its own is made in it.",
        "WHISPER_RUNTIME_DIR",
        "XDG_RUNTIME_DIR",
        shown="the system's temporary directory",
    )
    api_keys: tuple[str, ...] = _setting(
        (),
        _words,
        "Keys, separated by commas, one of which a request to the HTTP or live service must show as its bearer token.",
        "WHISPER_API_KEYS",
        shown="none: open to all who reach it",
        secret=True,
    )
    cors_origins: tuple[str, ...] = _setting(
        (),
        _words,
        "Origins, separated by commas, whose web pages may call the HTTP service; `*` allows all.",
        "WHISPER_CORS_ORIGINS",
        shown="none",
    )
    max_requests: int = _setting(
        64,
        _integer(1, 100_000),
        "Requests with audio that the HTTP service holds at a time; further ones are told to come again.",
        "WHISPER_MAX_REQUESTS",
    )
    request_threads: int = _setting(
        16,
        _integer(1, 1024),
        "How many of those are transcribed side by side; their windows share batches.",
        "WHISPER_REQUEST_THREADS",
    )
    jobs_dir: Path | None = _setting(
        None,
        _path,
        "Where the HTTP service keeps the jobs of `/jobs`: on a volume, they outlive the machine. "
        "One service at a time may use it.",
        "WHISPER_JOBS_DIR",
        shown="one for each port, in the system's temporary directory",
    )
    max_jobs: int = _setting(
        1000, _integer(1, 1_000_000), "Jobs of `/jobs` that may wait; further ones are refused.", "WHISPER_MAX_JOBS"
    )
    job_ttl: float = _setting(
        86400.0, _number(1, 1e9), "Seconds for which the result of such a job is kept.", "WHISPER_JOB_TTL"
    )
    callback_secret: str | None = _setting(
        None,
        _text,
        "Signs the callbacks of `/jobs` (HMAC-SHA256); without it none are sent, and `callback_url` is refused.",
        "WHISPER_CALLBACK_SECRET",
        shown="none",
        secret=True,
    )
    drain_timeout: float = _setting(
        25.0,
        _number(0, 86400),
        "Seconds that the HTTP service, told to stop, gives to the work in hand. Jobs of `/jobs` that take "
        "longer are run again by the next process.",
        "WHISPER_DRAIN_TIMEOUT",
    )
    live_port: int = _setting(9090, _integer(0, 65535), "Port of the live service.", "WHISPERLIVE_PORT")
    health_port: int = _setting(
        9999, _integer(0, 65535), "Port on which the live service tells how it is.", "HEALTH_CHECK_PORT"
    )
    max_clients: int = _setting(
        4,
        _integer(1, 10_000),
        "Clients that the live service serves at a time; further ones are told to wait.",
        "MAX_CLIENTS",
    )
    max_connection_time: float = _setting(
        600.0, _number(0.1, 1e7), "Seconds after which a live client's session ends.", "MAX_CONNECTION_TIME"
    )
    live_recordings: Path | None = _setting(
        None,
        _path,
        "Directory in which the live service keeps the sound and the text of every session.",
        "WHISPER_LIVE_RECORDINGS",
        shown="none: nothing is kept",
    )
    log_format: str = _setting("text", _choice("text", "json"), "Log lines as text or JSON.", "LOG_FORMAT")
    log_level: str = _setting(
        "INFO",
        lambda value: _choice("debug", "info", "warning", "error")(value).upper(),
        "Least level logged.",
        "LOG_LEVEL",
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check all variables. Raises :class:`InvalidInput` that names the variable."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for spec in fields(cls):
            for variable in spec.metadata["variables"]:
                raw = environ.get(variable, "").strip()
                if not raw:
                    continue
                try:
                    values[spec.name] = spec.metadata["parse"](raw)
                except ValueError as error:
                    reason = str(error) if str(error).startswith("must") else "must be a number without a unit"
                    raise InvalidInput(f"The environment variable {variable} {reason}.") from error
                break
        return cls(**values)

    def for_child(self) -> dict[str, str]:
        """The environment in which a child process reads these very settings."""
        environ = dict(os.environ)
        for spec in fields(self):
            variable, value = spec.metadata["variables"][0], getattr(self, spec.name)
            environ.pop(variable, None)
            if value != spec.default:
                environ[variable] = ",".join(value) if isinstance(value, tuple) else str(value)
        return environ


def settings_table() -> str:
    """The Markdown table of README's settings section."""
    rows = ["| Variable | Default | Meaning |", "| --- | --- | --- |"]
    for spec in fields(Settings):
        variable, *others = spec.metadata["variables"]
        shown = spec.metadata["shown"]
        if shown is None:
            shown = (
                str(spec.default).lower()
                if isinstance(spec.default, bool)
                else f"{spec.default:g}"
                if isinstance(spec.default, float)
                else str(spec.default)
            )
        also = f" (also `{'`, `'.join(others)}`)" if others else ""
        rows.append(f"| `{variable}`{also} | {shown} | {spec.metadata['meaning']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(settings_table())
