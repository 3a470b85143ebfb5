"""Statistics, analysis and comparison over HTTP."""

import httpx
import pytest

from tests.service.conftest import LiveServer, ask
from tests.service.fakes import PNG, TIMINGS, FakeEngine

ANALYZE, COMPARE = "/v1/fusion/analyze", "/v1/encoders/compare"
JOBS = "/v1/fine_tuning/jobs"


def messages(images: int = 1, text: str = "what?") -> dict:
    return {"messages": ask(text, images=images)["messages"]}


def test_statistics_of_served_images(start):
    live = start()
    empty = live.http.get("/fusion-weights").json()
    assert (empty["images"], empty["encoders"]["qwen"]["mean"], empty["entropy"]) == (0, None, None)
    live.chat(images=2)
    live.chat(images=1, stream=True)
    live.chat(images=0)
    live.http.post("/v1/chat/completions", json=ask(images=1) | {"model": "fake/model:1@blind"})
    found = live.http.get("/fusion-weights").json()
    assert (found["model"], found["images"], found["without_gate"], found["entropy"]) == ("fake/model:1", 3, 0, 0.8125)
    assert found["encoders"]["qwen"] == {"mean": 0.75, "sd": 0.0, "histogram": [0, 0, 0, 0, 0, 0, 0, 3, 0, 0]}
    assert found["encoders"]["dinov2"]["histogram"][2] == 3
    assert found["dominant_encoder"] == {"qwen": 3, "dinov2": 0, "tie": 0}
    assert {model: one["images"] for model, one in found["by_model"].items()} == {
        "fake/model:1": 3,
        "fake/model:1@blind": 1,
    }
    assert live.http.get("/fusion-weights?window=2").json()["images"] == 1


def test_one_requests_own_weights(shared: LiveServer):
    answer = shared.http.post("/v1/chat/completions", json=ask(images=2), headers={"x-request-id": "mine-1"})
    for request_id in ("mine-1", answer.json()["id"]):
        found = shared.http.get("/fusion-weights", params={"request_id": request_id}).json()
        assert (found["request_id"], found["id"]) == ("mine-1", answer.json()["id"])
        assert [image["qwen_weight"] for image in found["images"]] == [0.75, 0.75]
    text_only = shared.chat(images=0).json()["id"]
    assert shared.http.get("/fusion-weights", params={"request_id": text_only}).json()["images"] == []


@pytest.mark.parametrize("query", ["window=0", "window=-1", "window=x", "window=1e9", "window=NaN", "request_id="])
def test_bad_queries_are_named(shared: LiveServer, query: str):
    response = shared.http.get(f"/fusion-weights?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_an_unknown_request_id(shared: LiveServer):
    response = shared.http.get("/fusion-weights?request_id=nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "request_not_found")


def check_analysis(response: httpx.Response, num_images: int) -> dict:
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["object"] == "fusion.analysis"
    assert found["request_id"] == response.headers["x-request-id"]
    assert found["fusion_trained"] is True
    assert (found["qwen_weight"], found["dinov2_weight"], found["dominant_encoder"]) == (0.75, 0.25, "qwen")
    image = {
        "qwen_weight": 0.75,
        "dinov2_weight": 0.25,
        "dominant_encoder": "qwen",
        "entropy": 0.8125,
        "contribution": {"qwen": 0.5, "dinov2": 0.5},
        "relative_update": 0.25,
        "fusion_trained": True,
        "warnings": ["only the first frame was used"],
    }
    assert found["images"] == [{"index": i, **image} for i in range(num_images)]
    assert set(found["meaning"]) >= {"entropy", "contribution", "relative_update", "fusion_trained"}
    return found


def test_analyze_messages(shared: LiveServer):
    check_analysis(shared.http.post(ANALYZE, json=messages(2)), 2)
    assert shared.engine.seen[-1].encode_only
    virtual = shared.http.post(ANALYZE, json=messages() | {"model": "fake/model:1@blind"})
    assert check_analysis(virtual, 1)["model"] == "fake/model:1@blind"
    assert shared.engine.seen[-1].arm == "blind"


def test_analyze_an_upload(shared: LiveServer):
    form = {"question": "is it a fox?", "model": "fake/model:1"}
    check_analysis(shared.http.post(ANALYZE, files={"file": ("x.png", PNG)}, data=form), 1)
    image, text = shared.engine.seen[-1].messages[0].parts
    assert (image.image, text.text) == (PNG, "is it a fox?")
    check_analysis(shared.http.post(ANALYZE, files={"file": ("x.png", PNG)}), 1)


@pytest.mark.parametrize("path", [ANALYZE, COMPARE])
def test_text_alone_can_not_be_analyzed(shared: LiveServer, path: str):
    response = shared.http.post(path, json=messages(0))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("path", [ANALYZE, COMPARE])
def test_unknown_keys_and_models_are_refused(shared: LiveServer, path: str):
    typo = shared.http.post(path, json=messages() | {"max_tokenz": 1})
    assert (typo.status_code, typo.json()["error"]["param"]) == (400, "max_tokenz")
    other = shared.http.post(path, json=messages() | {"model": "other"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


def test_compare(shared: LiveServer):
    response = shared.http.post(COMPARE, json=messages() | {"max_tokens": 16})
    assert response.status_code == 200, response.text
    found = response.json()
    answers = found["answers"]
    assert {arm: one["content"] for arm, one in answers.items()} == {
        "fused": "a red fox",
        "qwen-only": "a red dog",
        "dinov2-only": "a fox",
        "blind": "a thing",
        "unfused": "a red fox",
    }
    assert {arm: one["first_divergence"] for arm, one in answers.items()} == {
        "fused": None,
        "qwen-only": None,  # the fake's ids are word lengths
        "dinov2-only": 2,
        "blind": 1,
        "unfused": None,
    }
    # Four tokens: a, red, fox, the end.
    assert answers["fused"]["log_likelihood"] == {"sum": -0.5, "mean": -0.125, "tokens": [-0.125] * 4}
    assert answers["blind"]["log_likelihood"]["sum"] == -8.0
    # delta_qwen = v(both) - v(dinov2) = -0.5 + 4, delta_dinov2 = v(both) - v(qwen) = -0.5 + 2.
    assert found["reliance"]["qwen"] == {"sum": 3.5, "tokens": [0.875] * 4}
    assert found["reliance"]["dinov2"] == {"sum": 1.5, "tokens": [0.375] * 4}
    assert found["shapley"] == {"qwen": 4.75, "dinov2": 2.75}
    assert found["interaction"] == -0.5 + 2.0 + 4.0 - 8.0
    assert found["encoder_seconds"] == dict(TIMINGS.encoder_seconds)
    assert answers["fused"]["seconds"]["total"] == pytest.approx(0.015)
    assert found["fusion"][0]["qwen_weight"] == 0.75
    # The engine has seen five questions and five scorings of the fused answer.
    scored = [r for r in shared.engine.seen[-5:] if r.score_token_ids == (1, 4, 4, 0)]
    assert len({r.arm for r in scored}) == 5


def test_compare_refuses_a_virtual_model(shared: LiveServer):
    response = shared.http.post(COMPARE, json=messages() | {"model": "fake/model:1@blind"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_compare_takes_one_place_and_leaves_it(start):
    live = start(FakeEngine(), max_num_seqs=1, max_waiting=0)
    for _ in range(2):
        assert live.http.post(COMPARE, json=messages()).status_code == 200
    broken = live.http.post(COMPARE, json=messages(text="break"))
    assert broken.json()["error"]["code"] == "request_failed"
    assert live.chat().status_code == 200
    assert not live.engine.rows


def test_null_weights_where_there_is_no_gate():
    from model_core.types import FusionWeights
    from service.fusion_history import weight_statistics
    from service.reports import fusion_entry, mean_weights

    gateless = FusionWeights(weights=None, dominant_encoder=None, fusion_trained=True)
    entry = {"qwen_weight": None, "dinov2_weight": None, "dominant_encoder": None}
    assert fusion_entry(gateless, ("qwen", "dinov2")) == {**entry, "warnings": []}
    assert mean_weights([gateless], ("qwen", "dinov2")) == entry
    found = weight_statistics([gateless], ("qwen", "dinov2"))
    assert (found["images"], found["without_gate"], found["entropy"]) == (1, 1, None)


def test_the_history_is_bounded_and_a_reused_id_means_the_newer_request():
    from service.fusion_history import FusionHistory, Served

    history = FusionHistory(max_requests=2)
    for i, request_id in enumerate(("same", "same", "other")):
        history.add(Served("k", request_id, f"c{i}", "m", i, ()))
    assert history.find("k", "c0") is None
    assert history.find("k", "same").completion_id == "c1"
    assert history.find("other key", "same") is None and history.find("other key", "c1") is None
    history.add(Served("k", "more", "c3", "m", 3, ()))
    assert history.find("k", "same") is None
    assert history.find("k", "other").completion_id == "c2"


def test_openapi_documents_bodies_and_paths(shared: LiveServer):
    document = shared.http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions", "/fusion-weights", ANALYZE, COMPARE, "/v1/models", "/v1/models/{model_id}",
        "/health", "/health/live", "/health/ready", "/metrics", "/v1/files", "/v1/files/{file_id}",
        "/v1/files/{file_id}/content", JOBS, f"{JOBS}/validate", f"{JOBS}/{{job_id}}",
        *(f"{JOBS}/{{job_id}}/{verb}" for verb in ("cancel", "pause", "resume", "events", "checkpoints")),
        *(f"{JOBS}/{{job_id}}/{part}" for part in ("freeze", "fusion")),
        "/v1/models/{model_id}/load", "/v1/models/{model_id}/unload", "/v1/models/{model_id}/rollback",
    }  # fmt: skip
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert {"messages", "max_tokens", "fusion"} <= set(schema["properties"])
    assert set(document["paths"][ANALYZE]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
