"""The flags that give a load its shape, the same for the engine alone and for an endpoint. Knows no model."""

from __future__ import annotations

import argparse
import time

from model_core.analysis.workload import SamplingLoad, Workload
from model_core.errors import ConfigError


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """-c, -n, --tokens, --image-size, --same or --text, --rounds, --seed, --temperature, --top-p, --top-k."""
    parser.add_argument("-c", "--concurrency", type=numbers, default=[1, 8, 16], help="streams at once: 1,8,16")
    parser.add_argument("-n", "--num-requests", type=number, default=48, help="requests in a round")
    parser.add_argument("--tokens", type=number, default=64, help="output tokens of every request")
    parser.add_argument("--image-size", "--size", type=number, default=224, help="side of the pictures in pixels")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--same", action="store_const", const="same", dest="kind", help="one picture in every request")
    kind.add_argument("--text", action="store_const", const="text", dest="kind", help="no pictures")
    parser.set_defaults(kind="distinct")
    parser.add_argument("--rounds", type=number, default=3, help="rounds of each contender; medians are shown")
    parser.add_argument(
        "--seed", type=int, help="of the pictures, and of each request's sampling (default: others every time)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling, 0 to 2 (default: 0, greedy)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of sampling, above 0, at most 1 (default: 1, off)")
    parser.add_argument("--top-k", type=int, default=0, help="of sampling (default: 0, off)")


def number(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers of at least 1 with commas between, for argparse."""
    return [number(part) for part in text.split(",")]


def workload_of(args: argparse.Namespace) -> Workload:
    """What `add_load_flags`'s flags ask for. Raises ConfigError: sampling that does not exist or contradicts itself."""
    # Without a seed pictures are new every time: a server may still know those of the last run.
    pictures = args.seed if args.seed is not None else time.time_ns() % 10**9
    return Workload(args.num_requests, args.tokens, args.image_size, args.kind, pictures, _sampling_of(args))


def _sampling_of(args: argparse.Namespace) -> SamplingLoad:
    for name, value, is_allowed, allowed in (
        ("--temperature", args.temperature, 0.0 <= args.temperature <= 2.0, "0 to 2"),
        ("--top-p", args.top_p, 0.0 < args.top_p <= 1.0, "above 0, at most 1"),
        ("--top-k", args.top_k, args.top_k >= 0, "0 (off) or more"),
    ):
        if not is_allowed:
            fix = "Correct it, or leave it out"
            raise ConfigError(f"{name} is out of range", value=value, allowed=allowed, fix=fix)
    if args.temperature == 0.0 and (args.top_p < 1.0 or args.top_k > 0):
        raise ConfigError(
            "greedy answers have no use for --top-p and --top-k", value="--temperature 0",
            allowed="--temperature above 0 with them", fix="Give --temperature, or leave the others out",
        )  # fmt: skip
    return SamplingLoad(args.temperature, args.top_p, args.top_k, args.seed)


def describe(load: Workload) -> str:
    """In one line, for a table's title."""
    kind = {"distinct": "{0} px pictures, all distinct", "same": "one {0} px picture in all", "text": "text alone"}
    what = kind[load.kind].format(load.image_size)
    shape = f"{load.num_requests} requests a round, {load.num_tokens} output tokens each, {what}, seed {load.seed}"
    return shape + "".join(f", {name} {value:g}" for name, value in _shown_sampling(load.sampling).items())


def _shown_sampling(sampling: SamplingLoad) -> dict[str, float]:
    """What differs from greedy; nothing for greedy, whose titles stay as they were."""
    if sampling.temperature == 0.0:
        return {}
    found = {"temperature": sampling.temperature}
    found |= {"top_p": sampling.top_p} if sampling.top_p < 1.0 else {}
    return found | ({"top_k": sampling.top_k} if sampling.top_k else {})
