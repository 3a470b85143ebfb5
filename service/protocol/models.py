"""`GET /v1/models`: OpenAI's model object, with what this model is under `fusion`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelFusion(BaseModel):
    """`arm`: what a virtual id takes away; "fused" for the model itself."""

    arm: str
    strategy: str
    trained: bool
    encoders: list[str]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dual-vision-encoder"
    max_model_len: int
    num_parameters: int
    fusion: ModelFusion


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
