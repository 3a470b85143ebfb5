"""Signals and a real process: what it owes to those it has taken, what it tells newcomers, and how long it may take."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import ask

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"

#: 100 steps a second, so that a signal finds every answer half said.
SERVE = """
import functools
import sys
import threading
from service import main
from service.main import serve
from service.settings import load_settings
from tests.service.fakes import FakeEngine

class Slow(FakeEngine):
    def step(self):
        if "forgetful" not in sys.argv:
            self._idle.wait(0.01)
        return super().step()

    def prepare(self, request):
        if "hang" in str(request.messages):
            threading.Event().wait()
        if "forgetful" in sys.argv:  # of what tests look at
            for kept in (self.seen, self.forked, self.added, self.aborted, self.batch_sizes):
                kept.clear()
        return super().prepare(request)

if "patient" in sys.argv:
    main.EdgeLimits = functools.partial(main.EdgeLimits, last_call_seconds=20.0)

if "mortal" in sys.argv:
    main._DEAD_SECONDS = 1.0

def load():
    if "never" in sys.argv:
        print("loading", file=sys.stderr, flush=True)
        threading.Event().wait()
    return Slow()

sys.exit(serve(*load_settings({"port": 0, "log_format": "json", "shutdown_timeout_seconds": SHUTDOWN}), load))
"""


@dataclass
class Process:
    popen: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def read_until(self, word: str) -> str:
        for line in self.popen.stderr:
            self.lines.append(line)
            if word in line:
                return line
        raise AssertionError(self.lines)

    def read_on(self) -> None:
        """A log that nobody reads would fill its pipe and hold the process up."""
        self.lines += self.popen.stderr

    def signal(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Its exit code, once nothing of its process group is left."""
        _, rest = self.popen.communicate(timeout=30)
        self.lines += rest.splitlines()
        with pytest.raises(ProcessLookupError):
            os.killpg(self.popen.pid, 0)
        return self.popen.returncode


@contextmanager
def running(*args: str, shutdown: float = 20.0, until: str = "ready: ") -> Iterator[Process]:
    code = SERVE.replace("SHUTDOWN", str(shutdown))
    popen = subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    process = Process(popen)
    try:
        process.url = re.search(r"http://[^\s,\"]+", process.read_until("listening on"))[0]
        process.read_until(until)
        yield process
    finally:
        popen.kill()
        popen.wait()
        popen.stderr.close()


def begin_stream(client: httpx.Client, body: dict, got: list) -> threading.Event:
    """Reads a stream in a thread; the event is set when its first frame is there."""
    begun = threading.Event()

    def read() -> None:
        with client.stream("POST", CHAT, json=body) as response:
            for line in response.iter_lines():
                begun.set()
                got.append(line)

    threading.Thread(target=read, daemon=True).start()
    return begun


def test_the_first_signal_drains():
    got, whole = [], []
    with running() as process, httpx.Client(base_url=process.url, timeout=20) as client:
        assert begin_stream(client, ask("count", max_tokens=90, stream=True), got).wait(20)
        waiting = threading.Thread(target=lambda: whole.append(client.post(CHAT, json=ask("count", max_tokens=60))))
        waiting.start()
        while "dve_num_requests_running 2.0" not in client.get("/metrics").text:
            pass
        process.signal()
        while (ready := client.get("/health/ready")).status_code == 200:
            pass
        late = client.post(CHAT, json=ask())
        alive = client.get("/health/live")
        waiting.join(20)
        assert process.end() == 0
    for refused in (ready, late):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        assert refused.headers["retry-after"] == "1"
    assert alive.status_code == 200, "who drains is alive: nobody should kill it"
    assert whole[0].json()["usage"]["completion_tokens"] == 60
    assert [line for line in got if line][-1] == "data: [DONE]"
    assert sum('"content":"x"' in line for line in got) == 90
    assert not any("Traceback" in line for line in process.lines)


def test_a_second_signal_ends_what_runs_with_an_error_in_the_stream():
    got, whole = [], []
    with running() as process, httpx.Client(base_url=process.url, timeout=20) as client:
        assert begin_stream(client, ask("forever", stream=True), got).wait(20)
        waiting = threading.Thread(target=lambda: whole.append(client.post(CHAT, json=ask("forever"))))
        waiting.start()
        while "dve_num_requests_running 2.0" not in client.get("/metrics").text:
            pass
        process.signal()
        while client.get("/health/ready").status_code == 200:
            pass
        begin = time.monotonic()
        process.signal()
        code = process.end()
        took = time.monotonic() - begin
        waiting.join(20)
    assert (code, took < 2.0) == (1, True), took
    last = [line for line in got if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_draining"
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "server_draining")
    assert not any("Traceback" in line for line in process.lines)


def test_who_has_dialled_gets_an_answer_though_the_port_is_closed():
    """Reset, a client can't know whether its request was taken."""
    with running("patient") as process:
        where = httpx.URL(process.url)
        with socket.create_connection((where.host, where.port), timeout=20) as early:
            process.signal()
            while is_open(where):
                time.sleep(0.01)
            early.sendall(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b"".join(iter(lambda: early.recv(65536), b""))
        assert process.end() == 0
    assert answer.startswith(b"HTTP/1.1 503 ") and b"connection: close" in answer and b"server_draining" in answer


def is_open(where: httpx.URL) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((where.host, where.port)):
        return True
    return False


def test_what_outlasts_the_shutdown_time_is_ended_with_an_error():
    got: list[str] = []
    with running(shutdown=0.2) as process, httpx.Client(base_url=process.url, timeout=20) as client:
        assert begin_stream(client, ask("forever", stream=True), got).wait(20)
        process.signal()
        assert process.end() == 0
    assert '"code": "server_draining"' in [line for line in got if line][-1]


def test_a_process_outlives_its_engine_by_a_few_scrapes_and_ends_with_an_error():
    """Under compose nobody asks a probe: a server without an engine answered 503 for ever."""
    with running("mortal") as process, httpx.Client(base_url=process.url, timeout=20) as client:
        assert client.post(CHAT, json=ask("die")).json()["error"]["code"] == "engine_dead"
        assert client.get("/health/live").json()["error"]["code"] == "engine_dead"
        assert 'dve_engine_state{state="dead"} 1.0' in client.get("/metrics").text
        assert process.end() == 1
    assert any("the engine died" in line for line in process.lines)


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_decoder_that_hangs_does_not_keep_the_process(num_signals: int):
    with running(shutdown=0.2) as process, httpx.Client(base_url=process.url, timeout=20) as client:
        threading.Thread(target=lambda: _post(client, ask("hang")), daemon=True).start()
        while 'dve_queue_depth{stage="preprocess"} 1.0' not in client.get("/metrics").text:
            pass
        begin = time.monotonic()
        process.signal()
        if num_signals == 2:
            while client.get("/health/ready").status_code == 200:
                pass
            process.signal()
        assert process.end() == num_signals - 1
        assert time.monotonic() - begin < 5


def _post(client: httpx.Client, body: dict) -> None:
    with contextlib.suppress(httpx.TransportError):  # its server goes
        client.post(CHAT, json=body)


def test_a_signal_while_the_model_loads():
    with running("never", until="loading") as process:
        assert httpx.get(process.url + "/health/ready").json()["error"]["code"] == "model_loading"
        begin = time.monotonic()
        process.signal()
        assert process.end() == 0
        assert time.monotonic() - begin < 3


# Under load


@dataclass
class Load:
    """Clients in a closed loop until their server refuses or has gone; outcomes by what began before the signal."""

    url: str
    told_at: float = float("inf")
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)

    async def client(self, http: httpx.AsyncClient, number: int) -> None:
        for i in range(10_000):
            begin = time.monotonic()
            outcome = await self.one(http, is_stream=(number + i) % 2 == 0, num_tokens=10 + (7 * number + i) % 30)
            (self.before if begin < self.told_at else self.after)[outcome] += 1
            if outcome != "whole":
                return

    async def one(self, http: httpx.AsyncClient, *, is_stream: bool, num_tokens: int) -> str:
        try:
            answer = await http.post(CHAT, json=ask("count", max_tokens=num_tokens, stream=is_stream))
        except httpx.ConnectError:
            return "not taken"  # its server closed the port before this client came to dial
        except httpx.TransportError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return answer.json()["error"]["code"]
        if is_stream:
            is_whole = answer.text.endswith("data: [DONE]\n\n") and answer.text.count('"content":"x"') == num_tokens
        else:
            is_whole = answer.json()["usage"]["completion_tokens"] == num_tokens
        return "whole" if is_whole else "cut"

    async def run(self, process: Process, num_clients: int, after_answers: int) -> None:
        limits = httpx.Limits(max_connections=num_clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=30, limits=limits) as http:
            clients = [asyncio.create_task(self.client(http, number)) for number in range(num_clients)]
            while self.before.total() < after_answers:
                await asyncio.sleep(0)
            process.signal()
            self.told_at = time.monotonic()
            await asyncio.gather(*clients)


def signal_under_load(after_answers: int) -> Load:
    with running() as process:
        reading = threading.Thread(target=process.read_on)
        reading.start()
        load = Load(process.url)
        asyncio.run(load.run(process, 24, after_answers))
        reading.join(30)
        assert process.end() == 0
    assert not any("Traceback" in line for line in process.lines), process.lines
    # Whoever asked before the signal has an answer: whole, or a refusal that says when to come again.
    assert set(load.before) <= {"whole", "server_draining", "not taken"}, load
    assert load.before["whole"] >= after_answers
    return load


def test_a_signal_under_load_loses_no_answer():
    signal_under_load(30)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_twenty_signals_under_load_lose_no_answer():
    for i in range(20):
        load = signal_under_load(20 + 7 * i)
        assert "cut" not in load.after, load
