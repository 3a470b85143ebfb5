"""Publishes a checkpoint of a job when somebody first asks for it under its `ft:...:ckpt-step-N` id.

In: such an id. Out: a published model of that name, load-tested by a process of its own (`dve publish`), or an error in
that one's words. One at a time; most checkpoints are never asked for. It refuses to load a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from model_core.errors import CheckpointError
from model_core.published import folder_name
from service.errors import StorageFullError
from service.jobs.store import Store
from service.recipes import base_flags
from service.settings import child_environment

PUBLISH_COMMAND = (sys.executable, "-m", "model_core.cli.publish")


class CheckpointPublisher:
    """`command` stands in for the real one in tests."""

    def __init__(self, store: Store, data_dir: Path, command: Sequence[str] = PUBLISH_COMMAND) -> None:
        self._store, self._models, self._command = store, data_dir.absolute() / "models", tuple(command)
        self._turn = asyncio.Lock()

    async def publish(self, model_id: str) -> bool:
        """Whether this is a checkpoint; then it is a published model now.

        Raises CheckpointError: its folder is gone or damaged. StorageFullError. StoreUnavailableError.
        """
        found = await asyncio.to_thread(self._store.jobs.checkpoint_of_model, model_id)
        if found is None:
            return False
        job = await asyncio.to_thread(self._store.jobs.get, found.job_id)
        place = self._models / folder_name(model_id)
        async with self._turn:
            if not (place / "model.json").exists():  # whoever waited finds it made
                await asyncio.to_thread(place.parent.mkdir, parents=True, exist_ok=True)
                await self._run(*base_flags(job.config), "--run", found.path, "--out", str(place))
        return True

    async def _run(self, *arguments: str) -> None:
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *self._command, *arguments, stdin=null, stdout=pipe, stderr=null, env=child_environment()
        )
        try:
            printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == 0:
            return
        error = {"code": "", "message": f"exit code {process.returncode}"}
        with contextlib.suppress(ValueError, KeyError):
            error = json.loads(printed)["error"]
        kind = StorageFullError if error["code"] == "storage_full" else CheckpointError
        raise kind(f"the checkpoint could not be published: {error['message']}")
