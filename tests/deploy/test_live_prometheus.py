"""A real Prometheus scrapes the really running demo server under load, and every panel and rule is asked of it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
#: What needs an event that a healthy server under light load does not have.
NEEDS_AN_EVENT = {
    "dve_request_failure_total", "dve_admission_rejections_total", "dve_num_preemptions_total",
    "dve_encoder_cache_evictions_total", "dve_media_rejected_total", "dve:http_error_ratio:rate5m",
    "dve_model_swaps_total", "dve_train_", "dve_job",  # a second model; a worker
}  # fmt: skip

pytestmark = [
    pytest.mark.ops,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (make test-ops does)"),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(url: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(url)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "service.cli", "serve", "--port", str(port)], cwd=ROOT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health/ready")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The shipped configuration with this server as its target, and a faster clock."""
    folder = tmp_path_factory.mktemp("prometheus")
    shipped = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    config = shipped.replace("server:8000", server).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(config)
    # Windows are shortened with the clock: nobody waits a quarter of an hour for a rate.
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    for window in ("[5m]", "[15m]", "[30m]"):
        rules = rules.replace(window, "[30s]")
    (folder / "rules.yml").write_text(rules)
    port = free_port()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
         f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"],
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/-/ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def chat(server: str, number: int) -> int:
    picture = base64.b64encode((ROOT / f"examples/{('dog', 'word', 'pair')[number % 3]}.png").read_bytes()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    body = {
        "model": "dve-demo",
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": f"what is it? {number}"}]}],
        "max_tokens": 12,
        "ignore_eos": True,
        "stream": number % 2 == 0,
    }
    return httpx.post(f"http://{server}/v1/chat/completions", json=body, timeout=60).status_code


def test_every_panel_and_every_recorded_rule_has_data(server: str, prometheus: str) -> None:
    def ask(expr: str) -> list:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expr}, timeout=10).json()
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    queries = {
        target["expr"].replace("$instance", ".*").replace("$__rate_interval", "30s")
        for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    }
    empty = {expr for expr in queries if not any(name in expr for name in NEEDS_AN_EVENT)}
    number, deadline = 0, time.monotonic() + 120
    with ThreadPoolExecutor(8) as pool:
        # Load until all is there: a rate needs two scrapes with something between them.
        while empty and time.monotonic() < deadline:
            assert set(pool.map(lambda n: chat(server, n), range(number, number + 10))) == {200}
            number += 10
            empty = {expr for expr in empty if not ask(expr)}
    assert empty == set()
    rules = httpx.get(f"{prometheus}/api/v1/rules", timeout=10).json()["data"]["groups"]
    states = [(rule["name"], rule["health"]) for group in rules for rule in group["rules"]]
    assert len(states) == 17
    assert {health for _, health in states} == {"ok"}, states
    assert not [a for a in httpx.get(f"{prometheus}/api/v1/alerts", timeout=10).json()["data"]["alerts"]], "all is well"
