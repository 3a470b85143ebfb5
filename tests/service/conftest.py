"""A really started server on a free loopback port, with a FakeEngine behind it."""

from __future__ import annotations

import asyncio
import base64
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from service.edge import EdgeLimits
from service.engine_client import EngineClient, EngineLimits
from service.main import build_app, engine_limits, open_socket, server_config
from service.remote import RemoteImages
from service.request_limits import RequestLimits
from service.settings import SERVER_NAMES, JobSettings, Settings
from service.tracing.span import Tracer
from service.variant_loader import VariantLoader
from tests.service.fakes import PNG, FakeEngine


def image_part(data: bytes = PNG, **more) -> dict:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url, **more}}


def ask(text: str = "what?", images: int = 0, **more) -> dict:
    content = [*(image_part() for _ in range(images)), {"type": "text", "text": text}]
    return {"model": "fake/model:1", "messages": [{"role": "user", "content": content}], **more}


class LiveServer:
    """`http`: a plain client; `openai`: the official one. Both are closed with the server."""

    def __init__(self, app: FastAPI, engine: FakeEngine, client: EngineClient, url: str, data_dir: Path) -> None:
        self.app, self.engine, self.client, self.url, self.data_dir = app, engine, client, url, data_dir
        self.http = httpx.Client(base_url=url, timeout=20)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)

    def chat(self, *args, **more) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=ask(*args, **more))

    def metric(self, line: str) -> float:
        """The value of one sample, `name{labels}`; 0 if it is not there yet."""
        for found in self.http.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rsplit(" ", 1)[1])
        return 0.0


#: What follows from settings and is none: a test that needs another value puts it there.
DERIVED = {field.name for kind in (EngineLimits, RequestLimits) for field in fields(kind)} - set(SERVER_NAMES)


def with_values(limits, values: dict):
    return replace(limits, **{field.name: values[field.name] for field in fields(limits) if field.name in values})


@contextmanager
def run_server(
    engine: FakeEngine,
    load: Callable[[], FakeEngine] | None = None,
    remote: RemoteImages | None = None,
    clock: Callable[[], float] = time.monotonic,
    edge: EdgeLimits | None = None,
    variants: VariantLoader | None = None,
    tracer: Tracer | None = None,
    **values,
) -> Iterator[LiveServer]:
    """`remote`: instead of the settings' own, one that may reach loopback. `clock`: that of the keys' limits.

    `values`: settings of the server and of the jobs, and limits that follow from them, which are put in their place.
    """
    data_dir = tempfile.mkdtemp()  # not the checkout's own: there may be keys and jobs in it
    values = {"shutdown_timeout_seconds": 0.0, "data_dir": data_dir} | values
    derived = {name: values.pop(name) for name in [*values] if name in DERIVED}
    jobs = JobSettings(**{name: values[name] for name in values if name in JobSettings.model_fields})
    chosen = Settings(
        **{name: values[name] for name in values if name not in JobSettings.model_fields or name == "data_dir"}
    )
    app, client = build_app(
        chosen,
        jobs,
        load or (lambda: engine),
        clock=clock,
        variants=variants,
        tracer=tracer,
        limits=with_values(engine_limits(chosen), derived),
        request_limits=with_values(RequestLimits.from_settings(chosen, jobs), derived),
    )
    if remote is not None:
        app.state.parts = replace(app.state.parts, media=replace(app.state.parts.media, remote=remote))
    listening = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(server_config(app, edge, 1))
    started = threading.Event()

    async def main() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        if load is None:
            # `start` runs in the lifespan, which the server enters first.
            await client.wait_loaded()
        while not server.started:
            await asyncio.sleep(0)
        started.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(20)
    live = LiveServer(app, engine, client, f"http://127.0.0.1:{listening.getsockname()[1]}", chosen.data_dir)
    try:
        yield live
    finally:
        live.http.close()
        live.openai.close()
        engine.release()
        server.should_exit = True
        thread.join(20)
        listening.close()
        shutil.rmtree(data_dir)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared() -> Iterator[LiveServer]:
    """One server for tests that leave it as they found it."""
    with run_server(FakeEngine()) as live:
        yield live


@pytest.fixture
def start() -> Iterator[Callable[..., LiveServer]]:
    """Start a server of one's own: `start(max_waiting=1)`."""
    contexts = []

    def starter(engine: FakeEngine | None = None, load=None, **settings) -> LiveServer:
        context = run_server(engine or FakeEngine(), load, **settings)
        contexts.append(context)
        return context.__enter__()

    yield starter
    for context in reversed(contexts):
        context.__exit__(None, None, None)
