"""How long a training job keeps people waiting: a real server and a real worker, asked over HTTP.

    python -m benchmarks.job_times [--rounds 5] [--jobs 1000] [--pages 50]

In: nothing but the demo model. Out: a table. `running`: from the request that creates a job to its status, on an idle
worker; `first`: on one that has just been started. `event`: from the line that the trainer writes to the same event in
the server's stream. `answer`: from the status `succeeded` to the first answer of the new model. `page`: one of a
hundred jobs, where so many are queued. What is polled is polled every 5 ms. Bars: 2 s, none, 1 s, none, 50 ms.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.supervision_cost import training_file
from service.api_client import ApiClient
from service.jobs.files import FileFolder
from service.jobs.job import NewJob
from service.jobs.store import Store, open_store
from service.settings import child_environment

_JOBS, _CHAT = "/v1/fine_tuning/jobs", "/v1/chat/completions"
_OWNER = "open"
_LOOK_SECONDS = 0.005
_LIMIT_SECONDS = 300.0
_NUM_ROWS = 80


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="job_times", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="jobs that are trained behind the first (default 5)")
    parser.add_argument("--jobs", type=int, default=1000, help="queued jobs behind the pages (default 1000)")
    parser.add_argument("--pages", type=int, default=50, help="pages that are asked for (default 50)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    seconds: dict[str, list[float]] = {name: [] for name in ("first", "running", "event", "answer", "page")}
    with tempfile.TemporaryDirectory(prefix="dve-job-times-") as name, ExitStack() as stack:
        data_dir = Path(name)
        url = stack.enter_context(running_server(data_dir))
        store = open_store(None, data_dir)
        stack.callback(store.close)
        file_id = add_file(store, data_dir)
        with running_worker(data_dir):
            until(lambda: bool(store.workers.list()), "a worker")
            for number in range(args.rounds + 1):
                train_one(url, data_dir, file_id, seconds, "running" if number else "first")
        for _ in range(args.jobs):
            store.jobs.create(NewJob(_OWNER, "dve-demo", file_id, {"datasets": [{"data_path": file_id}]}, 0))
        for number in range(args.pages + 1):
            begin = time.monotonic()
            page = call(url + _JOBS + "?limit=100")
            assert len(page["data"]) == min(100, args.jobs + args.rounds + 1)
            if number:  # the first one warms up
                seconds["page"].append(time.monotonic() - begin)
    show(seconds, args.jobs)
    return 0


def train_one(url: str, data_dir: Path, file_id: str, seconds: dict[str, list[float]], kind: str) -> None:
    freeze = {"fusion": {"freeze": {"mode": "fusion_only"}}}
    body = {
        "model": "dve-demo",
        "training_file": file_id,
        "hyperparameters": {"n_epochs": 1, "batch_size": 4},
        **freeze,
    }
    begin = time.monotonic()
    job_id = call(url + _JOBS, body)["id"]
    written: dict[int, float] = {}
    told: dict[int, float] = {}
    listening = threading.Thread(target=listen, args=(url, job_id, told), daemon=True)
    listening.start()
    until(lambda: status(url, job_id) not in ("validating_files", "queued"), "running")
    seconds[kind].append(time.monotonic() - begin)
    note_steps(data_dir / "jobs" / job_id / "attempt-1", written)
    until(lambda: status(url, job_id) in ("succeeded", "failed"), "the end")
    ended = time.monotonic()
    job = call(f"{url}{_JOBS}/{job_id}")
    if job["status"] != "succeeded":
        raise SystemExit(f"the job failed: {job['error']}")
    asked = {
        "model": job["fine_tuned_model"], "max_tokens": 4, "messages": [{"role": "user", "content": "what is this?"}]
    }  # fmt: skip
    until(lambda: answers(url + _CHAT, asked), "an answer")
    seconds["answer"].append(time.monotonic() - ended)
    listening.join(_LIMIT_SECONDS)
    seconds["event"] += [told[step] - written[step] for step in written.keys() & told.keys()]


def listen(url: str, job_id: str, told: dict[int, float]) -> None:
    for event in ApiClient(url, None).events(f"{_JOBS}/{job_id}/events", {"stream": "true"}):
        if event["data"].get("kind") == "step":
            told[event["data"]["step"]] = time.monotonic()


def note_steps(attempt: Path, written: dict[int, float]) -> None:
    """When each step's line was there, until the trainer has said its last word."""
    until(lambda: (attempt / "events.jsonl").exists(), "the first event")
    rest = b""
    with open(attempt / "events.jsonl", "rb") as file:

        def look() -> bool:
            nonlocal rest
            *lines, rest = (rest + file.read()).split(b"\n")
            now = time.monotonic()
            events = [json.loads(line) for line in lines if line]
            written.update((event["global_step"], now) for event in events if event["kind"] == "step")
            return any(event["kind"] in ("summary", "error") for event in events)

        until(look, "the trainer's last word")


def show(seconds: dict[str, list[float]], num_jobs: int) -> None:
    names = {
        "first": ("created to running, worker just started", ""),
        "running": ("created to running", "< 2 s"), "event": ("a step's line to the stream's event", "< 1 s"),
        "answer": ("succeeded to the first answer", ""), "page": (f"a page of 100, {num_jobs} queued", "< 0.05 s"),
    }  # fmt: skip
    table = Table("what", "times", "p50, s", "p95, s", "largest, s", "asked")
    for key, (text, bar) in names.items():
        found = sorted(seconds[key])
        late = found[min(len(found) - 1, int(0.95 * len(found)))]
        table.add_row(
            text, str(len(found)), f"{statistics.median(found):.3f}", f"{late:.3f}", f"{found[-1]:.3f}", bar
        )  # fmt: skip
    Console(width=120).print(table)


# The two processes, and what is asked of them


@contextmanager
def running_server(data_dir: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--data_dir", str(data_dir)]
    with open(data_dir / "server.log", "wb") as log:
        process = subprocess.Popen(command, stderr=log, env=child_environment())
    try:
        found: list[str] = []

        def is_ready() -> bool:
            if process.poll() is not None:
                raise SystemExit((data_dir / "server.log").read_text())
            found[:] = re.findall(r"listening on (http://[\w.:]+)", (data_dir / "server.log").read_text())
            return bool(found) and answers(f"{found[0]}/health/ready")

        until(is_ready, "a ready server")
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def running_worker(data_dir: Path) -> Iterator[None]:
    flags = ("--devices", "cpu", "--data-dir", str(data_dir), "--metrics-port", "0")
    command = [sys.executable, "-m", "service.cli", "worker", *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=child_environment())
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def add_file(store: Store, data_dir: Path) -> str:
    file_id, path, num_bytes = FileFolder(data_dir).write(training_file(_NUM_ROWS), "fine-tune", _OWNER)
    store.files.add(file_id, _OWNER, "train.jsonl", purpose="fine-tune", num_bytes=num_bytes, path=path)
    return file_id


def call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def answers(url: str, body: dict[str, Any] | None = None) -> bool:
    try:
        call(url, body)
    except urllib.error.URLError:
        return False
    return True


def status(url: str, job_id: str) -> str:
    return str(call(f"{url}{_JOBS}/{job_id}")["status"])


def until(is_so: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _LIMIT_SECONDS
    while not is_so():
        if time.monotonic() > end:
            raise SystemExit(f"waited {_LIMIT_SECONDS:g} s for {what}")
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())
