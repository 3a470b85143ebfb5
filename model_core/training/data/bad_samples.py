"""What bad samples do: end the run, naming their rows, or step aside while the budget lasts.

In: problems of rows; out: nothing, or an error. No sample is ever put in another's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from model_core.errors import BadSampleBudgetError, DataError, ImageError, UnreadableImagesError
from model_core.training.config import BadSampleConfig
from model_core.training.data.scan import RowProblem

_SHOWN = 20
_IMAGE_CODES = frozenset([ImageError.code, *(kind.code for kind in ImageError.__subclasses__())])


class Quarantine:
    """Keeps count for one process. num_rows: of all data sets; max_ratio of them may step aside."""

    def __init__(self, policy: BadSampleConfig, num_rows: int) -> None:
        self._policy, self._num_rows = policy, num_rows
        self._set_aside: dict[tuple[str, int], RowProblem] = {}

    def add(self, problems: Iterable[RowProblem]) -> None:
        """Raises DataError under `fail`, BadSampleBudgetError past the budget. A row counts once."""
        for problem in problems:
            self._set_aside.setdefault((problem.dataset, problem.index), problem)
        found = list(self._set_aside.values())
        if not found:
            return
        if self._policy.policy == "fail":
            raise refusal(found, self._num_rows)
        if len(found) > self._policy.max_ratio * self._num_rows:
            error = BadSampleBudgetError(
                f"{len(found)} of {self._num_rows} samples can't be used: {_rows(found)}",
                allowed=f"bad_samples.max_ratio, {self._policy.max_ratio:g} of them",
                fix="Mend or remove these rows, or raise max_ratio",
            )
            error.problems = tuple(one.to_json() for one in found)
            raise error

    def restore(self, problems: Iterable[RowProblem]) -> None:
        """What an earlier process of the run set aside: as it was told there, behind what the scan has found.

        Raises as `add` does.
        """
        again = {(one.dataset, one.index): one for one in problems}
        self._set_aside = {key: one for key, one in self._set_aside.items() if key not in again}
        self.add(again.values())

    def report(self) -> list[dict[str, Any]]:
        return [one.to_json() for one in self._set_aside.values()]


def refusal(problems: Sequence[RowProblem], num_rows: int) -> DataError:
    """The error that names the rows: of images where nothing else is wrong, else of the file."""
    kind = UnreadableImagesError if all(one.code in _IMAGE_CODES for one in problems) else DataError
    error = kind(
        f"{len(problems)} of {num_rows} samples can't be used: {_rows(problems)}",
        fix="Mend or remove these rows ('dve data validate FILE' lists all), or set bad_samples.policy to quarantine",
    )
    error.problems = tuple(one.to_json() for one in problems)
    return error


def _rows(problems: Sequence[RowProblem]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(str(one).rstrip(".") for one in problems[:_SHOWN]) + more
