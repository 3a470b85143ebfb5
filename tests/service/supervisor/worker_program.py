"""`dve worker` with the stand-in trainer in the place of the real one: worker_program.py DATA_DIR LEASE [FLAG=VALUE]..."""

import sys
from pathlib import Path

from service.settings import load_settings
from service.supervisor.workshop import Programs
from service.worker import work

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    flags = dict(flag.split("=", 1) for flag in argv[2:])
    once = flags.pop("once", "") == "yes"
    settings = load_settings(
        {
            "data_dir": argv[0], "lease_seconds": argv[1], "worker_devices": "cpu", "worker_metrics_port": "0",
            "worker_nice": "0", "log_format": "json", **flags,
        }
    )  # fmt: skip
    programs = Programs(
        train=(sys.executable, str(HERE / "standin_trainer.py")),
        check=(sys.executable, str(HERE / "standin_check.py")),
    )
    return work(settings, once=once, programs=programs, poll_seconds=0.05, backoff_seconds=0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
