"""`dve bench serve`: how fast an OpenAI-compatible endpoint answers under load, beside another one if wanted.

In: argv. Out: a table or one JSON object on stdout, and an exit code. With `--against` the rounds alternate between
the two endpoints, so that whatever drifts on the machine falls on both; what counts is the medians of the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from model_core.analysis.latency import Level, LoadRound, alternate, summarise
from model_core.analysis.workload import Workload
from model_core.cli.load_flags import add_load_flags, describe, workload_of
from model_core.cli.table import print_levels
from model_core.errors import ConfigError
from service.load import (
    Endpoint,
    first_model,
    metric_figures,
    open_session,
    read_metrics,
    request_body,
    run_load,
)

if TYPE_CHECKING:
    import aiohttp

#: How the two contenders are called in the table.
_NAMES = ("A", "B")


def build_parser() -> argparse.ArgumentParser:
    """The endpoints, the load that all of `dve bench` shares, and the output."""
    parser = argparse.ArgumentParser(prog="dve bench serve", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="model id (default: the first that the server lists)")
    parser.add_argument("--against", metavar="URL", help="put the same load on this endpoint, round by round in turn")
    parser.add_argument("--against-model", metavar="MODEL", help="model id there; alone: another model of --url")
    add_load_flags(parser)
    parser.add_argument(
        "--pause",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="between the rounds of two servers: one may spin on the processors after its last answer (default: 3)",
    )
    parser.add_argument("--key", default="", help="sent to both as a bearer token")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one request may take")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a request failed. Raises ConfigError: an endpoint that does not answer."""
    args = build_parser().parse_args(argv)
    load = workload_of(args)
    endpoints, levels = asyncio.run(_measure(args, load))
    titles = [f"{name} = {one.model} at {one.url}" for name, one in zip(_NAMES, endpoints, strict=False)]
    if args.json:
        shown = [{"url": one.url, "model": one.model} for one in endpoints]
        found = {"command": "serve", "endpoints": dict(zip(_NAMES, shown, strict=False)), "workload": asdict(load)}
        json.dump(found | {"levels": [level.to_dict() for level in levels]}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        print_levels(f"{'; '.join(titles)}: {describe(load)}", levels)
    return 1 if any(one.num_errors for level in levels for each in level.rounds.values() for one in each) else 0


async def _measure(args: argparse.Namespace, load: Workload) -> tuple[list[Endpoint], list[Level]]:
    async with open_session(args.key, args.timeout) as session:
        wanted = [(args.url, args.model)]
        if args.against or args.against_model:
            wanted.append((args.against or args.url, args.against_model))
        endpoints = []
        for url, model in wanted:
            base = _base(url)
            endpoints.append(Endpoint(base, model or await first_model(session, base), args.key))
        bench = _ServeBench(session, endpoints, load, args.pause)
        return endpoints, [await bench.level(concurrency, args.rounds) for concurrency in args.concurrency]


def _base(url: str) -> str:
    """Raises ConfigError: this is no address."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            "this is no address of a server", value=url, allowed="http://HOST:PORT or https://HOST",
            fix="Put http:// or https:// before it",
        )  # fmt: skip
    return url.rstrip("/").removesuffix("/v1")


class _ServeBench:
    """Rounds against one or two endpoints. Requests are numbered on: no round meets a picture of an earlier one.

    Two servers get the same pictures in a round; two models of one server, whose caches they share, never do.
    """

    def __init__(
        self, session: aiohttp.ClientSession, endpoints: Sequence[Endpoint], load: Workload, pause: float
    ) -> None:
        self._session, self._load = session, load
        self._endpoints = dict(zip(_NAMES, endpoints, strict=False))
        self._shares_server = len({one.url for one in endpoints}) < len(endpoints)
        self._pause = pause if len(endpoints) > 1 and not self._shares_server else 0.0
        self._next = 0

    async def level(self, concurrency: int, num_rounds: int) -> Level:
        """One batch to warm each endpoint up, then A B A B ..."""
        rounds: dict[str, list[LoadRound]] = {name: [] for name in self._endpoints}
        for name in self._endpoints:
            await self._round(name, concurrency, self._numbers(concurrency), concurrency)
        first = 0
        for turn, name in enumerate(alternate(list(rounds), num_rounds)):
            if turn % len(rounds) == 0 or self._shares_server:
                first = self._numbers(self._load.num_requests)
            await asyncio.sleep(self._pause)
            rounds[name].append(await self._round(name, concurrency, first, self._load.num_requests))
        return Level(concurrency, rounds)

    def _numbers(self, count: int) -> int:
        first, self._next = self._next, self._next + count
        return first

    async def _round(self, name: str, concurrency: int, first: int, count: int) -> LoadRound:
        endpoint, tokens = self._endpoints[name], self._load.num_tokens
        # Made before the clock starts: drawing pictures would take the server's own cores.
        bodies = [
            request_body(endpoint.model, *item, tokens, sampling=self._load.sampling.fields(first + n))
            for n, item in enumerate(self._load.items(first, count))
        ]
        before = await read_metrics(self._session, endpoint.url)
        timings, seconds = await run_load(self._session, endpoint, bodies, concurrency, time.perf_counter)
        done = summarise(timings, seconds, tokens)
        done.figures.update(metric_figures(before, await read_metrics(self._session, endpoint.url)))
        return done
