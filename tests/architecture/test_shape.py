"""Form: lengths, parameters, names, docstrings, ASCII."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import shape
from tests.architecture.conftest import Plant

Policy = Callable[[Path], list[str]]

POLICIES = [
    shape.long_files,
    shape.long_functions,
    shape.wide_functions,
    shape.nameless_modules,
    shape.folders_without_init,
    shape.undocumented,
    shape.non_ascii,
]
LONG_BODY = "    pass\n" * 60
PLANTED = [
    (shape.long_files, "tests/test_x.py", "pass\n" * 401),
    (shape.long_functions, "model_core/x.py", "def f():\n" + LONG_BODY),
    (shape.long_functions, "service/x.py", "class A:\n  async def f(self):\n" + LONG_BODY),
    (shape.wide_functions, "model_core/x.py", "def f(a, b, c, d, e, f, g): ..."),
    (shape.wide_functions, "model_core/x.py", "class A:\n  def f(self, a, b, c, /, d, e, f, g): ..."),
    (shape.nameless_modules, "service/routes/helpers.py", ""),
    (shape.nameless_modules, "tests/common/test_x.py", ""),
    (shape.folders_without_init, "model_core/x/y.py", ""),
    (shape.undocumented, "model_core/x.py", "A = 1"),
    (shape.undocumented, "model_core/x.py", '"""A."""\nclass A:\n' + LONG_BODY),
    (shape.non_ascii, "service/x.py", "# \u2192"),
]
ALLOWED = [
    (shape.long_files, "model_core/x.py", "pass\n" * 400),
    (shape.long_functions, "model_core/x.py", "def f():\n" + "    pass\n" * 59),
    (shape.wide_functions, "model_core/x.py", "class A:\n  def f(self, a, b, c, d, e, f, *, g): ..."),
    (
        shape.undocumented,
        "model_core/x.py",
        '"""A."""\ndef _f():\n' + LONG_BODY + "class XError(Exception):\n" + LONG_BODY,
    ),
    (shape.undocumented, "model_core/__init__.py", ""),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tree_keeps_to_it(policy: Policy, root: Path) -> None:
    assert policy(root) == []


@pytest.mark.parametrize(("policy", "name", "text"), PLANTED)
def test_a_planted_violation_is_found(policy: Policy, name: str, text: str, plant: Plant) -> None:
    assert len(policy(plant(name, text))) == 1


@pytest.mark.parametrize(("policy", "name", "text"), ALLOWED)
def test_the_limit_itself_is_allowed(policy: Policy, name: str, text: str, plant: Plant) -> None:
    assert policy(plant(name, text)) == []


def test_every_policy_is_shown_to_fail() -> None:
    assert {policy for policy, _, _ in PLANTED} == set(POLICIES)
