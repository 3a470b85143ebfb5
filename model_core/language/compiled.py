"""Decode steps and short prompts through compiled loops (decode_kernel.py), for float32 on CPUs: who compiles them, and
when they may stand for the modules.

Compiling takes seconds of a core, so another process does it, at a low priority, when a server has loaded or any other
process has decoded for a while; until then, and wherever it can't be, torch's operations run (fused.py). Weights are
copied into the layout of the loops; whoever holds a copy watches the weights for changes.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_core.language.kv_cache import DenseRows, Work
from model_core.language.panels import PANEL, pack_columns
from model_core.linear import COPIED_BYTES

LOG = logging.getLogger(__name__)
#: Tokens of one step, and of a prompt with what is before it. With AVX2 a prompt of 256 takes 0.9 of torch's time, one
#: of 400 to 500 as long: each token passes over all keys before it, where torch's attention takes many at a time.
MAX_ROWS = 256
MAX_PROMPT = 256
#: Steps before anything is compiled or loaded: a process that answers one short question never pays for it.
PATIENCE = 16
_ROTARY_STEP = 1024
# It goes on when its parent ends, for the next one: only its last word is lost.
_COMPILE = """
import os, sys
sys.path[:] = {path!r}
getattr(os, "nice", int)(10)
from model_core.language import decode_kernel
decode_kernel.load()
"""


class KernelLoader:
    """Gives the compiled functions of this process once they can be had at no great cost.

    refusal: why they never will be; nothing while they may.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.refusal = "" if importlib.util.find_spec("numba") else "numba is not installed"
        self._patience = patience
        self._compiler: subprocess.Popen[bytes] | None = None
        self._module: ModuleType | None = None

    def get(self) -> ModuleType | None:
        """The module `decode_kernel`, loaded, or None: not yet, or never. Asked once a step."""
        if self._module is not None or self.refusal:
            return self._module
        self._patience -= 1
        if self._compiler is None and self._patience <= 0:
            self.begin()
        elif self._compiler is not None and self._compiler.poll() is not None:
            self._finish(self._compiler)
        return self._module

    def begin(self) -> None:
        """Start the compiler now: this process will decode for long."""
        if self._compiler is not None or self._module is not None or self.refusal:
            return
        command = [sys.executable, "-P", "-c", _COMPILE.format(path=sys.path)]  # the very modules that this process has
        try:
            self._compiler = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            self._refuse(f"the compiler can't be started: {error}")
            return
        atexit.register(self._leave)

    def wait(self) -> ModuleType | None:
        """As `get`, but it waits for what there is to wait for."""
        self.begin()
        while self.get() is None and not self.refusal:
            self._compiler.wait()
        return self._module

    def _finish(self, compiler: subprocess.Popen[bytes]) -> None:
        told = compiler.communicate()[1].decode(errors="replace").strip()
        if compiler.returncode != 0:
            self._refuse(told.splitlines()[-1] if told else f"the compiler ended with {compiler.returncode}")
            return
        num_threads = torch.get_num_threads()
        try:
            self._module = _load_kernel()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            self._refuse(f"{type(error).__name__}: {error}")
            return
        finally:
            torch.set_num_threads(num_threads)  # numba has told OpenMP its own number, which torch would take over
        LOG.info("steps of up to %d tokens run compiled", MAX_ROWS)

    def _leave(self) -> None:
        if self._compiler.returncode is None:
            self._compiler.stderr.close()
            self._compiler.returncode = 0  # nobody waits for it any more

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        LOG.warning("steps run uncompiled: %s", reason)


#: Of this process: compiled once, whatever number of engines it has.
KERNELS = KernelLoader()


def count_fitting(work: Sequence[Work]) -> tuple[int, int]:
    """How many pieces of a step, single tokens first, the loops should take, and the tokens in them."""
    tokens = 0
    for number, piece in enumerate(work):
        is_long = piece.length > 1 and piece.start + piece.length > MAX_PROMPT
        if is_long or tokens + piece.length > MAX_ROWS:
            return (number, tokens) if piece.length > 1 else (0, 0)  # single tokens go together
        tokens += piece.length
    return len(work), tokens


class CompiledLayers:
    """All layers of one language model and its last norm, over copies of their weights."""

    def __init__(self, model: nn.Module, kernel: ModuleType) -> None:
        config = model.config
        self._kernel = kernel
        self._num_heads, self._eps = config.num_attention_heads, config.rms_norm_eps
        self._weights = _pack_layers(model, kernel)
        self._rotary = RotaryTable(model)

    def forward(self, hidden: Tensor, positions: Tensor, rows: DenseRows) -> Tensor:
        """hidden (B, D) embeddings, positions (3, B) on the host -> (B, D) after the last norm."""
        cos, sin = self._rotary.at(positions)
        made = self._kernel.step(
            hidden.numpy().copy(),
            self._weights,
            self._kernel.Rows(cos, sin, rows.rows, rows.ends, rows.cache.numpy()),
            num_heads=self._num_heads,
            eps=self._eps,
            num_threads=torch.get_num_threads(),
        )
        return torch.from_numpy(made)


class CompiledHead:
    """The product that ends in logits, over a copy of `lm_head`'s weight."""

    def __init__(self, lm_head: nn.Linear, kernel: ModuleType) -> None:
        self._kernel, self._columns = kernel, lm_head.weight.shape[0]
        self._weight = pack_columns(_as_array(lm_head.weight))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        made = self._kernel.project(
            np.ascontiguousarray(hidden.numpy()), self._weight, self._columns, num_threads=torch.get_num_threads()
        )
        return torch.from_numpy(made)


class RotaryTable:
    """cos and sin, as the model's own module gives them, for text: positions that are the same three times."""

    def __init__(self, model: nn.Module) -> None:
        self._module, self._weight = model.rotary_emb, model.embed_tokens.weight
        self._cos = self._sin = np.empty((0, 0), dtype=np.float32)

    def at(self, positions: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(3, B) -> (B, dh) and (B, dh)."""
        places = positions.numpy()
        if (places != places[0]).any():  # the last token of an image, as a chunk of its own
            return self._ask(positions)
        longest = int(places.max()) + 1
        if longest > len(self._cos):
            length = -(-longest // _ROTARY_STEP) * _ROTARY_STEP
            self._cos, self._sin = self._ask(torch.arange(length).expand(3, -1))
        return self._cos[places[0]], self._sin[places[0]]

    def _ask(self, positions: Tensor) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = self._module(self._weight[None, :1], positions[:, None])
        return np.ascontiguousarray(cos[0].numpy()), np.ascontiguousarray(sin[0].numpy())


def _load_kernel() -> ModuleType:
    """numba is imported here: 0.2 s, 60 MB. Raises ImportError, OSError, RuntimeError, ValueError: it won't do."""
    from numba.core.errors import NumbaError  # noqa: PLC0415

    from model_core.language import decode_kernel  # noqa: PLC0415

    try:
        decode_kernel.load()
    except NumbaError as error:
        raise RuntimeError(str(error)) from error
    return decode_kernel


def find_fault(model: nn.Module, lm_head: nn.Module) -> str:
    """Why the loops can't stand for these modules; nothing if they can."""
    config, weight = model.config, model.embed_tokens.weight
    dim = config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    columns = (config.hidden_size, config.intermediate_size, heads * dim)
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"they are for float32 on CPUs, not {str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    if type(lm_head) is not nn.Linear or lm_head.bias is not None:
        return "lm_head is not a plain product"
    if config.rope_parameters.get("rope_type") != "default":
        return f"rotary positions are of the type {config.rope_parameters.get('rope_type')!r}"
    if any(number % PANEL for number in columns) or dim % 2:
        return f"widths {columns} are not multiples of {PANEL}"
    if copied_bytes(model, lm_head) > COPIED_BYTES:
        return f"copies of the weights would take {copied_bytes(model, lm_head)} bytes"
    return ""


def copied_bytes(model: nn.Module, lm_head: nn.Module) -> int:
    """What the loops hold, or will hold, beside the weights."""
    return sum(p.nbytes for p in model.layers.parameters()) + lm_head.weight.nbytes


def _pack_layers(model: nn.Module, kernel: ModuleType) -> Any:
    layers = model.layers

    def joined(layer: nn.Module, what: str) -> np.ndarray | None:
        attention = layer.self_attn
        found = [getattr(m, what) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        return None if found[0] is None else np.concatenate([_as_array(one) for one in found])

    qkv = np.stack([pack_columns(joined(layer, "weight")) for layer in layers])
    biases = [joined(layer, "bias") for layer in layers]
    shape = (qkv.shape[1], qkv.shape[-1])
    return kernel.Weights(
        input_norm=np.stack([_as_array(layer.input_layernorm.weight) for layer in layers]),
        qkv=qkv,
        qkv_bias=np.stack([np.zeros(shape, np.float32) if b is None else b.reshape(shape) for b in biases]),
        out=np.stack([pack_columns(_as_array(layer.self_attn.o_proj.weight)) for layer in layers]),
        post_norm=np.stack([_as_array(layer.post_attention_layernorm.weight) for layer in layers]),
        gate=np.stack([pack_columns(_as_array(layer.mlp.gate_proj.weight)) for layer in layers]),
        up=np.stack([pack_columns(_as_array(layer.mlp.up_proj.weight)) for layer in layers]),
        down=np.stack([pack_columns(_as_array(layer.mlp.down_proj.weight)) for layer in layers]),
        norm=_as_array(model.norm.weight),
    )


def _as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
