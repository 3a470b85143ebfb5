"""Grafana dashboards from code: `python deploy/grafana/build.py` writes deploy/grafana/dashboards/*.json.

A panel is a title, a unit, a sentence on what to make of it, and its queries. Tests hold the files equal to what is
written here, every query to metrics that service/metrics.py or the recording rules declare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards"
#: Grafana's default data source; deploy/grafana/provisioning makes the Prometheus beside it that.
SOURCE = {"type": "prometheus", "uid": "${source}"}
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend). unit: Grafana's name of one. kind: timeseries, stat or heatmap."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


def quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    labels = f"le, {by}" if by else "le"
    shown = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{FILTER}}}[$__rate_interval])))",
            f"{name}{shown}",
        )
        for q, name in ((0.5, "p50"), (0.95, "p95"))
    )


def rate(metric: str, by: str = "", legend: str = "") -> tuple[tuple[str, str], ...]:
    grouped = f"sum by ({by}) " if by else "sum "
    return (
        (f"{grouped}(rate({metric}{{{FILTER}}}[$__rate_interval]))", legend or (f"{{{{{by}}}}}" if by else metric)),
    )


def mean(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    total, count = (f"sum by ({by}) (rate({metric}_{part}{{{FILTER}}}[$__rate_interval]))" for part in ("sum", "count"))
    return ((f"{total} / {count}", f"{{{{{by}}}}}"),)


def shared(metric: str, by: str = "job") -> tuple[tuple[str, str], ...]:
    """What every server and worker of one store shows alike."""
    return ((f"max by ({by}) ({metric})", f"{{{{{by}}}}}"),)


def gauge(metric: str, by: str = "instance") -> tuple[tuple[str, str], ...]:
    return ((f"sum by ({by}) ({metric}{{{FILTER}}})", f"{{{{{by}}}}}"),)


def trained(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    """Of one device's job: sums over devices would mix jobs."""
    shown = f" {{{{{by}}}}}" if by else ""
    return ((f"{metric}{{{FILTER}}}", f"{{{{instance}}}} {{{{device}}}}{shown}"),)


FILTER = 'instance=~"$instance"'

#: Whose instances a board offers: those of the scrape job that has every metric it filters by instance.
JOBS = {"Training": "dve-worker"}

DASHBOARDS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Up", "none", "1 while the scrape answers.", (('up{job="dve"}', "{{instance}}"),), "stat"),
        Panel("Answers", "reqps", "Finished requests by reason.", rate("dve_request_success_total", "finished_reason")),
        Panel("Errors", "reqps", "Requests that ended in an error, by code: RUNBOOK.md, DveServerErrors.",
              rate("dve_request_failure_total", "code")),
        Panel("HTTP", "reqps", "Answers by status; 503 is a full queue or a draining server.",
              rate("dve_http_requests_total", "status")),
        Panel("Refused at the door", "reqps", "Before anything was decoded. Add a replica, or raise max_waiting.",
              rate("dve_admission_rejections_total", "reason")),
        Panel("Server error ratio", "percentunit", "Share of 5xx over five minutes, without refusals that ask to come"
              " back and without probes.",
              (("dve:http_error_ratio:rate5m", "{{instance}}"),)),
        Panel("Tokens generated", "short", "A second, over all requests, also those that failed or were left.",
              rate("dve_generation_tokens_total")),
        Panel("Prompt tokens", "short", "A second, of prompts that were finished: vision tokens and those of the"
              " prefix cache included.", rate("dve_prompt_tokens_total")),
        Panel("Store's silence", "s", "Since the store of jobs answered last; asked every few seconds.",
              gauge("dve_store_answer_age_seconds")),
        Panel("Disk left", "bytes", "Of the data folder: uploads, checkpoints, models, SQLite.",
              gauge("dve_data_disk_free_bytes")),
        Panel("Disk left, share", "percentunit", "Below a tenth it is time to clear up.",
              gauge("dve_data_disk_free_ratio")),
        Panel("Model swaps", "short", "Loads, roll-backs and failures of fine-tuned models, a second.",
              rate("dve_model_swaps_total", "outcome")),
        Panel("Model", "none", "Which model, fusion, device and type are loaded.",
              ((f"dve_model_info{{{FILTER}}}", "{{model}} {{fusion}} {{device}} {{dtype}}"),), "stat"),
    ),
    "Latency": (
        Panel("Time to first token", "s", "Admission to the first piece of the answer.",
              quantiles("dve_time_to_first_token_seconds")),
        Panel("Between tokens", "s", "Inter-token latency: what a reader of a stream feels.",
              quantiles("dve_inter_token_latency_seconds")),
        Panel("Per output token", "s", "Mean of a request after its first token.",
              quantiles("dve_request_time_per_output_token_seconds")),
        Panel("Whole request", "s", "Admission to the last token.", quantiles("dve_e2e_request_latency_seconds")),
        *(
            Panel(f"In {stage}", "s", f"Time of a request in {stage}.", quantiles(f"dve_request_{stage}_time_seconds"))
            for stage in ("queue", "preprocess", "encode", "prefill", "decode")
        ),
        Panel("Parts of preprocessing", "s", "Download, decode, resize and patchify of a request's pictures.",
              quantiles("dve_preprocess_seconds", "stage")),
    ),
    "Engine": (
        Panel("State", "none", "1 for the state it is in. Dead: the process ends in a moment.",
              gauge("dve_engine_state", "state")),
        Panel("Engine's silence", "s", "Since its last step, while requests wait for it; not minutes.",
              gauge("dve_engine_stalled_seconds")),
        Panel("Held", "short", "Requests with the engine or on their way to it, as the server itself counts them.",
              gauge("dve_engine_open_requests")),
        Panel("Running", "short", "Requests that the engine works on.", gauge("dve_num_requests_running")),
        Panel("Waiting", "short", "Admitted, not begun.", gauge("dve_num_requests_waiting")),
        Panel("By stage", "short", "Where requests are.", gauge("dve_queue_depth", "stage")),
        Panel("KV cache in use", "percentunit", "Near 1 with preemptions: give it more memory, or fewer sequences.",
              gauge("dve_kv_cache_usage_ratio")),
        Panel("Preemptions", "short", "Sequences put back to be computed again, a second.",
              rate("dve_num_preemptions_total", "instance")),
        Panel("Prefix cache hits", "percentunit", "Prompt tokens that were not computed again.",
              ((f"sum (rate(dve_prefix_cache_hits_total{{{FILTER}}}[$__rate_interval]))"
                f" / sum (rate(dve_prefix_cache_queries_total{{{FILTER}}}[$__rate_interval]))", "hits"),)),
        Panel("Batch", "short", "Requests of one step, by stage.", quantiles("dve_batch_size", "stage")),
        Panel("Tokens a step", "short", "Of prompts and given out, in one step. Far apart: long prompts come between."
             , quantiles("dve_iteration_tokens")),
        Panel("Bodies held", "bytes", "Requests without a first event yet; at most 256 MiB by default.",
              gauge("dve_waiting_body_bytes")),
    ),
    "Vision and fusion": (
        Panel("Mean weight", "percentunit", "Of each encoder, over the images served. It says how the gate routes; what"
              " an answer relied on is measured by /v1/encoders/compare.", mean("dve_fusion_weight", "encoder")),
        Panel("Weights", "percentunit", "Median and 95th percentile over images: far apart, it decides per image.",
              quantiles("dve_fusion_weight", "encoder")),
        Panel("Dominant encoder", "short", "Images a second, by which encoder has the larger weight.",
              rate("dve_fusion_dominant_total", "encoder")),
        Panel("Gate entropy", "percentunit", "0: one encoder has it all. 1: both alike.",
              quantiles("dve_fusion_gate_entropy")),
        Panel("Encoder time", "s", "Of one forward pass over all pictures that it had. Kept features cost none.",
              quantiles("dve_encoder_forward_seconds", "encoder")),
        Panel("Pictures a forward", "short", "How well encoding is batched.",
              quantiles("dve_encoder_batch_images", "encoder")),
        Panel("Image tokens a forward", "short", "At most max_encode_tokens, but for one picture that is larger.",
              quantiles("dve_encoder_batch_tokens", "encoder")),
        Panel("Wait for the encoders", "s", "Of a request with images, encode_window_seconds included.",
              quantiles("dve_encoder_wait_seconds")),
        Panel("Feature cache hits", "percentunit", "Over a quarter of an hour.",
              (("dve:encoder_cache_hit_ratio:rate15m", "{{encoder}}"),)),
        Panel("Feature cache", "bytes", "Features kept.", gauge("dve_encoder_cache_bytes", "encoder")),
        Panel("Evictions", "short", "Features dropped a second.", rate("dve_encoder_cache_evictions_total", "encoder")),
        Panel("Vision tokens", "short", "Of a request with images.", quantiles("dve_visual_tokens")),
        Panel("Picture size", "short", "Pixels as they came.", quantiles("dve_image_pixels")),
        Panel("Pictures refused", "short", "A second, by error code.", rate("dve_media_rejected_total", "reason")),
    ),
    "Training": (
        Panel("Jobs", "short", "By status, of all workers of one store.", shared("dve_jobs", "status")),
        Panel("Workers", "short", "Seen within a minute, at whichever job or at none.", shared("dve_workers")),
        Panel("Slowest job", "s", "Since the last step of the running job that has gone longest without one.",
              shared("dve_job_progress_age_seconds")),
        Panel("Oldest lease", "s", "Since a running job's worker spoke. Past the lease another takes the job over.",
              gauge("dve_job_heartbeat_age_seconds")),
        Panel("Attempts", "short", "Trainers that ended, by how.", rate("dve_job_attempts_total", "end")),
        Panel("Loss", "none", "Of the last step, per label token. Of a device's job, while it runs; so are the next.",
              trained("dve_train_loss")),
        Panel("Gate loss", "none", "Weighted, of the last step.", trained("dve_train_diversity_loss")),
        Panel("Learning rates", "none", "By group.", trained("dve_train_learning_rate", "group")),
        Panel("Stage", "none", "Of the curriculum, from 0.", trained("dve_train_stage")),
        Panel("What trains", "short", "Parameters that train, by component.",
              trained("dve_train_trainable_parameters", "component")),
        Panel("Samples, by data set", "short", "A second. A number is the data set's place in its job's list, from 0.",
              rate("dve_train_samples_total", "instance, device, dataset",
                   "{{instance}} {{device}}: {{dataset}}")),
        Panel("Tokens", "short", "A second, in the last step.", trained("dve_train_tokens_per_second")),
        Panel("MFU", "percentunit", "Share of the device's peak, where the worker knows it.",
              trained("dve_train_mfu_ratio")),
        Panel("Worker's disk left", "bytes", "Of the data folder, as the worker sees it.",
              gauge("dve_data_disk_free_bytes")),
        Panel("Worker's store", "s", "Since the store of jobs answered this worker last.",
              gauge("dve_store_answer_age_seconds")),
    ),
}  # fmt: skip


def render(title: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """One dashboard in Grafana's own format."""
    return {
        "title": f"DVE {title}",
        "uid": f"dve-{title.lower().replace(' ', '-')}",
        "tags": ["dve"],
        "timezone": "browser",
        "schemaVersion": 41,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables(JOBS.get(title, "dve")))},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _variables(job: str) -> Iterator[dict[str, Any]]:
    yield {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}
    yield {
        "name": "instance",
        "label": "Instance",
        "type": "query",
        "datasource": SOURCE,
        "query": f'label_values(up{{job="{job}"}}, instance)',
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "title": panel.title,
        "description": panel.description,
        "type": panel.kind,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
            for i, (expr, legend) in enumerate(panel.queries)
        ],
    }


def write(out: Path = OUT) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for title, panels in DASHBOARDS.items():
        board = render(title, panels)
        (out / f"{board['uid']}.json").write_text(json.dumps(board, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
