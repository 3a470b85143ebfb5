"""The two extra losses of the demo's build say what they claim to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_core.demo.alignment import WordAlignment, attend_by_likeness
from model_core.demo.artwork import Artwork
from model_core.demo.batches import SceneBatches
from model_core.demo.build import DemoBuilder
from model_core.demo.lookup import HEAD, LAYER, TALLY_HEAD
from model_core.demo.questions import plural_of
from model_core.demo.recipe import Recipe
from model_core.demo.scenes import CLASS_NAMES
from tests.model_core.demo.test_build import TINY


@pytest.fixture
def builder(tmp_path: Path, artwork: Artwork) -> DemoBuilder:
    return DemoBuilder(TINY, artwork, tmp_path)


def answering_stage(recipe: Recipe) -> int:
    return next(i for i, stage in enumerate(recipe.stages) if stage.answer_weight)


def test_the_look_up_losses_are_of_the_heads_own_attention(builder: DemoBuilder, artwork: Artwork) -> None:
    """Against the attention weights that transformers itself reports."""
    backbone = builder.model.model.eval()
    more = replace(TINY, stages=tuple(replace(stage, batch_size=8) for stage in TINY.stages))
    data = SceneBatches(more, answering_stage(more), artwork, builder.tokenizer, backbone.mrope_layout)
    batch = data[0]
    embeds = backbone.get_input_embeddings()(batch.input_ids)
    is_image = batch.input_ids == backbone.config.image_token_id
    seen = batch.may_attend(torch.device("cpu"))
    backbone.language_model.set_attn_implementation("eager")
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    with builder.lookup.watching(), torch.no_grad():
        weights = backbone.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            attention_mask={"full_attention": mask},
            output_attentions=True,
            use_cache=False,
        ).attentions[LAYER]
        look, tally = builder.lookup.loss(batch.input_ids, is_image, batch.cells, seen)
    losses, tallies, num_absent, num_middles = [], [], 0, set()
    means = builder.lookup.means
    for row, ids in enumerate(builder.lookup.nouns(batch.input_ids).tolist()):
        shown = (batch.cells[what][row].flatten().tolist() for what in ("class", "middles"))
        cells = dict(zip(is_image[row].nonzero().flatten().tolist(), zip(*shown, strict=True), strict=True))
        for place, noun in enumerate(ids):
            if not noun or place in cells:
                continue
            hit = [at for at, (c, _) in cells.items() if means[noun, c] and bool(seen[row, 0, place, at])]
            num_absent += not hit
            losses.append(-float(weights[row, HEAD, place, hit or [0]].sum().log()))
            even = [0, *(at for at in hit if cells[at][1] == 2)]
            num_middles.add(len(even) - 1)
            tallies.append(-float((weights[row, TALLY_HEAD, place, even] * len(even)).log().mean()))
    assert float(look) == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert float(tally) == pytest.approx(sum(tallies) / len(tallies), abs=1e-4)
    assert {0, 1, 2} <= num_middles, "nouns of none, one and several things"
    assert 0 < num_absent < len(losses), "some nouns are shown and some are not"


def test_every_noun_is_known_by_a_token_of_its_own(builder: DemoBuilder) -> None:
    """Half of all plurals end in a token "s" of their own, and it stood for the last of them: "how many horses?" was
    taught to count shapes. A hot dog was a dog's tokens too."""
    tokenizer, owner = builder.tokenizer, {}
    for number, name in enumerate([*CLASS_NAMES[1:], "shape"], start=1):
        for form in (name, plural_of(name)):
            ids = torch.tensor([tokenizer.encode(f"how many {form}?", add_special_tokens=False)])
            found = builder.lookup.nouns(ids)
            assert found[found > 0].tolist() == [number], form
            token = int(ids[found > 0])
            assert owner.setdefault(token, number) == number, f"{form}: {tokenizer.decode([token])!r}"


@pytest.mark.parametrize("text", ["what is at the top?", "tell me the colour of this.", "can you read this?"])
def test_other_words_are_no_nouns(builder: DemoBuilder, text: str) -> None:
    ids = torch.tensor([builder.tokenizer.encode(text, add_special_tokens=False)])
    assert int(builder.lookup.nouns(ids).sum()) == 0


def test_tokens_that_are_their_words_have_little_alignment_loss_and_others_much(builder: DemoBuilder) -> None:
    alignment = WordAlignment(builder.tokenizer, torch.device("cpu"))
    words = torch.randn(len(builder.tokenizer), 256, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([[1, 0, 5, len(CLASS_NAMES) - 1]])
    none = torch.zeros(1, 4, dtype=torch.long)
    cells = {"class": classes, "colour": none, "counts": torch.zeros(1, 4, 2, dtype=torch.long)}
    (one_ids, one_share), (many_ids, many_share) = alignment.tables["class"]
    for ids in (one_ids, many_ids):
        assert len(ids) == len(CLASS_NAMES) - 1
    named = (words[one_ids] * one_share[..., None]).sum(1) + (words[many_ids] * many_share[..., None]).sum(1)
    right = torch.zeros(4, 256)
    for cell in (0, 2, 3):
        right[cell] = named[classes[0, cell] - 1]
    wrong = right.roll(1, 0)
    assert float(alignment.loss(right, cells, words)) < 0.1
    assert float(alignment.loss(wrong, cells, words)) > 3.0
    assert float(alignment.loss(right, cells | {"class": none}, words)) == 0.0, "nothing is named"


def test_like_attends_to_like_at_birth(builder: DemoBuilder) -> None:
    language_model = builder.model.model.language_model
    attend_by_likeness(language_model)
    attention = language_model.layers[0].self_attn
    group = language_model.config.num_attention_heads // language_model.config.num_key_value_heads
    keys, queries = (p.weight.view(-1, 64, 128) for p in (attention.k_proj, attention.q_proj))
    assert torch.equal(keys, queries[::group])
