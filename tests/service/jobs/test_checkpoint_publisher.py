"""A checkpoint that somebody asks for by its `ft:...:ckpt-step-N` id is published then, once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model_core.errors import CheckpointError
from model_core.published import folder_name
from service.checkpoint_publisher import CheckpointPublisher
from service.errors import StorageFullError
from service.jobs.store import Store, open_store
from tests.service.conftest import LiveServer
from tests.service.jobs.player import Player, add_file, new_job

#: Publishes by hand what it is told to, and writes its words down.
PUBLISH = """
import json, sys
from pathlib import Path
from model_core.published import promote
from tests.model_core.versions import add_version
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
place = Path(words["--out"])
promote(place, add_version(place, "v1", base_fingerprint="fake"))
"""


def with_checkpoint(store: Store, **job: object) -> str:
    add_file(store)
    store.jobs.create(new_job(**job))
    player = Player(store)
    player.start()
    player.steps(2)
    player.checkpoint()
    return store.jobs.checkpoints(player.held.lease.job_id)[0][0].model_id


def test_it_is_published_when_it_is_first_asked_for(start: Callable[..., LiveServer], tmp_path: Path) -> None:
    live = start()
    store = open_store(None, live.data_dir)
    pair = {"qwen_model_name": "q", "dinov2_model_name": "d"}
    model_id = with_checkpoint(store, config=pair)
    log = tmp_path / "log"
    command = (sys.executable, "-c", PUBLISH.format(log=str(log)))
    publisher = CheckpointPublisher(store, live.data_dir, command)
    live.app.state.parts = replace(live.app.state.parts, checkpoints=publisher)
    for wrong in (f"{model_id}9", "fake/model:1:ckpt-step-2"):
        assert live.http.post(f"/v1/models/{wrong}/load").status_code == 404
    assert not log.exists()
    for _ in range(2):  # it can't be loaded, since this server loads no variants; it was found, and made once
        refused = live.http.post(f"/v1/models/{model_id}/load")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_too_large"), refused.text
    assert model_id in [model.id for model in live.openai.models.list()]
    (told,) = log.read_text().splitlines()
    place = live.data_dir.absolute() / "models" / folder_name(model_id)
    assert f'"--out": "{place}"' in told and '"--qwen_model_name": "q"' in told and "attempt-1/step-2" in told
    store.close()


@pytest.mark.parametrize(
    ("printed", "kind", "said"),
    [
        ('{"error": {"code": "checkpoint_corrupt", "message": "cut"}}', CheckpointError, "cut"),
        ('{"error": {"code": "storage_full", "message": "full"}}', StorageFullError, "full"),
        ("Traceback", CheckpointError, "exit code 3"),
    ],
)
def test_what_the_publication_says_is_told(printed: str, kind: type, said: str, tmp_path: Path) -> None:
    store = open_store(None, tmp_path)
    model_id = with_checkpoint(store)
    command = (sys.executable, "-c", f"import sys; sys.stdout.write('''{printed}'''); sys.exit(3)")
    with pytest.raises(kind, match=said):
        asyncio.run(CheckpointPublisher(store, tmp_path, command).publish(model_id))
    assert not asyncio.run(CheckpointPublisher(store, tmp_path, command).publish("ft:a:b:c:12345678:ckpt-step-1"))
    store.close()
