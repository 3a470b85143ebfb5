"""A server with a real small model and workers with the real trainer, in one data folder, driven by OpenAI's client.

The server stands in the test's process, workers are processes: they are killed. The base is a pair of folders, Qwen's
and DINOv2's own, as for real checkpoints: thousands of parameters, so that a training takes seconds.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from PIL import Image

from service.main import ModelLoader
from service.request_limits import RequestLimits
from service.settings import JobSettings, Settings
from tests.model_core import tiny
from tests.service.conftest import LiveServer, run_server
from tests.service.fakes import FakeEngine

ROOT = Path(__file__).resolve().parents[3]
ANSWERS = {"red": (220, 30, 30), "green": (30, 200, 40)}
QUESTION = "colour?"
#: The id of the pair.
BASE = "dual-qwen"
LEASE_SECONDS = 5.0


def save_pair(folder: Path) -> dict[str, str]:
    """Settings that name the two."""
    tiny.save_qwen(folder / "qwen")
    tiny.save_dinov2(folder / "dinov2")
    return {"qwen_model_name": str(folder / "qwen"), "dinov2_model_name": str(folder / "dinov2")}


def picture(colour: str) -> dict[str, Any]:
    written = io.BytesIO()
    Image.new("RGB", (56, 56), ANSWERS[colour]).save(written, "PNG")
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def question(colour: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [picture(colour), {"type": "text", "text": QUESTION}]}]


def training_file(num_rows: int) -> bytes:
    names = list(ANSWERS)
    rows = [
        {"messages": [*question(name), {"role": "assistant", "content": name}]}
        for name in (names[number % len(names)] for number in range(num_rows))
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Place:
    """`call` lets one story be told by both clients: what a method returns is awaited where it can be."""

    def __init__(self, live: LiveServer, client: Any, worker: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.live, self.client, self._worker = live, client, worker
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def jobs(self) -> Any:
        return self.client.fine_tuning.jobs

    async def call(self, method: Callable[..., Any], *args: Any, **more: Any) -> Any:
        given = method(*args, **more)
        return await given if inspect.isawaitable(given) else given

    def start_worker(self) -> subprocess.Popen[bytes]:
        self.workers.append(self._worker())
        return self.workers[-1]

    async def until(self, job_id: str, is_so: Callable[[Any], bool], seconds: float = 600.0) -> Any:
        """The job, once it is so."""
        end = time.monotonic() + seconds
        while not is_so(job := await self.call(self.jobs.retrieve, job_id)):
            assert time.monotonic() < end and job.status != "failed", (job.status, job.error, self.told())
            time.sleep(0.05)
        return job

    async def until_status(self, job_id: str, status: str) -> Any:
        return await self.until(job_id, lambda job: job.status == status)

    async def answer(self, model: str, colour: str) -> tuple[str, str]:
        """What it says, and the version that said it."""
        done = await self.call(
            self.client.chat.completions.create, model=model, messages=question(colour), max_tokens=8
        )
        return done.choices[0].message.content, done.system_fingerprint

    def told(self) -> str:
        folder = self.live.data_dir
        paths = [*folder.glob("worker-*.log"), *folder.glob("jobs/*/attempt-*/trainer.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in paths)

    def end(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()


@contextmanager
def open_place(folder: Path, kind: type[Any] = openai.OpenAI, database_url: str | None = None) -> Iterator[Place]:
    """A server that has loaded its pair; no worker yet."""
    settings: dict[str, Any] = {**save_pair(folder / "base"), "data_dir": folder / "data"}
    chosen = Settings(**settings)
    loader = ModelLoader(chosen, RequestLimits.from_settings(chosen, JobSettings()))
    settings |= {"database_url": database_url, "job_lease_seconds": LEASE_SECONDS}
    (folder / "data").mkdir()

    def worker() -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DVE_")}
        if database_url is not None:
            environment["DVE_DATABASE_URL"] = database_url
        environment["DVE_JOB_LEASE_SECONDS"] = str(LEASE_SECONDS)
        flags = ("--data-dir", str(folder / "data"), "--devices", "cpu", "--metrics-port", "0", "--worker-nice", "0")
        with open(folder / "data" / f"worker-{time.monotonic_ns()}.log", "wb") as log:
            command = [sys.executable, "-m", "service.cli", "worker", *flags]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    with run_server(FakeEngine(), loader.load_base, variants=loader, **settings) as live:
        while live.http.get("/health/ready").status_code != 200:
            time.sleep(0.02)
        client = kind(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)
        place = Place(live, client, worker)
        try:
            yield place
        finally:
            place.end()
