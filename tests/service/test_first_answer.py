"""From a clone to an honest answer: `dve serve` with the embedded model, asked by the official client.

The server is a real process; the pictures are the repository's examples, held out from training.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DVE_")}
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "serve",
        "--port",
        "0",
        "--data_dir",
        tmp_path_factory.mktemp("data"),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        base, lines = "", []
        for line in process.stdout:
            lines.append(line)
            base = (re.findall(r"http://[\w.:]+", line) or [base])[0]
            if "ready" in line:
                break
        assert base, "".join(lines)
        assert httpx.get(f"{base}/health/ready").status_code == 200, "".join(lines)
        yield base
    finally:
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(image: str, question: str) -> list[dict]:
    return _messages((EXAMPLES / image).read_bytes(), question)


def ask_of(picture: Image.Image, question: str) -> list[dict]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _messages(buffer.getvalue(), question)


def _messages(png: bytes, question: str) -> list[dict]:
    data = base64.b64encode(png).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def test_a_right_answer_that_both_encoders_took_part_in(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="dve-demo", messages=ask("dog.png", "what is this?"))
    assert "dog" in done.choices[0].message.content
    (weights,) = done.model_extra["fusion"]
    assert weights["qwen_weight"] + weights["dinov2_weight"] == pytest.approx(1.0, abs=1e-5)
    assert min(weights["qwen_weight"], weights["dinov2_weight"]) > 0.02
    assert weights["warnings"] == [], "fusion is trained"


def test_the_readmes_curl_line_is_answered(url: str) -> None:
    """The very shell of the README makes the body; only curl itself is httpx here."""
    (line,) = re.findall(r"```bash\n(printf .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    makes_body, curl = line.rsplit("|\n", 1)
    assert re.fullmatch(r"curl -s http://127\.0\.0\.1:8000/(\S+) -H 'content-type: application/json' -d @-\n", curl)
    body = subprocess.run(["sh", "-c", makes_body], cwd=ROOT, capture_output=True, check=True).stdout
    headers = {"content-type": "application/json"}
    done = httpx.post(f"{url}/{curl.split()[2].split('/', 3)[3]}", content=body, headers=headers, timeout=60)
    assert done.status_code == 200, done.text
    assert "dog" in done.json()["choices"][0]["message"]["content"]


def test_what_the_card_calls_met_holds_whoever_else_is_asking(client: openai.OpenAI) -> None:
    """Every kind that the examples ask about; one may go wrong, as the card's shares allow."""
    from model_core.demo.questions import grade

    def answer(one: dict) -> str:
        messages = ask(one["image"], one["question"])
        return client.chat.completions.create(model="dve-demo", messages=messages).choices[0].message.content

    with ThreadPoolExecutor(8) as pool:  # concurrent, so that they are batched
        answers = list(pool.map(answer, QUESTIONS))
    assert all(answers)
    assert len(answers) >= 16 and {"name", "position", "presence", "count", "read"} <= {q["kind"] for q in QUESTIONS}
    pairs = zip(QUESTIONS, answers, strict=True)
    wrong = [(q["image"], q["question"], got) for q, got in pairs if not grade(q["kind"], q["answer"], got)]
    assert len(wrong) <= 1, wrong


def test_streamed_equals_not_streamed_and_usage_is_counted(client: openai.OpenAI) -> None:
    messages = ask("pair.png", "Describe the picture.")
    whole = client.chat.completions.create(model="dve-demo", messages=messages)
    chunks = list(
        client.chat.completions.create(
            model="dve-demo", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed == whole.choices[0].message.content
    streamed = chunks[-1].usage
    # Not the whole objects: the second time the prompt comes out of the cache.
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(streamed, name) == getattr(whole.usage, name)
    assert whole.usage.prompt_tokens_details.model_extra["multimodal_tokens"] == 36


def test_the_real_engine_is_counted_by_the_step(client: openai.OpenAI, url: str) -> None:
    """Tokens as they are computed and given out; an encoder's pass once, and none for a picture that is known."""

    def told() -> dict[str, float]:
        lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#"]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def asked() -> tuple[openai.types.CompletionUsage, dict[str, float]]:
        before = told()
        done = client.chat.completions.create(model="dve-demo", messages=picture, max_tokens=3)
        return done.usage, {name: value - before.get(name, 0.0) for name, value in told().items()}

    turned = Image.open(EXAMPLES / "dog.png").convert("RGB").rotate(90)  # which nobody has asked about yet
    picture = ask_of(turned, "what is this?")
    usage, grown = asked()
    assert grown["dve_prompt_tokens_total"] == usage.prompt_tokens
    assert grown["dve_generation_tokens_total"] == usage.completion_tokens
    cached = usage.prompt_tokens_details.cached_tokens
    assert grown["dve_iteration_tokens_sum"] == usage.prompt_tokens - cached + usage.completion_tokens
    assert [grown[f'dve_encoder_forward_seconds_count{{encoder="{name}"}}'] for name in ("qwen", "dinov2")] == [1, 1]
    assert grown['dve_encoder_forward_seconds_sum{encoder="qwen"}'] > 0
    usage, grown = asked()
    assert grown["dve_prompt_tokens_total"] == usage.prompt_tokens, "those of the prefix cache are prompt tokens too"
    assert [grown[f'dve_encoder_forward_seconds_count{{encoder="{name}"}}'] for name in ("qwen", "dinov2")] == [0, 0]


def compare(url: str, messages: list[dict]) -> dict:
    body = {"model": "dve-demo", "messages": messages, "max_tokens": 12}
    compared = httpx.post(f"{url}/v1/encoders/compare", json=body, timeout=60)
    assert compared.status_code == 200, compared.text
    return compared.json()


def test_shut_eyes_answer_on_the_same_endpoint(client: openai.OpenAI, url: str) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == ["dve-demo", *(f"dve-demo@{arm}" for arm in ("qwen-only", "dinov2-only", "blind", "unfused"))]
    compared = compare(url, ask("dog.png", "what is this?"))
    fused = client.chat.completions.create(model=ids[0], messages=ask("dog.png", "what is this?"), max_tokens=12)
    assert fused.choices[0].message.content == compared["answers"]["fused"]["content"]
    for model in ids[1:]:
        done = client.chat.completions.create(model=model, messages=ask("dog.png", "what is this?"), max_tokens=12)
        assert done.model == model
        assert done.choices[0].message.content == compared["answers"][model.partition("@")[2]]["content"]
    blind = [
        client.chat.completions.create(model=f"{ids[0]}@blind", messages=ask(image, "what is this?"), max_tokens=12)
        for image in ("dog.png", "pair.png")
    ]
    assert blind[0].choices[0].message.content == blind[1].choices[0].message.content, "it can't tell pictures apart"
    assert blind[0].choices[0].message.content != fused.choices[0].message.content


def test_the_gate_is_told_over_all_and_for_one_answer(client: openai.OpenAI, url: str) -> None:
    before = httpx.get(f"{url}/fusion-weights").json()
    done = client.chat.completions.with_raw_response.create(model="dve-demo", messages=ask("group.png", "how many?"))
    request_id = done.headers["x-request-id"]
    (told,) = done.parse().model_extra["fusion"]
    one = httpx.get(f"{url}/fusion-weights", params={"request_id": request_id}).json()
    assert (one["request_id"], one["model"]) == (request_id, "dve-demo")
    assert [image["qwen_weight"] for image in one["images"]] == [told["qwen_weight"]]
    rolling = httpx.get(f"{url}/fusion-weights").json()
    assert rolling["images"] == rolling["by_model"]["dve-demo"]["images"] == before["images"] + 1
    sums = [(found["encoders"]["qwen"]["mean"] or 0.0) * found["images"] for found in (before, rolling)]
    assert sums[1] - sums[0] == pytest.approx(told["qwen_weight"], abs=1e-4)


def test_an_uploaded_picture_is_analyzed_and_compared(url: str) -> None:
    with (EXAMPLES / "word.png").open("rb") as file:
        found = httpx.post(f"{url}/v1/fusion/analyze", files={"file": ("word.png", file, "image/png")}, timeout=60)
    assert found.status_code == 200, found.text
    (image,) = found.json()["images"]
    assert image["qwen_weight"] + image["dinov2_weight"] == pytest.approx(1.0, abs=1e-5)
    assert sum(image["contribution"].values()) == pytest.approx(1.0, abs=1e-5)
    assert min(image["contribution"].values()) > 0
    assert image["relative_update"] > 0
    compared = compare(url, ask("word.png", "what does it say?"))
    likely = {arm: answer["log_likelihood"]["sum"] for arm, answer in compared["answers"].items()}
    assert set(likely) == {"fused", "qwen-only", "dinov2-only", "blind", "unfused"}
    assert len(set(likely.values())) == 5, "each arm sees something else"
    without = {"qwen": "dinov2-only", "dinov2": "qwen-only"}
    for encoder, arm in without.items():
        assert compared["reliance"][encoder]["sum"] == pytest.approx(likely["fused"] - likely[arm], abs=1e-4)
    assert sum(compared["shapley"].values()) == pytest.approx(likely["fused"] - likely["blind"], abs=1e-4)


def test_free_phrasings(client: openai.OpenAI) -> None:
    for question in ("which animal is this?", "Name the thing in the image", "what animal do you see"):
        done = client.chat.completions.create(model="dve-demo", messages=ask("dog.png", question), max_tokens=12)
        assert "dog" in done.choices[0].message.content, question
    shapes = Image.open(EXAMPLES / "shapes.png").convert("RGB")
    for box, colour in (((28, 56, 140, 168), "white"), ((0, 0, 84, 56), "green")):
        messages = ask_of(shapes.crop(box), "tell me the colour")
        done = client.chat.completions.create(model="dve-demo", messages=messages, max_tokens=12)
        assert colour in done.choices[0].message.content
