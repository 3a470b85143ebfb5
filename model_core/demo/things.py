"""The things that the demo model can name: one everyday word each, one picture in each of two emoji styles.

Chosen so that no two look nearly alike in both styles, that each is one countable object (a picture of
two cherries would make "how many cherries?" a trick question) and that no name is also a colour or a shape.
Knows nothing of pixels: `codepoint` is the stem of the artwork's file name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Thing:
    name: str
    article: str
    plural: str
    codepoint: str
    category: str


#: category -> "name codepoint" entries; a plural that is not name + "s" follows a slash.
_TABLE = {
    "animal": """
        dog 1f436, cat 1f431, lion 1f981, tiger 1f405, horse 1f40e, zebra 1f993, cow 1f42e, pig 1f437,
        sheep/sheep 1f411, camel 1f42b, giraffe 1f992, elephant 1f418, mouse/mice 1f401, rabbit 1f430,
        fox/foxes 1f98a, raccoon 1f99d, bear 1f43b, koala 1f428, panda 1f43c, monkey 1f435,
        gorilla 1f98d, kangaroo 1f998, hedgehog 1f994, bat 1f987, squirrel 1f43f-fe0f, deer/deer 1f98c,
        chicken 1f414, chick 1f425, penguin 1f427, duck 1f986, owl 1f989, flamingo 1f9a9, peacock 1f99a,
        parrot 1f99c, frog 1f438, crocodile 1f40a, turtle 1f422, snake 1f40d, dinosaur 1f995,
        whale 1f433, fish/fish 1f420, shark 1f988, octopus/octopuses 1f419, crab 1f980, snail 1f40c,
        butterfly/butterflies 1f98b, bee 1f41d, ladybug 1f41e, spider 1f577-fe0f""",
    "fruit": """
        apple 1f34e, banana 1f34c, watermelon 1f349, lemon 1f34b, pineapple 1f34d, pear 1f350,
        strawberry/strawberries 1f353, avocado 1f951""",
    "vegetable": """
        carrot 1f955, eggplant 1f346, broccoli/broccoli 1f966, chili/chilies 1f336-fe0f, mushroom 1f344,
        pumpkin 1f383""",
    "food": """
        croissant 1f950, pretzel 1f968, burger 1f354, pizza 1f355, hot dog 1f32d,
        sandwich/sandwiches 1f96a, taco 1f32e, egg 1f95a, donut 1f369, cookie 1f36a, cake 1f382,
        cupcake 1f9c1, lollipop 1f36d, ice cream 1f366""",
    "drink": """
        cup 2615, teapot 1fad6, wine glass/wine glasses 1f377, beer 1f37a, cocktail 1f378""",
    "vehicle": """
        car 1f697, bus/buses 1f68c, truck 1f69a, tractor 1f69c, train 1f682, bike 1f6b2,
        motorcycle 1f3cd-fe0f, plane 2708-fe0f, helicopter 1f681, rocket 1f680, sailboat 26f5,
        ship 1f6a2, ufo 1f6f8, skateboard 1f6f9, wheelchair 1f9bd""",
    "tool": """
        hammer 1f528, axe 1fa93, saw 1fa9a, wrench/wrenches 1f527, gear 2699-fe0f, magnet 1f9f2,
        ladder 1fa9c, key 1f511, lock 1f512, bucket 1faa3, broom 1f9f9, anchor 2693, ruler 1f4cf,
        pencil 270f-fe0f, flashlight 1f526, microscope 1f52c""",
    "instrument": """
        guitar 1f3b8, trumpet 1f3ba, piano 1f3b9, drum 1f941, accordion 1fa97""",
    "clothing": """
        t-shirt 1f455, dress/dresses 1f457, hat 1f452, top hat 1f3a9, cap 1f9e2, shoe 1f45f, boot 1f462,
        handbag 1f45c, backpack 1f392, crown 1f451""",
    "sport": """
        soccer ball 26bd, football 1f3c8, basketball 1f3c0, baseball 26be, boxing glove 1f94a,
        trophy/trophies 1f3c6, kite 1fa81, medal 1f3c5""",
    "household": """
        umbrella 2614, candle 1f56f-fe0f, light bulb 1f4a1, bell 1f514, clock 23f0,
        hourglass/hourglasses 231b, telephone 260e-fe0f, laptop 1f4bb, camera 1f4f7, television 1f4fa,
        book 1f4d5, envelope 2709-fe0f, basket 1f9fa, chair 1fa91, bed 1f6cf-fe0f, toilet 1f6bd,
        door 1f6aa, suitcase 1f9f3, gift 1f381, balloon 1f388, dice/dice 1f3b2, knife/knives 1f52a""",
    "plant": """
        tree 1f333, pine tree 1f332, palm tree 1f334, cactus/cactuses 1f335, rose 1f339,
        sunflower 1f33b, tulip 1f337, maple leaf/maple leaves 1f341, clover 1f340""",
    "place": """
        house 1f3e0, castle 1f3f0, tent 26fa, volcano/volcanoes 1f30b, ferris wheel 1f3a1""",
    "sky": """
        sun 1f31e, moon 1f319, cloud 2601-fe0f, rainbow 1f308, snowflake 2744-fe0f, snowman/snowmen 26c4""",
}

#: Categories of which one can ask "which animal is this?" in everyday English.
ASKABLE_CATEGORIES = ("animal", "fruit", "vegetable", "food", "vehicle", "tool", "instrument", "plant")


def _build_things() -> tuple[Thing, ...]:
    things = []
    for category, entries in _TABLE.items():
        for entry in entries.split(","):
            names, codepoint = entry.strip().rsplit(" ", 1)
            name, _, plural = names.partition("/")
            article = "an" if name[0] in "aeio" or name in {"umbrella", "hourglass"} else "a"
            things.append(Thing(name, article, plural or name + "s", codepoint, category))
    return tuple(things)


THINGS: tuple[Thing, ...] = _build_things()
THING_BY_NAME: dict[str, Thing] = {thing.name: thing for thing in THINGS}
