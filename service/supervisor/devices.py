"""Devices as slots, each with a lock file that says whether something still computes there.

In: the worker's `--devices` and the data folder. Out: free slots, each held by a flock. A trainer inherits the lock's
descriptor, so the slot is free only when the trainer and every child of it are really dead, whoever killed whom.
It refuses to know jobs and models.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_core.errors import ConfigError

_QUERY = ("--query-gpu=index,memory.total,memory.free", "--format=csv,noheader,nounits")
_MIB = 2**20
_PROBE_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Device:
    """A place where one trainer may compute. gpu: its index as nvidia-smi counts; None: a share of the processors."""

    name: str
    gpu: int | None = None


@dataclass(frozen=True, slots=True)
class GpuMemory:
    total_bytes: int
    free_bytes: int


class DeviceLock:
    """One slot, held. `close` lets go of this process's hold; a trainer's own hold stays."""

    def __init__(self, device: Device, path: Path, descriptor: int) -> None:
        self.device, self.path, self._descriptor = device, path, descriptor

    @property
    def descriptor(self) -> int:
        """For the trainer to inherit."""
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LockFolder:
    """`<data folder>/locks`: a file for every device of every host that shares the folder."""

    def __init__(self, folder: Path, host: str | None = None) -> None:
        self._folder = folder
        self._host = re.sub(r"[^\w.-]", "_", host or socket.gethostname()) or "host"

    def try_lock(self, device: Device) -> DeviceLock | None:
        """The slot, or None while anything alive holds it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._host}.{device.name}.lock"
        descriptor = try_flock(path)
        return None if descriptor is None else DeviceLock(device, path, descriptor)

    def free(self, devices: Sequence[Device]) -> Iterator[DeviceLock]:
        """Each slot that can be had now, held as it is handed out; the caller closes it."""
        for device in devices:
            lock = self.try_lock(device)
            if lock is not None:
                yield lock


def try_flock(path: Path) -> int | None:
    """A descriptor that holds the file's lock, as do all that inherit it; None while others hold it. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def parse_devices(text: str, concurrency: int | None) -> tuple[Device, ...]:
    """`auto`, `cpu`, or GPU numbers with commas between; so many slots a device, one unless it is said.

    Raises:
        ConfigError: another word, a GPU that is named twice, or one that nvidia-smi does not know.
    """
    names = [part.strip() for part in text.split(",")]
    known = [] if names == ["cpu"] else [str(gpu) for gpu in sorted(gpu_memory())]
    if names == ["auto"]:
        names = known or ["cpu"]
    if len(set(names)) != len(names) or not all(name == "cpu" or re.fullmatch(r"\d{1,3}", name) for name in names):
        raise ConfigError(
            "these devices can't be trained on", value=text, allowed="auto, cpu, or GPU numbers: 0 or 0,1",
            fix="Name each once", param="worker_devices",
        )  # fmt: skip
    missing = [name for name in names if known and name not in (*known, "cpu")]
    if missing:
        raise ConfigError(
            "this machine has no such GPU", value=missing[0], allowed=", ".join(["auto", "cpu", *known]),
            fix="Name one that nvidia-smi shows", param="worker_devices",
        )  # fmt: skip
    return tuple(
        Device(f"cpu-{slot}") if name == "cpu" else Device(f"gpu-{name}" + (f".{slot}" if slot else ""), int(name))
        for slot in range(concurrency or 1)
        for name in names
    )


def gpu_memory() -> dict[int, GpuMemory]:
    """By GPU, as nvidia-smi tells it; empty where there is none. This process never opens CUDA."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    try:
        told = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for line in told.stdout.splitlines():
        with contextlib.suppress(ValueError):
            index, total, free = (int(part) for part in line.split(","))
            found[index] = GpuMemory(total * _MIB, free * _MIB)
    return found
