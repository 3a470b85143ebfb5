"""What a trainer's end means for its job: its exit code and the last thing it complained of, as one verdict.

Pure. The codes are those of the API's `error.code`.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model_core.errors import DualVisionError
from service.supervisor.process import BAD_INPUT, CHECKPOINTED, DEADLINE_PASSED, DONE, STORAGE_FULL

ERROR_CODES = frozenset(
    {
        "invalid_file_format", "invalid_training_file", "image_unreadable", "bad_sample_budget_exceeded",
        "model_not_found", "out_of_memory", "nan_loss", "worker_lost", "attempts_exhausted", "checkpoint_corrupt",
        "storage_full", "checkpoint_mismatch", "internal_error",
    }
)  # fmt: skip

#: In the place of an unexpected exception's text, which may quote anything; the trainer's log has it.
BROKEN = "The trainer broke in a way that it does not know. Its log on the worker has the details."
_FULL = "The disk is full. Free some room and resume from the last checkpoint."
_ALIASES = {"checkpoint_incomplete": "checkpoint_corrupt", "invalid_config": "invalid_training_file"}

End = Literal["succeeded", "stopped", "failed", "retry", "postponed"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """end: succeeded, stopped (saved and left when asked to), failed (trying again is no use), retry, postponed."""

    end: End
    code: str = ""
    message: str = ""


def judge(exit_code: int, complaint: Mapping[str, Any] | None, message: str = "") -> Verdict:
    """complaint, message: the data and text of the trainer's last "error" event."""
    if exit_code == DONE:
        return Verdict("succeeded")
    if exit_code == CHECKPOINTED:
        return Verdict("stopped")
    told = complaint or {}
    code = str(told.get("code", ""))
    message = BROKEN if code == "internal_error" else message
    code = _ALIASES.get(code, code)
    code = code if code in ERROR_CODES else ""
    if exit_code == BAD_INPUT:
        return Verdict("failed", code or "invalid_training_file", message or "The recipe or the data was refused.")
    if exit_code == DEADLINE_PASSED:
        return Verdict("retry", "worker_lost", "The trainer stopped: its supervisor did not extend its deadline.")
    # A full disk is no passing thing either, and an attempt that fills it again may take others along. What the trainer
    # said of it may not have found room: its exit code is enough.
    if exit_code == STORAGE_FULL:
        return Verdict("failed", "storage_full", message if code == "storage_full" else _FULL)
    if told.get("retry") is False or code == "storage_full":
        return Verdict("failed", code or "internal_error", message or "The trainer failed.")
    return Verdict("retry", code or "worker_lost", message or _how_it_ended(exit_code))


def of_os_error(error: OSError) -> Verdict:
    """What the supervisor itself could not write or start."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Verdict("failed", "storage_full", _FULL)
    return Verdict("retry", "internal_error", f"The attempt could not be prepared: {error.strerror or error}.")


def of_refusal(error: DualVisionError) -> Verdict:
    """An error of ours, in its own words: the recipe or a file that can't be used."""
    if error.code == "storage_full":
        return Verdict("failed", "storage_full", str(error))
    code = _ALIASES.get(error.code, error.code)
    return Verdict("failed", code if code in ERROR_CODES else "invalid_training_file", str(error))


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"The trainer ended with exit code {exit_code} and said nothing."
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; the system kills a process so when memory runs out" if name == "SIGKILL" else ""
    return f"The trainer was ended by {name}{hint}."


def backoff_seconds(failures: int, *, base: float, limit: float) -> float:
    """Doubled for each failure in a row: base, 2 base, 4 base ... up to the limit."""
    return min(base * 2.0 ** min(max(failures - 1, 0), 30), limit)
