"""Log lines, JSON or plain, each with the ids of the request, the job and the trace that its task works on.

In: a format and a level. Out: configured `logging`, and three variables: the middleware sets `request_id_var` and
`trace_id_var`, the worker `job_id_var` and those of the request that made the job.
A line of any process is one object: time (UTC), level, logger, process and message, then the ids that there are, then
fields of its own. `process` is server, worker or trainer; the trainer's lines are its events, told by its worker.
It refuses to know what users send: no prompt, image or answer is ever logged, and since an exception's
text may quote one, `log_failure` writes the exception's type and frames and keeps its text for DEBUG.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Literal, TextIO

from model_core.errors import DualVisionError

LogFormat = Literal["json", "plain"]

request_id_var: ContextVar[str] = ContextVar("dve_request_id", default="")
job_id_var: ContextVar[str] = ContextVar("dve_job_id", default="")
trace_id_var: ContextVar[str] = ContextVar("dve_trace_id", default="")
_IDS = (("request_id", request_id_var), ("job_id", job_id_var), ("trace_id", trace_id_var))

logger = logging.getLogger("dve")

#: Raised by torch and the operating system; their words are of shapes, devices and memory.
_TECHNICAL: tuple[type[BaseException], ...] = (RuntimeError, MemoryError, OSError)


class _Formatter(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def __init__(self, log_format: LogFormat, process: str) -> None:
        super().__init__()
        self._log_format, self._process = log_format, process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, variable in _IDS if (value := variable.get())}
        fields.update(getattr(record, "fields", {}))
        if record.exc_info and "frames" not in fields:
            # Of a library's own line: where it happened, not what its text may quote.
            fields |= exception_fields(record.exc_info[1])
        if self._log_format == "json":
            return json.dumps(fields, default=str)
        del fields["process"]
        head = f"{fields.pop('time')} {fields.pop('level'):<7} {fields.pop('logger')} {fields.pop('message')}"
        # json.dumps quotes control characters, so that no value can start a line of its own.
        tail = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in fields.items())
        return f"{head} {tail}".rstrip()


def configure_logs(log_format: LogFormat, level: str, stream: TextIO | None = None, *, process: str = "server") -> None:
    """Replace the root handler. Called once, by the composition root. Python's warnings become lines too."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(log_format, process))
    logging.captureWarnings(True)
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


def exception_fields(error: BaseException | None) -> dict[str, object]:
    """Type and frames; its text only where it can't quote a user."""
    if error is None:
        return {}
    frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    fields: dict[str, object] = {"error": type(error).__name__, "frames": frames[-12:]}
    if isinstance(error, _TECHNICAL):
        fields["reason"] = str(error)[:300]
    return fields


def log_failure(message: str, error: BaseException) -> None:
    """An unexpected exception, as an error."""
    log_fields(logging.ERROR, message, **exception_fields(error))
    logger.debug("its text", exc_info=error, extra={"fields": {"text": str(error)}})
