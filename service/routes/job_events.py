"""A job's events and checkpoints: pages of them, and a stream of events as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from service.job_desk import JobDesk
from service.job_objects import checkpoint_object, event_object, list_object
from service.logs import request_id_var
from service.routes.parts import Parts
from service.streaming import DONE, SseResponse, to_frame

router = APIRouter()

_POLL_SECONDS = 0.25
_QUIET_SECONDS = 15.0
_COMMENT = b": nothing new\n\n"

After = Annotated[str | None, Query(max_length=64)]


@router.get("/v1/fine_tuning/jobs/{job_id}/events", operation_id="list_fine_tuning_events")
async def list_fine_tuning_events(
    job_id: str,
    parts: Parts,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    stream: bool = False,
) -> Response:
    """Newest first. `stream=true`: oldest first as server-sent events, those behind `after`, until the job ends."""
    if not stream:
        page = await asyncio.to_thread(parts.desk.store.jobs.events, job_id, after=after, limit=limit)
        return JSONResponse(list_object([event_object(event) for event in page[0]], has_more=page[1]))
    # Whatever is wrong with the ids has its own status: it is found before a byte is sent.
    seq = await asyncio.to_thread(parts.desk.store.jobs.event_seq, job_id, after)
    frames = _frames(parts.desk, job_id, seq)
    return SseResponse(frames, _nothing, request_id=request_id_var.get(), headers={})


async def _nothing() -> None:
    """The stream holds nothing beside its generator."""


async def _frames(desk: JobDesk, job_id: str, seq: int) -> AsyncGenerator[bytes, None]:
    clock = asyncio.get_running_loop().time
    last = clock()
    while True:
        job, events = await asyncio.to_thread(desk.store.jobs.events_since, job_id, seq)
        for event in events:
            seq = event.seq
            yield b"id: " + event.id.encode("ascii") + b"\n" + to_frame(event_object(event))
        if events:
            last = clock()
        elif job.is_terminal:
            yield DONE
            return
        else:
            if clock() - last >= _QUIET_SECONDS:
                last = clock()
                yield _COMMENT
            await asyncio.sleep(_POLL_SECONDS)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", operation_id="list_fine_tuning_checkpoints")
async def list_fine_tuning_checkpoints(
    job_id: str, parts: Parts, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 10
) -> dict[str, Any]:
    """Newest first."""
    found, has_more = await asyncio.to_thread(parts.desk.store.jobs.checkpoints, job_id, after=after, limit=limit)
    return list_object([checkpoint_object(checkpoint) for checkpoint in found], has_more=has_more)
