"""`dve worker`: its flags, and the worker that they ask for.

In: argv and the environment. Out: an exit code: 0 after a drain; a wrong setting is a ConfigError.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from service.settings import WORKER_FIELDS, Settings, load_settings


def main(argv: Sequence[str]) -> int:
    """Train until a signal, or with --once until nothing waits."""
    flags = vars(build_parser().parse_args(argv))
    once = flags.pop("once")
    settings = load_settings(flags)
    # Here and not above: `dve worker --help` needs no store of jobs.
    from service.worker import work  # noqa: PLC0415

    return work(settings, once=once)


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
    for name in WORKER_FIELDS:
        add_setting(parser, name)
    return parser


def add_setting(parser: argparse.ArgumentParser, name: str) -> None:
    """A setting as a flag, with and without `worker_` before it."""
    field = Settings.model_fields[name]
    words = dict.fromkeys((name.removeprefix("worker_"), name))
    spellings = dict.fromkeys(f"--{spelling}" for word in words for spelling in (word.replace("_", "-"), word))
    default = "" if field.default is None else f" (default: {field.default})"
    text = f"{field.description}{default}".replace("%", "%%")
    parser.add_argument(*spellings, dest=name, metavar="VALUE", help=text)
