"""A build that has to be done in time: steps are timed, and as many of the recipe's are taken as fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from model_core.cli import demo as command
from model_core.cli.train import load_for_training
from model_core.demo import pace as pace_module
from model_core.demo import publish
from model_core.demo.artwork import Artwork
from model_core.demo.build import RECIPES
from model_core.demo.pace import Pace, has_other_allocator, measure
from model_core.demo.scoring import Scores
from model_core.errors import ConfigError
from model_core.processing.batch import InputFormat
from model_core.training.config import TrainConfig
from model_core.training.data.source import build_source
from model_core.training.freeze import trained_components
from tests.model_core.demo.conftest import SMALL, small_recipe


def kinds(config: TrainConfig) -> list[frozenset[str]]:
    return list(dict.fromkeys(frozenset(trained_components(stage.freeze)) for stage in config.stages()))


def pace(config: TrainConfig, *seconds: float) -> Pace:
    return Pace(dict(zip(kinds(config), seconds, strict=True)))


def test_a_share_is_what_fits_beside_the_scores(tmp_path: Path) -> None:
    """47, 33 and 26 steps at 1, 2 and 4 seconds: 217, and 300 for the scores of 400 questions a kind."""
    config = small_recipe(tmp_path, scale=0.01)
    found = pace(config, 1.0, 2.0, 4.0)
    assert found.of_training(config) == 47 * 1 + 33 * 2 + (20 + 3 + 3) * 4
    assert found.of_scoring(400) == 300 and found.of_scoring(200) == 165
    assert found.share(config, 2000.0, 400) == 1.0, "never more than the recipe"
    whole = found.of_training(config) + 300
    assert found.share(config, whole / 0.95 + 1e-3, 400) == 1.0
    share = found.share(config, 450.0, 400)
    assert 0 < share < 1 and share == round(share, 4), "`--scale` with the number that is printed is the same build"
    assert 0.95 * 450 - 0.05 < share * found.of_training(config) + 300 <= 0.95 * 450
    with pytest.raises(ConfigError, match=r"too short.*5\.0 minutes.*5\.3.*--eval-count"):
        found.share(config, 300.0, 400)


def test_over_glibc_more_time_is_left(tmp_path: Path) -> None:
    """The language model's steps took 2.2 s there in the end instead of 1.3, which twelve of them do not foretell."""
    config = small_recipe(tmp_path, scale=0.01)
    seconds = pace(config, 1.0, 2.0, 4.0).seconds
    assert Pace(seconds, 0.7).share(config, 550.0, 400) < Pace(seconds, 0.95).share(config, 550.0, 400) == 1.0
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 0 0 /usr/lib/libc.so.6\n")
    assert not has_other_allocator(maps)
    maps.write_text("7f00-7f01 r-xp 0 0 /usr/lib/libjemalloc.so.2\n7f02-7f03 r-xp 0 0 /usr/lib/libc.so.6\n")
    assert has_other_allocator(maps)
    assert has_other_allocator(tmp_path / "none"), "no Linux"


def test_steps_are_timed_on_pictures_of_about_the_mean_size(tmp_path: Path) -> None:
    """Eight packs of any size are off by 4 % alike at every build."""
    config = small_recipe(tmp_path, "batch_source.options.sizes=[[112, 112], [140, 140], [168, 168], [224, 224]]")
    loaded = load_for_training(config)
    source = build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))
    stage = config.stages()[0]
    assert len({source.pack(stage, number).grids for number in range(8)}) > 1
    source.make_one_size()
    assert {source.pack(stage, number).grids for number in range(8)} == {((1, 12, 12),) * 2}


def test_each_kind_of_step_is_timed_and_nothing_is_written(tmp_path: Path) -> None:
    config = small_recipe(tmp_path / "work", "num_workers=2")
    loaded = load_for_training(config)
    source = build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))
    found = measure(config, loaded, source)
    assert list(found.seconds) == kinds(config) and len(found.seconds) == 3
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert source._by_turns is None, "the processes that made its packs are gone"
    assert not (tmp_path / "work").exists()


def test_a_build_goes_on_with_the_share_that_it_was_begun_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is timed once: at other speeds, or told of other minutes, the second call would be another recipe's."""
    work, sets = tmp_path / "work", [part for setting in SMALL for part in ("--set", setting)]
    call = ["build", "--work", str(work), "--device", "cpu", "--eval-count", "1", *sets]
    publish_ = Mock()
    monkeypatch.setattr(publish, "publish", publish_)
    monkeypatch.setattr(pace_module, "measure", lambda config, *_: pace(config, 100.0, 100.0, 100.0))
    assert command.main([*call, "--minutes", "30"]) == 0
    said = capsys.readouterr().out
    kept = json.loads((work / "pace.json").read_text())
    assert f"--scale {kept['scale']:g}" in said and "100.00 and 100.00 and 100.00 s here" in said
    assert kept["seconds_per_step"]["dinov2"] == 100.0
    _, out, config, _ = publish_.call_args.args
    assert out == work / "model", "the embedded weights stay unless --out names them"
    assert f"--scale {kept['scale']:g}`" in publish_.call_args.kwargs["history"]
    steps = [stage.steps for stage in config.stages()]
    assert steps == [stage.steps for stage in small_recipe(work, scale=kept["scale"]).stages()]
    monkeypatch.setattr(pace_module, "measure", Mock(side_effect=AssertionError("timed again")))
    assert command.main([*call, "--minutes", "2000"]) == 0
    assert "going on with " in capsys.readouterr().out
    assert [stage.steps for stage in publish_.call_args.args[2].stages()] == steps


def test_a_timed_build_is_the_one_that_its_scale_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed, trained, scored and written; what was trained to take the time leaves nothing in what is built."""
    recipe = json.loads(RECIPES["short"].read_text())
    stages = recipe["curriculum_training"]["stages"]
    recipe["curriculum_training"]["stages"] = [stage | {"steps": 2, "epochs": 1} for stage in stages[:3]]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setitem(RECIPES, "short", tmp_path / "recipe.json")
    sets = [part for setting in SMALL for part in ("--set", setting)]
    for name, length in (("timed", ["--minutes", "60"]), ("told", ["--scale", "1"])):
        call = ["build", "--work", str(tmp_path / name), "--device", "cpu", "--eval-count", "1", *length, *sets]
        assert command.main(call) == 0
    assert json.loads((tmp_path / "timed" / "pace.json").read_text())["scale"] == 1.0
    assert not (tmp_path / "told" / "pace.json").exists()
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("timed", "told"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--minutes", "0"], "'0' is not a number of minutes above 0, such as 90"),
        (["--minutes", "nan"], "'nan' is not a number of minutes"),
        (["--minutes", "soon"], "'soon' is not a number of minutes"),
        (["--minutes", "5", "--scale", "0.5"], "not allowed with argument"),
        (["--recipe", "quick"], "invalid choice: 'quick'"),
    ],
)
def test_a_duration_that_is_none_is_refused(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["build", *flags])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rights", "chosen", "told"),
    [
        ((5, 6), 1, "mean of the ends of the last 3 stages: of 10 .* 60.0 % right, the last stage's end 50.0 %"),
        ((6, 5), 0, "the last stage's end: of 10 .* 60.0 % right, the mean of the ends of the last 3 stages 50.0 %"),
        ((5, 5), 1, "are the mean"),
    ],
)  # fmt: skip
def test_the_mean_of_ends_is_taken_where_it_answers_no_less(
    rights: tuple[int, int], chosen: int, told: str, artwork: Artwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of seeds that are not the scores': a build's mean once answered two in a hundred less than its last end."""
    asked = []

    def score_arms(encoder: int, _: Artwork, count: int, arms: tuple[str, ...], *, offset: int) -> dict[str, Scores]:
        asked.append((count, offset))
        scores = Scores()
        for number in range(10):
            scores.add("name", is_right=number < encoder)
        return {arms[0]: scores}

    monkeypatch.setattr(publish, "score_arms", score_arms)
    index, why = publish._choice(rights, artwork, 400, 3)
    assert index == chosen
    assert re.search(told, why), why
    assert asked == [(100, 1_000_000)] * 2
