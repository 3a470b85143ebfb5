"""The composition root of the server: settings -> engine, metrics, app -> a listening process.

In: settings of the server and of the jobs. Out: an exit code: 0 after a good run, 2 for what the user can put right
(a missing or broken checkpoint, a port in use), 1 for the rest, a second signal and a dead engine among it. It alone,
with cli.py, may import the model.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from model_core.errors import ConfigError, DualVisionError
from model_core.types import Engine
from service.app import create_app
from service.edge import EdgeLimits, protocol_class
from service.engine_client import EngineClient, EngineLimits
from service.errors import ModelTooLargeError, NotReadyError
from service.hot_models import HotModels
from service.jobs.store import store_of
from service.keys import load_keys
from service.logs import configure_logs, logger
from service.metrics import Metrics
from service.registry import FolderRegistry
from service.request_limits import RequestLimits
from service.settings import JobSettings, Settings, wants_tracing
from service.tracing.choose import open_tracer
from service.tracing.span import Tracer
from service.variant_loader import KV_SHARE, LoadedEngine, NoVariants, VariantLoader

if TYPE_CHECKING:
    from model_core.encoder import DualVisionEncoder

#: Memory for variants on a CPU, unless the settings say otherwise.
_CPU_VARIANT_BYTES = 2 * 2**30

_BACKLOG = 2048  # connections that wait to be taken; uvicorn's own
#: From the second signal to the end, whatever happens; `_GOING_SECONDS`, for connections to close after the drain.
_LAST_SECONDS = 1.8
_GOING_SECONDS = 5
#: From an engine's death to the process's: so long the probes and a scrape (every 15 s) are told, then whoever started
#: the process starts it anew. Nothing short of that helps, and not everybody who starts processes asks probes.
_DEAD_SECONDS = 20.0
#: Of an idle connection. A client that keeps it for longer meets the end of it with its next request: httpx keeps 5 s,
#: aiohttp 15, load balancers 60.
_IDLE_SECONDS = 75
#: Of the event loop, from a connection in the kernel's queue to one that the edge knows, and one to spare.
_LAST_TURNS = 4

#: An idle engine waits so long for company: what comes together starts together, and nobody feels 5 ms.
_BATCH_WINDOW_SECONDS = 0.005


class ModelLoader:
    """Loads the model that the settings name, and variants of it beside it (hot_models.py)."""

    def __init__(self, settings: Settings, request_limits: RequestLimits) -> None:
        self._settings, self._request_limits = settings, request_limits
        self._encoder: DualVisionEncoder | None = None
        self._gpu_budget: int | None = None

    def load_base(self) -> Engine:
        """Runs in the engine's thread; takes a while."""
        self._encoder = load_encoder(self._settings, self._request_limits)
        engine: Engine = self._encoder.engine
        # What is there now stays for good. The collector need not look at it again: half a million objects are a pause
        # of a third of a second in somebody's answer, and so many that it would come by far too rarely.
        gc.collect()
        gc.freeze()
        return engine

    def budget_bytes(self) -> int:
        import torch  # noqa: PLC0415  as in load_encoder

        asked = self._settings.variant_memory_bytes
        if asked is not None or self._encoder is None:
            return asked or 0
        device = self._encoder.model.device
        if device.type != "cuda":
            return _CPU_VARIANT_BYTES
        if self._gpu_budget is None:
            # Half of what the base leaves, about the eighth that it kept back (EngineConfig.variant_bytes).
            self._gpu_budget = int(torch.cuda.mem_get_info(device)[0]) // 2
        return self._gpu_budget

    def load(self, folder: Path, model_id: str, kv_cache_bytes: int) -> LoadedEngine:
        """Raises CheckpointError, ModelTooLargeError."""
        import torch  # noqa: PLC0415  as in load_encoder

        encoder = self._encoder
        if encoder is None:
            raise NotReadyError("the model is not loaded", value=model_id)
        sizes = replace(
            encoder.engine.config,
            kv_cache_bytes=kv_cache_bytes,
            shrinks_context=True,
            encoder_cache_bytes=encoder.engine.config.encoder_cache_bytes // KV_SHARE,
        )
        try:
            made = encoder.beside(folder, model_id, sizes)
        except torch.OutOfMemoryError:
            raise ModelTooLargeError(
                "the model does not fit the device's memory", value=model_id,
                fix="Unload another model or lower --kv_cache_bytes, then POST /v1/models/{id}/load",
            ) from None  # fmt: skip
        return LoadedEngine(made.engine, made.bytes_beside(encoder))


def load_encoder(settings: Settings, request_limits: RequestLimits) -> DualVisionEncoder:
    """Build and warm up the model that the settings name."""
    # Here and not above: importing torch takes seconds, and the port should answer before that.
    from model_core.checkpoint import quiet_unless_terminal  # noqa: PLC0415
    from model_core.encoder import DualVisionEncoder  # noqa: PLC0415
    from model_core.engine.config import EngineConfig  # noqa: PLC0415
    from model_core.processing.images import ImageLimits  # noqa: PLC0415

    quiet_unless_terminal()
    common: dict[str, Any] = {
        "device": None if settings.device == "auto" else settings.device,
        "dtype": None if settings.dtype == "auto" else settings.dtype,
        "engine_config": EngineConfig(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_encode_tokens=settings.max_encode_tokens,
            encode_window_seconds=settings.encode_window_seconds,
            max_context_tokens=settings.max_context_tokens,
            kv_cache_bytes=settings.kv_cache_bytes,
            encoder_cache_bytes=settings.encoder_cache_bytes,
            variant_bytes=settings.variant_memory_bytes,
        ),
    }
    if settings.model is not None:
        encoder = DualVisionEncoder.from_pretrained(settings.model, **common)
    else:
        encoder = DualVisionEncoder(settings.qwen_model_name, settings.dinov2_model_name, **common)
    # Warmed up first: its own picture may be over a small limit.
    encoder.warm_up()
    encoder.configure(
        ImageLimits(
            max_bytes=request_limits.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_visual_tokens=settings.max_visual_tokens,
        )
    )
    return encoder


_torch_default = threading.Lock()


def use_one_torch_thread() -> None:
    """For threads of the preprocess pool: their small tensors are not worth waking the engine's threads for."""
    import torch  # noqa: PLC0415  as above

    with _torch_default:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        # That also changed the default of every thread that begins later. Put back from a thread that ends here:
        # this one keeps its one.
        restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restoring.start()
        restoring.join()


def engine_limits(settings: Settings) -> EngineLimits:
    return EngineLimits(
        max_num_seqs=settings.max_num_seqs,
        max_waiting=settings.max_waiting,
        request_timeout_seconds=settings.request_timeout_seconds,
        shutdown_timeout_seconds=settings.shutdown_timeout_seconds,
        batch_window_seconds=_BATCH_WINDOW_SECONDS,
        preprocess_workers=settings.preprocess_workers,
    )


def build_app(
    settings: Settings,
    jobs: JobSettings,
    load: Callable[[], Engine],
    on_load_failure: Callable[[BaseException], None] | None = None,
    on_pool_thread: Callable[[], None] | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    variants: VariantLoader | None = None,
    limits: EngineLimits | None = None,
    request_limits: RequestLimits | None = None,
    tracer: Tracer | None = None,
) -> tuple[FastAPI, EngineClient]:
    """The app with its parts, its store opened and brought up to date. `variants`: none serves the base alone.

    `limits`, `request_limits`: others than those that follow from the settings.
    Raises ConfigError, StoreUnavailableError.
    """
    keys, metrics = load_keys(settings), Metrics()
    client = EngineClient(
        load, metrics, limits or engine_limits(settings), on_load_failure=on_load_failure, on_pool_thread=on_pool_thread
    )
    registry = FolderRegistry(settings.data_dir / "models", time.time)
    models = HotModels(registry, client, variants or NoVariants(), metrics, on_pool_thread=on_pool_thread)
    app = create_app(
        settings, client, keys, store_of(jobs), models,
        jobs=jobs, request_limits=request_limits or RequestLimits.from_settings(settings, jobs), clock=clock,
        tracer=tracer,
    )  # fmt: skip
    return app, client


def server_config(
    app: FastAPI, limits: EdgeLimits | None = None, going_seconds: int = _GOING_SECONDS
) -> uvicorn.Config:
    """How uvicorn runs the application; what its edge refuses counts in the application's metrics."""
    metrics: Metrics = app.state.parts.metrics

    def note(status: int) -> None:
        metrics.http_requests.labels("unmatched", str(status), "false").inc()

    return uvicorn.Config(
        app,
        http=protocol_class(limits or EdgeLimits(), note),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=going_seconds,
    )


def open_socket(host: str, port: int) -> socket.socket:
    """Before the model loads, so that a port in use is told at once. It listens: who comes early waits for the app,
    and what the log says of it is true. Raises ConfigError."""
    opened: socket.socket | None = None
    try:
        # With its protocol named: asyncio sets TCP_NODELAY only where `proto` says TCP, and without it
        # every answer waits 40 ms for a delayed acknowledgement.
        family, kind, protocol, _, _ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(_BACKLOG)
    except OSError as error:
        if opened is not None:
            opened.close()
        raise ConfigError(
            f"can't listen: {error.strerror or error}", value=f"{host}:{port}", fix="Choose another --host or --port"
        ) from None
    return opened


class _Server(uvicorn.Server):
    """Uvicorn, whose port stays open while it drains: a balancer's probe is told 503, not left without an answer."""

    def __init__(self, config: uvicorn.Config, client: EngineClient) -> None:
        super().__init__(config)
        self._client = client
        self.num_signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains, a second one ends what runs. Uvicorn's own would die of the signal at the end."""
        self.num_signals += 1
        if self.num_signals == 1:
            self._client.begin_drain()
            return
        self._client.cut_drain()
        # Uvicorn's own patience, should a client not take its last words.
        self.config.timeout_graceful_shutdown = 1
        # Whatever hangs (a decoder, a library's thread) does not keep the process.
        last = threading.Timer(_LAST_SECONDS, os._exit, (1,))
        last.daemon = True
        last.start()

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to close the port and go."""
        is_over = self._client.is_drained() or self._client.dead_seconds > _DEAD_SECONDS
        return await super().on_tick(counter) or is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Who has dialled is let in before the port closes: the kernel would reset what it has queued."""
        for _ in range(_LAST_TURNS):
            await asyncio.sleep(0)
        await super().shutdown(sockets)


def serve(settings: Settings, jobs: JobSettings, load: Callable[[], Engine] | None = None) -> int:
    """Run until a signal. `load` stands in for the real engine in tests. Raises ConfigError."""
    configure_logs(settings.log_format, settings.log_level)
    tracer = open_tracer("dve-server", is_wanted=wants_tracing())
    servers: list[_Server] = []

    def give_up(_: BaseException) -> None:
        for server in servers:
            server.should_exit = True

    # A stand-in for the engine needs no torch, and importing it takes seconds.
    on_pool_thread = use_one_torch_thread if load is None else None
    request_limits = RequestLimits.from_settings(settings, jobs)
    loader = ModelLoader(settings, request_limits)
    app, client = build_app(
        settings, jobs, load or loader.load_base, give_up, on_pool_thread,
        variants=loader if load is None else None, request_limits=request_limits, tracer=tracer,
    )  # fmt: skip
    listening = open_socket(settings.host, settings.port)
    servers.append(_Server(server_config(app), client))
    host, port = listening.getsockname()[:2]
    logger.info("listening on http://%s:%d, loading the model", f"[{host}]" if ":" in host else host, port)
    asyncio.run(servers[0].serve(sockets=[listening]))
    tracer.close()
    code = 1 if servers[0].num_signals > 1 or client.dead_seconds else 0
    if client.load_error is not None:
        code = 2 if isinstance(client.load_error, DualVisionError) else 1
    if not client.join_pool(_LAST_SECONDS):
        # The interpreter would wait for them at its exit.
        logger.warning("preprocessing hangs; leaving without it")
        logging.shutdown()
        os._exit(code)
    return code
