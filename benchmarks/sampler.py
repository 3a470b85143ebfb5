"""What choosing tokens costs: milliseconds a step, by rows, vocabulary and parameters; also of another checkout.

    python -m benchmarks.sampler [--rounds 3] [--rows 1,8,16] [--vocab 8192,151936] [--device cpu] [--against CHECKOUT]

Sharp logits are those of a model that knows what comes next: a few dozen tokens hold nearly everything. Flat ones are
those of random weights: top-p needs much of the vocabulary. A figure is the best tenth of many steps, by the clock or,
with --cpu-time, by the process's own time: on a busy machine the clock tells little. Every round is a process
of its own; with --against the rounds alternate, and the median of their ratios is shown (below 1x: this one is faster).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model_core.engine.sampler import SamplerState, sample_batch
from model_core.types import SamplingParams

#: Name, parameters, and whether the logits are flat.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({}, False),
    "temperature 1": ({"temperature": 1.0}, False),
    "0.7, top_p 0.9": ({"temperature": 0.7, "top_p": 0.9}, False),
    "0.7, top_p 0.9, flat": ({"temperature": 0.7, "top_p": 0.9}, True),
    "0.7, top_k 50": ({"temperature": 0.7, "top_k": 50}, False),
    "penalties": ({"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}, False),
    "logprobs 5": ({"logprobs": 5}, False),
}
_PROMPT = 300
_SPREAD = {False: 6.0, True: 1.0}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step, by a line's name."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    found = {}
    for vocab in args.vocab:
        for rows in args.rows:
            for name, (params, is_flat) in KINDS.items():
                found[f"{vocab} {rows} {name}"] = step_ms(vocab, rows, params, _SPREAD[is_flat], args, clock)
    return found


def step_ms(
    vocab: int, rows: int, params: dict[str, Any], spread: float, args: argparse.Namespace, clock: Any
) -> float:
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab) * spread).to(args.device)
    states = [SamplerState(SamplingParams(seed=row, **params), range(_PROMPT), frozenset({1})) for row in range(rows)]
    seconds, begin = [], time.perf_counter()
    with torch.inference_mode():
        while len(seconds) < 12 or (len(seconds) < 400 and time.perf_counter() - begin < args.seconds):
            if logits.is_cuda:
                torch.cuda.synchronize()
            start = clock()
            found = sample_batch(logits, states)
            seconds.append(clock() - start)
            for state, one in zip(states, found, strict=True):
                state.push(one.token_id)
    seconds = sorted(seconds[2:])
    return statistics.mean(seconds[: max(1, len(seconds) // 10)]) * 1000


def measure_in(checkout: Path, flags: Sequence[str]) -> dict[str, float]:
    """One round of this very program over a checkout's sampler."""
    done = subprocess.run(
        [sys.executable, __file__, "--figures", *flags],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout.resolve())}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def show(rounds: Sequence[dict[str, float]], others: Sequence[dict[str, float]], unit: str) -> None:
    """Medians over the rounds, and of the ratios within a round."""
    table = Table("vocabulary", "rows", "sampling", unit, *(("against", "ratio") if others else ()))
    for name in rounds[0]:
        shown = [f"{statistics.median(one[name] for one in part):.3f}" for part in (rounds, others) if part]
        if others:
            shown.append(f"{statistics.median(a[name] / b[name] for a, b in zip(rounds, others, strict=True)):.2f}x")
        table.add_row(*name.split(" ", 2), *shown)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=_numbers, default=[1, 8, 16])
    parser.add_argument("--vocab", type=_numbers, default=[8192, 151936])
    parser.add_argument("--seconds", type=float, default=0.5, help="of every line in a round (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="measure another checkout too, in alternation")
    parser.add_argument("--figures", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.figures:
        print(json.dumps(measure(args)))
        return
    flags = [f"--rows={','.join(map(str, args.rows))}", f"--vocab={','.join(map(str, args.vocab))}",
             f"--seconds={args.seconds}", f"--device={args.device}", *["--cpu-time"] * args.cpu_time]  # fmt: skip
    own: list[dict[str, float]] = []
    others: list[dict[str, float]] = []
    for _ in range(args.rounds):
        own.append(measure_in(Path(__file__).parents[1], flags))
        if args.against is not None:
            others.append(measure_in(args.against, flags))
    show(own, others, "ms a step, CPU" if args.cpu_time else "ms a step")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
