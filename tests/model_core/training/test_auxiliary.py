"""A loss of your own: it trains, resumes to the bit, is never published; stages weigh it, or do without language."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model_core.errors import CheckpointMismatchError, ConfigError
from model_core.training.auxiliary import AuxiliaryLoss, PackView
from model_core.training.config import TrainConfig, parse_config
from model_core.training.data.packs import PackedBatch
from model_core.training.data.source import build_source
from model_core.training.events import read_events
from model_core.training.forward import PackForward
from model_core.training.hooks import RunHooks
from model_core.training.step import label_counts, label_totals
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.test_forward import forward
from tests.model_core.training.toy import ToySource, pack_of, recipe


class Shade(AuxiliaryLoss):
    """Which of four shades is in a picture's first cell, read off each encoder; and how a watched head spreads."""

    names = ("shade", "spread")
    watched_layers = (1,)

    def __init__(self, model: Any, processor: Any, *, width: int = 4) -> None:
        super().__init__()
        assert processor.tokenizer is not None
        dims = {name: encoder.output_dim for name, encoder in model.model.encoders.items()}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in dims.items()})

    def forward(self, view: PackView) -> dict[str, Tensor]:
        target = torch.tensor([ref.index % 4 for ref in view.pack.samples])
        cells = torch.tensor([h * w // 4 for _, h, w in view.pack.grids])
        first = cells.cumsum(0) - cells
        logits = [self.heads[name](features[first]) for name, features in view.features.items()]
        found = {"shade": sum(nn.functional.cross_entropy(one, target) for one in logits)} if logits else {}
        if view.attention:
            query, key = view.attention[1]
            assert len(query) == len(key) == len(view.pack.input_ids)
            found["spread"] = query.square().mean()
        return found


class NoLoss:
    def __init__(self, *_: Any) -> None:
        pass


SHADE = {"name": f"{__name__}:Shade"}
ENCODERS = {"freeze_dinov2": False, "freeze_llm": True, "freeze_fusion_layers": True, "freeze_projections": True}
CURRICULUM = {
    "enabled": True,
    "stages": [
        {"freeze_config": ENCODERS, "epochs": 2, "steps": 3, "loss_weights": {"language": 0}},
        {"mode": "full", "epochs": 1, "steps": 2, "loss_weights": {"shade": 0.5, "spread": 0}},
    ],
}


def trainer(config: TrainConfig, **kwargs: Any) -> DualVisionTrainer:
    return DualVisionTrainer(
        tiny.dual_model(), ToySource(config, 8), None, config, processor=tiny.processor(), **kwargs
    )


def curriculum(folder: Path, **more: Any) -> TrainConfig:
    return recipe(
        curriculum_training=CURRICULUM, auxiliary_loss=SHADE, optimizer="muon", weight_decay=0.05,
        output_dir=str(folder), checkpoints={"every_steps": 1, "keep_last": 9}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auxiliary") / "run"
    assert trainer(curriculum(folder)).train().is_finished
    return folder


def test_its_own_parameters_train_and_are_never_published(whole: Path) -> None:
    first, last = (load_file(whole / f"step-{step}" / "auxiliary.safetensors") for step in (1, 5))
    assert first.keys() == {f"heads.{name}.{kind}" for name in ("qwen", "dinov2") for kind in ("weight", "bias")}
    assert all(not torch.equal(first[name], last[name]) for name in first)
    published = load_file(whole / "final" / "model.safetensors")
    assert not [name for name in published if "heads" in name]
    assert not (whole / "final" / "auxiliary.safetensors").exists()
    state = load_file(whole / "step-5" / "optimizer.safetensors")
    assert "auxiliary.heads.qwen.weight/exp_avg" in state
    assert any(name.endswith("momentum_buffer") for name in state)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_with_it_goes_on_to_the_bit(whole: Path, tmp_path: Path, step: int) -> None:
    other = trainer(curriculum(tmp_path / "again"))
    other.resume(whole / f"step-{step}")
    other.train()
    for name in ("model.safetensors", "auxiliary.safetensors", "optimizer.safetensors"):
        one, two = (load_file(folder / "step-5" / name) for folder in (whole, tmp_path / "again"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name


def test_a_stage_without_the_language_loss_runs_no_language_model(whole: Path) -> None:
    steps = {event.global_step: event.data for event in read_events(whole) if event.kind == "step"}
    assert [steps[n]["loss"] == 0 for n in range(1, 6)] == [True, True, True, False, False]
    assert [steps[n]["auxiliary_losses"].keys() for n in (1, 5)] == [{"shade"}, {"shade", "spread"}]
    verified = [event.data for event in read_events(whole) if event.kind == "verified" and event.stage == 0]
    moved = {row["component"] for row in verified[0]["rows"] if row["is_changed"]}
    assert moved == {"qwen_vision", "merger", "dinov2"}, "an encoder that nobody hears yet learns from this loss"


def test_it_teaches_what_it_asks_for() -> None:
    config = recipe(auxiliary_loss=SHADE, num_epochs=6)
    told: list[float] = []

    def listen(event: Any) -> None:
        if event.kind == "step":
            told.append(event.data["auxiliary_losses"]["shade"])

    trainer(config, write=False, hooks=RunHooks(listeners=(listen,))).train()
    assert sum(told[-4:]) < 0.7 * sum(told[:4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auxiliary_loss": {"name": f"{__name__}:NoLoss"}}, "no auxiliary loss"),
        ({"auxiliary_loss": {"name": f"{__name__}:Missing"}}, "can't be imported"),
        (
            {"curriculum_training": {"enabled": True, "stages": [{"epochs": 1, "loss_weights": {"shape": 1}}]}},
            "weighs a loss that there is not",
        ),
        (
            {"curriculum_training": {"enabled": True, "stages": [{"epochs": 1, "loss_weights": {"language": 0}}]}},
            "no loss at all",
        ),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(recipe(**settings), write=False)


def test_a_resume_with_another_one_is_refused(whole: Path, tmp_path: Path) -> None:
    other = trainer(curriculum(tmp_path / "other"))
    other.auxiliary.heads["qwen"] = nn.Linear(3, 4)
    with pytest.raises(CheckpointMismatchError, match="auxiliary loss"):
        other.resume(whole / "step-2")


def test_a_layer_that_is_not_there_can_t_be_watched() -> None:
    run = PackForward(tiny.dual_model(), tiny.processor().patch_spec, precision="float32")
    with pytest.raises(ConfigError, match="no such layer"):
        run.watch_layers([99])


def test_beginnings_of_ones_own_are_named_or_refused() -> None:
    with pytest.raises(ConfigError, match="not both"):
        parse_config({"new_model": {"name": "a:b"}, "model": "folder"})
    with pytest.raises(ConfigError, match="not both"):
        parse_config({"batch_source": {"name": "a:b"}, "train_data_path": "x.json"})
    config = parse_config({"batch_source": {"name": f"{__name__}:NoLoss"}})
    with pytest.raises(ConfigError, match="no batch source"):
        build_source(config, None)  # type: ignore[arg-type]


def _blocked(pack: PackedBatch, blocks: list[int]) -> PackedBatch:
    return dataclasses.replace(pack, blocks=torch.tensor(blocks))


def test_blocks_of_a_sample_do_not_see_each_other() -> None:
    """Two questions behind one picture: another first one changes nothing of the second's loss, to the bit."""
    run = forward(tiny.trained_model())
    pack = pack_of([4, 1])
    blocks = [0] * len(pack.input_ids)
    begin, end = pack.sample_lengths[0] - 7, pack.sample_lengths[0] - 3
    blocks[begin:end], blocks[end : end + 3] = [1] * 4, [2] * 3
    changed = pack.input_ids.clone()
    changed[begin:end] = changed[begin:end] + 1
    other = dataclasses.replace(pack, input_ids=changed)
    with torch.no_grad():
        apart = [run(_blocked(one, blocks)).losses for one in (pack, other)]
        together = [run(one).losses for one in (pack, other)]
        causal = run(_blocked(pack, [0] * len(blocks))).losses
    assert torch.equal(apart[0], apart[1])
    assert not torch.equal(together[0], together[1]), "without blocks it does"
    torch.testing.assert_close(causal, together[0], rtol=1e-5, atol=1e-6)


def test_label_weights_weigh_labels() -> None:
    run, pack = forward(tiny.trained_model()), pack_of([0, 1])
    weights = torch.full(pack.labels.shape, 0.25)
    with torch.no_grad():
        plain, weighed = run(pack).losses, run(dataclasses.replace(pack, label_weights=weights)).losses
        judged = run(dataclasses.replace(pack, label_weights=weights), arm="fused").losses
    torch.testing.assert_close(weighed, plain * 0.25)
    assert torch.equal(judged, plain), "an evaluation counts every label once"
    counts = label_counts(pack)
    assert label_totals(dataclasses.replace(pack, label_weights=weights)) == [0.25 * count for count in counts]
