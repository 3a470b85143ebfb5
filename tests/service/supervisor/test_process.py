"""The trainer's process and its device: deadline, leash, locks, events, all with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model_core.errors import ConfigError
from service.supervisor.devices import Device, LockFolder, parse_devices
from service.supervisor.event_file import EventFile, parse_event
from service.supervisor.process import CHECKPOINTED, DEADLINE_PASSED, DONE, Launch, TrainerProcess

STANDIN = str(Path(__file__).with_name("standin_trainer.py"))
ROOT = Path(__file__).resolve().parents[3]

# A supervisor that starts a trainer holding a device and then stands still.
PARENT = """
import asyncio, sys
from pathlib import Path
from service.supervisor.devices import Device, LockFolder
from service.supervisor.process import Launch, TrainerProcess

async def main():
    folder = Path(sys.argv[1])
    lock = LockFolder(folder / "locks").try_lock(Device("cpu-0"))
    command = [sys.executable, sys.argv[2], "--config", str(folder / "config.json"),
               "--events-fd", "{events_fd}", "--control-fd", "{control_fd}"]
    child = TrainerProcess.start(
        Launch(command, folder / "events.jsonl", folder / "log", inherits=(lock.descriptor,)))
    child.extend_deadline(float(sys.argv[3]))
    print(child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Launch]:
    """A launch of the stand-in with a plan."""

    def make(inherits: tuple[int, ...] = (), **plan: object) -> Launch:
        write_plan(tmp_path, **plan)
        command = [
            sys.executable, STANDIN, "--config", str(tmp_path / "config.json"),
            "--events-fd", "{events_fd}", "--control-fd", "{control_fd}",
        ]  # fmt: skip
        return Launch(
            command, tmp_path / "events.jsonl", tmp_path / "log", inherits=inherits,
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    return make


def write_plan(folder: Path, **plan: object) -> None:
    (folder / "plan.json").write_text(json.dumps({"steps": 3, **plan}))
    config = {"datasets": [{"data_path": str(folder / "plan.json")}], "output_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))


async def until(said: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not said():
            await asyncio.sleep(0.005)


def kinds(path: Path) -> list[str]:
    return [event.kind for event in EventFile(path).read()]


def test_a_run_ends_with_0_and_tells_every_step(launch, tmp_path: Path) -> None:
    async def run() -> int:
        return await TrainerProcess.start(launch()).wait()

    assert asyncio.run(run()) == DONE, (tmp_path / "log").read_text()
    events = EventFile(tmp_path / "events.jsonl").read()
    assert [event.global_step for event in events if event.kind == "step"] == [1, 2, 3]
    assert events[-1].kind == "summary"


def test_it_saves_when_asked_to_stop(launch, tmp_path: Path) -> None:
    async def run() -> int:
        child = TrainerProcess.start(launch(steps=100_000))
        await until(lambda: "step" in kinds(tmp_path / "events.jsonl"))
        child.request_stop()
        return await child.wait()

    assert asyncio.run(run()) == CHECKPOINTED
    assert kinds(tmp_path / "events.jsonl")[-1] == "checkpoint"


def test_a_deadline_that_nobody_extends_ends_it(launch) -> None:
    async def run() -> int:
        child = TrainerProcess.start(launch(steps=100_000))
        child.extend_deadline(0.1)
        return await child.wait()

    assert asyncio.run(run()) == DEADLINE_PASSED


def test_a_killed_one_takes_its_children_along_and_frees_the_device(tmp_path: Path) -> None:
    """A data worker that outlives its trainer would go on holding the GPU."""
    locks = LockFolder(tmp_path / "locks")

    async def run() -> int:
        lock = locks.try_lock(Device("cpu-0"))
        assert lock is not None
        child_of_child = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
        command = [sys.executable, "-c", child_of_child]
        child = TrainerProcess.start(Launch(command, tmp_path / "e", tmp_path / "l", inherits=(lock.descriptor,)))
        lock.close()
        assert locks.try_lock(Device("cpu-0")) is None
        child.kill()
        code = await child.wait()
        await until(lambda: locks.try_lock(Device("cpu-0")) is not None)
        return code

    assert asyncio.run(run()) == -signal.SIGKILL


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_supervisor_killed_or_stopped_leaves_no_trainer(how: signal.Signals, tmp_path: Path) -> None:
    """SIGKILL: the leash. SIGSTOP: the trainer's own deadline, since its parent is alive and extends nothing."""
    write_plan(tmp_path, steps=100_000)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), STANDIN, "1.0"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        asyncio.run(until(lambda: "step" in kinds(tmp_path / "events.jsonl")))
        parent.send_signal(how)
        locks = LockFolder(tmp_path / "locks")
        asyncio.run(until(lambda: is_dead(child), 10))
        if how == signal.SIGKILL:
            # The dead let go of the slot one by one: the parent, and the threads of a trainer that counts as dead.
            asyncio.run(until(lambda: locks.try_lock(Device("cpu-0")) is not None, 10))
        else:
            # A stopped supervisor holds the slot itself: it may wake up and go on with it.
            assert locks.try_lock(Device("cpu-0")) is None
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_one_that_reads_nothing_does_not_stop_its_supervisor(tmp_path: Path) -> None:
    async def run() -> list[bool]:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = TrainerProcess.start(Launch(command, tmp_path / "e", tmp_path / "l"))
        sent = [child.extend_deadline(30) for _ in range(3000)]
        child.kill()
        await child.wait()
        return [*sent, child.extend_deadline(30)]

    sent = asyncio.run(run())
    assert sent[0]
    assert not sent[-1]


def test_a_trainer_stands_back_and_its_session_as_well(tmp_path: Path) -> None:
    async def run() -> None:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = TrainerProcess.start(Launch(command, tmp_path / "e", tmp_path / "l", niceness=7))
        group = Path(f"/proc/{child.pid}/autogroup")
        try:
            await until(lambda: os.getpriority(os.PRIO_PROCESS, child.pid) == 7)
            if group.exists():
                await until(lambda: group.read_text().endswith(" nice 7\n"))
        finally:
            child.kill()
            await child.wait()

    asyncio.run(run())


def test_a_slot_is_held_once(tmp_path: Path) -> None:
    locks = LockFolder(tmp_path, host="a/b")
    held = locks.try_lock(Device("gpu-0", 0))
    assert held is not None
    assert held.path.name == "a_b.gpu-0.lock"
    assert [lock.device.name for lock in locks.free([Device("gpu-0", 0), Device("gpu-1", 1)])] == ["gpu-1"]
    held.close()
    assert locks.try_lock(Device("gpu-0", 0)) is not None


@pytest.mark.parametrize(
    ("text", "concurrency", "names"),
    [("cpu", None, ["cpu-0"]), ("cpu", 2, ["cpu-0", "cpu-1"]), ("0,1", 2, ["gpu-0", "gpu-1", "gpu-0.1", "gpu-1.1"])],
)
def test_devices_by_name(text: str, concurrency: int | None, names: list[str]) -> None:
    assert [device.name for device in parse_devices(text, concurrency)] == names


@pytest.mark.parametrize("text", ["", "gpu", "0,0", "-1", "0,,1", "cuda:0"])
def test_devices_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, or GPU numbers"):
        parse_devices(text, None)


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "events"
    line = b'{"stage": 0, "global_step": 1, "kind": "step", "message": "", "data": {}}\n'
    path.write_bytes(line + line[:20])
    reader = EventFile(path)
    assert len(reader.read()) == 1
    with path.open("ab") as file:
        file.write(line[20:])
    assert [event.key for event in reader.read()] == [(0, 1, "step")]
    assert reader.read() == []


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b'{"stage": 0}', b'{"stage":"0","global_step":1,"kind":"x"}', b"\xff"]
)
def test_what_is_no_event(line: bytes) -> None:
    assert parse_event(line) is None
