"""`create_app`: the HTTP application, made of the parts that it is given.

In: settings, an engine client, metrics, a clock. Out: a FastAPI app whose lifespan starts and stops the
client. It refuses to build a part itself or to keep one in a module: two apps in one process are two.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model_core.errors import DualVisionError
from service.addresses import AllowedHosts
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
from service.logs import log_failure, request_id_var
from service.media import MediaLimits, MediaSource
from service.metrics import Metrics
from service.middleware import BodyLimit, RequestScope
from service.protocol.chat import ChatCompletionRequest
from service.protocol.fusion import AnalyzeRequest, CompareRequest
from service.remote import RemoteImages
from service.routes import chat, fusion, health, models
from service.routes.parts import AppParts, parts_of
from service.settings import Settings
from service.uploads import UploadStore
from service.waiting import WaitingBytes

#: Uploads for analysis, all together and each one's life; in memory only.
_UPLOAD_BYTES = 64 * 2**20
_UPLOAD_SECONDS = 3600.0

#: Routes read these bodies themselves (strict JSON, OpenAI errors), so the schema must be told of them.
_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/fusion/analyze": AnalyzeRequest,
    "/v1/encoders/compare": CompareRequest,
}


def create_app(
    settings: Settings,
    client: EngineClient,
    metrics: Metrics,
    hot_models: HotModels,
    *,
    now: Callable[[], float] = time.time,
) -> FastAPI:
    """`now` is the wall clock of `created` fields. The client must not have been started. Raises ConfigError."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        client.start()
        hot_models.start()
        yield
        await client.stop()
        await hot_models.stop()

    app = FastAPI(
        title="Dual Vision Encoder",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
    )
    waiting = WaitingBytes(settings.max_waiting_bytes)
    media = _media(settings, now)
    app.state.parts = AppParts(settings, client, hot_models, metrics, FusionHistory(), waiting, media, now)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, waiting=waiting, metrics=metrics)
    app.add_middleware(RequestScope, metrics=metrics)
    for module in (chat, fusion, models, health):
        app.include_router(module.router)
    app.add_exception_handler(DualVisionError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid_query)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    _document_bodies(app)
    return app


def _media(settings: Settings, now: Callable[[], float]) -> MediaSource:
    limits = MediaLimits(settings.max_images, settings.max_image_bytes, settings.max_body_bytes)
    remote = RemoteImages(AllowedHosts.parse(settings.allowed_media_domains), settings.max_image_bytes)
    uploads = UploadStore(max(_UPLOAD_BYTES, settings.max_image_bytes), _UPLOAD_SECONDS, now)
    return MediaSource(limits, remote, uploads)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, DualVisionError):
        parts_of(request).metrics.count_error(error)
    if rule_for(error).status == 500:
        log_failure("a request failed", error)
    return error_response(error, request_id_var.get())


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown paths and methods, and forms that can't be read."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    headers = error.headers if isinstance(error, HTTPException) else None
    where = f"{request.method} {request.url.path}"
    shaped: DualVisionError
    allow = (headers or {}).get("allow", "")
    if status == 404:
        shaped = UnknownUrlError("there is nothing at this path", value=where, fix="GET /openapi.json lists the paths")
    elif status == 405:
        shaped = MethodNotAllowedError("this path has another method", value=where, allowed=allow)
    else:
        shaped = InvalidBodyError("the form can't be read", allowed="one file and the fields question and model")
    return error_response(shaped, request_id_var.get(), headers)


async def _on_invalid_query(_: Request, error: Exception) -> Response:
    first: Mapping[str, Any] = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    param = str(first.get("loc", ("",))[-1])
    shaped = InvalidBodyError(f"'{param}': {first.get('msg', 'invalid')}", value=first.get("input"), param=param)
    return error_response(shaped, request_id_var.get())


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return error_response(ClientDisconnectedError("the client closed the connection"), request_id_var.get())


def _document_bodies(app: FastAPI) -> None:
    """Adds the request bodies to the OpenAPI document when it is first asked for."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            refs, definitions = models_json_schema(
                [(model, "validation") for model in _BODIES.values()], ref_template="#/components/schemas/{model}"
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            for path, model in _BODIES.items():
                content: dict[str, Any] = {"application/json": {"schema": refs[(model, "validation")]}}
                if model in (AnalyzeRequest, CompareRequest):
                    content["multipart/form-data"] = {"schema": _UPLOAD_SCHEMA}
                document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
            app.openapi_schema = document
        return app.openapi_schema

    # FastAPI's documented way to extend the schema.
    app.openapi = openapi  # type: ignore[method-assign]


_UPLOAD_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "question": {"type": "string"},
        "model": {"type": "string"},
    },
}
