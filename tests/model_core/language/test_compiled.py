"""Compiled loops give what the modules give, row by row, stand down where they can't, and cost nothing too early."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numba.core.errors import NumbaError
from torch import Tensor, nn

from model_core.language import compiled
from model_core.language.compiled import KERNELS, KernelLoader, find_fault
from model_core.language.decoder import Decoder
from model_core.language.kv_cache import RowStore, Work
from model_core.linear import PackedProduct, PlainProduct, can_use_onednn
from tests.model_core import tiny
from tests.model_core.language.test_decoder import random_sequence

LENGTHS = [1, 3, 4, 17, 40, 130, 300]


def uneven(model: nn.Module) -> nn.Module:
    """Biases and norms that are not what they are born as."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def build(model: nn.Module, kernels: KernelLoader | None = KERNELS) -> Decoder:
    return Decoder(model.model.language_model, model.lm_head, kernels=kernels)


class Scene:
    """Sequences that were prefilled by torch, each with one more token to decode."""

    def __init__(self, model: nn.Module, lengths: list[int]) -> None:
        rng, self.plain = random.Random(len(lengths)), build(model, None)
        self.store, self.work, ids, positions = RowStore(self.plain.cache_shape), [], [], []
        for number, length in enumerate(lengths):
            prompt, places, delta = random_sequence(rng, length)
            self.store.open(number)
            work = [Work(number, 0, len(prompt))]
            self.plain.forward(self.plain.embed(torch.tensor(prompt)), places, self.store.begin(work))
            self.work.append(Work(number, len(prompt), 1))
            ids.append(rng.randrange(10, 200))
            positions.append(len(prompt) + delta)
        self.embeds, self.positions = self.plain.embed(torch.tensor(ids)), torch.tensor(positions).expand(3, -1)

    def by_torch(self) -> tuple[Tensor, Tensor]:
        hidden = self.plain.forward(self.embeds, self.positions, self.store.begin(self.work))
        return hidden, self.store._store.clone()

    def by_loops(self, decoder: Decoder, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        layers = decoder.compiled_layers(len(self.work[rows]))
        assert layers is not None
        hidden = layers.forward(self.embeds[rows], self.positions[:, rows], self.store.dense(self.work[rows]))
        return hidden, self.store._store.clone()


@pytest.mark.parametrize("lengths", [[1], [17], LENGTHS, LENGTHS * 8])
@torch.no_grad()
def test_loops_equal_torch(kernel: object, lengths: list[int]) -> None:
    model = uneven(tiny.qwen_model())
    scene, decoder = Scene(model, lengths), build(model)
    hidden, cache = scene.by_torch()
    scene.store._store[:, :, torch.arange(len(lengths)), :, [w.start for w in scene.work]] = torch.nan
    found, written = scene.by_loops(decoder)
    assert torch.allclose(found, hidden, atol=2e-5)
    assert torch.allclose(written, cache, atol=2e-5), "keys and values of the new tokens"
    assert torch.allclose(decoder.logits(found), scene.plain.logits(hidden), atol=2e-5)
    assert decoder._compiled_head is not None


@torch.no_grad()
def test_a_row_is_the_same_to_the_last_bit_in_any_company_and_by_any_threads(
    kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = uneven(tiny.qwen_model())
    scene, decoder = Scene(model, LENGTHS), build(model)
    together, _ = scene.by_loops(decoder)
    logits = decoder.logits(together)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(scene.by_loops(decoder)[0], together)
    assert torch.equal(decoder.logits(together), logits)
    for number in range(len(LENGTHS)):
        alone, _ = scene.by_loops(decoder, slice(number, number + 1))
        assert torch.equal(alone[0], together[number])
        assert torch.equal(decoder.logits(alone)[0], logits[number])


@torch.no_grad()
def test_the_last_token_of_an_image_has_three_positions(kernel: object) -> None:
    model = tiny.qwen_model()
    scene, decoder = Scene(model, [5, 9]), build(model)
    scene.positions = torch.tensor([[7, 8], [9, 8], [11, 8]])
    hidden, _ = scene.by_torch()
    assert torch.allclose(scene.by_loops(decoder)[0], hidden, atol=2e-5)


@torch.no_grad()
def test_positions_beyond_the_table_make_it_longer(kernel: object) -> None:
    model = tiny.qwen_model()
    scene, decoder = Scene(model, [5, 9]), build(model)
    for far in (6, 1500, 1023, 1024):
        scene.positions = torch.full((3, 2), far)
        assert torch.allclose(scene.by_loops(decoder)[0], scene.by_torch()[0], atol=2e-5), far


@torch.no_grad()
def test_what_is_not_a_number_stays_so_and_stays_alone(kernel: object) -> None:
    model = tiny.qwen_model()
    scene, decoder = Scene(model, [5, 9, 3]), build(model)
    whole, _ = scene.by_loops(decoder)
    scene.embeds[1] = torch.nan
    found, _ = scene.by_loops(decoder)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])


def negate(model: nn.Module) -> None:
    model.model.language_model.layers[1].mlp.up_proj.weight.mul_(-1)


def renorm(model: nn.Module) -> None:
    model.model.language_model.norm.weight.mul_(3)


def new_norm(model: nn.Module) -> None:
    model.model.language_model.norm.weight = nn.Parameter(torch.rand(64))


def head(model: nn.Module) -> None:
    model.lm_head.weight.mul_(-2)


@pytest.mark.parametrize("change", [negate, renorm, new_norm, head])
@torch.no_grad()
def test_changed_weights_are_noticed(kernel: object, change: Callable[[nn.Module], None]) -> None:
    model = tiny.qwen_model()
    scene, decoder = Scene(model, [5, 9]), build(model)
    before = decoder.logits(scene.by_loops(decoder)[0])
    change(model)
    after = decoder.logits(scene.by_loops(decoder)[0])
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, scene.plain.logits(scene.by_torch()[0]), atol=5e-5)


@pytest.mark.parametrize("where", ["layers.0.mlp.up_proj", "norm", "rotary_emb"])
@torch.no_grad()
def test_a_hook_makes_the_loops_stand_down(kernel: object, where: str) -> None:
    model = tiny.qwen_model()
    decoder = build(model)
    assert decoder.compiled_layers(1) is not None
    handle = model.model.language_model.get_submodule(where).register_forward_hook(lambda *args: None)
    assert decoder.compiled_layers(1) is None
    if "." not in where:
        handle.remove()
        assert decoder.compiled_layers(1) is not None


@torch.no_grad()
def test_another_type_makes_the_loops_stand_down(kernel: object) -> None:
    model = tiny.qwen_model()
    decoder = build(model)
    assert decoder.compiled_layers(1) is not None
    model.to(torch.float64)
    assert decoder.compiled_layers(1) is None
    assert decoder.logits(torch.zeros(1, 64, dtype=torch.float64)).dtype == torch.float32
    model.to(torch.float32)
    assert decoder.compiled_layers(1) is not None


def test_what_the_loops_take_of_a_step() -> None:
    single, most = Work("s", 900, 1), compiled.MAX_ROWS
    short, behind = Work("p", 0, 30), Work("p", compiled.MAX_PROMPT - 30, 30)
    long = Work("l", compiled.MAX_PROMPT - 29, 30)
    assert compiled.count_fitting([]) == (0, 0)
    assert compiled.count_fitting([single, short, behind]) == (3, 61)
    assert compiled.count_fitting([single, short, long, short]) == (2, 31), "a long prompt, and what is behind it"
    assert compiled.count_fitting([single] * most) == (most, most)
    assert compiled.count_fitting([single] * most + [short]) == (most, most)
    assert compiled.count_fitting([single] * (most + 1)) == (0, 0), "single tokens go together"


def test_a_step_of_many_tokens_is_left_to_torch(kernel: object) -> None:
    decoder = build(tiny.qwen_model())
    assert decoder.compiled_layers(compiled.MAX_ROWS) is not None
    assert decoder.compiled_layers(compiled.MAX_ROWS + 1) is None


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_prompts_through_the_loops_equal_torchs(kernel: object, threads: int) -> None:
    """Whole prompts, the rest of one, and single tokens in one step; then to the bit what they are alone."""
    model, rng, before = uneven(tiny.qwen_model()), random.Random(4), torch.get_num_threads()
    decoder, plain = build(model), build(model, None)
    told = [random_sequence(rng, length) for length in (40, 3, 70)]
    pieces = [(1, 2, 3), (0, 0, 40), (2, 5, 70)]  # which, from, to

    def run(pieces: list[tuple[int, int, int]], *, by_loops: bool) -> tuple[Tensor, Tensor]:
        store = RowStore(decoder.cache_shape)
        for which, start, _ in pieces:
            store.open(which)
            if start:
                ids, places, _ = told[which]
                attend = store.begin([Work(which, 0, start)])
                plain.forward(plain.embed(torch.tensor(ids[:start])), places[:, :start], attend)
        work = [Work(which, start, end - start) for which, start, end in pieces]
        embeds = plain.embed(torch.tensor([i for which, start, end in pieces for i in told[which][0][start:end]]))
        positions = torch.cat([told[which][1][:, start:end] for which, start, end in pieces], dim=1)
        if by_loops:
            hidden = decoder.compiled_layers(len(embeds)).forward(embeds, positions, store.dense(work))
        else:
            hidden = plain.forward(embeds, positions, store.begin(work))
        return hidden, store._store.clone()

    try:
        torch.set_num_threads(threads)
        hidden, cache = run(pieces, by_loops=True)
        expected, expected_cache = run(pieces, by_loops=False)
        assert torch.allclose(hidden, expected, atol=5e-5)
        assert torch.allclose(cache, expected_cache, atol=5e-5)
        at = 0
        for piece in pieces:
            length = piece[2] - piece[1]
            assert torch.equal(run([piece], by_loops=True)[0], hidden[at : at + length])
            at += length
    finally:
        torch.set_num_threads(before)


def test_the_copy_for_the_loops_is_the_only_copy(kernel: object) -> None:
    model = tiny.qwen_model()
    decoder, plain = build(model), build(model, None)
    assert isinstance(decoder.joined()._layers[0].qkv, PlainProduct)
    layers = sum(p.nbytes for p in model.model.language_model.layers.parameters())
    assert decoder.copied_bytes == layers + model.lm_head.weight.nbytes
    if can_use_onednn(model.lm_head.weight):
        assert isinstance(plain.joined()._layers[0].qkv, PackedProduct)


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("bfloat16", lambda model: model.to(torch.bfloat16)),
        ("not a plain product", lambda model: setattr(model, "lm_head", nn.Linear(64, 300))),
        ("rotary positions", lambda model: model.config.text_config.rope_parameters.update(rope_type="dynamic")),
        ("multiples of 32", lambda model: setattr(model.config.text_config, "intermediate_size", 100)),
    ],
)
def test_what_the_loops_can_not_stand_for_is_said(fault: str, change: Callable[[nn.Module], object]) -> None:
    model = tiny.qwen_model()
    assert find_fault(model.model.language_model, model.lm_head) == ""
    change(model)
    assert fault in find_fault(model.model.language_model, model.lm_head)


def test_a_large_model_keeps_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.qwen_model()
    monkeypatch.setattr(compiled, "COPIED_BYTES", 1000)
    assert "copies of the weights" in find_fault(model.model.language_model, model.lm_head)


class Child:
    """A compiler that ends when it is told to."""

    returncode: int | None = None

    def __init__(self, told: bytes = b"") -> None:
        self.told = told

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self) -> tuple[bytes, bytes]:
        return b"", self.told


def test_nothing_is_compiled_before_a_process_has_decoded_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    started, child = [], Child()
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args) or child)
    loader = KernelLoader(patience=4)
    assert [loader.get() for _ in range(3)] == [None] * 3
    assert not started
    assert loader.get() is None
    assert len(started) == 1
    assert [loader.get() for _ in range(5)] == [None] * 5, "not before it has ended"
    assert len(started) == 1
    child.returncode = 0
    assert loader.get() is not None
    loader._leave()


@pytest.mark.parametrize(
    ("told", "reason"), [(b"Traceback\nOSError: no room\n", "OSError: no room"), (b"", "ended with 3")]
)
@torch.no_grad()
def test_without_a_compiler_torch_goes_on_with_its_own_copies(
    told: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(told)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: child)
    loader, model = KernelLoader(patience=1), tiny.qwen_model()
    decoder = build(model, loader)
    assert decoder.compiled_layers(1) is None
    child.returncode = 3
    assert decoder.compiled_layers(1) is None
    assert reason in loader.refusal
    if can_use_onednn(model.lm_head.weight):
        assert isinstance(decoder.joined()._layers[0].qkv, PackedProduct)
    assert torch.allclose(decoder.logits(torch.ones(2, 64)), model.lm_head(torch.ones(2, 64)), atol=1e-5)


def test_a_compiler_that_does_not_start_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    loader = KernelLoader()
    assert loader.wait() is None
    assert "No such file" in loader.refusal


@pytest.mark.parametrize("kind", [NotImplementedError, OSError, NumbaError])
def test_what_fails_to_load_is_a_refusal(
    kind: type[Exception], kernel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise kind("no such processor")

    child = Child()
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: child)
    monkeypatch.setattr(kernel, "load", fail)
    loader = KernelLoader()
    loader.begin()
    child.returncode = 0
    assert loader.get() is None
    assert loader.refusal.endswith("Error: no such processor")


def test_the_compiler_takes_modules_from_where_this_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numba.py").write_text("raise SystemExit('a file of the working directory')")
    monkeypatch.chdir(tmp_path)
    loader = KernelLoader()
    assert loader.wait() is not None, loader.refusal


def test_without_numba_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    loader = KernelLoader(patience=1)
    assert loader.refusal == "numba is not installed"
    assert loader.get() is None
    assert loader.wait() is None


def test_loading_leaves_the_number_of_threads_alone() -> None:
    code = """
import torch
torch.set_num_threads(1)
from model_core.language.compiled import KERNELS
assert KERNELS.wait() is not None, KERNELS.refusal
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    told = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_importing_the_engine_does_not_import_numba() -> None:
    code = "import sys, model_core.engine.build; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
