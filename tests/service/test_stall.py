"""An engine that hangs or dies is seen in a scrape, and the shipped rules say so: the bridge tells, not the engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import LiveServer
from tests.service.fakes import FakeEngine

RULES = Path(__file__).resolve().parents[2] / "deploy/prometheus/rules.yml"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


class Stuck(FakeEngine):
    """A step does not return until it is let go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entered, self.leave = threading.Event(), threading.Event()

    def step(self):
        self.entered.set()
        assert self.leave.wait(60)
        return super().step()


def test_requests_behind_a_step_that_hangs_are_seen(start) -> None:
    """The engine's snapshot is of before the step: of all three it says that nobody runs and nobody waits."""
    engine = Stuck()
    live = start(engine)
    asking = [threading.Thread(target=live.chat) for _ in range(3)]
    for thread in asking:
        thread.start()
        assert engine.entered.wait(20)
    until(lambda: live.metric("dve_engine_open_requests") == 3)
    assert live.metric("dve_num_requests_running") == 0
    assert live.metric("dve_num_requests_waiting") == 3
    assert live.metric('dve_queue_depth{stage="prefill"}') == 3
    clock = live.client.clock
    live.client.clock = lambda: clock() + 300
    assert live.metric("dve_engine_stalled_seconds") > 299
    assert live.http.get("/health/live").json()["error"]["code"] == "engine_stalled"
    live.client.clock = clock
    engine.leave.set()
    for thread in asking:
        thread.join(20)
    assert live.metric("dve_engine_open_requests") == live.metric("dve_engine_stalled_seconds") == 0
    assert live.metric("dve_num_requests_waiting") == 0


@needs_promtool
def test_a_hung_step_fires_the_alert_and_an_idle_server_does_not(start, tmp_path: Path) -> None:
    engine = Stuck()
    live = start(engine)
    assert alerts(tmp_path, live) == set()
    asking = threading.Thread(target=live.chat)
    asking.start()
    assert engine.entered.wait(20)
    clock = live.client.clock
    live.client.clock = lambda: clock() + 121
    assert alerts(tmp_path, live) == {"DveStalled"}
    live.client.clock = clock
    engine.leave.set()
    asking.join(20)
    assert alerts(tmp_path, live) == set()


@needs_promtool
def test_steps_that_compute_nothing_fire_it_too(start, tmp_path: Path) -> None:
    live = start()
    assert live.chat().status_code == 200
    live.engine.hold()  # it turns, and its steps are empty
    asking = threading.Thread(target=live.chat)
    asking.start()
    until(lambda: live.metric("dve_engine_open_requests") == 1)
    assert live.metric("dve_engine_stalled_seconds") < 60
    assert alerts(tmp_path, live) == {"DveStalled"}
    live.engine.release()
    asking.join(20)
    assert alerts(tmp_path, live) == set()


@needs_promtool
def test_an_engine_that_dies_on_its_first_step_is_told(start, tmp_path: Path) -> None:
    live = start()
    assert live.metric('dve_engine_state{state="ready"}') == 1
    assert live.metric('dve_engine_state{state="dead"}') == 0
    assert live.chat("die").status_code == 503
    assert live.metric('dve_engine_state{state="dead"}') == 1
    assert live.metric('dve_engine_state{state="ready"}') == 0
    assert alerts(tmp_path, live) == {"DveEngineDead"}


def test_the_states_of_a_load_are_told(start) -> None:
    may_load = threading.Event()

    def load() -> FakeEngine:
        assert may_load.wait(20)
        return FakeEngine()

    live = start(load=load)
    assert live.metric('dve_engine_state{state="loading"}') == 1
    may_load.set()
    until(lambda: live.metric('dve_engine_state{state="ready"}') == 1)


def until(is_so, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def alerts(folder: Path, live: LiveServer) -> set[str]:
    """Which of the alerts on the engine fire after ten minutes in which every scrape is like this one."""
    series = [
        {"series": f"{sample.name}{labels(sample.labels)}", "values": f"{sample.value}x10"}
        for family in text_string_to_metric_families(live.http.get("/metrics").text)
        for sample in family.samples
        if family.name.startswith(("dve_engine_", "dve_iteration_tokens", "dve_num_requests", "dve_model_info"))
    ]
    series.append({"series": 'up{job="dve", instance="a"}', "values": "1x10"})
    return {name for name in ("DveStalled", "DveEngineDead", "DveNotReady", "DveDown") if fires(folder, series, name)}


def labels(given: dict[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in {**given, "instance": "a"}.items()) + "}"


def fires(folder: Path, series: list[dict[str, str]], alert: str) -> bool:
    """promtool tells what it got where that is not what was expected: nothing."""
    silent = {"interval": "1m", "input_series": series, "alert_rule_test": [{"eval_time": "10m", "alertname": alert}]}
    case = folder / "case.yml"
    case.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [silent]}))
    done = subprocess.run(["promtool", "test", "rules", str(case)], capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0 or f'alertname="{alert}"' in told, told
    return done.returncode != 0
