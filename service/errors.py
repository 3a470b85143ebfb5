"""Errors of the service, and the one table from an error's type to what a client is told.

In: an exception. Out: an OpenAI error body `{"error": {"message", "type", "param", "code"}}` with its
status and headers. It refuses to show a client the text of an exception that was not written for one:
a rule with a fixed message hides `str(error)`, and whatever has no rule is a plain 500.

    DualVisionError (model_core.errors)
    |-- InputError
    |   |-- InvalidBodyError            not JSON, or a field of the wrong type or range
    |   |-- UnsupportedParameterError   a parameter that would have to be ignored
    |   |-- RequestTooLargeError        the body is over the byte limit
    |   |-- InvalidHttpError, HeadersTooLargeError
    |   |-- SlowClientError             headers or body did not come in time
    |   |-- UnknownUrlError, MethodNotAllowedError
    |   |-- InvalidApiKeyError          no key, or none that this server knows
    |   |-- InsufficientPermissionsError  a key of the lesser scope
    |   |-- RateLimitError              a key's requests of this minute are used up
    |   |   `-- ConcurrencyLimitError   as many requests of a key run as may
    |   |-- UploadNotFoundError         no uploaded file of this id is kept
    |   |-- RecordNotFoundError         no served request of this id is remembered
    |   |-- UnknownParameterError       a key that a strict object does not have
    |   |-- JobNotFoundError            no training job of this id
    |   |-- InvalidTrainingFileError    a file that no job can train on
    |   |-- QuotaExceededError          this key has as many jobs or bytes as it may have
    |   |-- ConflictError               the request does not fit what is there now
    |   |   |-- JobFinishedError        the job has ended
    |   |   |-- JobStateError           the job is not in a state for this
    |   |   |-- IdempotencyConflictError the same Idempotency-Key with another body
    |   |   `-- FileInUseError          a job that has not ended reads this file
    |   `-- ImageError
    |       |-- ImageFileTooLargeError
    |       `-- ImageDownloadError      a remote image that did not come
    `-- EngineError
        |-- NotReadyError               the model is still loading, or failed to load
        |-- DrainingError               the server is going down
        |-- ModelTooLargeError          a variant that the memory for variants can't hold
        |-- StalledError                work waits and nothing moves
        |-- StoreUnavailableError       the database of jobs does not answer
        |-- StorageFullError            the disk is full
        |-- RequestTimeoutError         the request's deadline passed
        `-- ClientDisconnectedError     nobody is left to answer
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import Response

from model_core import errors as core


class InvalidBodyError(core.InputError):
    code = "invalid_value"


class UnsupportedParameterError(core.InputError):
    code = "unsupported_parameter"


class RequestTooLargeError(core.InputError):
    code = "request_too_large"


class InvalidHttpError(core.InputError):
    code = "invalid_http_request"


class HeadersTooLargeError(core.InputError):
    code = "headers_too_large"


class SlowClientError(core.InputError):
    code = "request_timeout"


class UnknownUrlError(core.InputError):
    code = "unknown_url"


class MethodNotAllowedError(core.InputError):
    code = "method_not_allowed"


class InvalidApiKeyError(core.InputError):
    code = "invalid_api_key"


class InsufficientPermissionsError(core.InputError):
    code = "insufficient_permissions"


class RateLimitError(core.InputError):
    """`retry_after_seconds` from now on the same request would be let in."""

    code = "rate_limit_exceeded"
    retry_after_seconds = 1.0


class ConcurrencyLimitError(RateLimitError):
    code = "concurrency_limit_exceeded"


class RecordNotFoundError(core.InputError):
    code = "request_not_found"


class UploadNotFoundError(core.InputError):
    code = "file_not_found"


class UnknownParameterError(core.InputError):
    code = "unknown_parameter"


class JobNotFoundError(core.InputError):
    code = "fine_tune_not_found"


class InvalidTrainingFileError(core.InputError):
    code = "invalid_training_file"


class QuotaExceededError(core.InputError):
    code = "quota_exceeded"


class ConflictError(core.InputError):
    code = "conflict"


class JobFinishedError(ConflictError):
    code = "job_finished"


class JobStateError(ConflictError):
    code = "job_state_conflict"


class IdempotencyConflictError(ConflictError):
    code = "idempotency_conflict"


class FileInUseError(ConflictError):
    code = "file_in_use"


class ImageFileTooLargeError(core.ImageError):
    code = "image_file_too_large"


class ImageDownloadError(core.ImageError):
    code = "failed_to_download_image"


class NotReadyError(core.EngineError):
    code = "model_loading"


class DrainingError(core.EngineError):
    code = "server_draining"


class ModelTooLargeError(core.EngineError):
    code = "model_too_large"


class StalledError(core.EngineError):
    code = "engine_stalled"


class StoreUnavailableError(core.EngineError):
    code = "store_unavailable"


class StorageFullError(core.EngineError):
    code = "storage_full"


class RequestTimeoutError(core.EngineError):
    code = "timeout"


class ClientDisconnectedError(core.EngineError):
    code = "client_disconnected"


@dataclass(frozen=True, slots=True)
class Rule:
    """`message` None: the error's own words, which were written for the client.

    `may_retry`: whether the same request may succeed later; the SDK retries 408, 409, 429 and >= 500
    unless it is told not to.
    """

    status: int
    type: str
    code: str
    message: str | None = None
    may_retry: bool = False


_INVALID = "invalid_request_error"
_SERVER = "server_error"
_BROKEN = "The server had an error while processing this request."
_NO_MODEL = "The model is not available on this server."

#: Every type of both trees has its own row (a test holds the table to that).
TABLE: Mapping[type[BaseException], Rule] = {
    core.DualVisionError: Rule(500, _SERVER, "internal_error", _BROKEN),
    core.InputError: Rule(400, _INVALID, "invalid_request"),
    core.InvalidRequestError: Rule(400, _INVALID, "invalid_value"),
    core.InvalidSchemaError: Rule(400, _INVALID, "invalid_json_schema"),
    core.ContextLengthError: Rule(400, _INVALID, "context_length_exceeded"),
    core.ImageError: Rule(400, _INVALID, "invalid_image"),
    core.ImageNotFoundError: Rule(400, _INVALID, "image_not_found", "The image could not be found."),
    core.EmptyImageError: Rule(400, _INVALID, "empty_image_file"),
    core.ImageParseError: Rule(400, _INVALID, "image_parse_error"),
    core.UnsupportedImageError: Rule(400, _INVALID, "unsupported_image_media_type"),
    core.ImageTooLargeError: Rule(400, _INVALID, "image_too_large"),
    core.ImageTooSmallError: Rule(400, _INVALID, "image_too_small"),
    core.InvalidBase64Error: Rule(400, _INVALID, "invalid_base64_image"),
    core.InvalidImageUrlError: Rule(400, _INVALID, "invalid_image_url"),
    core.ConfigError: Rule(500, _SERVER, "invalid_config", _BROKEN),
    core.DataError: Rule(400, _INVALID, "invalid_training_file"),
    core.DataFormatError: Rule(400, _INVALID, "invalid_file_format"),
    core.RecordError: Rule(400, _INVALID, "invalid_training_file"),
    core.UnreadableImagesError: Rule(400, _INVALID, "image_unreadable"),
    core.BadSampleBudgetError: Rule(400, _INVALID, "bad_sample_budget_exceeded"),
    core.TrainingError: Rule(500, _SERVER, "training_failed", _BROKEN),
    core.NonFiniteLossError: Rule(500, _SERVER, "nan_loss", _BROKEN),
    core.FreezeViolationError: Rule(500, _SERVER, "freeze_violation", _BROKEN),
    core.TrainingMemoryError: Rule(500, _SERVER, "out_of_memory", _BROKEN),
    core.StorageFullError: Rule(507, _SERVER, "storage_full", _BROKEN),
    core.ModelNotFoundError: Rule(404, _INVALID, "model_not_found"),
    core.CheckpointError: Rule(503, _SERVER, "checkpoint_corrupt", _NO_MODEL),
    core.CheckpointIncompleteError: Rule(503, _SERVER, "checkpoint_incomplete", _NO_MODEL),
    core.CheckpointMismatchError: Rule(503, _SERVER, "checkpoint_mismatch", _NO_MODEL),
    core.HubUnreachableError: Rule(503, _SERVER, "hub_unreachable", _NO_MODEL),
    core.EngineError: Rule(500, _SERVER, "engine_error", _BROKEN),
    core.OverloadedError: Rule(
        503, _SERVER, "server_overloaded", "The server is busy: its queue is full. Try again shortly.", may_retry=True
    ),
    core.RequestFailedError: Rule(500, _SERVER, "request_failed", "This request failed inside the engine."),
    core.OutOfDeviceMemoryError: Rule(
        503,
        _SERVER,
        "out_of_memory",
        "This request needs more memory than the server has. Send smaller images or less.",
    ),
    core.EngineDeadError: Rule(503, _SERVER, "engine_dead", "The engine has stopped; the server must be restarted."),
    InvalidBodyError: Rule(400, _INVALID, "invalid_value"),
    UnsupportedParameterError: Rule(400, _INVALID, "unsupported_parameter"),
    RequestTooLargeError: Rule(413, _INVALID, "request_too_large"),
    InvalidHttpError: Rule(400, _INVALID, "invalid_http_request"),
    HeadersTooLargeError: Rule(431, _INVALID, "headers_too_large"),
    SlowClientError: Rule(408, _INVALID, "request_timeout", may_retry=True),
    UnknownUrlError: Rule(404, _INVALID, "unknown_url"),
    MethodNotAllowedError: Rule(405, _INVALID, "method_not_allowed"),
    InvalidApiKeyError: Rule(401, _INVALID, "invalid_api_key"),
    InsufficientPermissionsError: Rule(403, _INVALID, "insufficient_permissions"),
    # OpenAI's type of a 429 is what there was too much of.
    RateLimitError: Rule(429, "requests", "rate_limit_exceeded", may_retry=True),
    ConcurrencyLimitError: Rule(429, "requests", "concurrency_limit_exceeded", may_retry=True),
    RecordNotFoundError: Rule(404, _INVALID, "request_not_found"),
    UploadNotFoundError: Rule(404, _INVALID, "file_not_found"),
    UnknownParameterError: Rule(400, _INVALID, "unknown_parameter"),
    JobNotFoundError: Rule(404, _INVALID, "fine_tune_not_found"),
    InvalidTrainingFileError: Rule(400, _INVALID, "invalid_training_file"),
    QuotaExceededError: Rule(429, "insufficient_quota", "quota_exceeded"),
    ConflictError: Rule(409, _INVALID, "conflict"),
    JobFinishedError: Rule(409, _INVALID, "job_finished"),
    JobStateError: Rule(409, _INVALID, "job_state_conflict"),
    IdempotencyConflictError: Rule(409, _INVALID, "idempotency_conflict"),
    FileInUseError: Rule(409, _INVALID, "file_in_use"),
    ImageFileTooLargeError: Rule(400, _INVALID, "image_file_too_large"),
    ImageDownloadError: Rule(400, _INVALID, "failed_to_download_image"),
    NotReadyError: Rule(503, _SERVER, "model_loading", "The model is not loaded yet.", may_retry=True),
    DrainingError: Rule(503, _SERVER, "server_draining", "The server is shutting down.", may_retry=True),
    ModelTooLargeError: Rule(
        503, _SERVER, "model_too_large", "This model needs more memory than this server gives to fine-tuned models."
    ),
    StalledError: Rule(503, _SERVER, "engine_stalled", "Work waits and the engine does not move."),
    StoreUnavailableError: Rule(
        503, _SERVER, "store_unavailable", "The store of jobs does not answer.", may_retry=True
    ),
    StorageFullError: Rule(507, _SERVER, "storage_full", "The server has no room left on its disk."),
    RequestTimeoutError: Rule(504, _SERVER, "timeout", "The request did not finish within its time limit."),
    ClientDisconnectedError: Rule(499, _SERVER, "client_disconnected", "The client closed the connection."),
}

_UNKNOWN = Rule(500, _SERVER, "internal_error", _BROKEN)

#: The rest of such a body is not read, so the connection can't be used again.
_CLOSING = (408, 413)


def rule_for(error: BaseException) -> Rule:
    """The row of the error's own type or of its nearest ancestor that has one."""
    return next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _UNKNOWN)


def error_body(error: BaseException, request_id: str) -> dict[str, object]:
    """The OpenAI error object. From 500 on the message ends with the request id, to be found in the logs."""
    rule = rule_for(error)
    message = str(error) if rule.message is None else rule.message
    if rule.status >= 500 and request_id:
        message = f"{message} Request id: {request_id}."
    param = error.param if isinstance(error, core.DualVisionError) and rule.message is None else None
    return {"error": {"message": message, "type": rule.type, "param": param, "code": rule.code}}


def error_json(error: BaseException, request_id: str) -> bytes:
    # ASCII escapes: a lone surrogate that the message echoes can't be encoded as UTF-8.
    return json.dumps(error_body(error, request_id), ensure_ascii=True).encode("ascii")


def error_response(error: BaseException, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    rule = rule_for(error)
    all_headers = dict(headers or {})
    if rule.status in _CLOSING:
        all_headers["connection"] = "close"
    if rule.may_retry:
        seconds = error.retry_after_seconds if isinstance(error, RateLimitError) else 1.0
        all_headers["retry-after"] = str(max(math.ceil(seconds), 1))
    elif rule.status >= 500 or rule.status in (401, 403, 409, 429):
        all_headers["x-should-retry"] = "false"
    return Response(error_json(error, request_id), rule.status, all_headers, media_type="application/json")
