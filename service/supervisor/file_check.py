"""One claim of a job whose files are still to be read: subprocesses read them, their reports settle the claim.

In: a claim of status `validating_files`. Out: `validated`, `fail`, or, where a reader broke, `retry`. A dry run also
has the trainer build everything that it would train with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model_core.errors import DualVisionError
from service.jobs.job import Claim, Job, LeaseLostError
from service.logs import log_fields
from service.supervisor.attempts import EVENTS, LOG, JobFolder
from service.supervisor.check_report import judge_report, read_report
from service.supervisor.event_file import EventFile
from service.supervisor.job_run import RunContext, Start
from service.supervisor.lease_keeper import LeaseKeeper, work_under
from service.supervisor.process import Launch, TrainerProcess
from service.supervisor.telling import begin_attempt, tell_verdict, tell_whole_life
from service.supervisor.verdict import Verdict, judge, of_os_error, of_refusal
from service.supervisor.warm_reader import WarmReader
from service.tracing.span import NO_SPAN, Span

_FOLDER = "validation"


@dataclass(frozen=True, slots=True)
class Check:
    """One file of a job, and what reads it. param: where the request named it. file_id None: no file, a dry run."""

    start: Start
    param: str
    file_id: str | None


class FileReader(Protocol):
    """Knows the programs that read a job's files."""

    def start_checks(self, job: Job, folder: Path) -> list[Check]:
        """Called in a thread: it may ask the store and write the recipe."""


class FileCheck:
    """`run` returns when the claim is settled or lost, and the subprocess gone."""

    def __init__(
        self, context: RunContext, reader: FileReader, claim: Claim, claimed_at: float, warm: WarmReader | None = None
    ) -> None:
        self._context, self._reader, self._lease, self._warm = context, reader, claim.lease, warm
        self.keeper = LeaseKeeper(context.store.leases, context.call, claim, claimed_at)
        self._folder = JobFolder(context.jobs_folder / claim.job.id).path / _FOLDER
        self._process: TrainerProcess | None = None
        self._span: Span = NO_SPAN

    async def run(self) -> None:
        """Ends with the lease lost or the claim settled."""
        self._span = begin_attempt(self._context.tracer, "read files", self.keeper.job)
        try:
            await work_under(self.keeper, self._work(), self._end_child)
        finally:
            self._span.end()

    async def _end_child(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def _work(self) -> None:
        reports: list[Mapping[str, Any]] = []
        param: str | None = "training_file"
        verdict = Verdict("succeeded")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            checks = await self._context.call.insist(self._reader.start_checks, self.keeper.job, self._folder)
            for number, check in enumerate(checks):
                verdict, report = await self._check(check, number)
                reports.append(report)
                param = check.param
                if verdict.end != "succeeded":
                    break
        except LeaseLostError:
            raise
        except OSError as error:
            verdict = of_os_error(error)
        except DualVisionError as error:
            verdict, param = of_refusal(error), error.param or param
        await self._settle(verdict, reports, param)

    async def _settle(self, verdict: Verdict, reports: list[Mapping[str, Any]], param: str | None) -> None:
        # Not what was wrong with a file: that quotes it, and is the job's own, in the store.
        log_fields(logging.INFO, "files were read", end=verdict.end, code=verdict.code)
        tell_verdict(self._span, verdict)
        call, leases = self._context.call, self._context.store.leases
        error = {"code": verdict.code, "message": verdict.message, "param": param}
        if verdict.end == "succeeded":
            job = await call.insist(leases.validated, self._lease, {"files": reports})
        elif verdict.end == "failed":
            job = await call.insist(leases.fail, self._lease, error)
        else:
            delay = self._context.limits.backoff_base_seconds
            job = await call.insist(leases.retry, self._lease, error, delay_seconds=delay)
        if job.is_terminal:
            tell_whole_life(self._context.tracer, job, job.status)

    async def _check(self, check: Check, number: int) -> tuple[Verdict, Mapping[str, Any]]:
        output, events = self._folder / f"check-{number}.json", self._folder / EVENTS
        events.unlink(missing_ok=True)
        process = None if self._warm is None else self._warm.take(check.start.command, output, self._folder / LOG)
        self._process = process or TrainerProcess.start(
            Launch(
                check.start.command, events, self._folder / LOG, output, environment=check.start.environment,
                niceness=self._context.limits.niceness,
            )
        )  # fmt: skip
        exit_code = await self._process.wait()
        if check.file_id is None:
            complaint = next((e for e in reversed(EventFile(events).read()) if e.kind == "error"), None)
            told = ({}, "") if complaint is None else (complaint.data, complaint.message)
            return judge(exit_code, *told), {}
        return judge_report(exit_code, read_report(output), check.file_id, self.keeper.job.config)
