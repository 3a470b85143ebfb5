"""The free phrasings of the demo's questions, by key, and how they are typed.

Templates are lower case with their end mark; fields: {thing}, {things}, {a_thing}, {other}, {colour}, {category}.
Refuses to know scenes: questions.py decides which key fits.
"""

from __future__ import annotations

import random

PHRASES: dict[str, tuple[str, ...]] = {
    "name": (
        "what is this?",
        "what is in the picture?",
        "name the object in the picture.",
        "what do you see?",
        "what is shown here?",
        "what thing is this?",
        "what can you see in this image?",
        "tell me what this is.",
        "which object is in the image?",
        "what's this?",
        "what is that?",
        "identify the object.",
        "can you tell me what is in this photo?",
        "what does the picture show?",
    ),
    "name_category": (
        "which {category} is this?",
        "what {category} is this?",
        "what kind of {category} is this?",
        "which {category} is in the picture?",
        "what {category} do you see?",
        "name the {category}.",
        "which {category} is shown here?",
        "tell me which {category} this is.",
    ),
    "name_shape": (
        "what shape is this?",
        "which shape is in the picture?",
        "name the shape.",
        "what shape do you see?",
        "which shape is shown?",
        "tell me the shape.",
        "what is the shape in the image?",
        "what kind of shape is this?",
    ),
    "name_many": (
        "what are these?",
        "what are they?",
        "what do these show?",
        "name the objects.",
        "what things are these?",
        "which things are in the picture?",
        "tell me what these are.",
        "what kind of things are these?",
    ),
    "name_beside_word": (
        "what is next to the word?",
        "which thing is beside the word?",
        "name the thing next to the word.",
        "what object is in the picture?",
        "what is there besides the word?",
        "what is shown with the word?",
        "which object stands next to the text?",
        "what is near the text?",
    ),
    "name_left": (
        "what is on the left?",
        "which thing is on the left?",
        "name the object on the left.",
        "what is left?",
    ),
    "name_right": (
        "what is on the right?",
        "which thing is on the right?",
        "name the object on the right.",
        "what do you see on the right?",
    ),
    "name_above": ("what is at the top?", "which thing is on top?", "name the upper object.", "what is above?"),
    "name_below": ("what is at the bottom?", "which thing is below?", "name the lower object.", "what is below?"),
    "name_left_of": ("what is to the left of the {other}?", "what is left of the {other}?"),
    "name_right_of": ("what is to the right of the {other}?", "what is right of the {other}?"),
    "name_above_of": ("what is above the {other}?", "which thing is above the {other}?"),
    "name_below_of": ("what is below the {other}?", "what is under the {other}?"),
    "colour": (
        "what {colour} is the {thing}?",
        "tell me the {colour} of the {thing}.",
        "which {colour} does the {thing} have?",
        "what is the {colour} of the {thing}?",
        "the {thing} is what {colour}?",
        "name the {colour} of the {thing}.",
        "which {colour} is the {thing}?",
        "can you tell me the {thing}'s {colour}?",
    ),
    "colour_only": (
        "what {colour} is this?",
        "tell me the {colour}.",
        "what {colour} is it?",
        "what {colour} is the shape?",
        "which {colour} do you see?",
        "name the {colour}.",
        "what is the {colour} of the shape?",
        "which {colour} is this?",
    ),
    "colour_many": (
        "what {colour} are the {things}?",
        "tell me the {colour} of the {things}.",
        "which {colour} do the {things} have?",
        "what is the {colour} of the {things}?",
        "name the {colour} of the {things}.",
        "which {colour} are the {things}?",
        "the {things} are what {colour}?",
        "can you tell me the {colour} of the {things}?",
    ),
    "count": (
        "how many {things} are there?",
        "how many {things} do you see?",
        "count the {things}.",
        "how many {things} are in the picture?",
        "what is the number of {things}?",
        "how many {things} can you see in the image?",
        "tell me how many {things} there are.",
        "how many {things}?",
        "give me the number of {things}.",
    ),
    "count_all": (
        "how many objects are there?",
        "how many things are in the picture?",
        "count the objects.",
        "how many things do you see?",
    ),
    "position_across": (
        "is the {thing} left or right of the {other}?",
        "where is the {thing}, left or right of the {other}?",
        "is the {thing} to the left or to the right of the {other}?",
        "left or right: where is the {thing} from the {other}?",
        "on which side of the {other} is the {thing}, left or right?",
        "tell me if the {thing} is left or right of the {other}.",
        "does the {thing} stand left or right of the {other}?",
        "the {thing}: left or right of the {other}?",
    ),
    "position_down": (
        "is the {thing} above or below the {other}?",
        "where is the {thing}, above or below the {other}?",
        "above or below: where is the {thing} from the {other}?",
        "tell me if the {thing} is above or below the {other}.",
        "the {thing}: above or below the {other}?",
        "is the {thing} over or under the {other}?",
        "does the {thing} stand above or below the {other}?",
        "do you see the {thing} above or below the {other}?",
    ),
    "position_open": (
        "where is the {thing}, seen from the {other}?",
        "where is the {thing} relative to the {other}?",
        "on which side of the {other} is the {thing}?",
        "where is the {thing} compared to the {other}?",
        "what is the position of the {thing} relative to the {other}?",
    ),
    "position_alone": ("where is the {thing}?", "where do you see the {thing}?", "tell me where the {thing} is."),
    "presence": (
        "is there {a_thing} in the picture?",
        "is there {a_thing}?",
        "do you see {a_thing}?",
        "can you see {a_thing}?",
        "does the image show {a_thing}?",
        "is {a_thing} in this image?",
        "is {a_thing} visible here?",
        "does the picture contain {a_thing}?",
        "are there any {things}?",
    ),
    "read": (
        "what does it say?",
        "read the word.",
        "what is written here?",
        "which word is in the picture?",
        "what is the text?",
        "can you read this?",
        "what word do you see?",
        "tell me what the text says.",
        "what word is this?",
        "read the text in the image.",
    ),
    "describe": (
        "describe the image.",
        "describe the picture.",
        "what is in this picture, in one phrase?",
        "give me a short description.",
        "tell me about this picture.",
        "what does the scene look like?",
        "caption this image.",
        "describe what you see.",
        "please describe this photo.",
    ),
}

_OPENINGS = ("please tell me: ", "hey, ", "look: ", "hello! ", "a question: ")


def style_question(rng: random.Random, question: str) -> str:
    """As people type: with or without a capital letter, an end mark, a polite opening; rarely all in capitals."""
    chance = rng.random()
    if chance < 0.06:
        question = rng.choice(_OPENINGS) + question
    elif chance < 0.09:
        return question.upper()
    if rng.random() < 0.55:
        question = question[0].upper() + question[1:]
    ending = rng.random()
    if ending < 0.18:
        return question[:-1]
    if ending < 0.24:
        return question[:-1] + rng.choice(("!", " ?", "??", "..."))
    return question
