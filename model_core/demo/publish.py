"""From a finished build to the shipped folder: calibrate, store, score, and write the card.

Weights are stored in bfloat16 (half the download) and computed in float32; the scores on the card
are those of the stored weights, loaded back.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_core.checkpoint import LoadOptions, load_checkpoint, save_checkpoint
from model_core.demo.artwork import Artwork
from model_core.demo.batches import SceneSource
from model_core.demo.card import write_card
from model_core.demo.scoring import Scores, evaluate, held_out_seeds
from model_core.encoder import DualVisionEncoder
from model_core.processing.batch import normalise_pixels
from model_core.processing.images import PatchSpec
from model_core.processing.processor import DualVisionProcessor
from model_core.training.config import TrainConfig
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart

CALIBRATION_BATCHES = 16
#: Held-out questions by which the mean of ends is taken or left: a quarter of the card's number, far from their seeds.
_CHOOSING_SHARE, _CHOOSING_SEEDS = 4, 1_000_000
#: Square and not: those within a model's own resolution are not scaled. Of the others, all are.
EVAL_SIZES = ((140, 140), (112, 168), (168, 112), (112, 112), (140, 196), (196, 140), (168, 168))
SCALED_SIZES = ((224, 224), (196, 280), (280, 196))


def publish(
    ends: Sequence[Path],
    out: Path,
    config: TrainConfig,
    source: SceneSource,
    *,
    history: str,
    eval_count: int,
    device: str = "cpu",
) -> None:
    """Score what would be written, then write it with its card: a stop in between leaves `out` as it was.

    Args:
        ends: model folders that a run's last stages ended with, the newest last: it or the mean of all is taken,
            whichever answers more of other held-out questions.
        config: its recipe; source: its scenes.
        history: how the weights came about, for the card.
    """
    progress = {"seed": config.seed, "recipe": config.fingerprint()}
    with tempfile.TemporaryDirectory() as folder:
        tried = []
        for number, own in enumerate((ends[-1:], ends) if len(ends) > 1 else (ends,)):
            loaded = _prepared(own, source, config, device)
            _save(loaded.model, loaded.processor, Path(folder) / str(number), progress)
            written = DualVisionEncoder.from_pretrained(Path(folder) / str(number), device=device)
            tried.append((loaded, written))
        chosen = 0
        if len(tried) > 1:
            chosen, told = _choice([written for _, written in tried], source.artwork, eval_count, len(ends))
            history = f"{history} {told}"
        loaded, written = tried.pop(chosen)
        tried.clear()  # an engine holds up to a gigabyte of cache
        model = loaded.model
        arms = score_arms(written, source.artwork, eval_count)
        scaled = score_arms(written, source.artwork, eval_count, ("fused",), sizes=SCALED_SIZES)["fused"]
    scores = {arm: found.to_dict() for arm, found in (arms | {"fused, scaled pictures": scaled}).items()}
    parameters = sum(p.numel() for p in model.parameters())
    sides = [side for size in native_sizes(loaded.processor.patch_spec) for side in size]
    card = write_card(config, arms, scaled, sides=(min(sides), max(sides)), parameters=parameters, history=history)
    _save(model, loaded.processor, out, progress, card=card, scores=scores)


def _prepared(ends: Sequence[Path], source: SceneSource, config: TrainConfig, device: str) -> Any:
    """The mean of some ends, with the newest one's other files, as it will be stored."""
    loaded = load_checkpoint(ends[-1], LoadOptions(device, torch.float32))
    model = loaded.model.eval()
    for count, other in enumerate(ends[:-1], start=2):
        _take_in(model, load_checkpoint(other, LoadOptions(device, torch.float32)).model, 1 / count)
    model.calibrate(_calibration(source, config, model, loaded.processor))
    with torch.no_grad():  # what is stored is what is scored
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16().to(tensor.dtype))
    return loaded


def _choice(
    last_and_mean: Sequence[DualVisionEncoder], artwork: Artwork, eval_count: int, num_ends: int
) -> tuple[int, str]:
    """Which of the two, and why, for the card. Ends that are far apart have a mean that is worse than either."""
    count = max(1, eval_count // _CHOOSING_SHARE)
    last, mean = (
        score_arms(one, artwork, count, ("fused",), offset=_CHOOSING_SEEDS)["fused"].total for one in last_and_mean
    )
    is_mean = mean.successes >= last.successes
    names = (f"the mean of the ends of the last {num_ends} stages", "the last stage's end")
    taken, left = names if is_mean else names[::-1]
    of_taken, of_left = (mean, last) if is_mean else (last, mean)
    return int(is_mean), (
        f"The weights are {taken}: of {mean.count:,} held-out questions that are not those of the scores below they "
        f"answered {100 * of_taken.share:.1f} % right, {left} {100 * of_left.share:.1f} %."
    )


@torch.no_grad()
def _take_in(model: Any, other: Any, share: float) -> None:
    """Weights between the ends of several decays of the rate are better than any of them: stochastic weight averaging
    (Izmailov et al. 2018, 1803.05407, section 3)."""
    others = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.lerp_(others[name], share)


def _save(
    model: Any,
    processor: DualVisionProcessor,
    out: Path,
    progress: dict[str, Any],
    card: str | None = None,
    scores: Any = None,
) -> None:
    """Twice: once to score what a reader of the folder gets, then with the scores beside it."""
    stored = model.to(torch.bfloat16)

    def more(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for part in (config, *(config[key] for key in ("text_config", "vision_config", "dinov2_config"))):
            part["dtype"] = "float32"  # computed in float32 wherever it is loaded
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if scores is not None:
            (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
        if card is not None:
            (folder / "README.md").write_text(card)

    save_checkpoint(stored, processor, out, extra=progress, write_more=more)
    model.to(torch.float32)


def _calibration(
    source: SceneSource, config: TrainConfig, model: Any, processor: DualVisionProcessor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training scenes again: the arms' means are part of the model, not of its test."""
    stage = config.stages()[0]
    for number in range(min(CALIBRATION_BATCHES, stage.steps or CALIBRATION_BATCHES)):
        pack = source.pack(stage, number)
        yield normalise_pixels(pack.pixels, processor.patch_spec, model.lm_head.weight.device), torch.tensor(pack.grids)


def native_sizes(spec: PatchSpec) -> list[tuple[int, int]]:
    """Those of EVAL_SIZES, (height, width), that pictures may have without being scaled."""
    return [(h, w) for h, w in EVAL_SIZES if spec.min_pixels <= h * w <= spec.max_pixels]


def score_arms(
    encoder: DualVisionEncoder,
    artwork: Artwork,
    count: int,
    arms: Sequence[str] = ("fused", "qwen-only", "dinov2-only", "blind", "unfused"),
    sizes: Sequence[tuple[int, int]] | None = None,
    offset: int = 0,
) -> dict[str, Scores]:
    """The same held-out questions for every arm, through the engine that serves. sizes: `native_sizes` unless given."""
    sizes, seeds = sizes or native_sizes(encoder.processor.patch_spec), held_out_seeds(count, offset=offset)
    return {arm: evaluate(Answerer(encoder, arm), artwork, seeds, sizes=sizes) for arm in arms}


class Answerer:
    """[(picture, question)] -> [answer], greedy, one batch in the engine."""

    def __init__(self, encoder: DualVisionEncoder, arm: Any) -> None:
        self.encoder, self.arm = encoder, arm

    def __call__(self, batch: Sequence[tuple[Any, str]]) -> list[str]:
        requests = {
            i: GenerationRequest(
                f"eval-{i}",
                (ChatMessage("user", (ImagePart(picture), TextPart(question))),),
                SamplingParams(max_tokens=32),
                self.arm,
            )
            for i, (picture, question) in enumerate(batch)
        }
        events = self.encoder.run_requests(requests)
        return [events[i].text for i in range(len(batch))]
