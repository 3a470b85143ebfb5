"""A model and its processor as one folder, and back; or a new model from two public checkpoints.

One folder: config, sharded safetensors, tokenizer, preprocessor settings, manifest written last. No
pickle. Both ways of loading give the same `Loaded`, and everything else goes through them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.utils import logging as transformers_logging

from model_core.config import DualVisionConfig
from model_core.encoders.segments import install_segment_attention
from model_core.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    ConfigError,
    HubUnreachableError,
)
from model_core.fingerprint import of_files, of_manifest, of_parts
from model_core.fusion.base import FusionStrategy
from model_core.manifest import verify_folder, write_folder
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor

MAX_SHARD_SIZE = "4GB"
SECOND_ENCODERS = ("dinov2", "dinov2_with_registers")
#: Of a pair that is combined: what its fresh fusion is made of.
FUSION_SETTINGS = ("encoder", "fusion", "common_dim", "static_weights", "dinov2_max_patches")

_BIRTH_SEED = 0
_SHARD_SIZE = re.compile(r"[1-9][0-9]*(KB|MB|GB|TB)")

#: Lets transformers' Auto classes (and engines built on them) find our classes in a saved folder.
_SHIM = '''"""Names this folder's classes for transformers' Auto classes. Needs `pip install dual-vision-encoder`."""

from model_core.config import DualVisionConfig
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor

__all__ = ["DualVisionConfig", "DualVisionModel", "DualVisionProcessor"]
'''
_AUTO_MAP = {
    "AutoConfig": "modeling_dual_vision.DualVisionConfig",
    "AutoModel": "modeling_dual_vision.DualVisionModel",
    "AutoModelForImageTextToText": "modeling_dual_vision.DualVisionModel",
    "AutoProcessor": "modeling_dual_vision.DualVisionProcessor",
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """fingerprint: of the files that it was read from (fingerprint.py). created_unix: of a folder with manifest."""

    model: DualVisionModel
    processor: DualVisionProcessor
    fingerprint: str = ""
    created_unix: int = 0

    @property
    def eos_ids(self) -> frozenset[int]:
        """Where generation ends: the generation config's ids, and always the end of a turn."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured] if configured is not None else []
        return frozenset([*ids, self.processor.special.end_of_turn])


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """device: "auto", "cpu", "cuda", "cuda:1", or another accelerator that this torch has; dtype None is the
    checkpoint's own; use_flash_attention None uses it where it is installed and the device is CUDA."""

    device: str = "auto"
    dtype: torch.dtype | str | None = None
    use_flash_attention: bool | None = None

    def resolve_device(self) -> torch.device:
        """Raises ConfigError: no such device, or none in this machine."""
        if self.device in ("auto", "", None):
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fix = "Leave the device out to have one chosen"
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            allowed = "auto, cpu, cuda, cuda:N"
            raise ConfigError("unknown device", value=self.device, allowed=allowed, fix=fix, param="device") from error
        present = _present_devices()
        if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in present:
            what = f"there is no such {'CUDA' if device.type == 'cuda' else device.type} device here"
            raise ConfigError(what, value=self.device, allowed=", ".join(["auto", *present]), fix=fix, param="device")
        return device

    def attention(self, dtype: torch.dtype) -> str:
        """transformers' name of the attention to use. The flash kernels take 16-bit numbers only."""
        from transformers.utils import is_flash_attn_2_available  # noqa: PLC0415  probes the CUDA driver

        on_cuda = self.resolve_device().type == "cuda"
        available = on_cuda and is_flash_attn_2_available() and dtype in (torch.float16, torch.bfloat16)
        if self.use_flash_attention and not available:
            raise ConfigError(
                "flash attention was asked for and can't be used",
                value=f"{self.resolve_device().type}, {dtype}, flash-attn installed: {is_flash_attn_2_available()}",
                allowed="a CUDA device, bfloat16 or float16, and flash-attn installed",
                fix="Install the extra 'cuda', or leave use_flash_attention out",
            )
        return "flash_attention_2" if available and self.use_flash_attention is not False else "sdpa"

    def kwargs(self, config: Any) -> dict[str, Any]:
        """What `from_pretrained` is told; `config` is the checkpoint's."""
        dtype = self.dtype if self.dtype not in (None, "auto") else getattr(config, "dtype", None) or torch.float32
        if isinstance(dtype, str):
            found = getattr(torch, dtype, None)
            if found not in (torch.float32, torch.bfloat16, torch.float16):
                fix, allowed = "Leave dtype out for the checkpoint's own", "float32, bfloat16, float16"
                raise ConfigError("unknown dtype", value=dtype, allowed=allowed, fix=fix, param="dtype")
            dtype = found
        return {"dtype": dtype, "attn_implementation": self.attention(dtype)}


def _present_devices() -> list[str]:
    """Names of what computes here; torch can name many kinds of devices that it was built without."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if torch.cuda.is_available():
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    elif kind is not None and kind.type != "cuda":
        found = [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
    else:
        found = []
    return ["cpu", *found]


def quiet_unless_terminal() -> None:
    """transformers' loading bars belong on a terminal, not in a log or a pipe."""
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' bars, for whoever shows progress of its own or none."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def save_checkpoint(
    model: DualVisionModel, processor: DualVisionProcessor, folder: str | Path, extra: Mapping[str, Any] | None = None,
    write_more: Callable[[Path], None] | None = None, *, state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str | None = None,
) -> None:  # fmt: skip
    """Write the folder whole or not at all.

    Args:
        extra: goes into the manifest; write_more: adds files before the manifest is made.
        state_dict: weights to write instead of the model's own (its adapters folded in, or left out).
        max_shard_size: of one file of weights, in bytes or as "500MB"; None is MAX_SHARD_SIZE.
    Raises:
        ConfigError: a size that can't be read.
    """
    size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
    is_count = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not is_count and not (isinstance(size, str) and _SHARD_SIZE.fullmatch(size)):
        raise ConfigError(
            "max_shard_size can't be read", value=size, allowed='bytes above 0, or "500MB" (KB, MB, GB, TB)',
            fix="Leave it out for " + MAX_SHARD_SIZE, param="max_shard_size",
        )  # fmt: skip

    def write(target: Path) -> None:
        model.save_pretrained(target, max_shard_size=size, state_dict=state_dict)
        processor.save_pretrained(target)
        (target / "modeling_dual_vision.py").write_text(_SHIM)
        config = json.loads((target / "config.json").read_text())
        config["auto_map"] = _AUTO_MAP
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if write_more is not None:
            write_more(target)

    write_folder(Path(folder), write, extra=dict(extra or {}))


def load_checkpoint(name: str | Path, options: LoadOptions = LoadOptions(), **hub: Any) -> Loaded:
    """A saved dual checkpoint, folder or hub id.

    Raises:
        CheckpointIncompleteError: no such folder, or a file is missing or cut.
        CheckpointMismatchError: another architecture.
        HubUnreachableError: a hub id that is neither cached nor reachable.
    """
    config = _read_dual_config(name, **hub)
    manifest = verify_folder(Path(name), deep=False) if Path(name).is_dir() else None
    model = _from_pretrained(DualVisionModel, name, "model", config=config, **options.kwargs(config), **hub)
    processor = _read_processor(name, config, "model", **hub)
    fingerprint = of_files(name, **hub) if manifest is None else of_manifest(manifest)
    created = int((Path(name) / "config.json").stat().st_mtime) if manifest is not None else 0
    return Loaded(model.to(options.resolve_device()).eval(), processor, fingerprint, created)


def combine_checkpoints(
    qwen_name: str | Path, dinov2_name: str | Path, options: LoadOptions = LoadOptions(), **fusion_settings: Any
) -> Loaded:
    """A fresh dual model from Qwen2.5-VL's and DINOv2's own checkpoints, hub ids or folders.

    Args:
        fusion_settings: fusion, common_dim, dropout, encoder, static_weights, dinov2_max_patches.
    Raises:
        ConfigError: a setting that is none of these, or out of its range. CheckpointError: as `load_checkpoint`.
    """
    known = (*FUSION_SETTINGS, "dropout")
    if unknown := sorted(set(fusion_settings) - set(known)):  # transformers' configuration would keep it unread
        raise ConfigError("unknown setting", value=", ".join(unknown), allowed=", ".join(known), fix="Leave it out")
    qwen_config = _read_config(qwen_name, "qwen_model_name")
    if not isinstance(qwen_config, Qwen2_5_VLConfig) or isinstance(qwen_config, DualVisionConfig):
        raise CheckpointMismatchError(
            "qwen_model_name is not a Qwen2.5-VL checkpoint",
            value=f"{qwen_name}: {qwen_config.model_type}",
            allowed="qwen2_5_vl, such as Qwen/Qwen2.5-VL-7B-Instruct",
            fix="Name such a checkpoint; a saved dual model is loaded by --model or from_pretrained",
            param="qwen_model_name",
        )
    dinov2_config = _read_config(dinov2_name, "dinov2_model_name")
    if fusion_settings.get("encoder", "dinov2") == "dinov2" and dinov2_config.model_type not in SECOND_ENCODERS:
        raise CheckpointMismatchError(
            "dinov2_model_name is not a DINOv2 checkpoint",
            value=f"{dinov2_name}: {dinov2_config.model_type}",
            allowed=", ".join(SECOND_ENCODERS) + ", such as facebook/dinov2-with-registers-base",
            fix="Name such a checkpoint, or bring an encoder of your own: encoder='package.module:Class'",
            param="dinov2_model_name",
        )
    names = {"qwen_model_name": str(qwen_name), "dinov2_model_name": str(dinov2_name)}
    config = DualVisionConfig.from_parts(qwen_config, dinov2_config, **names, **fusion_settings)
    with torch.device("meta"):  # every setting is checked here, before gigabytes are read
        DualVisionModel(config)
    kwargs = options.kwargs(qwen_config)
    qwen = _from_pretrained(Qwen2_5_VLForConditionalGeneration, qwen_name, "qwen_model_name", **kwargs)
    kwargs["dtype"] = qwen.dtype
    second = _from_pretrained(AutoModel, dinov2_name, "dinov2_model_name", **kwargs)
    model = assemble(config, qwen, second).to(options.resolve_device()).eval()
    processor = _read_processor(qwen_name, config, "qwen_model_name")
    parts = (of_files(qwen_name), of_files(dinov2_name))
    return Loaded(model, processor, of_parts(parts, {key: getattr(config, key) for key in FUSION_SETTINGS}))


def assemble(
    config: DualVisionConfig, qwen: Qwen2_5_VLForConditionalGeneration, second: torch.nn.Module
) -> DualVisionModel:
    """Put loaded parts together without copying a weight; only fusion is made new."""
    config.dtype = qwen.dtype
    config._attn_implementation = qwen.config._attn_implementation  # transformers hands it to the parts
    with torch.device("meta"):
        model = DualVisionModel(config)
    backbone = model.model
    backbone.language_model, backbone.visual = qwen.model.language_model, qwen.model.visual
    install_segment_attention(backbone.visual)
    setattr(backbone, backbone.second_name, second)
    backbone.fusion = _born(backbone.fusion, qwen.device).to(qwen.dtype)
    model.lm_head = qwen.lm_head
    model.generation_config = qwen.generation_config or GenerationConfig.from_model_config(config)
    model.tie_weights()
    return model


def _born(fusion: FusionStrategy, device: torch.device) -> FusionStrategy:
    """New weights, the same in every process and on every device.

    A pair of names has no folder that would hold them: a server, a trainer and whoever publishes what it trained must
    find one and the same base, and two runs of one recipe the same beginning.
    """
    fusion = fusion.to_empty(device=device if device.type == "meta" else "cpu").float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_BIRTH_SEED)
        fusion.reset_parameters()
    return fusion.to(device)


def read_model_config(name: str | Path | tuple[str, str], **fusion_settings: Any) -> DualVisionConfig:
    """The configuration alone, no weight: of a dual checkpoint, or of the pair of names that would be combined.

    Raises:
        CheckpointError, ModelNotFoundError: as loading it would.
    """
    if isinstance(name, tuple):
        qwen, second = _read_config(name[0], "qwen_model_name"), _read_config(name[1], "dinov2_model_name")
        config = DualVisionConfig.from_parts(qwen, second, **fusion_settings)
        config.dtype = getattr(qwen, "dtype", None)
        return config
    return _read_dual_config(name)


def _read_dual_config(name: str | Path, **hub: Any) -> DualVisionConfig:
    config = _read_config(name, "model", **hub)
    if not isinstance(config, DualVisionConfig):
        raise CheckpointMismatchError(
            "this is not a dual vision checkpoint",
            value=f"{name}: {getattr(config, 'model_type', '?')}",
            allowed=DualVisionConfig.model_type,
            fix="To combine public checkpoints name both: --qwen_model_name ... --dinov2_model_name ...",
            param="model",
        )
    return config


def _read_config(name: str | Path, param: str, **hub: Any) -> Any:
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise CheckpointIncompleteError(
            "the folder has no config.json", value=str(name), allowed="a folder that save_pretrained wrote",
            fix="Name the folder itself, not one above or below it, or copy it again", param=param,
        )  # fmt: skip
    return _guarded(lambda: AutoConfig.from_pretrained(name, **hub), name, param)


def _read_processor(name: str | Path, config: DualVisionConfig, param: str, **hub: Any) -> DualVisionProcessor:
    return _guarded(lambda: DualVisionProcessor.from_pretrained(name, config=config, **hub), name, param)


def load_processor(name: str | Path, **hub: Any) -> DualVisionProcessor:
    """Tokenizer and preprocessing alone, of a dual checkpoint or of Qwen's. Raises as `load_checkpoint` does."""
    return _guarded(lambda: DualVisionProcessor.from_pretrained(name, **hub), name, "model")


def _from_pretrained(cls: Any, name: str | Path, param: str, **kwargs: Any) -> Any:
    # No pickle is opened; and a tensor of another shape is ours to report, below, not transformers'.
    kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}

    def load() -> Any:
        model, info = cls.from_pretrained(name, **kwargs)
        wrong = [f"{key} missing" for key in sorted(info["missing_keys"]) if not key.endswith("mask_token")]
        wrong += [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"] or [])]
        if cls is not AutoModel:  # a second encoder may carry a head that is not used here
            wrong += [f"{key} has no place" for key in sorted(info["unexpected_keys"])]
        if wrong:
            raise CheckpointMismatchError(
                "the weights don't fill this architecture",
                value=f"{', '.join(wrong[:3])}; {len(wrong)} in all",
                allowed="every tensor that the config names, in its shape, and no other",
                fix="Use the config.json that was saved with these weights, or fetch both again",
                param=param,
            )
        return model

    return _guarded(load, name, param)


def _guarded(load: Callable[[], Any], name: str | Path, param: str) -> Any:
    """transformers' and the hub's many failures as three of ours."""
    try:
        return load()
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError, StrictDataclassError) as error:
        if Path(name).is_dir() or isinstance(error, SafetensorError):  # the latter: damaged in the hub's cache
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointIncompleteError(
                f"the checkpoint can't be read ({why})", value=str(name), param=param,
                allowed="a complete folder of safetensors and config.json", fix="Copy or download it again",
            ) from error  # fmt: skip
        if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
            raise CheckpointIncompleteError(
                "there is no such folder", value=str(name), param=param,
                allowed="a folder that save_pretrained wrote, or a hub id of two words: owner/name",
                fix="Check the path, and from which folder it counts",
            ) from error  # fmt: skip
        # A bad hub id is a ValueError of the hub's own; any other ValueError came from what the hub gave.
        if not isinstance(error, (OSError, HFValidationError)):
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint can't be loaded ({why})", value=str(name), param=param,
                allowed="what save_pretrained wrote, by a version of transformers that this one can read",
                fix="Name another revision or checkpoint",
            ) from error  # fmt: skip
        raise HubUnreachableError(
            "the model is neither a folder nor in the local hub cache, and the hub did not give it",
            value=str(name),
            allowed="a hub id that this machine can reach (token set for gated ones), or a local folder",
            fix="Download it where there is access and pass the folder",
            param=param,
        ) from error
