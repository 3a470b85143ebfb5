"""One claim of a job whose files are still to be read: a subprocess reads them, its report settles the claim.

In: a claim of status `validating_files`. Out: `validated`, `fail`, or, where the reader broke, `retry`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any, Protocol

from model_core.errors import DualVisionError
from service.jobs.job import Claim, Job
from service.logs import job_id_var, log_fields
from service.supervisor.attempts import EVENTS, LOG, JobFolder
from service.supervisor.job_run import RunContext, Start
from service.supervisor.lease_keeper import LeaseKeeper, work_under
from service.supervisor.process import Launch, TrainerProcess
from service.supervisor.verdict import Verdict, judge, of_os_error, of_refusal

_FOLDER = "validation"
_MAX_REPORT_BYTES = 4 << 20


class FileReader(Protocol):
    """Starts what reads a job's files. It prints its report, one JSON object, as the last line of its output."""

    def start_check(self, job: Job, folder: Path) -> Start: ...


class FileCheck:
    """`run` returns when the claim is settled or lost, and the subprocess gone."""

    def __init__(self, context: RunContext, reader: FileReader, claim: Claim, claimed_at: float) -> None:
        self._context, self._reader, self._lease = context, reader, claim.lease
        self.keeper = LeaseKeeper(context.store.leases, context.call, claim, claimed_at)
        self._folder = JobFolder(context.jobs_folder / claim.job.id)
        self._process: TrainerProcess | None = None

    async def run(self) -> None:
        """Ends with the lease lost or the claim settled."""
        job_id_var.set(self._lease.job_id)
        await work_under(self.keeper, self._work(), self._end_child)

    async def _end_child(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def _work(self) -> None:
        report: dict[str, Any] = {}
        try:
            verdict, report = await self._check()
        except OSError as error:
            verdict = of_os_error(error)
        except DualVisionError as error:
            verdict = of_refusal(error)
        log_fields(logging.INFO, "files were read", end=verdict.end, code=verdict.code, reason=verdict.message)
        call, leases = self._context.call, self._context.store.leases
        error_body = {"code": verdict.code, "message": verdict.message, "param": report.get("param", "training_file")}
        if verdict.end == "succeeded":
            await call.insist(leases.validated, self._lease, report)
        elif verdict.end == "failed":
            await call.insist(leases.fail, self._lease, error_body)
        else:
            delay = self._context.limits.backoff_base_seconds
            await call.insist(leases.retry, self._lease, error_body, delay_seconds=delay)

    async def _check(self) -> tuple[Verdict, dict[str, Any]]:
        folder = self._folder.path / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG).unlink(missing_ok=True)
        start = self._reader.start_check(self.keeper.job, folder)
        niceness = self._context.limits.niceness
        self._process = TrainerProcess.start(
            Launch(start.command, folder / EVENTS, folder / LOG, start.environment, niceness=niceness)
        )
        exit_code = await self._process.wait()
        report = read_report(folder / LOG)
        complaint = report if report.get("code") else None
        return judge(exit_code, complaint, str(report.get("message", ""))), report


def read_report(path: Path) -> dict[str, Any]:
    """The last line of a check's output that is a JSON object; empty where there is none."""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - _MAX_REPORT_BYTES, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict):
                return report
    return {}
