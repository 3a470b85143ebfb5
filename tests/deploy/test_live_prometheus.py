"""A real Prometheus scrapes the really running server and worker under load; every panel and rule is asked of it."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import yaml
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
    until,
    worker,
)
from tests.operations.traffic import picture

#: What needs an event that a healthy server under light load, and a worker with one good job, do not have.
NEEDS_AN_EVENT = {
    "dve_request_failure_total", "dve_admission_rejections_total", "dve_num_preemptions_total",
    "dve_encoder_cache_evictions_total", "dve_media_rejected_total", "dve:http_error_ratio:rate5m",
    "dve_model_swaps_total", "dve_train_mfu_ratio",
}  # fmt: skip
#: What is there and stays at 0 while all is well: every other number must have been above 0 once.
ZERO_IS_WELL = {"dve_train_stage", "dve_train_diversity_loss"}
#: Selectors of alerts that choose trouble by a label's value.
CHOOSES_TROUBLE = ('status=~"5.."', 'outcome="failed"')
SELECTOR = re.compile(r"\b(?:dve_\w+|dve:[\w:]+|up\b)(?:\{[^}]*\})?")
RULES = ROOT / "deploy/prometheus/rules.yml"
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

    def has_number(self, expr: str) -> bool:
        """One that was a number at any time (training shows nothing when its job has ended): NaN, 0 / 0, is no data."""
        return bool(self.ask(f"max_over_time(({expr})[10m:1s]) > -Inf"))

    def was_above_zero(self, expr: str) -> bool:
        return bool(self.ask(f"max_over_time(({expr})[10m:1s]) > 0"))

    def has_data(self, expr: str) -> bool:
        if any(name in expr for name in ZERO_IS_WELL):
            return self.has_number(expr)
        return self.was_above_zero(expr)


class Planted(BaseHTTPRequestHandler):
    """Scraped like the others: a gauge without labels is shown as 0 by whoever declares it, also if nobody sets it."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"# TYPE dve_nobody_sets gauge\ndve_nobody_sets 0.0\n")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def planted() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Planted) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{one.server_address[1]}"
        one.shutdown()


@pytest.fixture(scope="module")
def site(planted: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The shipped configuration with these targets and a faster clock."""
    folder = tmp_path_factory.mktemp("site")
    quiet = {"log_level": "warning"}
    with server(folder / "data", **quiet) as a_server, worker(folder / "data", worker_nice="0", **quiet) as a_worker:
        config = prometheus_config(a_server, a_worker).replace('["alertmanager:9093"]', "[]")
        config += f'  - job_name: planted\n    static_configs:\n      - targets: ["{planted}"]\n'
        (folder / "prometheus.yml").write_text(config)
        # Windows are shortened with the clock: nobody waits a quarter of an hour for a rate.
        (folder / "rules.yml").write_text(re.sub(r"\[(5|15|30)m\]", "[30s]", RULES.read_text()))
        url = f"http://127.0.0.1:{free_port()}"
        command = ("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb")
        address = f"--web.listen-address={url.removeprefix('http://')}"
        with running(*command, address, "--log.level=error", ready=f"{url}/-/ready"):
            yield Site(a_server, a_worker, url)


def chat(site: Site, number: int) -> int:
    body = question(number, max_tokens=12, ignore_eos=True, stream=number % 2 == 0)
    if number % 3 == 0:  # one that no cache knows
        body["messages"][0]["content"][0]["image_url"]["url"] = picture(random.Random(number))
    return httpx.post(f"http://{site.server}/v1/chat/completions", json=body, timeout=120).status_code


def panels(site: Site) -> set[str]:
    """Every query, once for each instance that its dashboard offers."""
    found = set()
    for path in DASHBOARDS.glob("*.json"):
        board = json.loads(path.read_text())
        (offer,) = [one["query"] for one in board["templating"]["list"] if one["name"] == "instance"]
        (up,) = re.fullmatch(r"label_values\((.+), instance\)", offer).groups()
        until(lambda up=up: site.ask(up), f"the first scrape of {path.name}")
        instances = [series["metric"]["instance"] for series in site.ask(up)]
        found |= {
            target["expr"].replace("$instance", instance).replace("$__rate_interval", "30s")
            for instance in instances
            for panel in board["panels"]
            for target in panel["targets"]
        }
    return found


def is_of_an_event(expr: str) -> bool:
    return any(name in expr for name in NEEDS_AN_EVENT) or any(chosen in expr for chosen in CHOOSES_TROUBLE)


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def selectors(expr: str) -> set[str]:
    """What an expression reads: each name with its labels, without ranges and what is made of them."""
    return set(SELECTOR.findall(expr))


def test_every_panel_and_every_rule_has_data(site: Site) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    with httpx.Client(base_url=f"http://{site.server}", timeout=120) as http, ThreadPoolExecutor(4) as pool:
        job = create_job(http)
        wanted = {expr for expr in panels(site) | recorded if not is_of_an_event(expr)}
        at_the_end = {expr for expr in wanted if "dve_job_attempts_total" in expr}
        empty = wanted - at_the_end
        number, deadline = 0, time.monotonic() + 600
        # Load until all is there: a rate needs two scrapes with something between them.
        while empty and time.monotonic() < deadline:
            assert set(pool.map(lambda n: chat(site, n), range(number, number + 6))) == {200}
            number += 6
            empty = {expr for expr in empty if not site.has_data(expr)}
        assert empty == set()
        assert finished_job(http, job)["status"] == "succeeded"
        until(lambda: all(site.has_data(expr) for expr in at_the_end), f"{at_the_end} have data", 60)
    told = httpx.get(f"{site.prometheus}/api/v1/rules", timeout=20).json()["data"]["groups"]
    states = [(rule["name"], rule["health"]) for group in told for rule in group["rules"]]
    assert len(states) == len(rules())
    assert {health for _, health in states} == {"ok"}, states
    alerts = httpx.get(f"{site.prometheus}/api/v1/alerts", timeout=20).json()["data"]["alerts"]
    assert [alert["labels"] for alert in alerts if alert["state"] == "firing"] == [], "all is well"


def blind(site: Site, exprs: Iterable[str]) -> set[str]:
    """Selectors that choose nothing, though what they choose needs no event: the rule could never fire."""
    asked = {one for expr in exprs for one in selectors(expr) if not is_of_an_event(one)}
    return {one for one in asked if not site.ask(f"last_over_time({one}[15m])")}


def test_what_every_rule_reads_is_there(site: Site) -> None:
    """After the load of the test above; with planted ones, which choose nothing."""
    assert blind(site, [rule["expr"] for rule in rules()]) == set()
    assert {name for rule in rules() for name in selectors(rule["expr"])} >= {'up{job="dve"}', "dve_model_info"}
    wrong = ['max by (job) (dve_jobs{job="dve", status="dead"}) > 0', 'rate(dve_prompt_tokens_total{job="d"}[5m]) == 0']
    assert blind(site, wrong) == {'dve_jobs{job="dve", status="dead"}', 'dve_prompt_tokens_total{job="d"}'}


def test_every_declared_metric_is_in_a_scrape(site: Site) -> None:
    """After the load of the test above; with a planted one, which is missed."""
    told = {name: scrape(address) for name, address in (("server", site.server), ("worker", site.worker))}
    assert missing(Metrics().registry, told["server"]) == set()
    # What a job had while it ran is gone from the worker's scrape, and in Prometheus's memory.
    known = httpx.get(f"{site.prometheus}/api/v1/label/__name__/values", timeout=20).json()["data"]
    told["worker"] |= set(known)
    assert missing(TrainingMetrics().registry, told["worker"]) == set()
    planted = TrainingMetrics()
    planted._gauge("train_nobody_feeds", "A gauge with a label, and nobody who sets it.", "label")
    assert missing(planted.registry, told["worker"]) == {"dve_train_nobody_feeds"}


def never_set(site: Site, names: Iterable[str]) -> set[str]:
    told = {name for name in names if not any(name in one for one in NEEDS_AN_EVENT | ZERO_IS_WELL)}
    return {name for name in told if not site.was_above_zero(name)}


def test_every_declared_metric_has_been_set(site: Site) -> None:
    """A gauge without labels is in every scrape, as 0, also where nobody sets it; a planted one is."""
    declared = {
        metric.name + {"counter": "_total", "histogram": "_count"}.get(metric.type, "")
        for registry in (Metrics().registry, TrainingMetrics().registry)
        for metric in registry.collect()
    }
    assert never_set(site, declared) == set()
    assert site.has_number("dve_nobody_sets"), "it is shown"
    assert never_set(site, ["dve_nobody_sets"]) == {"dve_nobody_sets"}
    assert not site.has_data("dve_nobody_sets") and not site.has_data("0 * dve_nobody_sets / dve_nobody_sets")


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
