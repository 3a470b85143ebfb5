"""The exposition parses, every declared metric is fed by ordinary traffic, and labels stay bounded."""

from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from tests.service.conftest import LiveServer, ask


def families(live: LiveServer) -> dict:
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def test_every_metric_is_fed(start):
    live = start(max_num_seqs=1, max_waiting=0)
    assert live.chat(images=2).status_code == 200
    assert live.chat("break").status_code == 500
    broken = ask() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    assert live.http.post("/v1/chat/completions", json=broken).status_code == 400
    live.client.begin_drain()
    assert live.chat().json()["error"]["code"] == "server_draining"
    found = families(live)
    assert all(name.startswith("dve_") for name in found)
    unfed = [
        name
        for name, family in found.items()
        if not name.endswith("_created") and not any(sample.value for sample in family.samples)
    ]
    # Gauges that are rightly at zero when nothing runs.
    assert set(unfed) == {"dve_num_requests_running", "dve_num_requests_waiting", "dve_queue_depth"}


def test_counts_are_right(start):
    live = start()
    live.chat(images=2)
    live.chat(max_tokens=2)
    assert live.metric('dve_request_success_total{finished_reason="stop"}') == 1
    assert live.metric('dve_request_success_total{finished_reason="length"}') == 1
    assert live.metric("dve_prompt_tokens_total") == 13 + 5
    assert live.metric("dve_generation_tokens_total") == 4 + 2
    assert live.metric("dve_time_to_first_token_seconds_count") == 2
    assert live.metric("dve_inter_token_latency_seconds_count") == 3 + 1
    assert live.metric('dve_fusion_weight_count{encoder="qwen"}') == 2
    assert live.metric('dve_fusion_dominant_total{encoder="qwen"}') == 2
    assert live.metric('dve_encoder_forward_seconds_count{encoder="dinov2"}') == 2
    assert live.metric('dve_http_requests_total{route="/v1/chat/completions",status="200"}') == 2
    info = 'dve_model_info{device="cpu",dtype="float32",fusion="gated",model="fake/model:1"}'
    assert live.metric(info) == 1


def test_gauges_tell_what_runs(start):
    live = start()
    with live.http.stream("POST", "/v1/chat/completions", json=ask("forever", stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines)
        assert live.metric("dve_num_requests_running") == 1
        assert live.metric('dve_queue_depth{stage="decode"}') == 1


def test_an_arms_weights_are_not_the_gates_routing(start):
    live = start()
    live.http.post("/v1/chat/completions", json=ask(images=1) | {"model": "fake/model:1@blind"})
    assert live.metric('dve_fusion_weight_count{encoder="qwen"}') == 0


def test_random_paths_and_models_add_no_series(start):
    live = start()
    live.http.get("/random-0")
    live.http.post("/v1/chat/completions", json=ask() | {"model": "random-0"})
    before = sum(len(family.samples) for family in families(live).values())
    for i in range(1, 20):
        live.http.get(f"/random-{i}")
        live.http.get(f"/v1/models/random-{i}")
        live.http.post("/v1/chat/completions", json=ask() | {"model": f"random-{i}"})
    found = families(live)
    # One more route answered 404, and /metrics itself: a total and a created sample each.
    assert sum(len(family.samples) for family in found.values()) - before <= 4
    assert "random" not in live.http.get("/metrics").text


def test_registries_are_the_apps_own():
    first, second = Metrics(), Metrics()
    first.prompt_tokens.inc(5)
    assert b"dve_prompt_tokens_total 0.0" in second.exposition()
