"""Asks a running server a file of questions the way the public evaluators ask, fused and with one eye shut.

    python -m benchmarks.vqa_client --url http://127.0.0.1:8000 --model dve-demo questions.jsonl [--style vlmevalkit]

A line of the file: {"image": "path beside the file", "question", "answer", "kind": optional}. `answer` may be a list,
of which any is right. The request shapes are those of lmms-eval's `openai_compatible` (the text first, PNG, 1024
`max_completion_tokens`, through the official client) and of VLMEvalKit's `OpenAIWrapper` (image first, JPEG with
`detail`, `n: 1`, 2048 `max_tokens`, plain HTTP); neither knows that the server is ours. Scores come with Wilson
intervals; a request that failed counts as wrong and is told.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from PIL import Image
from rich.console import Console
from rich.table import Table

from model_core.demo.questions import grade
from model_core.demo.scoring import wilson

ARMS = ("", "@qwen-only")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Question:
    image: Path
    question: str
    answers: tuple[str, ...]
    kind: str | None = None


@dataclass(slots=True)
class Score:
    num_right: int = 0
    count: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.num_right, self.count)


def load_questions(path: Path) -> list[Question]:
    """Raises SystemExit with the number of a line that is no question."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            image = path.parent / row["image"]
            found.append(Question(image, row["question"], tuple(map(str, answers)), row.get("kind")))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}, line {number} is no question: {error!r}") from None
    return found


def encoded(path: Path, form: str) -> str:
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format=form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def lmms_eval_payload(model: str, one: Question) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": one.question}]
    content.append({"type": "image_url", "image_url": {"url": encoded(one.image, "PNG")}})
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "model": model, "max_completion_tokens": 1024, "temperature": 0}


def vlmevalkit_payload(model: str, one: Question) -> dict[str, Any]:
    image = {"url": encoded(one.image, "JPEG"), "detail": "high"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": one.question}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}


def ask_lmms_eval(url: str, key: str) -> Callable[[str, Question], str]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=120)

    def ask(model: str, one: Question) -> str:
        return client.chat.completions.create(**lmms_eval_payload(model, one)).choices[0].message.content

    return ask


def ask_vlmevalkit(url: str, key: str) -> Callable[[str, Question], str]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(model: str, one: Question) -> str:
        data = json.dumps(vlmevalkit_payload(model, one))
        response = httpx.post(f"{url}/v1/chat/completions", headers=headers, content=data, timeout=66)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"]).strip()

    return ask


STYLES = {"lmms-eval": ask_lmms_eval, "vlmevalkit": ask_vlmevalkit}


def is_right(one: Question, answer: str) -> bool:
    """By the demo's rules where the kind of question is known, else as VQA scores: case, articles and dots aside."""
    if one.kind is not None:
        return any(grade(one.kind, expected, answer) for expected in one.answers)
    return _plain(answer) in {_plain(expected) for expected in one.answers}


def _plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower()).replace(".", " ").split())


def evaluate(
    ask: Callable[[str, Question], str], model: str, questions: Sequence[Question], concurrency: int = 8
) -> Score:
    score = Score(count=len(questions))

    def answer(one: Question) -> str | Exception:
        try:
            return ask(model, one)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            return error

    with ThreadPoolExecutor(concurrency) as pool:
        for one, said in zip(questions, pool.map(answer, questions), strict=True):
            if isinstance(said, Exception):
                score.failures.append(f"{one.image.name}: {said}")
            else:
                score.num_right += is_right(one, said)
    return score


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="dve-demo")
    parser.add_argument("--key", default="unused")
    parser.add_argument("--style", choices=sorted(STYLES), default="lmms-eval")
    args = parser.parse_args(argv)
    questions = load_questions(args.questions)
    ask = STYLES[args.style](args.url.rstrip("/"), args.key)
    table = Table("model", "right", "of", "share", "95 % interval", "failed")
    for arm in ARMS:
        score = evaluate(ask, args.model + arm, questions)
        low, high = score.interval
        share = f"{score.num_right / score.count:.1%}" if score.count else "-"
        cells = (str(score.num_right), str(score.count), share, f"{low:.1%} to {high:.1%}", str(len(score.failures)))
        table.add_row(args.model + arm, *cells)
        for failure in score.failures[:3]:
            print(failure)
    Console().print(table)


if __name__ == "__main__":
    main()
