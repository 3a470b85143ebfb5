from __future__ import annotations

import random
from collections import Counter

import pytest

from model_core.demo.artwork import Artwork
from model_core.demo.phrases import PHRASES, style_question
from model_core.demo.questions import CHANCE, QUESTION_KINDS, ask, balanced_probe, describe, grade, relation
from model_core.demo.scenes import HELD_OUT_FIRST_SEED, SceneObject, make_scene
from model_core.demo.things import THING_BY_NAME
from model_core.errors import ConfigError


def test_every_answer_is_true_of_its_scene(artwork: Artwork) -> None:
    """Recomputed from the list of objects alone, without the code that made the answer."""
    rng, seen = random.Random(3), Counter()
    for seed in range(120):
        scene = make_scene(seed, artwork, (112, 168))
        names = Counter(one.name for one in scene.objects)
        for turn in ask(scene, rng):
            seen[turn.kind] += 1
            asked = turn.question.lower()
            if turn.kind == "name":
                singular = {f"{THING_BY_NAME[n].article} {n}" if n in THING_BY_NAME else f"a {n}" for n in names}
                assert (
                    turn.answer in singular
                    or turn.answer.rstrip("es") in {n.rstrip("es") for n in names}
                    or any(n in THING_BY_NAME and THING_BY_NAME[n].plural == turn.answer for n in names)
                )
            elif turn.kind == "colour":
                assert any(one.colour == turn.answer for one in scene.objects)
            elif turn.kind == "count":
                assert 1 <= int(turn.answer) <= len(scene.objects)
            elif turn.kind == "presence" and turn.answer == "yes":
                assert any(n in asked or (n in THING_BY_NAME and THING_BY_NAME[n].plural in asked) for n in names)
            elif turn.kind == "read":
                assert turn.answer == scene.word
    assert set(seen) == set(QUESTION_KINDS), seen


def test_a_scene_yields_every_kind_that_fits_before_a_second_of_any(artwork: Artwork) -> None:
    scene = make_scene(1, artwork, kind="pair")
    for seed in range(20):
        kinds = Counter(turn.kind for turn in ask(scene, random.Random(seed), limit=5))
        assert {"name", "position", "presence", "describe"} <= set(kinds) and sum(kinds.values()) == 5


def test_ask_is_a_function_of_its_generator(artwork: Artwork) -> None:
    scene = make_scene(9, artwork, kind="shapes")
    assert ask(scene, random.Random(4)) == ask(scene, random.Random(4))
    assert len({tuple(ask(scene, random.Random(seed))) for seed in range(8)}) > 4


def test_presence_is_balanced_and_negatives_are_near_misses(artwork: Artwork) -> None:
    answers, near = Counter(), 0
    for seed in range(160):
        scene, turn = balanced_probe("presence", HELD_OUT_FIRST_SEED + seed, artwork, (112, 112))
        answers[turn.answer] += 1
        present = {THING_BY_NAME[one.name].category for one in scene.objects}
        if turn.answer == "no":
            asked = turn.question.lower()
            mentioned = [thing for thing in THING_BY_NAME.values() if thing.name in asked or thing.plural in asked]
            near += any(thing.category in present for thing in mentioned)
    assert 60 <= answers["yes"] <= 100
    assert near > 0.45 * answers["no"]


@pytest.mark.parametrize("kind", ["count", "position", "colour"])
def test_always_guessing_the_same_stays_near_chance(artwork: Artwork, kind: str) -> None:
    answers = Counter(
        balanced_probe(kind, HELD_OUT_FIRST_SEED + seed, artwork, (112, 112))[1].answer for seed in range(160)
    )
    ceiling = CHANCE[kind] / 2 if kind == "position" else CHANCE[kind]  # four words, two for each axis
    assert max(answers.values()) / 160 < ceiling + 0.09, answers


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_a_probe_is_repeatable_and_right_by_its_own_answer(artwork: Artwork, kind: str) -> None:
    for seed in range(6):
        scene, turn = balanced_probe(kind, HELD_OUT_FIRST_SEED + seed, artwork)
        again = balanced_probe(kind, HELD_OUT_FIRST_SEED + seed, artwork)[1]
        assert turn == again and turn.kind == kind and grade(kind, turn.answer, turn.answer)
        if kind == "position":
            axis = ("left", "right") if turn.answer in ("left", "right") else ("above", "below", "over", "under")
            assert sum(word in turn.question.lower() for word in axis) >= 2
        if kind == "describe":
            assert turn.answer == describe(scene)


def test_a_name_probe_does_not_give_the_category_away(artwork: Artwork) -> None:
    questions = [
        balanced_probe("name", HELD_OUT_FIRST_SEED + seed, artwork, (112, 112))[1].question for seed in range(60)
    ]
    assert not [question for question in questions if "animal" in question.lower() or "vehicle" in question.lower()]
    assert len(set(questions)) > 15


def test_relation_hesitates_where_a_person_would() -> None:
    def at(x: int, y: int) -> SceneObject:
        return SceneObject("dog", "thing", "google", None, (x - 10, y - 10, x + 10, y + 10))

    assert relation(at(20, 50), at(80, 50)) == "left" and relation(at(80, 60), at(20, 50)) == "right"
    assert relation(at(50, 20), at(50, 80)) == "above" and relation(at(50, 80), at(40, 20)) == "below"
    assert relation(at(20, 20), at(70, 70)) is None and relation(at(50, 50), at(62, 52)) is None


@pytest.mark.parametrize(
    ("kind", "expected", "answer", "right"),
    [
        ("name", "a dog", "Dog.", True),
        ("name", "a dog", "It is a dog", True),
        ("name", "a dog", "a hot dog", False),
        ("name", "foxes", "a fox", True),
        ("name", "a fox", "", False),
        ("colour", "gray", "Grey", True),
        ("colour", "red", "red and blue", False),
        ("count", "3", "three", True),
        ("count", "3", "There are 3.", True),
        ("count", "3", "33", False),
        ("position", "left", "Left.", True),
        ("position", "left", "right", False),
        ("presence", "yes", "Yes!", True),
        ("presence", "yes", "yes no", False),
        ("read", "house", "HOUSE", True),
        ("read", "house", "horse", False),
        ("describe", "a dog to the left of a cat", "A cat and a dog", True),
        ("describe", "a dog to the left of a cat", "a hot dogs and a cat", False),
        ("describe", "3 red circles and a blue star", "a blue star and 3 red circles", True),
        ("describe", "3 red circles and a blue star", "a red star and 3 blue circles", False),
        ("describe", 'a dog above the word "tree"', "the word tree below a dog", True),
        ("describe", 'a dog above the word "tree"', "a dog above a word", False),
    ],
)
def test_grade(kind: str, expected: str, answer: str, right: bool) -> None:
    assert grade(kind, expected, answer) is right


def test_phrasings_are_many_and_typed_in_many_ways() -> None:
    for kind in ("name", "name_category", "colour", "count", "position_across", "presence", "read", "describe"):
        assert len(set(PHRASES[kind])) >= 8
    typed = {style_question(random.Random(seed), "what is this?") for seed in range(200)}
    assert {"what is this?", "What is this?", "What is this", "WHAT IS THIS?"} <= typed


def test_an_unknown_kind_is_refused(artwork: Artwork) -> None:
    with pytest.raises(ConfigError, match="unknown kind of question"):
        balanced_probe("smell", HELD_OUT_FIRST_SEED, artwork)
