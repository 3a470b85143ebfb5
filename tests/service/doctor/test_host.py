"""The doctor's lines about the host, each in each of its states."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from prometheus_client import start_http_server

from model_core.errors import ConfigError
from service.doctor import command, host
from service.keys import hashed_line, load_keys
from service.metrics import TrainingMetrics
from service.settings import Settings, WorkerSettings
from tests.service.conftest import run_server
from tests.service.fakes import FakeEngine

GIB = 2**30
LINE = hashed_line("sk-dve-x", "training")


def settings(folder: Path, **more) -> Settings:
    return Settings(data_dir=folder / "data", **more)


@pytest.mark.parametrize(("version", "state"), [((3, 11, 0), "ok"), ((3, 10, 9), "fail")])
def test_python(version: tuple[int, ...], state: str) -> None:
    assert host.python(version).state == state


@pytest.mark.parametrize(
    ("lines", "state", "says"),
    [
        (["pydantic>=2", "nothing-of-the-kind; extra == 'x'"], "ok", "ranges"),
        (["pydantic>=99"], "fail", "allowed >=99"),
        (["nothing-of-the-kind"], "fail", "is missing"),
    ],
)
def test_packages(lines: list[str], state: str, says: str) -> None:
    found = host.packages(lines)
    assert found.state == state and says in found.detail
    assert bool(found.remedy) == (state != "ok")


def test_a_program_that_is_not_installed_has_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_DISTRIBUTION", "nothing-of-the-kind")
    assert host.packages().state == "warn"


def test_ports(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        found = host.ports(settings(tmp_path, port=number), WorkerSettings(worker_metrics_port=number))
        assert [(one.name, one.state) for one in found] == [("port", "fail"), ("worker port", "warn")]
        assert "DVE_PORT" in found[0].remedy and f":{number}" in found[0].detail
    assert [one.state for one in host.ports(settings(tmp_path, port=0), WorkerSettings(worker_metrics_port=0))] == [
        "ok"
    ]


def test_ports_that_a_healthy_server_and_worker_have_are_theirs(tmp_path: Path) -> None:
    """The doctor called a running server ill, since its own port was taken."""
    metrics = TrainingMetrics()
    serving, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    worker = WorkerSettings(worker_metrics_port=serving.server_port)
    try:
        with run_server(FakeEngine()) as live:
            given = settings(tmp_path, port=int(live.url.rsplit(":", 1)[1]))
            assert [(one.name, one.state) for one in host.ports(given, worker)] == [
                ("port", "ok"),
                ("worker port", "ok"),
            ]
            assert live.chat("die").status_code == 503
            found = host.ports(given, worker)[0]
            assert found.state == "fail" and "engine_dead" in found.detail and "Restart" in found.remedy
            # A worker's metrics on the server's port are not what was meant to be there, and the other way round.
            crossed = host.ports(
                settings(tmp_path, port=serving.server_port), WorkerSettings(worker_metrics_port=given.port)
            )
            assert [one.state for one in crossed] == ["fail", "warn"]
    finally:
        serving.shutdown()
        serving.server_close()
        thread.join(10)


def test_the_data_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert "will be made" in host.data_folder(folder).detail
    folder.mkdir()
    assert host.data_folder(folder).state == "ok"
    assert list((tmp_path / "data").iterdir()) == [], "it leaves nothing behind"
    (tmp_path / "file").touch()
    assert host.data_folder(tmp_path / "file" / "below").state == "fail"
    # What root can't write either.
    found = host.data_folder(Path("/proc/self/data"))
    assert found.state == "fail" and "DVE_DATA_DIR" in found.remedy


@pytest.mark.parametrize(
    ("total", "free", "state"),
    [(100, 50, "ok"), (100, 9, "warn"), (20, 9, "ok"), (1000, 20, "ok"), (100, 0.5, "fail")],
)
def test_the_disk(tmp_path: Path, total: float, free: float, state: str) -> None:
    assert host.disk(tmp_path / "data", (int(total * GIB), int(free * GIB))).state == state
    assert host.disk(tmp_path / "data").detail.endswith(str(tmp_path))


def test_keys_that_are_configured(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(LINE)
    assert host.keys(settings(tmp_path, api_keys=LINE)).state == "ok"
    assert host.keys(settings(tmp_path, api_keys=f"@{path}")).detail.startswith("1, ")
    path.chmod(0o666)
    found = host.keys(settings(tmp_path, api_keys=f"@{path}"))
    assert found.state == "fail" and found.remedy == f"chmod go-w {path}"
    bad = settings(tmp_path, api_keys="sk-dve-the-key-itself")
    found = host.keys(bad)
    assert found.state == "fail" and "the-key-itself" not in str(found)
    with pytest.raises(ConfigError) as error:
        load_keys(bad)
    assert found.detail == str(error.value), "in the words of the start"


def test_keys_of_the_data_folder(tmp_path: Path) -> None:
    assert host.keys(settings(tmp_path)).state == "ok"
    elsewhere = settings(tmp_path, host="0.0.0.0")
    assert (host.keys(elsewhere).state, (tmp_path / "data").exists()) == ("warn", False)
    load_keys(elsewhere)
    plain = tmp_path / "data" / "keys" / "plain"
    assert (host.keys(elsewhere).state, str(plain) in host.keys(elsewhere).detail) == ("warn", True)
    plain.chmod(0o644)
    assert host.keys(elsewhere).state == "fail"
    plain.unlink()
    assert host.keys(elsewhere).state == "ok"


def test_the_clock() -> None:
    assert host.clock(None).state == host.clock(0.1).state == "ok"
    assert host.clock(-30.0).state == "warn"
    assert host.clock(None, now=0.0).state == "fail"
    assert host.clock(None, now=time.time() + 1e9).state == "ok", "nobody knows what is too late"


def test_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.tracing().state == "ok"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert "OTLP over HTTP" in host.tracing().detail
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert host.tracing().state == "fail"


def test_settings_that_contradict_each_other_are_told_in_the_words_of_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from service.cli import main

    monkeypatch.setenv("DVE_MODEL", "x")
    monkeypatch.setenv("DVE_QWEN_MODEL_NAME", "y")
    assert main(["serve"]) == 2
    start = capsys.readouterr().err.removeprefix("dve serve: error: ").strip()
    assert command.main([]) == 1
    assert start in " ".join(capsys.readouterr().out.split()), "over as many lines as it takes"
    assert os.environ["DVE_MODEL"] == "x"
