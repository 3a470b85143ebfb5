"""The demo model and its fine-tuned versions in one real server: exact answers, swaps under load, memory.

Versions are runs whose fusion was moved by noise, published by `dve publish`. Every token's log-probability says which
weights computed it, so a mixed-up answer can't hide behind equal words.
"""

from __future__ import annotations

import base64
import ctypes
import gc
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from PIL import Image

from model_core.checkpoint import LoadOptions, load_checkpoint
from model_core.cli.publish import main as publish_main
from model_core.demo_model import demo_folder
from model_core.encoder import DualVisionEncoder
from model_core.engine.config import EngineConfig
from model_core.published import folder_name, promote
from model_core.types import ChatMessage, GenerationRequest, ImagePart, SamplingParams, TextPart
from model_core.variant import own_bytes
from service.main import ModelLoader
from service.request_limits import RequestLimits
from service.settings import JobSettings, Settings
from tests.model_core.variants import train
from tests.service.conftest import LiveServer, run_server
from tests.service.fakes import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
MODEL = "ft:dve-demo:acme:moved:ab12cd34"
BASE = "dve-demo"
QUESTIONS = ("what is this?", "what colour is it?", "how many things are there?", "describe the picture.")
TOKENS = 6
#: Batches of other sizes give other last bits; another version's log-probabilities are further away than this.
EXACT = 2e-4

Answer = list[tuple[str, float]]


def png(name: str) -> bytes:
    out = io.BytesIO()
    Image.open(ROOT / "examples" / name).convert("RGB").resize((84, 84)).save(out, "PNG")
    return out.getvalue()


PICTURES = {name: png(name) for name in ("dog.png", "shapes.png")}
ASKED = [(picture, question) for picture in PICTURES for question in QUESTIONS]


def answer_alone(encoder: DualVisionEncoder, picture: str, question: str) -> Answer:
    """Tokens and log-probabilities of one request that has the engine to itself."""
    parts = (ImagePart(PICTURES[picture]), TextPart(question))
    sampling = SamplingParams(max_tokens=TOKENS, logprobs=0)
    events = encoder._run(GenerationRequest("alone", (ChatMessage("user", parts),), sampling))
    return [(encoder.engine.token_text(t.token_id)[0], t.logprob) for e in events for t in e.logprobs or ()]


def body(model: str, picture: str, question: str, **more) -> dict:
    url = "data:image/png;base64," + base64.b64encode(PICTURES[picture]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "logprobs": True, **more}


def stream(http: httpx.Client, model: str, picture: str, question: str) -> tuple[set[str], Answer]:
    """Every fingerprint that a streamed answer names, and its tokens with their log-probabilities."""
    fingerprints, answer = set(), []
    with http.stream("POST", "/v1/chat/completions", json=body(model, picture, question, stream=True)) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    for chunk in map(json.loads, lines[:-1]):
        assert "error" not in chunk, chunk
        fingerprints.add(chunk["system_fingerprint"])
        for choice in chunk["choices"]:
            answer += [(t["token"], t["logprob"]) for t in (choice["logprobs"] or {"content": []})["content"]]
    return fingerprints, answer


def is_same(got: Answer, expected: Answer) -> bool:
    return [t for t, _ in got] == [t for t, _ in expected] and max(
        (abs(a - b) for (_, a), (_, b) in zip(got, expected, strict=True)), default=0.0
    ) < EXACT


@dataclass
class Versions:
    """Whole models' folders by version, what each answers alone by fingerprint, and the published model's folder."""

    runs: dict[str, Path]
    root: Path
    fingerprints: dict[str, str] = field(default_factory=dict)
    alone: dict[str, dict[tuple[str, str], Answer]] = field(default_factory=dict)

    def publish(self, name: str, *more: str) -> float:
        """Seconds of `dve publish`."""
        begin = time.perf_counter()
        argv = ["--base", BASE, "--run", str(self.runs[name]), "--out", str(self.root / "models" / folder_name(MODEL))]
        assert publish_main([*argv, *more]) == 0
        return time.perf_counter() - begin

    def promote(self, name: str) -> None:
        promote(self.root / "models" / folder_name(MODEL), self.fingerprints[name].removeprefix("fp_"))


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    root = tmp_path_factory.mktemp("hot")
    base = load_checkpoint(demo_folder(), LoadOptions("cpu"))
    found = Versions({n: train(base, root / n, seed=s, scale=0.1) for n, s in (("one", 1), ("two", 2))}, root)
    for name, run in (("base", demo_folder()), *found.runs.items()):
        encoder = DualVisionEncoder.from_pretrained(run)
        fingerprint = encoder.info.fingerprint
        if name != "base":
            found.publish(name, "--hold")
            folders = (root / "models" / folder_name(MODEL)).iterdir()
            (new,) = {f"fp_{f.name}" for f in folders if f.is_dir()} - set(found.fingerprints.values())
            fingerprint = new
        found.fingerprints[name] = fingerprint
        found.alone[fingerprint] = {asked: answer_alone(encoder, *asked) for asked in ASKED}
    return found


@pytest.fixture(scope="module")
def live(versions: Versions) -> Iterator[LiveServer]:
    settings = Settings(data_dir=versions.root, max_num_seqs=16, max_waiting=96)
    loader = ModelLoader(settings, RequestLimits.from_settings(settings, JobSettings()))
    with run_server(
        FakeEngine(), loader.load_base, variants=loader, data_dir=versions.root, max_num_seqs=16, max_waiting=96,
    ) as server:  # fmt: skip
        for _ in range(100_000):
            if server.http.get("/health/ready").status_code == 200:
                break
        assert gc.get_freeze_count() > 100_000, "the model is no longer the garbage collector's business"
        yield server
    gc.unfreeze()


def test_the_versions_answer_differently(versions: Versions) -> None:
    """What the others rest on: no version's log-probabilities pass for another's."""
    for asked in ASKED:
        answers = [alone[asked] for alone in versions.alone.values()]
        assert not any(is_same(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]), asked


def test_base_and_variant_answer_as_each_does_alone(live: LiveServer, versions: Versions) -> None:
    versions.promote("one")
    for model, name in ((MODEL, "one"), (BASE, "base"), (MODEL, "one")):
        for asked in ASKED[:3]:
            fingerprints, answer = stream(live.http, model, *asked)
            assert fingerprints == {versions.fingerprints[name]}
            assert is_same(answer, versions.alone[versions.fingerprints[name]][asked])
    card = live.http.get(f"/v1/models/{MODEL}").json()
    assert (card["status"], card["parent"], card["system_fingerprint"]) == (
        "loaded",
        BASE,
        versions.fingerprints["one"],
    )


def test_an_arm_of_a_variant_is_the_arm_of_its_own_weights(live: LiveServer, versions: Versions) -> None:
    """Qwen's tokens past the fusion are the base's own; with an eye shut the fusion's weights still count."""
    versions.promote("one")
    asked = ASKED[0]
    unfused = [stream(live.http, f"{model}@unfused", *asked)[1] for model in (MODEL, BASE)]
    shut = [stream(live.http, f"{model}@qwen-only", *asked)[1] for model in (MODEL, BASE)]
    assert is_same(*unfused)
    assert not is_same(*shut)


class Crowd:
    """Streams that ask again and again until they are told to stop; every eighth asks the base."""

    def __init__(self, live: LiveServer, num_streams: int) -> None:
        self.live, self.stop = live, threading.Event()
        self.answers: list[tuple[float, str, tuple[str, str], set[str], Answer]] = []
        self._seen = threading.Condition()
        self._pool = ThreadPoolExecutor(num_streams)
        self._streams = [self._pool.submit(self._ask, i) for i in range(num_streams)]

    def _ask(self, index: int) -> None:
        model = BASE if index % 8 == 7 else MODEL
        with httpx.Client(base_url=self.live.url, timeout=120) as http:
            for turn in range(10_000):
                if self.stop.is_set():
                    return
                asked = ASKED[(index + turn) % len(ASKED)]
                fingerprints, answer = stream(http, model, *asked)
                with self._seen:
                    self.answers.append((time.perf_counter(), model, asked, fingerprints, answer))
                    self._seen.notify_all()

    def wait_for(self, fingerprint: str, number: int, since: float) -> float:
        """Until so many answers that began to exist after `since` name this version; when the first one came."""

        def times() -> list[float]:
            return [at for at, _, _, found, _ in self.answers if found == {fingerprint} and at > since]

        with self._seen:
            done = self._seen.wait_for(lambda: len(times()) >= number or self.has_failed(), 100)
            assert done and not self.has_failed(), [s.exception() for s in self._streams if s.done()]
            return times()[0]

    def has_failed(self) -> bool:
        return any(stream.done() and stream.exception() for stream in self._streams)

    def finish(self) -> None:
        self.stop.set()
        for one in self._streams:
            one.result(120)
        self._pool.shutdown()


def swap_under_load(live: LiveServer, versions: Versions, num_streams: int) -> dict[str, float]:
    """one -> two while `num_streams` ask, then back; what it took, in seconds. Every answer is checked."""
    one, two = (versions.fingerprints[name] for name in ("one", "two"))
    versions.promote("one")
    live.http.post(f"/v1/models/{MODEL}/load")
    crowd = Crowd(live, num_streams)
    took = {}
    try:
        crowd.wait_for(one, num_streams // 2, 0.0)
        begin = time.perf_counter()
        took["publish"] = versions.publish("two", "--hold")
        promoted = time.perf_counter()
        versions.promote("two")
        took["promoted to first answer"] = crowd.wait_for(two, 1, promoted) - promoted
        took["publish to first answer"] = crowd.wait_for(two, num_streams // 2, promoted) and (
            took["publish"] + took["promoted to first answer"]
        )
        back = time.perf_counter()
        assert begin < promoted < back
        assert live.http.post(f"/v1/models/{MODEL}/rollback").json()["system_fingerprint"] == one
        took["roll-back call"] = time.perf_counter() - back
        took["rolled back to first answer"] = crowd.wait_for(one, num_streams // 2, back) - back
    finally:
        crowd.finish()
    seen = set()
    for _, model, asked, fingerprints, answer in crowd.answers:
        assert len(fingerprints) == 1, "one answer of two versions"
        (fingerprint,) = fingerprints
        assert (fingerprint == versions.fingerprints["base"]) == (model == BASE)
        assert is_same(answer, versions.alone[fingerprint][asked]), (model, asked, answer)
        seen.add(fingerprint)
    assert seen == set(versions.fingerprints.values())
    took["answers"] = len(crowd.answers)
    return took


def test_a_swap_under_load_fails_nobody_and_mixes_nothing(live: LiveServer, versions: Versions) -> None:
    took = swap_under_load(live, versions, 16)
    assert live.metric('dve_model_swaps_total{outcome="switched"}') >= 1
    assert took["roll-back call"] < 5.0


def test_a_version_damaged_on_the_disk_leaves_the_old_one_serving(live: LiveServer, versions: Versions) -> None:
    versions.promote("one")
    assert live.http.post(f"/v1/models/{MODEL}/unload").json()["status"] == "ready"
    assert live.http.post(f"/v1/models/{MODEL}/load").json()["status"] == "loaded"
    folder = versions.root / "models" / folder_name(MODEL) / versions.fingerprints["two"][3:]
    (shard,) = folder.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    try:
        versions.promote("two")
        card = live.http.post(f"/v1/models/{MODEL}/load")
        assert (card.status_code, card.json()["error"]["code"]) == (503, "checkpoint_corrupt")
        card = live.http.get(f"/v1/models/{MODEL}").json()
        assert (card["status"], card["error"]["code"]) == ("failed", "checkpoint_corrupt")
        for asked in ASKED[:2]:
            fingerprints, answer = stream(live.http, MODEL, *asked)
            assert fingerprints == {versions.fingerprints["one"]} == {card["system_fingerprint"]}
            assert is_same(answer, versions.alone[versions.fingerprints["one"]][asked])
    finally:
        shard.write_bytes(whole)
    assert live.http.post(f"/v1/models/{MODEL}/load").json()["system_fingerprint"] == versions.fingerprints["two"]
    assert stream(live.http, MODEL, *ASKED[0])[0] == {versions.fingerprints["two"]}


@pytest.mark.heavy
def test_a_swap_under_64_streams(live: LiveServer, versions: Versions, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        took = swap_under_load(live, versions, 64)
        with capsys.disabled():
            sys.stdout.write("\n" + ", ".join(f"{name} {value:.2f}" for name, value in took.items()) + "\n")


def test_a_second_fusion_takes_its_own_tensors_and_no_more(versions: Versions) -> None:
    base = DualVisionEncoder()
    sizes = EngineConfig(kv_cache_bytes=2**20, shrinks_context=True)
    made = [
        base.beside(versions.root / "models" / folder_name(MODEL) / versions.fingerprints[name][3:], name, sizes)
        for name in ("one", "two")
    ]
    fusion = sum(tensor.nbytes for tensor in base.model.fusion.parameters())
    for encoder in made:
        assert own_bytes(encoder.model, base.model) < fusion + 10_000 < 3_000_000
        assert encoder.bytes_beside(base) < fusion + 10_000 + 2**20
    assert own_bytes(made[1].model, made[0].model) < fusion + 10_000


@pytest.mark.heavy
def test_resident_memory_of_fusions_beside_each_other(versions: Versions, capsys: pytest.CaptureFixture[str]) -> None:
    base = DualVisionEncoder()
    folder = versions.root / "models" / folder_name(MODEL) / versions.fingerprints["one"][3:]
    held, resident = [base.beside(folder, "warm", EngineConfig(kv_cache_bytes=2**28))], []
    for index in range(12):
        encoder = base.beside(folder, f"v{index}", EngineConfig(kv_cache_bytes=2**28))
        held.append(encoder)
        resident.append(resident_bytes())
    each = (resident[-1] - resident[1]) / (len(resident) - 2)
    with capsys.disabled():
        sys.stdout.write(f"\nresident memory of one more fusion: {each / 2**20:.1f} MiB\n")
    assert 2**20 < each < 4 * 2**20


def resident_bytes() -> int:
    """Of memory that belongs to no file, without what the allocator only keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
