"""A container without an engine: the image's files as a root that can't be written, its user, its command, no rights.

In: a mounted image and what the image says of itself. Out: a process in namespaces of its own (mounts, processes), as
`docker run --read-only --cap-drop ALL --security-opt no-new-privileges` would start it. The network is the host's, and
resources are not limited.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_SETUP = """
mount --make-rprivate /
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$ROOT/tmp"
mount --bind "$DATA" "$ROOT/data"
mount -o remount,bind,ro "$ROOT"
exec chroot "$ROOT" setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups --no-new-privs \
  --inh-caps=-all --bounding-set=-all env -i "$@"
"""


@dataclass
class Container:
    """root: the mounted image. config: `docker inspect`'s `.Config`. data: what is mounted at /data."""

    root: Path
    config: dict[str, Any]
    data: Path
    settings: dict[str, str]
    command: Sequence[str] = ()
    process: subprocess.Popen[bytes] = field(init=False)
    # A file: a pipe that nobody reads would stop who writes.
    _said: IO[bytes] = field(init=False)

    def __enter__(self) -> Container:
        user, _, _ = self.config["User"].partition(":")
        env = [*self.config["Env"], *(f"{name}={value}" for name, value in self.settings.items())]
        started = [*env, *self.config["Entrypoint"], *(self.command or self.config["Cmd"])]
        outside = {**os.environ, "ROOT": str(self.root), "DATA": str(self.data), "USER_ID": user}
        self._said = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _SETUP, "setup", *started],
            env=outside, stdout=self._said, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._said.close()

    @property
    def pid(self) -> int:
        """Of what is process 1 inside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def status(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Another process inside, as the image's user, with the image's environment."""
        env = [*self.config["Env"], *(f"{name}={value}" for name, value in self.settings.items())]
        user, _, _ = self.config["User"].partition(":")
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p", "-r", "-S", user, "-G", user, "env", "-i", *env, *command]
        return subprocess.run(inside, capture_output=True, text=True, check=False, timeout=60)

    def stop(self, seconds: float) -> tuple[int, str]:
        """The image's stop signal to process 1. Its exit code and all that it said."""
        os.kill(self.pid, signal.Signals[self.config["StopSignal"]])
        return self.end(seconds)

    def end(self, seconds: float) -> tuple[int, str]:
        code = self.process.wait(seconds)
        self._said.seek(0)
        return code, self._said.read().decode(errors="replace")
