"""The demo's build, small: the trainer runs its recipe from nothing, resumes it to the bit, ships a whole folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from model_core.cli import demo as command
from model_core.cli.train import load_for_training
from model_core.demo.artwork import Artwork
from model_core.demo.batches import SceneSource
from model_core.demo.build import demo_recipe, has_begun, last_ends, scaled
from model_core.demo.scenes import HELD_OUT_FIRST_SEED
from model_core.demo.tokenizer import build_tokenizer
from model_core.encoder import DualVisionEncoder
from model_core.errors import CheckpointMismatchError, ConfigError
from model_core.processing.batch import InputFormat
from model_core.training.config import TrainConfig
from model_core.training.data.packs import PackedBatch
from model_core.training.data.source import build_source
from model_core.training.events import Event
from model_core.training.freeze import trained_components
from model_core.training.hooks import RunHooks
from model_core.training.trainer import DualVisionTrainer
from tests.model_core.demo.conftest import SMALL, small_recipe


def trainer_of(config: TrainConfig, *listeners: Any, write: bool = True) -> DualVisionTrainer:
    loaded = load_for_training(config)
    source = build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))
    hooks = RunHooks(listeners=listeners)
    return DualVisionTrainer(loaded.model, source, None, config, processor=loaded.processor, hooks=hooks, write=write)


def source_of(config: TrainConfig) -> SceneSource:
    loaded = load_for_training(config)
    return build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))


def answering_pack(tmp_path: Path, number: int, batch_size: int = 4) -> PackedBatch:
    config = small_recipe(tmp_path, f"batch_size={batch_size}")
    stage = next(s for s in config.stages() if s.loss_weights.get("language", 1.0))
    return source_of(config).pack(stage, number)


def two_stages(work: Path) -> TrainConfig:
    config = small_recipe(work)
    curriculum = config.curriculum_training
    chosen = tuple(curriculum.stages[i].model_copy(update={"steps": 2}) for i in (0, 2))
    return config.model_copy(update={"curriculum_training": curriculum.model_copy(update={"stages": chosen})})


class Stop:
    """Asks its trainer to stop at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.trainer = at, None

    def __call__(self, event: Event) -> None:
        if event.kind == "step" and event.global_step == self.at:
            self.trainer.request_stop()


def test_an_interrupted_build_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Weights, read-outs and both optimizers' state; stopped within a stage and at its border. Of the stages the first,
    without language, and the one that answers."""
    names = ("model.safetensors", "auxiliary.safetensors", "optimizer.safetensors")
    trainer_of(two_stages(tmp_path / "whole")).train()
    last = tmp_path / "whole" / "checkpoint_latest"
    config = two_stages(tmp_path / "parts")
    for steps in (1, 2):
        stop = Stop(steps)
        stop.trainer = one = trainer_of(config, stop)
        if has_begun(tmp_path / "parts"):
            one.resume(tmp_path / "parts")
        assert not one.train().is_finished
    final = trainer_of(config)
    final.resume(tmp_path / "parts")
    final.train()
    for name in names:
        one, other = load_file(last / name), load_file(tmp_path / "parts" / "checkpoint_latest" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert any(key.endswith("momentum_buffer") for key in load_file(last / names[2])), "Muon took part"
    assert not list((tmp_path / "parts" / "final").glob("auxiliary*")), "read-outs are never published"


def test_a_build_killed_before_its_step_was_linked_goes_on(tmp_path: Path) -> None:
    """Fault: it was begun anew, and that was refused, for there was a step."""
    config = two_stages(tmp_path)
    assert not has_begun(tmp_path)
    stop = Stop(1)
    stop.trainer = one = trainer_of(config, stop)
    one.train()
    (tmp_path / "checkpoint_latest").unlink()
    assert has_begun(tmp_path)
    again = trainer_of(config)
    again.resume(tmp_path)
    assert again.position.global_step == 1


def test_each_stage_trains_what_it_names(tmp_path: Path) -> None:
    """By the hashes that the trainer itself takes: what moved in the first step of each stage."""
    config, moved = small_recipe(tmp_path), {}

    def listen(event: Event) -> None:
        if event.kind == "verified":
            rows = event.data["rows"]
            moved.setdefault(event.stage, set()).update(row["component"] for row in rows if row["is_changed"])

    trainer_of(config, listen, write=False).train()
    for stage in config.stages():
        assert moved[stage.index] == trained_components(stage.freeze), stage.description


def test_a_pack_is_a_function_of_its_number(tmp_path: Path) -> None:
    one, again, other = (answering_pack(tmp_path, number) for number in (1, 1, 0))
    assert (one.pixels == again.pixels).all()
    assert torch.equal(one.input_ids, again.input_ids)
    assert one.pixels.tobytes() != other.pixels.tobytes()
    labels = one.labels[one.labels != -100]
    assert 0 < labels.numel() < one.labels.numel() / 2, "answers carry labels, prompts and pictures don't"
    assert len(one.targets["class"]) == 4 * 16, "a target for each image token"


def test_packs_made_by_turns_are_those_made_by_the_trainer_itself(tmp_path: Path) -> None:
    config = small_recipe(tmp_path)
    alone, two = source_of(config), source_of(config.model_copy(update={"num_workers": 2}))
    for stage in (config.stages()[0], config.stages()[-1]):
        steps = [source.steps(stage, 1, first=246) for source in (alone, two)]
        for (one,), (other,) in zip(*steps, strict=True):
            assert one.samples == other.samples
            assert (one.pixels == other.pixels).all()
            assert torch.equal(one.input_ids, other.input_ids)
            assert all(torch.equal(one.targets[name], other.targets[name]) for name in one.targets)
    assert two._by_turns is not None and alone._by_turns is None


def test_a_tenth_of_the_questions_and_no_answer_is_in_capitals(tmp_path: Path) -> None:
    """A word in capitals is spelt letter by letter: asked so, the model was wrong two times in five."""
    pack = answering_pack(tmp_path, 0, batch_size=256)
    tokenizer = build_tokenizer()
    questions, answers = [], []
    columns = (pack.input_ids, pack.labels, pack.blocks)
    for ids, labels, blocks in zip(*(x.split(list(pack.sample_lengths)) for x in columns), strict=True):
        for number in range(1, int(blocks.max()) + 1):
            own, is_answer = blocks == number, labels != -100
            questions.append(tokenizer.decode(ids[own & ~is_answer], skip_special_tokens=True).split("assistant")[0])
            answers.append(tokenizer.decode(ids[own & is_answer], skip_special_tokens=True))
    assert len(questions) > 300 and not any(answer.isupper() for answer in answers)
    share = sum(question.strip().isupper() for question in questions) / len(questions)
    assert 0.08 < share < 0.18, "that many and the few that are typed so anyhow"


def test_pages_are_refused_where_questions_are_asked(tmp_path: Path) -> None:
    """There is nothing to ask about them; crowds have their questions."""
    config = small_recipe(tmp_path)
    source, answering = source_of(config), config.stages()[-1]
    with pytest.raises(ConfigError, match=r"mixes in pages.*Leave page out"):
        source.prepare_stage(replace(answering, dataset_weights={"page": 0.5, "word": 0.5}))
    source.prepare_stage(replace(answering, dataset_weights={"page": 0.5}, loss_weights={"language": 0.0}))
    crowds = replace(answering, dataset_weights={"crowd": 1.0})
    source.prepare_stage(crowds)
    assert source.pack(crowds, 0).num_label_tokens > 0


def test_questions_behind_one_picture_do_not_see_each_other(tmp_path: Path) -> None:
    """Trained on conversations, the model copied answers from earlier turns and, asked alone, guessed."""
    pack = answering_pack(tmp_path, 0, batch_size=8)
    rows = zip(pack.blocks.split(list(pack.sample_lengths)), pack.position_ids.split(list(pack.sample_lengths), dim=1),
               strict=True)  # fmt: skip
    several = [(blocks, positions) for blocks, positions in rows if int(blocks.max()) >= 2]
    assert several
    for blocks, positions in several:
        starts = {int(positions[0, int((blocks == n).nonzero()[0])]) for n in range(1, int(blocks.max()) + 1)}
        assert len(starts) == 1, "each question stands where it would stand alone"


def test_the_command_builds_a_folder_that_answers_and_tells_its_scores(
    tmp_path: Path, artwork: Artwork, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nothing to a checkpoint, as `dve demo build --scale 0.002` does it."""
    out, work = tmp_path / "demo", tmp_path / "work"
    sets = [part for setting in SMALL for part in ("--set", setting)]
    call = ["build", "--work", str(work), "--out", str(out), "--scale", "0.002", "--device", "cpu", "--eval-count", "1"]
    assert command.main([*call, *sets]) == 0
    said = capsys.readouterr().out
    assert "cells " in said
    assert "loss 0.0000" not in said, "stages that ask nothing have no such loss"
    assert "set aside" not in said, "no data set was read"
    encoder = DualVisionEncoder.from_pretrained(out)
    assert encoder.info.dtype == "float32"
    assert int(encoder.model.fusion.means.count) > 0
    card = (out / "README.md").read_text()
    assert "It knows nothing else" in card
    assert "NOT met" in card, "a few steps can't have reached the targets"
    assert "| name" in card
    assert "of 7 questions about such with 196 to 280 pixels a side" in card
    assert "fused, scaled pictures" in json.loads((out / "scores.json").read_text())
    stored = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert stored < 2.3 * encoder.info.num_parameters, "two bytes a weight"
    ends = last_ends(small_recipe(work), work)
    assert [end.name for end in ends] == ["step-20", "step-21", "final"]
    assert "of 7 held-out questions that are not those of the scores below" in card
    *before, last, written = (load_file(folder / "model.safetensors") for folder in (*ends, out))
    is_mean = "The weights are the mean of the ends of the last 3 stages" in card
    assert is_mean != ("The weights are the last stage's end" in card)
    for name in ("model.language_model.norm.weight", "model.visual.merger.mlp.0.weight"):
        expected = sum((end[name] for end in before), last[name]) / 3 if is_mean else last[name]
        torch.testing.assert_close(written[name].float(), expected, rtol=2**-8, atol=1e-6)
    assert not torch.equal(last["model.language_model.norm.weight"], before[0]["model.language_model.norm.weight"])
    monkeypatch.setattr("model_core.demo.publish.write_card", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command.main([*call, *sets])
    assert (out / "README.md").read_text() == card, "stopped while it scores, a build has written nothing"
    assert "step" not in capsys.readouterr().out, "a finished build has nothing left to train"
    for other in (["--recipe", "long"], ["--set", "seed=5"]):
        assert command.main([*call, *sets, *other]) == 2
        assert "is done, and was another" in capsys.readouterr().err, (
            "its card would tell of a recipe that it is not of"
        )
    assert (out / "README.md").read_text() == card
    monkeypatch.setattr("model_core.demo.artwork.load_artwork", lambda _: artwork)
    assert command.main(["eval", "--model", str(out), "--count", "1", "--arms", "fused,blind", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["fused"] == json.loads((out / "scores.json").read_text())["fused"], "the card's own, asked again"
    assert scores.keys() == {"fused", "blind"}
    assert command.main(["eval", "--model", str(out), "--count", "1", "--arms", "fused"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["question", "fused"]
    assert [line.split()[0] for line in table[1:]].count("count") == 1
    with pytest.raises(SystemExit):
        command.main([*call[:-1], "0", *sets])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_build_goes_on_only_under_its_own_recipe(tmp_path: Path) -> None:
    config = small_recipe(tmp_path, "max_steps=1")
    trainer_of(config).train()
    with pytest.raises(CheckpointMismatchError, match="recipe"):
        trainer_of(small_recipe(tmp_path, "max_steps=1", "seed=5")).resume(tmp_path)


@pytest.mark.parametrize(
    ("units", "precision"),
    [
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, "auto"),
        ({"avx2": True}, "auto"),
    ],
)
def test_products_are_in_bfloat16_where_a_processor_is_fast_at_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, units: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert demo_recipe(tmp_path).precision == precision
    assert demo_recipe(tmp_path, overrides=["precision=float32"]).precision == "float32", "as it was asked for"


def test_scaling_shortens_every_stage_and_ends_where_it_says(tmp_path: Path) -> None:
    def steps(recipe: str) -> list[int | None]:
        return [stage.steps for stage in demo_recipe(tmp_path, recipe, scale=0.01).stages()]

    assert steps("short") == [47, 33, 20, 3, 3]
    assert steps("long") == [30, 24, 2, 8, 6, 10, 12, 8, 10, 4, 4, 3]
    with pytest.raises(ConfigError, match="can't be scaled"):
        scaled({}, 0.0)


def test_the_gate_learns_slower_than_what_it_weighs(tmp_path: Path) -> None:
    """At the others' learning rate it closed on the second encoder before that had learnt anything."""
    for stage in small_recipe(tmp_path).stages():
        assert stage.learning_rates["gate"] < 0.1 * stage.learning_rates["projections"]


def test_a_stage_longer_than_its_seeds_is_refused_before_it_draws_those_of_the_scores(tmp_path: Path) -> None:
    """The last step that is allowed, of the last seed, still lies below the held-out ones."""
    config = small_recipe(tmp_path, "seed=2047")
    source, last = source_of(config), config.stages()[-1]
    most = 2**26 // 256
    source.prepare_stage(replace(last, index=7, steps=most))
    pack = source.pack(replace(last, index=7), most - 1)
    assert HELD_OUT_FIRST_SEED - 256 <= max(sample.index for sample in pack.samples) < HELD_OUT_FIRST_SEED
    with pytest.raises(ConfigError, match=f"more steps than there are scenes.*{most + 1} steps.*{most} steps"):
        source.prepare_stage(replace(last, steps=most + 1))


def test_a_stage_that_mixes_unknown_kinds_is_refused(tmp_path: Path) -> None:
    source = source_of(small_recipe(tmp_path))
    stage = small_recipe(tmp_path).stages()[0]
    with pytest.raises(ConfigError, match="kinds of scenes"):
        source.prepare_stage(replace(stage, dataset_weights={"pages": 1.0}))
