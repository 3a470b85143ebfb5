"""Every metric of the server, each on a registry that belongs to one app.

In: token events, timings, engine snapshots, fusion weights. Out: the Prometheus exposition. It refuses
labels whose values come from a client: encoders and model names come from the loaded model, routes from
the route table, reasons and codes from the error table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from model_core.errors import DualVisionError, ImageError
from model_core.types import EngineStats, FusionWeights, ModelInfo, Timings, TokenEvent
from service.errors import ClientDisconnectedError, rule_for
from service.histogram import Histogram

# vLLM's buckets where vLLM has the metric, so that one dashboard reads both.
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_STAGE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_PIXELS = tuple(side * side for side in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192))
_RATIO = tuple(i / 10 for i in range(1, 11))


class Metrics:
    """All metrics of one app. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine_totals: dict[Counter, float] = {}
        self._batches_seen: dict[tuple[str, int], int] = {}
        self._declare_requests()
        self._declare_engine()
        self._declare_vision()
        self.store = StoreMetrics(self.registry)

    def _declare_requests(self) -> None:
        self.http_requests = self._counter("http_requests", "HTTP answers.", "route", "status")
        self.request_success = self._counter("request_success", "Finished requests by reason.", "finished_reason")
        self.request_failure = self._counter("request_failure", "Requests that ended in an error, by code.", "code")
        self.admission_rejections = self._counter("admission_rejections", "Requests refused at the door.", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, vision tokens included.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.ttft = self._histogram("time_to_first_token_seconds", "Admission to the first token.", _TTFT)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _PER_TOKEN)
        self.tpot = self._histogram("request_time_per_output_token_seconds", "Mean after the first token.", _PER_TOKEN)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Admission to the last token.", _REQUEST)
        self.stages = {
            stage: self._histogram(f"request_{stage}_time_seconds", f"Time of a request in {stage}.", _STAGE)
            for stage in ("queue", "preprocess", "encode", "prefill", "decode")
        }

    def _declare_engine(self) -> None:
        self.running = self._gauge("num_requests_running", "Requests that the engine works on.")
        self.waiting = self._gauge("num_requests_waiting", "Admitted requests that the engine has not begun.")
        self.waiting_bytes = self._gauge("waiting_body_bytes", "Bodies of requests without a first event yet.")
        self.queue_depth = self._gauge("queue_depth", "Requests in or before a stage.", "stage")
        self.kv_cache_usage = self._gauge("kv_cache_usage_ratio", "Share of KV cache blocks that sequences hold.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = self._counter("num_preemptions", "Sequences put back to be computed again.")
        self.batch_size = self._histogram("batch_size", "Requests of one engine step, by stage.", _COUNTS, "stage")
        self.iteration_tokens = self._histogram("iteration_tokens", "Tokens that one engine step gave out.", _COUNTS)
        self.model_info = self._gauge("model_info", "The loaded models.", "model", "fusion", "device", "dtype")
        self.model_swaps = self._counter("model_swaps", "Variants that came into memory or left it.", "outcome")
        self.model_swaps.labels("failed")  # from the start: an alert asks how much it has grown

    def _declare_vision(self) -> None:
        self.fusion_weight = self._histogram("fusion_weight", "Gate weight, per image.", _RATIO, "encoder")
        self.fusion_dominant = self._counter("fusion_dominant", "Images by dominant encoder.", "encoder")
        self.gate_entropy = self._histogram("fusion_gate_entropy", "Normalised entropy, per image.", _RATIO)
        self.encoder_forward = self._histogram("encoder_forward_seconds", "Encoder, per request.", _STAGE, "encoder")
        self.encoder_cache_hits = self._counter("encoder_cache_hits", "Pictures with kept features.", "encoder")
        self.encoder_cache_misses = self._counter("encoder_cache_misses", "Pictures that were encoded.", "encoder")
        self.encoder_cache_evictions = self._counter("encoder_cache_evictions", "Features dropped.", "encoder")
        self.encoder_cache_bytes = self._gauge("encoder_cache_bytes", "Features kept.", "encoder")
        self.visual_tokens = self._histogram("visual_tokens", "Vision tokens of a request with images.", _COUNTS)
        self.image_pixels = self._histogram("image_pixels", "Width x height of a picture as it came.", _PIXELS)
        self.encoder_batch_images = self._histogram(
            "encoder_batch_images", "Pictures of one encoder forward.", _COUNTS, "encoder"
        )
        self.preprocess_stages = self._histogram(
            "preprocess_seconds", "Parts of a request's preprocessing: download, decode, resize, patchify.", _STAGE,
            "stage",
        )  # fmt: skip
        self.media_rejected = self._counter("media_rejected", "Images refused, by error code.", "reason")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dve_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"dve_{name}", text, labels, buckets=buckets, registry=self.registry)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def set_models(self, infos: Sequence[ModelInfo]) -> None:
        """The models in memory; those that left it have no sample any more, so that labels stay bounded."""
        self.model_info.clear()
        for info in infos:
            self.model_info.labels(info.model_id, info.fusion, info.device, info.dtype).set(1)

    def set_waiting(self, stats: EngineStats, num_preparing: int, num_bytes: int) -> None:
        """Gauges of a scrape: who is at which stage. `num_preparing`: what the preprocess pool holds."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting + num_preparing)
        self.waiting_bytes.set(num_bytes)
        self.queue_depth.labels("preprocess").set(num_preparing)
        self.queue_depth.labels("encode").set(stats.num_encoding)
        self.queue_depth.labels("prefill").set(stats.num_waiting - stats.num_encoding)
        self.queue_depth.labels("decode").set(stats.num_running)

    def set_caches(self, stats: EngineStats) -> None:
        """What the engine has counted since it began, and how full its caches are."""
        self.kv_cache_usage.set(stats.kv_cache_usage_ratio)
        self._grow(self.prefix_queries, stats.prefix_cache_queries)
        self._grow(self.prefix_hits, stats.prefix_cache_hits)
        self._grow(self.preemptions, stats.num_preemptions)
        for counter, by_encoder in (
            (self.encoder_cache_hits, stats.encoder_cache_hits),
            (self.encoder_cache_misses, stats.encoder_cache_misses),
            (self.encoder_cache_evictions, stats.encoder_cache_evictions),
        ):
            for encoder, total in by_encoder.items():
                self._grow(counter.labels(encoder), total)
        for encoder, sizes in stats.encoder_batches.items():
            for num_images, total in sizes.items():
                for _ in range(total - self._batches_seen.get((encoder, num_images), 0)):
                    self.encoder_batch_images.labels(encoder).observe(num_images)
                self._batches_seen[encoder, num_images] = total
        for encoder, num_bytes in stats.encoder_cache_bytes.items():
            self.encoder_cache_bytes.labels(encoder).set(num_bytes)

    def _grow(self, counter: Counter, total: float) -> None:
        """The engine keeps totals; a counter of Prometheus can only be added to."""
        counter.inc(max(total - self._engine_totals.get(counter, 0.0), 0.0))
        self._engine_totals[counter] = total

    def observe_step(self, events: Sequence[TokenEvent]) -> None:
        """A request's first event carries its fusion: its prompt was finished in this step."""
        requests = {event.request_id for event in events}
        opening = {event.request_id for event in events if event.fusion is not None}
        if opening:
            self.batch_size.labels("prefill").observe(len(opening))
        if len(requests) > len(opening):
            self.batch_size.labels("decode").observe(len(requests) - len(opening))
        self.iteration_tokens.observe(sum([len(event.token_ids) for event in events]))

    def count_error(self, error: DualVisionError) -> None:
        """An error on its way to a client; images are counted by what was wrong with them."""
        if isinstance(error, ImageError):
            self.media_rejected.labels(rule_for(error).code).inc()

    def _observe_fusion(self, weights: FusionWeights) -> None:
        for encoder, weight in (weights.weights or {}).items():
            self.fusion_weight.labels(encoder).observe(weight)
        if weights.weights is not None:
            self.fusion_dominant.labels(weights.dominant_encoder or "tie").inc()
        if weights.entropy is not None:
            self.gate_entropy.observe(weights.entropy)

    def _observe_timings(self, timings: Timings) -> None:
        for stage, histogram in self.stages.items():
            histogram.observe(getattr(timings, f"{stage}_seconds"))
        for encoder, seconds in timings.encoder_seconds.items():
            self.encoder_forward.labels(encoder).observe(seconds)
        for stage, seconds in timings.preprocess_stages.items():
            self.preprocess_stages.labels(stage).observe(seconds)


class RequestRecorder:
    """Watches the events of one request. `finish` is called once, whatever ended it.

    `is_fused`: only then do its weights count as the gate's routing; an arm's gate saw a stand-in.
    `is_copy`: a further answer to a prompt that another recorder counts, with its pictures.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float], *, is_fused: bool, is_copy: bool = False) -> None:
        self._metrics, self._clock = metrics, clock
        self._is_fused, self._is_copy = is_fused and not is_copy, is_copy
        self._start = clock()
        self._first: float | None = None
        self._last = self._start
        self._num_tokens = 0
        self._end: TokenEvent | None = None

    def observe(self, event: TokenEvent) -> None:
        now = self._clock()
        if event.token_ids:
            if self._first is None:
                self._first = now
                self._metrics.ttft.observe(now - self._start)
            else:
                self._metrics.itl.observe(now - self._last)
            self._last = now
            self._num_tokens += len(event.token_ids)
        if event.fusion is not None and self._is_fused:
            for weights in event.fusion:
                self._metrics._observe_fusion(weights)
        if event.is_terminal:
            self._end = event

    def finish(self, error: BaseException | None) -> None:
        metrics, end = self._metrics, self._end
        if error is not None:
            metrics.request_failure.labels(rule_for(error).code).inc()
            return
        if end is None or end.finish_reason is None:
            # The caller walked away: analysis does after the first event, a client whenever it likes.
            metrics.request_failure.labels(ClientDisconnectedError.code).inc()
            return
        now = self._clock()
        metrics.request_success.labels(end.finish_reason).inc()
        metrics.e2e.observe(now - self._start)
        if self._first is not None and self._num_tokens > 1:
            metrics.tpot.observe((self._last - self._first) / (self._num_tokens - 1))
        if end.usage is not None:
            metrics.generation_tokens.inc(end.usage.completion_tokens)
        if end.usage is not None and not self._is_copy:
            metrics.prompt_tokens.inc(end.usage.prompt_tokens)
            if end.usage.image_tokens:
                metrics.visual_tokens.observe(end.usage.image_tokens)
            for pixels in end.usage.image_pixels:
                metrics.image_pixels.observe(pixels)
        if end.timings is not None:
            metrics._observe_timings(end.timings)


class StoreMetrics:
    """What the store of jobs and its disk say, on the registry of whoever asks them: each server, each worker.

    All of one store show the same figures, so dashboards take the largest and not the sum.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dve_{name}", text, labels, registry=registry)

        self._clock, self._answered_at = clock, clock()
        self.jobs = gauge("jobs", "Jobs by status.", "status")
        self.workers = gauge("workers", "Workers that were seen within a minute.")
        self.progress_age = gauge("job_progress_age_seconds", "Since the last step of the slowest running job.")
        self.disk_free_bytes = gauge("data_disk_free_bytes", "Room left on the disk of the data folder.")
        self.disk_free_ratio = gauge("data_disk_free_ratio", "Share of that disk that is free.")
        silence = gauge("store_answer_age_seconds", "Since the store of jobs answered last.")
        silence.set_function(lambda: self._clock() - self._answered_at)

    def store_answered(self) -> None:
        self._answered_at = self._clock()


class TrainingMetrics:
    """What a worker shows of its jobs, on a registry of its own. Job ids are no labels: one trainer a device is usual,
    so the gauges of training are of whoever spoke last."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.train_loss = self._gauge("train_loss", "Loss of the last step.")
        self.diversity_loss = self._gauge("train_diversity_loss", "The gate's own loss of the last step.")
        self.learning_rate = self._gauge("train_learning_rate", "Learning rate.", "group")
        self.stage = self._gauge("train_stage", "Stage of the curriculum, from 0.")
        self.trainable = self._gauge("train_trainable_parameters", "Parameters that train.", "component")
        self.samples = Counter("dve_train_samples", "Samples trained on.", ("dataset",), registry=self.registry)
        self.tokens_per_second = self._gauge("train_tokens_per_second", "Speed of the last step.")
        self.mfu = self._gauge("train_mfu_ratio", "Share of the device's peak.")
        self.store = StoreMetrics(self.registry)
        self.heartbeat_age = self._gauge("job_heartbeat_age_seconds", "Since the oldest lease was renewed.")
        self.attempts = Counter("dve_job_attempts", "Attempts by how they ended.", ("end",), registry=self.registry)
        for end in ("succeeded", "stopped", "failed", "retry", "postponed"):
            self.attempts.labels(end)  # from the start: one that is born as 1 has never grown

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dve_{name}", text, labels, registry=self.registry)

    def observe(self, kind: str, stage: int, data: Mapping[str, Any]) -> None:
        """One event of a trainer that runs now."""
        if kind == "step":
            self.stage.set(stage)
            self._observe_step(data)
        elif kind == "freeze":
            for row in data.get("rows", ()):
                self.trainable.labels(_short(row["component"])).set(row["trainable"])

    def _observe_step(self, data: Mapping[str, Any]) -> None:
        figures = (
            (self.train_loss, "loss"), (self.diversity_loss, "gate_loss"), (self.mfu, "mfu"),
            (self.tokens_per_second, "tokens_per_second"),
        )  # fmt: skip
        for gauge, key in figures:
            if isinstance(value := data.get(key), int | float):
                gauge.set(value)
        for group, rate in (data.get("learning_rates") or {}).items():
            self.learning_rate.labels(_short(group)).set(rate)
        for dataset, count in (data.get("dataset_samples") or {"all": data.get("samples") or 0}).items():
            self.samples.labels(_short(dataset)).inc(count)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


def _short(label: object) -> str:
    """A component, group or dataset of a recipe as a label: one line, of bounded length."""
    return str(label)[:64].replace("\n", " ")
