"""Common English words of three to five letters that scenes show to be read, and made-up strings.

Every ninth word is reserved: no training scene shows it, so that reading can be scored on words whose
letters, not whose shape, must have been learnt.
"""

from __future__ import annotations

import numpy as np

from model_core.demo.canvas import COLOURS

_TEXT = """
able acid also area army away baby back bag bake ball band bank bar base bath beach beam bean beat bed bell belt
bench bend best big bike bill bind bird bite black blind block blow blue board boat body bold bone book boot born
boss both bowl box brain brave bread break brick brief bring broad brown brush build burn bus busy buy cabin cable
cake call calm camp card care case cash cast catch chain chair chalk charm chart cheap check chest chief child
china choir cigar city civil claim clap class clay clean clear clerk click cliff climb clock close cloth cloud club
coach coal coast code coin cold color comb come cook cool copy core corn cost couch count court cover craft crash
cream crew crop cross crowd cup curve cut cycle daily dance dark data date dawn day deal dear deep delay depth desk
dial diet dig dirt dish dive dock door doubt down draft dream dress drink drive drop dry dust duty each eager early
earn earth ease east easy eat edge eight else empty end enemy enjoy enter equal error event every exact exit extra
face fact fair faith fall fame far farm fast fault feast feed feel fence few field fifty file fill film final find
fine fire firm first fit five flag flame flat fleet float flood floor flour flow fly focus fog fold folk food foot
force fork form fort forty found four frame free fresh front frost fruit fuel full fun fund gain game gap gas gate
ghost giant gift girl give glad glass globe glove glow glue goal gold good grade grain grand grant grape grass gray
great green grid grip group grow guard guess guest guide habit hair half hall hand happy hard harm hat have head
heart heat heavy hello help here hero hide high hill hint hold hole holy home honey hook hope horn host hotel hour
house huge human humor hunt hurry ice idea image inch index inner ink input iron item jacket jazz jeans job join
joke judge juice jump jury just keen keep kick kind king kiss kite knee knife knock know label labor lace lady lake
lamp land lane large last late laugh lawn layer lead leaf lean learn leave left leg lemon level life lift light
like limit line link lion list live load local lock logic long loop lord lose lost loud love loyal luck lunch magic
mail main major make map march mark mask match maybe meal mean meat medal meet melt menu metal mild mile milk mind
mine minor mint mix model money month mood moon more most motor mount mouse mouth move movie much mud music nail
name navy near neat neck need nerve nest never new news next nice night nine noble noise noon north nose note novel
nurse ocean offer often oil old olive once onion only open opera orbit order other oven over own oxen pack page
paint pair palm panel paper park part party pass past patch path pay peace pearl pen phase phone photo piano pick
pilot pin pint pipe place plain plan plate play plot plug poem poet point pole pond pool port post pound power
press price pride prime print prize proof proud pull pump pure push queen quick quiet quite race radio rain raise
range rank rapid rate reach read ready real rear relax rent reply rest rice rich ride right ring rise risk river
road robe rock role roll roof room root rope rough round route row royal rule run rural sail salad salt same sand
save scale scene score seal seat seed sell send sense serve seven shade shake shape share sharp sheet shelf shell
shine ship shirt shoe shop shore short show sign silk silly sing sink site six skill skin skirt sky sleep slide
slow small smart smell smile smoke snow soap sock soft soil solid some song soon sort soul sound soup south space
spare speak speed spice spin spoon sport spot stage stair stamp star start state stay steam steel step stick still
stone stop store storm story stove sugar suit sun sure swap sweet swim swing table tail take tale talk tall tank
tape task taste taxi tea teach team tell ten tent term test text thank theme thick thing think third three throw
ticket tidy tie tiger time tiny tip tired title today token tone tool tooth top topic torch total touch tour tower
town toy track trade trail train tray tree trend trial tribe trick trip truck true trust truth try tube tune turn
twelve twice twin two type under uncle union unit upper urban urge use usual value van vast very video view visit
vital voice vote wage wait walk wall warm wash watch water wave wax way weak wear web week well west wet whale
wheat wheel when white whole wide wife wild win wind wine wing winter wire wise wish wolf wood wool word work world
worm worth write yard yarn year yell yes yet yield young your youth zebra zero zone zoo
"""

# Answers to other questions are whole tokens; as words to be read they would not be spelt (see tokenizer.py).
_ANSWERS = frozenset((*COLOURS, "left", "right", "above", "below", "yes", "user"))
WORDS: tuple[str, ...] = tuple(word for word in _TEXT.split() if 3 <= len(word) <= 5 and word not in _ANSWERS)
RESERVED_WORDS: tuple[str, ...] = WORDS[4::9]
TRAINING_WORDS: tuple[str, ...] = tuple(word for word in WORDS if word not in set(RESERVED_WORDS))

_RESERVED = frozenset(RESERVED_WORDS)
_VOWELS, _CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
#: Of the words in training scenes, how many are made up: reading must not become guessing from a list.
_MADE_UP_SHARE = 0.6
# Made-up strings that hold one of these are drawn again.
_UNWANTED = ("fuc", "fuk", "shit", "cunt", "coc", "dic", "dik", "tit", "ass", "cum", "nig", "fag", "rap", "sex", "naz")


def draw_word(rng: np.random.Generator, *, held_out: bool) -> str:
    """A word for one scene. Held-out scenes take real words alone, half of them reserved ones."""
    if held_out:
        return str(rng.choice(RESERVED_WORDS if rng.random() < 0.5 else TRAINING_WORDS))
    if rng.random() >= _MADE_UP_SHARE:
        return TRAINING_WORDS[int(rng.integers(len(TRAINING_WORDS)))]
    while True:
        word = _made_up(rng)
        if word not in _RESERVED and word not in _ANSWERS and not any(bad in word for bad in _UNWANTED):
            return word


def _made_up(rng: np.random.Generator) -> str:
    length = int(rng.integers(3, 6))
    if rng.random() < 0.5:
        return "".join(_ALPHABET[i] for i in rng.integers(26, size=length))
    start = int(rng.integers(2))
    sounds = [(_VOWELS if (start + i) % 2 else _CONSONANTS) for i in range(length)]
    return "".join(sound[int(rng.integers(len(sound)))] for sound in sounds)
