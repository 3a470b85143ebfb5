"""What it costs a training to be a job: the same recipe trained by a worker and by hand, in turn.

    python -m benchmarks.supervision_cost [--rounds 4] [--rows 400] [--model FOLDER]

In: nothing but the demo model, or another folder. Out: steps a second of each run and the ratio of the medians. A
worker's run is told into a store, its lease renewed, its wishes asked for; by hand there is none of that. Both are
timed alike, from a step after the first ones to the last, as they appear in the run's own events. The worker's own
processor time is printed beside it, as a share of one core.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from service.jobs.files import FileFolder
from service.jobs.job import NewJob
from service.jobs.store import Store, open_store
from service.settings import child_environment

_OWNER = "benchmark"
_LOOK_SECONDS = 0.02
_WARM_STEPS = 10
_LIMIT_SECONDS = 600.0
#: As the worker gives it to a trainer on processors (supervisor/workshop.py).
_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


@dataclass(frozen=True, slots=True)
class Run:
    """worker_share: of one core, while it trained; None by hand."""

    steps_per_second: float
    worker_share: float | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supervision_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="pairs of runs (default 4)")
    parser.add_argument("--rows", type=int, default=400, help="samples, four a step (default 400)")
    parser.add_argument("--model", help="a dual checkpoint's folder (default: the demo model)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    supervised, by_hand = [], []
    with tempfile.TemporaryDirectory(prefix="dve-supervision-") as folder:
        for number in range(args.rounds):
            place = Path(folder) / str(number)
            recipe, run = train_as_job(place / "data", args.rows, args.model)
            supervised.append(run)
            by_hand.append(train_by_hand(place / "by-hand", recipe))
            print(
                f"round {number + 1}: {run.steps_per_second:.3f} steps/s as a job, "
                f"{by_hand[-1].steps_per_second:.3f} by hand, worker {run.worker_share or 0:.2%} of a core", flush=True
            )  # fmt: skip
    ratios = [a.steps_per_second / b.steps_per_second for a, b in zip(supervised, by_hand, strict=True)]
    shares = [run.worker_share or 0.0 for run in supervised]
    print(f"as a job over by hand: {statistics.median(ratios):.4f} (rounds {', '.join(f'{r:.4f}' for r in ratios)})")
    print(f"the worker's own time: {statistics.median(shares):.2%} of a core")
    return 0


def train_as_job(data_dir: Path, num_rows: int, model: str | None) -> tuple[dict[str, object], Run]:
    """The recipe that the worker wrote, and how fast it went."""
    store = open_store(None, data_dir)
    job_id = submit(store, FileFolder(data_dir), num_rows, model)
    flags = ("--once", "--devices", "cpu", "--data-dir", str(data_dir), "--metrics-port", "0", "--worker-nice", "0")
    worker = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "worker", *flags], stderr=subprocess.DEVNULL, env=child_environment()
    )
    attempt = data_dir / "jobs" / job_id / "attempt-1"
    try:
        speed, share = watch(attempt / "events.jsonl", worker)
        if worker.wait(_LIMIT_SECONDS) != 0 or store.jobs.get(job_id).status != "succeeded":
            raise SystemExit(f"the job did not succeed: {store.jobs.get(job_id).error}")
    finally:
        worker.kill()
        worker.wait()
        store.close()
    return json.loads((attempt / "job.json").read_text()), Run(speed, share)


def submit(store: Store, files: FileFolder, num_rows: int, model: str | None) -> str:
    file_id, path, num_bytes = files.write(training_file(num_rows), "fine-tune", _OWNER)
    store.files.add(file_id, _OWNER, "train.jsonl", purpose="fine-tune", num_bytes=num_bytes, path=path)
    config = {
        "model": model, "datasets": [{"data_path": file_id}], "batch_size": 4,
        "freeze_config": {"mode": "fusion_only"},
    }  # fmt: skip
    return store.jobs.create(NewJob(_OWNER, model or "dve-demo", file_id, config, 0))[0].id


def training_file(num_rows: int) -> bytes:
    rows = []
    for number in range(num_rows):
        written = io.BytesIO()
        Image.new("RGB", (112, 112), (number % 256, number // 256 % 256, 128)).save(written, "PNG")
        url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a dog"}]})
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def train_by_hand(folder: Path, recipe: dict[str, object]) -> Run:
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps({**recipe, "output_dir": str(folder / "run")}))
    command = [sys.executable, "-m", "model_core.cli.train", "--config", str(folder / "recipe.json")]
    trainer = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=child_environment(**_ENVIRONMENT)
    )
    try:
        speed, _ = watch(folder / "run" / "events.jsonl", trainer)
        if trainer.wait(_LIMIT_SECONDS) != 0:
            raise SystemExit("the training by hand failed")
    finally:
        trainer.kill()
        trainer.wait()
    return Run(speed)


def watch(events: Path, process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Steps a second from step _WARM_STEPS to the last, and the process's own time in between as a share of a core."""
    begun: tuple[float, int, float] | None = None
    give_up_at = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < give_up_at:
        now, (step, total) = time.monotonic(), last_step(events)
        if begun is None and step >= _WARM_STEPS:
            begun = now, step, cpu_seconds(process.pid)
        elif begun is not None and step == total:
            seconds = now - begun[0]
            return (step - begun[1]) / seconds, (cpu_seconds(process.pid) - begun[2]) / seconds
        if process.poll() is not None:
            raise SystemExit(
                f"it ended with exit code {process.returncode} at step {step}, too early to be timed: more --rows; "
                "if the job failed, `dve worker --once` on a folder of your own says why"
            )
        time.sleep(_LOOK_SECONDS)
    raise SystemExit(f"it took longer than {_LIMIT_SECONDS:g} s")


def last_step(events: Path) -> tuple[int, int]:
    """The newest step that was told, and how many there will be; only the file's end is read."""
    try:
        with open(events, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 65_536))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0, -1
    for line in reversed(lines):
        if b'"kind":"step"' in line and line.endswith(b"}"):
            told = json.loads(line)
            return told["global_step"], told["data"]["num_steps_total"]
    return 0, -1


def cpu_seconds(pid: int) -> float:
    """Of the process alone, not of what it started."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    raise SystemExit(main())
