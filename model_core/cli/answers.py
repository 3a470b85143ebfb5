"""Answers for a trainer's evaluations, from the engine that serves: the two meet here and nowhere else.

In: a model in memory and conversations; out: what it says, greedy. The weights stay as they lie (`joins_weights`), so
that a run gives the same weights with and without generated answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.types import Arm, ChatMessage, GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from model_core.checkpoint import Loaded
    from model_core.training.hooks import Answer

#: An evaluation's own: small, and nothing is kept, since the weights move between two of them.
_ENGINE = EngineConfig(
    max_num_seqs=16, kv_cache_bytes=256 * 2**20, shrinks_context=True, encoder_cache_bytes=0,
    enable_prefix_caching=False, joins_weights=False,
)  # fmt: skip


def answerer(loaded: Loaded) -> Answer:
    """A callable that batches all conversations through one engine, which is built when it is first asked."""
    made: list[DualVisionEncoder] = []

    def answer(conversations: Sequence[Sequence[ChatMessage]], arm: Arm, max_tokens: int) -> list[str]:
        if not made:
            made.append(DualVisionEncoder.from_loaded(loaded, "in-training", _ENGINE))
        engine, texts = made[0].engine, dict.fromkeys(range(len(conversations)), "")
        waiting = list(enumerate(conversations))[::-1]
        running = 0
        while waiting or running:
            while waiting and running < _ENGINE.max_num_seqs:
                number, messages = waiting.pop()
                params = SamplingParams(max_tokens=max_tokens)
                request = GenerationRequest(str(number), tuple(messages), params, arm=arm)
                engine.add_request(engine.prepare(request, replace(made[0].format, allow_paths=True)))
                running += 1
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                texts[int(event.request_id)] += event.text
                running -= event.is_terminal
        return list(texts.values())

    return answer
