"""A job's life in logs and traces: from the request that made it, over its worker and trainer, to its model."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from service.jobs.job import Job
from service.supervisor.telling import tell_event
from tests.service.conftest import run_server
from tests.service.fakes import FakeEngine
from tests.service.log_schema import read_log
from tests.service.receiver import run_receiver
from tests.service.supervisor.conftest import Bench

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "x-request-id": "rid-7"}
CANARY = "the patient is called"


def submit(bench: Bench, **plan: object) -> Job:
    """Through a server, whose tracing is off: it passes on what it was sent."""
    message = {"role": "user", "content": CANARY}
    line = {"messages": [message, {"role": "assistant", "content": "x"}], "steps": 3, **plan}
    with run_server(FakeEngine(), data_dir=bench.data_dir) as live:
        file = {"file": ("train.jsonl", json.dumps(line) + "\n")}
        made = live.http.post("/v1/files", files=file, data={"purpose": "fine-tune"}).json()["id"]
        body = {"model": "fake/model:1", "training_file": made}
        answer = live.http.post("/v1/fine_tuning/jobs", json=body, headers=HEADERS)
        assert answer.status_code == 200, answer.text
    return bench.job(answer.json()["id"])


def test_a_jobs_life_is_one_trace_and_its_lines_have_its_ids(bench: Bench) -> None:
    job = submit(bench, checkpoint_every=2)
    assert (job.request_id, job.traceparent) == ("rid-7", HEADERS["traceparent"])
    with run_receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url}
        assert bench.worker(once=True, environment=environment).wait() == 0, bench.logs()
        found = receiver.wait_for("read files", "attempt", "train", "publish", "job", "wait")
    assert bench.job(job.id).status == "succeeded", bench.logs()
    assert {span.trace_id.hex() for _, span in found.values()} == {TRACE}
    assert {service for service, _ in found.values()} == {"dve-worker"}
    span = {name: span for name, (_, span) in found.items()}
    for part, whole in (("train", "attempt"), ("publish", "attempt"), ("wait", "job")):
        assert span[part].parent_span_id == span[whole].span_id, part
    assert span["job"].parent_span_id.hex() == "00f067aa0ba902b7", "submitted by the client's own span"
    assert span["job"].start_time_unix_nano <= span["attempt"].start_time_unix_nano
    assert span["job"].end_time_unix_nano >= span["publish"].end_time_unix_nano
    assert "checkpoint" in [event.name for event in span["attempt"].events]
    lines = read_log((bench.folder / "worker-0.log").read_text())
    of_job = [line for line in lines if line.get("job_id") == job.id]
    assert {line["process"] for line in lines} == {"worker", "trainer"}
    assert {line["message"] for line in of_job} >= {"files were read", "trainer event", "job succeeded"}
    inside = [line for line in of_job if line["message"] != "claimed"]
    assert {(line["request_id"], line["trace_id"]) for line in inside} == {("rid-7", TRACE)}
    kinds = [line["kind"] for line in lines if line["process"] == "trainer"]
    assert "step" not in kinds and {"freeze", "checkpoint", "summary"} <= set(kinds)


@pytest.mark.parametrize(
    "plan",
    [
        {"report": {"valid": False, "problems": [{"code": "record", "message": CANARY, "row": 1}]}, "check_code": 78},
        {"crash_at": 1, "crash_code": 78, "complaint": {"code": "invalid_training_file", "text": CANARY}},
    ],
)
def test_what_a_file_says_is_in_no_line(bench: Bench, plan: dict) -> None:
    """A verdict's reason quotes the record that it refuses, and was logged."""
    job = submit(bench, **plan)
    bench.worker(once=True, job_max_attempts=1, log_level="debug").wait()
    assert bench.job(job.id).status == "failed"
    text = (bench.folder / "worker-0.log").read_text()
    assert CANARY not in text
    assert any(line.get("end") in ("failed", "retry") for line in read_log(text))


def test_a_trainers_event_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tell_event("error", 1, 5, {"code": "nan_loss", "record": CANARY, "loss": 2.0, "step": "no number"})
    tell_event("step", 1, 6, {"loss": 0.5})
    tell_event("warning:slow", 1, 6, {})
    fields = [record.fields for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["ERROR", "DEBUG", "WARNING"]
    assert fields[0] == {
        "process": "trainer", "kind": "error", "stage": 1, "global_step": 5, "loss": 2.0, "code": "nan_loss",
    }  # fmt: skip
    assert fields[1]["loss"] == 0.5


def test_no_module_but_one_imports_the_tracer() -> None:
    root = Path(__file__).parents[3]
    imports = re.compile(r"^\s*(from|import) opentelemetry", re.MULTILINE)
    files = [path for folder in ("service", "model_core") for path in (root / folder).rglob("*.py")]
    importing = [path for path in files if imports.search(path.read_text())]
    assert [path.name for path in importing] == ["otel.py"]
