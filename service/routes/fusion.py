"""How images are routed and what the encoders did: statistics, analysis, comparison."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile

from model_core.analysis.compare import answer_requests, score_requests, summarise
from model_core.errors import ImageError, InvalidRequestError
from model_core.types import Arm, ChatMessage, FusionWeights, GenerationRequest, SamplingParams, TokenEvent
from service.admission import Admission
from service.errors import InvalidBodyError, RecordNotFoundError
from service.fleet import Member
from service.fusion_history import weight_statistics
from service.keys import Caller
from service.logs import request_id_var
from service.media import check_image_bytes, check_image_data
from service.messages import require_images, upload_messages
from service.protocol.body import parse_body
from service.protocol.content import Message
from service.protocol.fusion import ANALYZE_MEANING, COMPARE_MEANING, AnalyzeRequest, CompareRequest
from service.reports import analysis_entry, mean_weights, to_comparison
from service.routes.parts import AppParts, CallerOf, Parts
from service.streaming import until_disconnect
from service.translate import compare_sampling, resolve_model
from service.uploads import UploadRecord
from service.waiting import WaitingBody

router = APIRouter()

_DEFAULT_QUESTION = "Describe the picture."
_MAX_FORM_FIELD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Upload:
    """A form's picture, kept from now on under its id, and what else the form holds."""

    record: UploadRecord
    messages: tuple[ChatMessage, ...]
    model: str | None


@router.get("/fusion-weights", operation_id="get_fusion_weights")
async def get_fusion_weights(
    request: Request,
    parts: Parts,
    caller: CallerOf,
    window: Annotated[int, Query(ge=1, le=100_000, description="how many of the latest images to look at")] = 1000,
    request_id: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    file_id: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
) -> dict[str, Any]:
    """Rolling statistics of served images, or one request's own weights, or those of an uploaded picture.

    The top level speaks of the model itself; `by_model` also of the virtual ids, whose gates saw stand-ins.
    """
    info = parts.client.info
    if request_id is not None:
        if file_id is not None:
            raise InvalidBodyError(
                "'request_id' and 'file_id' ask for two things", value=f"{request_id} and {file_id}",
                allowed="one of them", fix="Ask for each in a request of its own", param="file_id",
            )  # fmt: skip
        return _one_request(parts, caller, request_id)
    if file_id is not None:
        record, data = parts.media.uploads.get(file_id, caller.key_id)
        upload = _Upload(record, upload_messages(data, _DEFAULT_QUESTION), None)
        return await until_disconnect(request, _analyze(parts, parts.client.base, (info.model_id, "fused"), upload))
    by_model: dict[str, list[FusionWeights]] = defaultdict(list)
    for model, weights in parts.history.recent_images(window):
        by_model[model].append(weights)
    return {
        "object": "fusion.weights",
        "model": info.model_id,
        "fusion": info.fusion,
        "fusion_trained": info.fusion_trained,
        "window": window,
        **weight_statistics(by_model[info.model_id], info.encoders),
        "by_model": {model: weight_statistics(images, info.encoders) for model, images in by_model.items()},
        "meaning": dict(ANALYZE_MEANING),
    }


def _one_request(parts: AppParts, caller: Caller, request_id: str) -> dict[str, Any]:
    served = parts.history.find(caller.key_id, request_id)
    if served is None:
        raise RecordNotFoundError(
            "no served request of this id is remembered",
            value=request_id,
            allowed="the x-request-id header or the id of a recent chat completion",
            fix="Ask with the key that sent the chat, or send it again",
            param="request_id",
        )
    encoders = parts.client.info.encoders
    return {
        "object": "fusion.request",
        "request_id": served.request_id,
        "id": served.completion_id,
        "model": served.model,
        "created": served.created_unix,
        "images": [analysis_entry(i, weights, encoders) for i, weights in enumerate(served.fusion)],
        "meaning": dict(ANALYZE_MEANING),
    }


@router.post("/v1/fusion/analyze", operation_id="analyze_fusion")
async def analyze_fusion(request: Request, parts: Parts, caller: CallerOf) -> dict[str, Any]:
    """Weights, contribution and relative update of each image: JSON messages, or an uploaded `file`."""
    parts.client.check_room()
    given: _Body | _Upload
    if _is_form(request):
        given = await _read_form(request, parts, caller)
        name = given.model
    else:
        body = parse_body(AnalyzeRequest, await request.body(), request.headers.get("content-type"))
        given, name = _Body(body.messages, request.state.waiting_body, caller), body.model
    member = await parts.find_model(request, name)
    if isinstance(given, _Body):
        require_images(given.messages)
    return await until_disconnect(request, _analyze(parts, member, resolve_model(member.info, name), given))


@dataclass(frozen=True, slots=True)
class _Body:
    """Messages of a JSON body, the room that it takes, and whose uploads they may name."""

    messages: tuple[Message, ...]
    waiting: WaitingBody
    caller: Caller


async def _messages(parts: AppParts, admission: Admission, given: _Body | _Upload) -> tuple[ChatMessage, ...]:
    if isinstance(given, _Upload):
        return given.messages
    return await parts.read_messages(admission, given.messages, given.waiting, given.caller)


@contextmanager
def _blaming(given: _Body | _Upload) -> Iterator[None]:
    """A form has no messages: what is wrong with its picture is wrong with its file."""
    try:
        yield
    except ImageError as error:
        if isinstance(given, _Upload):
            error.param = "file"
        raise


def _file_id(given: _Body | _Upload) -> dict[str, str]:
    return {"file_id": given.record.id} if isinstance(given, _Upload) else {}


async def _analyze(parts: AppParts, member: Member, asked: tuple[str, Arm], given: _Body | _Upload) -> dict[str, Any]:
    (model, arm), encoders = asked, member.info.encoders
    with parts.client.admit(member=member) as admission, _blaming(given):
        messages = await _messages(parts, admission, given)
        request = GenerationRequest(f"analyze-{uuid.uuid4().hex}", messages, arm=arm, encode_only=True)
        images = (await admission.answer(request)).fusion or ()
    return {
        "object": "fusion.analysis",
        "request_id": request_id_var.get(),
        "model": model,
        **_file_id(given),
        "fusion_trained": all(weights.fusion_trained for weights in images),
        **mean_weights(images, encoders),
        "images": [analysis_entry(i, weights, encoders) for i, weights in enumerate(images)],
        "meaning": dict(ANALYZE_MEANING),
    }


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def _read_form(request: Request, parts: AppParts, caller: Caller) -> _Upload:
    """Raises InvalidBodyError, ImageError."""
    limits = parts.media.limits
    async with request.form(max_files=1, max_fields=3, max_part_size=_MAX_FORM_FIELD_BYTES) as form:
        for name in form:
            if name not in ("file", "question", "model"):
                raise InvalidBodyError(
                    "unknown form field", value=name, allowed="file, question, model",
                    fix="Leave it out, or correct its name", param=name[:64],
                )  # fmt: skip
        file, question, model = form.get("file"), form.get("question", _DEFAULT_QUESTION), form.get("model")
        if not isinstance(file, UploadFile):
            raise InvalidBodyError(
                "the form holds no file", value="nothing" if file is None else "a text without a filename",
                allowed="a field 'file' with a filename", fix="Add the picture, as curl -F file=@PICTURE does",
                param="file",
            )  # fmt: skip
        if isinstance(question, UploadFile) or isinstance(model, UploadFile):
            raise InvalidBodyError(
                "a text field holds a file", value="question" if isinstance(question, UploadFile) else "model",
                allowed="only 'file' is a file", fix="Send it as a text, without a filename", param="question",
            )  # fmt: skip
        check_image_bytes(file.size or 0, limits, "file")
        data = check_image_data(await file.read(), limits, "file")
        record = parts.media.uploads.put(data, file.filename or "", caller.key_id)
    return _Upload(record, upload_messages(data, question), model)


@router.post("/v1/encoders/compare", operation_id="compare_encoders")
async def compare_encoders(request: Request, parts: Parts, caller: CallerOf) -> dict[str, Any]:
    """The same question under every arm, and how much the fused answer relies on each encoder.

    JSON messages, or an uploaded `file`.
    """
    parts.client.check_room()
    given: _Body | _Upload
    if _is_form(request):
        given = await _read_form(request, parts, caller)
        name, asked = given.model, None
    else:
        asked = parse_body(CompareRequest, await request.body(), request.headers.get("content-type"))
        given, name = _Body(asked.messages, request.state.waiting_body, caller), asked.model
    member = await parts.find_model(request, name)
    model, arm = resolve_model(member.info, name)
    if arm != "fused":
        raise InvalidRequestError(
            "a comparison runs every arm by itself",
            value=model,
            allowed=f"'{member.info.model_id}', or no model",
            fix="Leave the @ and what follows it out",
            param="model",
        )
    if isinstance(given, _Body):
        require_images(given.messages)
    return await until_disconnect(request, _compare(parts, member, given, compare_sampling(asked, member.info)))


async def _compare(parts: AppParts, member: Member, given: _Body | _Upload, sampling: SamplingParams) -> dict[str, Any]:
    info = member.info
    prefix = f"compare-{uuid.uuid4().hex}"
    with parts.client.admit(member=member) as admission, _blaming(given):
        messages = await _messages(parts, admission, given)
        answers = await _answer_in_turn(admission, answer_requests(prefix, messages, sampling))
        scores = await admission.answer_all(score_requests(prefix, messages, answers["fused"].token_ids))
    return {
        "object": "encoders.comparison",
        "request_id": request_id_var.get(),
        "model": info.model_id,
        **_file_id(given),
        "fusion_trained": info.fusion_trained,
        **to_comparison(summarise(answers, scores), info.encoders),
        "meaning": dict(COMPARE_MEANING),
    }


async def _answer_in_turn(admission: Admission, requests: dict[Arm, GenerationRequest]) -> dict[Arm, TokenEvent]:
    """One after another: in one batch the arms would share their time, and latencies are part of the answer."""
    return {arm: await admission.answer(request) for arm, request in requests.items()}
