"""The README's Python snippets do what it says. Its curl line is asked in tests/service/test_first_answer.py."""

from __future__ import annotations

import json
import re
import shutil
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
    assert len(SNIPPETS) == 6
    for snippet in SNIPPETS:
        compile(snippet, "README.md", "exec")


def test_the_training_snippet_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a data set of one batch where the reader has his own."""
    turns = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a dog"}]
    shutil.copy(ROOT / "examples/dog.png", tmp_path)
    (tmp_path / "train.json").write_text(json.dumps([{"image_path": "dog.png", "conversations": turns}] * 8))
    monkeypatch.chdir(tmp_path)
    snippet = next(one for one in SNIPPETS if "DualVisionTrainer" in one)
    exec(compile(snippet, "README.md", "exec"), {})
    events = [json.loads(line) for line in (tmp_path / "outputs/events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("step") == 1
    freeze = next(event["data"]["freeze"] for event in events if event["kind"] == "freeze")
    assert freeze["mode"] == "encoders_only", "switched before the first step"
    assert (tmp_path / "outputs/final/model.safetensors").is_file()


def test_the_readme_opens_with_the_two_commands() -> None:
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1)
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["serve", "test"]


def test_the_card_and_the_readme_agree_on_the_number_of_things() -> None:
    from model_core.demo.things import THINGS

    assert f"It knows {len(THINGS)} things" in README
