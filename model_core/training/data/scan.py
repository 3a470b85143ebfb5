"""One pass over a data set before anything trains: what each row is good for, and how long it is.

In: a data set; out: a `ScanReport` with every bad row by its number, lengths for the packer, and a digest of all that
was seen. Headers and ends of pictures are read, pixels are not, unless that is asked for. It draws and packs nothing.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_core.errors import InputError, RecordError
from model_core.processing.batch import InputFormat, num_vision_tokens
from model_core.processing.chat import encode_chat
from model_core.processing.images import ImageLimits, PatchSpec, check_complete, decode_source, stated_mode
from model_core.processing.media import Medium, PlannedMedium, plan_media
from model_core.training.data.collate import check_length, count_labels, trained_labels
from model_core.training.data.datasets import DualVisionDataset, Sample
from model_core.training.data.prefetch import in_order
from model_core.types import TextPart

_ROWS_AT_ONCE = 64
_DIGEST_BYTES = 16
_NOTES = {"CMYK": "CMYK, converted without a profile", "I;16": "16 bits, rescaled to 8", "I": "32 bits, rescaled to 8"}

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class RowProblem:
    """index: from 0. file, row: where an editor finds it. An error keeps the row from training; the others don't."""

    dataset: str
    index: int
    file: str
    row: int
    severity: Severity
    code: str
    message: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Of what `to_json` gave; more keys may stand beside."""
        return cls(**{one.name: content[one.name] for one in fields(cls)})

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.code}: {self.message}"


@dataclass(frozen=True, slots=True)
class Checks:
    """fmt: None leaves out what needs a tokenizer: lengths and labels. decode: every pixel too, which takes longer."""

    limits: ImageLimits
    fmt: InputFormat | None = None
    max_tokens: int = 0
    decode: bool = False


@dataclass(frozen=True, slots=True)
class RowScan:
    """What one row came to; length 0 where it can't be used or was not measured."""

    length: int
    num_labels: int
    digest: bytes
    found: tuple[tuple[Severity, str, str], ...]


@dataclass(frozen=True, slots=True)
class ScanReport:
    """lengths, num_labels: (R,) tokens and labels of each row, 0 where it is bad. row_digests: (R, 16) bytes, zeros
    there. digest: of all rows' contents."""

    dataset: str
    num_rows: int
    lengths: NDArray[np.int64]
    num_labels: NDArray[np.int64]
    problems: tuple[RowProblem, ...]
    row_digests: NDArray[np.uint8]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.row_digests[self.row_digests.any(axis=1)].tobytes()).hexdigest()

    @property
    def errors(self) -> list[RowProblem]:
        return [one for one in self.problems if one.severity == "error"]

    @property
    def usable(self) -> NDArray[np.int64]:
        """Indices of the rows that can train."""
        bad = {one.index for one in self.errors}
        return np.array([i for i in range(self.num_rows) if i not in bad], dtype=np.int64)

    def planned(self, index: int) -> dict[str, Any] | None:
        """What a row is planned by, as JSON; None where it is bad."""
        length = int(self.lengths[index])
        return {"length": length, "digest": self.row_digests[index].tobytes().hex()} if length else None

    def restored(self, rows: Mapping[int, Mapping[str, Any]]) -> ScanReport:
        """This with some rows, by index, as an earlier report had `planned` them, whatever became of them since."""
        lengths, digests = self.lengths.copy(), self.row_digests.copy()
        for index, planned in rows.items():
            lengths[index] = planned["length"]
            digests[index] = np.frombuffer(bytes.fromhex(planned["digest"]), np.uint8)
        problems = tuple(one for one in self.problems if one.severity != "error" or one.index not in rows)
        return replace(self, lengths=lengths, row_digests=digests, problems=problems)

    def to_json(self) -> dict[str, Any]:
        """Counts, and every problem."""
        return {
            "dataset": self.dataset,
            "rows": self.num_rows,
            "usable": self.num_rows - len(self.errors),
            "tokens": int(self.lengths.sum()),
            "label_tokens": int(self.num_labels.sum()),
            "problems": [one.to_json() for one in self.problems],
        }


def scan(
    dataset: DualVisionDataset, checks: Checks, *, num_workers: int = 0, max_rows: int | None = None
) -> ScanReport:
    """Look at every row, or at the first `max_rows`."""
    num = len(dataset) if max_rows is None else min(len(dataset), max_rows)
    chunks = [range(start, min(start + _ROWS_AT_ONCE, num)) for start in range(0, num, _ROWS_AT_ONCE)]
    rows: list[RowScan] = []
    for some in in_order(functools.partial(_examine_all, dataset, checks), chunks, num_workers):
        rows += some
    digests = b"".join(row.digest or bytes(_DIGEST_BYTES) for row in rows)
    return ScanReport(
        dataset.name,
        num,
        np.array([row.length for row in rows], dtype=np.int64),
        np.array([row.num_labels for row in rows], dtype=np.int64),
        tuple(_problems(dataset, rows)),
        np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST_BYTES),
    )


def row_problem(dataset: DualVisionDataset, index: int, severity: Severity, code: str, message: str) -> RowProblem:
    place = dataset.place(index)
    return RowProblem(dataset.name, index, place.file, place.row, severity, code, message)


def reason_of(error: InputError | RecordError) -> str:
    """One word for what is wrong with a row."""
    return error.reason if isinstance(error, RecordError) else error.code


def _problems(dataset: DualVisionDataset, rows: Sequence[RowScan]) -> Iterator[RowProblem]:
    first: dict[bytes, int] = {}
    for index, row in enumerate(rows):
        for severity, code, message in row.found:
            yield row_problem(dataset, index, severity, code, message)
        if row.digest and (seen := first.setdefault(row.digest, index)) != index:
            there = dataset.place(seen)
            yield row_problem(
                dataset, index, "warning", "duplicate", f"the same turns and images as {there.file} row {there.row}"
            )


def _examine_all(dataset: DualVisionDataset, checks: Checks, indices: Sequence[int]) -> list[RowScan]:
    return [examine(dataset, index, checks) for index in indices]


def examine(dataset: DualVisionDataset, index: int, checks: Checks) -> RowScan:
    """Everything about one row that can be known without its pixels."""
    near: list[tuple[Severity, str, str]] = [("warning", "near_key", text) for text in dataset.near_keys(index)]
    try:
        sample = dataset.sample(index)
        spec = checks.fmt.patches if checks.fmt else PatchSpec()
        planned = plan_media(_media(sample), spec, checks.limits, allow_paths=False)
        sources = [source for one in planned for source in one.sources]
        for source in sources:
            if isinstance(source, bytes):
                check_complete(source, checks.limits)
            if checks.decode:
                decode_source(source, checks.limits)
        length, num_labels = _measure(sample, planned, checks)
    except (InputError, RecordError) as error:
        return RowScan(0, 0, b"", (("error", reason_of(error), str(error)), *near))
    notes = dict.fromkeys(note for source in sources if (note := _note(source)))
    found = (*near, *(("note", "converted", note) for note in notes))
    return RowScan(length, num_labels, _digest(sample, sources), found)


def _media(sample: Sample) -> list[tuple[str, Medium]]:
    return [
        (f"turn {m + 1}", part)
        for m, message in enumerate(sample.messages)
        for part in message.parts
        if not isinstance(part, TextPart)
    ]


def _measure(sample: Sample, planned: Sequence[PlannedMedium], checks: Checks) -> tuple[int, int]:
    if checks.fmt is None:
        return 0, 0
    chat = encode_chat(checks.fmt.tokenizer, sample.messages, add_generation_prompt=False)
    labels = trained_labels(chat, sample, checks.fmt.special)
    counts = [num_vision_tokens(one.grid, checks.fmt) for one in planned]
    return check_length(chat, labels, counts, checks.max_tokens), count_labels(labels)


def _note(source: bytes | Image.Image) -> str:
    if isinstance(source, Image.Image):
        return _NOTES.get(source.mode, "")
    if source.startswith(b"\x89PNG") and source[24] == 16:
        return _NOTES["I;16"]
    return _NOTES.get(stated_mode(source), "")


def _digest(sample: Sample, sources: Sequence[bytes | Image.Image]) -> bytes:
    """Of all that could change what the row teaches: framed, so that no two rows can be written the same way."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    pictures = iter(sources)
    for message, is_trained in zip(sample.messages, sample.trained, strict=True):
        _feed(digest, f"{message.role} {is_trained} {len(message.parts)}".encode())
        for part in message.parts:
            if isinstance(part, TextPart):
                _feed(digest, part.text.encode("utf-8", "surrogatepass"))
    for source in pictures:
        _feed(digest, source if isinstance(source, bytes) else source.tobytes())
    return digest.digest()


def _feed(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
