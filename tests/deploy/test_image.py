"""The Dockerfile built with buildah on a debootstrap base, and its container used: `make test-image`.

Without a container engine: the image's root is mounted read-only, its command runs as the image's user, without
capabilities (container.py). CPU; the CUDA base is not to be had here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.container import Container
from tests.deploy.live import ROOT, create_job, finished_job, free_port, question, wait_for

CERTIFICATES = "/etc/ssl/certs"
pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.geteuid() != 0, reason="buildah's chroots and mounts take root"),
    pytest.mark.skipif(
        not shutil.which("buildah") or not shutil.which("debootstrap"), reason="make test-image installs"
    ),
]


@dataclass(frozen=True)
class Image:
    root: Path
    config: dict[str, Any]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip()


def pip_settings() -> tuple[list[str], list[str]]:
    """This machine's mirrors and wheels as build arguments, and the local folders among them as mounts."""
    listed = run(shutil.which("python3") or "python3", "-m", "pip", "config", "list").splitlines()
    arguments, mounts = [], []
    for key in ("index-url", "extra-index-url", "find-links"):
        values = [line.partition("=")[2] for line in listed if line.partition("=")[0].partition(".")[2] == key]
        values += [line.partition("=")[2] for line in listed if line.startswith(f":env:.{key}=")]
        words = list(dict.fromkeys(" ".join(values).replace("\\n", " ").replace("'", " ").split()))
        if words:
            arguments += ["--build-arg", f"PIP_{key.upper().replace('-', '_')}={' '.join(words)}"]
        for folder in (Path(word.removeprefix("file://")) for word in words):
            if folder.is_absolute() and folder.exists():
                top = Path(*folder.parts[:3])
                mounts += ["--volume", f"{top}:{top}:ro"]
    return arguments, mounts


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    scratch = tmp_path_factory.mktemp("image")
    buildah = ("buildah", "--root", scratch / "store", "--runroot", scratch / "run", "--storage-driver", "vfs")
    began = time.monotonic()
    rootfs = Path(os.environ.get("ROOTFS") or scratch / "rootfs")
    if not rootfs.exists():
        run("debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", rootfs)
    seconds = [time.monotonic() - began]
    base = run(*buildah, "from", "scratch")
    run(*buildah, "add", "--quiet", base, rootfs, "/")
    run(*buildah, "commit", "--quiet", "--rm", base, "dve-base")
    arguments, mounts = pip_settings()
    # A certificate of a house's own proxy is the host's.
    mounts += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"] if Path(CERTIFICATES).exists() else []
    labels = ("--build-arg", "SOURCE=https://example.com/dve", "--build-arg", "REVISION=0123abc")
    built = ("bud", "--isolation", "chroot", "--format", "docker", "--layers=false", "-f", "docker/Dockerfile")
    run(*buildah, *built, "--build-arg", "BASE=localhost/dve-base", *labels, *arguments, *mounts, "-t", "dve", ".")
    seconds.append(time.monotonic() - began - seconds[0])
    container = run(*buildah, "from", "dve")
    config = json.loads(run(*buildah, "inspect", "--type", "image", "dve"))["Docker"]["config"]
    root = Path(run(*buildah, "mount", container))
    sys.stdout.write(f"\nbase made in {seconds[0]:.0f} s, image built in {seconds[1]:.0f} s\n")
    yield Image(root, config)
    run(*buildah, "umount", container)
    # Its files are some GB, and nobody asks for them again.
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """As a fresh volume: the image's own folder, empty, of its user. tmp_path is root's alone."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o055)
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 10001, 10001)
    return folder


def test_the_image_says_how_it_is_run(image: Image) -> None:
    config = image.config
    assert (config["User"], config["StopSignal"]) == ("10001:10001", "SIGTERM")
    assert (config["Entrypoint"], config["Cmd"]) == (["/opt/dve/entrypoint.sh"], ["serve"])
    assert config["Healthcheck"]["Test"] == ["CMD", "/opt/venv/bin/python", "/opt/dve/health.py"]
    labels = {name: config["Labels"][f"org.opencontainers.image.{name}"] for name in ("licenses", "source", "revision")}
    assert labels == {"licenses": "Apache-2.0", "source": "https://example.com/dve", "revision": "0123abc"}
    assert list(image.root.glob("opt/venv/lib/python3*/site-packages/opentelemetry/sdk")), "traces can be sent"
    assert not list(image.root.glob("usr/bin/*gcc*")), "no compiler that was not asked for"


def test_a_server_and_a_worker_from_one_image(image: Image, data: Path) -> None:
    ports = {"DVE_PORT": str(free_port()), "DVE_WORKER_METRICS_PORT": str(free_port())}
    own = {**ports, "DVE_HOST": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    beside = own | {"DVE_PORT": "1"}  # where nothing listens, so that the worker is asked how it is
    url = f"http://127.0.0.1:{ports['DVE_PORT']}"
    with Container(image.root, image.config, data, own) as server:
        wait_for(f"{url}/health/ready", 300)
        status = server.status()
        assert status["Uid"].split() == ["10001"] * 4
        assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
        assert "Read-only" in server.exec("/bin/sh", "-c", "echo > /opt/dve/x").stderr
        assert server.exec(*image.config["Healthcheck"]["Test"][1:]).returncode == 0
        with httpx.Client(base_url=url, timeout=120) as http:
            answer = http.post("/v1/chat/completions", json=question(0)).json()
            assert "dog" in answer["choices"][0]["message"]["content"]
            assert len(answer["fusion"]) == 1
            with Container(image.root, image.config, data, beside, ["worker", "--devices=cpu"]) as worker:
                wait_for(f"http://127.0.0.1:{ports['DVE_WORKER_METRICS_PORT']}/metrics", 300)
                assert worker.exec(*image.config["Healthcheck"]["Test"][1:]).returncode == 0
                job = finished_job(http, create_job(http), 900)
                assert job["status"] == "succeeded", job
                trained = http.post("/v1/chat/completions", json=question(0) | {"model": job["fine_tuned_model"]})
                assert trained.status_code == 200
                code, _ = worker.stop(150)
                assert code == 0
        code, said = server.stop(45)
    assert code == 0, said[-2000:]
    assert all(line.startswith("{") for line in said.splitlines()), "the log is JSON"


def test_a_folder_that_belongs_to_another_is_named_with_what_to_do(image: Image, data: Path) -> None:
    os.chown(data, 0, 0)
    with Container(image.root, image.config, data, {}) as refused:
        code, said = refused.end(60)
    assert code == 2
    assert "/data" in said and "chown -R 10001:10001" in said
