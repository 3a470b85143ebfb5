"""A base and a variant of it through one fleet, arms mixed: each answers with its own model's greedy tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.language.compiled import KERNELS
from model_core.types import ARMS, GenerationRequest, TokenEvent
from model_core.variant import publish_variant
from service.fleet import Fleet, Member
from tests.model_core.engine.test_engine import agrees, fold, generated, random_request
from tests.model_core.variants import Move, everywhere, in_fusion, save_base, train

#: What a variant shares with its base: encoders, language model and decoder; or nothing.
MOVES = {"fusion": in_fusion, "everything": everywhere}
SIZES = EngineConfig(max_num_seqs=4, max_num_batched_tokens=96)


@pytest.fixture(autouse=True)
def loops() -> None:
    """As a server's engine after its first seconds."""
    assert KERNELS.wait() is not None, KERNELS.refusal


def build(folder: Path, moves: Move) -> tuple[DualVisionEncoder, DualVisionEncoder, DualVisionEncoder]:
    """A base, a published variant beside it, and the model that was published, read as a whole."""
    loaded = save_base(folder / "base")
    run = train(loaded, folder / "run", moves=moves)
    _, version = publish_variant(loaded, run, folder / "models", base_name="base", created_unix=1)
    base = DualVisionEncoder.from_loaded(loaded, "base", SIZES)
    return base, base.beside(version, "variant", SIZES), DualVisionEncoder.from_pretrained(run)


def asked(seed: int) -> Iterator[tuple[str, GenerationRequest]]:
    """The same eight questions to both, each under an arm; for the two in another order."""
    for model in ("base", "variant"):
        for number in range(8):
            arm = ("fused", *ARMS)[(number + seed) % (len(ARMS) + 1)]
            request = random_request(100 * seed + number, max_tokens=6)
            yield model, replace(request, request_id=f"{model} {number} {arm}", arm=arm)


@pytest.mark.parametrize("moved", MOVES)
def test_base_and_variant_mixed_each_equal_their_own_generate(moved: str, tmp_path: Path) -> None:
    base, variant, whole = build(tmp_path, MOVES[moved])
    fleet = Fleet(base.engine)
    members = {"base": fleet.base, "variant": Member(variant.engine)}
    expected = {}
    for model, request in asked(1):
        expected[request.request_id] = (model, request, *generated(whole if model == "variant" else base, request))
    waiting = list(expected.values())
    random.Random(1).shuffle(waiting)
    merged = {request_id: TokenEvent(request_id) for request_id in expected}
    together = 0
    while waiting or fleet.has_work():
        for model, request, *_ in waiting[:5]:
            fleet.add_request(members[model].prepare(request))
        del waiting[:5]
        together += all(member.engine.has_work() for member in members.values())
        for event in fleet.step():
            merged[event.request_id] = fold(merged[event.request_id], event)
    assert together > 10, "both had work in most steps"
    for name, (_, _, tokens, margins) in expected.items():
        assert merged[name].error is None, merged[name].error
        assert agrees(list(merged[name].token_ids), tokens, margins), name
    differing = sum(expected[f"base {end}"][2] != expected[f"variant {end}"][2] for end in endings(expected))
    assert differing >= 3, "the two models must be told apart by their answers"
    assert (variant.engine.runner.decoder is base.engine.runner.decoder) == (moved == "fusion")


def endings(names: dict[str, object]) -> list[str]:
    return [name.removeprefix("base ") for name in names if name.startswith("base ")]
