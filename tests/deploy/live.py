"""Really running programs for the tests of what is deployed: ports, waiting, a chat, a small training job."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PICTURES = ("dog", "word", "pair")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def until(is_so: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Looks again until it is so; of processes that tell nobody when they change."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(url: str, seconds: float = 300.0) -> None:
    until(lambda: answers(url), url, seconds)


def prometheus_config(a_server: str, a_worker: str) -> str:
    """The shipped one with these targets and a faster clock. The worker is not found by name here."""
    shipped = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    static = f'static_configs:\n      - targets: ["{a_worker}"]\n'
    config, found = re.subn(r"dns_sd_configs:\n(?:      .*\n)+", static, shipped.replace("server:8000", a_server))
    assert found == 1
    return config.replace("15s", "1s")


@contextmanager
def running(*command: str, ready: str, stop_seconds: float = 60.0, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program from its first answer at `ready` to its end after SIGTERM."""
    process = subprocess.Popen(command, **options)
    try:
        wait_for(ready)
        yield process
    finally:
        process.terminate()
        process.wait(stop_seconds)


@contextmanager
def server(folder: Path, **settings: str) -> Iterator[str]:
    """`dve serve` of the demo model. Gives host:port."""
    port = free_port()
    given = [f"--{name}={value}" for name, value in settings.items()]
    command = (sys.executable, "-m", "service.cli", "serve", f"--port={port}", f"--data_dir={folder}", *given)
    with running(*command, ready=f"http://127.0.0.1:{port}/health/ready", cwd=ROOT):
        yield f"127.0.0.1:{port}"


@contextmanager
def worker(folder: Path, **settings: str) -> Iterator[str]:
    """`dve worker` on processors. Gives host:port of its metrics."""
    port = free_port()
    given = [f"--{name}={value}" for name, value in settings.items()]
    command = (sys.executable, "-m", "service.cli", "worker", f"--metrics-port={port}", f"--data_dir={folder}")
    with running(*command, "--devices=cpu", *given, ready=f"http://127.0.0.1:{port}/metrics", cwd=ROOT):
        yield f"127.0.0.1:{port}"


def picture_part(number: int) -> dict[str, Any]:
    name = PICTURES[number % len(PICTURES)]
    encoded = base64.b64encode((ROOT / f"examples/{name}.png").read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def question(number: int, text: str = "what is this?", **asked: Any) -> dict[str, Any]:
    content = [picture_part(number), {"type": "text", "text": text}]
    return {"model": "dve-demo", "messages": [{"role": "user", "content": content}], **asked}


def training_file(num_samples: int = 8) -> bytes:
    rows = [
        {"messages": [*question(number)["messages"], {"role": "assistant", "content": PICTURES[number % 3]}]}
        for number in range(num_samples)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def create_job(http: httpx.Client, **fusion: Any) -> str:
    """A job of a few steps on the demo model. Its id."""
    sent = http.post("/v1/files", files={"file": ("t.jsonl", training_file())}, data={"purpose": "fine-tune"})
    assert sent.status_code == 200, sent.text
    body = {
        "model": "dve-demo", "training_file": sent.json()["id"], "suffix": "ops",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2}}},
        "fusion": {"freeze": {"mode": "fusion_only"}, **fusion},
    }  # fmt: skip
    made = http.post("/v1/fine_tuning/jobs", json=body)
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


def finished_job(http: httpx.Client, job_id: str, seconds: float = 400.0) -> dict[str, Any]:
    """The job once it has ended."""
    seen: dict[str, Any] = {}

    def has_ended() -> bool:
        seen.update(http.get(f"/v1/fine_tuning/jobs/{job_id}").json())
        return seen["status"] in ("succeeded", "failed", "cancelled")

    until(has_ended, f"the end of {job_id}", seconds)
    return seen
