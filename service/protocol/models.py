"""`/v1/models`: OpenAI's model object, with what this model is under `fusion` and how it stands in this server."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelFusion(BaseModel):
    """`arm`: what a virtual id takes away; "fused" for the model itself."""

    arm: str
    strategy: str
    trained: bool
    encoders: list[str]


class ModelProblem(BaseModel):
    """Why the promoted version is not served."""

    code: str
    message: str


class ModelCard(BaseModel):
    """A model, or with an arm in its id one of its virtual ids."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dual-vision-encoder"
    max_model_len: int
    num_parameters: int
    fusion: ModelFusion
    #: The base that a fine-tuned model was made from.
    parent: str | None = None
    #: ready: published, and loaded at its first use.
    status: Literal["ready", "loading", "loaded", "failed"] = "loaded"
    #: Of the weights that answer now; null where none are in memory.
    system_fingerprint: str | None = None
    error: ModelProblem | None = None


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
