"""Settings of the server: environment `DVE_*`, overridden by command-line flags, read once and frozen.

In: the environment and a dict of flags. Out: one `Settings`. It refuses unknown `DVE_*` names (a typo
is an error that lists what is allowed) and settings that contradict each other.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model_core.errors import ConfigError

_MIB = 2**20
#: Of programs that ask a server; the server itself reads neither.
CLIENT_NAMES = frozenset({"DVE_URL", "DVE_API_KEY"})


class Settings(BaseSettings):
    """Every field is `DVE_<FIELD>` in the environment and `--<field>` on the command line."""

    model_config = SettingsConfigDict(env_prefix="DVE_", frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, min_length=1, description="checkpoint folder; none: the demo model")
    qwen_model_name: str | None = Field(None, min_length=1, description="hub id or folder of a Qwen2.5-VL")
    dinov2_model_name: str | None = Field(None, min_length=1, description="hub id or folder of a DINOv2")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    data_dir: Path = Field(Path("data"), description="folder of what the server keeps: keys, files, jobs")
    database_url: SecretStr | None = Field(
        None, description="PostgreSQL for the jobs, postgresql://..., or @FILE with that; none: SQLite in data_dir"
    )
    job_lease_seconds: float = Field(
        30.0, ge=0.5, le=3600, description="a worker that is silent for so long has lost its job"
    )
    job_max_attempts: int = Field(3, ge=1, le=1000, description="attempts of a job without progress before it fails")
    max_active_jobs_per_key: int = Field(1000, ge=1, description="jobs of one key that have not ended")
    max_upload_bytes: int = Field(512 * _MIB, ge=1024, description="largest file for training")
    max_file_bytes_per_key: int = Field(100 * 1024 * _MIB, ge=1024, description="all files of one key together")
    event_retention_days: float = Field(90.0, gt=0, description="events of a job are kept so long after its end")
    api_keys: SecretStr | None = Field(
        None, description="hashed keys as SCOPE:SHA256, separated by commas, or @FILE with one a line"
    )
    public_paths: str = Field(
        "/metrics,/openapi.json",
        pattern=r"^(|(/metrics|/openapi\.json)(,(/metrics|/openapi\.json))*)$",
        description="of /metrics and /openapi.json, those that take no key; the probes and /ui never do",
    )
    key_requests_per_minute: int = Field(
        0, ge=0, le=1_000_000, description="requests a minute of one key; one more is refused (429); 0: no limit"
    )
    key_max_concurrent: int = Field(
        0, ge=0, le=100_000, description="requests of one key that run or wait at once; 0: no limit"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: the checkpoint's own")
    max_num_seqs: int = Field(16, ge=1, le=4096, description="requests that run at once")
    max_waiting: int = Field(64, ge=0, le=100_000, description="requests that may wait; one more is refused (503)")
    max_waiting_bytes: int = Field(
        256 * _MIB, ge=1024, description="bodies of requests that wait, together; beyond it one more is refused (503)"
    )
    preprocess_workers: int = Field(2, ge=1, le=64, description="threads that decode pictures")
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="tokens of one engine step; long prompts come in chunks"
    )
    max_encode_tokens: int = Field(4096, ge=1, description="image tokens of one pass of the encoders")
    encode_window_seconds: float = Field(
        0.0, ge=0, le=1, description="while others are answered, a picture waits so long for company in the encoders"
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="KV cache; none: 1 GiB on a CPU, 85 % of what a GPU has free"
    )
    variant_memory_bytes: int | None = Field(
        None, ge=0, description="fine-tuned models in memory beside the base; none: 2 GiB, or an eighth of a free GPU"
    )
    encoder_cache_bytes: int = Field(256 * _MIB, ge=0, description="features of pictures seen before; 0: none are kept")
    enable_prefix_caching: bool = Field(True, description="keep keys and values of prompts for those that begin alike")
    max_body_bytes: int = Field(48 * _MIB, ge=1024, description="largest request body")
    max_images: int = Field(16, ge=1, le=1024, description="images in one request")
    max_image_bytes: int = Field(20 * _MIB, ge=64, description="largest encoded image")
    max_image_pixels: int = Field(36_000_000, ge=784, description="largest image, width times height")
    max_visual_tokens: int = Field(16_384, ge=1, description="vision tokens of one request's images together")
    allowed_media_domains: str = Field(
        "", description="hosts that images are fetched from: a.com, *.a.com, *, http://a.com"
    )
    request_timeout_seconds: float = Field(600.0, gt=0, description="a request's whole time, queueing included")
    stall_timeout_seconds: float = Field(120.0, gt=0, description="/health/live fails after so long without progress")
    shutdown_timeout_seconds: float = Field(30.0, ge=0, description="time that running requests get at shutdown")
    batch_window_seconds: float = Field(0.005, ge=0, le=1, description="an idle engine waits so long for company")
    worker_devices: str = Field("auto", min_length=1, description="auto, cpu, or GPU numbers with commas between: 0,1")
    worker_concurrency: int = Field(1, ge=1, le=64, description="trainers on each of these devices at once")
    worker_grace_seconds: float = Field(
        120.0, ge=0, description="time that a trainer gets to save, when a job or the worker is to stop"
    )
    worker_nice: int = Field(
        10, ge=0, le=19, description="priority that trainers on processors give up, as nice counts"
    )
    worker_metrics_port: int = Field(8001, ge=0, le=65535, description="port of the worker's /metrics; 0: none")
    log_format: Literal["json", "plain"] = Field("plain", description="one JSON object a line, or plain text")
    log_content: bool = Field(
        False, description="write what chats ask and answer into the log; otherwise it holds no word of either"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line written")

    def no_key_paths(self) -> tuple[str, ...]:
        return tuple(path for path in self.public_paths.split(",") if path)

    @field_validator("data_dir", mode="before")
    @classmethod
    def _refuse_no_folder(cls, value: object) -> object:
        if value == "":  # as a path it would be the current folder
            raise ValueError("must name a folder")
        return value

    @field_validator("database_url", mode="before")
    @classmethod
    def _read_database_url(cls, value: object) -> object:
        """It has a password in it, and a password's place is a file."""
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        try:
            text = Path(value[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the file {value[1:]} can't be read ({getattr(error, 'strerror', 'not text')})") from None
        if not text:
            raise ValueError(f"the file {value[1:]} is empty: write postgresql://... into it")
        return text

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        names = (self.qwen_model_name, self.dinov2_model_name)
        if self.model and any(names):
            raise ValueError(
                f"model={self.model!r} contradicts qwen_model_name={names[0]!r}, dinov2_model_name={names[1]!r}: "
                "give a checkpoint folder or a pair of names, not both"
            )
        if any(names) and not all(names):
            raise ValueError(
                f"qwen_model_name={names[0]!r} and dinov2_model_name={names[1]!r} are a pair: give the other one too"
            )
        needed = 4 * -(-self.max_image_bytes // 3)
        if needed > self.max_body_bytes:
            raise ValueError(
                f"max_image_bytes={self.max_image_bytes} needs a body of {needed} bytes in base64, but "
                f"max_body_bytes={self.max_body_bytes}: raise the second or lower the first"
            )
        if self.max_body_bytes > self.max_waiting_bytes:
            raise ValueError(
                f"max_body_bytes={self.max_body_bytes} is over max_waiting_bytes={self.max_waiting_bytes}: "
                "the largest body would always be refused; raise the second or lower the first"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} can't hold one token of each of "
                f"max_num_seqs={self.max_num_seqs} requests: raise the first or lower the second"
            )
        if self.batch_window_seconds >= self.request_timeout_seconds:
            raise ValueError(
                f"batch_window_seconds={self.batch_window_seconds} is not below "
                f"request_timeout_seconds={self.request_timeout_seconds}: every request would time out"
            )
        if self.log_content and self.log_level in ("warning", "error"):
            raise ValueError(
                f"log_content={self.log_content} with log_level={self.log_level!r}: content stands in the access log, "
                "whose lines are of level info; lower the second or switch off the first"
            )
        return self


#: What `dve worker` listens to; of these the server alone has no use for `WORKER_ONLY`.
WORKER_FIELDS = (
    "data_dir", "database_url", "host", "job_lease_seconds", "job_max_attempts", "worker_devices", "worker_concurrency",
    "worker_grace_seconds", "worker_nice", "worker_metrics_port", "log_format", "log_level",
)  # fmt: skip
WORKER_ONLY = tuple(name for name in WORKER_FIELDS if name.startswith("worker_"))


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for one that it starts, without the settings: it is told what it needs."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("DVE_")}
    return kept | changes


def load_settings(flags: Mapping[str, object] | None = None, assignments: Sequence[str] = ()) -> Settings:
    """Flags and assignments (`name=value`) over environment over defaults. Raises ConfigError, in one readable line."""
    _refuse_unknown_names(os.environ)
    try:
        return Settings(**_with_model_choice(_assign(dict(flags or {}), assignments)))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("; ".join(_line(e["loc"], e["msg"], e["input"]) for e in error.errors())) from None


def client_access() -> tuple[str, str | None]:
    """For programs that ask a server (`dve jobs`): its URL, and the key to show it. Raises ConfigError."""
    _refuse_unknown_names(os.environ)
    own = Settings.model_fields
    host = os.environ.get("DVE_HOST") or own["host"].default
    port = os.environ.get("DVE_PORT") or own["port"].default
    # What listens everywhere is asked here.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return os.environ.get("DVE_URL") or url, os.environ.get("DVE_API_KEY") or None


def _assign(flags: dict[str, object], assignments: Sequence[str]) -> dict[str, object]:
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or name not in Settings.model_fields:
            raise _unknown_name("--set names no setting", name, list(Settings.model_fields))
        if name in flags:
            raise ConfigError(
                f"the setting {name} is given twice",
                value=f"{_shown(name, flags[name])} and {_shown(name, value)}",
                allowed="once on the command line",
            )
        flags[name] = value
    return flags


def _shown(name: object, value: object) -> str:
    """Somebody may have put the key itself where its hash belongs; a database's URL has a password in it."""
    return "(not shown)" if name in ("api_keys", "database_url") else repr(value)


def _with_model_choice(flags: dict[str, object]) -> dict[str, object]:
    """Flags that name a model one way switch off an environment that names it the other way."""
    if "model" in flags:
        flags.setdefault("qwen_model_name", None)
        flags.setdefault("dinov2_model_name", None)
    elif "qwen_model_name" in flags or "dinov2_model_name" in flags:
        flags["model"] = None
    return flags


def _line(loc: tuple[int | str, ...], message: str, value: object) -> str:
    message = message.removeprefix("Value error, ")
    return f"{'.'.join(map(str, loc))}: {message} (got {_shown(loc[0], value)})" if loc else message


def _refuse_unknown_names(environment: Mapping[str, str]) -> None:
    known = {f"DVE_{name}".upper() for name in Settings.model_fields} | CLIENT_NAMES
    for name in environment:
        if name.upper().startswith("DVE_") and name.upper() not in known:
            raise _unknown_name("unknown setting in the environment", name.upper(), sorted(known))


def _unknown_name(what: str, name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"Perhaps {near[0]} was meant" if near else "Leave it out"
    return ConfigError(what, value=name, allowed=", ".join(known), fix=fix)


def settings_table(settings: Settings) -> str:
    """A page of Markdown: every field, the value that holds, what is allowed, what it means."""
    values = settings.model_dump(mode="json")
    rows = [
        f"| `{name}` | {_plain(values[name])} | {', '.join(_allowed(schema))} | {schema['description']} |"
        for name, schema in Settings.model_json_schema()["properties"].items()
    ]
    return _TABLE_HEAD + "\n".join(rows) + "\n"


_TABLE_HEAD = """# Settings

Written by `dve serve --print-config --format table`. Each is a flag of `dve serve` (`--port 8123`, `--set port=8123`),
those that begin with `worker_` of `dve worker`; it wins over the environment variable (`DVE_PORT=8123`).

| setting | value | allowed | meaning |
|---|---|---|---|
"""


_KINDS = {"boolean": "true, false", "null": "none", "string": "text"}


def _plain(value: object) -> str:
    if value is None or value == "":
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _allowed(schema: Mapping[str, Any]) -> Iterator[str]:
    for choice in schema.get("anyOf", [schema]):
        if "enum" in choice:
            yield from choice["enum"]
        elif choice["type"] in ("integer", "number"):
            yield _range(choice)
        else:
            yield _KINDS.get(choice["type"], choice["type"])


def _range(schema: Mapping[str, Any]) -> str:
    if "exclusiveMinimum" in schema:
        return f"over {schema['exclusiveMinimum']}"
    if "maximum" in schema:
        return f"{schema.get('minimum', '')} to {schema['maximum']}".strip()
    return f"{schema['minimum']} or more" if "minimum" in schema else "any number"
