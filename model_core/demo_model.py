"""Where the demo model lies inside the package. Knows nothing of how it was made."""

from __future__ import annotations

from pathlib import Path

from model_core.errors import CheckpointIncompleteError


def demo_folder() -> Path:
    """The embedded `dve-demo` checkpoint.

    Raises:
        CheckpointIncompleteError: this installation has none.
    """
    folder = Path(__file__).parent / "demo" / "weights"
    if not (folder / "manifest.json").exists():
        raise CheckpointIncompleteError(
            "the demo model is not in this installation",
            value=str(folder),
            allowed="a folder with a manifest",
            fix="Install it anew, build one with 'dve demo build' and name its folder, or name another: --model FOLDER",
        )
    return folder
