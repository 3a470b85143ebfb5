"""From a bare clone to a working command and an answer, by the Makefile alone."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "*cache*", "*.egg-info", "build", "dist", "weights")
#: A machine that is busy with the other tests may take a minute to load what takes seconds alone.
READY_SECONDS = 240


def bare_environment() -> dict[str, str]:
    # Under `make test VENV=...` the outer make would hand its own VENV down.
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "DVE_")) and name != "VENV"
    }


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, env=bare_environment(), capture_output=True, text=True)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_runtime_alone_carries_the_command(root: Path, tmp_path: Path) -> None:
    clone = shutil.copytree(root, tmp_path / "a clone", ignore=LEFT_OUT)
    installed = make(clone, "install", f"PYTHON={sys.executable}")
    assert installed.returncode == 0, installed.stderr
    shown = subprocess.run([clone / ".venv/bin/dve", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_a_python_that_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    finished = make(root, "install", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert finished.returncode != 0
    assert "Python 3.11 or newer is needed" in finished.stderr


def test_flags_are_passed_on_only_if_given(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that exports HOST (its own name) must not become an address to bind."""
    monkeypatch.setenv("HOST", "my-laptop")
    line = make(root, "--dry-run", "serve", "PORT=8123").stdout.splitlines()[-1]
    assert line.split() == ["exec", ".venv/bin/dve", "serve", "--port", "'8123'"]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """The environment that these tests run in, stamped as installed just now: `make` has nothing to bring."""
    folder = tmp_path / "venv"
    folder.mkdir()
    (folder / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in (".created", ".runtime"):
        (folder / stamp).touch()
    return folder


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(root: Path, log: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`make serve`, as a shell starts it; nothing of it is left after."""
    command, environment = ["make", "serve", *words], bare_environment() | environment
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/ready", timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"not ready after {READY_SECONDS} s: {log.read_text()}")


@pytest.mark.timeout(2 * READY_SECONDS)
def test_make_serve_answers_about_the_readmes_picture_and_ends_when_it_is_told(
    root: Path, tmp_path: Path, venv: Path, port: int
) -> None:
    log, url, before = tmp_path / "log", f"http://127.0.0.1:{port}", visible(root)
    own = {"DVE_DATA_DIR": str(tmp_path / "data"), "PYTHONDONTWRITEBYTECODE": "1"}
    with served(root, log, f"PORT={port}", f"VENV={venv}", **own) as process:
        wait_until_ready(url, process, log)
        picture = base64.b64encode((root / "examples/dog.png").read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": "what is this?"},
        ]
        asked = {"model": "dve-demo", "messages": [{"role": "user", "content": parts}]}
        done = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
        assert done.status_code == 200, done.text
        assert "dog" in done.json()["choices"][0]["message"]["content"]
        (weights,) = done.json()["fusion"]
        assert weights["qwen_weight"] + weights["dinov2_weight"] == pytest.approx(1.0, abs=1e-5)
        process.terminate()
        # make hands the signal on, waits, and dies of it; of a server that failed it would say "***".
        assert process.wait(timeout=60) == -signal.SIGTERM
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health/live", timeout=10)
    said = log.read_text()
    assert not any(word in said for word in ("***", "Traceback", "installing")), said
    assert visible(root) == before, "it wrote into the checkout"


def visible(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if not entry.name.startswith(".")}
