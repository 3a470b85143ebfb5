"""A real Prometheus scrapes the really running server and worker under load; every panel and rule is asked of it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics, TrainingMetrics
from tests.deploy.live import (
    ROOT,
    create_job,
    finished_job,
    free_port,
    prometheus_config,
    question,
    running,
    server,
    worker,
)

#: What needs an event that a healthy server under light load, and a worker with one good job, do not have.
NEEDS_AN_EVENT = {
    "dve_request_failure_total", "dve_admission_rejections_total", "dve_num_preemptions_total",
    "dve_encoder_cache_evictions_total", "dve_media_rejected_total", "dve:http_error_ratio:rate5m",
    "dve_model_swaps_total",
}  # fmt: skip
DASHBOARDS = ROOT / "deploy/grafana/dashboards"

pytestmark = [
    pytest.mark.ops,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (make test-ops does)"),
]


@dataclass(frozen=True)
class Site:
    server: str
    worker: str
    prometheus: str

    def ask(self, expr: str) -> list:
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expr}, timeout=20).json()
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The shipped configuration with these targets and a faster clock."""
    folder = tmp_path_factory.mktemp("site")
    quiet = {"log_level": "warning"}
    with server(folder / "data", **quiet) as a_server, worker(folder / "data", **quiet) as a_worker:
        config = prometheus_config(a_server, a_worker).replace('["alertmanager:9093"]', "[]")
        (folder / "prometheus.yml").write_text(config)
        # Windows are shortened with the clock: nobody waits a quarter of an hour for a rate.
        rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
        (folder / "rules.yml").write_text(re.sub(r"\[(5|15|30)m\]", "[30s]", rules))
        url = f"http://127.0.0.1:{free_port()}"
        command = ("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb")
        address = f"--web.listen-address={url.removeprefix('http://')}"
        with running(*command, address, "--log.level=error", ready=f"{url}/-/ready"):
            yield Site(a_server, a_worker, url)


def chat(site: Site, number: int) -> int:
    body = question(number, max_tokens=12, ignore_eos=True, stream=number % 2 == 0)
    return httpx.post(f"http://{site.server}/v1/chat/completions", json=body, timeout=120).status_code


def panels() -> set[str]:
    return {
        target["expr"].replace("$instance", ".*").replace("$__rate_interval", "30s")
        for path in DASHBOARDS.glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    }


def test_every_panel_and_every_recorded_rule_has_data(site: Site) -> None:
    with httpx.Client(base_url=f"http://{site.server}", timeout=120) as http, ThreadPoolExecutor(4) as pool:
        job = create_job(http)
        empty = {expr for expr in panels() if not any(name in expr for name in NEEDS_AN_EVENT)}
        number, deadline = 0, time.monotonic() + 600
        # Load until all is there: a rate needs two scrapes with something between them.
        while empty and time.monotonic() < deadline:
            assert set(pool.map(lambda n: chat(site, n), range(number, number + 6))) == {200}
            number += 6
            empty = {expr for expr in empty if not site.ask(expr)}
        assert empty == set()
        assert finished_job(http, job)["status"] == "succeeded"
    rules = httpx.get(f"{site.prometheus}/api/v1/rules", timeout=20).json()["data"]["groups"]
    states = [(rule["name"], rule["health"]) for group in rules for rule in group["rules"]]
    assert len(states) == len(re.findall(r"- (?:alert|record):", (ROOT / "deploy/prometheus/rules.yml").read_text()))
    assert {health for _, health in states} == {"ok"}, states
    alerts = httpx.get(f"{site.prometheus}/api/v1/alerts", timeout=20).json()["data"]["alerts"]
    assert [alert["labels"] for alert in alerts if alert["state"] == "firing"] == [], "all is well"


def test_every_declared_metric_is_in_a_scrape(site: Site) -> None:
    """After the load of the test above; with a planted one, which is missed."""
    told = {name: scrape(address) for name, address in (("server", site.server), ("worker", site.worker))}
    assert missing(Metrics().registry, told["server"]) == set()
    assert missing(TrainingMetrics().registry, told["worker"]) == set()
    planted = TrainingMetrics()
    planted._gauge("train_nobody_feeds", "A gauge with a label, and nobody who sets it.", "label")
    assert missing(planted.registry, told["worker"]) == {"dve_train_nobody_feeds"}


def scrape(address: str) -> set[str]:
    """Metrics that have a sample: of one with labels nothing is shown before it is set."""
    text = httpx.get(f"http://{address}/metrics", timeout=20).text
    return {family.name for family in text_string_to_metric_families(text) if family.samples}


def missing(registry: CollectorRegistry, seen: set[str]) -> set[str]:
    declared = {metric.name for metric in registry.collect()}
    return {
        name for name in declared - seen if not any(event.removesuffix("_total") == name for event in NEEDS_AN_EVENT)
    }


def test_a_planted_panel_has_no_data(site: Site) -> None:
    assert site.ask('sum(rate(dve_http_requests_total{route="/metrics"}[30s]))')
    assert not site.ask("sum(rate(dve_nothing_total[30s]))")
