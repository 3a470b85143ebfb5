"""Parquet files and folders as the datasets library saves them, through pyarrow."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model_core import DualVisionDataset
from model_core.errors import ConfigError, DataError, DataFormatError, ImageNotFoundError
from model_core.training.data import columns
from tests.model_core.training.data.corpus import jpeg


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """As the hub has them: pictures as bytes with a name, the turns as a list of structs."""
    return [
        {
            "image": {"bytes": jpeg((i, 0, 0)), "path": f"{i}.jpg"},
            "messages": [{"role": "user", "content": f"{i}?", "weight": None},
                         {"role": "assistant", "content": f"No {i}."}],
        }
        for i in range(first, first + count)
    ]  # fmt: skip


def table(first: int, count: int) -> pa.Table:
    return pa.Table.from_pylist(rows(first, count))


def check(data: DualVisionDataset, count: int) -> None:
    assert len(data) == count
    for i in (0, count // 2, count - 1):
        question, answer = data.conversation(i)
        assert question.parts[0].image == jpeg((i, 0, 0))
        assert (question.parts[1].text, answer.parts[0].text) == (f"{i}?", f"No {i}.")
        assert data.place(i).row == i + 1


def saved_to_disk(folder: Path) -> Path:
    """The layout of `save_to_disk`, in two shards of several batches."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for number, name in enumerate(names):
        part = table(5 * number, 5)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_parquet_alone_and_in_a_folder(tmp_path: Path) -> None:
    pq.write_table(table(0, 9), tmp_path / "one.parquet", row_group_size=4)
    check(DualVisionDataset(tmp_path / "one.parquet"), 9)
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for i in range(2):
        pq.write_table(table(4 * i, 4), hub / f"train-0000{i}-of-00002.parquet")
    check(DualVisionDataset(tmp_path / "hub"), 8)
    pq.write_table(table(0, 1), hub / "test-00000-of-00001.parquet")
    with pytest.raises(DataFormatError, match="several splits"):
        DualVisionDataset(tmp_path / "hub")


def test_a_saved_data_set_its_splits_and_another_process(tmp_path: Path) -> None:
    data = DualVisionDataset(saved_to_disk(tmp_path / "all" / "train"))
    check(data, 10)
    check(pickle.loads(pickle.dumps(data)), 10)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    check(DualVisionDataset(tmp_path / "all"), 10)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataFormatError, match="train, test"):
        DualVisionDataset(tmp_path / "all")


def test_a_selection_of_rows_is_not_taken_for_all_of_them(tmp_path: Path) -> None:
    folder = saved_to_disk(tmp_path / "saved")
    state = json.loads((folder / "state.json").read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataFormatError, match="flatten_indices"):
        DualVisionDataset(folder)


def test_paths_in_a_table_are_looked_up_beside_it(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg())
    named = [{"image": name, "caption": "A car."} for name in ("1.jpg", "2.jpg")]
    pq.write_table(pa.Table.from_pylist(named), tmp_path / "data.parquet")
    data = DualVisionDataset(tmp_path / "data.parquet")
    assert data.conversation(0)[0].parts[0].image.read(10**6) == jpeg()
    with pytest.raises(ImageNotFoundError):
        data.conversation(1)[0].parts[0].image.read(10**6)


@pytest.mark.parametrize("text", [b"PAR1 but no more", b"ARROW1\0\0 neither"])
def test_a_damaged_table_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(text)
    with pytest.raises(DataFormatError, match="can't be read"):
        DualVisionDataset(tmp_path / "data")


def test_parquet_beyond_memory_and_an_empty_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(0, 9), tmp_path / "one.parquet")
    monkeypatch.setattr(columns, "MAX_PARQUET_BYTES", 100)
    with pytest.raises(DataFormatError, match="save_to_disk"):
        DualVisionDataset(tmp_path / "one.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data set"):
        DualVisionDataset(tmp_path / "empty")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(0, 1), tmp_path / "one.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"dual-vision-encoder\[train\]"):
        DualVisionDataset(tmp_path / "one.parquet")
