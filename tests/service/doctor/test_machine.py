"""The doctor's lines about the machine and its model, in each of its states, of reports as the probe gives them."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from model_core.cli import machine as probe
from model_core.demo_model import demo_folder
from model_core.errors import CheckpointError
from service.doctor import command
from service.doctor.machine import ask_machine, machine_findings
from service.settings import Settings

WELL = {
    "versions": {"python": "3.11.7", "cuda": None, "torch": "2.13.0", "transformers": "5.23.0", "flash-attn": None},
    "device": {"asked": "cpu", "device": "cpu", "name": "a processor", "num_threads": 2},
    "flash_attention": {"is_needed": False, "is_usable": False, "why": "no CUDA device"},
    "models": [
        {"name": "m", "is_folder": True, "has_manifest": True, "num_files": 8, "is_hashed": False, "licence": "mit"}
    ],
    "config": {"fusion": "gated", "dtype": "torch.float32"},
    "memory": {"device": "cpu", "needed_bytes": 2**30, "available_bytes": 2**34, "fits": True, "training": ["full"]},
}
GPU = {"asked": "auto", "device": "cuda:0", "name": "H100", "capability": "9.0", "free_bytes": 1, "total_bytes": 2}
BROKEN = {"error": "as it was", "code": "internal_error"}


def states(**changes) -> dict[str, str]:
    report = copy.deepcopy(WELL)
    for part, values in changes.items():
        whole = report[part][0] if part == "models" else report[part]
        whole.clear() if "error" in values else None
        whole.update(values)
    found = machine_findings(report)
    assert all(bool(one.remedy) == (one.state != "ok") for one in found)
    return {one.name: one.state for one in found}


def test_all_is_well() -> None:
    assert set(states().values()) == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "state"),
    [
        ({"versions": {"torch": None}}, "versions", "fail"),
        ({"versions": BROKEN}, "versions", "fail"),
        ({"device": {"asked": "auto"}}, "device", "warn"),
        ({"device": GPU}, "device", "ok"),
        ({"device": BROKEN}, "device", "fail"),
        ({"flash_attention": {"is_needed": True, "is_usable": True}}, "flash-attn", "ok"),
        ({"flash_attention": {"is_needed": True}}, "flash-attn", "warn"),
        ({"flash_attention": BROKEN}, "flash-attn", "fail"),
        ({"models": {"has_manifest": False}}, "model", "warn"),
        ({"models": {"has_manifest": False, "is_folder": False}}, "model", "ok"),
        ({"models": {"is_hashed": True}}, "model", "ok"),
        ({"models": BROKEN}, "model", "fail"),
        ({"config": BROKEN}, "model", "fail"),
        ({"models": {"licence": None}}, "licence", "warn"),
        ({"models": {"licence": probe.restricted_licence("Qwen/Qwen2.5-VL-3B-Instruct")}}, "licence", "warn"),
        ({"memory": {"fits": False}}, "memory", "fail"),
        ({"memory": {"training": []}}, "memory", "warn"),
        ({"memory": BROKEN}, "memory", "warn"),
    ],
)
def test_each_line_in_each_state(changes: dict, name: str, state: str) -> None:
    assert states(**changes)[name] == state


def test_a_probe_that_crashes_or_hangs_is_a_finding(tmp_path: Path) -> None:
    def ask(code: str, seconds: float = 60.0):
        return ask_machine(Settings(), deep=True, seconds=seconds, command=(sys.executable, "-S", "-c", code))

    assert ask(f"print('noise'); print({json.dumps(json.dumps(WELL))})") == WELL
    for told in (ask("import os; os.abort()"), ask("raise SystemExit('no driver')"), ask("while True: pass", 0.5)):
        (finding,) = machine_findings(told)
        assert (finding.name, finding.state) == ("device", "fail")
    assert "no driver" in ask("raise SystemExit('no driver')")
    assert isinstance(ask_machine(Settings(), deep=False, seconds=1, command=(str(tmp_path / "none"),)), str)


def test_the_probe_reads_a_model_folder(tmp_path: Path) -> None:
    facts = probe.model_facts(str(demo_folder()), deep=True)
    assert (facts["has_manifest"], facts["is_hashed"], facts["licence"]) == (True, True, "apache-2.0")
    folder = tmp_path / "model"
    shutil.copytree(demo_folder(), folder)
    with open(folder / "tokenizer.json", "r+b") as file:
        file.write(b"#")
    assert probe.model_facts(str(folder), deep=False)["has_manifest"]
    with pytest.raises(CheckpointError):
        probe.model_facts(str(folder), deep=True)
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(CheckpointError):
        probe.model_facts(str(folder), deep=False)
    assert probe.model_facts("Qwen/Qwen2.5-VL-3B-Instruct", deep=False)["licence"].endswith("non-commercial")
    assert probe.licence_of(tmp_path) is None


def test_the_exit_code_and_the_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from service.doctor.finding import fail, ok, warn

    for found, code in (([ok("a", "x"), warn("b", "x", "do")], 0), ([fail("a", "x", "do this")], 1)):
        monkeypatch.setattr(command, "diagnose", lambda *_, found=found, **__: found)
        assert command.main(["--json"]) == code
        told = json.loads(capsys.readouterr().out)
        assert told["ok"] is (code == 0) and len(told["findings"]) == len(found)
        assert command.main([]) == code
        shown = capsys.readouterr().out
    assert "-> do this" in shown


@pytest.mark.heavy
def test_the_whole_doctor_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--set", f"data_dir={tmp_path / 'data'}", "--set", "port=0", "--set", "worker_metrics_port=0",
                         "--deep", "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert code == 0, told
    assert len(told["findings"]) == 17
    assert not (tmp_path / "data").exists(), "it changes nothing"
