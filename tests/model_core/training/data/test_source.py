"""Packs in one global order: the same at any world size, with workers or without, and after a resume."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from model_core import DualVisionDataset, MultiDataset, create_dataset
from model_core.errors import ConfigError, DataError, UnreadableImagesError
from model_core.training.config import BadSampleConfig, DatasetConfig, StageConfig, TrainConfig
from model_core.training.context import ProcessContext
from model_core.training.data.packs import BatchSource, PackedBatch
from model_core.training.data.prefetch import in_order
from model_core.training.data.source import as_source, build_source
from model_core.training.data.stores import FolderStore
from tests.model_core.training.data.corpus import jpeg, row, tiny_format, write_corpus, write_rows

FORMAT = tiny_format()
Steps = list[list[PackedBatch]]


def recipe(path: Path, **settings: Any) -> TrainConfig:
    asked = {"batch_size": 3, "max_tokens": 400, "gradient_accumulation_steps": 2, "seed": 7}
    return TrainConfig(train_data_path=str(path), **(asked | settings))


def stage_of(config: TrainConfig, index: int = 0):
    return config.stages()[index]


def contents(made: PackedBatch) -> tuple[Any, ...]:
    """Every byte of a pack."""
    tensors = (made.input_ids, made.labels, made.position_ids)
    return (
        *(tensor.numpy().tobytes() for tensor in tensors), None if made.pixels is None else made.pixels.tobytes(),
        made.sample_lengths, made.grids, made.images_per_sample, made.samples, made.num_label_tokens,
    )  # fmt: skip


def same(some: Steps, others: Steps) -> bool:
    return [[contents(p) for p in step] for step in some] == [[contents(p) for p in step] for step in others]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", 31)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []
    read = FolderStore.read

    def counted(self: FolderStore, name: str, max_bytes: int) -> bytes:
        names.append(Path(name).name)
        return read(self, name, max_bytes)

    monkeypatch.setattr(FolderStore, "read", counted)
    yield names


def test_an_epoch_is_every_sample_once_and_each_epoch_in_an_order_of_its_own(corpus: Path) -> None:
    config = recipe(corpus)
    source = build_source(config, FORMAT)
    assert isinstance(source, BatchSource)
    orders = []
    for epoch in (0, 1):
        steps = list(source.steps(stage_of(config), epoch))
        assert len(steps) == source.num_steps(stage_of(config), epoch)
        assert all(len(step) == 2 for step in steps[:-1])
        orders.append([one.index for step in steps for made in step for one in made.samples])
        assert sorted(orders[-1]) == list(range(31))
        for made in itertools.chain(*steps):
            assert len(made.input_ids) == sum(made.sample_lengths) <= 400
            assert len(made.samples) <= 3
    assert orders[0] != orders[1]
    assert build_source(config, FORMAT).fingerprint() == source.fingerprint()


def test_a_resume_gives_the_same_bytes_and_opens_nothing_before_it(corpus: Path, opened: list[str]) -> None:
    config = recipe(corpus)
    source = build_source(config, FORMAT)
    whole = list(source.steps(stage_of(config), 1))
    for first in (0, 1, 3, len(whole) - 1, len(whole)):
        fresh = build_source(config, FORMAT)
        opened.clear()
        assert same(list(fresh.steps(stage_of(config), 1, first=first)), whole[first:])
        needed = [f"{one.index}.jpg" for step in whole[first:] for made in step for one in made.samples]
        assert opened == needed


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_sequence_of_one_process(world_size: int, corpus: Path) -> None:
    config = recipe(corpus)
    alone = [made for step in build_source(config, FORMAT).steps(stage_of(config), 0) for made in step]
    sources = [build_source(config, FORMAT, context=ProcessContext(rank, world_size)) for rank in range(world_size)]
    steps = [list(source.steps(stage_of(config), 0)) for source in sources]
    assert len({len(own) for own in steps}) == 1
    together = []
    for own in zip(*steps, strict=True):
        for micro in itertools.zip_longest(*own):
            together += [made for made in micro if made is not None]
    assert same([together], [alone])
    assert len({source.fingerprint() for source in sources}) == 1


def test_workers_change_nothing_not_even_the_random_numbers_of_others(corpus: Path) -> None:
    inline, ahead = recipe(corpus), recipe(corpus, num_workers=2)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    made = list(build_source(ahead, FORMAT).steps(stage_of(ahead), 2))
    assert same(made, list(build_source(inline, FORMAT).steps(stage_of(inline), 2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert inline.fingerprint() == ahead.fingerprint()


def _who_squares(number: int) -> tuple[int, int]:
    return os.getpid(), number * number


def test_a_stop_sent_to_the_whole_group_leaves_workers_at_their_work() -> None:
    """Ctrl-C and many supervisors signal every process of a run; the trainer's own handler decides what happens."""
    results = in_order(_who_squares, range(40), 2)
    found = [next(results), next(results)]
    for worker in {pid for pid, _ in found}:
        assert worker != os.getpid()
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert [square for _, square in (*found, *results)] == [number * number for number in range(40)]


_TAKES_ONE_AND_WAITS = """
import multiprocessing, os, sys, time
from model_core.demo.turns import ByTurns
from model_core.training.data.prefetch import in_order

is_ahead, both = sys.argv[1] == "ahead", multiprocessing.Barrier(2)

def work(number):
    if not is_ahead:
        both.wait()  # neither makes two of a turn
    return os.getpid(), bytes(1 << 20)  # more than a pipe holds

made = in_order(work, range(40), 2) if is_ahead else ByTurns(work, 2).in_order(range(40))
print(next(made)[0], next(made)[0], flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc")
@pytest.mark.parametrize("when", ["ahead", "by turns"])
def test_workers_of_a_killed_trainer_end(tmp_path: Path, when: str) -> None:
    """torch's own stayed for ever: woken by the death, they waited to be rid of a result that nobody took."""
    script = tmp_path / "trainer.py"
    script.write_text(_TAKES_ONE_AND_WAITS)
    with subprocess.Popen([sys.executable, str(script), when], stdout=subprocess.PIPE, text=True) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    assert len(set(workers)) == 2
    deadline = time.monotonic() + 30
    while any(map(_is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if _is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def _is_alive(pid: int) -> bool:
    """A dead one that nobody has asked for yet counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_iterator_left_early_leaves_nothing_behind(corpus: Path) -> None:
    config = recipe(corpus, num_workers=2)
    steps = build_source(config, FORMAT).steps(stage_of(config), 0)
    next(steps)
    steps.close()
    assert torch.multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_that_goes_bad_during_the_run(num_workers: int, corpus: Path) -> None:
    config = recipe(corpus, num_workers=num_workers)
    source = build_source(config, FORMAT)
    (corpus.parent / "4.jpg").unlink()
    with pytest.raises(UnreadableImagesError, match="row 5: image_not_found"):
        list(source.steps(stage_of(config), 0))
    write_corpus(corpus.parent, 31)
    config = config.model_copy(update={"bad_samples": BadSampleConfig(policy="quarantine", max_ratio=0.05)})
    source = build_source(config, FORMAT)
    (corpus.parent / "4.jpg").unlink()
    for epoch in (0, 1):
        seen = [one.index for step in source.steps(stage_of(config), epoch) for p in step for one in p.samples]
        assert sorted(seen) == [i for i in range(31) if i != 4]
    assert [one["row"] for one in source.quarantine_report()] == [5]


def test_a_pack_of_bad_samples_alone_is_left_out(corpus: Path) -> None:
    quarantine = BadSampleConfig(policy="quarantine", max_ratio=1)
    config = recipe(corpus, batch_size=1, gradient_accumulation_steps=1, bad_samples=quarantine)
    source = build_source(config, FORMAT)
    (corpus.parent / "4.jpg").unlink()
    steps = list(source.steps(stage_of(config), 0))
    assert sorted(len(step) for step in steps) == [0] + [1] * 30


def test_a_picture_of_another_size_than_planned_is_no_longer_the_same_sample(corpus: Path) -> None:
    config = recipe(corpus)
    source = build_source(config, FORMAT)
    (corpus.parent / "4.jpg").write_bytes(jpeg(size=(200, 40)))
    with pytest.raises(DataError, match="row 5: changed"):
        list(source.steps(stage_of(config), 0))


def test_fingerprints_tell_data_apart_and_paths_do_not_matter(corpus: Path, tmp_path: Path) -> None:
    prints = [build_source(recipe(corpus), FORMAT).fingerprint()]
    moved = tmp_path / "elsewhere"
    corpus.parent.rename(moved)
    assert build_source(recipe(moved / "data.json"), FORMAT).fingerprint() == prints[0]
    (moved / "0.jpg").write_bytes((moved / "1.jpg").read_bytes())
    prints.append(build_source(recipe(moved / "data.json"), FORMAT).fingerprint())
    prints.append(build_source(recipe(moved / "data.json", mixture_temperature=2.0), FORMAT).fingerprint())
    assert len(set(prints)) == 3


def two_sets(tmp_path: Path) -> list[DatasetConfig]:
    return [
        DatasetConfig(data_path=str(write_corpus(tmp_path / name, count)), name=name, weight=weight)
        for name, count, weight in (("few", 10, 3.0), ("many", 30, 1.0))
    ]


def drawn(source: BatchSource, config: TrainConfig, stage: int = 0) -> list[str]:
    return [one.dataset for step in source.steps(stage_of(config, stage), 0) for made in step for one in made.samples]


def test_datasets_are_drawn_by_weight_and_by_the_stages_own(tmp_path: Path) -> None:
    stages = [StageConfig(epochs=1), StageConfig(epochs=1, dataset_weights={"many": 1})]
    config = TrainConfig(datasets=two_sets(tmp_path), curriculum_training={"enabled": True, "stages": stages})
    source = build_source(config, FORMAT)
    assert source.dataset_names == ("few", "many")
    assert drawn(source, config).count("few") == 30
    assert drawn(source, config, 1) == ["many"] * 30
    source.prepare_stage(stage_of(config))
    config = config.model_copy(
        update={"datasets": tuple(d.model_copy(update={"weight": None}) for d in config.datasets)}
    )
    assert drawn(build_source(config, FORMAT), config).count("few") == 10


def test_a_multi_dataset_as_in_the_readme(tmp_path: Path) -> None:
    few, many = two_sets(tmp_path)
    described = {
        "type": "multi",
        "datasets": [{"type": "vqa", "args": {"data_path": few.data_path, "name": "few"}},
                     {"type": "captioning", "args": {"data_path": many.data_path, "name": "many"}}],
        "weights": [0.7, 0.3],
    }  # fmt: skip
    data = create_dataset(described)
    assert isinstance(data, MultiDataset)
    assert len(data) == 40
    assert data.conversation(12)[0].parts[1].text == "Question 2?"
    config = TrainConfig(batch_size=4)
    source = as_source(DataLoader(data, batch_size=2, shuffle=True), config, FORMAT)
    assert drawn(source, config).count("few") == 28
    del described["weights"]
    assert drawn(as_source(create_dataset(described), config, FORMAT), config).count("few") == 10
    ref = next(iter(source.steps(stage_of(config), 0)))[0].samples[0]
    assert source.conversation(ref)[0].role == "user"


A = {"type": "vqa", "args": {"data_path": "P"}}


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"type": "vqaa", "args": {"data_path": "x"}}, "Write 'vqa'"),
        ({"type": "vqa"}, "no data_path"),
        ({"type": "vqa", "args": {"data_path": "x", "imageroot": "y"}}, "Write 'image_root'"),
        ({"type": "multi", "datasets": [], "weights": []}, "at least one"),
        ({"type": "multi", "datasets": "x"}, "no list"),
        ({"type": "multi", "datasets": [{"type": "multi", "datasets": [A]}]}, "inside"),
        ({"type": "multi", "datasets": [A, A]}, "names of their own"),
        ({"type": "multi", "datasets": [A], "weights": [1, 2]}, "1 numbers"),
        ({"type": "multi", "datasets": [A], "weights": [float("nan")]}, "1 numbers"),
        ({"type": "multi", "datasets": [A], "temperature": 0}, "above 0"),
        ("vqa", "unknown type"),
    ],
)  # fmt: skip
def test_a_description_that_is_wrong_is_refused_in_words(described: Any, said: str, corpus: Path) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        return [filled(one) for one in value] if isinstance(value, list) else str(corpus) if value == "P" else value

    with pytest.raises(ConfigError, match=said):
        create_dataset(filled(described))


def test_as_source_takes_a_dataset_or_a_source_and_nothing_else(corpus: Path) -> None:
    config = recipe(corpus)
    source = as_source(DualVisionDataset(corpus), config, FORMAT)
    assert as_source(source, config, FORMAT) is source
    assert source.fingerprint() == build_source(config, FORMAT).fingerprint()
    with pytest.raises(ConfigError, match="no training data"):
        as_source([1, 2], config, FORMAT)


def test_validation_keeps_the_order_of_the_file(corpus: Path) -> None:
    config = TrainConfig(val_data_path=str(corpus), batch_size=4, mixture_temperature=3.0)
    source = build_source(config, FORMAT, split="val")
    seen = [one.index for step in source.steps(stage_of(config), 0) for made in step for one in made.samples]
    assert seen == list(range(31))
    with pytest.raises(ConfigError, match="no validation data"):
        build_source(TrainConfig(), FORMAT, split="val")


def test_a_sample_longer_than_a_pack_is_refused_and_never_cut(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.json", [row(None), row(None, "Long?", "word " * 100)])
    with pytest.raises(DataError, match="row 2: too_long"):
        build_source(recipe(path), FORMAT)


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        ProcessContext(2, 2)
