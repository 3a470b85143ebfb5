"""Scores on scenes that were never trained on: per kind of question, with Wilson intervals, as a table.

In: a callable that answers a batch of (image, question) pairs. Refuses to know what answers them: one arm of a
model, a server or a guesser. Held-out seeds are disjoint from training seeds by construction (scenes.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from model_core.demo.artwork import Artwork
from model_core.demo.questions import CHANCE, QUESTION_KINDS, Turn, balanced_probe, grade
from model_core.demo.scenes import HELD_OUT_FIRST_SEED
from model_core.demo.words import RESERVED_WORDS
from model_core.errors import ConfigError

AnswerBatch = Callable[[list[tuple[Image.Image, str]]], list[str]]
Outcome = Callable[[Turn, str, bool], Any]

#: A row of its own: the words to be read that no training scene ever showed.
NEW_WORDS = "read (new words)"
_RESERVED = frozenset(RESERVED_WORDS)


@dataclass(slots=True)
class Tally:
    successes: int = 0
    count: int = 0

    @property
    def share(self) -> float:
        return self.successes / self.count if self.count else 0.0

    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.count)


@dataclass(slots=True)
class Scores:
    """Right answers by kind. `total` leaves out rows that are part of another (NEW_WORDS)."""

    by_kind: dict[str, Tally] = field(default_factory=dict)

    def add(self, kind: str, *, is_right: bool) -> None:
        tally = self.by_kind.setdefault(kind, Tally())
        tally.successes += is_right
        tally.count += 1

    @property
    def total(self) -> Tally:
        rows = [tally for kind, tally in self.by_kind.items() if kind in QUESTION_KINDS]
        return Tally(sum(row.successes for row in rows), sum(row.count for row in rows))

    def to_dict(self) -> dict[str, dict[str, float]]:
        """For the model card and `--json`."""
        rows = {}
        for kind, tally in (*self.by_kind.items(), ("all", self.total)):
            low, high = tally.interval()
            rows[kind] = {
                "right": tally.successes,
                "asked": tally.count,
                "share": tally.share,
                "low": low,
                "high": high,
            }
        return rows


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion; (0, 1) where nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    swing = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - swing) / scale), min(1.0, (middle + swing) / scale)


def held_out_seeds(count: int, *, offset: int = 0) -> range:
    """`count` seeds that no training scene has."""
    return range(HELD_OUT_FIRST_SEED + offset, HELD_OUT_FIRST_SEED + offset + count)


def evaluate(
    answer_batch: AnswerBatch,
    artwork: Artwork,
    seeds: Sequence[int],
    *,
    kinds: Iterable[str] = QUESTION_KINDS,
    sizes: Sequence[tuple[int, int]] = ((168, 168),),
    batch_size: int = 32,
    on_outcome: Outcome | None = None,
) -> Scores:
    """Ask one balanced question of each kind for each seed. `on_outcome(turn, answer, is_right)` sees every one.

    sizes: (height, width), taken in turn. The questions depend on the seeds alone, so arms are comparable pair by
    pair. Errors: ConfigError for a seed that may have been trained on, or for answers that are too few.
    """
    if any(seed < HELD_OUT_FIRST_SEED for seed in seeds):
        raise ConfigError(
            "a seed to be scored may have been trained on",
            value=min(seeds),
            allowed=f"seeds from {HELD_OUT_FIRST_SEED} on",
            fix="Take them from held_out_seeds().",
        )
    scores = Scores()
    plan = [(kind, seed, sizes[i % len(sizes)]) for kind in kinds for i, seed in enumerate(seeds)]
    for start in range(0, len(plan), batch_size):
        probes = [balanced_probe(kind, seed, artwork, size) for kind, seed, size in plan[start : start + batch_size]]
        answers = answer_batch([(scene.picture(), turn.question) for scene, turn in probes])
        if len(answers) != len(probes):
            raise ConfigError(
                "the number of answers is wrong", value=len(answers), allowed=str(len(probes)),
                fix="Let answer_batch return one answer a question, in their order",
            )  # fmt: skip
        for (_, turn), answer in zip(probes, answers, strict=True):
            is_right = grade(turn.kind, turn.answer, answer)
            scores.add(turn.kind, is_right=is_right)
            if turn.kind == "read" and turn.answer in _RESERVED:
                scores.add(NEW_WORDS, is_right=is_right)
            if on_outcome is not None:
                on_outcome(turn, answer, is_right)
    return scores


def render_table(arms: Mapping[str, Scores], *, markdown: bool = False) -> str:
    """One row a kind, one column an arm: "share % [low, high]"; then the chance level and how many were asked."""
    kinds = list(dict.fromkeys(kind for scores in arms.values() for kind in scores.by_kind))
    rows = [["question", *arms, "chance", "asked"]]
    for kind in kinds:
        tallies = [scores.by_kind.get(kind, Tally()) for scores in arms.values()]
        chance = f"{100 * CHANCE.get(kind, 0.0):.1f} %"
        rows.append([kind, *map(_cell, tallies), chance, str(max(tally.count for tally in tallies))])
    totals = [scores.total for scores in arms.values()]
    rows.append(["all", *map(_cell, totals), "", str(max((total.count for total in totals), default=0))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def _cell(tally: Tally) -> str:
    if not tally.count:
        return "-"
    low, high = tally.interval()
    return f"{100 * tally.share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
