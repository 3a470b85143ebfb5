"""Recorded decode steps give what the usual forward gives, for any batch, and step aside where they can't."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from model_core.engine import decode_graphs
from model_core.engine.block_manager import BlockManager
from model_core.engine.decode_graphs import CudaCapture, DecodeGraphs, bucket_sizes
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import KVStore, RowStore, Work
from model_core.language.paged import PagedStore
from tests.model_core import tiny

NUM_BLOCKS, BLOCK = 40, 4
WAITS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of one run, done again on the same memory, without their Python.

    Reading a number on the host while recording fails, as on CUDA.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in WAITS:
            raise RuntimeError("the host may not wait while recording")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        now: dict[int, Tensor] = {}

        def swap(value: object) -> object:
            return now.get(id(value), value)

        for func, args, kwargs, out in self.calls:
            again = func(*tree_map(swap, args), **tree_map(swap, kwargs))
            now.update({id(old): new for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True)})


class Recorder:
    """A capture that counts, and can fail."""

    def __init__(self, *, fails_at: int = 0) -> None:
        self.count, self._fails_at = 0, fails_at

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.count += 1
        if self.count == self._fails_at:
            raise RuntimeError("out of memory")
        tape = Tape()
        with tape:
            step()
        return tape.replay


class Rig:
    """A tiny decoder; each sequence runs in the paged store, through graphs, and in dense rows, as usual."""

    def __init__(
        self,
        capture: Recorder | None,
        *,
        max_num_seqs: int = 6,
        max_context_tokens: int = 80,
        device: str = "cpu",
        backend: str = "sdpa",
    ) -> None:
        self.device, self.atol = torch.device(device), 1e-5 if device == "cpu" else 1e-4
        self.model = tiny.qwen_model().to(self.device)
        self.decoder = Decoder(self.model.model.language_model, self.model.lm_head)
        self.paged = PagedStore(self.decoder.cache_shape, NUM_BLOCKS, BLOCK, backend=backend)
        self.paged._pool.fill_(float("nan"))  # whatever was there before
        self.usual = RowStore(self.decoder.cache_shape)
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK)
        self.owned: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.graphs = self.build(self.paged, capture, max_num_seqs, max_context_tokens)

    def build(self, store: KVStore, capture: Recorder | None, max_num_seqs: int, max_context: int) -> DecodeGraphs:
        return DecodeGraphs(
            self.decoder,
            store,
            max_num_seqs=max_num_seqs,
            max_context_tokens=max_context,
            joined=self.decoder.joined,
            capture=capture,
        )

    def forward(self, store: KVStore, ids: list[int], work: list[Work]) -> Tensor:
        for w in work:
            if w.key not in store:
                store.open(w.key)
        positions = torch.cat([torch.arange(w.start, w.start + w.length) for w in work]).expand(3, -1)
        embeds = self.decoder.embed(torch.tensor(ids, device=self.device))
        return self.decoder.forward(embeds, positions.to(self.device), store.begin(work))

    def work(self, key: int, length: int) -> Work:
        start, owned = self.lengths.get(key, 0), self.owned.setdefault(key, [])
        assert self.blocks.allocate(owned, start + length)
        self.lengths[key] = start + length
        return Work(key, start, length, list(owned))

    @torch.inference_mode()
    def prefill(self, key: int, length: int) -> None:
        work, ids = [self.work(key, length)], [(7 * key + i) % 200 + 20 for i in range(length)]
        found, expected = self.forward(self.paged, ids, work), self.forward(self.usual, ids, work)
        assert torch.allclose(found, expected, atol=self.atol)

    @torch.inference_mode()
    def drop(self, key: int) -> None:
        self.paged.close(key)
        self.usual.close(key)
        self.blocks.free(self.owned.pop(key))
        del self.lengths[key]

    @torch.inference_mode()
    def step(self, keys: list[int], seed: int = 0) -> Tensor | None:
        """One token for each, recorded and as usual, which must agree. Returns what the graphs gave."""
        work = [self.work(key, 1) for key in keys]
        ids = [random.Random(seed + key).randrange(20, 220) for key in keys]
        positions = torch.tensor([w.start for w in work]).expand(3, -1)
        found, expected = self.graphs.run(ids, positions, work), self.forward(self.usual, ids, work)
        if found is None:
            self.forward(self.paged, ids, work)
        else:
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, atol=self.atol)
        return found


def run_random_batches(rig: Rig) -> None:
    rng = random.Random(0)
    for number in range(60):
        if len(rig.owned) < 6 and rng.random() < 0.5:
            rig.prefill(number, rng.randint(1, 20))
        if rig.owned and (rng.random() < 0.15 or max(rig.lengths.values()) > 30):
            rig.drop(max(rig.owned, key=lambda key: rig.lengths[key]))
        keys = [key for key in rig.owned if rng.random() < 0.8]
        rng.shuffle(keys)
        if keys:
            assert rig.step(keys, number) is not None


def test_any_batch_equals_the_usual_forward_and_each_size_is_recorded_once() -> None:
    capture = Recorder()
    rig = Rig(capture)
    run_random_batches(rig)
    assert capture.count == rig.graphs.num_recorded == 4, "1, 2, 4, 6"


def test_padding_writes_to_the_scratch_block_alone() -> None:
    rig = Rig(Recorder())
    for key in range(3):
        rig.prefill(key, 5 + key)
    before = rig.paged._pool.clone()
    rig.step([0, 1, 2])
    changed = (rig.paged._pool != before) & ~(rig.paged._pool.isnan() & before.isnan())
    places = changed.flatten(2).any(-1).any(0).nonzero()[:, 0].tolist()
    written = [rig.owned[key][n // BLOCK] * BLOCK + n % BLOCK for key, n in ((0, 5), (1, 6), (2, 7))]
    assert sorted(places) == sorted([*written, rig.paged.scratch_block * BLOCK])
    with torch.inference_mode():
        alone = rig.forward(rig.usual, [0], [Work("padding", 0, 1)])
    assert torch.allclose(rig.graphs._hidden[3], alone[0], atol=1e-5), "it reads what it wrote, not what others left"


def test_results_lie_in_one_buffer_and_the_host_does_nothing_but_fill_and_launch() -> None:
    rig = Rig(Recorder())
    for key in range(3):
        rig.prefill(key, 4)
    first = rig.step([0, 1, 2])
    rig.graphs._forward = None  # a replay that came back to Python would fail
    second = rig.step([2, 0, 1], 1)
    assert first.data_ptr() == second.data_ptr()


def test_warming_up_records_every_size_and_spoils_nothing() -> None:
    capture = Recorder()
    rig = Rig(capture)
    rig.prefill(0, 9)
    assert rig.graphs.warm_up() == 4
    for key in range(1, 6):
        rig.prefill(key, key)
    for number in range(1, 7):
        assert rig.step(list(range(number))) is not None
    assert capture.count == 4
    assert rig.graphs.warm_up() == 4
    assert capture.count == 4


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (16, (1, 2, 4, 8, 16)),
        (64, (1, 2, 4, 8, 16, 24, 32, 48, 64)),
        (100, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)),
        (128, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)),
    ],
)
def test_buckets(max_num_seqs: int, expected: tuple[int, ...]) -> None:
    assert bucket_sizes(max_num_seqs) == expected


def test_a_batch_takes_the_smallest_size_that_holds_it() -> None:
    graphs = Rig(Recorder()).graphs
    assert [graphs.bucket_of(n) for n in range(1, 8)] == [1, 2, 4, 4, 6, 6, None]


def test_what_does_not_fit_runs_as_usual() -> None:
    rig = Rig(Recorder(), max_num_seqs=2, max_context_tokens=8)
    rig.prefill(0, 3)
    assert rig.step([0]) is not None
    rig.prefill(1, 8)
    assert rig.step([1]) is None, "a third block, and there is room for two"
    rig.prefill(2, 1)
    rig.prefill(3, 1)
    assert rig.step([0, 2, 3]) is None
    assert rig.step([0, 2]) is not None
    assert rig.graphs.is_available


@pytest.mark.parametrize("where", ["a layer", "the embedding"])
def test_with_hooks_nothing_is_recorded(where: str) -> None:
    """A graph would skip what the hook does."""
    rig = Rig(Recorder())
    rig.prefill(0, 3)
    assert rig.step([0]) is not None
    language = rig.model.model.language_model
    module = language.layers[0].mlp if where == "a layer" else language.embed_tokens
    module.register_forward_hook(lambda *args: args[2] * 2)
    assert rig.step([0]) is None
    assert rig.graphs.num_recorded == 0
    assert rig.graphs.warm_up() == 0


def test_weights_that_moved_are_recorded_anew() -> None:
    """A graph reads memory that the model no longer uses."""
    capture = Recorder()
    rig = Rig(capture)
    rig.prefill(0, 3)
    rig.step([0])
    rig.model.to(torch.float64).to(torch.float32)
    with torch.no_grad():
        rig.model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(-1)
    assert rig.step([0]) is not None
    rig.model.model.language_model.embed_tokens.weight.data = rig.model.model.language_model.embed_tokens.weight * 0.5
    assert rig.step([0]) is not None
    assert rig.step([0]) is not None
    assert capture.count == 3


def test_a_failed_recording_is_said_once_and_ends_all_graphs(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(Recorder(fails_at=2))
    for key in range(2):
        rig.prefill(key, 3)
    with caplog.at_level(logging.WARNING):
        assert rig.step([0]) is not None
        assert rig.step([0, 1]) is None
        assert rig.step([0]) is None
        assert rig.graphs.warm_up() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "decode runs without CUDA graphs: recording 2 rows failed: out of memory"
    ]
    assert not rig.graphs.is_available


def test_a_forward_that_waits_for_the_device_is_not_recorded() -> None:
    rig = Rig(Recorder())
    rig.prefill(0, 3)
    original = rig.decoder.forward

    def waits(hidden: Tensor, *args: object) -> Tensor:
        hidden.sum().item()
        return original(hidden, *args)

    rig.decoder.forward = waits
    assert rig.step([0]) is None
    assert "the host may not wait" in rig.graphs.refusal


def test_a_cpu_and_dense_rows_have_no_graphs() -> None:
    rig = Rig(None)
    assert not rig.graphs.is_available
    assert rig.graphs.refusal == "the device is cpu"
    rig.prefill(0, 3)
    assert rig.step([0]) is None
    assert rig.graphs.warm_up() == 0
    dense = rig.build(rig.usual, Recorder(), 4, 40)
    assert not dense.is_available
    assert "rows+sdpa" in dense.refusal


class FakeCuda:
    """Stands in for what `CudaCapture` takes of torch.cuda, and writes down what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def graph_pool_handle(self) -> str:
        self.log.append("pool")
        return "the pool"

    def Stream(self, device: object) -> FakeCuda:  # noqa: N802  torch's name
        return self

    def current_stream(self) -> FakeCuda:
        return self

    def wait_stream(self, other: FakeCuda) -> None:
        self.log.append("wait")

    def CUDAGraph(self) -> FakeCuda:  # noqa: N802  torch's name
        return self

    def replay(self) -> None:
        self.log.append("replay")

    @contextlib.contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.log.append("aside")
        yield

    @contextlib.contextmanager
    def graph(self, graph: object, *, pool: str, stream: object, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"record in {pool}, {capture_error_mode}")
        yield


def test_cuda_runs_a_step_once_aside_before_it_records_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(decode_graphs.torch, "cuda", cuda)
    capture = CudaCapture(torch.device("cuda"))
    replays = [capture(lambda: cuda.log.append("step")) for _ in range(2)]
    recording = ["wait", "aside", "step", "wait", "record in the pool, thread_local", "step"]
    assert cuda.log == ["pool", *recording, *recording]
    replays[0]()
    assert cuda.log[-1] == "replay"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_graphs_on_a_gpu_equal_the_usual_forward() -> None:
    rig = Rig(None, device="cuda", backend="triton")
    assert rig.graphs.is_available
    run_random_batches(rig)
    assert rig.graphs.is_available, rig.graphs.refusal
    assert rig.graphs.num_recorded == 4
    assert rig.graphs.warm_up() == 4
