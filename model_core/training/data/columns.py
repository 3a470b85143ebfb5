"""Rows of Parquet files and of a saved Hugging Face data set, through pyarrow (the `train` extra).

In: a file or a folder; out: records as dictionaries by index. Arrow files are mapped into memory and cost nothing until
they are read; Parquet can't be read by row, so it is unpacked into memory once, up to a limit.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from model_core.errors import ConfigError, DataFormatError, RecordError
from model_core.training.data.rows import Rows

#: Of all Parquet files of a data set together, unpacked.
MAX_PARQUET_BYTES = 16 << 30
_STATE, _SPLITS = "state.json", "dataset_dict.json"


class ColumnRows(Rows):
    """Rows of record batches. Sent to another process, the files are opened anew."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self._paths = name, tuple(paths)
        self._batches = [batch for path in paths for batch in _batches_of(path)]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __reduce__(self) -> tuple[Any, ...]:
        return ColumnRows, (self.name, self._paths)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> Any:
        place = bisect_right(self._ends, index)
        first = self._ends[place - 1] if place else 0
        try:
            return self._batches[place].slice(index - first, 1).to_pylist()[0]
        except (ValueError, OSError) as error:  # what pyarrow's own errors are
            raise RecordError(
                "damaged_table", f"the row can't be read ({error})", fix="Write the table again"
            ) from error


def rows_of_table(path: Path) -> ColumnRows:
    """A Parquet or Arrow file, a folder of Parquet files of one split, or a folder that `save_to_disk` wrote.

    Raises:
        DataFormatError: it is none of these, or holds several splits; ConfigError: pyarrow is not installed.
    """
    if path.is_file():
        return _open(path.name, [path])
    if (path / _SPLITS).is_file():
        splits = [str(name) for name in _json(path / _SPLITS).get("splits", [])]
        if len(splits) != 1:
            raise _several(path, splits)
        path = path / Path(splits[0]).name
    if (path / _STATE).is_file():
        return _open(path.name, _saved_files(path))
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if not found:
        raise DataFormatError(
            "the folder holds no data set", value=str(path),
            allowed="a folder that datasets' save_to_disk wrote, or one with Parquet files",
            fix="Name the JSON, JSON-lines or zip file itself",
        )  # fmt: skip
    splits = sorted({one.name.split("-")[0] for one in found}) if len(found) > 1 else []
    if len(splits) > 1:
        raise _several(path, splits)
    return _open(path.name, found)


def _open(name: str, paths: Sequence[Path]) -> ColumnRows:
    try:
        import pyarrow as pa  # noqa: PLC0415  an extra, loaded where such a file is named
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "Parquet files and datasets folders are read with pyarrow, which is not installed", value=name,
            allowed="JSON, JSON lines or a zip without it", fix="Install it: pip install 'dual-vision-encoder[train]'",
            param="data_path",
        ) from error  # fmt: skip
    try:
        parquet = [path for path in paths if path.suffix == ".parquet"]
        size = sum(_unpacked_bytes(pq.read_metadata(path)) for path in parquet)
        if size > MAX_PARQUET_BYTES:
            raise DataFormatError(
                "the Parquet files are too large to be unpacked into memory", value=f"{size} bytes",
                allowed=f"{MAX_PARQUET_BYTES} bytes",
                fix="Load them with the datasets library and save_to_disk: such a folder is read where it lies",
            )  # fmt: skip
        return ColumnRows(name, paths)
    except (OSError, pa.ArrowException) as error:
        raise DataFormatError(
            f"the table can't be read ({error})", value=name, allowed="whole Parquet or Arrow files",
            fix="Copy or write it again",
        ) from error  # fmt: skip


def _batches_of(path: Path) -> list[Any]:
    import pyarrow as pa  # noqa: PLC0415  `_open` has said so where it is missing
    import pyarrow.parquet as pq  # noqa: PLC0415

    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_batches())
    mapped = pa.memory_map(str(path))
    try:
        return list(pa.ipc.open_stream(mapped).read_all().to_batches())
    except pa.ArrowInvalid:
        mapped.seek(0)
        return list(pa.ipc.open_file(mapped).read_all().to_batches())


def _unpacked_bytes(metadata: Any) -> int:
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


def _saved_files(folder: Path) -> list[Path]:
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise DataFormatError(
            "the saved data set is a selection of rows over its files", value=str(folder),
            allowed="files that are the rows", fix="Save it after flatten_indices()",
        )  # fmt: skip
    return [folder / Path(str(one["filename"])).name for one in state.get("_data_files", [])]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFormatError(
            "a file of the data set can't be read", value=str(path), allowed="JSON",
            fix="Copy the folder again, or write it with save_to_disk",
        ) from error  # fmt: skip
    return found if isinstance(found, dict) else {}


def _several(path: Path, splits: Sequence[str]) -> DataFormatError:
    return DataFormatError(
        "the folder holds several splits", value=", ".join(splits) or str(path), allowed="one",
        fix="Name the split's own folder or file as data_path",
    )  # fmt: skip
