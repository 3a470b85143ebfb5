"""What a model was read from, as twelve characters: two processes that read the same files find the same ones.

In: a manifest, a folder without one, a hub id that is in the local cache, or several of these that were put together.
Out: a name, "" where the files can't be found. Of everything that can change an answer: weights, configuration,
tokenizer, preprocessing. It refuses to know torch and to ask the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from model_core.manifest import Manifest

_RELEVANT = (
    ".safetensors", "config.json", "tokenizer.json", "preprocessor_config.json", ".jinja", "chat_template.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")


def of_manifest(manifest: Manifest) -> str:
    """Of a folder that says what is in it."""
    return _digest({name: entry.sha256 for name, entry in manifest.files.items()})


def of_files(name: str | Path, **hub: Any) -> str:
    """Of a folder, or of what the local cache has of a hub id. Reads every byte that the cache has not named itself."""
    folder = Path(name)
    if not folder.is_dir():
        where = {key: hub[key] for key in ("revision", "cache_dir") if hub.get(key) is not None}
        try:
            folder = Path(snapshot_download(str(name), local_files_only=True, **where))
        except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
            return ""
    files = [path for path in folder.iterdir() if path.name.endswith(_RELEVANT) and path.is_file()]
    return _digest({path.name: _sha256(path) for path in files})


def of_parts(parts: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Of models that were put together with these settings; "" where one of them has no name."""
    if not all(parts):
        return ""
    content = json.dumps([list(parts), dict(settings)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _digest(hashes: Mapping[str, str]) -> str:
    relevant = [f"{name}:{sha256}" for name, sha256 in sorted(hashes.items()) if name.endswith(_RELEVANT)]
    return hashlib.sha256("\n".join(relevant).encode()).hexdigest()[:12] if relevant else ""


def _sha256(path: Path) -> str:
    # In the hub's cache a large file is a link to a blob whose name is its hash.
    if path.is_symlink() and _SHA256.fullmatch(name := os.path.basename(os.readlink(path))):
        return name
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
