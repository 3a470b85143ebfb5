"""A real Prometheus with the shipped configuration and rules, in a hurry: durations are shortened by substitution."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.deploy.live import prometheus_config
from tests.operations.plant import ROOT, Plant, answers, free_port, until

#: An age that is waited for is divided by this.
_HURRY = 2.5


def hurried(rules: str) -> str:
    """The shipped rules with every duration shortened, and nothing else changed."""
    rules = re.sub(r"\bfor: \d+[smhd]", "for: 1s", rules)
    rules = re.sub(r"\[\d+[mhd]\]", "[20s]", rules)
    return re.sub(r"(_age_seconds(?:\{[^}]*\})?\)? > )(\d+)", lambda m: f"{m[1]}{float(m[2]) / _HURRY:g}", rules)


class Alerts:
    """What fires now, by name."""

    def __init__(self, url: str) -> None:
        self._url = url

    def firing(self) -> set[str]:
        told = httpx.get(f"{self._url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in told if alert["state"] == "firing"}

    def wait_for(self, name: str, seconds: float = 180.0) -> None:
        until(lambda: name in self.firing(), f"{name} does not fire", seconds)

    def wait_until_silent(self, *names: str, seconds: float = 240.0) -> None:
        until(lambda: not self.firing() & {*names}, f"one of {names} still fires", seconds)


@contextmanager
def run_prometheus(folder: Path, plant: Plant) -> Iterator[Alerts]:
    config = prometheus_config(f"127.0.0.1:{plant.port}", f"127.0.0.1:{plant.worker_port}")
    (folder / "prometheus.yml").write_text(config)
    (folder / "rules.yml").write_text(hurried((ROOT / "deploy/prometheus/rules.yml").read_text()))
    port = free_port()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
    )  # fmt: skip
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/-/ready"), "Prometheus")
        yield Alerts(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)
