"""README.md and ARCHITECTURE.md say nothing that the tree does not hold."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import papers
from tests.architecture.conftest import Plant

Policy = Callable[[Path], list[str]]


def dve_help(words: list[str]) -> str | None:
    """The help of one `dve` command, from the parser itself; None where it has none."""
    from service.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main([*words, "--help"])
        except SystemExit as end:
            status = end.code
    return None if status else shown.getvalue()


def dead_commands(root: Path) -> list[str]:
    return papers.dead_commands(root, dve_help)


def fake_dead_commands(root: Path) -> list[str]:
    shown = {"infer": "--image IMAGE", "demo build": "--seed"}
    return papers.dead_commands(root, lambda words: shown.get(" ".join(words)))


POLICIES = [papers.missing_papers, papers.dead_paths, papers.dead_targets, papers.dead_modules, dead_commands]
DEAD = [
    (papers.dead_paths, "see `model_core/gone.py`"),
    (papers.dead_paths, "see `gone.py`"),
    (papers.dead_paths, "see `model_core/{model,gone}.py`"),
    (papers.dead_paths, "see `model_core/model.py:gone`"),
    (papers.dead_paths, "see `model_core/gone/`"),
    (papers.dead_targets, "run `make gone PORT=1`"),
    (papers.dead_targets, "```\nmake PORT=1 gone\n```"),
    (papers.dead_modules, "run `python -m model_core.gone`"),
    (fake_dead_commands, "run `dve gone`"),
    (fake_dead_commands, "```\n.venv/bin/dve infer --image x \\\n  --gone y\n```"),
]
ALIVE = [
    (
        papers.dead_paths,
        "`model_core/model.py:Model.step` `model.py` `model_core/*.py` `Qwen/Qwen2.5` `/v1/chat` `train.py`",
    ),
    (papers.dead_targets, "`make serve PORT=1`, and make sure that `make` runs"),
    (papers.dead_modules, "`python -m model_core.model --image x`"),
    (fake_dead_commands, "`dve infer --image x`, `dve demo build --seed 1`; dve itself"),
]


@pytest.fixture
def small_tree(plant: Plant) -> Plant:
    plant("Makefile", "serve: stamp\n\tdve serve\n")
    plant("model_core/model.py", "class Model:\n    def step(self): ...\n")
    return plant


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tree_keeps_to_it(policy: Policy, root: Path) -> None:
    assert policy(root) == []


@pytest.mark.parametrize(("policy", "text"), DEAD)
def test_a_dead_name_is_found(policy: Policy, text: str, small_tree: Plant) -> None:
    assert len(policy(small_tree("README.md", text))) == 1


@pytest.mark.parametrize(("policy", "text"), ALIVE)
def test_a_living_one_is_not(policy: Policy, text: str, small_tree: Plant) -> None:
    assert policy(small_tree("ARCHITECTURE.md", text)) == []


def test_a_missing_paper_is_found(plant: Plant) -> None:
    assert papers.missing_papers(plant("README.md", "")) == ["ARCHITECTURE.md: not there"]


def test_an_unknown_command_has_no_help() -> None:
    assert dve_help(["no-such-command"]) is None
