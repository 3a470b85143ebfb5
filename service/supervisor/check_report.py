"""What the report on a training file means for its job.

In: the JSON that `dve data validate --json` prints, its exit code, the recipe's policy for bad samples. Out: a verdict
with rows by their numbers, and a short form of the report for the job's events.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.supervisor.process import BAD_INPUT, DONE
from service.supervisor.verdict import Verdict, judge

_MAX_REPORT_BYTES = 64 << 20
_SHOWN = 5
_UNREADABLE = ("image_", "empty_image", "unsupported_image", "invalid_image", "invalid_base64")


def read_report(path: Path) -> Mapping[str, Any]:
    """The one JSON object of a reader's output; empty where it printed none."""
    if path.stat().st_size > _MAX_REPORT_BYTES:
        return {}
    try:
        report = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def judge_report(
    exit_code: int, report: Mapping[str, Any], file_id: str, recipe: Mapping[str, Any]
) -> tuple[Verdict, Mapping[str, Any]]:
    """The verdict on one file, and what to keep of its report."""
    problems = [one for one in report.get("problems", ()) if isinstance(one, dict)]
    errors = [one for one in problems if one.get("severity", "error") == "error"]
    short = {
        "file": file_id,
        "rows": report.get("rows"),
        "usable": report.get("usable"),
        "problems": dict(Counter(str(one.get("code")) for one in problems)),
        "examples": [_line(one) for one in errors[:_SHOWN]],
    }
    if exit_code == DONE:
        return Verdict("succeeded"), short
    if exit_code != BAD_INPUT or not errors:
        return judge(exit_code, report, str(report.get("error", ""))), short
    bad, rows = len({one.get("index", one.get("row")) for one in errors}), int(report.get("rows") or 0)
    policy = recipe.get("bad_samples") or {}
    if policy.get("policy") == "quarantine":
        allowed = float(policy.get("max_ratio", 0.0))
        if bad <= allowed * rows:
            return Verdict("succeeded"), short
        message = f"{bad} of {rows} rows can't be used, and {allowed:.1%} may be set aside: {_lines(errors)}"
        return Verdict("failed", "bad_sample_budget_exceeded", message), short
    only_images = all(str(one.get("code", "")).startswith(_UNREADABLE) for one in errors)
    code = "image_unreadable" if only_images else "invalid_training_file"
    return Verdict("failed", code, f"{bad} of {rows} rows can't be used: {_lines(errors)}"), short


def _lines(errors: list[dict[str, Any]]) -> str:
    more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
    return "; ".join(_line(one) for one in errors[:_SHOWN]) + more


def _line(one: Mapping[str, Any]) -> str:
    return f"row {one.get('row')}: {one.get('code')}: {str(one.get('message', ''))[:300]}"
