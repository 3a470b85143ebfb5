"""The exception tree of the model and its engine.

Every error that a user can cause carries four parts: what went wrong, the value that was seen, what
is allowed, and what to do about it. `code` is a stable name that the HTTP layer and scripts key on.

    DualVisionError
    |-- InputError                    the request is wrong; the same request will fail again
    |   |-- InvalidRequestError       a message, role, part or parameter
    |   |-- InvalidSchemaError        a JSON schema that is no schema, or that can't be followed
    |   |-- ContextLengthError        prompt and images do not fit the context
    |   `-- ImageError
    |       |-- ImageNotFoundError    a path that is not there or can't be read
    |       |-- EmptyImageError       zero bytes
    |       |-- ImageParseError       the decoder gave up: truncated or damaged
    |       |-- UnsupportedImageError a format outside the list
    |       |-- ImageTooLargeError    bytes, pixels or aspect ratio above the limit
    |       |-- ImageTooSmallError    fewer pixels than one vision token needs
    |       |-- InvalidBase64Error    a data URL whose payload does not decode
    |       `-- InvalidImageUrlError  a URL scheme or address that is not fetched
    |-- ConfigError                   settings that contradict each other or the model
    |   `-- DataError                 training data that can't be used as it is; the rows are named
    |       |-- DataFormatError       a file of another kind than those that are read
    |       |-- RecordError           one row that is no sample; `reason` says why in one word
    |       |-- UnreadableImagesError samples whose pictures are missing or damaged
    |       `-- BadSampleBudgetError  more bad samples than may be set aside
    |-- ModelNotFoundError            no such model, arm or encoder
    |-- CheckpointError
    |   |-- CheckpointIncompleteError a file is missing, truncated or does not match the manifest
    |   |-- CheckpointMismatchError   another architecture or other shapes
    |   `-- HubUnreachableError       a hub id that is neither cached nor reachable
    |-- TrainingError                 a run that can't go on
    |   |-- NonFiniteLossError        the loss or a gradient is not a number
    |   |-- FreezeViolationError      what is frozen changed, or what trains has no place in the optimizer
    |   |-- TrainingMemoryError       a pack does not fit the memory
    |   `-- StorageFullError          a checkpoint or a log could not be written
    `-- EngineError
        |-- OverloadedError           the queue is full; try again later
        |-- RequestFailedError        this one request broke inside the engine
        |-- OutOfDeviceMemoryError    this one request does not fit the memory, even alone
        `-- EngineDeadError           the engine loop has stopped
"""

from __future__ import annotations

from collections.abc import Mapping


class DualVisionError(Exception):
    """Base of the tree. `str(error)` is the whole message; the parts are kept as attributes."""

    code = "internal_error"

    def __init__(
        self, what: str, *, value: object = None, allowed: str = "", fix: str = "", param: str | None = None
    ) -> None:
        self.what, self.value, self.allowed, self.fix, self.param = what, value, allowed, fix, param
        parts = [what if what.endswith((".", "!", "?")) else what + "."]
        if value is not None:
            parts.append(f"Got: {_short(value)}.")
        if allowed:
            parts.append(f"Allowed: {allowed}.")
        if fix:
            parts.append(fix if fix.endswith(".") else fix + ".")
        super().__init__(" ".join(parts))


class InputError(DualVisionError):
    code = "invalid_request"


class InvalidRequestError(InputError):
    code = "invalid_value"


class InvalidSchemaError(InputError):
    code = "invalid_json_schema"


class ContextLengthError(InputError):
    code = "context_length_exceeded"


class ImageError(InputError):
    code = "invalid_image"


class ImageNotFoundError(ImageError):
    code = "image_not_found"


class EmptyImageError(ImageError):
    code = "empty_image_file"


class ImageParseError(ImageError):
    code = "image_parse_error"


class UnsupportedImageError(ImageError):
    code = "unsupported_image_media_type"


class ImageTooLargeError(ImageError):
    code = "image_too_large"


class ImageTooSmallError(ImageError):
    code = "image_too_small"


class InvalidBase64Error(ImageError):
    code = "invalid_base64_image"


class InvalidImageUrlError(ImageError):
    code = "invalid_image_url"


class ConfigError(DualVisionError):
    code = "invalid_config"


class DataError(ConfigError):
    """problems: the rows that are meant, as the report of a data set has them; may be empty."""

    code = "invalid_training_file"
    problems: tuple[Mapping[str, object], ...] = ()


class DataFormatError(DataError):
    code = "invalid_file_format"


class RecordError(DataError):
    def __init__(self, reason: str, what: str, *, value: object = None, allowed: str = "", fix: str = "") -> None:
        super().__init__(what, value=value, allowed=allowed, fix=fix)
        self.reason = reason


class UnreadableImagesError(DataError):
    code = "image_unreadable"


class BadSampleBudgetError(DataError):
    code = "bad_sample_budget_exceeded"


class ModelNotFoundError(DualVisionError):
    code = "model_not_found"


class CheckpointError(DualVisionError):
    code = "checkpoint_corrupt"


class CheckpointIncompleteError(CheckpointError):
    code = "checkpoint_incomplete"


class CheckpointMismatchError(CheckpointError):
    code = "checkpoint_mismatch"


class HubUnreachableError(CheckpointError):
    code = "hub_unreachable"


class TrainingError(DualVisionError):
    code = "training_failed"


class NonFiniteLossError(TrainingError):
    code = "nan_loss"


class FreezeViolationError(TrainingError):
    code = "freeze_violation"


class TrainingMemoryError(TrainingError):
    code = "out_of_memory"


class StorageFullError(TrainingError):
    code = "storage_full"


class EngineError(DualVisionError):
    code = "engine_error"


class OverloadedError(EngineError):
    code = "server_overloaded"


class RequestFailedError(EngineError):
    code = "request_failed"


class OutOfDeviceMemoryError(EngineError):
    code = "out_of_memory"


class EngineDeadError(EngineError):
    code = "engine_dead"


def _short(value: object, limit: int = 200) -> str:
    """One line of at most `limit` characters, so that a hostile value can't flood a log or an answer."""
    text = value if isinstance(value, str) else repr(value)
    text = text.replace("\r", "\\r").replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
