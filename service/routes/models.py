"""`/v1/models`: the base first, then fine-tuned models, each with its virtual ids; loading, rolling back, deleting."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import APIRouter, Request

from model_core.errors import DualVisionError, InvalidRequestError, ModelNotFoundError
from model_core.types import ModelInfo
from service.errors import StorageFullError, StoreUnavailableError, rule_for
from service.protocol.models import ModelCard, ModelDeleted, ModelList, ModelProblem
from service.registry import PublishedModel
from service.routes.parts import AppParts, Parts
from service.streaming import until_disconnect
from service.translate import model_cards

router = APIRouter()


@router.get("/v1/models", operation_id="list_models")
async def list_models(parts: Parts) -> ModelList:
    """What this server answers under. A model of status `ready` is loaded at its first use."""
    cards = model_cards(parts.client.info)
    for model in parts.models.published():
        cards += _cards(parts, model)
    return ModelList(data=cards)


# `:path`, since ids of the hub hold slashes. The longer paths first, or they would be ids.
@router.post("/v1/models/{model_id:path}/load", operation_id="load_model")
async def load_model(model_id: str, request: Request, parts: Parts) -> ModelCard:
    """Into memory, unless it is there; also again after a failure; a job's checkpoint is published first."""
    try:
        model = parts.models.published_as(model_id)
    except ModelNotFoundError:
        if not await parts.publish_checkpoint(request, model_id):
            raise
        model = parts.models.published_as(model_id)
    if model is not None:
        with parts.client.admit() as admission:
            await until_disconnect(request, admission.wait(parts.models.load(model, again=True)))
    return _card(parts, model_id)


@router.post("/v1/models/{model_id:path}/unload", operation_id="unload_model")
async def unload_model(model_id: str, parts: Parts) -> ModelCard:
    """Out of memory. Requests that have begun end as usual, and the next one loads it again."""
    parts.models.unload(_fine_tuned(parts, model_id))
    return _card(parts, model_id)


@router.post("/v1/models/{model_id:path}/rollback", operation_id="roll_back_model")
async def roll_back_model(model_id: str, parts: Parts) -> ModelCard:
    """The version that was promoted before answers from now on."""
    parts.models.roll_back(_fine_tuned(parts, model_id))
    return _card(parts, model_id)


@router.get("/v1/models/{model_id:path}", operation_id="get_model")
async def get_model(model_id: str, parts: Parts) -> ModelCard:
    return _card(parts, model_id)


@router.delete("/v1/models/{model_id:path}", operation_id="delete_model")
async def delete_model(model_id: str, parts: Parts) -> ModelDeleted:
    """Nobody finds it from now on; requests that have begun end as usual, then its files go, its job's among them."""
    parts.models.delete(model_id)
    with contextlib.suppress(StoreUnavailableError, StorageFullError):  # then its job's folder goes when it is old
        await asyncio.to_thread(parts.desk.store.models.set_status, model_id, "deleted")
    return ModelDeleted(id=model_id)


def _fine_tuned(parts: AppParts, model_id: str) -> PublishedModel:
    model = parts.models.published_as(model_id)
    if model is None:
        raise InvalidRequestError(
            "the base is always in memory, in one version", value=model_id, allowed="a fine-tuned model",
            fix="Name a fine-tuned one; GET /v1/models lists them", param="model",
        )  # fmt: skip
    return model


def _card(parts: AppParts, model_id: str) -> ModelCard:
    model = parts.models.published_as(model_id)
    cards = model_cards(parts.client.info) if model is None else _cards(parts, model)
    return next(card for card in cards if card.id == model_id)


def _cards(parts: AppParts, model: PublishedModel) -> list[ModelCard]:
    status, serving, error = parts.models.status(model)
    cards = model_cards(
        serving or _promised(parts.client.info, model),
        parent=parts.client.info.model_id,
        owned_by=model.owner or "dual-vision-encoder",
        status=status,
        system_fingerprint=None if serving is None else serving.fingerprint,
        error=None if error is None else _problem(error),
    )
    return cards


def _promised(base: ModelInfo, model: PublishedModel) -> ModelInfo:
    """What a model that is not in memory will be, by its record."""
    record = model.record
    return ModelInfo(
        model_id=model.id,
        fingerprint=f"fp_{record.fingerprint}",
        fusion=record.fusion,
        fusion_trained=record.fusion_trained,
        encoders=record.encoders,
        max_context_tokens=record.max_context_tokens,
        device=base.device,
        dtype=base.dtype,
        num_parameters=record.num_parameters,
        created_unix=record.created_unix,
    )


def _problem(error: DualVisionError) -> ModelProblem:
    """As a request for this model would be told."""
    rule = rule_for(error)
    return ModelProblem(code=rule.code, message=rule.message or str(error))
