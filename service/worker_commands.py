"""`dve worker`: its flags, and the worker that they ask for.

In: argv and the environment. Out: an exit code: 0 after a drain; a wrong setting is a ConfigError.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from service.flags import add_settings, print_json, print_page
from service.settings import WORKER_NAMES, load_settings, load_worker_settings


def main(argv: Sequence[str]) -> int:
    """Train until a signal, or with --once until nothing waits."""
    flags = vars(build_parser().parse_args(argv))
    once, print_config, form = flags.pop("once"), flags.pop("print_config"), flags.pop("format")
    settings, jobs = load_worker_settings(flags, flags.pop("set"))
    if print_config and form == "table":
        print_page(load_settings()[0], jobs, settings)
    elif print_config:
        print_json(WORKER_NAMES, settings, jobs)
    if print_config:
        return 0
    # Here and not above: `dve worker --help` needs no store of jobs.
    from service.worker import work  # noqa: PLC0415

    return work(settings, jobs, once=once)


def build_parser() -> argparse.ArgumentParser:
    """The worker's settings as flags; `--devices` is short for `--worker-devices`, and so on."""
    parser = argparse.ArgumentParser(
        prog="dve worker",
        description="Train the jobs that the server was given. Every option is also an environment variable, "
        "DVE_<OPTION>; a short one stands for DVE_WORKER_<OPTION>.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--once", action="store_true", default=False, help="end when no job waits any more")
    add_settings(parser, WORKER_NAMES)
    return parser
