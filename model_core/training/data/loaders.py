"""A torch DataLoader where packs are planned from a recipe: its data set is taken, and that in whole.

In: a DataLoader and the recipe; out: in words, which of its settings are not used. One that picks samples, or puts them
together, in a way of its own is refused: a run could not do as it says and be resumed. It iterates over none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig


def unused_settings(loader: DataLoader, config: TrainConfig, param: str) -> tuple[str, ...]:
    """What the loader says and the run does not do, a line each. param: train_loader or val_loader.

    Raises:
        ConfigError: it draws other samples than all, in an order of its own, or has a collate_fn.
    """
    batches = loader.batch_sampler
    # An own batch_sampler, if it is torch's, stands for batch_size and the sampler in it.
    is_torchs = batches is None or type(batches) is BatchSampler
    sampler = batches.sampler if is_torchs and batches is not None else loader.sampler
    if not is_torchs or not _takes_all(sampler, len(loader.dataset)):
        raise ConfigError(
            "a DataLoader that picks samples, or an order, of its own can't be kept to",
            value=_told(sampler if is_torchs else batches, len(loader.dataset)),
            allowed="every sample once, with shuffle=True or False",
            fix="Leave sampler and batch_sampler out. A part of the data is a file of its own; shares of several data "
            "sets are the weights of a MultiDataset; for any other order write a BatchSource", param=f"{param}.sampler",
        )  # fmt: skip
    if loader.collate_fn not in (default_collate, default_convert):
        raise ConfigError(
            "the DataLoader's collate_fn would never be called: the trainer packs samples itself",
            value=getattr(loader.collate_fn, "__qualname__", type(loader.collate_fn).__name__),
            allowed="none of one's own",
            fix="Leave collate_fn out. What it makes of a row belongs into format_conversations of a "
            "DualVisionDataset; for packs of another kind write a BatchSource", param=f"{param}.collate_fn",
        )  # fmt: skip
    size = loader.batch_size if batches is None else batches.batch_size
    drops_last = batches is not None and batches.drop_last
    shuffles = param == "val_loader" or type(sampler) is RandomSampler
    said = _differences(loader, config, size, drops_last=drops_last, shuffles=shuffles)
    return tuple(f"{param}: {line}" for line in said)


def _differences(
    loader: DataLoader, config: TrainConfig, size: int | None, *, drops_last: bool, shuffles: bool
) -> Iterator[str]:
    for name, value in (("batch_size", size), ("num_workers", loader.num_workers)):
        used = getattr(config, name)
        if value is not None and value != used:
            yield f"{name}={value} is not used; the recipe's {name} is {used}"
    if drops_last:
        yield "drop_last=True is not used; every sample is trained on"
    if not shuffles:
        yield "shuffle=False is not used; the order of training follows from the recipe's seed"
    for name in ("generator", "worker_init_fn"):
        if getattr(loader, name) is not None:
            yield f"{name} is not used; what is drawn follows from the recipe's seed"


def _takes_all(sampler: Any, num_samples: int) -> bool:
    """Each of them once, in the files' order or shuffled."""
    if type(sampler) is SequentialSampler:
        return len(sampler) == num_samples
    is_plain = type(sampler) is RandomSampler and not sampler.replacement
    return is_plain and len(sampler) == len(sampler.data_source) == num_samples


def _told(sampler: Any, num_samples: int) -> str:
    name = type(sampler).__name__
    if not isinstance(sampler, SequentialSampler | RandomSampler):
        return name
    return (
        f"{name}, {len(sampler)} of {num_samples} samples{', repeated' * bool(getattr(sampler, 'replacement', False))}"
    )
