"""Settings by role (server, jobs, worker): environment `DVE_*`, overridden by command-line flags, read once and frozen.

In: the environment and a dict of flags. Out: one object for each role that a process has. What two roles share they
read from the same variable. It refuses unknown `DVE_*` names (a typo is an error that lists what is allowed) and
settings that contradict each other.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model_core.errors import ConfigError

_MIB = 2**20
#: Of programs that ask a server; the server itself reads neither.
CLIENT_NAMES = frozenset({"DVE_URL", "DVE_API_KEY"})


def _refuse_no_folder(value: object) -> object:
    if value == "":  # as a path it would be the current folder
        raise ValueError("must name a folder")
    return value


def _read_secret(value: object) -> object:
    """A database's URL has a password in it, and a password's place is a file: `@FILE` is what stands there."""
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    try:
        text = Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {value[1:]} can't be read ({getattr(error, 'strerror', 'not text')})") from None
    if not text:
        raise ValueError(f"the file {value[1:]} is empty: write postgresql://... into it")
    return text


# What several roles read, told once.
_Host = Annotated[str, Field(min_length=1, description="address to listen on")]
_DataDir = Annotated[
    Path,
    BeforeValidator(_refuse_no_folder),
    Field(description="folder of what is kept: keys, files, jobs, fine-tuned models"),
]
_LogFormat = Annotated[Literal["json", "plain"], Field(description="one JSON object a line, or plain text")]
_LogLevel = Annotated[Literal["debug", "info", "warning", "error"], Field(description="least severe line written")]

_CONFIG = SettingsConfigDict(env_prefix="DVE_", frozen=True, extra="forbid", allow_inf_nan=False)


class JobSettings(BaseSettings):
    """The store of jobs and files, which server and worker share, and the quotas that the server keeps to."""

    model_config = _CONFIG
    #: The server alone reads these; they are no flags of a worker.
    QUOTAS: ClassVar = ("max_active_jobs_per_key", "max_upload_bytes", "max_file_bytes_per_key", "event_retention_days")

    data_dir: _DataDir = Path("data")
    database_url: Annotated[SecretStr | None, BeforeValidator(_read_secret)] = Field(
        None, description="PostgreSQL for the jobs, postgresql://..., or @FILE with that; none: SQLite in data_dir"
    )
    job_lease_seconds: float = Field(
        30.0, ge=0.5, le=3600, description="a worker that is silent for so long has lost its job"
    )
    job_max_attempts: int = Field(3, ge=1, le=1000, description="attempts of a job without progress before it fails")
    max_active_jobs_per_key: int = Field(1000, ge=1, description="jobs of one key that have not ended")
    max_upload_bytes: int = Field(512 * _MIB, ge=1024, description="largest file for training")
    max_file_bytes_per_key: int = Field(100 * 1024 * _MIB, ge=1024, description="all files of one key together")
    event_retention_days: float = Field(
        90.0, gt=0, description="events and checkpoints of a job are kept so long after its end"
    )


class WorkerSettings(BaseSettings):
    """`dve worker`: where it trains, and how it behaves there."""

    model_config = _CONFIG

    host: _Host = "127.0.0.1"
    worker_devices: str = Field("auto", min_length=1, description="auto, cpu, or GPU numbers with commas between: 0,1")
    worker_concurrency: int = Field(1, ge=1, le=64, description="trainers on each of these devices at once")
    worker_grace_seconds: float = Field(
        120.0, ge=0, description="time that a trainer gets to save, when a job or the worker is to stop"
    )
    worker_nice: int = Field(
        10, ge=0, le=19, description="priority that trainers on processors give up, as nice counts"
    )
    worker_metrics_port: int = Field(8001, ge=0, le=65535, description="port of the worker's /metrics; 0: none")
    log_format: _LogFormat = "plain"
    log_level: _LogLevel = "info"


class Settings(BaseSettings):
    """The server. Every field is `DVE_<FIELD>` in the environment and `--<field>` on the command line."""

    model_config = _CONFIG

    model: str | None = Field(
        None, min_length=1, description="hub id or folder of a dual checkpoint; none: the demo model"
    )
    qwen_model_name: str | None = Field(None, min_length=1, description="hub id or folder of a Qwen2.5-VL")
    dinov2_model_name: str | None = Field(None, min_length=1, description="hub id or folder of a DINOv2")
    host: _Host = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    data_dir: _DataDir = Path("data")
    api_keys: SecretStr | None = Field(
        None, description="hashed keys as SCOPE:SHA256, separated by commas, or @FILE with one a line"
    )
    public_paths: str = Field(
        "/metrics,/openapi.json",
        pattern=r"^(|(/metrics|/openapi\.json)(,(/metrics|/openapi\.json))*)$",
        description="of /metrics and /openapi.json, those that take no key; the probes never do",
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
    preprocess_workers: int = Field(2, ge=1, le=64, description="threads that decode pictures")
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="tokens of one engine step; long prompts come in chunks"
    )
    max_encode_tokens: int | None = Field(
        None, ge=1, description="image tokens that one pass of the encoders computes; none: 256 on a CPU, 4096 on a GPU"
    )
    encode_window_seconds: float = Field(
        0.0, ge=0, le=1, description="while others are answered, a picture waits so long for company in the encoders"
    )
    max_context_tokens: int | None = Field(
        None, ge=1, description="longest prompt with its answer; none: the model's, or what a derived KV cache holds"
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="KV cache, prefixes included; none: 1 GiB on a CPU, 85 % of what a GPU has free"
    )
    variant_memory_bytes: int | None = Field(
        None, ge=0, description="fine-tuned models in memory beside the base; none: 2 GiB, or an eighth of a free GPU"
    )
    encoder_cache_bytes: int = Field(256 * _MIB, ge=0, description="features of pictures seen before; 0: none are kept")
    max_body_bytes: int = Field(48 * _MIB, ge=1024, description="largest request body")
    max_image_pixels: int = Field(36_000_000, ge=784, description="largest image, width times height")
    max_visual_tokens: int = Field(16_384, ge=1, description="vision tokens of one request's images together")
    allowed_media_domains: str = Field(
        "", description="hosts that images are fetched from: a.com, *.a.com, *, http://a.com"
    )
    request_timeout_seconds: float = Field(600.0, ge=0.1, description="a request's whole time, queueing included")
    shutdown_timeout_seconds: float = Field(30.0, ge=0, description="time that running requests get at shutdown")
    log_format: _LogFormat = "plain"
    log_content: bool = Field(
        False, description="write what chats ask and answer into the log; otherwise it holds no word of either"
    )
    log_level: _LogLevel = "info"

    def no_key_paths(self) -> tuple[str, ...]:
        return tuple(path for path in self.public_paths.split(",") if path)

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        names = (self.qwen_model_name, self.dinov2_model_name)
        if self.model and any(names):
            raise ValueError(
                f"model={self.model!r} contradicts qwen_model_name={names[0]!r}, dinov2_model_name={names[1]!r}: "
                "give one checkpoint or a pair of names, not both"
            )
        if any(names) and not all(names):
            raise ValueError(
                f"qwen_model_name={names[0]!r} and dinov2_model_name={names[1]!r} are a pair: give the other one too"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} can't hold one token of each of "
                f"max_num_seqs={self.max_num_seqs} requests: raise the first or lower the second"
            )
        if self.log_content and self.log_level in ("warning", "error"):
            raise ValueError(
                f"log_content={self.log_content} with log_level={self.log_level!r}: content stands in the access log, "
                "whose lines are of level info; lower the second or switch off the first"
            )
        return self


#: All of them, in the order in which they are shown.
ROLES = (Settings, JobSettings, WorkerSettings)
SERVER_NAMES = tuple(dict.fromkeys((*Settings.model_fields, *JobSettings.model_fields)))
WORKER_NAMES = tuple(
    name
    for name in dict.fromkeys((*WorkerSettings.model_fields, *JobSettings.model_fields))
    if name not in JobSettings.QUOTAS
)
_Role = TypeVar("_Role", Settings, JobSettings, WorkerSettings)


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for one that it starts, without the settings: it is told what it needs."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("DVE_")}
    return kept | changes


def load_settings(
    flags: Mapping[str, object] | None = None, assignments: Sequence[str] = ()
) -> tuple[Settings, JobSettings]:
    """A server's. Flags and assignments (`name=value`) over environment over defaults.

    Raises ConfigError, in one readable line.
    """
    given = _with_model_choice(_given(flags or {}, assignments, SERVER_NAMES))
    return _read(Settings, given), _read(JobSettings, given)


def load_worker_settings(
    flags: Mapping[str, object] | None = None, assignments: Sequence[str] = ()
) -> tuple[WorkerSettings, JobSettings]:
    """A worker's, likewise. Raises ConfigError."""
    given = _given(flags or {}, assignments, WORKER_NAMES)
    return _read(WorkerSettings, given), _read(JobSettings, given)


def _read(role: type[_Role], given: Mapping[str, object]) -> _Role:
    try:
        return role(**{name: value for name, value in given.items() if name in role.model_fields})  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError(
            "; ".join(_line(e["loc"], e["msg"], e["input"]) for e in error.errors()),
            fix="Change it in the environment or on the command line; `dve serve --help` and `dve worker --help` tell "
            "what each setting takes",
        ) from None


def load_all_settings(assignments: Sequence[str] = ()) -> tuple[Settings, JobSettings, WorkerSettings]:
    """Of server and worker, for who looks at both (`dve doctor`). Raises ConfigError."""
    names = [assignment.partition("=")[0].strip().replace("-", "_") for assignment in assignments]
    of_worker = [one for one, name in zip(assignments, names, strict=True) if name in WORKER_NAMES]
    # What neither knows is refused in the server's name.
    of_server = [
        one for one, name in zip(assignments, names, strict=True) if one not in of_worker or name in SERVER_NAMES
    ]
    settings, jobs = load_settings({}, of_server)
    return settings, jobs, load_worker_settings({}, of_worker)[0]


def wants_tracing() -> bool:
    """Whether OpenTelemetry's own variables say where traces go. Raises ConfigError for a way that is not built in."""
    given = os.environ.get
    endpoints = (given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), given("OTEL_EXPORTER_OTLP_ENDPOINT"))
    if not any(endpoints) or (given("OTEL_SDK_DISABLED") or "").strip().lower() == "true":
        return False
    exporter = given("OTEL_TRACES_EXPORTER") or "otlp"
    if exporter == "none":
        return False
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    ways = [("OTEL_TRACES_EXPORTER", exporter, "otlp"), *((name, given(name), "http/protobuf") for name in protocols)]
    for name, value, allowed in ways:
        if value and value != allowed:
            raise ConfigError(
                f"{name} asks for a way that this program does not send traces", value=value, allowed=allowed,
                fix="Leave it out, or set OTEL_SDK_DISABLED=true for no traces",
            )  # fmt: skip
    return True


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


def _given(flags: Mapping[str, object], assignments: Sequence[str], names: Sequence[str]) -> dict[str, object]:
    """What the command line says, checked against `names`; what the environment says is checked beside it."""
    _refuse_unknown_names(os.environ)
    given = dict(flags)
    for name in given:
        if name not in names:
            raise _unknown_name("there is no such setting", name, names)
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or name not in names:
            raise _unknown_name("--set names no setting", name, names)
        if name in given:
            raise ConfigError(
                f"the setting {name} is given twice",
                value=f"{_shown(name, given[name])} and {_shown(name, value)}",
                allowed="once on the command line",
                fix="Leave one of the two out",
            )
        given[name] = value
    return given


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
    known = {f"DVE_{name}".upper() for role in ROLES for name in role.model_fields} | CLIENT_NAMES
    for name in environment:
        if name.upper().startswith("DVE_") and name.upper() not in known:
            raise _unknown_name("unknown setting in the environment", name.upper(), sorted(known))


def _unknown_name(what: str, name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"Perhaps {near[0]} was meant" if near else "Leave it out"
    return ConfigError(what, value=name, allowed=", ".join(known), fix=fix)
