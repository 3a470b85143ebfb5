"""The README's Python snippets and curl body do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_snippet_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(SNIPPETS[0], "README.md", "exec"), {})
    answer, weights = capsys.readouterr().out.strip().split("\n", 1)
    assert "dog" in answer
    assert "'dominant_encoder'" in weights


def test_the_other_snippets_are_python() -> None:
    assert len(SNIPPETS) == 3
    for snippet in SNIPPETS:
        compile(snippet, "README.md", "exec")


def test_the_readme_opens_with_the_two_commands() -> None:
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1)
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["serve", "test"]


def test_the_card_and_the_readme_agree_on_the_number_of_things() -> None:
    from model_core.demo.things import THINGS

    assert f"It knows {len(THINGS)} things" in README
