"""`dve bench offline` times the engine without HTTP, `dve bench encoders` the way from a JPEG to fused tokens."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from model_core.analysis.latency import Level, LoadRound, alternate, summarise
from model_core.analysis.workload import Workload, draw_picture
from model_core.cli.load_flags import add_load_flags, describe, number, numbers, workload_of
from model_core.cli.table import print_levels, print_table
from model_core.errors import ConfigError, DualVisionError
from model_core.types import ARMS, ChatMessage, GenerationRequest, ImagePart, Part, SamplingParams, TextPart

if TYPE_CHECKING:
    from model_core.analysis.floors import Floor
    from model_core.encoder import DualVisionEncoder

#: (concurrency, number of the first question, how many) -> what came of it
Round = Callable[[int, int, int], LoadRound]

_EPILOG = "`dve bench serve` loads an OpenAI-compatible endpoint over HTTP; see its own --help."


def build_parser() -> argparse.ArgumentParser:
    """Two commands, offline and encoders."""
    parser = argparse.ArgumentParser(prog="dve bench", description=__doc__, epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)
    offline = commands.add_parser("offline", help="a closed loop of requests on the engine")
    add_load_flags(offline)
    offline.add_argument("--arm", choices=ARMS, default="fused", help="which eyes are open")
    offline.add_argument("--generate", action="store_true", help="also transformers' generate, in static batches")
    offline.add_argument("--floors", action="store_true", help="also the shares of what this machine can do at most")
    offline.add_argument("--peak-gflops", type=float, help="with --floors: dense products (default: measured)")
    offline.add_argument("--peak-gbs", type=float, help="with --floors: reading memory, GB/s (default: measured)")
    encoders = commands.add_parser("encoders", help="milliseconds an image of every stage before the decoder")
    encoders.add_argument("--image-size", "--size", type=numbers, default=[224, 448], help="sides in pixels: 224,448")
    encoders.add_argument("--batch", type=numbers, default=[1, 4, 16], help="pictures in one pass: 1,4,16")
    encoders.add_argument("--rounds", type=number, default=5, help="measured rounds, after two to warm up")
    encoders.add_argument("--peak-gflops", type=float, help="the machine's peak, to print the share that is reached")
    encoders.add_argument("--seed", type=int, default=0, help="of the pictures")
    for command in (offline, encoders):
        command.add_argument("--model", help="a saved dual checkpoint, folder or hub id (default: the demo model)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
        command.add_argument("--dtype", help="float32, bfloat16, float16 (default: the checkpoint's own)")
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if a request failed; an error that a user can put right is one line on stderr and 2."""
    args = build_parser().parse_args(argv)
    try:
        return _offline(args) if args.command == "offline" else _encoders(args)
    except DualVisionError as error:
        print(f"dve bench: error: {error}", file=sys.stderr)
        return 2


def _load(args: argparse.Namespace, max_num_seqs: int) -> DualVisionEncoder:
    # torch and transformers take seconds to import; --help should not.
    from model_core.checkpoint import quiet_unless_terminal
    from model_core.demo_model import demo_folder
    from model_core.encoder import DualVisionEncoder
    from model_core.engine.config import EngineConfig

    quiet_unless_terminal()
    sizes = EngineConfig(max_num_seqs=max(EngineConfig().max_num_seqs, max_num_seqs))
    name = args.model or demo_folder()
    return DualVisionEncoder.from_pretrained(name, device=args.device, dtype=args.dtype, engine_config=sizes)


def _machine(encoder: DualVisionEncoder) -> dict[str, Any]:
    """What a result of record has to say beside its figures."""
    import torch
    import transformers

    info = encoder.info
    is_cuda = info.device.startswith("cuda")
    return {
        "model": info.model_id,
        "num_parameters": info.num_parameters,
        "fusion": info.fusion,
        "fusion_trained": info.fusion_trained,
        "device": torch.cuda.get_device_name(info.device) if is_cuda else platform.processor() or platform.machine(),
        "dtype": info.dtype,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _machine_line(machine: dict[str, Any]) -> str:
    size = f"{machine['num_parameters'] / 1e6:.1f} M parameters, {machine['dtype']}, {machine['fusion']} fusion"
    device = f"{machine['device']}, {machine['num_threads']} threads on {machine['num_cores']} cores"
    return f"{machine['model']}: {size}; {device}; torch {machine['torch']}, transformers {machine['transformers']}"


def _offline(args: argparse.Namespace) -> int:
    if args.generate and args.arm != "fused":
        raise ConfigError(
            "generate knows no arms, so there is nothing to compare", value=f"--generate --arm {args.arm}",
            allowed="--arm fused", fix="Leave one of the two out",
        )  # fmt: skip
    for flag in ("peak_gflops", "peak_gbs"):
        value = getattr(args, flag)
        if value is not None and not (value > 0 and args.floors):
            raise ConfigError(
                f"--{flag.replace('_', '-')} is out of place", value=value, allowed="above 0, together with --floors",
                fix="Give --floors and a number above 0, or leave it out",
            )  # fmt: skip
    load = workload_of(args)
    encoder = _load(args, max(args.concurrency))
    encoder.engine.runner.decoder.compile_loops(wait=True)
    bench = _OfflineBench(encoder, load, args.arm)
    if args.floors:
        bench.measure_floor(args.peak_gflops, args.peak_gbs)
    contenders: dict[str, Round] = {"engine": bench.engine_round}
    if args.generate:
        contenders["generate"] = bench.generate_round
    levels = [_level(bench, contenders, concurrency, args.rounds) for concurrency in args.concurrency]
    machine = _machine(encoder)
    if args.json:
        shape = asdict(load) | {"arm": args.arm}
        found = {"command": "offline", "machine": machine, "workload": shape}
        print(json.dumps(found | {"levels": [level.to_dict() for level in levels]}, indent=2))
    else:
        notes = [_machine_line(machine), *_untrained(encoder, args.arm), *bench.notes]
        print_levels(f"engine, arm {args.arm}: {describe(load)}", levels, notes)
    return 1 if any(one.num_errors for level in levels for each in level.rounds.values() for one in each) else 0


def _level(bench: _OfflineBench, contenders: dict[str, Round], concurrency: int, num_rounds: int) -> Level:
    """A B A B ..., after each has warmed up on one batch of this size."""
    for run in contenders.values():
        run(concurrency, bench.next_items(concurrency), concurrency)
    rounds: dict[str, list[LoadRound]] = {name: [] for name in contenders}
    first, count = 0, bench.load.num_requests
    for turn, name in enumerate(alternate(list(contenders), num_rounds)):
        if turn % len(contenders) == 0:
            first = bench.next_items(count)  # the same pictures for all
        rounds[name].append(contenders[name](concurrency, first, count))
    return Level(concurrency, rounds)


def _untrained(encoder: DualVisionEncoder, arm: str) -> list[str]:
    skips = arm in ("fused", "dinov2-only") and not encoder.info.fusion_trained
    return ["fusion is not trained, so the second encoder was skipped: this is the speed of Qwen alone"] * skips


class _OfflineBench:
    """Rounds of the two contenders. Requests are numbered on, so that no round meets a picture of an earlier one."""

    def __init__(self, encoder: DualVisionEncoder, load: Workload, arm: Any) -> None:
        self._encoder, self.load, self._arm = encoder, load, arm
        self._ids = itertools.count()
        self._next = 0
        self._floor: Floor | None = None
        self.notes: list[str] = []

    def next_items(self, count: int) -> int:
        """The number of the first of `count` questions that nobody has asked yet."""
        first, self._next = self._next, self._next + count
        return first

    def measure_floor(self, gflops: float | None, gbs: float | None) -> None:
        """From the model and a request like those to come; every engine's round says its shares from now on."""
        from model_core.analysis.floors import Peak, floor_of, measure_peak

        model = self._encoder.model
        found = measure_peak(model.device, model.dtype, time.perf_counter)
        peak = Peak(
            found.flops_per_second if gflops is None else gflops * 1e9,
            found.bytes_per_second if gbs is None else gbs * 1e9,
        )
        first = self.next_items(1)
        (item,) = self.load.items(first, 1)
        inputs = self._encoder.engine.prepare(self._request(first, *item)).inputs
        names = model.model.needed_encoders([self._arm]) if inputs.grids else frozenset()
        self._floor = floor_of(model, frozenset(names), inputs.grids, len(inputs.input_ids), self.load.num_tokens, peak)
        self.notes = [
            f"floors: {peak.flops_per_second / 1e9:.0f} GFLOP/s, {peak.bytes_per_second / 1e9:.0f} GB/s; pictures and "
            f"prompt owe {1000 * self._floor.prompt_seconds:.2f} ms, a step {1000 * self._floor.step_seconds:.2f} ms"
        ]

    def engine_round(self, concurrency: int, first: int, count: int) -> LoadRound:
        from model_core.analysis.throughput import run_closed_loop

        requests = [self._request(first + n, *item) for n, item in enumerate(self.load.items(first, count))]
        engine = self._encoder.engine
        engine.reset_caches()  # every round begins with the same: nothing
        run = run_closed_loop(engine, requests, concurrency, time.perf_counter)
        done = summarise(run.timings, run.seconds, self.load.num_tokens)
        done.figures.update(run.figures)
        if self._floor is not None:
            done.figures.update(self._floor.shares(done.figures, concurrency))
        return done

    def generate_round(self, concurrency: int, first: int, count: int) -> LoadRound:
        from model_core.analysis.throughput import run_generate

        items, tokens = self.load.items(first, count), self.load.num_tokens
        model, processor = self._encoder.model, self._encoder.processor
        timings, seconds = run_generate(
            model, processor, items, concurrency, tokens, time.perf_counter, sampling=self.load.sampling
        )
        return summarise(timings, seconds, tokens)

    def _request(self, index: int, question: str, jpeg: bytes | None) -> GenerationRequest:
        parts: tuple[Part, ...] = (TextPart(question),)
        if jpeg is not None:
            parts = (ImagePart(jpeg), *parts)
        chosen: dict[str, Any] = self.load.sampling.fields(index)
        sampling = SamplingParams(max_tokens=self.load.num_tokens, ignore_eos=True, **chosen)
        return GenerationRequest(f"bench-{next(self._ids)}", (ChatMessage("user", parts),), sampling, self._arm)


def _encoders(args: argparse.Namespace) -> int:
    if args.peak_gflops is not None and not args.peak_gflops > 0:
        fix = "Give the machine's peak, or leave it out"
        raise ConfigError("--peak-gflops is out of range", value=args.peak_gflops, allowed="above 0", fix=fix)
    encoder = _load(args, 1)
    from model_core.analysis.encoder_speed import time_encoders

    found = []
    for size in args.image_size:
        for batch in args.batch:
            jpegs = [draw_picture(args.seed + index, size) for index in range(batch)]
            speed = time_encoders(encoder.model, encoder.format, time.perf_counter, jpegs, rounds=args.rounds)
            found.append(speed)
    machine = _machine(encoder)
    if args.json:
        runs = [speed.to_dict(args.peak_gflops) for speed in found]
        print(
            json.dumps(
                {"command": "encoders", "machine": machine, "peak_gflops": args.peak_gflops, "runs": runs}, indent=2
            )
        )
        return 0
    headings = ["ms an image", *(f"{speed.image_size} px, batch {speed.batch}" for speed in found)]
    rows = [[stage, *(f"{speed.stage_ms[stage]:.2f}" for speed in found)] for stage in found[0].stage_ms]
    rows += [
        ["total", *(f"{speed.total_ms:.2f}" for speed in found)],
        ["images/s", *(f"{speed.images_per_second:.1f}" for speed in found)],
        ["vision tokens an image", *(str(speed.vision_tokens) for speed in found)],
        *([f"GFLOP, {name}", *(f"{speed.flops[name] / 1e9:.2f}" for speed in found)] for name in found[0].flops),
    ]
    if args.peak_gflops is not None:
        shares = [speed.bound_shares(args.peak_gflops) for speed in found]
        rows += [[f"share of the peak, {name}, %", *(f"{100 * s[name]:.1f}" for s in shares)] for name in shares[0]]
    print_table("from a JPEG to fused tokens", headings, rows, [_machine_line(machine)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
