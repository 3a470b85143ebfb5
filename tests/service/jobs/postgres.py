"""A private PostgreSQL for tests: Debian's server, a cluster in a temporary folder, reached by a unix socket alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest

_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "max_connections": "60", "listen_addresses": ""}


def find_binaries() -> Path:
    """The folder of initdb and pg_ctl; installed if it is missing. Skips where that can't be done, except under CI."""
    if (found := _installed()) is None:
        try:
            subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True, timeout=100)
            command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "postgresql"]
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment)
        except (OSError, subprocess.SubprocessError) as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no PostgreSQL server, and it can't be installed: {error}")
        found = _installed()
    assert found is not None, "postgresql was installed, and has no initdb"
    return found


def _installed() -> Path | None:
    folders = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    in_path = shutil.which("initdb")
    return folders[-1] if folders else Path(in_path).resolve().parent if in_path else None


class Cluster:
    """`new_database` gives the URL of an empty one; `stop` and `start` it for who does without for a while."""

    def __init__(self, folder: Path, control: Callable[..., None]) -> None:
        self._folder, self._control = folder, control

    def stop(self) -> None:
        self._control("-m", "immediate", "stop")

    def start(self) -> None:
        options = " ".join(f"-c {name}='{value}'" for name, value in _SETTINGS.items())
        self._control("-o", f"{options} -k {self._folder}", "start")

    def new_database(self) -> str:
        name = f"t{uuid.uuid4().hex[:12]}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._folder}"


@contextmanager
def run_cluster() -> Iterator[Cluster]:
    """Started with initdb and pg_ctl; the server refuses to be root, so root lends it the user postgres."""
    binaries = find_binaries()
    # Short: a unix socket's path has 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dve-pg-", dir="/tmp"))
    as_root = os.geteuid() == 0
    if as_root:
        shutil.chown(folder, "postgres")

    def run(*command: str | Path) -> None:
        prefix: Sequence[str] = ("runuser", "-u", "postgres", "--") if as_root else ()
        subprocess.run([*prefix, *map(str, command)], check=True, capture_output=True, timeout=60, cwd=folder)

    data, log = folder / "data", folder / "log"
    try:
        run(binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        cluster = Cluster(folder, partial(run, binaries / "pg_ctl", "-D", data, "-l", log, "-w"))
        cluster.start()
        yield cluster
    finally:
        if (data / "postmaster.pid").exists():
            run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)
