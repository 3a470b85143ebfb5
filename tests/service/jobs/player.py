"""A worker without a trainer: it plays a job's life through the store, step by step, as a test tells it."""

from __future__ import annotations

from typing import Any

from service.jobs.job import Claim, Job, NewCheckpoint, NewEvent, NewJob
from service.jobs.store import Store

FREEZE_TABLE = {"rows": [{"component": "gate", "state": "TRAINS"}, {"component": "llm", "state": "FROZEN"}]}


def add_file(store: Store, file_id: str = "file-1", owner: str = "me", **more: Any) -> str:
    """A row alone: the store looks at no disk."""
    values: dict[str, Any] = {"purpose": "fine-tune", "num_bytes": 10, "path": f"files/fine-tune/{file_id}"}
    store.files.add(file_id, owner, "train.jsonl", **{**values, "status": "processed", **more})
    return file_id


def new_job(file_id: str = "file-1", **more: Any) -> NewJob:
    values: dict[str, Any] = {
        "owner": "me", "model": "base/model:1", "training_file": file_id, "config": {}, "seed": 7, "files": (file_id,),
    }  # fmt: skip
    return NewJob(**{**values, **more})


class Player:
    """One worker of a store; `claim` first, then what a trainer would report."""

    def __init__(self, store: Store, name: str = "w", num_gpus: int = 0) -> None:
        self.store, self.name, self.num_gpus = store, name, num_gpus
        self.claimed: Claim | None = None
        self.step_now = 0

    @property
    def held(self) -> Claim:
        assert self.claimed is not None, "the player holds no job"
        return self.claimed

    def claim(self, **more: Any) -> Job | None:
        self.claimed = self.store.leases.claim(self.name, num_gpus=self.num_gpus, **more)
        return self.claimed.job if self.claimed else None

    def start(self) -> Job:
        """Through validation to training, whatever is first in the queue."""
        job = self.claim()
        assert job is not None, "nothing to claim"
        if job.status == "validating_files":
            self.store.leases.validated(self.held.lease, {"rows": 1})
            job = self.claim()
            assert job is not None and job.status == "running"
        self.step_now = job.global_step
        return job

    def steps(self, count: int, total: int = 10) -> int:
        """`count` optimizer steps, each with its event; how many events were new."""
        events = [self._step(self.step_now + i + 1, total) for i in range(count)]
        self.step_now += count
        return self.store.leases.append_events(self.held.lease, events)

    def _step(self, step: int, total: int) -> NewEvent:
        data = {"loss": 2.0 / step, "num_steps_total": total, "tokens": 100, "tokens_per_second": 50.0}
        return NewEvent(0, step, "step", f"step {step}", data)

    def freeze(self) -> None:
        self.store.leases.append_events(self.held.lease, [NewEvent(0, 0, "freeze", "what trains", FREEZE_TABLE)])

    def checkpoint(self, reason: str = "epoch") -> None:
        metrics = {"loss": 0.5, "val_loss": 0.75, "val_accuracy": 0.5}
        path = f"/somewhere/attempt-{self.held.lease.attempt}/step-{self.step_now}"
        self.store.leases.add_checkpoint(self.held.lease, NewCheckpoint(self.step_now, 0, path, reason, metrics))

    def succeed(self) -> Job:
        job = self.store.jobs.get(self.held.lease.job_id)
        self.store.leases.register_model(self.held.lease, job.fine_tuned_name, f"/models/{job.id}")
        return self.store.leases.succeed(self.held.lease, fine_tuned_model=job.fine_tuned_name)
