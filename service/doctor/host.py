"""The doctor on the host: Python and its packages, ports, data folder, disk, keys, clock.

In: settings, and what a test gives in the place of the machine. Out: findings. It opens sockets on the asked address to
see whether they are free, asks those that are not who has them, and writes one file into the data folder, which it
removes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from model_core.errors import ConfigError, EngineDeadError
from service.doctor.finding import Finding, fail, of_error, ok, warn
from service.errors import StalledError
from service.keys import is_loopback, parse_keys, read_keys
from service.settings import Settings, WorkerSettings, wants_tracing

_DISTRIBUTION = "dual-vision-encoder"
_LOW_BYTES, _LOW_RATIO = 10 * 2**30, 0.1
_FULL_BYTES = 2**30
_LEAST_PYTHON = (3, 11)
_SKEW_SECONDS = 2.0
_ASK_SECONDS, _ASK_BYTES = 3.0, 2**20


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    shown = ".".join(map(str, version))
    if version < _LEAST_PYTHON:
        return fail("python", shown, "Install Python 3.11 or newer and make the environment anew")
    return ok("python", shown)


def packages(requirements: Sequence[str] | None = None) -> Finding:
    """Whether what is installed is in the ranges that this program declares. `requirements`: tests give their own."""
    try:
        lines = metadata.requires(_DISTRIBUTION) if requirements is None else requirements
    except metadata.PackageNotFoundError:
        lines = None
    if lines is None:
        return warn("packages", "this program is not installed, so its ranges are unknown", "pip install -e .")
    wrong = [text for one in map(Requirement, lines) if _applies(one) and (text := _misfit(one))]
    if wrong:
        return fail("packages", "; ".join(wrong), "pip install -c constraints.txt -e .")
    return ok("packages", "all in their declared ranges")


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _misfit(requirement: Requirement) -> str:
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    fits = requirement.specifier.contains(found, prereleases=True)
    return "" if fits else f"{requirement.name} {found}, allowed {requirement.specifier}"


def ports(settings: Settings, worker: WorkerSettings) -> list[Finding]:
    """The server's, and the worker's for its metrics, which it can do without. Free, or taken by ours that runs."""
    taken = _port("port", settings.host, settings.port, fail, "Stop what listens there, or set DVE_PORT")
    found = [taken if taken.state == "ok" else _running_server(settings.host, settings.port) or taken]
    if worker.worker_metrics_port:
        host, port = worker.host, worker.worker_metrics_port
        remedy = "Set DVE_WORKER_METRICS_PORT; without it the worker runs and shows no metrics"
        taken = _port("worker port", host, port, warn, remedy)
        found.append(taken if taken.state == "ok" else _running_worker(host, port) or taken)
    return found


def _running_server(host: str, port: int) -> Finding | None:
    """What a server of ours on this port says of itself; None where it is another's."""
    try:
        told = json.loads(_ask(host, port, "/health/live"))
        if told == {"status": "live"}:
            return ok("port", f"{host}:{port}: a dve server runs there, and is live")
        code = told["error"]["code"]
    except (ValueError, TypeError, LookupError):
        return None
    if code not in (EngineDeadError.code, StalledError.code):
        return None
    return fail("port", f"{host}:{port}: a dve server runs there, {code}", "Restart it; RUNBOOK.md, DveStalled")


def _running_worker(host: str, port: int) -> Finding | None:
    if b"dve_job_heartbeat_age_seconds" not in _ask(host, port, "/metrics"):
        return None
    return ok("worker port", f"{host}:{port}: a dve worker runs there")


def _ask(host: str, port: int, path: str) -> bytes:
    """Of whoever listens there; nothing where that is no HTTP. No proxy is asked on the way."""
    try:
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
        connection = http.client.HTTPConnection(anywhere.get(host, host), port, timeout=_ASK_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read(_ASK_BYTES)
    except (OSError, ValueError, http.client.HTTPException):
        return b""


def _port(name: str, host: str, port: int, judge: Callable[[str, str, str], Finding], remedy: str) -> Finding:
    shown = f"{host}:{port}"
    try:
        family, kind, protocol, _, _ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((host, port))
    except OSError as error:
        return judge(name, f"{shown}: {error.strerror or error}", remedy)
    return ok(name, f"{shown} is free")


def data_folder(data_dir: Path) -> Finding:
    """Whether a file can be written where jobs, keys and models go."""
    folder = data_dir.absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    remedy = f"Give it to this user ({os.geteuid()}), free some room, or set DVE_DATA_DIR"
    if not place.is_dir():
        return fail("data folder", f"{place} is no folder", "Set DVE_DATA_DIR")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fail("data folder", f"{place} can't be written: {error.strerror or error}", remedy)
    return ok("data folder", f"{folder} can be written" if place == folder else f"{folder} will be made in {place}")


def disk(data_dir: Path, usage: tuple[int, int] | None = None) -> Finding:
    """`usage`: (total, free) bytes, of a test."""
    folder = data_dir.absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    total, free = usage or (shutil.disk_usage(place).total, shutil.disk_usage(place).free)
    ratio = free / max(total, 1)
    shown = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free ({ratio:.0%}) at {place}"
    remedy = "Free some room (`dve checkpoints prune`, DELETE /v1/models), or set DVE_DATA_DIR to another disk"
    if free < _FULL_BYTES:
        return fail("disk", shown, remedy)
    # A tenth of a large disk is plenty, and little of a small one can still be enough: both have to be low.
    return warn("disk", shown, remedy) if free < _LOW_BYTES and ratio < _LOW_RATIO else ok("disk", shown)


def keys(settings: Settings) -> Finding:
    """What `load_keys` would find, without making any."""
    given = None if settings.api_keys is None else settings.api_keys.get_secret_value().strip()
    folder = settings.data_dir / "keys"
    try:
        if given is not None:
            ring = read_keys(Path(given[1:])) if given.startswith("@") else parse_keys(given, "api_keys")
            return ok("keys", f"{len(ring)}, as api_keys says")
        if not (folder / "hashed").exists():
            return _no_keys(settings, folder)
        ring = read_keys(folder / "hashed")
    except ConfigError as error:
        return of_error("keys", error)
    plain = folder / "plain"
    if plain.exists() and plain.stat().st_mode & 0o077:
        return fail("keys", f"others may read the keys in {plain}", f"chmod 600 {plain}, and make new keys")
    if plain.exists():
        return warn("keys", f"{plain} still holds keys in the clear", "Hand them out, then delete that file")
    return ok("keys", f"{len(ring)} in {folder / 'hashed'}")


def _no_keys(settings: Settings, folder: Path) -> Finding:
    if is_loopback(settings.host):
        return ok("keys", f"none: {settings.host} is loopback, open to this machine's programs")
    return warn(
        "keys", f"none yet: the first start makes one for each scope in {folder}",
        "Read them there after the start, or set DVE_API_KEYS (`dve keys create`)",
    )  # fmt: skip


def clock(skew_seconds: float | None, now: float | None = None) -> Finding:
    """skew_seconds: the store's clock less ours, where it has one of its own. Leases go by the store's."""
    current = time.time() if now is None else now
    installed = Path(__file__).stat().st_mtime
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(current))
    if current < installed - 24 * 3600:
        return fail(
            "clock", f"{shown} is before this program was installed", "Set the clock (chrony, systemd-timesyncd)"
        )
    if skew_seconds is not None and abs(skew_seconds) > _SKEW_SECONDS:
        return warn("clock", f"{shown}; the store's is {skew_seconds:+.1f} s off", "Keep both hosts' clocks with NTP")
    return ok("clock", shown)


def tracing() -> Finding:
    """Whether what the environment wants to be sent can be sent."""
    try:
        if not wants_tracing():
            return ok("tracing", "off: no OTEL_EXPORTER_OTLP_ENDPOINT")
    except ConfigError as error:
        return of_error("tracing", error)
    try:
        version = metadata.version("opentelemetry-exporter-otlp-proto-http")
    except metadata.PackageNotFoundError:
        return fail(
            "tracing", "the environment says where traces go, and OpenTelemetry is not installed",
            "pip install 'dual-vision-encoder[tracing]', or set OTEL_SDK_DISABLED=true",
        )  # fmt: skip
    return ok("tracing", f"OTLP over HTTP, exporter {version}")
