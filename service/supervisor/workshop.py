"""What a worker starts for a job: the reader of its files, the memory check, the trainer; and what it keeps at the end.

In: a job. Out: commands, and the published result. Everything that needs torch is a subprocess of model_core's own
programs, so that a job can be repeated by hand from its `job.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_core.errors import CheckpointIncompleteError
from model_core.manifest import verify_folder
from service.jobs.job import Job, Lease
from service.jobs.store import Store
from service.settings import child_environment
from service.supervisor.attempts import RECIPE, JobFolder
from service.supervisor.devices import DeviceLock, gpu_memory
from service.supervisor.job_run import Published, Start
from service.supervisor.lease_keeper import StoreThreads
from service.supervisor.process import BAD_INPUT
from service.supervisor.results import result_csv

FINAL = "final"
RESULTS = "step_metrics.csv"
_PYTHON = (sys.executable, "-m")
_TOO_LARGE = 1
_GIB = 2**30

#: The job's recipe with paths in the place of file ids.
PlaceFiles = Callable[[Job], Mapping[str, Any]]
#: Makes a model of the folder and puts it in the store, under the lease; its id.
PublishModel = Callable[[Job, Lease, Path], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Programs:
    """The commands, before their arguments."""

    train: tuple[str, ...] = (*_PYTHON, "model_core.cli.train")
    check: tuple[str, ...] = (*_PYTHON, "model_core.cli.data", "validate")
    fit: tuple[str, ...] = (*_PYTHON, "model_core.cli.fit")


class Workshop:
    """`job_run.Workshop` and `file_check.FileReader` for real jobs."""

    def __init__(
        self, store: Store, call: StoreThreads, data_dir: Path, place_files: PlaceFiles, publish_model: PublishModel,
        programs: Programs = Programs(),
    ) -> None:  # fmt: skip
        self._store, self._call, self._data_dir = store, call, data_dir
        self._place_files, self._publish_model, self._programs = place_files, publish_model, programs

    def start(self, job: Job, attempt_folder: Path, resume: Path | None, lock: DeviceLock) -> Start:
        """The trainer on this slot alone. Raises OSError for a disk that takes no recipe."""
        recipe = self._write_recipe(job, attempt_folder)
        command = [*self._programs.train, "--config", str(recipe)]
        command += ["--events-fd", "{events_fd}", "--control-fd", "{control_fd}"]
        if resume is not None:
            command += ["--resume", str(resume)]
        return Start(tuple(command), _on_device(lock))

    def start_check(self, job: Job, folder: Path) -> Start:
        recipe = self._write_recipe(job, folder)
        return Start((*self._programs.check, "--config", str(recipe), "--json"), child_environment())

    async def fits(self, job: Job, attempt_folder: Path, lock: DeviceLock) -> str | None:
        """On a GPU: whether what it has free is enough, the server's share being taken already. Processors: always."""
        if lock.device.gpu is None:
            return None
        memory = gpu_memory().get(lock.device.gpu)
        if memory is None:
            return f"GPU {lock.device.gpu} is not there any more."
        recipe = self._write_recipe(job, attempt_folder)
        arguments = ("--config", str(recipe), "--device", "cuda", "--memory", str(memory.free_bytes), "--json")
        code, told = await _output_of((*self._programs.fit, *arguments))
        if code != _TOO_LARGE:
            return None  # a recipe that can't be judged is the trainer's to refuse
        return describe_shortage(json.loads(told), lock.device.gpu, memory.total_bytes)

    async def publish(self, job: Job, lease: Lease, folder: JobFolder, attempt_folder: Path) -> Published:
        """The result file, then the model: a job has succeeded only when both are there."""
        final = attempt_folder / FINAL
        if await asyncio.to_thread(verify_folder, final, deep=True) is None:
            raise CheckpointIncompleteError("the trainer left no complete result", value=str(final))
        results = await self._keep_results(job, folder)
        return Published(await self._publish_model(job, lease, final), (results,))

    async def _keep_results(self, job: Job, folder: JobFolder) -> str:
        text = await asyncio.to_thread(result_csv, folder.event_files())
        path = folder.path / RESULTS
        path.write_text(text, encoding="utf-8")
        # One id a job: a publication that is repeated after a crash finds its own file again.
        file_id = f"file-{job.id.removeprefix('ftjob-')}"
        known = {
            record.id for record in (await self._call.insist(self._store.files.page, purpose="fine-tune-results"))[0]
        }
        if file_id not in known:
            await self._call.insist(
                self._store.files.add, file_id, job.owner, RESULTS, purpose="fine-tune-results",
                num_bytes=len(text.encode()), path=str(path.relative_to(self._data_dir)), status="processed",
            )  # fmt: skip
        return file_id

    def _write_recipe(self, job: Job, folder: Path) -> Path:
        recipe = {**self._place_files(job), "output_dir": str(folder)}
        path = folder / RECIPE
        path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
        return path


def describe_shortage(report: Mapping[str, Any], gpu: int, total_bytes: int) -> str:
    """What is missing, and what would fit, for the person who waits."""
    free, needed = report["available_bytes"], report["needed_bytes"]
    fitting = [row for row in report["training"] if row["fits"] and not row["asked"]]
    sizes = [row["fitting_max_tokens"] for row in report["training"] if row["asked"]]
    would = [f"training_mode {row['name']}" for row in fitting[:3]]
    if sizes and None not in sizes:
        would.append(f"max_tokens {min(sizes)}")
    return (
        f"The job waits for memory: it needs {needed / _GIB:.1f} GiB, GPU {gpu} has {free / _GIB:.1f} of "
        f"{total_bytes / _GIB:.1f} GiB free. That fits now: {', '.join(would) or 'nothing'}."
    )


def _on_device(lock: DeviceLock) -> dict[str, str]:
    visible = "" if lock.device.gpu is None else str(lock.device.gpu)
    return child_environment(CUDA_VISIBLE_DEVICES=visible, CUDA_DEVICE_ORDER="PCI_BUS_ID")


async def _output_of(command: tuple[str, ...]) -> tuple[int, bytes]:
    """Exit code and standard output; killed where whoever waits is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=child_environment()
    )
    try:
        told, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    code = process.returncode
    return (BAD_INPUT if code is None else code), told
