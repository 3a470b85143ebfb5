"""Under every strategy, for images and for videos, the engine gives `generate`'s tokens and transformers' likelihoods.

The positions on the other side are transformers' own, and the fusion is trained, so that a token at a wrong place or a
wrong position shows in the numbers even where it changes no word.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from itertools import groupby
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from model_core.encoder import DualVisionEncoder
from model_core.fusion import STRATEGIES
from model_core.model import DualVisionModel
from model_core.types import ARMS, ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, VideoPart
from tests.model_core import tiny
from tests.model_core.engine.test_engine import agrees, as_arm, generated, model_inputs, run

TOLERANCE = 1e-5


def noise(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


MEDIA = {
    "image": ImagePart(noise(1)),
    # Three steps in time, 2.67 positions apart, which are cut to 0, 2 and 5.
    "video": VideoPart(tuple(noise(seed, 60, 90) for seed in range(5)), fps=1.5),
}


def asked(*media: ImagePart | VideoPart, **more: object) -> GenerationRequest:
    parts = [part for medium in media for part in (TextPart("see "), medium)]
    sampling = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=0)
    return GenerationRequest("r", (ChatMessage("user", (*parts, TextPart("what?"))),), sampling, **more)


def their_positions(model: DualVisionModel) -> AbstractContextManager[object]:
    """While this is open, positions are transformers' own; all tokens of a cell have the one that it gives the cell."""
    per_cell, own = model.fusion.tokens_per_cell, ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

    def get_rope_index(input_ids: Tensor, mm_token_type_ids: Tensor, **media: Tensor) -> tuple[Tensor, Tensor]:
        (types,) = mm_token_type_ids.tolist()
        firsts: list[int] = []  # places of text and of the first token of each cell
        cell_of: list[int] = []  # of every token, among those
        for kind, run_of_kind in groupby(enumerate(types), key=lambda pair: pair[1]):
            for number, (place, _) in enumerate(run_of_kind):
                if kind == 0 or number % per_cell == 0:
                    firsts.append(place)
                cell_of.append(len(firsts) - 1)
        found, _ = Qwen2_5_VLModel.get_rope_index(
            model.model, input_ids[:, firsts], mm_token_type_ids[:, firsts], **{name: media.get(name) for name in own}
        )
        positions = found[:, :, cell_of]
        return positions, positions.amax(dim=(0, 2))[:, None] + 1 - len(types)

    return mock.patch.object(model.model, "get_rope_index", get_rope_index)


@torch.no_grad()
def likelihoods(model: torch.nn.Module, inputs: dict[str, Tensor], answer: tuple[int, ...]) -> Tensor:
    """log p of the answer's tokens behind the prompt, by one forward of transformers'."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, len(answer), dtype=torch.long)], dim=1)
    logits = model(**inputs | {"input_ids": ids, "mm_token_type_ids": types}).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def distance(got: object, expected: Tensor) -> float:
    return float((torch.tensor(got) - expected).abs().max())


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize("fusion", STRATEGIES)
def test_tokens_and_likelihoods_are_transformers(fusion: str, kind: str) -> None:
    encoder, request = tiny.encoder(tiny.trained_model(fusion)), asked(MEDIA[kind])
    event = run(encoder, [request])["r"]
    with their_positions(encoder.model):
        expected, margins = generated(encoder, request)
        likely = likelihoods(encoder.model, model_inputs(encoder, request), event.token_ids)
    assert agrees(list(event.token_ids), expected, margins)
    assert distance([one.logprob for one in event.logprobs], likely) < TOLERANCE


def plain_positions(input_ids: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return torch.arange(input_ids.shape[1]).expand(3, 1, -1), torch.zeros(1, 1, dtype=torch.long)


def turned_about(encoder: DualVisionEncoder) -> AbstractContextManager[object]:
    """Fused tokens spliced in the wrong order."""
    backbone, names = encoder.model.model, ("get_image_features", "get_video_features")

    def turned(name: str) -> object:
        original = getattr(backbone, name)

        def features(*args: Tensor, **more: object) -> object:
            output = original(*args, **more)
            output.pooler_output = [tokens.flip(0) for tokens in output.pooler_output]
            return output

        return features

    return mock.patch.multiple(backbone, **{name: turned(name) for name in names})


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize("fusion", STRATEGIES)
def test_a_wrong_position_or_a_wrong_splice_would_show(fusion: str, kind: str) -> None:
    """What the comparison above rests on."""
    encoder, request = tiny.encoder(tiny.trained_model(fusion)), asked(MEDIA[kind])
    model, inputs, answer = encoder.model, model_inputs(encoder, request), (40, 50, 60, 70)
    right = likelihoods(model, inputs, answer)
    with mock.patch.object(model.model, "get_rope_index", plain_positions):
        assert distance(likelihoods(model, inputs, answer).tolist(), right) > 100 * TOLERANCE
    with turned_about(encoder):
        assert distance(likelihoods(model, inputs, answer).tolist(), right) > 100 * TOLERANCE
    if kind == "video":
        slower = inputs | {"second_per_grid_ts": inputs["second_per_grid_ts"] * 2}
        assert distance(likelihoods(model, slower, answer).tolist(), right) > 100 * TOLERANCE


@pytest.mark.parametrize("fusion", STRATEGIES)
def test_a_score_is_the_models_own_log_likelihood_under_every_arm(fusion: str) -> None:
    """Once their order alone was looked at, which a wrong shift of them keeps."""
    encoder, media = tiny.encoder(tiny.trained_model(fusion)), tuple(MEDIA.values())
    answer = run(encoder, [asked(*media)])["r"].token_ids
    found = {}
    for arm in ARMS:
        request = asked(*media, arm=arm, score_token_ids=answer)
        found[arm] = run(encoder, [request])["r"].score_logprobs
        with as_arm(encoder.model, arm), their_positions(encoder.model):
            expected = likelihoods(encoder.model, model_inputs(encoder, asked(*media)), answer)
        assert distance(found[arm], expected) < TOLERANCE, arm
    for number, arm in enumerate(ARMS):
        for other in ARMS[:number]:
            assert distance(found[arm], torch.tensor(found[other])) > 10 * TOLERANCE, f"{arm} passes for {other}"


def test_what_compare_encoders_tells_are_these_log_likelihoods() -> None:
    encoder, request = tiny.encoder(), asked(MEDIA["image"])
    compared = encoder.compare_encoders(request.messages, max_tokens=6)
    answer = compared.arms["fused"].answer.token_ids
    for arm in ARMS:
        with as_arm(encoder.model, arm):
            expected = likelihoods(encoder.model, model_inputs(encoder, request), answer)
        assert distance(compared.arms[arm].token_log_likelihoods, expected) < TOLERANCE, arm
