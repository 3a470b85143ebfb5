"""Settings as flags of a command: one a setting, `--set NAME=VALUE`, and `--print-config` in two forms.

In: a parser, or what it has read. Out: flags, or a page on stdout. It loads no setting itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable

from service.settings import ROLES, JobSettings, Settings, WorkerSettings
from service.settings_page import settings_page


def add_setting(parser: argparse.ArgumentParser, name: str) -> None:
    """A setting as a flag, in dashes or underscores, a worker's also without `worker_` before it."""
    field = next(role.model_fields[name] for role in ROLES if name in role.model_fields)
    words = dict.fromkeys((name.removeprefix("worker_"), name))
    spellings = dict.fromkeys(f"--{spelling}" for word in words for spelling in (word.replace("_", "-"), word))
    default = "" if field.default is None else f" (default: {field.default})"
    text = f"{field.description}{default}".replace("%", "%%")
    parser.add_argument(*spellings, dest=name, metavar="VALUE", help=text)


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """These settings, and `--set`, `--print-config`, `--format`. A flag that is not given leaves no attribute."""
    for name in names:
        add_setting(parser, name)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting by its name; may be repeated"
    )
    parser.add_argument(
        "--print-config", "--print_config", action="store_true", default=False, help="print the settings and stop"
    )
    parser.add_argument(
        "--format", choices=("json", "table"), default="json", help="of --print-config (default: %(default)s)"
    )


def print_json(names: Iterable[str], *loaded: Settings | JobSettings | WorkerSettings) -> None:
    """The values that hold, as one object. What two roles share is one value."""
    values = {name: value for settings in loaded for name, value in settings.model_dump(mode="json").items()}
    sys.stdout.write(json.dumps({name: values[name] for name in names}, indent=2) + "\n")


def print_page(server: Settings, jobs: JobSettings, worker: WorkerSettings) -> None:
    """`SETTINGS.md`, with the values that hold."""
    titles = {"The server": server, "Jobs: their store, and what a key may have": jobs, "The worker": worker}
    sys.stdout.write(settings_page(titles))
