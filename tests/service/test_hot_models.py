"""Fine-tuned models come, swap and go while others are served. Real server and registry, engines without weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import openai
import pytest

from model_core.errors import CheckpointIncompleteError
from model_core.published import folder_name, promote, read_state
from service.registry import FolderRegistry
from service.variant_loader import LoadedEngine
from tests.model_core.versions import add_version
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import INFO, FakeEngine
from tests.service.test_bad_input import check

CHAT = "/v1/chat/completions"
BASE = INFO.model_id
RED = f"ft:{BASE}:acme:red:ab12cd34"
BLUE = f"ft:{BASE}:acme:blue:ab12cd34"
GREEN = f"{RED}:ckpt-step-20"


@dataclass
class FakeVariants:
    """Loads FakeEngines of 100 bytes. `broken`: versions that fail; `hold()` stops every load until `release()`."""

    budget: int = 1000
    broken: set[str] = field(default_factory=set)
    loads: list[tuple[str, str]] = field(default_factory=list)
    engines: dict[tuple[str, str], FakeEngine] = field(default_factory=dict)
    _open: threading.Event = field(default_factory=threading.Event)
    _begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self._open.set()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def wait_begun(self) -> None:
        """Until one more load has begun."""
        assert self._begun.acquire(timeout=10)

    def budget_bytes(self) -> int:
        return self.budget

    def load(self, folder: Path, model_id: str, kv_cache_bytes: int) -> LoadedEngine:
        assert kv_cache_bytes == self.budget // 8
        key = (model_id, folder.name)
        self.loads.append(key)
        self._begun.release()
        assert self._open.wait(10)
        if folder.name in self.broken:
            raise CheckpointIncompleteError("model.safetensors is cut short", value=str(folder))
        info = replace(INFO, model_id=model_id, fingerprint=f"fp_{folder.name}")
        self.engines[key] = FakeEngine(info=info)
        return LoadedEngine(self.engines[key], 100)


@dataclass
class Serving:
    """A server, its variants, and the folder they are published in."""

    live: LiveServer
    variants: FakeVariants
    root: Path

    def publish(self, model_id: str, version: str, *, promoted: bool = True, **record) -> None:
        out = self.root / folder_name(model_id)
        add_version(out, version, **{"base_fingerprint": "fake", "num_bytes": 50, **record})
        if promoted:
            promote(out, version)

    def chat(self, model: str, text: str = "what?", **more) -> httpx.Response:
        return self.live.http.post(CHAT, json={**ask(text, **more), "model": model})

    def version_of(self, model: str) -> str:
        """Of the weights that answer."""
        response = self.chat(model)
        assert response.status_code == 200, response.text
        return response.json()["system_fingerprint"].removeprefix("fp_")

    def card(self, model: str) -> dict:
        return self.live.http.get(f"/v1/models/{model}").json()

    @contextmanager
    def streaming(self, model: str) -> Iterator[Iterator[str]]:
        """An answer that has begun and does not end by itself."""
        body = {**ask("forever", stream=True), "model": model}
        with self.live.http.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert next(lines)
            yield lines

    def until(self, model: str, is_there) -> dict:
        """Ask for the card until it is as wanted: what happens in the background has no other end to wait for."""
        for _ in range(2000):
            if is_there(card := self.card(model)):
                return card
        raise AssertionError(card)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    variants = FakeVariants()
    with run_server(FakeEngine(), variants=variants, data_dir=tmp_path) as live:
        yield Serving(live, variants, tmp_path / "models")
        variants.release()


def test_the_base_is_listed_first_then_models_with_their_arms(serving: Serving):
    serving.publish(RED, "one", created_unix=100)
    serving.publish(BLUE, "one", created_unix=200, fusion="residual")
    serving.publish("held", "one", promoted=False)
    serving.publish("others", "one", base_fingerprint="another")
    found = serving.live.openai.models.list().data
    assert [card.id for card in found][::5] == [BASE, BLUE, RED]
    assert [card.id for card in found][5:8] == [BLUE, f"{BLUE}@qwen-only", f"{BLUE}@dinov2-only"]
    card = serving.card(BLUE)
    assert (card["status"], card["parent"], card["owned_by"], card["created"]) == ("ready", BASE, "acme", 200)
    assert (card["system_fingerprint"], card["error"], card["max_model_len"]) == (None, None, 100)
    assert (card["fusion"]["strategy"], card["num_parameters"]) == ("residual", 42)
    assert serving.card(BASE)["status"] == "loaded"
    assert serving.card(BASE)["system_fingerprint"] == "fp_fake"
    assert serving.live.openai.models.retrieve(f"{RED}@blind").id == f"{RED}@blind"


def test_first_use_loads_once_and_nobody_waits_for_it_but_its_users(serving: Serving):
    serving.publish(RED, "one")
    serving.variants.hold()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(httpx.post, serving.live.url + CHAT, json={**ask(), "model": RED}) for _ in range(8)]
        serving.variants.wait_begun()
        assert serving.version_of(BASE) == "fake"
        assert serving.card(RED)["status"] == "loading"
        serving.variants.release()
        answers = [one.result(20) for one in waiting]
    assert [answer.json()["system_fingerprint"] for answer in answers] == ["fp_one"] * 8
    assert {answer.json()["model"] for answer in answers} == {RED}
    assert serving.variants.loads == [(RED, "one")]
    assert serving.card(RED)["status"] == "loaded"
    assert serving.live.metric('dve_model_swaps_total{outcome="loaded"}') == 1
    assert serving.live.metric(f'dve_model_info{{device="cpu",dtype="float32",fusion="gated",model="{RED}"}}') == 1


def test_arms_analysis_and_comparison_work_on_a_variant(serving: Serving):
    serving.publish(RED, "one")
    assert serving.chat(f"{RED}@qwen-only", images=1).json()["choices"][0]["message"]["content"] == "a red dog"
    messages = ask(images=1)["messages"]
    for path in ("/v1/fusion/analyze", "/v1/encoders/compare"):
        response = serving.live.http.post(path, json={"model": RED, "messages": messages})
        assert (response.status_code, response.json()["model"]) == (200, RED)
    engine = serving.variants.engines[RED, "one"]
    assert {request.arm for request in engine.seen} == {"fused", "qwen-only", "dinov2-only", "blind", "unfused"}
    assert serving.live.engine.seen == [], "the base had no part in it"
    by_model = serving.live.http.get("/fusion-weights").json()["by_model"]
    assert by_model[f"{RED}@qwen-only"]["images"] == 1


@pytest.mark.parametrize("name", ["nope", f"{RED}@blind", f"{BASE}@", "ft:", "a/../b", "..", "x" * 400, "%00"])
def test_an_unknown_model_is_told_before_anything_is_decoded(serving: Serving, name: str):
    body = json.dumps({**ask(images=3), "model": name})
    response = serving.live.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    check(response, 404, "model_not_found", "model")
    assert serving.live.engine.num_decoded == 0
    assert len(serving.live.engine.seen) == 0


def test_a_model_of_another_base_is_not_served(serving: Serving):
    serving.publish(RED, "one", base_fingerprint="another", base="some-base")
    error = check(serving.chat(RED), 404, "model_not_found", "model")
    assert "Serve some-base" in error["message"]
    assert serving.variants.loads == []


def test_a_swap_lets_the_old_version_finish_and_a_roll_back_is_at_once(serving: Serving):
    serving.publish(RED, "one")
    assert serving.version_of(RED) == "one"
    with serving.streaming(RED) as lines:
        serving.variants.hold()
        serving.publish(RED, "two")
        assert serving.version_of(RED) == "one", "the old version serves while the new one is read"
        serving.variants.wait_begun()
        serving.variants.wait_begun()
        assert serving.version_of(RED) == "one"
        serving.variants.release()
        serving.until(RED, lambda card: card["status"] == "loaded")
        assert serving.version_of(RED) == "two"
        assert list(serving.variants.engines[RED, "one"].rows), "the first stream is still on its version"
        lines.close()
    assert serving.live.http.post(f"/v1/models/{RED}/rollback").json()["system_fingerprint"] == "fp_one"
    assert serving.version_of(RED) == "one"
    assert serving.variants.loads == [(RED, "one"), (RED, "two")]
    again = serving.live.http.post(f"/v1/models/{RED}/rollback")
    check(again, 400, "invalid_value", "model")


def test_a_broken_version_leaves_the_old_one_serving_and_is_reported(serving: Serving):
    serving.publish(RED, "one")
    assert serving.version_of(RED) == "one"
    serving.variants.broken.add("two")
    serving.publish(RED, "two")
    assert serving.version_of(RED) == "one"
    card = serving.until(RED, lambda card: card["status"] == "failed")
    assert card["error"]["code"] == "checkpoint_incomplete"
    assert card["system_fingerprint"] == "fp_one"
    assert [serving.version_of(RED) for _ in range(3)] == ["one"] * 3
    assert serving.variants.loads == [(RED, "one"), (RED, "two")], "what has failed is not tried at every request"
    assert serving.live.metric('dve_model_swaps_total{outcome="failed"}') == 1
    assert serving.live.http.post(f"/v1/models/{RED}/rollback").json()["status"] == "loaded"


def test_a_model_that_never_loaded_is_an_error_until_somebody_loads_it_again(serving: Serving):
    serving.variants.broken.add("one")
    serving.publish(RED, "one")
    for _ in range(3):
        response = serving.chat(RED)
        check(response, 503, "checkpoint_incomplete")
        assert response.headers["x-should-retry"] == "false"
        assert "safetensors" not in response.text
    assert len(serving.variants.loads) == 1
    assert serving.version_of(BASE) == "fake"
    check(serving.live.http.post(f"/v1/models/{RED}/load"), 503, "checkpoint_incomplete")
    serving.variants.broken.clear()
    assert serving.live.http.post(f"/v1/models/{RED}/load").json()["status"] == "loaded"
    assert serving.version_of(RED) == "one"
    assert len(serving.variants.loads) == 3


def test_the_least_recently_used_model_makes_room_and_never_one_in_use(serving: Serving):
    serving.variants.budget = 280  # two of 100 bytes; another one needs 50, and 35 for its keys and values
    for model in (RED, BLUE, GREEN):
        serving.publish(model, "one")
    with serving.streaming(RED):
        assert serving.version_of(BLUE) == "one"
        assert serving.version_of(GREEN) == "one"
        assert [serving.card(m)["status"] for m in (RED, BLUE, GREEN)] == ["loaded", "ready", "loaded"]
        assert serving.live.metric('dve_model_swaps_total{outcome="evicted"}') == 1
        with serving.streaming(GREEN):
            refused = serving.chat(BLUE)
            check(refused, 503, "server_overloaded")
            assert refused.headers["retry-after"] == "1"
            assert serving.card(BLUE)["status"] == "ready", "nothing is wrong with it"
    for model in (RED, GREEN):
        serving.variants.engines[model, "one"].wait_until(lambda m=model: not serving.variants.engines[m, "one"].rows)
    assert serving.version_of(BLUE) == "one"
    gone = f'dve_model_info{{device="cpu",dtype="float32",fusion="gated",model="{RED}"}}'
    assert serving.live.metric(gone) == 0


def test_a_model_over_the_whole_budget_is_refused(serving: Serving):
    serving.publish(RED, "one", num_bytes=2000)
    check(serving.chat(RED), 503, "model_too_large")
    assert serving.variants.loads == []
    assert serving.card(RED)["status"] == "failed"


def test_deleting_a_model_in_use(serving: Serving):
    serving.publish(RED, "one")
    folder = serving.root / folder_name(RED)
    with serving.streaming(RED):
        assert serving.live.openai.models.delete(RED).deleted is True
        check(serving.chat(RED), 404, "model_not_found", "model")
        check(serving.live.http.delete(f"/v1/models/{RED}"), 404, "model_not_found", "model")
        assert RED not in serving.live.http.get("/v1/models").text
        assert read_state(folder).deleted_unix is not None
        engine = serving.variants.engines[RED, "one"]
        assert engine.rows, "the stream goes on"
    engine.wait_until(lambda: not engine.rows)
    assert serving.version_of(BASE) == "fake"
    assert not folder.exists()
    assert serving.live.metric('dve_model_swaps_total{outcome="deleted"}') == 1
    serving.publish(RED, "two")
    assert serving.version_of(RED) == "two", "the id may be used again"


def test_deleting_a_model_that_is_not_in_use_takes_its_files_at_once(serving: Serving):
    serving.publish(RED, "one")
    assert serving.live.http.delete(f"/v1/models/{RED}").json() == {"id": RED, "object": "model", "deleted": True}
    assert not (serving.root / folder_name(RED)).exists()
    for name in (BASE, f"{BASE}@blind"):
        check(serving.live.http.delete(f"/v1/models/{name}"), 400, "invalid_value", "model")
    for name in ("nope", f"{RED}@blind"):
        check(serving.live.http.delete(f"/v1/models/{name}"), 404, "model_not_found", "model")


def test_unloading_a_model_in_use_and_loading_it_again(serving: Serving):
    serving.publish(RED, "one")
    with serving.streaming(RED):
        assert serving.live.http.post(f"/v1/models/{RED}/unload").json()["status"] == "ready"
        first = serving.variants.engines[RED, "one"]
        assert first.rows
        assert serving.version_of(RED) == "one"
        assert serving.variants.engines[RED, "one"] is not first
    assert serving.live.http.post(f"/v1/models/{BASE}/load").json()["id"] == BASE
    check(serving.live.http.post(f"/v1/models/{BASE}/unload"), 400, "invalid_value", "model")
    check(serving.live.http.post("/v1/models/nope/load"), 404, "model_not_found", "model")


def test_a_variant_whose_engine_breaks_takes_nobody_with_it(serving: Serving):
    serving.publish(RED, "one")
    with serving.streaming(BASE) as lines:
        with serving.streaming(RED) as broken:
            check(serving.chat(RED, "die"), 500, "request_failed")
            assert "request_failed" in "".join(broken)
        check(serving.chat(RED), 503, "checkpoint_corrupt")
        assert serving.live.http.get("/health/live").status_code == 200
        assert serving.version_of(BASE) == "fake"
        assert serving.live.http.post(f"/v1/models/{RED}/load").json()["status"] == "loaded"
        assert serving.version_of(RED) == "one"
        lines.close()


def test_a_broken_variant_is_loaded_again_by_the_first_request_after_it(serving: Serving):
    """Fault: nobody had asked for the model since, so that it was still taken for loaded; a KeyError, 500."""
    serving.publish(RED, "one")
    check(serving.chat(RED, "die"), 500, "request_failed")
    assert serving.live.http.post(f"/v1/models/{RED}/load").json()["status"] == "loaded"
    assert serving.version_of(RED) == "one"


def test_another_process_promotes_and_deletes(serving: Serving):
    """Models in memory follow the registry without being asked for."""
    serving.publish(RED, "one")
    assert serving.version_of(RED) == "one"
    other = FolderRegistry(serving.root, lambda: 7.0)
    serving.publish(RED, "two", promoted=False)
    assert other.promote(RED, "two").previous == ("one",)
    serving.variants.wait_begun()
    serving.variants.wait_begun()
    serving.until(RED, lambda card: card["system_fingerprint"] == "fp_two")
    other.delete(RED)
    check(serving.chat(RED), 404, "model_not_found", "model")
    for _ in range(2000):
        if not (serving.root / folder_name(RED)).exists():
            break
        serving.live.http.get("/health")
    assert not (serving.root / folder_name(RED)).exists()


def test_a_client_that_leaves_while_its_model_is_loaded_frees_its_place(serving: Serving):
    serving.publish(RED, "one")
    serving.variants.hold()
    with pytest.raises(openai.APITimeoutError):
        serving.live.openai.with_options(timeout=0.2).chat.completions.create(**{**ask(), "model": RED})
    serving.variants.wait_begun()
    serving.variants.release()
    serving.until(RED, lambda card: card["status"] == "loaded")
    assert serving.version_of(RED) == "one"
    assert len(serving.variants.loads) == 1


def test_a_wait_for_a_model_ends_with_the_requests_time(tmp_path: Path):
    variants = FakeVariants()
    with run_server(FakeEngine(), variants=variants, data_dir=tmp_path, request_timeout_seconds=0.2) as live:
        serving = Serving(live, variants, tmp_path / "models")
        serving.publish(RED, "one")
        variants.hold()
        check(serving.chat(RED), 504, "timeout")
        variants.release()


def test_files_of_deleted_models_go_at_a_start(tmp_path: Path):
    serving = Serving(None, FakeVariants(), tmp_path / "models")
    serving.publish(RED, "one")
    serving.publish(BLUE, "one")
    FolderRegistry(serving.root, lambda: 7.0).delete(RED)
    with run_server(FakeEngine(), data_dir=tmp_path) as live:
        assert [entry.name for entry in serving.root.iterdir()] == [folder_name(BLUE)]
        response = live.http.post(CHAT, json={**ask(), "model": BLUE})
        check(response, 503, "model_too_large")
