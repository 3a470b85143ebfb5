"""Log lines, JSON or plain, each with the request id or job id of the task that wrote it.

In: a format and a level. Out: configured `logging`, and two variables: the middleware sets `request_id_var`, the
worker `job_id_var`.
It refuses to know what users send: no prompt, image or answer is ever logged, and since an exception's
text may quote one, `log_failure` writes the exception's type and frames and keeps its text for DEBUG.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from typing import Literal, TextIO

from model_core.errors import DualVisionError

LogFormat = Literal["json", "plain"]

request_id_var: ContextVar[str] = ContextVar("dve_request_id", default="")
job_id_var: ContextVar[str] = ContextVar("dve_job_id", default="")

logger = logging.getLogger("dve")

#: Raised by torch and the operating system; their words are of shapes, devices and memory.
_TECHNICAL: tuple[type[BaseException], ...] = (RuntimeError, MemoryError, OSError)


class _Formatter(logging.Formatter):
    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._log_format = log_format

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_var.get():
            fields["request_id"] = request_id
        if job_id := job_id_var.get():
            fields["job_id"] = job_id
        fields.update(getattr(record, "fields", {}))
        if self._log_format == "json":
            return json.dumps(fields, default=str)
        head = f"{fields.pop('time')} {fields.pop('level'):<7} {fields.pop('logger')} {fields.pop('message')}"
        # json.dumps quotes control characters, so that no value can start a line of its own.
        tail = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in fields.items())
        return f"{head} {tail}".rstrip()


def configure_logs(log_format: LogFormat, level: str, stream: TextIO | None = None) -> None:
    """Replace the root handler. Called once, by the composition root."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(log_format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their lines tell nothing that ours do not, and httpx's hold URLs.
    for name in ("uvicorn.access", "httpx", "httpcore", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def log_fields(level: int, message: str, **fields: object) -> None:
    logger.log(level, message, extra={"fields": fields})


def log_load_failure(error: BaseException) -> None:
    """A model that does not load: our own error in its words, any other with its trace. No user has said a word yet."""
    if isinstance(error, DualVisionError):
        logger.error("the model could not be loaded: %s", error)
    else:
        trace = "".join(traceback.format_exception(error))
        log_fields(logging.ERROR, "the model could not be loaded", error=type(error).__name__, trace=trace)


def log_failure(message: str, error: BaseException) -> None:
    """An unexpected exception: type and frames as an error, its text only where it can't quote a user."""
    frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    fields: dict[str, object] = {"error": type(error).__name__, "frames": frames[-12:]}
    if isinstance(error, _TECHNICAL):
        fields["reason"] = str(error)[:300]
    log_fields(logging.ERROR, message, **fields)
    logger.debug("its text", exc_info=error, extra={"fields": {"text": str(error)}})
