"""`docker compose`, `kubectl` and `dve` for the runbook's lines where there is no engine and no cluster.

Run as a script: FOLDER NAME ARGUMENTS... What they are told to run inside is run here, `/data` being FOLDER/data. They
refuse what the real ones would: a service that was stopped, a program that its image has not, a path that can't be
written there. What is scaled, started and stopped is kept in FOLDER/state.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
#: Where -> what its image brings.
PROGRAMS = {
    "server": {"python3", "tar", "rm", "sh", "sed", "dve"},
    "helper": {"tar", "sh"},
    "postgres": {"pg_dump", "pg_restore"},
}
PLACES = {
    "deploy/dve-server": "server", "deploy/dve-worker": "worker", "pod/dve-helper": "helper",
    "statefulset/dve-postgres": "postgres",
}  # fmt: skip
WRITABLE = {"data", "hub", "tmp"}


def refuse(why: str) -> NoReturn:
    sys.stderr.write(f"{why}\n")
    raise SystemExit(1)


class Site:
    """What runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "state.json"
        default = {"server", "worker", "postgres"}
        self.running = set(json.loads(self.path.read_text())) if self.path.exists() else default

    def keep(self) -> int:
        self.path.write_text(json.dumps(sorted(self.running)))
        return 0

    def inside(self, place: str, command: list[str], *, has_input: bool, is_new: bool = False) -> int:
        if place not in self.running and not is_new:
            refuse(f"{place} is not running")
        if is_new and self.running & {"server", "worker"}:
            refuse("the store is in use")
        if command[0] not in PROGRAMS[place]:
            refuse(f"{command[0]} is not in the image of {place}")
        for word in command:
            for top in re.findall(r"(?<![\w.\"'/:*])/(\w+)", word):
                if top not in WRITABLE:
                    refuse(f"/{top} is not to be used in {place}")
        words = [word.replace("/data", str(self.folder / "data")) for word in command]
        if words[0] == "dve":
            words = [sys.executable, "-m", "service.cli", *words[1:]]
        done = subprocess.run(words, check=False, cwd=ROOT, stdin=None if has_input else subprocess.DEVNULL)
        return done.returncode


def docker(site: Site, words: list[str]) -> int:
    if words.pop(0) != "compose":
        refuse("compose, and nothing else")
    files = os.environ.get("COMPOSE_FILE", "").split(":")
    if not all((ROOT / name).is_file() for name in files):
        refuse("COMPOSE_FILE names no files")
    verb = words.pop(0)
    if verb in ("stop", "restart", "up"):
        services = {word for word in words if not word.startswith("-")} or {"server", "worker"}
        site.running = site.running - services if verb == "stop" else site.running | services
        return site.keep()
    options = set()
    while words[0].startswith("-"):
        options.add(words.pop(0))
        if "--entrypoint" in options and words[0] == "sh":
            break
    if "-T" not in options:
        refuse("the input device is not a TTY")
    if verb == "exec":
        return site.inside(words[0], words[1:], has_input=True)
    program, place = words.pop(0), words.pop(0)
    return site.inside(place, [program, *words], has_input=True, is_new=True)


def kubectl(site: Site, words: list[str]) -> int:
    if words[:2] == ["-n", "dve"]:
        words = words[2:]
    verb = words.pop(0)
    if verb in ("apply", "delete"):
        is_there = words[0] == "-k" and (ROOT / words[1] / "kustomization.yaml").is_file()
        if not is_there or site.running & {"server", "worker"}:
            refuse("no such folder, or the volume is another pod's")
        site.running = site.running | {"helper"} if verb == "apply" else site.running - {"helper"}
        return site.keep()
    if verb == "scale":
        places = {PLACES[word] for word in words if not word.startswith("-")}
        site.running = site.running - places if "--replicas=0" in words else site.running | places
        return site.keep()
    if verb in ("wait", "rollout"):
        return 0
    if verb != "exec":
        refuse(f"no such word: {verb}")
    has_input = words[0] == "-i"
    place, dashes, *command = words[has_input:]
    if dashes != "--":
        refuse("-- stands before the command")
    return site.inside(PLACES[place], command, has_input=has_input)


def main(folder: str, name: str, *words: str) -> int:
    site = Site(Path(folder))
    if name == "dve":
        return subprocess.run([sys.executable, "-m", "service.cli", *words], check=False, cwd=ROOT).returncode
    return {"docker": docker, "kubectl": kubectl}[name](site, list(words))


def install(folder: Path) -> Path:
    """A folder for PATH that holds them."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("docker", "kubectl", "dve"):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" {name} "$@"\n')
        path.chmod(0o755)
    return programs


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
