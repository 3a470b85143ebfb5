"""A trainer without a model: speaks TRAINING's contract (events, control, exit codes, step folders), run as a script.

What it does is read from the recipe's training file, a JSON object:
    steps, step_seconds, checkpoint_every, tokens: how far and how fast;
    witness: a path whose flock is held as long as this process lives; whoever finds it held writes `<witness>.twice`;
    crash_at, crash_code, crash_once: leave at that step; complaint: {code, retry} to say before;
    untold_at: be killed when that step's checkpoint is complete and not told of yet;
    deaf: ignore SIGTERM; stall_at: stand still there; write_seconds: how long a checkpoint is half written.

Its weights are a hash of all steps in order, so that a lost or repeated step shows.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from model_core.errors import CheckpointError
from model_core.manifest import verify_folder, write_folder


class Standin:
    def __init__(self, args: argparse.Namespace) -> None:
        self.config = json.loads(args.config.read_text())
        self.plan_path = Path(self.config["datasets"][0]["data_path"])
        self.plan: dict[str, Any] = json.loads(self.plan_path.read_text())
        self.out = Path(self.config["output_dir"])
        self.events = os.fdopen(args.events_fd, "w", buffering=1)
        self.stop = threading.Event()
        self.save = threading.Event()
        self.freezes: list[Any] = []
        self.deadline: float | None = None
        self.state, self.step, self.resumed = "", 0, args.resume
        threading.Thread(target=self.watch_deadline, daemon=True).start()
        if args.control_fd is not None:
            threading.Thread(target=self.read_control, args=(args.control_fd,), daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: None if self.plan.get("deaf") else self.stop.set())

    def read_control(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                told = json.loads(line)
                if told["command"] == "deadline":
                    self.deadline = time.monotonic() + told["seconds"]
                elif told["command"] == "freeze":
                    self.freezes.append(told["freeze"])
                else:
                    self.save.set()
        os._exit(79)

    def watch_deadline(self) -> None:
        while self.deadline is None or time.monotonic() < self.deadline:
            time.sleep(0.01)
        os._exit(79)

    def say(self, kind: str, message: str = "", **data: Any) -> None:
        line = {"stage": 0, "global_step": self.step, "kind": kind, "message": message, "data": data}
        self.events.write(json.dumps(line) + "\n")

    def load(self) -> None:
        if self.resumed is None:
            return
        folder = Path(self.resumed)
        try:
            verify_folder(folder, deep=True)
        except CheckpointError as error:
            self.say("error", str(error), code="checkpoint_corrupt", retry=False)
            sys.exit(78)
        kept = json.loads((folder / "trainer.json").read_text())
        self.state, self.step = kept["state"], kept["global_step"]
        self.say("resumed", path=str(folder), from_step=self.step)

    def checkpoint(self, reason: str) -> None:
        target = self.out / f"step-{self.step}"
        kept = {"state": self.state, "global_step": self.step, "stage": 0}

        def fill(folder: Path) -> None:
            (folder / "trainer.json").write_text(json.dumps(kept))
            time.sleep(self.plan.get("write_seconds", 0))

        write_folder(target, fill, extra=kept)
        if self.step == self.plan.get("untold_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.say("checkpoint", path=str(target), step=self.step, reason=reason, metrics={"loss": 1 / self.step})

    def fill_final(self, folder: Path) -> None:
        (folder / "state").write_text(self.state)

    def maybe_crash(self) -> None:
        marker = self.plan_path.with_suffix(".crashed")
        if self.step != self.plan.get("crash_at") or (self.plan.get("crash_once") and marker.exists()):
            return
        marker.touch()
        if complaint := self.plan.get("complaint"):
            self.say("error", "as planned", **complaint)
        code = self.plan.get("crash_code", 1)
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)

    def run(self) -> int:
        self.load()
        total = self.plan["steps"]
        self.say("validated", num_samples=total, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.say("freeze", rows=[{"component": "gate", "trainable": 3, "total": 3, "state": "TRAINABLE"}])
        while self.step < total:
            if self.stop.is_set():
                if self.step:
                    self.checkpoint("requested")
                return 75
            if self.freezes:
                self.say("switched", freeze=self.freezes.pop(0))
            if self.save.is_set() and self.step:
                self.save.clear()
                self.checkpoint("requested")
            self.maybe_crash()
            time.sleep(3600 if self.step == self.plan.get("stall_at") else self.plan.get("step_seconds", 0.01))
            self.step += 1
            self.state = hashlib.sha256(f"{self.state}{self.step}".encode()).hexdigest()
            self.say(
                "step", loss=1 / self.step, num_steps_total=total, tokens=10, label_tokens=5, samples=1, seconds=0.01,
                tokens_per_second=1000.0, learning_rates={"gate": 1e-4}, dataset_losses={"a": 0.5}, grad_norm=1.0,
                dataset_samples=[1],
                said_at=time.time(),
            )  # fmt: skip
            if self.step % self.plan.get("checkpoint_every", 5) == 0 or self.step == total:
                self.checkpoint("every")
        write_folder(self.out / "final", self.fill_final, extra={})
        self.say("summary", final=str(self.out / "final"), trained_tokens=10 * total)
        return 0


def hold_witness(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path(path + ".twice").write_text(str(os.getpid()))
        os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int)
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    trainer = Standin(args)
    if args.dry_run:
        return 0
    if witness := trainer.plan.get("witness"):
        hold_witness(witness)
    try:
        return trainer.run()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os._exit(74)  # nothing more is said: there is no room for it


if __name__ == "__main__":
    sys.exit(main())
