"""The real processes of a small installation, on loopback: server and worker, each with its log in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.deploy.live import ROOT, answers, free_port, until
from tests.service.log_schema import read_log

_STANDIN = """
import sys
from service.settings import load_worker_settings
from service.worker import work
from tests.service.supervisor.worker_program import PROGRAMS
sys.exit(work(*load_worker_settings({"worker_metrics_port": sys.argv[1]}), programs=PROGRAMS))
"""


class Running:
    """One process and what it wrote to standard error."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log_path = log
        with open(log, "ab") as file:
            # Settings of this shell are not the installation's.
            kept = {key: value for key, value in os.environ.items() if not key.startswith("DVE_")}
            self.popen = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env={**kept, **environment}, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def log(self) -> list[dict]:
        return read_log(self.log_path.read_text())

    def kill(self) -> None:
        """And all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(30)

    def stop(self) -> int:
        self.popen.terminate()
        return self.popen.wait(60)


class Plant:
    """`start_server`, `start_worker`: again after a kill, on the same ports and folder."""

    def __init__(self, folder: Path, data_dir: Path | None = None, **settings: str) -> None:
        self.folder, self.data_dir = folder, data_dir or folder / "data"
        self.port, self.worker_port = free_port(), free_port()
        self.url, self.worker_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.worker_port}"
        self.environment = {
            "DVE_DATA_DIR": str(self.data_dir), "DVE_LOG_FORMAT": "json",
            **{f"DVE_{name.upper()}": value for name, value in settings.items()},
        }  # fmt: skip
        self.running: dict[str, Running] = {}

    def start_server(self) -> Running:
        self._start("server", ["-m", "service.cli", "serve", "--port", str(self.port)])
        self._until_up("server", f"{self.url}/health/ready")
        return self.running["server"]

    def start_worker(self, *, is_real: bool = True) -> Running:
        """is_real False: the stand-in programs of the supervisor's tests in the place of trainer, reader, publisher."""
        if is_real:
            self._start("worker", ["-m", "service.cli", "worker", "--worker-metrics-port", str(self.worker_port)])
        else:
            self._start("worker", ["-c", _STANDIN, str(self.worker_port)])
        self._until_up("worker", f"{self.worker_url}/metrics")
        return self.running["worker"]

    def _start(self, name: str, arguments: list[str]) -> None:
        self.running[name] = Running([sys.executable, *arguments], self.folder / f"{name}.log", self.environment)

    def _until_up(self, name: str, url: str) -> None:
        process = self.running[name]
        until(lambda: answers(url) or process.popen.poll() is not None, name, 300)
        assert process.popen.poll() is None, process.log_path.read_text()[-3000:]

    def end(self) -> None:
        for process in self.running.values():
            process.kill()


@contextlib.contextmanager
def run_plant(folder: Path, data_dir: Path | None = None, **settings: str) -> Iterator[Plant]:
    plant = Plant(folder, data_dir, **settings)
    try:
        yield plant
    finally:
        plant.end()
