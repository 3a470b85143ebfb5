"""The flags that give a load its shape, the same for the engine alone and for an endpoint. Knows no model."""

from __future__ import annotations

import argparse
import time

from model_core.analysis.workload import Workload


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """-c, -n, --tokens, --image-size, --same or --text, --rounds, --seed."""
    parser.add_argument("-c", "--concurrency", type=numbers, default=[1, 8, 16], help="streams at once: 1,8,16")
    parser.add_argument("-n", "--num-requests", type=number, default=48, help="requests in a round")
    parser.add_argument("--tokens", type=number, default=64, help="output tokens of every request")
    parser.add_argument("--image-size", "--size", type=number, default=224, help="side of the pictures in pixels")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--same", action="store_const", const="same", dest="kind", help="one picture in every request")
    kind.add_argument("--text", action="store_const", const="text", dest="kind", help="no pictures")
    parser.set_defaults(kind="distinct")
    parser.add_argument("--rounds", type=number, default=3, help="rounds of each contender; medians are shown")
    parser.add_argument("--seed", type=int, help="of the pictures (default: other ones every time)")


def number(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers of at least 1 with commas between, for argparse."""
    return [number(part) for part in text.split(",")]


def workload_of(args: argparse.Namespace) -> Workload:
    """What `add_load_flags`'s flags ask for."""
    # Without a seed pictures are new every time: a server may still know those of the last run.
    seed = args.seed if args.seed is not None else time.time_ns() % 10**9
    return Workload(args.num_requests, args.tokens, args.image_size, args.kind, seed)


def describe(load: Workload) -> str:
    """In one line, for a table's title."""
    kind = {"distinct": "{0} px pictures, all distinct", "same": "one {0} px picture in all", "text": "text alone"}
    what = kind[load.kind].format(load.image_size)
    return f"{load.num_requests} requests a round, {load.num_tokens} output tokens each, {what}, seed {load.seed}"
