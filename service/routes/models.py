"""`GET /v1/models`: the model itself first, then its virtual ids."""

from __future__ import annotations

from fastapi import APIRouter

from model_core.errors import ModelNotFoundError
from service.protocol.models import ModelCard, ModelList
from service.routes.parts import Parts
from service.translate import model_cards

router = APIRouter()


@router.get("/v1/models", operation_id="list_models")
async def list_models(parts: Parts) -> ModelList:
    return ModelList(data=model_cards(parts.client.info))


# `:path`, since ids of the hub hold slashes.
@router.get("/v1/models/{model_id:path}", operation_id="get_model")
async def get_model(model_id: str, parts: Parts) -> ModelCard:
    cards = model_cards(parts.client.info)
    for card in cards:
        if card.id == model_id:
            return card
    raise ModelNotFoundError(
        "there is no such model", value=model_id, allowed=", ".join(card.id for card in cards), param="model"
    )
