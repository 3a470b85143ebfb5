"""`create_app`: the HTTP application, made of the parts that it is given.

In: settings, an engine client, metrics, keys, clocks. Out: a FastAPI app whose lifespan starts and stops the
client. It refuses to build a part itself or to keep one in a module: two apps in one process are two.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match

from model_core.errors import DualVisionError
from service.addresses import AllowedHosts
from service.auth import KeyGate
from service.checkpoint_publisher import CheckpointPublisher
from service.engine_client import EngineClient
from service.errors import (
    ClientDisconnectedError,
    InvalidBodyError,
    MethodNotAllowedError,
    UnknownUrlError,
    error_response,
    rule_for,
)
from service.fusion_history import FusionHistory
from service.hot_models import HotModels
from service.housekeeping import keep_house
from service.job_desk import JobDesk
from service.jobs.files import FileFolder
from service.jobs.store import Store
from service.keys import KeyRing
from service.limits import KeyLimits
from service.logs import log_failure, request_id_var
from service.media import MediaLimits, MediaSource
from service.middleware import BodyLimit, RequestScope
from service.openapi import complete_document
from service.preflight import Preflight
from service.remote import RemoteImages
from service.request_limits import RequestLimits
from service.routes import chat, files, fine_tuning, fusion, health, job_events, models
from service.routes.parts import AppParts, parts_of
from service.settings import JobSettings, Settings
from service.store_watch import StoreWatch
from service.tracing.span import Tracer
from service.uploads import UploadStore
from service.waiting import WaitingBytes

#: Uploads for analysis, all together and each one's life; in memory only.
_UPLOAD_BYTES = 64 * 2**20
_UPLOAD_SECONDS = 3600.0

_FASTAPI: Mapping[str, Any] = {
    "title": "Dual Vision Encoder",
    "docs_url": None,  # their pages load scripts from a CDN
    "redoc_url": None,
    "redirect_slashes": False,
    # FastAPI's own spans and metrics: asked for nowhere (service/tracing has ours), yet looked for in every request.
    "telemetry": {"tracing": False, "metrics": False, "logs": False},
}


def create_app(
    settings: Settings,
    client: EngineClient,
    keys: KeyRing,
    store: Store,
    hot_models: HotModels,
    *,
    jobs: JobSettings,
    request_limits: RequestLimits,
    tracer: Tracer | None = None,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """`tracer`: none records nothing. `now`: the wall clock of `created` fields. `clock`: that of the limits.

    The client must not have been started; the store is closed at the end. Raises ConfigError.
    """
    folder, metrics = FileFolder(jobs.data_dir), client.metrics
    watch = StoreWatch(store, jobs.data_dir, metrics.store)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        client.start()
        hot_models.start()
        async with _kept_in_order(store, folder, watch, jobs.event_retention_days):
            yield
            await client.stop()
            await hot_models.stop()

    app = FastAPI(lifespan=lifespan, **_FASTAPI)
    waiting, media = WaitingBytes(request_limits.max_waiting_bytes), _media(settings, request_limits, folder, now)
    desk = JobDesk(settings, store, folder, Preflight(settings.device), hot_models.published_as)
    history, checkpoints = FusionHistory(), CheckpointPublisher(store, settings.data_dir)
    app.state.parts = AppParts(
        settings, request_limits, client, hot_models, metrics, history, waiting, media, desk, checkpoints, now
    )
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limits=request_limits, waiting=waiting, metrics=metrics)
    routers = [module.router for module in (chat, fusion, models, files, fine_tuning, job_events, health)]
    routes = [route for router in routers for route in router.routes]
    limits = KeyLimits(settings.key_requests_per_minute, settings.key_max_concurrent, clock)
    app.add_middleware(
        KeyGate,
        keys=keys,
        limits=limits,
        metrics=metrics,
        public_paths=settings.no_key_paths(),
        host_name=settings.host,
        routes=routes,
    )
    app.add_middleware(RequestScope, metrics=metrics, tracer=tracer)
    for router in routers:
        app.include_router(router)
    _shape_errors(app, routes)
    complete_document(app, settings.no_key_paths(), is_open=keys.is_open)
    return app


@asynccontextmanager
async def _kept_in_order(
    store: Store, folder: FileFolder, watch: StoreWatch, event_retention_days: float
) -> AsyncGenerator[None, None]:
    """Housekeeping beside the server; at the end the store is closed."""
    keeping = asyncio.create_task(keep_house(store, folder, watch, event_retention_days * 24 * 3600))
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await asyncio.to_thread(store.close)


def _shape_errors(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    app.add_exception_handler(DualVisionError, _on_error)
    app.add_exception_handler(HTTPException, partial(_on_http_exception, routes))
    app.add_exception_handler(RequestValidationError, _on_invalid_query)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def _media(settings: Settings, limits: RequestLimits, folder: FileFolder, now: Callable[[], float]) -> MediaSource:
    media_limits = MediaLimits(limits.max_images, limits.max_image_bytes, limits.max_body_bytes)
    remote = RemoteImages(AllowedHosts.parse(settings.allowed_media_domains), limits.max_image_bytes)
    max_bytes = max(_UPLOAD_BYTES, limits.max_image_bytes)
    uploads = UploadStore(max_bytes, _UPLOAD_SECONDS, now, kept=folder.read_picture)
    return MediaSource(media_limits, remote, uploads)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, DualVisionError):
        parts_of(request).metrics.count_error(error)
    if rule_for(error).status == 500:
        log_failure("a request failed", error)
    return error_response(error, request_id_var.get())


async def _on_http_exception(routes: Sequence[BaseRoute], request: Request, error: Exception) -> Response:
    """Starlette's own: unknown paths and methods, and forms that can't be read."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    headers = error.headers if isinstance(error, HTTPException) else None
    where = f"{request.method} {request.url.path}"
    shaped: DualVisionError
    if status == 404:
        shaped = UnknownUrlError("there is nothing at this path", value=where, fix="GET /openapi.json lists the paths")
    elif status == 405:
        allow = ", ".join(_methods_of(request, routes))
        headers = {**(headers or {}), "Allow": allow}
        shaped = MethodNotAllowedError(
            "this path has another method", value=where, allowed=allow, fix="Use one of them"
        )
    else:
        shaped = InvalidBodyError(
            "the form can't be read", allowed="one file and the fields question and model",
            fix="Let the HTTP client write the form, as curl -F file=@PICTURE does",
        )  # fmt: skip
    return error_response(shaped, request_id_var.get(), headers)


def _methods_of(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """Starlette's own `Allow` names those of the first route on the path alone (RFC 9110, 10.2.1 wants all). Where the
    path fits two templates (a model's id may hold slashes), the first one's count."""
    found = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    paths = [getattr(route, "path", "") for route in found]
    same = (route for route, path in zip(found, paths, strict=True) if path == paths[0])
    return sorted({method for route in same for method in getattr(route, "methods", None) or ()})


async def _on_invalid_query(_: Request, error: Exception) -> Response:
    first: Mapping[str, Any] = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    param = str(first.get("loc", ("",))[-1])
    what, fix = f"'{param}': {first.get('msg', 'invalid')}", "Correct it or leave it out"
    shaped = InvalidBodyError(what, value=first.get("input"), fix=fix, param=param)
    return error_response(shaped, request_id_var.get())


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return error_response(ClientDisconnectedError("the client closed the connection"), request_id_var.get())
