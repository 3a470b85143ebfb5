"""The runbook's rotation of keys, run as it stands there, on the keys that the first start made."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from service.keys import KeyRing, load_keys
from service.settings import Settings
from tests.deploy.runbook import blocks, run
from tests.deploy.standin_tools import install


def restart(data: Path) -> KeyRing:
    """What a server that others can reach takes, as compose starts it: without DVE_API_KEYS."""
    return load_keys(Settings(host="0.0.0.0", data_dir=data))


def plain(data: Path) -> dict[str, str]:
    lines = (data / "keys/plain").read_text().splitlines()
    return dict(line.split(": ") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("where", [0, 2, 4], ids=["host", "compose", "kubernetes"])
def test_a_key_is_added_beside_the_first_ones_and_an_old_one_taken_away(tmp_path: Path, where: int) -> None:
    data = tmp_path / "data"
    known = {
        "PATH": f"{install(tmp_path)}:{os.environ['PATH']}", "DATA": str(data),
        "COMPOSE_FILE": "deploy/compose.yaml:deploy/compose.cpu.yaml",
    }  # fmt: skip
    restart(data)
    old = plain(data)
    add, remove = blocks("Rotating keys")[where : where + 2]
    new = run(add, **known).splitlines()[0]
    ring = restart(data)
    assert {key: ring.find(key.encode()).scope for key in (*old.values(), new)} == {
        old["inference"]: "inference", old["training"]: "training", new: "inference",
    }  # fmt: skip
    key_id = hashlib.sha256(old["inference"].encode()).hexdigest()[:12]
    assert ring.find(old["inference"].encode()).key_id == key_id
    run(remove, KEY_ID=key_id, **known)
    ring = restart(data)
    assert ring.find(old["inference"].encode()) is None
    assert ring.find(new.encode()).scope == "inference" and ring.find(old["training"].encode()) is not None
