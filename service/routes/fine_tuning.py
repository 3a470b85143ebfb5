"""`/v1/fine_tuning/jobs`: OpenAI's endpoints, and pause, resume, validate and a live switch of the freeze mode."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from service.errors import InvalidBodyError
from service.job_desk import Asking, hash_body
from service.job_objects import job_object, list_object
from service.logs import request_id_var
from service.protocol.body import header_list, parse_body
from service.protocol.fine_tuning import CreateJobRequest, PatchFusion
from service.routes.parts import CallerOf, Parts
from service.tracing.span import current_span

router = APIRouter()

_METADATA_FILTER = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_MAX_KEY_CHARACTERS = 255
_MAX_FILTERS = 16


@router.post("/v1/fine_tuning/jobs", operation_id="create_fine_tuning_job")
async def create_fine_tuning_job(request: Request, parts: Parts, caller: CallerOf) -> Response:
    """Train a model on uploaded files. A repeated request (Idempotency-Key, or a client's retry) gets the same job."""
    raw = await request.body()
    body = parse_body(CreateJobRequest, raw, request.headers.get("content-type"))
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _MAX_KEY_CHARACTERS:
        raise InvalidBodyError(
            "the Idempotency-Key can't be kept", value=f"{len(key)} characters",
            allowed=f"1 to {_MAX_KEY_CHARACTERS} characters", fix="Send a UUID, or leave the header out",
            param="Idempotency-Key",
        )  # fmt: skip
    retries = request.headers.get("x-stainless-retry-count", "0")
    asking = Asking(
        caller, hash_body(raw), key, is_retry=retries.isdecimal() and retries.strip("0") != "",
        request_id=request_id_var.get(), traceparent=current_span.get().traceparent,
    )  # fmt: skip
    job = await parts.desk.create(body, asking, parts.client.info)
    request.state.log_fields = {"job_id": job.id, "model": job.model}
    current_span.get().set(dve__job_id=job.id)
    return JSONResponse(job_object(job), headers=_ignored(body))


@router.post("/v1/fine_tuning/jobs/validate", operation_id="validate_fine_tuning_job")
async def validate_fine_tuning_job(request: Request, parts: Parts, caller: CallerOf) -> Response:
    """The same body as a job's: what would be refused, the stages as they would run, and the memory they need."""
    body = parse_body(CreateJobRequest, await request.body(), request.headers.get("content-type"))
    report = await parts.desk.validate(body, parts.client.info, caller.key_id)
    return JSONResponse(report, headers=_ignored(body))


def _ignored(body: CreateJobRequest) -> dict[str, str]:
    names = body.ignored_names()
    return {"x-dve-ignored": header_list(names)} if names else {}


@router.get("/v1/fine_tuning/jobs", operation_id="list_fine_tuning_jobs")
async def list_fine_tuning_jobs(
    request: Request,
    parts: Parts,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """Newest first. `metadata[k]=v` filters, each one given must fit; `metadata=null`: jobs without any."""
    wanted: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if (match := _METADATA_FILTER.fullmatch(name)) is not None:
            wanted[match[1]] = value
    without = request.query_params.get("metadata")
    if without not in (None, "null") or len(wanted) > _MAX_FILTERS or (without and wanted):
        raise InvalidBodyError(
            "this filter by metadata can't be read", value=without, param="metadata",
            allowed=f"up to {_MAX_FILTERS} metadata[key]=value, or metadata=null",
            fix="Filter by so many keys at most, or by metadata=null alone",
        )  # fmt: skip
    jobs, has_more = await asyncio.to_thread(
        parts.desk.store.jobs.page, after=after, limit=limit, metadata=wanted, has_no_metadata=without is not None
    )
    return list_object([job_object(job) for job in jobs], has_more=has_more)


@router.get("/v1/fine_tuning/jobs/{job_id}", operation_id="get_fine_tuning_job")
async def get_fine_tuning_job(job_id: str, parts: Parts) -> dict[str, Any]:
    return job_object(await asyncio.to_thread(parts.desk.store.jobs.get, job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", operation_id="cancel_fine_tuning_job")
async def cancel_fine_tuning_job(job_id: str, parts: Parts) -> dict[str, Any]:
    """`cancelled` once its process is gone; until then `running`, with `fusion.requested_action`."""
    return job_object(await asyncio.to_thread(parts.desk.store.jobs.request, job_id, "cancel"))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", operation_id="pause_fine_tuning_job")
async def pause_fine_tuning_job(job_id: str, parts: Parts) -> dict[str, Any]:
    """`paused` once its process is gone and its checkpoint is safe; until then `running`."""
    return job_object(await asyncio.to_thread(parts.desk.store.jobs.request, job_id, "pause"))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", operation_id="resume_fine_tuning_job")
async def resume_fine_tuning_job(job_id: str, parts: Parts) -> dict[str, Any]:
    """A paused job waits for a worker again, and goes on from its last checkpoint."""
    return job_object(await asyncio.to_thread(parts.desk.store.jobs.resume, job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/freeze", operation_id="get_fine_tuning_job_freeze")
async def get_fine_tuning_job_freeze(job_id: str, parts: Parts) -> dict[str, Any]:
    """What trains: the table of every component as the trainer resolved it, and the switches that were asked for."""
    job = await asyncio.to_thread(parts.desk.store.jobs.get, job_id)
    switches = await asyncio.to_thread(parts.desk.store.jobs.switches, job_id)
    return {
        "object": "fine_tuning.job.freeze",
        "fine_tuning_job_id": job.id,
        "stage": job.stage,
        "requested": {"freeze": job.fusion.get("freeze"), "curriculum": job.fusion.get("curriculum")},
        "freeze_table": job.freeze_table,
        "switches": [
            {
                "number": switch.number,
                "created_at": int(switch.created_at),
                "freeze": switch.freeze,
                "applied_step": switch.applied_step,
            }
            for switch in switches
        ],
    }


@router.patch("/v1/fine_tuning/jobs/{job_id}/fusion", operation_id="patch_fine_tuning_job_fusion")
async def patch_fine_tuning_job_fusion(request: Request, job_id: str, parts: Parts) -> dict[str, Any]:
    """Another freeze mode for a job that has not ended, from its next step on."""
    body = parse_body(PatchFusion, await request.body(), request.headers.get("content-type"))
    return job_object(await asyncio.to_thread(parts.desk.switch, job_id, body.freeze))
