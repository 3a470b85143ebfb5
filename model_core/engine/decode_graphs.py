"""Decode steps as CUDA graphs: a step of one token a sequence is recorded once for each batch size of a list, and
launched whole from then on, so that the host no longer pays for every kernel.

In: token ids, positions, single-token work. Out: hidden states, or None where the step must run as usual. A batch is
filled up to the next size with rows that write to the store's scratch block. It knows no request and no sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model_core.language.decoder import Decoder
from model_core.language.kv_cache import KVStore, Work
from model_core.language.paged import DecodeRows, PagedStore, upload

LOG = logging.getLogger(__name__)
SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
BUCKET_STEP = 32
#: Lines of the buffer of single numbers a row: the token, its three positions, its slot.
IDS, POSITIONS, SLOTS, NUM_LINES = 0, slice(1, 4), 4, 5

#: Records what a function does on the device and gives what does it again, over what the same memory holds by then.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class DecodeGraphs:
    """All graphs of one decoder over one store.

    They stand on the memory of the joined weights, the pool and the buffers here. Joined weights that changed are
    noticed before each step and graphs are recorded anew; a decoder that runs module by module (LoRA, hooks) is
    never recorded, since a graph would skip what Python does in between.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        *,
        max_num_seqs: int,
        max_context_tokens: int,
        joined: Callable[[], object | None],
        capture: Capture | None = None,
    ) -> None:
        """
        Args:
            max_num_seqs: rows of the largest graph. max_context_tokens: the longest sequence that a row can hold.
            joined: the decoder's joined layers, another object whenever their weights moved; None: module by module.
            capture: instead of CUDA's own; then any device will do.
        """
        self._decoder, self._joined = decoder, joined
        self.buckets = bucket_sizes(max_num_seqs)
        self.refusal = _find_refusal(store, is_injected=capture is not None)
        self._replays: dict[int, Callable[[], None]] = {}
        self._recorded_for: tuple | None = None
        if self.refusal or not isinstance(store, PagedStore):
            return
        self._store = store
        device, rows, shape = store.shape.device, self.buckets[-1], decoder.cache_shape
        self._capture = capture or CudaCapture(device)
        width = min(-(-max_context_tokens // store.block_size), store.num_blocks)
        self._lines = torch.zeros(NUM_LINES, rows, dtype=torch.int32, device=device)
        self._rows = torch.zeros(rows, 1 + width, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(rows, decoder.config.hidden_size, dtype=shape.dtype, device=device)

    @property
    def is_available(self) -> bool:
        """False: `refusal` says why, and every `run` gives None."""
        return not self.refusal

    @property
    def num_recorded(self) -> int:
        return len(self._replays)

    def bucket_of(self, num_rows: int) -> int | None:
        """The smallest size that holds so many rows; None: no graph does."""
        return next((bucket for bucket in self.buckets if bucket >= num_rows), None)

    @torch.inference_mode()
    def warm_up(self) -> int:
        """Record all sizes now, so that no request waits for it. Returns how many graphs there are."""
        if self.is_available and self._is_recordable():
            for bucket in reversed(self.buckets):  # the largest first: the others then fit its memory
                self._fill(bucket, [], torch.zeros(3, 0), [])
                if self._replay_of(bucket) is None:
                    break
        return self.num_recorded

    @torch.inference_mode()
    def run(self, ids: Sequence[int] | Tensor, positions: Tensor, work: Sequence[Work]) -> Tensor | None:
        """One step over single-token work of sequences that are open in the store.

        Args:
            ids: B tokens, none of them in an image's place; on the host, or as a tensor on the device.
            positions: (3, B) on the host. work: B, length 1 each.
        Returns:
            hidden states (B, D), which the next call overwrites; None: run the step as usual.
        """
        bucket = self.bucket_of(len(work))
        if not self.is_available or bucket is None or not self._is_recordable():
            return None
        if not self._fill(bucket, ids, positions, work):
            return None
        replay = self._replay_of(bucket)
        if replay is None:
            return None
        replay()
        return self._hidden[: len(work)]

    def _is_recordable(self) -> bool:
        """Drops all graphs if what they stand on has moved. False: the forward can't be recorded as it is now."""
        joined, model = self._joined(), self._decoder.model
        outer = (model.embed_tokens, model.rotary_emb, model.norm)
        if joined is None or any(module._forward_hooks or module._forward_pre_hooks for module in outer):
            self._replays.clear()
            return False
        pointers = [parameter.data_ptr() for module in outer for parameter in module.parameters()]
        stands_on = (joined, *outer, *pointers)
        if stands_on != self._recorded_for:
            self._replays.clear()
            self._recorded_for = stands_on
        return True

    def _fill(self, bucket: int, ids: Sequence[int] | Tensor, positions: Tensor, work: Sequence[Work]) -> bool:
        """The step's numbers into the buffers; rows without work write to the scratch block and read only that."""
        num_rows, scratch = len(work), self._store.scratch_block
        slots, tables = self._store.pack_decode(work) if work else (np.zeros(0), np.zeros((0, 2)))
        if tables.shape[1] > self._rows.shape[1]:
            return False
        lines = np.zeros((NUM_LINES, bucket), dtype=np.int32)
        is_there = isinstance(ids, Tensor)
        lines[IDS, :num_rows] = 0 if is_there else ids
        lines[POSITIONS, :num_rows], lines[SLOTS, :num_rows] = positions.numpy(), slots
        lines[SLOTS, num_rows:] = scratch * self._store.block_size
        rows = np.zeros((bucket, tables.shape[1]), dtype=np.int32)
        rows[:num_rows] = tables
        rows[num_rows:, 0], rows[num_rows:, 1] = 1, scratch
        lines_there, rows_there = upload([lines, rows], self._rows.device)
        self._lines[:, :bucket].copy_(lines_there)
        if is_there:
            self._lines[IDS, :num_rows].copy_(ids)
        self._rows[:bucket, : rows.shape[1]].copy_(rows_there)
        return True

    def _replay_of(self, bucket: int) -> Callable[[], None] | None:
        """Recorded at first use. If that fails there are no graphs from then on."""
        if bucket not in self._replays:
            try:
                self._replays[bucket] = self._capture(lambda: self._forward(bucket))
            except RuntimeError as error:
                self.refusal = f"recording {bucket} rows failed: {error}"
                self._replays.clear()
                LOG.warning("decode runs without CUDA graphs: %s", self.refusal)
                return None
        return self._replays[bucket]

    def _forward(self, bucket: int) -> None:
        """What is recorded: it must read the buffers, and nothing that Python holds for one step alone."""
        lines = self._lines[:, :bucket]
        attend = self._store.attend_static(DecodeRows(lines[SLOTS], self._rows[:bucket]))
        hidden = self._decoder.forward(self._decoder.embed(lines[IDS]), lines[POSITIONS], attend)
        self._hidden[:bucket].copy_(hidden)


class CudaCapture:
    """Records CUDA graphs of one device. All share one memory pool: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Raises RuntimeError: something in `step` can't be recorded, or memory ran out."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()  # compiles kernels and makes workspaces, which can't be done while recording
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: only what this one does counts.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that are recorded, the last one `max_num_seqs` itself. Sparse where padding costs little."""
    larger = range(SMALL_BUCKETS[-1] + BUCKET_STEP, max_num_seqs, BUCKET_STEP)
    return (*(size for size in (*SMALL_BUCKETS, *larger) if size < max_num_seqs), max_num_seqs)


def _find_refusal(store: KVStore, *, is_injected: bool) -> str:
    """Why there can be no graphs; nothing if there can."""
    if not isinstance(store, PagedStore):
        return f"the store is {store.name}, whose tensors move as it grows"
    if is_injected:
        return ""
    if store.shape.device.type != "cuda":
        return f"the device is {store.shape.device.type}"
    if store.backend != "triton":
        return f"with {store.backend} a recorded step would read every sequence at its full length"
    return ""
