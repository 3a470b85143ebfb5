"""Probes and metrics. A failing probe answers 503 in the shape of every other error."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from service.routes.parts import Parts

router = APIRouter()


@router.get("/health/live", operation_id="get_live")
async def get_live(parts: Parts) -> dict[str, str]:
    """503 only if the engine is dead, or work waits and nothing moves: then a restart helps."""
    parts.client.check_live()
    return {"status": "live"}


@router.get("/health/ready", operation_id="get_ready")
@router.get("/health", operation_id="get_health")
async def get_ready(parts: Parts) -> dict[str, str]:
    """503 while the model loads, and from the moment the server begins to shut down."""
    parts.client.check_ready()
    return {"status": "ready", "model": parts.client.info.model_id}


@router.get("/metrics", operation_id="get_metrics", response_class=Response)
async def get_metrics(parts: Parts) -> Response:
    bridge = parts.client.bridge()
    parts.metrics.set_bridge(bridge)
    parts.metrics.waiting_bytes.set(parts.waiting_bytes.num_bytes)
    parts.metrics.set_caches(bridge.stats)
    return Response(parts.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
