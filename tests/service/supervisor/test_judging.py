"""Verdicts on ends, reports on files, results as CSV, what a shortage of memory says: all pure."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from model_core.errors import CheckpointIncompleteError, ConfigError
from service.supervisor.attempts import JobFolder
from service.supervisor.check_report import judge_report, read_report
from service.supervisor.results import COLUMNS, result_csv
from service.supervisor.verdict import BROKEN, Verdict, backoff_seconds, judge, of_os_error, of_refusal
from service.supervisor.workshop import describe_shortage


@pytest.mark.parametrize(
    ("exit_code", "complaint", "end", "code"),
    [
        (0, None, "succeeded", ""),
        (75, None, "stopped", ""),
        (78, {"code": "image_unreadable", "retry": False}, "failed", "image_unreadable"),
        (78, {"code": "invalid_config", "retry": False}, "failed", "invalid_training_file"),
        (78, None, "failed", "invalid_training_file"),
        (79, None, "retry", "worker_lost"),
        (1, {"code": "out_of_memory", "retry": True}, "retry", "out_of_memory"),
        (1, {"code": "nan_loss", "retry": False}, "failed", "nan_loss"),
        (1, {"code": "training_failed", "retry": True}, "retry", "worker_lost"),
        (1, {"code": "storage_full", "retry": True}, "failed", "storage_full"),
        (78, {"code": "checkpoint_incomplete"}, "failed", "checkpoint_corrupt"),
        (1, None, "retry", "worker_lost"),
        (74, None, "failed", "storage_full"),
        (74, {"code": "nan_loss", "retry": False}, "failed", "storage_full"),
        (-9, None, "retry", "worker_lost"),
        (-200, {"code": "made_up"}, "retry", "worker_lost"),
    ],
)
def test_what_an_end_means(exit_code: int, complaint: dict[str, object] | None, end: str, code: str) -> None:
    verdict = judge(exit_code, complaint, "said")
    assert (verdict.end, verdict.code) == (end, code)


def test_an_unexpected_exceptions_text_is_not_shown() -> None:
    verdict = judge(1, {"code": "internal_error", "retry": True}, "KeyError: 'a user wrote this'")
    assert verdict == Verdict("retry", "internal_error", BROKEN)


def test_a_full_disk_is_told_as_such_and_other_failures_are_tried_again() -> None:
    assert of_os_error(OSError(errno.ENOSPC, "full")).code == "storage_full"
    assert of_os_error(OSError(errno.EACCES, "no")).end == "retry"
    assert of_refusal(CheckpointIncompleteError("gone")).code == "checkpoint_corrupt"
    assert of_refusal(ConfigError("odd")) == Verdict("failed", "invalid_training_file", "odd.")


def test_backoff_doubles_up_to_its_limit() -> None:
    assert [backoff_seconds(n, base=2, limit=10) for n in range(5)] == [2, 2, 4, 8, 10]
    assert backoff_seconds(10**6, base=2, limit=10) == 10


PROBLEMS = [
    {"index": 2, "row": 3, "severity": "error", "code": "image_not_found", "message": "a.png"},
    {"index": 4, "row": 5, "severity": "warning", "code": "duplicate", "message": "as row 1"},
]


@pytest.mark.parametrize(
    ("bad_samples", "end", "code"),
    [
        (None, "failed", "image_unreadable"),
        ({"policy": "fail", "max_ratio": 0.5}, "failed", "image_unreadable"),
        ({"policy": "quarantine", "max_ratio": 0.1}, "succeeded", ""),
        ({"policy": "quarantine", "max_ratio": 0.05}, "failed", "bad_sample_budget_exceeded"),
    ],
)
def test_what_a_report_means(bad_samples: dict[str, object] | None, end: str, code: str) -> None:
    report = {"rows": 10, "usable": 9, "problems": PROBLEMS}
    verdict, short = judge_report(78, report, "file-1", {"bad_samples": bad_samples})
    assert (verdict.end, verdict.code) == (end, code)
    assert short["problems"] == {"image_not_found": 1, "duplicate": 1}
    assert short["examples"] == ["row 3: image_not_found: a.png"]
    if code == "image_unreadable":
        assert verdict.message == "1 of 10 rows can't be used: row 3: image_not_found: a.png"


def test_a_reader_that_refuses_the_file_or_breaks(tmp_path: Path) -> None:
    refused = {"valid": False, "code": "invalid_file_format", "error": "no zip"}
    assert judge_report(78, refused, "f", {})[0] == Verdict("failed", "invalid_file_format", "no zip")
    (tmp_path / "cut").write_text('{"valid": tr')
    assert judge_report(-9, read_report(tmp_path / "cut"), "f", {})[0].end == "retry"


def test_results_hold_each_step_once(tmp_path: Path) -> None:
    def line(step: int, kind: str, **data: object) -> str:
        return json.dumps({"stage": 0, "global_step": step, "kind": kind, "data": data}) + "\n"

    (tmp_path / "a").write_text(line(1, "step", loss=2.0) + line(2, "step", loss=1.5))
    (tmp_path / "b").write_text(
        line(2, "step", loss=9.0) + line(2, "evaluation", val_loss=1.0, val_accuracy=0.5) + line(3, "step", loss=None)
    )
    rows = result_csv([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert rows == [",".join(COLUMNS), "1,2.0,,,", "2,1.5,,1.0,0.5", "3,,,,"]


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    from model_core.manifest import write_folder

    job = JobFolder(tmp_path)
    for attempt, step in ((1, 4), (1, 8), (2, 8)):
        write_folder(job.attempt(attempt) / f"step-{step}", lambda f: (f / "x").touch(), extra={"stage": 1})
    (job.attempt(2) / "step-12").mkdir()
    (job.attempt(2) / ".step-16.0123abcd.tmp").mkdir()
    (job.attempt(1) / "checkpoint_latest").symlink_to("step-8")
    found = job.steps()
    assert [(s.step, s.attempt) for s in found] == [(8, 2), (8, 1), (4, 1)]
    assert found[0].note == {"stage": 1}
    job.open_attempt(3)
    assert not (job.attempt(2) / ".step-16.0123abcd.tmp").exists()
    job.set_aside(found[0].path)
    assert [(s.step, s.attempt) for s in job.steps()] == [(8, 1), (4, 1)]


def test_what_earlier_attempts_saved_and_nobody_needs_is_surplus(tmp_path: Path) -> None:
    from model_core.manifest import write_folder

    job = JobFolder(tmp_path)
    for attempt, step, reason in ((1, 2, "best"), (1, 4, "stage"), (1, 6, "epoch"), (1, 7, "epoch"), (2, 8, "every")):
        write_folder(job.attempt(attempt) / f"step-{step}", lambda f: (f / "x").touch(), extra={"reason": reason})
    (job.attempt(2) / "best").symlink_to(Path("..") / "attempt-1" / "step-6")
    assert [path.name for path in job.surplus(2)] == ["step-7"]
    # An attempt that only finished what another one had saved leaves its last step.
    assert [path.name for path in job.surplus(3)] == ["step-7", "step-6"]


def test_a_shortage_says_what_is_missing_and_what_would_fit() -> None:
    modes = [
        {"name": "stage 0: full", "asked": True, "fits": False, "fitting_max_tokens": 1024},
        {"name": "full", "asked": False, "fits": False, "fitting_max_tokens": 1024},
        {"name": "fusion_only", "asked": False, "fits": True, "fitting_max_tokens": 4096},
    ]
    report = {"available_bytes": 10 << 30, "needed_bytes": 64 << 30, "training": modes}
    text = describe_shortage(report, 0, 80 << 30)
    assert "needs 64.0 GiB, GPU 0 has 10.0 of 80.0 GiB free" in text
    assert "training_mode fusion_only, max_tokens 1024" in text
