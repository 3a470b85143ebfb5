"""A trained model as what differs from its base: a few megabytes for a fusion, everything for a full training.

`publish_variant` compares a training run's model folder with its base bit by bit and writes the tensors that differ,
with the configuration, as one version of a published model (published.py). `load_variant` puts a version on a base
that is in memory: components without a tensor of their own ARE the base's modules, tensors that did not change share
the base's memory, and what comes out equals the whole model. No pickle. It refuses to know engines and servers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.checkpoint import Loaded, LoadOptions, load_checkpoint
from model_core.config import DualVisionConfig
from model_core.errors import CheckpointError, CheckpointMismatchError, ConfigError
from model_core.manifest import verify_folder, write_folder
from model_core.model import DualVisionModel
from model_core.probe import check_model
from model_core.published import RECORD_NAME, VariantRecord, is_disk_full

SHARD_BYTES = 4 * 2**30
#: Parts of the model that are shared whole, each with the modules that make it up. Tied weights stay in one part.
_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "fusion": ("model.fusion",),
    "qwen_vision": ("model.visual",),
    "llm": ("model.language_model", "lm_head"),
}
#: What of a configuration may be another one than the base's; everything else must be equal.
_FREE_KEYS = frozenset({
    "fusion", "common_dim", "dropout", "static_weights", "qwen_model_name", "dinov2_model_name", "architectures",
    "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation",
})  # fmt: skip


def publish_variant(
    base: Loaded, run: Path, out: Path, *, base_name: str, created_unix: int
) -> tuple[VariantRecord, Path]:
    """Add the model folder `run` to the published model `out` as a version that passed its load test, not promoted.

    Args:
        base: with the fingerprint of its folder, in the precision of that folder.
        base_name: the base's id, for the record.
    Returns:
        the record, and the version's folder. The same weights give the same version.
    Raises:
        CheckpointError: the run's folder is damaged, of another architecture or tokenizer, or computes no numbers;
            its code is then `checkpoint_corrupt`, and nothing was published.
    """
    if not base.fingerprint:
        raise ConfigError(
            "the base's files can't be found, so nobody could tell later whether it is the same", value=base_name,
            allowed="a folder, a hub id or a pair that was loaded from this disk",
            fix="Save it once with DualVisionEncoder.save_pretrained",
        )  # fmt: skip
    own, record = _as_corrupt(lambda: _compare(base, run, base_name, created_unix))
    target = out / record.fingerprint
    config = (run / "config.json").read_text()

    def write(folder: Path) -> None:
        for index, shard in enumerate(_shards(own), 1):
            save_file(shard, folder / f"variant-{index:05d}.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(config)
        (folder / RECORD_NAME).write_text(record.to_json())
        check_model(_assemble(folder, base, record))

    if not target.is_dir() or not _is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        _as_corrupt(lambda: write_folder(target, write, extra={"base_fingerprint": base.fingerprint}))
    return record, target


def _compare(base: Loaded, run: Path, base_name: str, created_unix: int) -> tuple[dict[str, Tensor], VariantRecord]:
    # Nothing but the tensors that differ outlives this: the whole run may be gigabytes.
    trained = load_checkpoint(run, LoadOptions("cpu", base.model.dtype))
    _check_format(base, trained, run)
    own = differing_tensors(base.model, trained.model)
    return own, _record(base, trained, own, base_name, created_unix)


def load_variant(folder: Path, base: Loaded) -> Loaded:
    """The whole model of a version, load-tested, sharing the base's memory where nothing changed.

    The base stays as it is, and may be at work in another thread.
    Raises:
        CheckpointError: with the code `checkpoint_corrupt`, for whatever is wrong, another base included.
    """

    def load() -> Loaded:
        if verify_folder(folder, deep=True) is None:
            raise CheckpointError("the version has no manifest", value=folder.name, fix="Publish the model again")
        record = VariantRecord.read(folder)
        if record.base_fingerprint != base.fingerprint:
            raise CheckpointError(
                "the version was made from another base", value=record.base_fingerprint, allowed=base.fingerprint,
                fix="Serve the base that it was trained from",
            )  # fmt: skip
        loaded = _assemble(folder, base, record)
        check_model(loaded)
        return loaded

    return _as_corrupt(load)


def differing_tensors(base: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """By their names in the model: tensors that the base lacks or holds with other bits. Tied ones come once."""
    known = base.state_dict()
    found = trained.state_dict()
    if trained.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    own = {
        name: tensor.detach().contiguous()
        for name, tensor in found.items()
        if name not in known or not _is_same(known[name], tensor)
    }
    bad = [name for name, tensor in own.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            "the weights are not all finite", value=f"{bad[0]}; {len(bad)} in all", allowed="finite numbers",
            fix="Take an earlier checkpoint",
        )  # fmt: skip
    return own


def own_bytes(model: nn.Module, base: nn.Module) -> int:
    """Memory that the model's tensors take beside the base's; a storage counts once."""
    shared = {_storage(tensor).data_ptr() for tensor in _tensors(base)}
    own = {_storage(tensor).data_ptr(): _storage(tensor).nbytes() for tensor in _tensors(model)}
    return sum(size for pointer, size in own.items() if pointer not in shared)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _is_same(a: Tensor, b: Tensor) -> bool:
    """To the bit: -0.0 is not 0.0, and a NaN is itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.detach().cpu().contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def _record(
    base: Loaded, trained: Loaded, own: Mapping[str, Tensor], base_name: str, created_unix: int
) -> VariantRecord:
    model = trained.model
    digest = hashlib.sha256(base.fingerprint.encode())
    digest.update(json.dumps(_comparable(model.config, free=False), sort_keys=True, default=str).encode())
    for name, tensor in sorted(own.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    components = _components(model)
    return VariantRecord(
        base=base_name,
        base_fingerprint=base.fingerprint,
        fingerprint=digest.hexdigest()[:12],
        created_unix=created_unix,
        num_tensors=len(own),
        num_bytes=sum(tensor.nbytes for tensor in own.values()),
        components=tuple(n for n, paths in components.items() if any(_is_in(name, paths) for name in own)),
        fusion=model.config.fusion,
        fusion_trained=model.fusion.is_trained,
        encoders=tuple(model.model.encoders),
        num_parameters=sum(p.numel() for p in model.parameters()),
        max_context_tokens=model.config.text_config.max_position_embeddings,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _components(model: DualVisionModel) -> dict[str, tuple[str, ...]]:
    second = model.model.second_name
    return {**_COMPONENTS, second: (f"model.{second}",)}


def _is_in(name: str, paths: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{path}." for path in paths))


def _shards(own: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in own.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.cpu()
        size += tensor.nbytes
    return shards


def _assemble(folder: Path, base: Loaded, record: VariantRecord) -> Loaded:
    config = DualVisionConfig.from_pretrained(folder)
    _check_architecture(base.model.config, config)
    config._attn_implementation = base.model.config._attn_implementation
    model = _empty_model(config, base.model.dtype)
    own = _read_own(folder, model, base.model, record)
    for paths in _components(model).values():
        if any(_is_in(name, paths) for name in own):
            for path in paths:
                _fill(model, base.model, path, own)
        else:
            for path in paths:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, base.model.get_submodule(path))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.generation_config = base.model.generation_config
    processor = base.processor
    if processor.tokens_per_cell != model.fusion.tokens_per_cell:
        processor = type(processor)(processor.image_processor, processor.tokenizer)
        processor.tokens_per_cell = model.fusion.tokens_per_cell
    return Loaded(model.eval(), processor, record.fingerprint, record.created_unix)


def _empty_model(config: DualVisionConfig, dtype: torch.dtype) -> DualVisionModel:
    """On `meta`, for a model of this type. A server may be answering in another thread meanwhile."""
    configs = [config, *(getattr(config, key) for key in config.sub_configs)]
    # transformers builds a part under its own type by changing torch's default for all threads: float32 is no change.
    for one in configs:
        one.dtype = torch.float32
    with torch.device("meta"):
        model = DualVisionModel(config)
    for one in configs:
        one.dtype = dtype
    return model


def _read_own(folder: Path, model: nn.Module, base: nn.Module, record: VariantRecord) -> dict[str, Tensor]:
    """Tensors of the folder on the base's device, in the types that the base has. The model is still on `meta`."""
    expected, known = model.state_dict(), base.state_dict()
    own: dict[str, Tensor] = {}
    for file in sorted(folder.glob("variant-*.safetensors")):
        for name, tensor in load_file(file).items():
            if name not in expected or tuple(tensor.shape) != tuple(expected[name].shape):
                raise CheckpointMismatchError(
                    "a tensor does not fit this architecture", value=f"{name}, {tuple(tensor.shape)}",
                    allowed=str(tuple(expected[name].shape)) if name in expected else "the model's own names",
                    fix="Publish the model again",
                )  # fmt: skip
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                fix = "Publish the model again, from an earlier checkpoint"
                raise CheckpointError("the weights are not all finite", value=name, allowed="finite numbers", fix=fix)
            dtype = known[name].dtype if name in known else _dtype_for(tensor, base.dtype, name)
            # A copy: what is loaded must not change with a file.
            own[name] = tensor.to(base.device, dtype, copy=True)
    if len(own) != record.num_tensors:
        allowed, fix = f"{record.num_tensors} tensors", "Publish the model again"
        raise CheckpointError("tensors are missing", value=f"{len(own)}", allowed=allowed, fix=fix)
    return own


def _dtype_for(tensor: Tensor, dtype: torch.dtype, name: str) -> torch.dtype:
    return dtype if tensor.is_floating_point() and ".means." not in name else tensor.dtype


def _fill(model: nn.Module, base: nn.Module, path: str, own: Mapping[str, Tensor]) -> None:
    """Give a component that is still on `meta` its tensors: its own, and for the rest the base's storage."""
    module, known = model.get_submodule(path), base.state_dict()
    wanted = {name: f"{path}.{name}" for name in module.state_dict()}
    if path == "lm_head" and model.config.tie_word_embeddings:
        return
    missing = [full for full in wanted.values() if full not in own and full not in known]
    if missing:
        raise CheckpointMismatchError(
            "the weights don't fill this architecture", value=f"{missing[0]} missing; {len(missing)} in all",
            allowed="every tensor that the config names, here or in the base", fix="Publish the model again",
        )  # fmt: skip
    module.load_state_dict({n: own[full] if full in own else known[full] for n, full in wanted.items()}, assign=True)
    try:
        buffers = dict(base.get_submodule(path).named_buffers())
    except AttributeError:
        buffers = {}
    for name, buffer in module.named_buffers():
        if buffer.is_meta:  # not in any file: tables that the configuration makes
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._buffers[leaf] = buffers[name]


def _comparable(config: Any, *, free: bool) -> dict[str, Any]:
    """A configuration without what is another on every machine; `free`: also without what a variant may change."""
    unstable = {"transformers_version", "_name_or_path", "_attn_implementation", "architectures", "auto_map"}
    left_out = _FREE_KEYS if free else unstable | {"dtype", "torch_dtype"}
    return {
        key: {k: v for k, v in value.items() if k not in _FREE_KEYS} if isinstance(value, dict) else value
        for key, value in config.to_dict().items()
        if key not in left_out
    }


def _check_architecture(base: Any, found: Any) -> None:
    before, now = _comparable(base, free=True), _comparable(found, free=True)
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if other:
        raise CheckpointMismatchError(
            "this is another architecture than the base's", value=", ".join(other[:4]),
            allowed="the base's configuration, but for the fusion", fix="Use the base that it was trained from",
        )  # fmt: skip


def _check_format(base: Loaded, trained: Loaded, run: Path) -> None:
    """A variant is served with the base's tokenizer and preprocessing, so they must be the same."""
    _check_architecture(base.model.config, trained.model.config)
    ours, theirs = base.processor, trained.processor
    same = {
        "preprocessor_config.json": ours.patch_spec == theirs.patch_spec,
        "tokenizer.json": ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab(),
        "chat_template.jinja": ours.tokenizer.chat_template == theirs.tokenizer.chat_template,
    }
    wrong = [name for name, is_same in same.items() if not is_same]
    if wrong:
        raise CheckpointMismatchError(
            "the run reads its input in another way than the base", value=f"{run.name}: {', '.join(wrong)}",
            allowed="the base's own tokenizer and preprocessing", fix="Use the base that it was trained from",
        )  # fmt: skip


def _is_whole(folder: Path) -> bool:
    try:
        return verify_folder(folder, deep=True) is not None
    except CheckpointError:
        return False


def _as_corrupt(work: Callable[[], Any]) -> Any:
    """Whatever is wrong with a checkpoint has one name here, `checkpoint_corrupt`; the words stay."""
    try:
        return work()
    except CheckpointError as error:
        if type(error) is CheckpointError:
            raise
        raise CheckpointError(
            error.what, value=error.value, allowed=error.allowed, fix=error.fix, param=error.param
        ) from error
    except (SafetensorError, StrictDataclassError, KeyError, ValueError, TypeError, RuntimeError, OSError) as error:
        if isinstance(error, torch.OutOfMemoryError) or is_disk_full(error):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"the model can't be read or run ({why})", fix="Train or copy it again") from error
