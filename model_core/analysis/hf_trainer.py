"""The peer of `dve bench train`: the same model, trained by transformers' `Trainer` as its users write it.

In: a DualVisionModel, samples, a freeze table; out: rounds. A batch is padded to its longest sample; the forward is the
model's own, `labels` among its inputs. Samples are decoded and labelled by this project's code, which makes the peer no
slower: what is compared is the training. It knows no packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from model_core.analysis.training_memory import optimizer_bytes, peak_bytes, reset_peak
from model_core.analysis.training_speed import TrainingRound
from model_core.processing.batch import InputFormat, normalise_pixels
from model_core.training.config import TrainConfig
from model_core.training.data.collate import IGNORED, EncodedSample, encode_sample
from model_core.training.data.datasets import DualVisionDataset
from model_core.training.freeze import FreezeTable

Clock = Callable[[], float]


class _Samples(Dataset):
    """Map-style, each sample encoded when it is asked for; the time that takes is data wait."""

    def __init__(self, dataset: DualVisionDataset, fmt: InputFormat, max_tokens: int, wait: _Wait) -> None:
        self._dataset, self._fmt, self._max_tokens, self._wait = dataset, fmt, max_tokens, wait

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> EncodedSample:
        begin = self._wait.clock()
        sample = encode_sample(self._dataset.sample(index), self._fmt, self._max_tokens)
        self._wait.seconds += self._wait.clock() - begin
        return sample


class _Wait:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, 0.0


class _PadCollator:
    """Samples side by side, padded on the right, as a collator of transformers does it."""

    def __init__(self, fmt: InputFormat, pad_id: int, wait: _Wait) -> None:
        self._fmt, self._pad_id, self._wait = fmt, pad_id, wait
        self.seen = TrainingRound()

    def __call__(self, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
        begin = self._wait.clock()
        ids = _padded([torch.tensor(s.input_ids) for s in samples], self._pad_id)
        labels = _padded([torch.tensor(s.labels) for s in samples], IGNORED)
        mask = _padded([torch.ones(len(s.input_ids), dtype=torch.long) for s in samples], 0)
        special = self._fmt.special
        batch = {
            "input_ids": ids, "labels": labels, "attention_mask": mask,
            "mm_token_type_ids": (ids == special.image).long() + 2 * (ids == special.video).long(),
        }  # fmt: skip
        patches = [pixels for s in samples for pixels in s.pixels]
        if patches:
            cpu = torch.device("cpu")
            batch["pixel_values"] = torch.cat([normalise_pixels(p, self._fmt.patches, cpu) for p in patches])
            batch["image_grid_thw"] = torch.tensor([grid for s in samples for grid in s.grids])
        self.seen.num_samples += len(samples)
        self.seen.num_tokens += int(mask.sum())
        self.seen.num_padded += mask.numel()
        self.seen.num_label_tokens += int((labels[:, 1:] != IGNORED).sum())
        self._wait.seconds += self._wait.clock() - begin
        return batch


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


class _Stopwatch(TrainerCallback):
    """From the beginning of an epoch, its data included, to the end of its last step: no set-up counts."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.begin, self.end = clock, 0.0, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self._clock()

    def on_step_end(self, args: Any, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available() and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.end = self._clock()


class HfTrainer:
    """A Trainer whose optimizer lives on from round to round. `config` gives batch size, rate and clipping."""

    kind = "Trainer"

    def __init__(
        self, model: Any, fmt: InputFormat, pad_id: int, dataset: DualVisionDataset, *, config: TrainConfig,
        table: FreezeTable, clock: Clock, folder: Path,
    ) -> None:  # fmt: skip
        self.mode, self._model, self._table = str(config.training_mode), model, table
        self._wait, self._watch = _Wait(clock), _Stopwatch(clock)
        self._collate = _PadCollator(fmt, pad_id, self._wait)
        table.apply(model)  # before the optimizer is made, which takes what requires a gradient
        on_cpu = model.device.type == "cpu"
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=config.batch_size, num_train_epochs=1,
            learning_rate=config.learning_rate or 1e-5, lr_scheduler_type="constant",
            max_grad_norm=config.max_grad_norm or 0.0, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=not on_cpu, use_cpu=on_cpu,
            seed=config.seed, **({"activation_checkpointing": True} if config.gradient_checkpointing else {}),
        )  # fmt: skip
        samples = _Samples(dataset, fmt, config.max_tokens, self._wait)
        self._trainer = Trainer(
            model, arguments, data_collator=self._collate, train_dataset=samples, callbacks=[self._watch]
        )
        self._trainer.remove_callback(PrinterCallback)

    @property
    def held_bytes(self) -> int:
        optimizer = self._trainer.optimizer
        return 0 if optimizer is None else optimizer_bytes(optimizer.state)

    def warm_up(self) -> None:
        self.run()

    def run(self) -> TrainingRound:
        self._table.apply(self._model)
        found = self._collate.seen = TrainingRound()
        self._wait.seconds = 0.0
        reset_peak(self._model.device)
        self._trainer.train()
        found.seconds = self._watch.end - self._watch.begin
        found.data_wait_seconds = self._wait.seconds
        found.peak_bytes = peak_bytes(self._model.device)
        self._model.zero_grad(set_to_none=True)
        return found
