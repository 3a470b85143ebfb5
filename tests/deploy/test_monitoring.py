"""Dashboards and rules ask only for what is declared, and are what their code says; every alert is explained."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from prometheus_client import CollectorRegistry

from service.metrics import Metrics, TrainingMetrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
NAME = re.compile(r"\b(?:dve_\w+|dve:[\w:]+)")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dve_dashboards", ROOT / "deploy/grafana/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def declared(registry: CollectorRegistry) -> set[str]:
    """Every name that a scrape can show, and what the rules record from them."""
    names = set(re.findall(r"record: (\S+)", RULES.read_text()))
    for metric in registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        names |= {metric.name + suffix for suffix in suffixes}
    return names


def unknown(expressions: list[str]) -> set[str]:
    known = declared(Metrics().registry) | declared(TrainingMetrics().registry)
    return {name for expr in expressions for name in NAME.findall(expr)} - known


def expressions_of(board: dict) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_dashboards_are_what_their_code_writes(tmp_path: Path) -> None:
    generator = load_generator()
    generator.write(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").iterdir()}
    assert written == shipped, "run: python deploy/grafana/build.py"


def test_every_panel_asks_for_declared_metrics_and_explains_itself() -> None:
    for path in (ROOT / "deploy/grafana/dashboards").glob("*.json"):
        board = json.loads(path.read_text())
        assert not unknown(expressions_of(board)), path.name
        for panel in board["panels"]:
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_every_declared_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    shown = RULES.read_text() + "".join(p.read_text() for p in (ROOT / "deploy/grafana/dashboards").glob("*.json"))
    registries = (Metrics().registry, TrainingMetrics().registry)
    unseen = {m.name for registry in registries for m in registry.collect() if m.name not in shown}
    assert unseen == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")), ids=lambda path: path.stem
)
def test_every_instance_that_a_board_offers_has_what_it_filters_by_instance(path: Path) -> None:
    """Training offered the servers' instances, and its panels filter the worker's series."""
    board = json.loads(path.read_text())
    (query,) = [one["query"] for one in board["templating"]["list"] if one["name"] == "instance"]
    (jobs,) = re.fullmatch(r'label_values\(up\{job=~?"([^"]+)"\}, instance\)', query).groups()
    own = {"dve": Metrics().registry, "dve-worker": TrainingMetrics().registry}
    filtered = [expr for expr in expressions_of(board) if "$instance" in expr]
    assert filtered
    for job in jobs.split("|"):
        assert {name for expr in filtered for name in NAME.findall(expr)} <= declared(own[job]), job


def test_a_planted_metric_is_found() -> None:
    assert unknown(["sum(rate(dve_request_success_total[5m]))"]) == set()
    assert unknown(["dve_nothing_total + up"]) == {"dve_nothing_total"}
    assert unknown(["dve_ttft_seconds_bucket"]) == {"dve_ttft_seconds_bucket"}
    generator = load_generator()
    planted = generator.Panel("Planted", "none", "Nobody declares it.", generator.gauge("dve_planted"))
    board = generator.render("Planted", (*generator.DASHBOARDS["Engine"], planted))
    assert unknown(expressions_of(board)) == {"dve_planted"}


def test_rules_ask_for_declared_metrics_and_every_alert_is_tested_and_explained() -> None:
    rules, tests = RULES.read_text(), (ROOT / "deploy/prometheus/tests/alerts.yml").read_text()
    assert not unknown([rules])
    runbook = (ROOT / "RUNBOOK.md").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert len(alerts) == len(set(alerts)) >= 12
    for alert in alerts:
        assert f"\n## {alert}\n" in runbook, alert
        assert f"runbook: RUNBOOK.md#{alert.lower()}" in rules, alert
        # Silent at least twice (before and after) and firing once.
        assert len(re.findall(rf"alertname: {alert}\b", tests)) >= 3, alert
        assert re.search(rf"alertname: {alert}\n\s+exp_alerts", tests), alert
    assert re.findall(r"\n## (\w+)\n", runbook) == alerts, "the runbook's order is the rules'"
    assert f"each of {len(alerts)} alerts" in (ROOT / "README.md").read_text()


@pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="THE ALERT RULES ARE NOT TESTED in this run: promtool is not installed (Debian: prometheus)",
)
@pytest.mark.parametrize("arguments", [["check", "config", "prometheus.yml"], ["test", "rules", "tests/alerts.yml"]])
def test_prometheus_agrees(arguments: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=ROOT / "deploy/prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
