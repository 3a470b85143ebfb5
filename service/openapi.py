"""The OpenAPI document, told what FastAPI can't see: bodies that routes read themselves, errors, streams and keys.

In: an app with its routes. Out: its `openapi`, completed when it is first asked for. It refuses to know a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.auth import scope_of
from service.protocol.chat import ChatCompletionRequest
from service.protocol.fine_tuning import CreateJobRequest, PatchFusion
from service.protocol.fusion import AnalyzeRequest, CompareRequest

#: Routes read these bodies themselves (strict JSON, OpenAI errors), so the schema must be told of them.
_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/fusion/analyze": AnalyzeRequest,
    "/v1/encoders/compare": CompareRequest,
    "/v1/fine_tuning/jobs": CreateJobRequest,
    "/v1/fine_tuning/jobs/validate": CreateJobRequest,
    "/v1/fine_tuning/jobs/{job_id}/fusion": PatchFusion,
}
_FILE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["fine-tune", "vision"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}
_UPLOAD_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["file"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "question": {"type": "string"},
        "model": {"type": "string"},
    },
}
#: What a 200 is where it is not JSON, or not always.
_MEDIA: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("post", "/v1/chat/completions"): ("application/json", "text/event-stream"),
    ("get", "/v1/fine_tuning/jobs/{job_id}/events"): ("application/json", "text/event-stream"),
    ("get", "/v1/files/{file_id}/content"): ("application/octet-stream",),
    ("get", "/metrics"): ("text/plain",),
}
_ERROR_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {
                    "type": "string",
                    "description": "what is wrong, the value seen, what is allowed, what to do",
                },
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS: Mapping[str, str] = {"4XX": "The request can't be served as it is.", "5XX": "The server can't serve it now."}


def complete_document(app: FastAPI, no_key_paths: Sequence[str], *, is_open: bool) -> None:
    """`is_open`: the server has no keys, so nothing takes one."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _add_bodies(document)
            _add_answers(document)
            if not is_open:
                _add_keys(document, no_key_paths)
            app.openapi_schema = document
        return app.openapi_schema

    # FastAPI's documented way to extend the schema.
    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(document: dict[str, Any]) -> None:
    refs, definitions = models_json_schema(
        [(model, "validation") for model in _BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
    for path, model in _BODIES.items():
        content: dict[str, Any] = {"application/json": {"schema": refs[(model, "validation")]}}
        if model in (AnalyzeRequest, CompareRequest):
            content["multipart/form-data"] = {"schema": _UPLOAD_SCHEMA}
        for operation in document["paths"][path].keys() & {"post", "patch"}:
            document["paths"][path][operation]["requestBody"] = {"required": True, "content": content}
    document["paths"]["/v1/files"]["post"]["requestBody"] = {
        "required": True, "content": {"multipart/form-data": {"schema": _FILE_SCHEMA}}
    }  # fmt: skip


def _add_answers(document: dict[str, Any]) -> None:
    """Every operation may be refused, always in the same shape; FastAPI's own 422 is never sent."""
    schemas = document["components"]["schemas"]
    schemas["ErrorResponse"] = dict(_ERROR_SCHEMA)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            for status, description in _ERRORS.items():
                operation["responses"][status] = {"description": description, "content": shape}
            if (method, path) in _MEDIA:
                told = operation["responses"]["200"].get("content", {})
                media = {kind: told.get(kind, {"schema": {"type": "string"}}) for kind in _MEDIA[method, path]}
                operation["responses"]["200"]["content"] = media


def _add_keys(document: dict[str, Any], no_key_paths: Sequence[str]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if scope_of(method.upper(), path, no_key_paths) is not None:
                operation["security"] = [{"key": []}]
