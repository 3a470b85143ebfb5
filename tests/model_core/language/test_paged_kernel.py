"""The Triton decode kernels against plain attention, in Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when triton is imported, so all cases run in one other process, whose findings the tests
here read.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Case:
    """`group` query heads share each of `kv_heads`; a sequence has as many tokens as `lengths` says."""

    lengths: tuple[int, ...]
    group: int = 2
    kv_heads: int = 2
    dim: int = 64
    block: int = 16
    splits: int = 1
    dtype: str = "float32"

    @property
    def name(self) -> str:
        heads = f"{self.group}x{self.kv_heads}x{self.dim}"
        return f"{'-'.join(map(str, self.lengths))} of {self.block}, {heads}, {self.dtype}, {self.splits} parts"


# The interpreter takes a quarter of a second for most of these.
CASES = [
    *(Case((length,), splits=splits) for length in (1, 300) for splits in (1, 4)),
    *(Case((1, 300, 16, 17, 15)[:batch], group=group) for batch, group in ((2, 1), (3, 2), (4, 7), (5, 1))),
    Case((15, 16, 17), splits=4),
    *(Case((129, 1), group=7, kv_heads=kv_heads, splits=2) for kv_heads in (1, 4)),
    *(Case((40, 3), dim=dim) for dim in (8, 80, 96, 128)),
    *(Case((100, 17), group=7, dim=128, splits=splits, dtype=dtype) for dtype in TOLERANCES for splits in (1, 2)),
    *(Case((33, 70), block=block, group=20) for block in (1, 4, 32)),
    Case((130,), group=1, kv_heads=1, splits=64),
]


def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(H, dh) over (T, K, dh), in float64 -> (H, dh)."""
    group = query.shape[0] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * query.shape[1] ** -0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


def error_of(case: Case, device: str = "cpu") -> float:
    """The largest difference, over a cache that holds NaN wherever no token is, and rows with ids behind the needed."""
    from model_core.language.paged_decode_kernel import paged_decode

    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    dtype, needed = getattr(torch, case.dtype), [-(-n // case.block) for n in case.lengths]
    ids = rng.sample(range(sum(needed) + 3), sum(needed) + 3)
    cache = torch.full((len(ids) * case.block, 2, case.kv_heads, case.dim), float("nan"), dtype=dtype)
    rows = torch.full((len(needed), 2 + max(needed)), ids[-1], dtype=torch.int32)
    # As the decoder gives it: a part of a wider row.
    heads = case.group * case.kv_heads
    query = torch.randn(len(needed), heads + 3, case.dim, generator=generator).to(dtype)[:, :heads]
    expected, at = [], 0
    for row, (length, count) in enumerate(zip(case.lengths, needed, strict=True)):
        blocks, at = ids[at : at + count], at + count
        rows[row, 0], rows[row, 1 : 1 + count] = length, torch.tensor(blocks)
        places = [block * case.block + offset for block in blocks for offset in range(case.block)][:length]
        cache[places] = torch.randn(length, 2, case.kv_heads, case.dim, generator=generator).to(dtype)
        expected.append(plain(query[row], *cache[places].unbind(1)))
    query, cache, rows = (tensor.to(device) for tensor in (query, cache, rows))
    found = paged_decode(query, cache, rows, block_size=case.block, splits=case.splits)
    assert found.dtype == dtype
    return float((found.cpu().double() - torch.stack(expected)).abs().max())


def fault(*, spoilt: bool) -> str:
    """What the kernels' own trial says, of themselves or of a kernel that forgets the scale."""
    from model_core.language import paged_decode_kernel as kernel

    if spoilt:
        kernel.LOG2_E = 1.0
    return kernel.find_fault(torch.empty(20 * 16, 2, 2, 64), 16)


def store_errors() -> list[float]:
    """A paged store whose single tokens Triton attends for, against one whose SDPA does; the last is a static step."""
    from model_core.language.kv_cache import CacheShape, Work
    from model_core.language.paged import DecodeRows, PagedStore, upload

    shape = CacheShape(1, 2, 16, torch.device("cpu"), torch.float32)
    stores = [PagedStore(shape, 16, backend=backend) for backend in ("triton", "sdpa")]
    blocks, lengths, found = ([3, 9, 1], [12, 0], [7, 2, 5]), [20, 1, 33], []
    generator = torch.Generator().manual_seed(0)

    def new(count: int) -> list[Tensor]:
        return [torch.randn(count, heads, shape.head_dim, generator=generator) for heads in (4, 2, 2)]

    prompts = [Work(key, 0, n, ids) for key, (n, ids) in enumerate(zip(lengths, blocks, strict=True))]
    prompts.sort(key=lambda w: w.length != 1)
    packed = new(sum(lengths))
    for store in stores:
        for key in range(3):
            store.open(key)
        store.begin(prompts)(0, *packed)
    for step in range(2):
        work = [Work(key, n + step, 1, ids) for key, (n, ids) in enumerate(zip(lengths, blocks, strict=True))]
        packed, mixed = new(3), []
        for store in stores:
            rows = DecodeRows(*upload(store.pack_decode(work), torch.device("cpu")))
            attend = store.attend_static(rows) if step == 1 else store.begin(work)
            mixed.append(attend(0, *packed))
        found.append(float((mixed[0] - mixed[1]).abs().max()))
    return found


def main() -> None:
    """In the other process: everything that is found, as one line of JSON."""
    torch.set_num_threads(1)
    found = {
        "errors": {case.name: error_of(case) for case in CASES},
        "store": store_errors(),
        "fault": fault(spoilt=False),
        "fault when spoilt": fault(spoilt=True),
    }
    sys.stdout.write(json.dumps(found))


@pytest.fixture(scope="module")
def found(triton: None) -> dict:
    code = "from tests.model_core.language.test_paged_kernel import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernels_equal_plain_attention(case: Case, found: dict) -> None:
    assert found["errors"][case.name] < TOLERANCES[case.dtype], asdict(case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernels_equal_plain_attention_on_a_gpu() -> None:
    errors = {case.name: error_of(case, "cuda") / TOLERANCES[case.dtype] for case in CASES}
    assert {name: error for name, error in errors.items() if not error < 1} == {}


def test_a_store_over_the_kernels_equals_one_over_sdpa(found: dict) -> None:
    assert len(found["store"]) == 2
    assert max(found["store"]) < 1e-5


def test_the_trial_at_start_accepts_the_kernels_and_would_see_a_wrong_one(found: dict) -> None:
    assert found["fault"] == ""
    assert "results are off by" in found["fault when spoilt"]
