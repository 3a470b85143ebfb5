"""What sizes of models take, computed: the tables of RUNBOOK.md, section Sizing. `python -m benchmarks.sizing`.

In: the shapes of make_checkpoint.py, without weights. Out: Markdown. Memory is `dve fit`'s; the speed is the bound that
reading the decoder's layers and its head once a token sets: the towers are not asked for a token, and of the embeddings
one row is. No figure in it was measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Dinov2Config

from benchmarks.make_checkpoint import SHAPES, build_tokenizer, qwen_config
from model_core.cli.fit import build_parser, judge

GIB = 2**30
#: The card that `training` asks: 80 GB as CUDA counts them.
CARD = "79GiB"
#: Copy rates: H100's data sheet.
BYTES_A_SECOND = 3.35e12
MODES = ("fusion_only", "encoders_only", "llm_only", "full")


def write_configs(name: str, folder: Path) -> tuple[Path, Path]:
    """The two folders of a pair: config.json alone, which is all that `dve fit` reads."""
    shape = SHAPES[name]
    qwen, dinov2 = folder / name / "qwen", folder / name / "dinov2"
    config = qwen_config(shape, build_tokenizer(num_files=5))
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    for one, where in ((config, qwen), (Dinov2Config(**shape.dinov2, image_size=518, patch_size=14), dinov2)):
        one.dtype = str(shape.dtype).removeprefix("torch.")
        where.mkdir(parents=True)
        one.save_pretrained(where)
    return qwen, dinov2


def report(pair: tuple[Path, Path], *more: str) -> dict[str, Any]:
    names = ["--qwen-model-name", str(pair[0]), "--dinov2-model-name", str(pair[1])]
    return judge(build_parser().parse_args([*names, "--device", "cuda", "--memory", CARD, *more]))


def decoder_bytes(pair: tuple[Path, Path]) -> int:
    """Of what a token reads: the layers, the last norm, the head."""
    import torch

    from model_core.checkpoint import read_model_config
    from model_core.model import DualVisionModel

    with torch.device("meta"):
        model = DualVisionModel(read_model_config((str(pair[0]), str(pair[1]))))
    decoder = model.model.language_model
    read = [*decoder.layers.parameters(), *decoder.norm.parameters(), model.lm_head.weight]
    return sum(weight.numel() for weight in read) * model.config.dtype.itemsize


def lines(names: list[str]) -> Iterator[str]:
    """Both tables."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = {name: write_configs(name, Path(folder)) for name in names}
        reports = {name: report(pair, "--kv-cache", "8GiB", "--max-tokens", "4096") for name, pair in pairs.items()}
        yield (
            "| model | weights, GiB "
            "| served with a KV cache of 8 GiB, GiB | decoder and head, GiB | tokens/s of one stream at most |"
        )
        yield "|---|---|---|---|---|"
        for name, pair in pairs.items():
            serving, read = reports[name]["serving"], decoder_bytes(pair)
            sizes = (serving["parts"]["weights"], serving["total_bytes"], read)
            cells = " | ".join(f"{size / GIB:.1f}" for size in sizes)
            yield f"| {name} | {cells} | {BYTES_A_SECOND / read:.0f} |"
        yield ""
        yield f"| model | {' | '.join(MODES)} |"
        yield f"|---|{'---|' * len(MODES)}"
        for name, told in reports.items():
            modes = {row["name"]: row for row in told["training"]}
            cells = " | ".join(f"{modes[mode]['total_bytes'] / GIB:.0f}" for mode in MODES)
            yield f"| {name} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="dve fit's own report of 7b instead")
    if parser.parse_args().json:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(report(write_configs("7b", Path(folder))), indent=2))
        return
    print("\n".join(lines(["3b", "7b"])))


if __name__ == "__main__":
    main()
