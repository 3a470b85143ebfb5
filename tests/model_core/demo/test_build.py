"""The demo's build, small: it trains every stage, stops and resumes to the same weights, and ships a whole folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_core.demo.artwork import Artwork
from model_core.demo.batches import SceneBatches
from model_core.demo.build import DemoBuilder, component_of, is_trained, schedule
from model_core.demo.publish import publish
from model_core.demo.recipe import RECIPE, Recipe
from model_core.encoder import DualVisionEncoder
from model_core.errors import ConfigError

TINY = replace(
    RECIPE,
    stages=tuple(replace(stage, steps=2, batch_size=2) for stage in RECIPE.stages),
    sizes=((112, 112),),
    hidden=128,
    llm_layers=1,
    vision_hidden=64,
    vision_layers=2,
    dinov2_layers=1,
)


def quiet(*_: object) -> None:
    """No report."""


class InterruptedBuildError(Exception):
    pass


def build(work: Path, artwork: Artwork, *, stop_after: int | None = None, recipe: Recipe = TINY) -> DemoBuilder:
    builder, steps = DemoBuilder(recipe, artwork, work), 0

    def report(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            builder.save()
            raise InterruptedBuildError

    if stop_after is None:
        assert builder.run(report)
    else:
        with pytest.raises(InterruptedBuildError):
            builder.run(report)
    return builder


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_an_interrupted_build_ends_in_the_same_weights(tmp_path: Path, artwork: Artwork, stop_after: int) -> None:
    whole = build(tmp_path / "whole", artwork).model.state_dict()
    build(tmp_path / "parts", artwork, stop_after=stop_after)
    resumed = build(tmp_path / "parts", artwork).model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_each_stage_trains_what_it_names(tmp_path: Path, artwork: Artwork) -> None:
    for stage in TINY.stages:
        builder = DemoBuilder(replace(TINY, stages=(stage,)), artwork, tmp_path / stage.name)
        before = {name: p.detach().clone() for name, p in builder.model.named_parameters()}
        builder.run(quiet)
        changed = [f"model.{n}" for n, p in builder.model.named_parameters() if not torch.equal(p, before[n])]
        assert {component_of(name) for name in changed} == {"encoders" if t == "qwen" else t for t in stage.trains}
        assert all(is_trained(name, stage) for name in changed), stage.name


def test_fusion_owns_the_projector_that_is_called_dinov2() -> None:
    """It was counted to the encoders and stayed zero while they were frozen: the second eye was never wired in."""
    assert component_of("model.model.fusion.projectors.dinov2.weight") == "fusion"
    assert component_of("model.model.fusion.norms.dinov2.bias") == "fusion"
    assert component_of("model.model.dinov2.encoder.layer.0.norm1.weight") == "encoders"
    assert component_of("model.model.visual.merger.ln_q.weight") == "encoders"
    assert component_of("model.model.language_model.norm.weight") == "llm"


def test_the_gate_learns_slower_than_what_it_weighs(tmp_path: Path, artwork: Artwork) -> None:
    """At the others' learning rate it closed on the second encoder before that had learnt anything."""
    join = next(stage for stage in TINY.stages if "fusion" in stage.trains)
    builder = DemoBuilder(replace(TINY, stages=(join,)), artwork, tmp_path)
    builder.run(quiet)
    optimizers = builder._begin(join)
    optimizers.step(1.0)
    rates = {id(p): group["lr"] for part in optimizers.parts for group in part.param_groups for p in group["params"]}
    gate = {rates[id(p)] for p in builder.model.fusion.gate.parameters()}
    others = {rates[id(p)] for p in builder.model.fusion.projectors.parameters()}
    assert max(gate) < 0.1 * min(others)


def test_a_batch_is_a_function_of_its_number(tmp_path: Path, artwork: Artwork) -> None:
    builder = DemoBuilder(TINY, artwork, tmp_path)
    join = next(i for i, stage in enumerate(TINY.stages) if stage.answer_weight)
    data = SceneBatches(TINY, join, artwork, builder.tokenizer, builder.model.model.mrope_layout)
    one, again, other = data[1], data[1], data[0]
    assert torch.equal(one.images, again.images)
    assert torch.equal(one.input_ids, again.input_ids)
    assert not torch.equal(one.images, other.images)
    labels = one.labels[one.labels != -100]
    assert 0 < labels.numel() < one.labels.numel() / 2, "answers carry labels, prompts and pictures don't"
    image = builder.model.config.image_token_id
    assert (one.input_ids == image).sum(1).tolist() == [16, 16]


def test_questions_behind_one_picture_do_not_see_each_other(tmp_path: Path, artwork: Artwork) -> None:
    """Trained on conversations, the model copied answers from earlier turns and, asked alone, guessed."""
    builder = DemoBuilder(TINY, artwork, tmp_path)
    join = next(i for i, stage in enumerate(TINY.stages) if stage.answer_weight)
    data = SceneBatches(TINY, join, artwork, builder.tokenizer, builder.model.model.mrope_layout)
    batch = next(b for b in (data[i] for i in range(50)) if int(b.blocks.max()) >= 2)
    row = int((batch.blocks == 2).any(1).nonzero()[0])
    sees, blocks = batch.may_attend(torch.device("cpu"))[row, 0], batch.blocks[row]
    first, second = (int((blocks == n).nonzero()[-1]) for n in (1, 2))
    assert set(blocks[sees[second]].tolist()) == {0, 2}
    assert set(blocks[sees[first]].tolist()) == {0, 1}
    starts = [batch.position_ids[0, row, int((blocks == n).nonzero()[0])] for n in (1, 2)]
    assert starts[0] == starts[1], "each question stands where it would stand alone"


def test_published_folder_answers_and_tells_its_scores(tmp_path: Path, artwork: Artwork) -> None:
    builder = build(tmp_path / "work", artwork)
    out = tmp_path / "demo"
    publish(builder, out, artwork, eval_count=1)
    encoder = DualVisionEncoder.from_pretrained(out)
    assert encoder.info.dtype == "float32"
    assert int(encoder.model.fusion.means.count) > 0
    card = (out / "README.md").read_text()
    assert "It knows nothing else" in card
    assert "NOT met" in card, "two steps can't have reached the targets"
    assert "| name" in card
    stored = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert stored < 2.3 * encoder.info.num_parameters, "two bytes a weight"


def test_schedule_warms_up_and_falls() -> None:
    values = [schedule(step, 100) for step in range(100)]
    assert values[0] < values[3] < max(values) == pytest.approx(1.0, abs=0.01)
    assert values[99] == pytest.approx(0.05, abs=0.01)
    assert values[5:] == sorted(values[5:], reverse=True)


def test_a_build_goes_on_only_under_its_own_recipe(tmp_path: Path, artwork: Artwork) -> None:
    build(tmp_path, artwork, stop_after=1)
    other = replace(TINY, seed=TINY.seed + 1)
    with pytest.raises(ConfigError, match="another recipe"):
        DemoBuilder(other, artwork, tmp_path).run(quiet)


def test_one_saved_state_is_kept(tmp_path: Path, artwork: Artwork) -> None:
    builder = build(tmp_path, artwork)
    assert len(list(tmp_path.glob("state-*"))) == 1
    assert builder.seconds > 0
    again = DemoBuilder(TINY, artwork, tmp_path)
    assert again.run(quiet), "a finished build has nothing left to train"
    assert again.seconds == builder.seconds
