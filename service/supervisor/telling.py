"""What an attempt at a job leaves in logs and traces: the ids that its lines carry, its spans, the trainer's own words.

In: a job and a tracer. Out: the context's ids, spans that continue the trace of the request that made the job, and one
log line for each event of a trainer but its steps (those at level debug). It refuses an event's text and all data but
numbers of a fixed list: a trainer's words may quote a file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from service.jobs.job import Job
from service.logs import job_id_var, request_id_var, trace_id_var
from service.supervisor.verdict import Verdict
from service.tracing.span import TRACEPARENT, Span, Tracer, current_span

_TRAINER = logging.getLogger("dve.trainer")
_FIGURES = ("loss", "tokens_per_second", "num_steps_total", "trained_tokens", "step", "from_step")
_MARKS = frozenset({"stage", "checkpoint", "resumed", "switched", "evaluation", "early_stopping"})


def begin_attempt(tracer: Tracer, name: str, job: Job) -> Span:
    """From here on this task's lines have the job's ids. The span goes on from the request that made the job."""
    span = tracer.begin(name, "consumer", {TRACEPARENT: job.traceparent})
    job_id_var.set(job.id)
    request_id_var.set(job.request_id)
    trace_id_var.set(span.trace_id)
    current_span.set(span)
    span.set(dve__job_id=job.id, dve__attempt=job.attempt, gen_ai__request__model=job.model)
    return span


def tell_whole_life(tracer: Tracer, job: Job, status: str) -> None:
    """A job that has ended, as one span from its submission on, with what it waited before its first attempt."""
    span = tracer.begin("job", "consumer", {TRACEPARENT: job.traceparent}, start_unix=job.created_at)
    span.set(dve__job_id=job.id, dve__status=status, dve__num_attempts=job.attempt)
    if job.started_at is not None:
        # The store's clock and this one's may differ a little; a wait of less than nothing is none.
        waited = max(time.time() - job.started_at, 0.0)
        span.since_begin("wait", time.monotonic() - waited)
    if status == "failed":
        span.fail("" if job.error is None else str(job.error.get("code", "")))
    span.end()


def tell_verdict(span: Span, verdict: Verdict) -> None:
    """How the attempt ended."""
    span.set(dve__end=verdict.end)
    if verdict.end in ("failed", "retry"):
        span.fail(verdict.code)


def tell_event(kind: str, stage: int, global_step: int, data: Mapping[str, Any]) -> None:
    """One event of a live trainer."""
    level = logging.DEBUG if kind == "step" else logging.ERROR if kind == "error" else logging.INFO
    if kind.startswith("warning"):
        level = logging.WARNING
    fields: dict[str, object] = {"process": "trainer", "kind": kind[:128], "stage": stage, "global_step": global_step}
    fields |= {name: data[name] for name in _FIGURES if isinstance(data.get(name), int | float)}
    if kind == "error":
        fields["code"] = str(data.get("code", ""))[:64]
    _TRAINER.log(level, "trainer event", extra={"fields": fields})
    if kind in _MARKS:
        current_span.get().note(kind, dve__stage=stage, dve__global_step=global_step)
