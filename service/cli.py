"""`dve`: the one command. `dve serve` and `dve keys` are here; model_core's commands are mounted beside them.

In: argv and the environment. Out: an exit code; what a user can put right is one line on stderr and 2.
It imports a command's code only when that command is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from model_core.errors import DualVisionError
from service.flags import add_settings, print_json, print_page
from service.settings import SERVER_NAMES, load_settings, load_worker_settings

#: command, of one word or two -> (module with `main(argv) -> int | None`, what it does)
MOUNTED: Mapping[str, tuple[str, str]] = {
    "infer": ("model_core.cli.infer", "answer one question about one picture"),
    "train": ("model_core.cli.train", "train by a recipe, or go on with a run"),
    "checkpoints": ("model_core.cli.checkpoints", "list, inspect and prune the steps of a run"),
    "config": ("model_core.cli.configs", "check a training recipe: config validate FILE"),
    "data": ("model_core.cli.data", "check training data: data validate FILE"),
    "configs": ("model_core.cli.configs", "write the shipped training recipes (create), or list every key (keys)"),
    "demo": ("model_core.cli.demo", "build or evaluate the demo model"),
    "jobs": ("service.job_commands", "training jobs of a server: list, show, watch, cancel, pause, resume"),
    "fit": ("model_core.cli.fit", "say whether serving and each training mode fit the memory"),
    "doctor": ("service.doctor.command", "say whether server and worker would run here, and what to do where not"),
    "worker": ("service.worker_commands", "train the jobs that the server was given"),
    "up": ("service.together", "serve and worker together"),
    "publish": ("model_core.cli.publish", "make a trained model one that the server finds"),
    "bench": ("model_core.cli.bench", "time the engine or the encoders"),
    "bench train": ("model_core.cli.bench_train", "time training beside transformers' Trainer"),
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
        if command in _OWN:
            return _OWN[command][0](rest)
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
    sys.stderr.write(f"dve: error: unknown command {command[:80]!r}; allowed: {', '.join((*_OWN, *MOUNTED))}\n")
    return 2


def _help() -> str:
    rows = {name: text for name, (_, text) in (*_OWN.items(), *MOUNTED.items())}
    lines = "\n".join(f"  {name:<12} {text}" for name, text in rows.items())
    return f"usage: dve COMMAND [OPTIONS]\n\ncommands:\n{lines}\n\n`dve COMMAND --help` tells a command's options.\n"


def _serve(argv: Sequence[str]) -> int:
    flags = vars(serve_parser().parse_args(argv))
    print_config, form = flags.pop("print_config"), flags.pop("format")
    settings, jobs = load_settings(flags, flags.pop("set"))
    if print_config and form == "table":
        print_page(settings, jobs, load_worker_settings()[0])
    elif print_config:
        print_json(SERVER_NAMES, settings, jobs)
    if print_config:
        return 0
    # Here and not above: `dve infer` and `dve --help` need no web server.
    from service.main import serve

    return serve(settings, jobs)


def serve_parser() -> argparse.ArgumentParser:
    """One flag a setting, in dashes or underscores. A flag that is not given leaves the environment's value."""
    parser = _Parser(
        prog="dve serve",
        description="Serve the model over HTTP. Every option is also an environment variable, DVE_<OPTION>.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_settings(parser, SERVER_NAMES)
    return parser


def _keys(argv: Sequence[str]) -> int:
    from service.keys import SCOPES, append_key, hashed_line, new_key

    parser = _Parser(prog="dve keys", description="Make an API key. A running server learns of it when it starts anew.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="print a new key, once, and its hashed form", allow_abbrev=False)
    create.add_argument("--scope", choices=SCOPES, required=True, help="training may do all that inference may")
    create.add_argument("--out", type=Path, metavar="FILE", help="add the hashed form to this file (api_keys=@FILE)")
    args = parser.parse_args(argv)
    key = new_key()
    line = hashed_line(key, args.scope)
    if args.out is not None:
        append_key(args.out, line)
    sys.stdout.write(f"{key}\n{line}\n")
    return 0


#: Commands that are at home here.
_OWN: Mapping[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "serve": (_serve, "serve the model over HTTP"),
    "keys": (_keys, "make an API key: keys create --scope S"),
}


if __name__ == "__main__":
    sys.exit(main())
