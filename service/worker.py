"""The composition root of the worker: settings -> store, devices, programs -> a loop that trains jobs.

In: settings of the worker and of the jobs. Out: an exit code: 0 after a drain, 2 for what the user can put right. No
torch and no CUDA in this process: trainers are subprocesses, so that none of their crashes is the worker's.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from prometheus_client import start_http_server

from service.jobs.store import store_of
from service.logs import configure_logs, logger
from service.metrics import TrainingMetrics
from service.settings import JobSettings, WorkerSettings, wants_tracing
from service.supervisor.devices import Device, LockFolder, parse_devices
from service.supervisor.job_run import RunContext, RunLimits
from service.supervisor.lease_keeper import StoreThreads
from service.supervisor.warm_reader import WarmReader
from service.supervisor.worker_loop import LoopLimits, WorkerLoop
from service.supervisor.workshop import Programs, Workshop
from service.tracing.choose import open_tracer

_THREADS_PER_DEVICE = 6
#: What reads a training file, and what that imports only once it is called.
_READER = ("model_core.cli.data", "model_core.training.data.scan", "model_core.training.data.multi")


def work(
    settings: WorkerSettings, jobs: JobSettings, *, once: bool = False, programs: Programs | None = None,
    poll_seconds: float = 0.25, limits: RunLimits | None = None,
) -> int:  # fmt: skip
    """Train until a signal; with `once` until nothing waits.

    programs: stand in for the real ones in tests. poll_seconds: between two looks for work. limits: of each run; the
    settings lay the grace and the priority over them.

    Raises:
        ConfigError: devices that are not there, a store that can't be opened.
    """
    configure_logs(settings.log_format, settings.log_level, process="worker")
    tracer = open_tracer("dve-worker", is_wanted=wants_tracing())
    devices = parse_devices(settings.worker_devices, settings.worker_concurrency)
    data_dir = jobs.data_dir.absolute()
    store = store_of(jobs)
    metrics = TrainingMetrics()
    _show_metrics(settings, metrics)
    with ThreadPoolExecutor(_THREADS_PER_DEVICE * (len(devices) + 1), "store") as pool:
        call = StoreThreads(pool)
        workshop = Workshop(store, call, data_dir, programs or Programs())
        niceness = _niceness(settings, devices)
        limits = replace(limits or RunLimits(), grace_seconds=settings.worker_grace_seconds, niceness=niceness)
        context = RunContext(
            store, call, workshop, metrics, data_dir / "jobs", max_attempts=jobs.job_max_attempts, limits=limits,
            tracer=tracer,
        )  # fmt: skip
        # A worker that ends with its work needs nobody who waits for more.
        warm = None if once else WarmReader(_READER, limits.niceness)
        loop = WorkerLoop(
            context, workshop, devices, LockFolder(data_dir / "locks"), LoopLimits(poll_seconds, once=once), warm
        )
        try:
            return asyncio.run(loop.run())
        finally:
            store.close()
            tracer.close()


def _show_metrics(settings: WorkerSettings, metrics: TrainingMetrics) -> None:
    if not settings.worker_metrics_port:
        return
    try:
        start_http_server(settings.worker_metrics_port, settings.host, metrics.registry)
    except OSError as error:
        logger.warning(
            "this worker's metrics are not served: %s (port %d). Give it another --worker-metrics-port",
            error.strerror or error, settings.worker_metrics_port,
        )  # fmt: skip


def _niceness(settings: WorkerSettings, devices: tuple[Device, ...]) -> int:
    """A trainer on a GPU needs its processor when the GPU is done; only on processors it stands back."""
    return settings.worker_nice if all(device.gpu is None for device in devices) else 0
