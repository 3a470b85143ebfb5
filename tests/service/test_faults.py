"""Overload, disconnects, deadlines, a dying engine, loading and leaving: nobody waits for ever."""

import asyncio
import threading

import httpx
import openai
import pytest

from model_core.errors import CheckpointIncompleteError, EngineDeadError, RequestFailedError
from model_core.types import ChatMessage, GenerationRequest, TextPart
from service.admission import Admission
from service.deadline import Deadline
from service.engine_client import EngineClient, EngineLimits
from service.errors import DrainingError, RequestTimeoutError, StalledError
from service.fleet import Member
from service.metrics import Metrics
from tests.service.conftest import LiveServer, ask
from tests.service.fakes import INFO, FakeEngine

CHAT = "/v1/chat/completions"


def run_chats(live: LiveServer, bodies: list[dict], then) -> list[httpx.Response]:
    """Post all bodies at once, call `then` while they wait, and give their answers."""
    answers: list = [None] * len(bodies)

    def post(i: int) -> None:
        answers[i] = httpx.post(live.url + CHAT, json=bodies[i], timeout=20)

    threads = [threading.Thread(target=post, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    then()
    for thread in threads:
        thread.join(20)
    return answers


def test_a_full_queue_refuses_and_serves_those_it_took(start):
    live = start(max_num_seqs=1, max_waiting=1)
    live.engine.hold()

    def when_full() -> None:
        live.engine.wait_until(lambda: len(live.engine.rows) == 2)
        for stream in (False, True):
            refused = live.chat(stream=stream)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "server_overloaded"
            assert refused.headers["retry-after"] == "1"
            assert "x-should-retry" not in refused.headers
        with pytest.raises(openai.InternalServerError, match="queue is full"):
            live.openai.chat.completions.create(**ask())
        live.engine.release()

    taken = run_chats(live, [ask(), ask()], when_full)
    assert [answer.status_code for answer in taken] == [200, 200]
    assert len(live.engine.seen) == 2, "a refused request must not be decoded"
    assert live.metric('dve_admission_rejections_total{reason="server_overloaded"}') == 3
    assert live.chat().status_code == 200


def test_a_deadline_that_passes(start):
    live = start(request_timeout_seconds=0.2)
    live.engine.hold()
    late = live.chat()
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"
    live.engine.wait_until(lambda: live.engine.aborted)
    assert live.engine.num_steps == 0, "no compute may be spent on it"
    assert 0 < live.engine.seen[-1].timeout_seconds <= 0.2, "the engine has the deadline too"


def test_a_deadline_that_passes_in_a_stream(start):
    live = start(request_timeout_seconds=0.5)
    frames = live.chat("forever", stream=True).text.split("\n\n")
    assert '"code": "timeout"' in frames[-2]
    assert "[DONE]" not in frames[-2]


def test_a_row_that_breaks_ends_alone(start):
    live = start()
    broken = live.chat("break")
    assert broken.status_code == 500
    assert broken.json()["error"]["code"] == "request_failed"
    assert "secret" not in broken.text
    with pytest.raises(openai.APIError) as caught:
        list(live.openai.chat.completions.create(**ask("break"), stream=True))
    assert caught.value.code == "request_failed"
    text = live.chat("break", stream=True).text
    assert "[DONE]" not in text
    assert "secret" not in text
    assert live.metric('dve_request_failure_total{code="request_failed"}') == 3
    assert live.chat().status_code == 200


@pytest.mark.parametrize("text", ["lose", "refuse"])
def test_a_request_that_the_engine_loses_is_answered(start, text: str):
    live = start()
    assert live.chat(text).json()["error"]["code"] == "request_failed"
    assert live.chat().status_code == 200


def test_a_dead_engine_answers_everyone_once(start):
    live = start()
    assert live.http.get("/health/live").status_code == 200
    live.engine.hold()
    others: list = []

    def kill() -> None:
        live.engine.wait_until(lambda: len(live.engine.rows) == 3)
        live.engine.release()

    others = run_chats(live, [ask("die"), ask(), ask(stream=True)], kill)
    assert [a.status_code for a in others] == [503] * 3
    assert {a.json()["error"]["code"] for a in others} == {"engine_dead"}
    after = live.chat()
    assert (after.status_code, after.headers["x-should-retry"]) == (503, "false")
    assert "illegal memory" not in after.text + others[0].text
    for probe in ("/health/live", "/health/ready", "/health"):
        assert live.http.get(probe).json()["error"]["code"] == "engine_dead"
    assert live.http.get("/metrics").status_code == 200


def test_an_engine_that_dies_in_mid_stream(start):
    live = start()
    with live.http.stream("POST", CHAT, json=ask("forever", stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        httpx.post(live.url + CHAT, json=ask("die"), timeout=20)
        last = [line for line in lines if line][-1]
    assert '"code": "engine_dead"' in last


def test_the_port_answers_while_the_model_loads(start):
    may_load = threading.Event()

    def load() -> FakeEngine:
        assert may_load.wait(20)
        return FakeEngine()

    live = start(load=load)
    assert live.http.get("/health/live").status_code == 200
    for path in ("/health/ready", "/v1/models", "/fusion-weights"):
        early = live.http.get(path)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "model_loading")
        assert early.headers["retry-after"] == "1"
    assert live.chat().status_code == 503
    assert live.http.get("/metrics").status_code == 200
    may_load.set()
    while live.http.get("/health/ready").status_code != 200:
        pass
    assert live.chat().status_code == 200


# The bridge alone, without HTTP.


def make_client(engine: FakeEngine, clock=None, load=None, **limits) -> EngineClient:
    more = {} if clock is None else {"clock": clock}
    return EngineClient(load or (lambda: engine), Metrics(), EngineLimits(**limits), **more)


def make_request(text: str = "x", request_id: str = "r") -> GenerationRequest:
    return GenerationRequest(request_id, (ChatMessage("user", (TextPart(text),)),))


async def read(client: EngineClient, request: GenerationRequest) -> list:
    with client.admit() as admission:
        return [event async for event in admission.generate(request)]


def test_exactly_one_terminal_event_and_it_is_the_last():
    async def main() -> None:
        client = make_client(FakeEngine())
        client.start()
        await client.wait_loaded()
        events = await read(client, make_request())
        assert [event.is_terminal for event in events] == [False, False, False, True]
        await client.stop()
        with pytest.raises(DrainingError):
            await read(client, make_request())

    asyncio.run(main())


def test_stop_ends_what_runs_with_an_error():
    async def main() -> None:
        engine = FakeEngine()
        client = make_client(engine, shutdown_timeout_seconds=0.0)
        client.start()
        await client.wait_loaded()
        engine.hold()
        waiting = asyncio.create_task(read(client, make_request("forever")))
        await asyncio.to_thread(engine.wait_until, lambda: engine.rows)
        await client.stop()
        with pytest.raises(DrainingError):
            await waiting

    asyncio.run(main())


def test_stop_lets_what_runs_finish():
    async def main() -> None:
        engine = FakeEngine()
        client = make_client(engine, shutdown_timeout_seconds=20.0)
        client.start()
        await client.wait_loaded()
        engine.hold()
        running = asyncio.create_task(read(client, make_request()))
        await asyncio.to_thread(engine.wait_until, lambda: engine.rows)
        stopping = asyncio.create_task(client.stop())
        await asyncio.sleep(0)
        engine.release()
        assert (await running)[-1].finish_reason == "stop"
        await stopping

    asyncio.run(main())


def test_live_fails_only_when_work_waits_and_nothing_moves():
    class Stuck(FakeEngine):
        """A step that does not return until it is let go."""

        def step(self):
            self.entered.set()
            assert self.leave.wait(20)
            return super().step()

    async def main() -> None:
        now = [0.0]
        engine = Stuck()
        engine.entered, engine.leave = threading.Event(), threading.Event()
        client = make_client(engine, clock=lambda: now[0], stall_timeout_seconds=10.0)
        client.start()
        await client.wait_loaded()
        now[0] = 100.0
        client.check_live()  # idle, however long
        task = asyncio.create_task(read(client, make_request()))
        assert await asyncio.to_thread(engine.entered.wait, 20)
        now[0] = 109.0
        client.check_live()
        now[0] = 111.0
        with pytest.raises(StalledError):
            client.check_live()
        engine.leave.set()
        await task
        client.check_live()
        await client.stop()

    asyncio.run(main())


def test_a_failed_load_is_told_and_kept():
    told = []

    def load() -> FakeEngine:
        raise CheckpointIncompleteError("a file is missing")

    async def main() -> None:
        client = EngineClient(load, Metrics(), EngineLimits(), on_load_failure=told.append)
        client.start()
        await client.wait_loaded()
        assert [type(error) for error in told] == [CheckpointIncompleteError]
        assert client.load_error is told[0]
        with pytest.raises(EngineDeadError):
            client.check_live()
        await client.stop()

    asyncio.run(main())


def test_a_request_id_can_not_run_twice():
    """The refused second request once took the first one's stream with it, which then waited for ever."""

    async def main() -> None:
        engine = FakeEngine()
        client = make_client(engine)
        client.start()
        await client.wait_loaded()
        engine.hold()
        first = asyncio.create_task(read(client, make_request()))
        await asyncio.to_thread(engine.wait_until, lambda: engine.rows)
        with pytest.raises(Exception, match="already running"):
            await read(client, make_request())
        engine.release()
        assert (await first)[-1].finish_reason == "stop"
        await client.stop()

    asyncio.run(main())


def test_an_idle_engine_waits_for_company_that_is_on_its_way():
    """Two requests are prepared side by side; the first must not start a batch of one."""

    class Slow(FakeEngine):
        def prepare(self, request):
            if request.request_id == "late":
                assert self.first_added.wait(20)
            return super().prepare(request)

        def add_request(self, prepared):
            super().add_request(prepared)
            self.first_added.set()

    async def main(window: float) -> int:
        engine = Slow()
        engine.first_added = threading.Event()
        # Commands are carried out after the window has closed, so the late one must not wait for the first.
        if window:
            engine.first_added.set()
        client = make_client(engine, batch_window_seconds=window)
        client.start()
        await client.wait_loaded()
        await asyncio.gather(read(client, make_request("x", "early")), read(client, make_request("x", "late")))
        await client.stop()
        return engine.batch_sizes[0]

    assert asyncio.run(main(1.0)) == 2
    assert asyncio.run(main(0.0)) == 1


def test_info_is_the_loaded_models():
    async def main() -> None:
        client = make_client(FakeEngine())
        client.start()
        await client.wait_loaded()
        assert client.info is INFO
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("left_seconds", "kind"), [(-1.0, RequestTimeoutError), (60.0, RequestFailedError)])
def test_a_deadline_that_the_engine_sees_first_is_a_timeout(left_seconds: float, kind: type[Exception]):
    """Both have the same deadline; the engine's own end of it was once told as a 500."""

    async def main() -> None:
        client = make_client(FakeEngine())
        deadline = Deadline(asyncio.get_running_loop().time() + left_seconds)
        admission = Admission(client, Member(FakeEngine()), deadline)
        assert type(admission._in_time(RequestFailedError("the request ran out of time"))) is kind

    asyncio.run(main())


def test_pictures_are_decoded_by_as_many_threads_as_set():
    """Three prepares that wait for each other end only if three threads run them; each thread was set up once."""
    meeting, set_up = threading.Barrier(3, timeout=20), []

    class Meeting(FakeEngine):
        def prepare(self, request):
            meeting.wait()
            return super().prepare(request)

    async def main() -> None:
        limits = EngineLimits(preprocess_workers=3)
        client = EngineClient(
            Meeting, Metrics(), limits, on_pool_thread=lambda: set_up.append(threading.current_thread().name)
        )
        client.start()
        await client.wait_loaded()
        await asyncio.gather(*(read(client, make_request("x", f"r{i}")) for i in range(3)))
        await client.stop()

    asyncio.run(main())
    assert len(set(set_up)) == len(set_up) == 3
