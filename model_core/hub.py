"""The options of loading, saving and uploading a model, and the upload itself.

In: what a caller gave by name; a model with its processor. Out: a refusal that names the nearest option; a repository
on the hub. It refuses an option that nobody would read: passed on, it would fail far from here, or mean nothing.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from model_core.checkpoint import save_checkpoint
from model_core.errors import ConfigError
from model_core.model import DualVisionModel
from model_core.processing.processor import DualVisionProcessor

LOADING = ("revision", "token", "cache_dir", "local_files_only")
SAVING = ("max_shard_size", "push_to_hub")
UPLOADING = ("private", "token", "commit_message", "revision", "create_pr")

#: Options of transformers that are not taken here, and what to do instead.
_INSTEAD = {
    "attn_implementation": "Say use_flash_attention=True or False; any other of transformers' is set once the model is "
    "loaded: .model.set_attn_implementation('eager')",
    "device_map": "Name one device; transformers' AutoModel.from_pretrained(folder, device_map=...) takes maps",
    "quantization_config": "Leave it out: weights are used in float32, bfloat16 or float16, as dtype says",
}


def check_options(given: Iterable[str], known: Sequence[str], *, otherwise: str = "Leave it out") -> None:
    """Raises ConfigError: one of the given names is not known; with the nearest known one, or `otherwise`."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        fix = _INSTEAD.get(unknown[0]) or (f"Write '{close[0]}'" if close else otherwise)
        raise ConfigError("unknown option", value=", ".join(unknown), allowed=", ".join(known), fix=fix)


def upload(
    model: DualVisionModel, processor: DualVisionProcessor, repo_id: str, *, private: bool | None, token: str | None,
    max_shard_size: int | str | None, commit: dict[str, Any],
) -> Any:  # fmt: skip
    """Make the repository if it is not there, and a commit of what `save_checkpoint` writes."""
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        save_checkpoint(model, processor, folder, max_shard_size=max_shard_size)
        return api.upload_folder(repo_id=repository.repo_id, folder_path=folder, **commit)
