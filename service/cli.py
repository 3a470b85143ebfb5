"""`dve`: the one command. `dve serve` is here; model_core's commands are mounted beside it.

In: argv and the environment. Out: an exit code; what a user can put right is one line on stderr and 2.
It imports a command's code only when that command is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from model_core.errors import DualVisionError
from service.settings import Settings, load_settings

#: command, of one word or two -> (module with `main(argv) -> int | None`, what it does)
MOUNTED: Mapping[str, tuple[str, str]] = {
    "infer": ("model_core.cli.infer", "answer one question about one picture"),
    "config": ("model_core.cli.configs", "check a training recipe: config validate FILE"),
    "configs": ("model_core.cli.configs", "write the shipped training recipes: configs create"),
    "demo": ("model_core.cli.demo", "build or evaluate the demo model"),
    "publish": ("model_core.cli.publish", "make a trained model one that the server finds"),
    "bench": ("model_core.cli.bench", "time the engine or the encoders"),
    "bench serve": ("service.bench", "time an endpoint under load, beside another one if wanted"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage text before it."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; 2 for what the user can put right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    num_words = 2 if " ".join(arguments[:2]) in MOUNTED else 1
    command, rest = " ".join(arguments[:num_words]) or "--help", arguments[num_words:]
    try:
        if command == "serve":
            return _serve(rest)
        if command in MOUNTED:
            return int(importlib.import_module(MOUNTED[command][0]).main(rest) or 0)
    except DualVisionError as error:
        sys.stderr.write(f"dve {command}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    if command in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    sys.stderr.write(f"dve: error: unknown command {command[:80]!r}; allowed: serve, {', '.join(MOUNTED)}\n")
    return 2


def _help() -> str:
    rows = {"serve": "serve the model over HTTP", **{name: text for name, (_, text) in MOUNTED.items()}}
    lines = "\n".join(f"  {name:<12} {text}" for name, text in rows.items())
    return f"usage: dve COMMAND [OPTIONS]\n\ncommands:\n{lines}\n\n`dve COMMAND --help` tells a command's options.\n"


def _serve(argv: Sequence[str]) -> int:
    flags = vars(serve_parser().parse_args(argv))
    print_config = flags.pop("print_config")
    settings = load_settings(flags)
    if print_config:
        sys.stdout.write(json.dumps(settings.model_dump(mode="json"), indent=2) + "\n")
        return 0
    # Here and not above: `dve infer` and `dve --help` need no web server.
    from service.main import serve

    return serve(settings)


def serve_parser() -> argparse.ArgumentParser:
    """One flag a setting, in dashes or underscores. A flag that is not given leaves the environment's value."""
    parser = _Parser(
        prog="dve serve",
        description="Serve the model over HTTP. Every option is also an environment variable, DVE_<OPTION>.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        default = "" if field.default is None else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        parser.add_argument(*spellings, dest=name, metavar="VALUE", help=text)
    parser.add_argument(
        "--print-config", "--print_config", action="store_true", default=False, help="print the settings and stop"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
