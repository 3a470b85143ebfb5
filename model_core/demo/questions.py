"""Questions about generated scenes, their answers, and the grading of what a model said.

In: a Scene and a `random.Random`. Out: `Turn`s. Answers are short, lower case and regular; questions come in
many free phrasings. Refuses to know pictures and models: a scene's list of objects is all it reads.
`balanced_probe` draws for scoring: there a model that sees nothing has the chance level of CHANCE, no more.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from model_core.demo.artwork import Artwork
from model_core.demo.canvas import COLOURS, SHAPES
from model_core.demo.phrases import PHRASES, style_question
from model_core.demo.scenes import Scene, SceneObject, make_scene
from model_core.demo.things import ASKABLE_CATEGORIES, THING_BY_NAME, THINGS
from model_core.errors import ConfigError

QUESTION_KINDS = ("name", "colour", "count", "position", "presence", "read", "describe")
#: What guessing reaches on `balanced_probe`.
CHANCE: dict[str, float] = {
    "name": 1 / len(THINGS),
    "colour": 1 / len(COLOURS),
    "count": 1 / 4,
    "position": 1 / 2,
    "presence": 1 / 2,
    "read": 0.0,
    "describe": 0.0,
}

_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_JOINED = {"left": "to the left of", "above": "above"}
_DIGITS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
#: Kinds that are asked early in a conversation more often: other questions name the objects and give them away.
_EARLY = ("name", "read", "colour", "count")


@dataclass(frozen=True, slots=True)
class Turn:
    kind: str
    question: str
    answer: str


def ask(scene: Scene, rng: random.Random, limit: int = 6) -> list[Turn]:
    """Up to `limit` turns: one of each kind that fits the scene before a second of any."""
    turns: list[tuple[int, Turn]] = []
    for askers in (_names, _colours, _counts, _positions, _presences, _readings, _descriptions):
        offered = list(askers(scene, rng))
        rng.shuffle(offered)
        turns += enumerate(offered)
    rng.shuffle(turns)
    chosen = [turn for _, turn in sorted(turns, key=lambda pair: pair[0])[:limit]]
    return sorted(chosen, key=lambda turn: rng.random() + (0.0 if turn.kind in _EARLY else 0.5))


def relation(first: SceneObject, second: SceneObject) -> str | None:
    """Where `first` is as seen from `second`: left, right, above, below; None where a person would hesitate."""
    (x0, y0), (x1, y1) = first.centre, second.centre
    across, down = x1 - x0, y1 - y0
    if abs(across) >= 1.5 * abs(down) and (first.box[2] <= second.box[0] or second.box[2] <= first.box[0]):
        return "left" if across > 0 else "right"
    if abs(down) >= 1.5 * abs(across) and (first.box[3] <= second.box[1] or second.box[3] <= first.box[1]):
        return "above" if down > 0 else "below"
    return None


def describe(scene: Scene) -> str:
    """One regular phrase that names everything, from the top left to the bottom right."""
    if scene.word is not None:
        return _describe_word(scene, scene.word)
    if len(scene.objects) == 2:
        for first, second in (scene.objects, scene.objects[::-1]):
            place = relation(first, second)
            if place in _JOINED and _noun(first) != _noun(second):
                return f"{_with_article(_noun(first))} {_JOINED[place]} {_with_article(_noun(second))}"
    ordered = sorted(scene.objects, key=lambda one: (one.centre[1] // 56, one.centre[0]))
    counts = Counter(_noun(one) for one in ordered)
    parts = [_with_article(noun) if n == 1 else f"{n} {plural_of(noun)}" for noun, n in counts.items()]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def grade(kind: str, expected: str, answer: str) -> bool:
    """Is the answer right? Case, articles and punctuation don't count; a description must name every noun."""
    said, wanted = _normal(answer), _normal(expected)
    if kind == "describe":
        nouns = _key_nouns(expected)
        return all(re.search(rf"\b{re.escape(noun)}\b", said) for noun in nouns) and bool(nouns)
    if kind == "read":
        return said.replace(" ", "") == wanted.replace(" ", "")
    if kind == "presence":
        return said == wanted
    said = re.sub(r"^(it is|its|this is|there is|there are|that is|i see|these are|they are) ", "", said)
    said = re.sub(r"^(a|an|the) ", "", said)
    if kind == "name":
        return wanted in (said, plural_of(said))
    if kind == "count":
        return _DIGITS.get(said, said) == wanted
    return said == wanted


def balanced_probe(kind: str, seed: int, artwork: Artwork, size: tuple[int, int] = (168, 168)) -> tuple[Scene, Turn]:
    """A scene and one question of `kind` whose answer can't be guessed from the question (see CHANCE).

    A function of its arguments. Where the scene of `seed` leaves no clear question, the scene of
    seed + n * 2**32 is taken, so a held-out seed stays held out. Errors: ConfigError for an unknown kind.
    """
    if kind not in QUESTION_KINDS:
        allowed = ", ".join(QUESTION_KINDS)
        raise ConfigError("unknown kind of question", value=kind, allowed=allowed, fix="Name one of these")
    rng = random.Random(f"{kind}/{seed}")
    scene_kind = {"name": "single", "colour": "shapes", "position": "pair", "read": "word"}.get(kind)
    if kind == "count":
        scene_kind = "shapes" if rng.random() < 0.3 else "group"
    if kind == "presence":
        scene_kind = rng.choice(("single", "pair", "group"))
    while True:
        scene = make_scene(seed, artwork, size, scene_kind)
        turn = _probe(kind, scene, rng)
        if turn is not None:
            return scene, turn
        seed += 2**32


def phrase_corpus() -> Iterator[str]:
    """Every phrasing and every answer: what the demo's tokenizer is trained on. No word list: see tokenizer.py."""
    rng = random.Random(0)
    for thing in THINGS:
        other = THINGS[rng.randrange(len(THINGS))]
        yield f"{_with_article(thing.name)} to the left of {_with_article(other.name)}"
        yield f"{_with_article(other.name)} above {_with_article(thing.name)}"
        yield f"3 {thing.plural} and {_with_article(other.name)}"
        for key, phrases in PHRASES.items():
            if key == "name_category" and thing.category not in ASKABLE_CATEGORIES:
                continue
            for template in phrases:
                if rng.random() < 0.2:
                    yield _ask(rng, (template,), thing=thing.name, other=other.name, category=thing.category)
    for shape in SHAPES:
        for colour in COLOURS:
            yield f"a {colour} {shape}, 2 {colour} {plural_of(shape)} and the word"
            yield _ask(rng, ("is there a {thing}?", "how many {things} are there?"), thing=f"{colour} {shape}")


def _ask(rng: random.Random, templates: tuple[str, ...], *, category: str = "", **names: str) -> str:
    """Fill one of the templates; `thing` also gives its plural and its article."""
    template = rng.choice(templates)
    fields = {"thing": "", "other": "", **names, "colour": rng.choice(("colour", "color")), "category": category}
    fields["things"], fields["a_thing"] = plural_of(fields["thing"]), _with_article(fields["thing"])
    return style_question(rng, template.format(**fields))


def _names(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    objects = scene.objects
    if scene.word is not None:
        if objects:
            yield Turn("name", _ask(rng, PHRASES["name_beside_word"]), _with_article(objects[0].name))
    elif len(objects) == 1:
        one = objects[0]
        phrases = PHRASES["name"]
        category = THING_BY_NAME[one.name].category if one.kind == "thing" else ""
        if one.kind == "shape" and rng.random() < 0.6:
            phrases = PHRASES["name_shape"]
        elif category in ASKABLE_CATEGORIES and rng.random() < 0.35:
            phrases = PHRASES["name_category"]
        yield Turn("name", _ask(rng, phrases, category=category), _with_article(one.name))
    elif len({one.name for one in objects}) == 1:
        yield Turn("name", _ask(rng, PHRASES["name_many"]), plural_of(objects[0].name))
    elif len(objects) == 2:
        for one, other in (objects, objects[::-1]):
            place = relation(one, other)
            if place is not None:
                key = f"name_{place}" if rng.random() < 0.6 else f"name_{place}_of"
                yield Turn("name", _ask(rng, PHRASES[key], other=other.name), _with_article(one.name))


def _colours(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    shapes = [one for one in scene.objects if one.colour is not None]
    for name in sorted({one.name for one in shapes}):
        alike = [one for one in shapes if one.name == name]
        if len({one.colour for one in alike}) > 1:
            continue
        phrases = PHRASES["colour" if len(alike) == 1 else "colour_many"]
        if len(shapes) == 1 and rng.random() < 0.5:
            phrases = PHRASES["colour_only"]
        yield Turn("colour", _ask(rng, phrases, thing=name), str(alike[0].colour))


def _counts(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    objects = scene.objects
    if not objects or (scene.kind not in ("group", "shapes") and rng.random() > 0.15):
        return
    for name, count in Counter(one.name for one in objects).items():
        if count <= 4:
            yield Turn("count", _ask(rng, PHRASES["count"], thing=name), str(count))
    if scene.kind == "shapes":
        yield Turn("count", _ask(rng, PHRASES["count"], thing="shape"), str(len(objects)))
        for colour, count in Counter(str(one.colour) for one in objects).items():
            yield Turn("count", _ask(rng, PHRASES["count"], thing=f"{colour} shape"), str(count))
    elif len(objects) <= 4 and scene.word is None:
        yield Turn("count", _ask(rng, PHRASES["count_all"]), str(len(objects)))


def _positions(scene: Scene, rng: random.Random, *, axis_named: bool = False) -> Iterator[Turn]:
    unique = [one for one in scene.objects if [o.name for o in scene.objects].count(one.name) == 1]
    if len(unique) < 2 or len(scene.objects) > 3:
        return
    one, other = rng.sample(unique, 2)
    place = relation(one, other)
    if place is None:
        return
    key = "position_across" if place in ("left", "right") else "position_down"
    if not axis_named and rng.random() < 0.4:
        key = "position_open"
    if not axis_named and len(scene.objects) == 2 and rng.random() < 0.15:
        key = "position_alone"
    yield Turn("position", _ask(rng, PHRASES[key], thing=one.name, other=other.name), place)


def _presences(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    """Half of the answers are yes; half of the absent things are of the present one's own category."""
    if not scene.objects:
        return
    for _ in range(2):
        one = rng.choice(scene.objects)
        there = rng.random() < 0.5
        noun = _noun(one) if one.kind == "shape" and rng.random() < 0.5 else one.name
        if not there:
            if one.kind == "shape":
                noun = _absent_shape(scene, rng, one, with_colour=noun != one.name)
            else:
                noun = _absent_thing(scene, rng, one)
        yield Turn("presence", _ask(rng, PHRASES["presence"], thing=noun), "yes" if there else "no")


def _absent_thing(scene: Scene, rng: random.Random, near: SceneObject) -> str:
    present = {one.name for one in scene.objects}
    pool = [thing.name for thing in THINGS if thing.name not in present]
    if rng.random() < 0.5:
        category = THING_BY_NAME[near.name].category
        pool = [name for name in pool if THING_BY_NAME[name].category == category] or pool
    return rng.choice(pool)


def _absent_shape(scene: Scene, rng: random.Random, near: SceneObject, *, with_colour: bool) -> str:
    """With a colour, half of the time only one of colour and shape is wrong."""
    if not with_colour:
        return rng.choice([shape for shape in SHAPES if shape not in {one.name for one in scene.objects}])
    present = {_noun(one) for one in scene.objects}
    close = [f"{near.colour} {shape}" for shape in SHAPES] + [f"{colour} {near.name}" for colour in COLOURS]
    anything = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return rng.choice([noun for noun in (close if rng.random() < 0.5 else anything) if noun not in present])


def _readings(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    if scene.word is not None:
        yield Turn("read", _ask(rng, PHRASES["read"]), scene.word)


def _descriptions(scene: Scene, rng: random.Random) -> Iterator[Turn]:
    if scene.objects or scene.word is not None:
        yield Turn("describe", _ask(rng, PHRASES["describe"]), describe(scene))


def _probe(kind: str, scene: Scene, rng: random.Random) -> Turn | None:
    if kind == "name":
        # No "which animal ...": the category would lift a blind guess above chance.
        return Turn(kind, _ask(rng, PHRASES["name"]), _with_article(scene.objects[0].name))
    if kind == "count":
        asked = scene.objects[0].name if scene.kind == "group" else "shape"
        count = sum(asked in (one.name, one.kind) for one in scene.objects)
        return Turn(kind, _ask(rng, PHRASES["count"], thing=asked), str(count))
    if kind == "position":
        return next(_positions(scene, rng, axis_named=True), None)
    askers = {"colour": _colours, "presence": _presences, "read": _readings, "describe": _descriptions}
    offered = list(askers[kind](scene, rng))
    return rng.choice(offered) if offered else None


def _describe_word(scene: Scene, word: str) -> str:
    if not scene.objects or scene.word_box is None:
        return f'the word "{word}"'
    thing = scene.objects[0]
    parts = [_with_article(thing.name), f'the word "{word}"']
    if thing.centre[1] > (scene.word_box[1] + scene.word_box[3]) / 2:
        parts.reverse()
    return " above ".join(parts)


def _noun(one: SceneObject) -> str:
    return f"{one.colour} {one.name}" if one.colour is not None else one.name


def plural_of(noun: str) -> str:
    if noun in THING_BY_NAME:
        return THING_BY_NAME[noun].plural
    return noun + ("es" if noun.endswith("s") else "s") if noun else ""


def _with_article(noun: str) -> str:
    if noun in THING_BY_NAME:
        return f"{THING_BY_NAME[noun].article} {noun}"
    return f"{'an' if noun[:1] in ('a', 'e', 'i', 'o') else 'a'} {noun}" if noun else ""


def _normal(text: str) -> str:
    words = re.sub(r"[^\w\s-]", " ", text.lower()).replace("grey", "gray").split()
    return re.sub(r"^(a|an|the) ", "", " ".join(words))


def _key_nouns(description: str) -> list[str]:
    """The object nouns of one of our own descriptions: what is left without articles, counts and joining words."""
    parts = re.split(r",| and | to the left of | above ", description.lower())
    return [re.sub(r"^(a|an|the word|[0-9]+) ", "", part.strip()).strip('"') for part in parts if part.strip()]
