"""One claim of a job whose files are still to be read: a subprocess reads them, its report settles the claim.

In: a claim of status `validating_files`. Out: `validated`, `fail`, or, where the reader broke, `retry`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any, Protocol

from model_core.errors import DualVisionError
from service.jobs.job import Claim, Job, LeaseLostError
from service.logs import job_id_var, log_fields
from service.supervisor.attempts import LOG, JobFolder
from service.supervisor.job_run import RunContext, Start
from service.supervisor.lease_keeper import LeaseKeeper
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
        """As `JobRun.run`."""
        job_id_var.set(self._lease.job_id)
        work = asyncio.create_task(self._work())
        keep = asyncio.create_task(self.keeper.keep())
        try:
            await asyncio.wait({work, keep}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._process is not None:
                self._process.kill()
                await self._process.wait()
            for task in (work, keep):
                task.cancel()
            ends = await asyncio.gather(work, keep, return_exceptions=True)
        for end in ends:
            if isinstance(end, LeaseLostError):
                log_fields(logging.WARNING, "dropped out of the check", reason=str(end))
            elif isinstance(end, Exception):
                raise end
