"""Settings of the server: environment `DVE_*`, overridden by command-line flags, read once and frozen.

In: the environment and a dict of flags. Out: one `Settings`. It refuses unknown `DVE_*` names (a typo
is an error that lists what is allowed) and settings that contradict each other.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from model_core.errors import ConfigError

_MIB = 2**20


class Settings(BaseSettings):
    """Every field is `DVE_<FIELD>` in the environment and `--<field>` on the command line."""

    model_config = SettingsConfigDict(env_prefix="DVE_", frozen=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, min_length=1, description="checkpoint folder; none: the demo model")
    qwen_model_name: str | None = Field(None, min_length=1, description="hub id or folder of a Qwen2.5-VL")
    dinov2_model_name: str | None = Field(None, min_length=1, description="hub id or folder of a DINOv2")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    data_dir: Path = Field(Path("data"), description="folder of what the server keeps: keys, files, jobs")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
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
    log_format: Literal["json", "plain"] = Field("plain", description="one JSON object a line, or plain text")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line written")

    @field_validator("data_dir", mode="before")
    @classmethod
    def _refuse_no_folder(cls, value: object) -> object:
        if value == "":  # as a path it would be the current folder
            raise ValueError("must name a folder")
        return value

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
        return self


def load_settings(flags: Mapping[str, object] | None = None) -> Settings:
    """Flags over environment over defaults. Raises ConfigError with one readable line."""
    _refuse_unknown_names(os.environ)
    try:
        return Settings(**_with_model_choice(dict(flags or {})))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigError("; ".join(_line(e["loc"], e["msg"], e["input"]) for e in error.errors())) from None


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
    return f"{'.'.join(map(str, loc))}: {message} (got {value!r})" if loc else message


def _refuse_unknown_names(environment: Mapping[str, str]) -> None:
    known = {f"DVE_{name}".upper() for name in Settings.model_fields}
    for name in environment:
        if name.upper().startswith("DVE_") and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            raise ConfigError(
                "unknown setting in the environment",
                value=name,
                allowed=", ".join(sorted(known)),
                fix=f"Perhaps {near[0]} was meant" if near else "Unset it",
            )
