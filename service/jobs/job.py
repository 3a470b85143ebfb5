"""A training job as values, and the one table of what may become of it.

In: rows of the store. Out: frozen values, and `check_move`, which refuses whatever is not in LEGAL. It knows no
database, no HTTP and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from model_core.errors import DualVisionError

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Action = Literal["pause", "cancel"]
Level = Literal["info", "warn", "error"]

STATUSES: tuple[Status, ...] = get_args(Status)
TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})

#: status -> what it may become. A claim of a job whose worker is lost stays `running`: a new attempt, no new status.
LEGAL: Mapping[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "paused", "cancelled", "failed", "succeeded"}),  # succeeded: a dry run
    "queued": frozenset({"running", "paused", "cancelled", "failed"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "validating_files", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
#: Stage of events that the store or a worker writes about the job itself; a trainer's stages count from 0.
JOB_STAGE = -1


class LeaseLostError(DualVisionError):
    """A worker wrote for a job that is not, or no longer, its own. It must end its child and write nothing more."""

    code = "lease_lost"


class IllegalMoveError(DualVisionError):
    """A transition outside LEGAL: a mistake of the program, never of a user."""

    code = "illegal_transition"


def check_move(before: Status, after: Status) -> None:
    """Raises IllegalMoveError."""
    if after not in LEGAL[before]:
        allowed = ", ".join(sorted(LEGAL[before])) or "nothing, it has ended"
        raise IllegalMoveError("a job can't go that way", value=f"{before} -> {after}", allowed=allowed)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What `Ledger.create` needs.

    config: the recipe as JSON for `parse_config`, ids of files in the place of paths (jobs/files.py: `place_files`).
    fusion: the request's own `fusion` object, echoed. num_gpus: the least that a worker must have; 0 any.
    resume_from: id of a checkpoint whose training state the job goes on from.
    body_hash: of the request, for idempotency; idempotency_key: the header's. is_retry: the client says that it asked
    before, so the same body of the same owner within ten minutes is the same job. request_id, traceparent: of the
    request that made it; the worker's log and traces go on from them.
    """

    owner: str
    model: str
    training_file: str
    config: Mapping[str, Any]
    seed: int
    validation_file: str | None = None
    suffix: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] | None = None
    fusion: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    priority: int = 0
    num_gpus: int = 0
    is_dry_run: bool = False
    resume_from: str | None = None
    body_hash: str = ""
    idempotency_key: str | None = None
    is_retry: bool = False
    request_id: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A row of the store. Times are seconds since 1970 by the database's clock.

    attempt: of training, from 1; 0 before the first. attempts_left: without progress. is_validated: files were read.
    requested_action: what a person wants of a job that a worker holds; done by that worker, or by the store once the
    lease has run out. num_switches: live mode switches asked for so far (`Ledger.switches`).
    stage, global_step, num_steps: how far training has come. attempt_at, start_step: when, and after which step, this
    attempt began. files: every file id that it reads.
    """

    seq: int
    id: str
    owner: str
    created_at: float
    status: Status
    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    fusion: dict[str, Any]
    config: dict[str, Any]
    files: list[str]
    priority: int
    num_gpus: int
    is_dry_run: bool
    is_validated: bool
    resume_from: str | None
    requested_action: Action | None
    num_switches: int
    version: int
    attempt: int
    attempts_left: int
    lease_owner: str | None
    lease_expires_at: float | None
    not_before: float
    started_at: float | None
    attempt_at: float | None
    progress_at: float | None
    finished_at: float | None
    stage: int | None
    global_step: int
    start_step: int
    num_steps: int | None
    trained_tokens: int | None
    freeze_table: Any
    fine_tuned_model: str | None
    result_files: list[str]
    error: dict[str, Any] | None
    request_id: str
    traceparent: str

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @property
    def is_held(self) -> bool:
        """A worker holds it, or held it and the store does not know yet that it is gone."""
        return self.lease_owner is not None

    @property
    def fine_tuned_name(self) -> str:
        """The id under which the result is served."""
        return fine_tuned_name(self.model, self.suffix, self.id)

    def checkpoint_name(self, step: int) -> str:
        """The id under which one checkpoint of this job is served."""
        return checkpoint_name(self.fine_tuned_name, step)


#: Of every job and every fine-tuned name: one server is one organisation.
ORGANISATION = "dve"


def fine_tuned_name(model: str, suffix: str | None, job_id: str) -> str:
    """`ft:{base}:{org}:{suffix}:{8 characters}`. Of a fine-tuned model it is that one's base."""
    base = model
    if base.startswith("ft:"):
        base = base.removeprefix("ft:").partition(":ckpt-step-")[0].rsplit(":", 3)[0]
    return f"ft:{base}:{ORGANISATION}:{suffix or ''}:{job_id[-8:]}"


def checkpoint_name(fine_tuned: str, step: int) -> str:
    return f"{fine_tuned}:ckpt-step-{step}"


@dataclass(frozen=True, slots=True)
class Lease:
    """What a worker writes under. `attempt` and `owner` fence it; `seconds` counts from before the claim was sent."""

    job_id: str
    attempt: int
    owner: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Claim:
    """A job and the lease on it. status `validating_files`: read its files, no GPU; `running`: train it."""

    job: Job
    lease: Lease


@dataclass(frozen=True, slots=True)
class NewEvent:
    """One line of a trainer's events, or a worker's own (stage JOB_STAGE). Unique by (stage, global_step, kind)."""

    stage: int
    global_step: int
    kind: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "info"


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event as it is kept; `seq` grows within a job in the order in which events became visible."""

    seq: int
    id: str
    job_id: str
    created_at: float
    stage: int
    global_step: int
    kind: str
    level: Level
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A complete `step-N` folder. `path` is the server's own and never shown."""

    step: int
    stage: int
    path: str
    reason: str
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    seq: int
    id: str
    job_id: str
    created_at: float
    step: int
    stage: int
    path: str
    reason: str
    metrics: dict[str, Any]
    model_id: str


@dataclass(frozen=True, slots=True)
class Switch:
    """A live mode switch: FreezeConfig's keys as `--control-fd` takes them. applied_step: None while it waits."""

    job_id: str
    number: int
    created_at: float
    freeze: dict[str, Any]
    applied_step: int | None


FilePurpose = Literal["fine-tune", "vision", "fine-tune-results"]
FileStatus = Literal["uploaded", "processed", "error"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's row. name: the client's word, which names nothing on the disk. path: relative to the data folder."""

    seq: int
    id: str
    owner: str
    created_at: float
    expires_at: float | None
    name: str
    purpose: FilePurpose
    num_bytes: int
    status: FileStatus
    status_details: str | None
    path: str


ModelStatus = Literal["publishing", "ready", "broken", "deleted"]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A fine-tuned model. path: its folder; base: the model id that it was made of; step: None for the end result."""

    seq: int
    id: str
    job_id: str
    created_at: float
    base: str
    path: str
    step: int | None
    status: ModelStatus
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    id: str
    host: str
    pid: int
    devices: list[Any]
    started_at: float
    seen_at: float
    job_id: str | None
