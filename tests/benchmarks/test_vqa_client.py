"""The evaluators' request shapes against a real server with the demo model, on its examples and fresh shapes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import vqa_client
from model_core.demo.questions import ask
from model_core.demo.scenes import HELD_OUT_FIRST_SEED, make_scene
from model_core.encoder import DualVisionEncoder
from tests.model_core.demo.conftest import synthetic_artwork
from tests.service.conftest import LiveServer, run_server
from tests.service.fakes import FakeEngine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> Iterator[LiveServer]:
    engine = DualVisionEncoder(device="cpu").engine
    with run_server(FakeEngine(), load=lambda: engine) as live:
        while live.http.get("/health/ready").status_code != 200:
            pass
        yield live


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Thirty: those of the examples first, then shapes that were never trained on."""
    folder = tmp_path_factory.mktemp("vqa")
    rows = [
        row | {"image": str(EXAMPLES / row["image"])} for row in json.loads((EXAMPLES / "questions.json").read_text())
    ]
    artwork, seed = synthetic_artwork(), HELD_OUT_FIRST_SEED
    while len(rows) < 30:
        scene = make_scene(seed, artwork, kind="shapes")
        scene.picture().save(folder / f"{seed}.png")
        turns = ask(scene, random.Random(seed), limit=2)
        rows += [{"image": f"{seed}.png", "kind": t.kind, "question": t.question, "answer": t.answer} for t in turns]
        seed += 1
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[:30]) + "\n")
    return path


@pytest.mark.parametrize("style", sorted(vqa_client.STYLES))
def test_both_evaluators_are_answered_and_scored(demo: LiveServer, questions: Path, style: str):
    loaded = vqa_client.load_questions(questions)
    assert len(loaded) == 30
    answer = vqa_client.STYLES[style](demo.url, "unused")
    score = vqa_client.evaluate(answer, "dve-demo", loaded)
    assert score.failures == []
    assert score.num_right >= 12, "far from the demo's own score: is the picture seen at all?"
    blind = vqa_client.evaluate(answer, "dve-demo@blind", loaded)
    assert blind.failures == []
    assert blind.num_right < score.num_right


def test_the_table_has_both_models(demo: LiveServer, questions: Path, capsys):
    few = questions.with_name("few.jsonl")
    few.write_text("".join(questions.read_text().splitlines(keepends=True)[:3]))
    vqa_client.main([str(few), "--url", demo.url])
    printed = capsys.readouterr().out
    assert "dve-demo@qwen-only" in printed
    assert printed.count(" 3 ") >= 2


def test_a_server_that_refuses_is_told_and_counts_as_wrong(shared_failure: LiveServer, questions: Path):
    answer = vqa_client.STYLES["lmms-eval"](shared_failure.url, "unused")
    score = vqa_client.evaluate(answer, "nope", vqa_client.load_questions(questions)[:2])
    assert (score.num_right, score.count, len(score.failures)) == (0, 2, 2)
    assert "no such model" in score.failures[0]


@pytest.fixture
def shared_failure() -> Iterator[LiveServer]:
    with run_server(FakeEngine()) as live:
        yield live


def test_answers_are_judged_as_vqa_does():
    one = vqa_client.Question(Path("x"), "?", ("the Dog", "a hound"))
    assert vqa_client.is_right(one, "Dog.")
    assert vqa_client.is_right(one, "a hound")
    assert not vqa_client.is_right(one, "dogs")


def test_a_line_that_is_no_question_is_named(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"image": "a.png", "question": "?", "answer": "x"}\n{"image": "b.png"}\n')
    with pytest.raises(SystemExit, match="line 2"):
        vqa_client.load_questions(path)
