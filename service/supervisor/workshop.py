"""What a worker starts for a job: the readers of its files, the memory check, the trainer, and the publication.

In: a job. Out: commands, and the published result. Everything that needs torch is a subprocess of model_core's own
programs, so that a job can be repeated by hand from its `job.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_core.errors import CheckpointError, CheckpointIncompleteError
from model_core.manifest import verify_folder
from model_core.published import folder_name, promote
from model_core.training.config import TrainConfig
from service.errors import StorageFullError
from service.jobs.files import FileFolder, place_files
from service.jobs.job import Job, Lease
from service.jobs.store import Store
from service.recipes import base_flags
from service.settings import child_environment
from service.supervisor.attempts import RECIPE, JobFolder
from service.supervisor.devices import DeviceLock, gpu_memory
from service.supervisor.file_check import Check
from service.supervisor.job_run import Published, Start
from service.supervisor.lease_keeper import StoreThreads
from service.supervisor.process import BAD_INPUT, DONE
from service.supervisor.results import result_csv

FINAL = "final"
RESULTS = "step_metrics.csv"
_PYTHON = (sys.executable, "-m")
_TOO_LARGE = 1
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Programs:
    """The commands, before their arguments."""

    train: tuple[str, ...] = (*_PYTHON, "model_core.cli.train")
    check: tuple[str, ...] = (*_PYTHON, "model_core.cli.data", "validate")
    fit: tuple[str, ...] = (*_PYTHON, "model_core.cli.fit")
    publish: tuple[str, ...] = (*_PYTHON, "model_core.cli.publish")


class Workshop:
    """`job_run.Workshop` and `file_check.FileReader` for real jobs."""

    def __init__(self, store: Store, call: StoreThreads, data_dir: Path, programs: Programs) -> None:
        self._store, self._call, self._programs = store, call, programs
        self._data_dir, self._files = data_dir, FileFolder(data_dir)

    def start(self, job: Job, attempt_folder: Path, resume: Path | None, lock: DeviceLock) -> Start:
        """The trainer, which sees this slot's device alone. Raises ConfigError, OSError."""
        path = self._write_recipe(job, attempt_folder)
        command = [*self._programs.train, "--config", str(path)]
        command += ["--events-fd", "{events_fd}", "--control-fd", "{control_fd}"]
        if resume is not None:
            command += ["--resume", str(resume)]
        return Start(tuple(command), _on_device(lock))

    def start_checks(self, job: Job, folder: Path) -> list[Check]:
        """One for each file; for a dry run the trainer's own as well, on processors."""
        recipe = self._recipe(job, folder)
        named = [(one.data_path, one.type, place) for one, place in _named_files(recipe)]
        environment = child_environment(CUDA_VISIBLE_DEVICES="")
        checks = [
            Check(Start((*self._programs.check, path, "--type", kind, "--json"), environment), place, Path(path).name)
            for path, kind, place in named
        ]
        if job.is_dry_run:
            arguments = ("--config", str(self._write_recipe(job, folder)), "--dry_run", "--events-fd", "{events_fd}")
            checks.append(Check(Start((*self._programs.train, *arguments), environment), "fusion", None))
        return checks

    async def fits(self, job: Job, attempt_folder: Path, lock: DeviceLock) -> str | None:
        """On a GPU: whether what it has free is enough, the server's share being taken already. Processors: always."""
        if lock.device.gpu is None:
            return None
        memory = (await asyncio.to_thread(gpu_memory)).get(lock.device.gpu)
        if memory is None:
            return f"GPU {lock.device.gpu} is not there any more."
        path = await self._call.insist(self._write_recipe, job, attempt_folder)
        arguments = ("--config", str(path), "--device", "cuda", "--memory", str(memory.free_bytes), "--json")
        code, told = await _output_of((*self._programs.fit, *arguments))
        if code != _TOO_LARGE:
            return None  # a recipe that can't be judged is the trainer's to refuse
        return describe_shortage(json.loads(told), lock.device.gpu, memory.total_bytes)

    async def publish(self, job: Job, lease: Lease, folder: JobFolder, attempt_folder: Path) -> Published:
        """The result file, then the model: a job has succeeded only when both are there."""
        final = attempt_folder / FINAL
        if await asyncio.to_thread(verify_folder, final, deep=True) is None:
            raise CheckpointIncompleteError(
                "the trainer left no complete result", value=FINAL, allowed="a folder with its manifest",
                fix="Create the job again, with 'fusion.resume_from' its last checkpoint",
            )  # fmt: skip
        results = await self._keep_results(job, folder)
        await self._publish_model(job, lease, final)
        return Published(job.fine_tuned_name, (results,))

    async def _publish_model(self, job: Job, lease: Lease, final: Path) -> None:
        """Written and load-tested by a process of its own; promoted once the lease's row says that it is ours."""
        model_id = job.fine_tuned_name
        place = self._data_dir / "models" / folder_name(model_id)
        place.parent.mkdir(parents=True, exist_ok=True)
        command = (*self._programs.publish, *base_flags(job.config), "--run", str(final), "--out", str(place))
        code, printed = await _output_of((*command, "--hold"))
        with contextlib.suppress(ValueError):
            told: Mapping[str, Any] = json.loads(printed)
            if code == DONE:
                details = {key: told[key] for key in ("version", "num_bytes", "components") if key in told}
                register = self._store.leases.register_model
                await self._call.insist(register, lease, model_id, told["folder"], **details)
                await asyncio.to_thread(promote, place, told["version"])
                return
            error = told["error"]
            kind = StorageFullError if error["code"] == "storage_full" else CheckpointError
            raise kind(f"the result could not be published: {error['message']}")
        raise OSError(f"the publication ended with exit code {code} and no word")

    async def _keep_results(self, job: Job, folder: JobFolder) -> str:
        text = await asyncio.to_thread(result_csv, folder.event_files())
        file_id, path, num_bytes = await asyncio.to_thread(
            self._files.write, text.encode(), "fine-tune-results", job.owner
        )
        await self._call.insist(
            self._store.files.add, file_id, job.owner, RESULTS, purpose="fine-tune-results", num_bytes=num_bytes,
            path=path, status="processed",
        )  # fmt: skip
        return file_id

    def _recipe(self, job: Job, folder: Path) -> TrainConfig:
        return place_files(job.config, self._resolve, output_dir=str(folder))

    def _resolve(self, file_id: str) -> str:
        return str(self._files.path(self._store.files.get(file_id).path))

    def _write_recipe(self, job: Job, folder: Path) -> Path:
        path = folder / RECIPE
        path.write_text(self._recipe(job, folder).model_dump_json(indent=2), encoding="utf-8")
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
        f"{total_bytes / _GIB:.1f} GiB free. What fits now: {', '.join(would) or 'nothing'}."
    )


def _named_files(recipe: TrainConfig) -> list[tuple[Any, str]]:
    """The recipe's data sets with the body's name of each."""
    sources = list(recipe.train_sources())
    places = ["training_file"] if len(sources) == 1 else [f"fusion.datasets[{i}].file" for i in range(len(sources))]
    named = list(zip(sources, places, strict=True))
    if recipe.val_data_path is not None:
        named.append((sources[0].model_copy(update={"data_path": recipe.val_data_path}), "validation_file"))
    return named


def _on_device(lock: DeviceLock) -> dict[str, str]:
    if lock.device.gpu is None:
        # On processors a trainer always has company, if only the server's: threads that spin while they wait for each
        # other then lose most of the time (DECISIONS.md, 2026-11-25).
        return child_environment(CUDA_VISIBLE_DEVICES="", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
    return child_environment(CUDA_VISIBLE_DEVICES=str(lock.device.gpu), CUDA_DEVICE_ORDER="PCI_BUS_ID")


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
