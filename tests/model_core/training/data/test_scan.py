"""A corrupt corpus: the report names each row, by number and reason, before anything trains."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_core import DualVisionDataset
from model_core.errors import BadSampleBudgetError, DataError, UnreadableImagesError
from model_core.processing.images import ImageLimits
from model_core.training.config import BadSampleConfig, TrainConfig
from model_core.training.data.bad_samples import Quarantine
from model_core.training.data.packs import BatchSource, SampleRef
from model_core.training.data.scan import Checks, RowProblem, scan
from model_core.training.data.source import build_source, quarantine_of, restore_quarantine
from tests.model_core.training.data.corpus import jpeg, row, tiny_format, write_corpus, write_rows

FORMAT = tiny_format()


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def cmyk() -> bytes:
    """Red: no cyan, all magenta and yellow, no black."""
    return saved(Image.new("CMYK", (80, 60), (0, 255, 255, 0)), "JPEG")


def deep_grey() -> bytes:
    """40000 of 65535, which Pillow's own conversion makes white."""
    return saved(Image.fromarray(np.full((60, 80), 40000, np.uint16)), "PNG")


def late_damage(picture: bytes) -> bytes:
    """A header and an end as before, and pixels that can't be decoded."""
    data = bytearray(picture)
    at = data.index(b"\xff\xc4") + 4
    data[at : at + 16] = b"\xf0" * 16  # more Huffman codes than bits
    return bytes(data)


def corrupt_corpus(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    files = {
        "good.jpg": jpeg(), "cut.jpg": saved(Image.fromarray(noise), "JPEG")[:-100], "cmyk.jpg": cmyk(),
        "thin.png": saved(Image.new("RGB", (804, 4)), "PNG"), "deep.png": deep_grey(), "text.jpg": b"not a picture",
        "empty.jpg": b"",
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = [
        row("good.jpg"), row("cut.jpg"), row("thin.png"), row("cmyk.jpg"), row("deep.png"), row("missing.jpg"),
        row("good.jpg", "Well?", "  "), {"image": "good.jpg", "conversations": [{"role": "robot", "content": "x"}]},
        row("good.jpg"), row("text.jpg"), row("empty.jpg"), row("good.jpg", "Long?", "word " * 200),
        row("../outside.jpg"), "no object",
    ]  # fmt: skip
    return write_rows(folder / "data.jsonl", rows)


FOUND = {
    2: ("error", "image_parse_error"), 3: ("error", "image_too_large"), 4: ("note", "converted"),
    5: ("note", "converted"), 6: ("error", "image_not_found"), 7: ("error", "empty_answer"),
    8: ("error", "invalid_role"), 9: ("warning", "duplicate"), 10: ("error", "image_parse_error"),
    11: ("error", "empty_image_file"), 12: ("error", "too_long"), 13: ("error", "outside_root"),
    14: ("error", "invalid_record"),
}  # fmt: skip


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_report_names_each_row(num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DualVisionDataset(corrupt_corpus(tmp_path))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a pixel was decoded"))
    report = scan(data, Checks(FORMAT.limits, FORMAT, max_tokens=600), num_workers=num_workers)
    assert {one.row: (one.severity, one.code) for one in report.problems} == FOUND
    assert report.usable.tolist() == [0, 3, 4, 8]
    assert [bool(length) for length in report.lengths] == [i in (0, 3, 4, 8) for i in range(14)]
    by_row = {one.row: one for one in report.problems}
    assert "row 1" in by_row[9].message
    assert str(by_row[6]).startswith("data.jsonl row 6: image_not_found: ")
    assert json.loads(json.dumps(report.to_json()))["usable"] == 4


def test_without_a_tokenizer_all_but_lengths_is_checked(tmp_path: Path) -> None:
    report = scan(DualVisionDataset(corrupt_corpus(tmp_path)), Checks(ImageLimits()))
    without = {number: found for number, found in FOUND.items() if found[1] != "too_long"}
    assert {one.row: (one.severity, one.code) for one in report.problems} == without
    assert not report.lengths.any()


def test_damage_inside_a_picture_takes_decoding_to_find(tmp_path: Path) -> None:
    corrupt_corpus(tmp_path)
    (tmp_path / "late.jpg").write_bytes(late_damage(jpeg()))
    dataset = DualVisionDataset(write_rows(tmp_path / "late.json", [row("late.jpg")]))
    assert not scan(dataset, Checks(FORMAT.limits, FORMAT, 600)).errors
    assert scan(dataset, Checks(FORMAT.limits, FORMAT, 600, decode=True)).errors[0].code == "image_parse_error"


def test_max_rows_looks_no_further(tmp_path: Path) -> None:
    report = scan(DualVisionDataset(corrupt_corpus(tmp_path)), Checks(ImageLimits()), max_rows=3)
    assert [one.row for one in report.problems] == [2, 3]
    assert report.num_rows == 3


def test_cmyk_and_deep_grey_train_in_their_right_colours(tmp_path: Path) -> None:
    corrupt_corpus(tmp_path)
    write_rows(tmp_path / "good.json", [row("cmyk.jpg"), row("deep.png")])
    config = TrainConfig(train_data_path=str(tmp_path / "good.json"), batch_size=2, max_tokens=600)
    source = build_source(config, FORMAT)
    (step,) = source.steps(config.stages()[0], 0)
    made = step[0]
    size = len(made.pixels) // 2
    order = [one.index for one in made.samples]
    shown = {index: made.pixels[i * size : (i + 1) * size].reshape(size, 3, -1) for i, index in enumerate(order)}
    red = shown[0].mean(axis=(0, 2))
    assert red[0] > 200
    assert max(red[1:]) < 60
    assert np.abs(shown[1].astype(int) - round(40000 / 257)).max() <= 1


def recipe(path: Path, **settings: object) -> TrainConfig:
    return TrainConfig(train_data_path=str(path), max_tokens=600, **settings)


def test_fail_names_the_rows_and_nothing_can_train(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build_source(recipe(corrupt_corpus(tmp_path)), FORMAT)
    assert caught.value.code == "invalid_training_file"
    said = str(caught.value)
    for number, (severity, code) in FOUND.items():
        assert (f"row {number}: {code}" in said) == (severity == "error")
    assert [one["row"] for one in caught.value.problems] == [n for n, found in FOUND.items() if found[0] == "error"]
    rows = [row("good.jpg"), row("cut.jpg"), row("missing.jpg")]
    with pytest.raises(UnreadableImagesError) as images:
        build_source(recipe(write_rows(tmp_path / "images.json", rows)), FORMAT)
    assert images.value.code == "image_unreadable"


def test_quarantine_trains_on_the_rest_and_keeps_its_budget(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, 20)
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "7.jpg").write_bytes(jpeg()[:-20])
    config = recipe(path, bad_samples=BadSampleConfig(policy="quarantine", max_ratio=0.1))
    source = build_source(config, FORMAT)
    seen = [one.index for step in source.steps(config.stages()[0], 0) for made in step for one in made.samples]
    assert sorted(seen) == [i for i in range(20) if i not in (3, 7)]
    assert [(one["row"], one["code"]) for one in source.quarantine_report()] == [
        (4, "image_not_found"), (8, "image_parse_error")]  # fmt: skip
    (tmp_path / "9.jpg").unlink()
    with pytest.raises(BadSampleBudgetError, match="3 of 20"):
        build_source(config, FORMAT)


def test_a_row_counts_once_however_often_it_comes() -> None:
    kept = Quarantine(BadSampleConfig(policy="quarantine", max_ratio=0.1), 10)
    bad = RowProblem("data", 3, "data.json", 4, "error", "image_not_found", "gone")
    for _ in range(5):
        kept.add([bad])
    assert len(kept.report()) == 1
    with pytest.raises(BadSampleBudgetError):
        kept.add([RowProblem("data", 4, "data.json", 5, "error", "image_not_found", "gone")])


def samples_of(source: BatchSource, config: TrainConfig) -> list[list[tuple[SampleRef, ...]]]:
    return [[made.samples for made in step] for step in source.steps(config.stages()[0], 0)]


DAMAGE = {"gone": None, "cut": jpeg()[:-20], "late": late_damage(jpeg()), "of another size": jpeg(size=(200, 40))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_row_that_went_bad_in_a_run_is_planned_as_before_by_its_next_process(tmp_path: Path, damage: str) -> None:
    """Else its own data would be refused, or its packs be others. What was set aside goes on counting."""
    path, picture = write_corpus(tmp_path, 20), tmp_path / "3.jpg"
    picture.write_bytes(jpeg())
    config = recipe(path, batch_size=3, bad_samples=BadSampleConfig(policy="quarantine", max_ratio=0.1))
    first = build_source(config, FORMAT)
    before = first.fingerprint()
    picture.unlink() if DAMAGE[damage] is None else picture.write_bytes(DAMAGE[damage])
    whole = samples_of(first, config)
    kept = json.loads(json.dumps(quarantine_of(first, None)))
    assert [[one["row"] for one in rows] for rows in kept] == [[4], []]
    second = build_source(config, FORMAT)
    assert second.fingerprint() != before
    restore_quarantine(kept, second, None)
    assert second.fingerprint() == before
    assert samples_of(second, config) == whole
    assert second.quarantine_report() == first.quarantine_report() and quarantine_of(second, None) == kept
    for name in ("7.jpg", "9.jpg"):
        (tmp_path / name).unlink()
    with pytest.raises(BadSampleBudgetError, match="3 of 20"):
        samples_of(second, config)


def test_a_row_that_is_good_again_trains_and_another_picture_in_its_place_is_other_data(tmp_path: Path) -> None:
    path, picture = write_corpus(tmp_path, 20), tmp_path / "3.jpg"
    config = recipe(path, bad_samples=BadSampleConfig(policy="quarantine", max_ratio=0.1))
    source, good = build_source(config, FORMAT), picture.read_bytes()
    picture.unlink()
    assert len(samples_of(source, config)) == 20
    for data, is_same in ((good, True), (jpeg((1, 2, 3), (68, 60)), False)):
        picture.write_bytes(data)
        again = build_source(config, FORMAT)
        restore_quarantine(quarantine_of(source), again)
        assert (again.fingerprint() == source.fingerprint()) == is_same
        assert [one["row"] for one in again.quarantine_report()] == [4]
        assert len([ref for step in samples_of(again, config) for refs in step for ref in refs]) == 20


def test_what_the_scan_itself_finds_is_not_kept_beside_it(tmp_path: Path) -> None:
    """It is found again at every start; a recipe may set aside more rows than a checkpoint should list."""
    path = write_corpus(tmp_path, 20)
    (tmp_path / "3.jpg").unlink()
    config = recipe(path, bad_samples=BadSampleConfig(policy="quarantine", max_ratio=0.1))
    source = build_source(config, FORMAT)
    assert len(source.quarantine_report()) == 1 and quarantine_of(source) == [[]]
