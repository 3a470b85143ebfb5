"""`dve infer`: one question about one picture, with the fusion weights; compare encoders, or benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from model_core.errors import ConfigError, DualVisionError

if TYPE_CHECKING:
    from model_core.analysis.compare import Comparison
    from model_core.encoder import DualVisionEncoder


def build_parser() -> argparse.ArgumentParser:
    """Flags as users of the original know them, with underscores or dashes."""
    parser = argparse.ArgumentParser(prog="dve infer", description=__doc__)
    parser.add_argument("--image", required=True, help="path of a picture")
    parser.add_argument("--question", default="Describe this image", help="what to ask about it")
    parser.add_argument("--model", help="a saved dual checkpoint, folder or hub id (default: the demo model)")
    parser.add_argument(
        "--qwen_model_name", "--qwen-model-name", help="Qwen2.5-VL checkpoint, with --dinov2_model_name"
    )
    parser.add_argument("--dinov2_model_name", "--dinov2-model-name", help="DINOv2 checkpoint")
    parser.add_argument("--fusion", help="fusion strategy of a model built from two checkpoints (default: gated)")
    parser.add_argument("--compare_encoders", "--compare-encoders", action="store_true", help="answer under every arm")
    parser.add_argument("--benchmark", action="store_true", help="time it, warmed up, stage by stage; greedy")
    parser.add_argument("--rounds", type=int, help="measured rounds of the benchmark (default: 10)")
    parser.add_argument("--max_tokens", "--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, help="of sampling, 0 to 2 (default: 0, greedy)")
    parser.add_argument("--seed", type=int, help="of sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (default: the checkpoint's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; an error that a user can put right is one line on stderr and 2."""
    args = build_parser().parse_args(argv)
    try:
        _check_flags(args)
        encoder = _load(args)
        messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": args.image}, {"type": "text", "text": args.question}],
            }
        ]
        result = _run(encoder, messages, args)
    except DualVisionError as error:
        print(f"dve infer: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if args.json else _render(result))
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Raises ConfigError: a flag that could only be ignored beside the others."""
    names = [name for name in (args.qwen_model_name, args.dinov2_model_name) if name]
    if args.model and names:
        raise ConfigError(
            "--model and the two checkpoint names exclude each other", value=f"{args.model}, {', '.join(names)}",
            allowed="one model", fix="Leave --model out, or the names", param="model",
        )  # fmt: skip
    if args.fusion is not None and not names:
        raise ConfigError(
            "--fusion can't change a model that is built already", value=args.fusion,
            allowed="--fusion beside --qwen_model_name and --dinov2_model_name",
            fix="Leave it out, or name two checkpoints", param="fusion",
        )  # fmt: skip
    if args.rounds is not None and not args.benchmark:
        raise ConfigError(
            "--rounds is of the benchmark alone", value=args.rounds, allowed="--rounds beside --benchmark",
            fix="Leave it out, or give --benchmark", param="rounds",
        )  # fmt: skip
    sampling = [
        f"--{name} {getattr(args, name)}" for name in ("temperature", "seed") if getattr(args, name) is not None
    ]
    if args.benchmark and sampling:
        raise ConfigError(
            "the benchmark is greedy", value=", ".join(sampling), allowed="it without --temperature and --seed",
            fix="Leave them out, or ask without --benchmark", param="benchmark",
        )  # fmt: skip


def _load(args: argparse.Namespace) -> DualVisionEncoder:
    # torch and transformers take seconds to import; --help should not.
    from model_core.checkpoint import quiet_unless_terminal
    from model_core.encoder import DualVisionEncoder

    quiet_unless_terminal()
    options: dict[str, Any] = {"device": args.device, "dtype": args.dtype}
    if args.model:
        return DualVisionEncoder.from_pretrained(args.model, **options)
    options |= {} if args.fusion is None else {"fusion": args.fusion}
    return DualVisionEncoder(args.qwen_model_name, args.dinov2_model_name, **options)


def _run(encoder: DualVisionEncoder, messages: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature or 0.0, "seed": args.seed}
    result: dict[str, Any] = {"model": encoder.info.model_id, "question": args.question}
    if args.compare_encoders:
        result["comparison"] = _comparison(encoder.compare_encoders(messages, **sampling))
        result["answer"] = result["comparison"]["arms"]["fused"]["answer"]
    else:
        result["answer"] = encoder.chat(messages, **sampling)
    # After the answer: the other way round the encoders' features would be kept already, and their time nothing.
    result["fusion"] = encoder.analyze_fusion_weights(messages)
    if args.benchmark:
        rounds = {} if args.rounds is None else {"rounds": args.rounds}
        result["benchmark"] = encoder.benchmark(messages, max_tokens=args.max_tokens, **rounds).to_dict()
    return result


def _render(result: dict[str, Any]) -> str:
    lines = [result["answer"], ""]
    fusion = result["fusion"]
    weights = {k: v for k, v in fusion.items() if k.endswith("_weight")}
    shown = "  ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in weights.items())
    lines.append(f"{shown}  dominant {fusion['dominant_encoder']}  (routing weights, not importance)")
    if not fusion["fusion_trained"]:
        lines.append("fusion is not trained: the second encoder changes nothing yet")
    for i, image in enumerate(fusion["images"]):
        lines += [f"image {i + 1}: {warning}" for warning in image["warnings"]]
    if "comparison" in result:
        lines += ["", *_comparison_lines(result["comparison"])]
    if "benchmark" in result:
        from model_core.analysis.benchmark import Benchmark

        lines += ["", *_table([("stage", "median"), *Benchmark(**result["benchmark"]).rows()])]
    return "\n".join(lines)


def _comparison(found: Comparison) -> dict[str, Any]:
    """As JSON has it: each arm's answer and likelihood, then the sums."""
    arms = {
        arm: {
            "answer": result.answer.text,
            "log_likelihood": result.log_likelihood,
            "token_log_likelihoods": list(result.token_log_likelihoods),
            "first_divergence": result.first_divergence,
        }
        for arm, result in found.arms.items()
    }
    return {
        "arms": arms,
        "reliance": found.reliance,
        "shapley": found.shapley,
        "interaction": found.interaction,
        "encoder_seconds": dict(found.encoder_seconds),
    }


def _comparison_lines(comparison: dict[str, Any]) -> list[str]:
    rows = [("arm", "answer", "log p(fused answer)")]
    for arm, result in comparison["arms"].items():
        score = result["log_likelihood"]
        rows.append((arm, result["answer"], "-" if score is None else f"{score:.3f}"))
    lines = _table(rows)
    for name in ("reliance", "shapley"):
        if comparison[name]:
            values = "  ".join(f"{encoder} {value:+.3f}" for encoder, value in comparison[name].items())
            lines.append(f"{name} (nats): {values}")
    seconds = comparison["encoder_seconds"].items()
    lines.append("encoder time: " + "  ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds))
    return lines


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())
