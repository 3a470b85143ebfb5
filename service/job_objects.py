"""Rows of the store as OpenAI's objects: jobs, events, checkpoints, files. Every field is there, null where empty.

In: records. Out: JSON objects. It refuses to show what is the server's own: paths, leases, owners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.jobs.job import ORGANISATION, Checkpoint, FileRecord, Job, JobEvent

_METRIC_KINDS = ("step", "evaluation")
#: OpenAI's names of what a trainer reports.
_METRICS: Mapping[str, tuple[str, ...]] = {
    "train_loss": ("train_loss", "loss"),
    "train_mean_token_accuracy": ("train_mean_token_accuracy", "accuracy"),
    "valid_loss": ("valid_loss", "val_loss"),
    "valid_mean_token_accuracy": ("valid_mean_token_accuracy", "val_accuracy"),
    "full_valid_loss": ("full_valid_loss", "val_loss"),
    "full_valid_mean_token_accuracy": ("full_valid_mean_token_accuracy", "val_accuracy"),
}


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`, with where it stands under `fusion`."""
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": int(job.created_at),
        "finished_at": _whole(job.finished_at),
        "estimated_finish": _whole(estimated_finish(job)),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": f"org-{ORGANISATION}",
        "status": job.status,
        "hyperparameters": job.hyperparameters,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "error": job.error,
        "seed": job.seed,
        "user_provided_suffix": job.suffix,
        "integrations": None,
        "metadata": job.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": job.hyperparameters}},
        "fusion": {
            **job.fusion,
            "stage": job.stage,
            "progress": progress_object(job),
            "attempt": job.attempt,
            "requested_action": job.requested_action,
            "freeze_table": job.freeze_table,
        },
    }


def progress_object(job: Job) -> dict[str, Any]:
    """How far training is; `ratio` is null until the number of steps is known."""
    ratio = min(job.global_step / job.num_steps, 1.0) if job.num_steps else None
    return {"global_step": job.global_step, "num_steps": job.num_steps, "ratio": ratio}


def estimated_finish(job: Job) -> float | None:
    """At the pace of this attempt; None unless it runs and has made steps."""
    if job.status != "running" or not job.num_steps or job.progress_at is None or job.attempt_at is None:
        return None
    done = job.global_step - job.start_step
    if done <= 0:
        return None
    pace = (job.progress_at - job.attempt_at) / done
    return job.progress_at + pace * max(job.num_steps - job.global_step, 0)


def event_object(event: JobEvent) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.event`: type `metrics` for steps and evaluations, whose figures are in `data`."""
    is_metrics = event.kind in _METRIC_KINDS
    data: dict[str, Any] = {"kind": event.kind, **event.data}
    if event.stage >= 0:
        data |= {"stage": event.stage, "step": event.global_step}
    if is_metrics:
        data |= {name: value for name, value in _metrics(event.data).items() if value is not None}
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if is_metrics else "message",
        "data": data,
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.checkpoint`; `fusion` holds what else was measured at it."""
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": int(checkpoint.created_at),
        "fine_tuned_model_checkpoint": checkpoint.model_id,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **_metrics(checkpoint.metrics)},
        "fusion": {"stage": checkpoint.stage, "reason": checkpoint.reason, "metrics": checkpoint.metrics},
    }


def _metrics(data: Mapping[str, Any]) -> dict[str, float | None]:
    def first(names: tuple[str, ...]) -> float | None:
        found = (data.get(name) for name in names)
        return next((float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)), None)

    return {name: first(names) for name, names in _METRICS.items()}


def file_object(record: FileRecord) -> dict[str, Any]:
    """OpenAI's `file`."""
    return {
        "object": "file",
        "id": record.id,
        "bytes": record.num_bytes,
        "created_at": int(record.created_at),
        "expires_at": _whole(record.expires_at),
        "filename": record.name,
        "purpose": record.purpose,
        "status": record.status,
        "status_details": record.status_details,
    }


def list_object(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's page of a list."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
