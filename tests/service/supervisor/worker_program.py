"""Workers with the stand-in trainer in the place of the real one, forked from a process that has imported everything.

Reads a JSON object a line: {"data_dir", "lease", "log", "flags", "once", "poll", "is_hasty", "environment"} starts one
and is answered with its pid, {"wait": pid} with its exit code. Importing takes seconds on a busy machine, and a kill
matrix starts many workers. Hasty ones look more often than users' do, so that tests wait less.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from service.settings import load_worker_settings
from service.supervisor.job_run import RunLimits
from service.supervisor.workshop import Programs
from service.worker import work

HERE = Path(__file__).parent
PROGRAMS = Programs(
    train=(sys.executable, str(HERE / "standin_trainer.py")),
    check=(sys.executable, str(HERE / "standin_check.py")),
    fit=(sys.executable, str(HERE / "standin_fit.py")),
    publish=(sys.executable, str(HERE / "standin_publish.py")),
)

LIMITS = RunLimits(
    watch_seconds=0.1, tail_seconds=0.1, backoff_base_seconds=0.1, backoff_limit_seconds=0.3, recheck_seconds=1.0
)


def run(wanted: dict[str, Any]) -> int:
    flags = {
        "data_dir": wanted["data_dir"], "job_lease_seconds": wanted["lease"], "worker_devices": "cpu",
        "worker_metrics_port": 0, "worker_nice": 0, "log_format": "json", **wanted["flags"],
    }  # fmt: skip
    return work(
        *load_worker_settings(flags),
        once=wanted["once"],
        programs=PROGRAMS,
        poll_seconds=wanted["poll"],
        limits=LIMITS if wanted["is_hasty"] else RunLimits(),
    )


def start(wanted: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(wanted["environment"])
    code = 70
    try:
        code = run(wanted)
    finally:
        os._exit(code)


def main() -> None:
    while line := sys.stdin.readline():
        wanted = json.loads(line)
        pid = wanted.get("wait")
        answer = start(wanted) if pid is None else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
