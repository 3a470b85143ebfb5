"""DualVisionTrainer, the Python face of training: the loop of `training/trainer.py`, with what the world gives to it.

The loop knows no clock, no terminal and no engine: they are joined to it here, for `dve train` as well (`run_hooks`).
In: a model, data and a recipe; out: a trained model, and on the way the table of what trains, progress and a summary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model_core.analysis.flops import tower_flops
from model_core.analysis.peaks import peak_flops_per_second
from model_core.checkpoint import Loaded, no_bars
from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.training import trainer as loop
from model_core.training.config import TrainConfig
from model_core.training.context import ProcessContext
from model_core.training.data.source import problems_of, unused_of
from model_core.training.display import Display, summary_text
from model_core.training.events import Listener
from model_core.training.hooks import Answer, RunHooks, no_clock
from model_core.training.reports import Outcome
from model_core.types import Arm, ChatMessage, GenerationRequest, SamplingParams

#: An evaluation's own: small, and nothing is kept, since the weights move between two of them.
_ENGINE = EngineConfig(
    max_num_seqs=16, kv_cache_bytes=256 * 2**20, shrinks_context=True, encoder_cache_bytes=0,
    enable_prefix_caching=False, joins_weights=False,
)  # fmt: skip


class DualVisionTrainer(loop.DualVisionTrainer):
    """Trains a DualVisionModel by a recipe, and shows what it does as `dve train` does.

    Args:
        model: a DualVisionEncoder, whose model and processor are taken, or a DualVisionModel.
        train_loader, val_loader: a DualVisionDataset, a MultiDataset, a torch DataLoader over one, or a BatchSource.
            Without a val_loader nothing is evaluated.
        config: a recipe, as TrainConfig or as JSON data: a file of `dve configs create`, read with `json.load`. What to
            load is settled by `model`, and by the loaders: its names of models and of files are not looked at.
        processor: where `model` is a DualVisionModel; saved with every checkpoint.
        hooks: who else listens, another clock, answers from elsewhere. What it leaves out is filled in.
        write: False keeps everything in memory: no run folder, no checkpoint, none of the recipe's `loggers`.
        verbose: table, progress, warnings and a summary on stdout. None: where no hooks are given.
    Raises:
        ConfigError: a recipe that contradicts itself, the model or the data.
    """

    def __init__(
        self,
        model: Any,
        train_loader: Any,
        val_loader: Any,
        config: TrainConfig | Mapping[str, Any],
        *,
        processor: Any = None,
        hooks: RunHooks | None = None,
        context: ProcessContext | None = None,
        write: bool = True,
        verbose: bool | None = None,
    ) -> None:
        processor = processor if processor is not None else getattr(model, "processor", None)
        is_shown = hooks is None if verbose is None else verbose
        self._display = Display(sys.stdout) if is_shown else None
        if processor is not None:  # else the loop refuses
            loaded = Loaded(model.model if isinstance(model, DualVisionEncoder) else model, processor)
            shown = () if self._display is None else (self._display,)
            hooks = _completed(hooks or RunHooks(), run_hooks(loaded, shown))
        super().__init__(
            model, train_loader, val_loader, config, processor=processor, hooks=hooks, context=context, write=write
        )

    def train(self) -> Outcome:
        """Run what is left of the recipe.

        Raises:
            NonFiniteLossError, TrainingMemoryError, StorageFullError, DataError, FreezeViolationError; TrainingError: a
            process that makes packs ended.
        """
        if self._display is None:
            with no_bars():
                return super().train()
        with no_bars(), self._display:
            outcome = super().train()
        if outcome.is_finished:
            self._display.say(summary_text(outcome, stops_early=self.config.early_stopping is not None))
        else:
            where = f", saved in {self.run_folder.path}" if self._writes else ""
            self._display.say(f"stopped on request after {outcome.position.global_step} steps{where}; train() goes on")
        return outcome

    def resume(self, path: str | Path) -> None:
        """Take over everything of a run folder's newest complete step, or of the step folder named.

        Raises:
            CheckpointError: nothing complete is there. CheckpointMismatchError: another model, recipe or data.
        """
        if self._display is not None:  # of a new run it is told by events
            self._display.problems(problems_of(*self._sources))
            for line in unused_of(*self._sources):
                self._display.say(f"warning: {line}")
        super().resume(path)


def run_hooks(loaded: Loaded, listeners: tuple[Listener, ...], *, peak_tflops: float | None = None) -> RunHooks:
    """A clock, answers from an engine of their own, and what MFU is counted by.

    peak_tflops: the device's dense peak; None: what is known of the card, and of others nothing is said.
    """
    peak = None if peak_tflops is None else peak_tflops * 1e12
    device = loaded.model.lm_head.weight.device
    if peak is None and device.type == "cuda":
        peak = peak_flops_per_second(torch.cuda.get_device_name(device))
    return RunHooks(listeners, time.perf_counter, answerer(loaded), tower_flops, peak)


def _completed(given: RunHooks, own: RunHooks) -> RunHooks:
    return RunHooks(
        listeners=(*own.listeners, *given.listeners),
        clock=own.clock if given.clock is no_clock else given.clock,
        answer=given.answer or own.answer,
        tower_flops=given.tower_flops or own.tower_flops,
        peak_flops_per_second=given.peak_flops_per_second or own.peak_flops_per_second,
    )


def answerer(loaded: Loaded) -> Answer:
    """A callable that batches all conversations through one engine, greedy, which is built when it is first asked.

    The weights stay as they lie (`joins_weights`), so that a run gives the same ones with and without answers.
    """
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
