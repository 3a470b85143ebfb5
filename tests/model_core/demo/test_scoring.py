from __future__ import annotations

import pytest
from PIL import Image

from model_core.demo.artwork import Artwork
from model_core.demo.questions import QUESTION_KINDS, Turn, balanced_probe
from model_core.demo.scenes import HELD_OUT_FIRST_SEED
from model_core.demo.scoring import NEW_WORDS, Scores, evaluate, held_out_seeds, render_table, wilson
from model_core.errors import ConfigError

SMALL = ((112, 112),)


def test_wilson_against_published_values() -> None:
    """Newcombe (1998), table I: 81 of 263, and 0 of 20 at 95 %."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_an_oracle_scores_everything_and_a_mute_nothing(artwork: Artwork) -> None:
    seeds = held_out_seeds(6)
    answers = {}
    for kind in QUESTION_KINDS:
        for seed in seeds:
            scene, turn = balanced_probe(kind, seed, artwork, SMALL[0])
            answers[scene.image.tobytes(), turn.question] = turn.answer

    def oracle(batch: list[tuple[Image.Image, str]]) -> list[str]:
        assert 1 <= len(batch) <= 5
        return [answers[image.tobytes(), question] for image, question in batch]

    scores = evaluate(oracle, artwork, seeds, sizes=SMALL, batch_size=5)
    assert [scores.by_kind[kind].share for kind in QUESTION_KINDS] == [1.0] * 7
    assert (scores.total.successes, scores.total.count) == (42, 42)
    mute = evaluate(lambda batch: [""] * len(batch), artwork, seeds, sizes=SMALL)
    assert mute.total.successes == 0 and mute.total.count == 42


def test_a_blind_guesser_stays_at_chance(artwork: Artwork) -> None:
    scores = evaluate(
        lambda batch: ["yes"] * len(batch), artwork, held_out_seeds(100), kinds=("presence",), sizes=SMALL
    )
    low, high = scores.by_kind["presence"].interval()
    assert low < 0.5 < high


def test_new_words_have_a_row_that_does_not_count_twice(artwork: Artwork) -> None:
    seen: list[tuple[Turn, str, bool]] = []
    scores = evaluate(
        lambda batch: ["zzz"] * len(batch),
        artwork,
        held_out_seeds(20),
        kinds=("read",),
        sizes=SMALL,
        on_outcome=lambda *outcome: seen.append(outcome),
    )
    assert 0 < scores.by_kind[NEW_WORDS].count < 20 == scores.total.count
    assert len(seen) == 20 and not any(is_right for _, _, is_right in seen)


def test_training_seeds_are_refused(artwork: Artwork) -> None:
    with pytest.raises(ConfigError, match="may have been trained on"):
        evaluate(lambda batch: [], artwork, [HELD_OUT_FIRST_SEED, HELD_OUT_FIRST_SEED - 1])
    assert min(held_out_seeds(3, offset=4)) == HELD_OUT_FIRST_SEED + 4


def test_too_few_answers_are_refused(artwork: Artwork) -> None:
    with pytest.raises(ConfigError, match="number of answers"):
        evaluate(lambda batch: batch[1:], artwork, held_out_seeds(2), kinds=("name",), sizes=SMALL)  # type: ignore[arg-type,return-value]


def test_tables_name_arms_chance_and_intervals() -> None:
    fused, blind = Scores(), Scores()
    for i in range(10):
        fused.add("presence", is_right=i < 9)
        blind.add("presence", is_right=i < 5)
    plain = render_table({"fused": fused, "blind": blind})
    assert plain.splitlines()[0].split() == ["question", "fused", "blind", "chance", "asked"]
    assert "90.0 % [59.6, 98.2]" in plain and "50.0 %" in plain
    marked = render_table({"fused": fused, "blind": blind}, markdown=True).splitlines()
    assert marked[1].count("-|") == 5 and marked[2].startswith("| presence | 90.0 %") and len(marked) == 4
    assert fused.to_dict()["all"]["right"] == 9
