"""A torch DataLoader as training data: its data set in whole; what is not used is told, what can't be kept refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.data.datasets import DualVisionDataset
from model_core.training.data.loaders import unused_settings
from model_core.training.data.source import as_source, unused_of
from tests.model_core.training.data.corpus import tiny_format, write_corpus

CONFIG = TrainConfig(batch_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DualVisionDataset:
    return DualVisionDataset(write_corpus(tmp_path_factory.mktemp("loaders"), 4))


def test_what_is_not_used_is_told_line_by_line(data: DualVisionDataset) -> None:
    assert unused_settings(DataLoader(data, batch_size=2, shuffle=True), CONFIG, "train_loader") == ()
    assert unused_settings(DataLoader(data, batch_size=2), CONFIG, "val_loader") == ()
    assert unused_settings(DataLoader(data, batch_size=None, shuffle=True), CONFIG, "train_loader") == ()
    odd = DataLoader(data, batch_size=3, num_workers=1, drop_last=True, generator=torch.Generator(), worker_init_fn=int)
    assert unused_settings(odd, CONFIG, "train_loader") == (
        "train_loader: batch_size=3 is not used; the recipe's batch_size is 2",
        "train_loader: num_workers=1 is not used; the recipe's num_workers is 0",
        "train_loader: drop_last=True is not used; every sample is trained on",
        "train_loader: shuffle=False is not used; the order of training follows from the recipe's seed",
        "train_loader: generator is not used; what is drawn follows from the recipe's seed",
        "train_loader: worker_init_fn is not used; what is drawn follows from the recipe's seed",
    )
    batches = BatchSampler(RandomSampler(data), 4, drop_last=False)
    (line,) = unused_settings(DataLoader(data, batch_sampler=batches), CONFIG, "train_loader")
    assert "batch_size=4" in line


def test_a_source_knows_what_its_loader_said(data: DualVisionDataset) -> None:
    format_of = tiny_format()
    train = as_source(DataLoader(data, batch_size=4, shuffle=True), CONFIG, format_of)
    val = as_source(DataLoader(data, batch_size=1), CONFIG, format_of, "val")
    told = [line.partition(" is not")[0] for line in unused_of(train, None, val, as_source(data, CONFIG, format_of))]
    assert told == ["train_loader: batch_size=4", "val_loader: batch_size=1"]


class EveryOther(SequentialSampler):
    """A sampler of the user's own, derived from a plain one."""

    def __iter__(self) -> Any:
        return iter(range(0, len(self.data_source), 2))


class TwoByTwo(BatchSampler):
    """Batches of the user's own."""


SAMPLERS: dict[str, Any] = {
    "SubsetRandomSampler": lambda data: {"sampler": SubsetRandomSampler([0, 1])},
    "WeightedRandomSampler": lambda data: {"sampler": WeightedRandomSampler([1.0, 2.0, 1.0, 1.0], 4)},
    "EveryOther": lambda data: {"sampler": EveryOther(data)},
    "SequentialSampler, 2 of 4 samples": lambda data: {"sampler": SequentialSampler(range(2))},
    "RandomSampler, 4 of 4 samples, repeated": lambda data: {"sampler": RandomSampler(data, replacement=True)},
    "RandomSampler, 8 of 4 samples": lambda data: {"sampler": RandomSampler(data, num_samples=8)},
    "list": lambda data: {"sampler": [3, 2, 1, 0]},
    "TwoByTwo": lambda data: {"batch_sampler": TwoByTwo(SequentialSampler(data), 2, drop_last=False)},
    "WeightedRandomSampler ": lambda data: {
        "batch_sampler": BatchSampler(WeightedRandomSampler([1.0] * 4, 4), 2, drop_last=False)
    },
}


@pytest.mark.parametrize("seen", SAMPLERS)
def test_a_loader_that_picks_for_itself_is_refused(data: DualVisionDataset, seen: str) -> None:
    with pytest.raises(ConfigError, match="picks samples, or an order, of its own") as caught:
        as_source(DataLoader(data, **SAMPLERS[seen](data)), CONFIG, tiny_format())
    error = caught.value
    assert str(error.value).startswith(seen.strip()) and error.allowed and "MultiDataset" in error.fix
    assert error.param == "train_loader.sampler"


def test_a_collate_fn_that_would_never_be_called_is_refused(data: DualVisionDataset) -> None:
    with pytest.raises(ConfigError, match="collate_fn would never be called") as caught:
        as_source(DataLoader(data, batch_size=2, collate_fn=list), CONFIG, tiny_format(), "val")
    error = caught.value
    assert (error.value, error.param) == ("list", "val_loader.collate_fn")
    assert error.allowed and "format_conversations" in error.fix


def test_a_loader_over_something_else_is_no_data(data: DualVisionDataset) -> None:
    with pytest.raises(ConfigError, match="no training data") as caught:
        as_source(DataLoader(Subset(data, [0, 1])), CONFIG, tiny_format())
    assert caught.value.value == "Subset"
