"""Every dependency is pinned, in range, without an address or a local version tag."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import pins
from tests.architecture.conftest import Plant

PROJECT = '[project]\ndependencies = ["numpy>=2"]\n[project.optional-dependencies]\ndev = ["pytest"]\n'


@pytest.mark.parametrize("policy", [pins.loose_lines, pins.unpinned, pins.unpinned_in_environment])
def test_the_tree_keeps_to_it(policy, root: Path) -> None:
    assert policy(root) == []


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "torch==2.13.0+cpu", "x @ file:x.whl", "-r other.txt"])
def test_a_loose_line_is_found(line: str, plant: Plant) -> None:
    assert pins.loose_lines(plant("constraints.txt", f"# pins\n{line}\npytest==9.2.0\n")) == [line]


@pytest.mark.parametrize(
    ("constraints", "missing"),
    [
        ("numpy==2.4.6\npytest==9.2.0\n", []),
        ("numpy==1.26.0\npytest==9.2.0\n", ["numpy>=2: pinned to 1.26.0"]),
        ("numpy==2.4.6\n", ["pytest: pinned to None"]),
    ],
)
def test_a_dependency_without_a_fitting_pin_is_found(constraints: str, missing: list[str], plant: Plant) -> None:
    plant("pyproject.toml", PROJECT)
    assert pins.unpinned(plant("constraints.txt", constraints)) == missing


def test_an_unpinned_package_further_down_is_found(plant: Plant) -> None:
    plant("pyproject.toml", PROJECT)
    found = pins.unpinned_in_environment(plant("constraints.txt", "numpy==2.4.6\npytest==9.2.0\n"))
    assert "pluggy" in found
    assert "pytest" not in found
