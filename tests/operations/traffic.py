"""Mixed traffic against a real server: answers whole and streamed, clients that leave, bad input, analysis, jobs."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

CHAT, JOBS = "/v1/chat/completions", "/v1/fine_tuning/jobs"
MODEL = "dve-demo"
#: kind -> how often, in a hundred; the statuses that are right for it.
KINDS: dict[str, tuple[int, tuple[int, ...]]] = {
    "text": (14, (200,)), "image": (22, (200,)), "stream": (22, (200,)), "several": (6, (200,)),
    "leave a stream": (10, (200,)), "leave at once": (6, (0, 200)), "bad picture": (5, (400,)), "bad json": (4, (400,)),
    "bad parameter": (4, (400,)), "analyze": (3, (200,)), "compare": (1, (200,)), "other": (3, (200,)),
}  # fmt: skip
_NAMES, _WEIGHTS = list(KINDS), [weight for weight, _ in KINDS.values()]
_TIMEOUT_SECONDS = 120.0


@dataclass
class Tally:
    """What came of it. Written by many threads."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, status: int, seconds: float, text: str = "") -> None:
        with self.lock:
            self.counts[kind] += 1
            self.slowest = max(self.slowest, seconds)
            if status not in KINDS[kind][1]:
                self.wrong.append(f"{kind}: {status} {text[:200]}")

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def picture(rng: random.Random) -> str:
    """Of its own colours and size, so that no cache knows it."""
    sides = rng.choice([56, 112, 224]), rng.choice([56, 112, 224])
    image = Image.new("RGB", sides, tuple(rng.randbytes(3)))
    image.putpixel((0, 0), tuple(rng.randbytes(3)))
    buffer = io.BytesIO()
    image.save(buffer, rng.choice(["PNG", "JPEG"]))
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(rng: random.Random, images: int = 0, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture(rng)}} for _ in range(images)]
    parts.append({"type": "text", "text": f"what is this? {rng.randrange(10**9)}"})
    message = {"role": "user", "content": parts}
    return {"model": MODEL, "messages": [message], "max_tokens": rng.randint(4, 24), "ignore_eos": True, **more}


def send(client: httpx.Client, kind: str, rng: random.Random) -> tuple[int, str]:
    """Status and text; 0 for a stream that was read and has no end, and for who left before an answer began."""
    if kind in ("stream", "leave a stream"):
        return _stream(client, rng, leaves=kind != "stream")
    if kind == "leave at once":
        try:
            answer = client.post(CHAT, json=body(rng, 1, max_tokens=400), timeout=httpx.Timeout(20, read=0.05))
        except httpx.ReadTimeout:
            return 0, ""
    elif kind == "bad json":
        answer = client.post(CHAT, content=b'{"messages": [', headers={"content-type": "application/json"})
    elif kind == "other":
        answer = client.get(rng.choice(["/metrics", "/v1/models", "/fusion-weights", "/health/live", JOBS]))
    elif kind == "analyze":
        answer = client.post("/v1/fusion/analyze", json={key: body(rng, 1)[key] for key in ("model", "messages")})
    elif kind == "compare":
        asked = {key: body(rng, 1)[key] for key in ("model", "messages")}
        answer = client.post("/v1/encoders/compare", json=asked | {"max_tokens": 4})
    else:
        answer = client.post(CHAT, json=_plain(kind, rng))
    return answer.status_code, answer.text


def _plain(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind == "bad picture":
        broken = {"type": "image_url", "image_url": {"url": picture(rng)[:120]}}
        return body(rng) | {"messages": [{"role": "user", "content": [broken]}]}
    if kind == "bad parameter":
        return body(rng, temperature=-1.0)
    if kind == "several":
        return body(rng, 1, n=3, temperature=0.8, logprobs=True)
    return body(rng, {"text": 0, "image": rng.randint(1, 2)}[kind])


def _stream(client: httpx.Client, rng: random.Random, *, leaves: bool) -> tuple[int, str]:
    asked = body(rng, rng.randint(0, 1), stream=True, **({"max_tokens": 400} if leaves else {}))
    with client.stream("POST", CHAT, json=asked) as answer:
        if answer.status_code != 200:
            return answer.status_code, answer.read().decode()
        last = ""
        for number, line in enumerate(answer.iter_lines()):
            last = line or last
            if leaves and number > 4:
                return 200, ""
    return (200, "") if last == "data: [DONE]" else (0, f"ended with {last}")


class Traffic:
    """`num_threads` clients until `stop`; each request's kind is drawn from a seed."""

    def __init__(self, url: str, *, num_threads: int = 4, seed: int = 0, kinds: list[str] | None = None) -> None:
        self.tally, self._url, self._stop, self._kinds = Tally(), url, threading.Event(), kinds
        self._threads = [threading.Thread(target=self._run, args=(seed + i,), daemon=True) for i in range(num_threads)]

    def start(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> Tally:
        """No request is left under way, or AssertionError: it is stuck."""
        self._stop.set()
        deadline = time.monotonic() + _TIMEOUT_SECONDS + 30
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            assert not thread.is_alive(), "a request is stuck"
        return self.tally

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=_TIMEOUT_SECONDS) as client:
            while not self._stop.is_set():
                kind = rng.choice(self._kinds) if self._kinds else rng.choices(_NAMES, _WEIGHTS)[0]
                begin = time.monotonic()
                try:
                    status, text = send(client, kind, rng)
                except httpx.HTTPError as error:
                    status, text = -1, f"{type(error).__name__}: {error}"
                self.tally.add(kind, status, time.monotonic() - begin, text)
                if status == -1:
                    self._stop.wait(0.2)


def training_file(rows: int = 6) -> bytes:
    """Pictures of one colour with its name."""
    colours = ["red", "green", "blue", "yellow", "black", "white"]
    lines = []
    for number in range(rows):
        buffer = io.BytesIO()
        Image.new("RGB", (112, 112), colours[number % 6]).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what colour?"}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": colours[number % 6]}]
        lines.append(json.dumps({"messages": messages}))
    return ("\n".join(lines) + "\n").encode()


def standin_file(**plan: Any) -> bytes:
    """One row that is also the plan of the stand-in trainer."""
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a fox"}]
    return (json.dumps({"messages": messages, **plan}) + "\n").encode()


def upload(client: httpx.Client, data: bytes) -> str:
    answer = client.post("/v1/files", files={"file": ("train.jsonl", data)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def create_job(client: httpx.Client, data: bytes = b"", epochs: int = 1) -> str:
    asked = {
        "model": MODEL, "training_file": upload(client, data or training_file()), "seed": 1,
        "hyperparameters": {"n_epochs": epochs, "batch_size": 2}, "fusion": {"freeze": {"mode": "fusion_only"}},
    }  # fmt: skip
    made = client.post(JOBS, json=asked)
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"{JOBS}/{job_id}").json()
    return found
