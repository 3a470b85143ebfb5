"""Bodies that no job can be made of: each refused with the path of what is wrong, and nothing is queued."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.preflight import Preflight
from tests.service.conftest import LiveServer, run_server
from tests.service.fakes import FakeEngine
from tests.service.jobs.rows import jsonl

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with run_server(FakeEngine()) as server:
        yield server


@pytest.fixture(scope="module")
def file_id(live: LiveServer) -> str:
    return live.openai.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune").id


def stage(**more) -> dict:
    return {"curriculum": [{"mode": "full", **more}]}


@pytest.mark.parametrize(
    ("fusion", "code", "param"),
    [
        ({"freze": {}}, "unknown_parameter", "fusion.freze"),
        ({"freeze": {"mod": "full"}}, "unknown_parameter", "fusion.freeze.mod"),
        ({"freeze": {"flags": {"freeze_lm": True}}}, "unknown_parameter", "fusion.freeze.flags.freeze_lm"),
        (stage(epoch=1), "unknown_parameter", "fusion.curriculum[0].epoch"),
        ({"lora": {"llm": {"rnk": 3}}}, "unknown_parameter", "fusion.lora.llm.rnk"),
        ({"losses": {"diversity": 1}}, "unknown_parameter", "fusion.losses.diversity"),
        ({"freeze": {"mode": "everything"}}, "invalid_value", "fusion.freeze.mode"),
        (stage(epochs="3"), "invalid_value", "fusion.curriculum[0].epochs"),
        (stage(epochs=True), "invalid_value", "fusion.curriculum[0].epochs"),
        ({"early_stopping": {"patience": "3"}}, "invalid_value", "fusion.early_stopping.patience"),
        ({"curriculum": []}, "invalid_value", "fusion.curriculum"),
        ({**stage(), "freeze": {"mode": "full"}}, "invalid_value", "fusion.freeze"),
        ({"early_stopping": {}}, "invalid_value", "fusion.early_stopping"),
        ({"datasets": [{"file": "file-other"}]}, "invalid_value", "fusion.datasets[0].file"),
        ({"resources": {"device": "cpu", "num_gpus": 1}}, "invalid_value", "fusion.resources"),
        ({"resources": {"num_gpus": 2}}, "invalid_value", "fusion.resources.num_gpus"),
        ({"priority": 1000}, "invalid_value", "fusion.priority"),
        ({"resume_from": "../../etc"}, "invalid_value", "fusion.resume_from"),
        ({"dry_run": "yes"}, "invalid_value", "fusion.dry_run"),
        (stage(dataset_weights={"file-other": 1.0}), "invalid_value", "fusion.curriculum[0].dataset_weights"),
    ],
)
def test_fusion(fusion: dict, code: str, param: str, live: LiveServer, file_id: str) -> None:
    response = live.http.post(JOBS, json={"model": "fake/model:1", "training_file": file_id, "fusion": fusion})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error
    assert live.http.get(JOBS).json()["data"] == []


@pytest.mark.parametrize(
    ("more", "status", "code", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
        ({"model": "fake/model:1@blind"}, 404, "model_not_found", "model"),
        ({"training_file": "file-none"}, 400, "invalid_value", "training_file"),
        ({"training_file": "/etc/passwd"}, 400, "invalid_value", "training_file"),
        ({"validation_file": "file-none"}, 400, "invalid_value", "validation_file"),
        ({"method": {"type": "dpo"}}, 400, "unsupported_parameter", "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, 400, "unsupported_parameter", "method.dpo"),
        ({"method": {"kind": "supervised"}}, 400, "unknown_parameter", "method.kind"),
        ({"integrations": [{"type": "wandb"}]}, 400, "unsupported_parameter", "integrations"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "invalid_value", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "4"}}, 400, "invalid_value", "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, 400, "invalid_value",
         "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": 900}, "fusion": {}}, 200, "", ""),
        ({"hyperparameters": {}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}}, 400,
         "invalid_value", "hyperparameters"),
        ({"suffix": "a/b"}, 400, "invalid_value", "suffix"),
        ({"suffix": "x" * 65}, 400, "invalid_value", "suffix"),
        ({"seed": -1}, 400, "invalid_value", "seed"),
        ({"metadata": {"k": 1}}, 400, "invalid_value", "metadata.k"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "invalid_value", "metadata"),
    ],
)  # fmt: skip
def test_openai_s_own_fields(more: dict, status: int, code: str, param: str, live: LiveServer, file_id: str) -> None:
    response = live.http.post(JOBS, json={"model": "fake/model:1", "training_file": file_id, **more})
    if status == 200:
        live.http.post(f"{JOBS}/{response.json()['id']}/cancel")
    else:
        error = response.json()["error"]
        assert (error["code"], error["param"]) == (code, param), error
    assert response.status_code == status


def test_unknown_fields_beside_fusion_are_named_and_left_out(live: LiveServer, file_id: str) -> None:
    body = {"model": "fake/model:1", "training_file": file_id, "surprise": 1, "integrations": None, "method": None}
    response = live.http.post(JOBS, json=body)
    assert response.status_code == 200 and response.headers["x-dve-ignored"] == "surprise"
    expected = {
        "object", "id", "created_at", "finished_at", "estimated_finish", "model", "fine_tuned_model",
        "organization_id", "status", "hyperparameters", "training_file", "validation_file", "result_files",
        "trained_tokens", "error", "seed", "user_provided_suffix", "integrations", "metadata", "method", "fusion",
    }  # fmt: skip
    assert set(response.json()) == expected
    live.http.post(f"{JOBS}/{response.json()['id']}/cancel")


ANSWERS = "import sys, json; c = json.load(open(sys.argv[2])); print(json.dumps({'fits': True, 'seed': c['seed']}))"


@pytest.mark.parametrize(
    ("program", "seconds", "cost", "words"),
    [
        (ANSWERS, 60.0, {"fits": True, "seed": 5}, None),
        ("import sys; sys.exit('dve fit: error: no such model')", 60.0, None, "no such model"),
        ("import time; time.sleep(60)", 0.2, None, "took longer"),
    ],
)
def test_validate(
    program: str, seconds: float, cost: dict | None, words: str | None, start: Callable[..., LiveServer], tmp_path: Path
) -> None:
    live = start()
    parts = live.app.state.parts
    preflight = Preflight("cpu", (sys.executable, "-c", program), seconds)
    live.app.state.parts = replace(parts, desk=replace(parts.desk, preflight=preflight))
    training = live.openai.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune").id
    body = {"model": "fake/model:1", "training_file": training, "seed": 5, "fusion": stage(epochs=2)}
    report = live.http.post(f"{JOBS}/validate", json=body).json()
    assert report["valid"] and report["cost"] == cost
    assert report["cost_error"] is None if words is None else words in report["cost_error"]
    assert [(s["training_mode"], s["epochs"]) for s in report["stages"]] == [("full", 2)]
    assert report["files"] == [{"id": training, "bytes": len(jsonl()), "status": "processed"}]
    wrong = live.http.post(f"{JOBS}/validate", json={**body, "training_file": "file-none"}).json()
    assert not wrong["valid"] and wrong["errors"][0]["param"] == "training_file" and wrong["cost"] is None
    assert live.http.get(JOBS).json()["data"] == []
