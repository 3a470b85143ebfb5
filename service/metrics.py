"""Every metric of the server, each on a registry that belongs to one app.

In: token events, timings, engine snapshots, fusion weights. Out: the Prometheus exposition. It refuses
labels whose values come from a client: encoders and model names come from the loaded model, routes from
the route table, reasons and codes from the error table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
#: Data sets of a job that have a series each; a recipe may have 256.
_NUM_DATASETS = 16

State = Literal["new", "loading", "ready", "failed", "dead", "stopped"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True, slots=True)
class Bridge:
    """What the engine client knows itself, whatever the engine does.

    num_open: requests whose last event has not come. num_sent: those of them that the engine's thread was given.
    num_preparing: what the preprocess pool holds. stats: the engine's, as of its last step.
    """

    state: State
    num_open: int
    num_sent: int
    num_preparing: int
    stalled_seconds: float
    stats: EngineStats


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
        self.http_requests = self._counter(
            "http_requests", "HTTP answers. retry_after: whether it asks the client to come back.", "route", "status",
            "retry_after",
        )  # fmt: skip
        self.request_success = self._counter("request_success", "Finished requests by reason.", "finished_reason")
        self.request_failure = self._counter("request_failure", "Requests that ended in an error, by code.", "code")
        self.admission_rejections = self._counter("admission_rejections", "Requests refused at the door.", "reason")
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of finished prompts: vision tokens and those found in the prefix cache included;"
            " of several answers to one prompt once, and whatever became of the answer.",
        )  # fmt: skip
        self.generation_tokens = self._counter(
            "generation_tokens", "Tokens that the engine gave out, those of requests that failed or were left included."
        )
        self.ttft = self._histogram("time_to_first_token_seconds", "Admission to the first token.", _TTFT)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _PER_TOKEN)
        self.tpot = self._histogram("request_time_per_output_token_seconds", "Mean after the first token.", _PER_TOKEN)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Admission to the last token.", _REQUEST)
        self.stages = {
            stage: self._histogram(f"request_{stage}_time_seconds", f"Time of a request in {stage}.", _STAGE)
            for stage in ("queue", "preprocess", "encode", "prefill", "decode")
        }

    def _declare_engine(self) -> None:
        self.engine_state = self._gauge("engine_state", "1 for the state that the engine is in, else 0.", "state")
        self.engine_open = self._gauge("engine_open_requests", "Requests with the engine or on their way to it.")
        self.engine_stalled = self._gauge(
            "engine_stalled_seconds", "Since the engine last moved, while requests wait for it; 0 while none does."
        )
        self.running = self._gauge("num_requests_running", "Requests that the engine works on.")
        self.waiting = self._gauge("num_requests_waiting", "Admitted requests that the engine has not begun.")
        self.waiting_bytes = self._gauge("waiting_body_bytes", "Bodies of requests without a first event yet.")
        self.queue_depth = self._gauge("queue_depth", "Requests in or before a stage.", "stage")
        self.kv_cache_usage = self._gauge("kv_cache_usage_ratio", "Share of KV cache blocks that sequences hold.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = self._counter("num_preemptions", "Sequences put back to be computed again.")
        self.batch_size = self._histogram("batch_size", "Requests of one engine step, by stage.", _COUNTS, "stage")
        self.iteration_tokens = self._histogram(
            "iteration_tokens", "Tokens of a step: of prompts, computed in it, and given out.", _COUNTS
        )
        self.model_info = self._gauge("model_info", "The loaded models.", "model", "fusion", "device", "dtype")
        self.model_swaps = self._counter("model_swaps", "Variants that came into memory or left it.", "outcome")
        self.model_swaps.labels("failed")  # from the start: an alert asks how much it has grown

    def _declare_vision(self) -> None:
        self.fusion_weight = self._histogram("fusion_weight", "Gate weight, per image.", _RATIO, "encoder")
        self.fusion_dominant = self._counter("fusion_dominant", "Images by dominant encoder.", "encoder")
        self.gate_entropy = self._histogram("fusion_gate_entropy", "Normalised entropy, per image.", _RATIO)
        self.encoder_forward = self._histogram("encoder_forward_seconds", "Of one forward pass.", _STAGE, "encoder")
        self.encoder_cache_hits = self._counter("encoder_cache_hits", "Pictures with kept features.", "encoder")
        self.encoder_cache_misses = self._counter("encoder_cache_misses", "Pictures that were encoded.", "encoder")
        self.encoder_cache_evictions = self._counter("encoder_cache_evictions", "Features dropped.", "encoder")
        self.encoder_cache_bytes = self._gauge("encoder_cache_bytes", "Features kept.", "encoder")
        self.visual_tokens = self._histogram("visual_tokens", "Vision tokens of a request with images.", _COUNTS)
        self.image_pixels = self._histogram("image_pixels", "Width x height of a picture as it came.", _PIXELS)
        self.encoder_batch_images = self._histogram(
            "encoder_batch_images", "Pictures of one encoder forward.", _COUNTS, "encoder"
        )
        self.encoder_batch_tokens = self._histogram(
            "encoder_batch_tokens", "Image tokens of one encoder forward: at most max_encode_tokens, or one picture.",
            _COUNTS, "encoder",
        )  # fmt: skip
        self.encoder_wait = self._histogram(
            "encoder_wait_seconds", "A request with images: admission to the encoders, encode_window_seconds included.",
            _STAGE,
        )  # fmt: skip
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

    def set_bridge(self, bridge: Bridge) -> None:
        """Gauges of a scrape: is the engine alive, does it move, and who is at which stage."""
        for state in STATES:
            self.engine_state.labels(state).set(state == bridge.state)
        self.engine_open.set(bridge.num_open)
        self.engine_stalled.set(bridge.stalled_seconds)
        stats, num_preparing = bridge.stats, bridge.num_preparing
        # A snapshot is taken after a step: whoever has come since is in none, and in a step that hangs never will be.
        num_waiting = max(stats.num_waiting, bridge.num_sent - stats.num_running)
        self.running.set(stats.num_running)
        self.waiting.set(num_waiting + num_preparing)
        self.queue_depth.labels("preprocess").set(num_preparing)
        self.queue_depth.labels("encode").set(stats.num_encoding)
        self.queue_depth.labels("prefill").set(num_waiting - stats.num_encoding)
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

    def observe_turn(self, before: EngineStats, after: EngineStats) -> None:
        """What the engine counted in one step. Called by its thread, for each step."""
        num_generated = after.num_generation_tokens - before.num_generation_tokens
        if num_generated > 0:
            self.generation_tokens.inc(num_generated)
        num_tokens = num_generated + after.num_prompt_tokens - before.num_prompt_tokens
        if num_tokens > 0:
            self.iteration_tokens.observe(num_tokens)
        if after.num_images_encoded == before.num_images_encoded:
            return
        for encoder, sizes in after.encoder_batches.items():
            num_passes = sum(sizes.values()) - sum(before.encoder_batches.get(encoder, {}).values())
            seconds = after.encoder_seconds.get(encoder, 0.0) - before.encoder_seconds.get(encoder, 0.0)
            num_tokens = after.encoder_tokens.get(encoder, 0) - before.encoder_tokens.get(encoder, 0)
            for _ in range(num_passes):  # mostly one; of several in a step only the sum is known
                self.encoder_forward.labels(encoder).observe(seconds / num_passes)
                self.encoder_batch_tokens.labels(encoder).observe(num_tokens / num_passes)

    def observe_step(self, events: Sequence[TokenEvent]) -> None:
        """A request's first event carries its fusion: its prompt was finished in this step."""
        requests = {event.request_id for event in events}
        opening = {event.request_id for event in events if event.fusion is not None}
        if opening:
            self.batch_size.labels("prefill").observe(len(opening))
        if len(requests) > len(opening):
            self.batch_size.labels("decode").observe(len(requests) - len(opening))

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
        for stage, seconds in timings.preprocess_stages.items():
            self.preprocess_stages.labels(stage).observe(seconds)
        if timings.encode_wait_seconds is not None:
            self.encoder_wait.observe(timings.encode_wait_seconds)


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
        if event.fusion is not None and event.usage is not None and not self._is_copy:
            # Of the first event, as soon as the prompt is done: an answer may take minutes, and be left half way.
            self._metrics.prompt_tokens.inc(event.usage.prompt_tokens)
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
        if end.usage is not None and not self._is_copy:
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
    """What a worker shows of its jobs, on a registry of its own. Job ids are no labels: gauges are of a device's slot,
    which has one job at a time, and go with its attempt."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.train_loss = self._gauge("train_loss", "Loss of the last step.", "device")
        self.diversity_loss = self._gauge("train_diversity_loss", "The gate's own loss of the last step.", "device")
        self.learning_rate = self._gauge("train_learning_rate", "Learning rate.", "device", "group")
        self.stage = self._gauge("train_stage", "Stage of the curriculum, from 0.", "device")
        self.trainable = self._gauge("train_trainable_parameters", "Parameters that train.", "device", "component")
        self.samples = Counter(
            "dve_train_samples", "Samples trained on, by the data set's place in its job's list, from 0.",
            ("device", "dataset"), registry=self.registry,
        )  # fmt: skip
        self.tokens_per_second = self._gauge("train_tokens_per_second", "Speed of the last step.", "device")
        self.mfu = self._gauge("train_mfu_ratio", "Share of the device's peak.", "device")
        self.store = StoreMetrics(self.registry)
        self.heartbeat_age = self._gauge("job_heartbeat_age_seconds", "Since the oldest lease was renewed.")
        self.attempts = Counter("dve_job_attempts", "Attempts by how they ended.", ("end",), registry=self.registry)
        self._shown: dict[str, set[tuple[Gauge, tuple[str, ...]]]] = {}
        for end in ("succeeded", "stopped", "failed", "retry", "postponed"):
            self.attempts.labels(end)  # from the start: one that is born as 1 has never grown

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dve_{name}", text, labels, registry=self.registry)

    def observe(self, device: str, kind: str, stage: int, data: Mapping[str, Any]) -> None:
        """One event of a trainer that runs now. device: the name of its slot."""
        if kind == "step":
            self._set(self.stage, stage, device)
            self._observe_step(device, data)
        elif kind == "freeze":
            for row in data.get("rows", ()):
                self._set(self.trainable, row["trainable"], device, _short(row["component"]))

    def clear(self, device: str) -> None:
        """An attempt has ended: the loss of nobody is shown. What was counted stays."""
        for gauge, labels in self._shown.pop(device, ()):
            gauge.remove(*labels)

    def _set(self, gauge: Gauge, value: float, *labels: str) -> None:
        gauge.labels(*labels).set(value)
        self._shown.setdefault(labels[0], set()).add((gauge, labels))

    def _observe_step(self, device: str, data: Mapping[str, Any]) -> None:
        figures = (
            (self.train_loss, "loss"), (self.diversity_loss, "gate_loss"), (self.mfu, "mfu"),
            (self.tokens_per_second, "tokens_per_second"),
        )  # fmt: skip
        for gauge, key in figures:
            if isinstance(value := data.get(key), int | float):
                self._set(gauge, value, device)
        for group, rate in (data.get("learning_rates") or {}).items():
            self._set(self.learning_rate, rate, device, _short(group))
        for place, count in enumerate(data.get("dataset_samples") or ()):
            self.samples.labels(device, str(place) if place < _NUM_DATASETS else "others").inc(count)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


def _short(label: object) -> str:
    """A component or group of a recipe as a label: one line, of bounded length."""
    return str(label)[:64].replace("\n", " ")
