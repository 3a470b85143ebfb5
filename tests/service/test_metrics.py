"""The exposition parses, every declared metric is fed by ordinary traffic, and labels stay bounded."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_core.types import EngineStats
from service.metrics import Metrics, TrainingMetrics
from tests.service.conftest import LiveServer, ask
from tests.service.fakes import FakeEngine


def families(live: LiveServer) -> dict:
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


#: Every metric with its type and labels: dashboards and `dve bench serve` read them by these names.
DECLARED = {
    "admission_rejections": ("counter", ("reason",)),
    "batch_size": ("histogram", ("stage",)),
    "data_disk_free_bytes": ("gauge", ()),
    "data_disk_free_ratio": ("gauge", ()),
    "e2e_request_latency_seconds": ("histogram", ()),
    "encoder_batch_images": ("histogram", ("encoder",)),
    "encoder_batch_tokens": ("histogram", ("encoder",)),
    "encoder_wait_seconds": ("histogram", ()),
    "encoder_cache_bytes": ("gauge", ("encoder",)),
    "encoder_cache_evictions": ("counter", ("encoder",)),
    "encoder_cache_hits": ("counter", ("encoder",)),
    "encoder_cache_misses": ("counter", ("encoder",)),
    "encoder_forward_seconds": ("histogram", ("encoder",)),
    "engine_open_requests": ("gauge", ()),
    "engine_stalled_seconds": ("gauge", ()),
    "engine_state": ("gauge", ("state",)),
    "fusion_dominant": ("counter", ("encoder",)),
    "fusion_gate_entropy": ("histogram", ()),
    "fusion_weight": ("histogram", ("encoder",)),
    "generation_tokens": ("counter", ()),
    "http_requests": ("counter", ("route", "status", "retry_after")),
    "image_pixels": ("histogram", ()),
    "inter_token_latency_seconds": ("histogram", ()),
    "iteration_tokens": ("histogram", ()),
    "job_progress_age_seconds": ("gauge", ()),
    "jobs": ("gauge", ("status",)),
    "kv_cache_usage_ratio": ("gauge", ()),
    "media_rejected": ("counter", ("reason",)),
    "model_info": ("gauge", ("model", "fusion", "device", "dtype")),
    "model_swaps": ("counter", ("outcome",)),
    "num_preemptions": ("counter", ()),
    "num_requests_running": ("gauge", ()),
    "num_requests_waiting": ("gauge", ()),
    "prefix_cache_hits": ("counter", ()),
    "prefix_cache_queries": ("counter", ()),
    "preprocess_seconds": ("histogram", ("stage",)),
    "prompt_tokens": ("counter", ()),
    "queue_depth": ("gauge", ("stage",)),
    "request_decode_time_seconds": ("histogram", ()),
    "request_encode_time_seconds": ("histogram", ()),
    "request_failure": ("counter", ("code",)),
    "request_prefill_time_seconds": ("histogram", ()),
    "request_preprocess_time_seconds": ("histogram", ()),
    "request_queue_time_seconds": ("histogram", ()),
    "request_success": ("counter", ("finished_reason",)),
    "request_time_per_output_token_seconds": ("histogram", ()),
    "store_answer_age_seconds": ("gauge", ()),
    "time_to_first_token_seconds": ("histogram", ()),
    "visual_tokens": ("histogram", ()),
    "waiting_body_bytes": ("gauge", ()),
    "workers": ("gauge", ()),
}

#: The worker's own; what it shares with the server is `StoreMetrics`.
TRAINING = {
    "data_disk_free_bytes": ("gauge", ()),
    "data_disk_free_ratio": ("gauge", ()),
    "job_attempts": ("counter", ("end",)),
    "job_heartbeat_age_seconds": ("gauge", ()),
    "job_progress_age_seconds": ("gauge", ()),
    "jobs": ("gauge", ("status",)),
    "store_answer_age_seconds": ("gauge", ()),
    "train_diversity_loss": ("gauge", ("device",)),
    "train_learning_rate": ("gauge", ("device", "group")),
    "train_loss": ("gauge", ("device",)),
    "train_mfu_ratio": ("gauge", ("device",)),
    "train_samples": ("counter", ("device", "dataset")),
    "train_stage": ("gauge", ("device",)),
    "train_tokens_per_second": ("gauge", ("device",)),
    "train_trainable_parameters": ("gauge", ("device", "component")),
    "workers": ("gauge", ()),
}

#: Everything that the engine counts by itself.
COUNTED = {
    "num_waiting": 5,
    "num_encoding": 2,
    "kv_cache_usage_ratio": 0.5,
    "prefix_cache_queries": 40,
    "prefix_cache_hits": 30,
    "num_preemptions": 3,
    "encoder_cache_hits": {"qwen": 4, "dinov2": 3},
    "encoder_cache_misses": {"qwen": 1, "dinov2": 2},
    "encoder_cache_evictions": {"qwen": 1, "dinov2": 1},
    "encoder_cache_bytes": {"qwen": 1000, "dinov2": 2000},
}


@pytest.mark.parametrize(("make", "declared"), [(Metrics, DECLARED), (TrainingMetrics, TRAINING)])
def test_names_types_and_labels_are_pinned(make, declared):
    found = {
        metric._name.removeprefix("dve_"): (next(iter(metric.describe())).type, metric._labelnames)
        for metric in make().registry._collector_to_names
    }
    assert found == declared


def test_every_metric_is_fed(start):
    live = start(FakeEngine(counters=COUNTED), max_num_seqs=1, max_waiting=0)
    assert live.chat(images=2).status_code == 200
    assert live.chat("break").status_code == 500
    broken = ask() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
    assert live.http.post("/v1/chat/completions", json=broken).status_code == 400
    live.client.begin_drain()
    assert live.chat().json()["error"]["code"] == "server_draining"
    while not live.metric("dve_data_disk_free_ratio"):  # housekeeping's first look
        pass
    found = families(live)
    assert {name.removeprefix("dve_") for name in found if not name.endswith("_created")} == set(DECLARED)
    unfed = [
        name
        for name, family in found.items()
        if not name.endswith("_created") and not any(sample.value for sample in family.samples)
    ]
    # Gauges that are rightly at zero when nothing runs; a base alone swaps nothing (test_hot_models.py), and without
    # jobs and workers the store has nothing to tell of them (jobs/test_store_watch.py).
    at_rest = {
        "num_requests_running",
        "engine_open_requests",
        "engine_stalled_seconds",
        "waiting_body_bytes",
        "model_swaps",
        "jobs",
        "workers",
        "job_progress_age_seconds",
    }
    assert set(unfed) == {f"dve_{name}" for name in at_rest}


def test_what_the_engine_counts(start):
    engine = FakeEngine(counters=COUNTED)
    live = start(engine)
    expected = {
        "dve_kv_cache_usage_ratio": 0.5,
        "dve_prefix_cache_queries_total": 40,
        "dve_prefix_cache_hits_total": 30,
        "dve_num_preemptions_total": 3,
        'dve_encoder_cache_hits_total{encoder="dinov2"}': 3,
        'dve_encoder_cache_misses_total{encoder="qwen"}': 1,
        'dve_encoder_cache_evictions_total{encoder="qwen"}': 1,
        'dve_encoder_cache_bytes{encoder="dinov2"}': 2000,
        'dve_queue_depth{stage="preprocess"}': 0,
        'dve_queue_depth{stage="encode"}': 2,
        'dve_queue_depth{stage="prefill"}': 3,
        'dve_queue_depth{stage="decode"}': 0,
        "dve_num_requests_waiting": 5,
    }
    assert live.chat().status_code == 200
    for _ in range(2):  # a second look must not count anything twice
        assert {line: live.metric(line) for line in expected} == expected
    engine.counters = COUNTED | {"num_preemptions": 8}
    assert live.chat().status_code == 200
    assert live.metric("dve_num_preemptions_total") == 8


def test_a_steps_requests_by_stage(start):
    live = start()
    assert live.chat("count", max_tokens=4).status_code == 200
    assert live.metric('dve_batch_size_count{stage="prefill"}') == 1
    assert live.metric('dve_batch_size_count{stage="decode"}') == 3


def test_counts_are_right(start):
    live = start()
    live.chat(images=2)
    live.chat(max_tokens=2)
    assert live.metric('dve_request_success_total{finished_reason="stop"}') == 1
    assert live.metric('dve_request_success_total{finished_reason="length"}') == 1
    assert live.metric("dve_prompt_tokens_total") == 13 + 5
    assert live.metric("dve_generation_tokens_total") == 4 + 2
    assert live.metric("dve_iteration_tokens_count") == 4 + 2
    assert live.metric("dve_iteration_tokens_sum") == 18 + 6, "of prompts, and given out"
    assert live.metric("dve_time_to_first_token_seconds_count") == 2
    assert live.metric("dve_inter_token_latency_seconds_count") == 3 + 1
    assert live.metric('dve_fusion_weight_count{encoder="qwen"}') == 2
    assert live.metric('dve_fusion_dominant_total{encoder="qwen"}') == 2
    answered = 'dve_http_requests_total{retry_after="false",route="/v1/chat/completions",status="200"}'
    assert live.metric(answered) == 2
    info = 'dve_model_info{device="cpu",dtype="float32",fusion="gated",model="fake/model:1"}'
    assert live.metric(info) == 1


def test_tokens_count_while_an_answer_runs_and_after_it_was_left_or_failed(start):
    """They were counted at the end of a good answer only: a long one looked like a stall, a broken one like nothing."""
    live = start()
    with live.http.stream("POST", "/v1/chat/completions", json=ask("forever", stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines)
        assert live.metric("dve_generation_tokens_total") == 1
        assert live.metric("dve_prompt_tokens_total") == 7
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.chat("break").status_code == 500
    assert live.metric("dve_generation_tokens_total") == 1 + 1
    assert live.metric("dve_prompt_tokens_total") == 7 + 5


def test_what_warmed_the_engine_up_counts_for_nobody(start):
    live = start(FakeEngine(num_prompt_tokens=50, num_generation_tokens=2, passes=[1]))
    assert live.chat(images=1, max_tokens=1).status_code == 200
    assert live.metric("dve_generation_tokens_total") == 1
    assert live.metric("dve_iteration_tokens_sum") == 9 + 1
    assert live.metric('dve_encoder_forward_seconds_count{encoder="qwen"}') == 1


def test_an_encoders_pass_counts_once_and_kept_features_cost_none():
    """It was the pass's time for each of its requests, and zero for whoever found its features in the cache."""
    metrics = Metrics()
    before = EngineStats(
        num_images_encoded=2,
        encoder_seconds={"qwen": 1.0},
        encoder_batches={"qwen": {2: 1}},
        encoder_tokens={"qwen": 32},
    )
    metrics.observe_turn(EngineStats(), before)
    metrics.observe_turn(before, before)
    both = {"qwen": {1: 2, 2: 1}, "dinov2": {1: 1}}
    after = EngineStats(
        num_images_encoded=5, encoder_seconds={"qwen": 1.5, "dinov2": 0.25}, encoder_batches=both,
        encoder_cache_hits={"qwen": 7}, encoder_tokens={"qwen": 32 + 20, "dinov2": 16},
    )  # fmt: skip
    metrics.observe_turn(before, after)
    shown = metrics.exposition().decode()
    for line in ('count{encoder="qwen"} 3.0', 'sum{encoder="qwen"} 1.5', 'sum{encoder="dinov2"} 0.25'):
        assert f"dve_encoder_forward_seconds_{line}" in shown
    for line in ('sum{encoder="qwen"} 52.0', 'sum{encoder="dinov2"} 16.0', 'count{encoder="qwen"} 3.0'):
        assert f"dve_encoder_batch_tokens_{line}" in shown


def test_refusals_ask_to_come_back_and_errors_do_not(start):
    live = start()
    assert live.chat("break").status_code == 500
    live.client.begin_drain()
    assert live.chat().status_code == 503
    line = 'dve_http_requests_total{{retry_after="{}",route="/v1/chat/completions",status="{}"}}'
    assert live.metric(line.format("false", 500)) == live.metric(line.format("true", 503)) == 1


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
