"""Greedy tokens are `generate`'s for prompts of 1 to 600 tokens, under every arm, however the engine works.

A model whose template adds nothing takes prompts of any length; larger pictures fill the long ones. Each request has
its arm, and all arms are in one engine at once.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model_core.checkpoint import Loaded
from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.language import compiled, fused
from model_core.language.compiled import CompiledLayers
from model_core.language.decoder import Decoder
from model_core.linear import can_use_onednn
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor
from model_core.types import ARMS, Arm, ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart, TokenEvent
from tests.model_core import tiny
from tests.model_core.engine.test_batching import cache_of
from tests.model_core.engine.test_engine import agrees, generated, run

BARE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
#: Both sides of a block's end and of what the loops take as one prompt, and everything between the two ends.
LENGTHS = (1, 2, 15, 16, 17, 33, 70, 120, 170, 220, 255, 256, 257, 258, 300, 350, 420, 500, 599, 600)
FAMILY = random.Random("family").choices("abcdefgh ?", k=600)
FAMILY_PICTURE = Image.frombytes("RGB", (112, 112), random.Random("family").randbytes(112 * 112 * 3))
SETTINGS = {
    "loops and torch": EngineConfig(max_num_seqs=4),
    "chunks": EngineConfig(max_num_seqs=4, max_num_batched_tokens=48),
    "no caches at all": EngineConfig(enable_prefix_caching=False, encoder_cache_bytes=0),
    "preemption": EngineConfig(
        max_num_seqs=6, max_context_tokens=672, kv_cache_bytes=cache_of(672), max_num_batched_tokens=256
    ),
    "torch alone": EngineConfig(max_num_seqs=4, compiles_decode=False),
    "module by module": EngineConfig(max_num_seqs=4, joins_weights=False),
}


@functools.cache
def roomy_processor() -> DualVisionProcessor:
    tokenizer = copy.deepcopy(tiny.byte_tokenizer())
    tokenizer.chat_template = BARE
    return DualVisionProcessor(Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=336 * 336), tokenizer)


@functools.cache
def one_model() -> DualVisionModel:
    return tiny.trained_model()


def roomy(config: EngineConfig | None = None, model: DualVisionModel | None = None) -> DualVisionEncoder:
    """An engine of its own; unless told otherwise over the one model that all share."""
    return DualVisionEncoder.from_loaded(Loaded(model or one_model(), roomy_processor()), "tiny", config)


def noise(rng: random.Random) -> Image.Image:
    size = (rng.randint(30, 340), rng.randint(30, 340))
    return Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))


def asked(encoder: DualVisionEncoder, number: int, length: int, most_tokens: int, arm: Arm) -> GenerationRequest:
    """A prompt of exactly `length` tokens: as many of up to three pictures as fit, the rest is text around them.

    Half of them begin with the same picture, or without one, and the same text, so that there are prefixes to be found.
    """
    rng = random.Random(number)
    is_of_family = rng.random() < 0.5
    sampling = SamplingParams(max_tokens=rng.randint(1, most_tokens), ignore_eos=True)
    pictures = [ImagePart(noise(rng)) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    if is_of_family and pictures:
        pictures[0] = ImagePart(FAMILY_PICTURE)

    def ask(*parts: object) -> GenerationRequest:
        return GenerationRequest(f"r{number}", (ChatMessage("user", parts),), sampling, arm)

    def count(*parts: object) -> int:
        return len(encoder.engine.prepare(ask(*parts)).inputs.input_ids) if parts else 0

    while count(*pictures) > length:
        pictures.pop()
    missing = length - count(*pictures)
    cut = rng.randint(0, missing)
    begin = FAMILY[:cut] if is_of_family else rng.choices("abcdefgh ?", k=cut)
    texts = [TextPart("".join(begin)), TextPart("".join(rng.choices("abcdefgh ?", k=missing - cut)))]
    middle = [*pictures[is_of_family:], texts[1]]
    rng.shuffle(middle)
    first = [*pictures[:is_of_family], texts[0]]
    parts = [*first, *middle] if is_of_family else [*middle, *first]
    request = ask(*(part for part in parts if part != TextPart("")))
    assert len(encoder.engine.prepare(request).inputs.input_ids) == length
    return request


def count_pictures(request: GenerationRequest) -> int:
    return sum(isinstance(part, ImagePart) for part in request.messages[0].parts)


def begins_alike(request: GenerationRequest) -> bool:
    return request.messages[0].parts[0] == ImagePart(FAMILY_PICTURE)


Case = tuple[GenerationRequest, list[int], list[float]]


def cases(lengths: tuple[int, ...], most_tokens: int, seed: int) -> list[Case]:
    """Requests of these lengths with arms in turn, and what `generate` gives for each."""
    encoder = roomy()
    found = []
    for n, length in enumerate(lengths):
        request = asked(encoder, seed * 1000 + n, length, most_tokens, ("fused", *ARMS)[n % (len(ARMS) + 1)])
        found.append((request, *generated(encoder, request)))
    return found


def check(encoder: DualVisionEncoder, expected: list[Case], seed: int) -> None:
    """All of them through one engine, in random order and arrival. Ties after which anything goes must be rare."""
    rng = random.Random(seed)
    requests = [request for request, _, _ in expected]
    rng.shuffle(requests)
    together = run(encoder, requests, rng.choice([1, 3, 99]))
    compared = 0
    for request, tokens, margins in expected:
        event = together[request.request_id]
        assert event.error is None, event.error
        assert agrees(list(event.token_ids), tokens, margins), (request.request_id, request.arm)
        compared += sum(a == b for a, b in zip(event.token_ids, tokens, strict=True))
    assert compared >= 0.97 * sum(len(tokens) for _, tokens, _ in expected), "too little was compared"
    assert encoder.engine.blocks.num_free == encoder.engine.blocks.num_blocks


@pytest.fixture(scope="module")
def twenty() -> list[Case]:
    found = cases(LENGTHS, 12, 1)
    assert {r.arm for r, _, _ in found if count_pictures(r)} == set(ARMS), "an arm without a picture proves nothing"
    assert {count_pictures(r) for r, _, _ in found} == {0, 1, 2, 3}
    assert len({r.arm for r, _, _ in found if begins_alike(r)}) > 2, "one picture's prefix under several arms"
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[bool]]]:
    """Of each way through the decoder, whether steps went through it with more than one token, or with one alone."""
    seen: dict[str, set[bool]] = {"loops": set(), "torch": set()}
    loops, decode = CompiledLayers.forward, Decoder.forward

    def by_loops(self: CompiledLayers, hidden: torch.Tensor, *args: object) -> torch.Tensor:
        seen["loops"].add(len(hidden) > 1)
        return loops(self, hidden, *args)

    def by_torch(self: Decoder, hidden: torch.Tensor, *args: object) -> torch.Tensor:
        seen["torch"].add(len(hidden) > 1)
        return decode(self, hidden, *args)

    monkeypatch.setattr(CompiledLayers, "forward", by_loops)
    monkeypatch.setattr(Decoder, "forward", by_torch)
    return seen


@pytest.mark.parametrize("name", ["loops and torch", "chunks", "preemption", "torch alone"])
def test_prompts_of_any_length_under_any_arm(name: str, twenty: list[Case], passes: dict[str, set[bool]]) -> None:
    encoder = roomy(SETTINGS[name])
    check(encoder, twenty, 1)
    stats = encoder.engine.stats()
    assert (stats.num_preemptions > 0) == (name == "preemption")
    assert stats.prefix_cache_hits > 0
    if name == "torch alone":
        assert passes == {"loops": set(), "torch": {True, False}}
    else:
        assert max(LENGTHS) > compiled.MAX_PROMPT
        assert passes["loops"] == {True, False}
        assert passes["torch"] == {True}, "long prompts, and those alone"


def test_an_arm_changes_the_answer(twenty: list[Case]) -> None:
    """What the comparison above rests on: no arm's tokens pass for another's."""
    encoder = roomy()
    request = next(r for r, tokens, _ in twenty if count_pictures(r) and len(tokens) >= 8)
    answers = {arm: tuple(generated(encoder, replace(request, arm=arm))[0]) for arm in ARMS}
    assert len(set(answers.values())) == len(ARMS)


@pytest.mark.parametrize("product", ["onednn", "torch"])
def test_a_bfloat16_model_answers_as_its_float32_twin(
    product: str, twenty: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding apart: the twin has the same rounded weights and computes in float32. Another arm is further away."""
    if product == "torch":
        monkeypatch.setattr(fused, "can_use_onednn", lambda weight: False)
    elif not can_use_onednn(torch.zeros(8, 8, dtype=torch.bfloat16)):
        pytest.skip("this processor has no units for bfloat16, and oneDNN refuses its products")
    half = roomy(model=tiny.trained_model().to(torch.bfloat16))
    twin = roomy(model=tiny.trained_model())
    twin.model.load_state_dict({name: tensor.float() for name, tensor in half.model.state_dict().items()})
    pictured = [(r, tokens) for r, tokens, _ in twenty if count_pictures(r)][:6]
    scored = [replace(r, score_token_ids=tuple(tokens)) for r, tokens in pictured]
    got, expected = run(half, scored), run(twin, scored)
    other = run(twin, [replace(r, arm="blind" if r.arm == "fused" else "fused") for r in scored])
    assert distance(got, expected) < 0.05 < distance(other, expected)
    answers = run(half, [request for request, _ in pictured])
    assert {e.finish_reason for e in answers.values()} == {"length"}


def distance(one: dict[str, TokenEvent], two: dict[str, TokenEvent]) -> float:
    """Between the log-probabilities of the same tokens, on average."""
    pairs = [(one[name].score_logprobs, two[name].score_logprobs) for name in one]
    apart = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)]
    return sum(apart) / len(apart)


@pytest.mark.heavy
@pytest.mark.parametrize("name", SETTINGS)
def test_two_hundred_prompts_of_any_length_under_any_arm(name: str, two_hundred: list[list[Case]]) -> None:
    hits = 0
    for seed, expected in enumerate(two_hundred):
        encoder = roomy(SETTINGS[name])
        check(encoder, expected, seed)
        hits += encoder.engine.stats().prefix_cache_hits
    assert (hits > 0) == (name != "no caches at all")


@pytest.fixture(scope="module")
def two_hundred() -> list[list[Case]]:
    """Ten times twenty; lengths by chance, the short ones as likely as the long ones, and those that are edges."""
    rng, found = random.Random(200), []
    for seed in range(2, 12):
        drawn = [min(600, int(600 ** rng.random())) for _ in range(8)] + [rng.randint(1, 600) for _ in range(8)]
        edges = rng.sample(LENGTHS, 4)
        found.append(cases((*drawn, *edges), 48, seed))
    return found
