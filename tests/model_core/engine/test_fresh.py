"""What a fresh model serves on a CPU is transformers' Qwen on the same weights, to 1e-5 of its largest logit.

Through everything that stands for the modules there: the lean tower, the compiled loops, the joined layers that long
prompts go through. The model's own forward is Qwen's to the bit (tests/model_core/test_identity.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from model_core.checkpoint import Loaded, LoadOptions, load_checkpoint
from model_core.config import DualVisionConfig
from model_core.demo_model import demo_folder
from model_core.encoder import DualVisionEncoder
from model_core.encoders import lean_qwen
from model_core.language.compiled import CompiledLayers
from model_core.language.decoder import Decoder
from model_core.model import DualVisionModel
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, VideoPart
from tests.model_core import tiny
from tests.model_core.engine.test_engine import model_inputs, run

TOLERANCE = 1e-5  # of the largest logit
NUM_TOKENS = 12

Pair = tuple[DualVisionEncoder, Qwen2_5_VLForConditionalGeneration]


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


PROMPTS = {
    "text": (TextPart("hello, who is there?"),),
    "long text": (TextPart("hello, who is there? " * 60),),
    "one image": (ImagePart(noise(1, 90, 60)), TextPart("what is this?")),
    "two images of different shapes": (
        ImagePart(noise(1, 40, 110)), TextPart("and "), ImagePart(noise(2, 100, 70)), TextPart("what are these?"),
    ),
    "video": (VideoPart(tuple(noise(seed, 60, 90) for seed in range(5)), fps=1.5), TextPart("what happens?")),
}  # fmt: skip


def tiny_pair() -> Pair:
    return tiny.encoder(tiny.dual_model()), tiny.qwen_model()


def demo_pair() -> Pair:
    """Weights that were trained: the demo model's, less its fusion, which is born anew."""
    loaded = load_checkpoint(demo_folder(), LoadOptions("cpu", torch.float32))
    config, weights = loaded.model.config, loaded.model.state_dict()
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("model.fusion.")}
    own = {*DualVisionConfig.__dataclass_fields__} - {*Qwen2_5_VLConfig.__dataclass_fields__}
    own |= {"model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"}
    told = {name: value for name, value in config.to_dict().items() if name not in own}
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**told)).eval()
    assert theirs.load_state_dict(kept, strict=False).missing_keys == []
    fresh = DualVisionModel(config).eval()
    missing = fresh.load_state_dict(kept, strict=False).missing_keys
    assert {name.split(".")[1] for name in missing} == {"fusion"}
    return DualVisionEncoder.from_loaded(Loaded(fresh, loaded.processor), "fresh"), theirs


@pytest.fixture(scope="module", params=[tiny_pair, demo_pair], ids=["tiny", "demo"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What stood for the modules."""
    seen: set[str] = set()

    def watch(owner: object, name: str, way: str) -> None:
        original = getattr(owner, name)

        def told(*args: object, **more: object) -> object:
            seen.add(way)
            return original(*args, **more)

        monkeypatch.setattr(owner, name, told)

    watch(lean_qwen, "forward", "lean tower")
    watch(CompiledLayers, "forward", "loops")
    watch(Decoder, "forward", "joined layers")
    return seen


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[DualVisionEncoder, GenerationRequest], object]:
    """The logits (steps, V) that an engine chose a request's tokens from, and those tokens."""

    def serve(encoder: DualVisionEncoder, request: GenerationRequest) -> tuple[torch.Tensor, tuple[int, ...]]:
        runner, steps = encoder.engine.runner, []
        original = runner.logits
        monkeypatch.setattr(runner, "logits", lambda *args: steps.append(original(*args)) or steps[-1])
        encoder.engine.reset_caches()
        tokens = run(encoder, [request])["r"].token_ids
        return torch.cat(steps).float(), tokens

    return serve


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_fresh_models_served_logits_are_qwens(
    prompt: str, pair: Pair, ways: set[str], served: Callable[..., tuple[torch.Tensor, tuple[int, ...]]]
) -> None:
    encoder, qwen = pair
    special = encoder.processor.special
    # Nobody may choose a placeholder: the reference reads the answer as a part of the prompt.
    never = {special.image: -100.0, special.video: -100.0}
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logit_bias=never)
    request = GenerationRequest("r", (ChatMessage("user", PROMPTS[prompt]),), sampling)
    logits, answer = served(encoder, request)
    inputs = model_inputs(encoder, request)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, NUM_TOKENS, dtype=torch.long)], dim=1)
    with torch.no_grad():
        expected = qwen(**inputs | {"input_ids": ids, "mm_token_type_ids": types}).logits[0, -NUM_TOKENS - 1 : -1]
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max() / expected.abs().max()) <= TOLERANCE
    assert ways >= {"loops"}
    assert ("lean tower" in ways) == ("text" not in prompt)
    assert ("joined layers" in ways) == (prompt == "long text")
