"""The extra losses of the demo's build say what they claim to say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model_core.cli.train import load_for_training
from model_core.demo.alignment import WordAlignment, attend_by_likeness
from model_core.demo.batches import SceneSource
from model_core.demo.guidance import DemoGuidance, asked, miscounted
from model_core.demo.lookup import HEAD, LAYER, TALLY_HEAD
from model_core.demo.questions import plural_of
from model_core.demo.scenes import CLASS_NAMES
from model_core.processing.batch import InputFormat
from model_core.training.data.source import build_source
from model_core.training.forward import PackForward
from tests.model_core.demo.conftest import small_recipe


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_for_training(small_recipe(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def guidance(loaded: Any) -> DemoGuidance:
    torch.manual_seed(0)
    return DemoGuidance(loaded.model, loaded.processor)


def test_the_look_up_losses_are_of_the_heads_own_attention(loaded: Any, guidance: DemoGuidance, tmp_path: Path) -> None:
    """Against the attention weights that transformers itself reports, row by row."""
    config = small_recipe(tmp_path, "batch_size=8")
    source: SceneSource = build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))
    pack = source.pack(next(s for s in config.stages() if s.loss_weights.get("language", 1.0)), 0)
    forward = PackForward(loaded.model, loaded.processor.patch_spec, precision="float32")
    forward.watch_layers(guidance.watched_layers)
    backbone, means = loaded.model.model.eval(), guidance._lookup.means
    backbone.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        view = forward(pack).view
        losses = guidance(view)
        rows = asked(pack, loaded.model.config.image_token_id)
        looks, tallies, num_absent, counts, at = [], [], 0, set(), 0
        for row, length in enumerate(pack.sample_lengths):
            span = slice(at, at + length)
            ids, at = pack.input_ids[span], at + length
            is_image = ids == loaded.model.config.image_token_id
            image = view.fused.tokens[16 * row : 16 * (row + 1)]
            embeds = backbone.get_input_embeddings()(ids[None]).masked_scatter(is_image[None, :, None], image)
            seen = rows.may_attend[row, :length, :length]
            weights = backbone.language_model(
                inputs_embeds=embeds, position_ids=pack.position_ids[:, None, span], output_attentions=True,
                attention_mask={"full_attention": torch.zeros(1, 1, length, length).masked_fill(~seen, -torch.inf)},
                use_cache=False,
            ).attentions[LAYER][0]  # fmt: skip
            cells = is_image.nonzero().flatten().tolist()
            classes = pack.targets["class"][16 * row : 16 * (row + 1)].tolist()
            kinds, shares = (pack.targets[name][16 * row : 16 * (row + 1)].tolist() for name in ("painted", "shares"))
            for place, noun in enumerate(guidance._lookup.nouns(ids[None])[0].tolist()):
                if not noun:
                    continue
                hit = [i for i in range(16) if means[noun, classes[i]] and bool(seen[place, cells[i]])]
                num_absent += not hit
                looks.append(-float(weights[HEAD, place, [cells[i] for i in hit] or [0]].sum().log()))
                touched = [i for i in range(16) if means[noun, kinds[i]] and bool(seen[place, cells[i]])]
                wanted = {0: 1.0} | {cells[i]: shares[i] for i in touched if shares[i]}
                total = sum(wanted.values())
                counts.add(round(total) - 1)
                assert total == pytest.approx(round(total), abs=1e-4), "shares sum to how many there are"
                said = weights[TALLY_HEAD, place]
                tallies.append(sum(w / total * (torch.tensor(w / total) / said[i]).log() for i, w in wanted.items()))
    backbone.language_model.set_attn_implementation("sdpa")
    assert float(losses["look"]) == pytest.approx(sum(looks) / len(looks), abs=1e-4)
    assert float(losses["tally"]) == pytest.approx(float(sum(tallies)) / len(tallies), abs=1e-4)
    assert {0, 1, 2} <= counts, "nouns of none, one and several things"
    assert 0 < num_absent < len(looks), "some nouns are shown and some are not"


def test_the_next_letter_is_looked_for_where_it_stands(loaded: Any, guidance: DemoGuidance, tmp_path: Path) -> None:
    """A look that is all on the right cells costs nothing, one on the next letter's much."""
    config = small_recipe(tmp_path, "batch_size=4")
    source: SceneSource = build_source(config, InputFormat.of(loaded.processor, loaded.model.model.mrope_layout))
    stage = next(s for s in config.stages() if s.loss_weights.get("language", 1.0))
    pack = source.pack(dataclasses.replace(stage, dataset_weights={"word": 1.0}), 0)
    teacher = guidance._spelling
    words = list(teacher.words(pack))
    texts = [loaded.processor.tokenizer.decode(pack.labels[at + begin : at + end]) for at, _, _, begin, end in words]
    assert words and all(text.isalpha() and 3 <= len(text) <= 5 for text in texts)
    right, wrong = (torch.zeros(len(pack.input_ids), 2, 8) for _ in range(2))
    keys = torch.zeros(len(pack.input_ids), 1, 8)
    is_image = pack.input_ids == loaded.model.config.image_token_id
    keys[is_image, 0] = 80.0 * torch.nn.functional.one_hot(pack.targets["spots"], 8).amax(1).float()
    for at, _, _, begin, end in words:
        for number, place in enumerate(range(at + begin - 1, at + end - 1), start=1):
            right[place, 0, number], wrong[place, 0, number % 5 + 1] = 1.0, 1.0
    assert float(teacher.loss(pack, right, keys)) < 1e-3
    assert float(teacher.loss(pack, wrong, keys)) > 3.0


def test_shares_that_sum_to_the_wrong_number_cost(loaded: Any, guidance: DemoGuidance) -> None:
    """Two pictures: two dogs over three cells with a cat, and three cats. The share of a dog's cell moves the dogs'
    sum alone, and that of a cell without an object none."""
    cells = {
        "painted": torch.tensor([1, 1, 1, 2, 0, 2, 2, 2, 0, 0]),
        "shares": torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    }
    right = cells["shares"].clone()
    assert float(miscounted(right, cells, 2)) == 0.0
    for cell, cost in ((0, 3), (3, 1), (5, 3), (4, 0)):
        wrong = right.clone().requires_grad_()
        loss = miscounted(wrong + 0.25 * torch.nn.functional.one_hot(torch.tensor(cell), 10), cells, 2)
        assert float(loss.detach()) == pytest.approx(cost / 7 * 0.25**2, abs=1e-6), "half the square over beta 0.5"
        if cost:
            (gradient,) = torch.autograd.grad(loss, wrong)
            same = (cells["painted"] == cells["painted"][cell]) & (torch.arange(10) // 5 == cell // 5)
            assert torch.equal(gradient != 0, same)


def test_every_noun_is_known_by_a_token_of_its_own(loaded: Any, guidance: DemoGuidance) -> None:
    """Half of all plurals end in a token "s" of their own, and it stood for the last of them: "how many horses?" was
    taught to count shapes. A hot dog was a dog's tokens too."""
    tokenizer, owner = loaded.processor.tokenizer, {}
    for number, name in enumerate([*CLASS_NAMES[1:], "shape"], start=1):
        for form in (name, plural_of(name)):
            ids = torch.tensor([tokenizer.encode(f"how many {form}?", add_special_tokens=False)])
            found = guidance._lookup.nouns(ids)
            assert found[found > 0].tolist() == [number], form
            token = int(ids[found > 0])
            assert owner.setdefault(token, number) == number, f"{form}: {tokenizer.decode([token])!r}"


@pytest.mark.parametrize("text", ["what is at the top?", "tell me the colour of this.", "can you read this?"])
def test_other_words_are_no_nouns(loaded: Any, guidance: DemoGuidance, text: str) -> None:
    ids = torch.tensor([loaded.processor.tokenizer.encode(text, add_special_tokens=False)])
    assert int(guidance._lookup.nouns(ids).sum()) == 0


def test_tokens_that_are_their_words_have_little_alignment_loss_and_others_much(loaded: Any) -> None:
    tokenizer = loaded.processor.tokenizer
    alignment = WordAlignment(tokenizer, torch.device("cpu"))
    words = torch.randn(len(tokenizer), 256, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([1, 0, 5, len(CLASS_NAMES) - 1])
    none = torch.zeros(4, dtype=torch.long)
    cells = {"painted": classes, "colour": none, "counts": torch.zeros(4, 2, dtype=torch.long)}
    (one_ids, one_share), (many_ids, many_share) = alignment.tables["class"]
    for ids in (one_ids, many_ids):
        assert len(ids) == len(CLASS_NAMES) - 1
    named = (words[one_ids] * one_share[..., None]).sum(1) + (words[many_ids] * many_share[..., None]).sum(1)
    right = torch.zeros(4, 256)
    for cell in (0, 2, 3):
        right[cell] = named[classes[cell] - 1]
    wrong = right.roll(1, 0)
    assert float(alignment.loss(right, cells, words)) < 0.1
    assert float(alignment.loss(wrong, cells, words)) > 3.0
    assert float(alignment.loss(right, cells | {"painted": none}, words)) == 0.0, "nothing is named"


def test_like_attends_to_like_at_birth(loaded: Any) -> None:
    language_model = loaded.model.model.language_model
    attend_by_likeness(language_model)
    attention = language_model.layers[0].self_attn
    group = language_model.config.num_attention_heads // language_model.config.num_key_value_heads
    keys, queries = (p.weight.view(-1, 64, 128) for p in (attention.k_proj, attention.q_proj))
    assert torch.equal(keys, queries[::group])
