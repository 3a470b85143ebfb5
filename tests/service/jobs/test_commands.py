"""`dve jobs` against a started server: tables, progress as lines, verbs, exit codes, and no server at all."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from service.cli import main
from service.jobs.store import open_store
from tests.service.conftest import LiveServer
from tests.service.jobs.player import Player
from tests.service.jobs.rows import jsonl


def dve(live: LiveServer, *words: str) -> int:
    return main(["jobs", "--url", live.url, *words])


def test_a_job_in_the_terminal(
    start: Callable[..., LiveServer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = start()
    monkeypatch.setenv("DVE_URL", live.url)
    file_id = live.openai.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune").id
    extra = {"fusion": {"freeze": {"mode": "fusion_only"}}}
    job = live.openai.fine_tuning.jobs.create(model="fake/model:1", training_file=file_id, extra_body=extra)
    store = open_store(None, live.data_dir)
    player = Player(store)
    player.start()
    player.steps(4)
    player.checkpoint()
    assert main(["jobs", "list"]) == 0
    told = capsys.readouterr().out
    assert job.id in told and "running" in told and "4/10 40%" in told
    assert main(["jobs", "show", job.id]) == 0
    told = capsys.readouterr().out
    assert '{"mode": "fusion_only"}' in told and "step 4" in told and "valid_loss 0.75" in told
    assert dve(live, "pause", job.id) == 0
    assert "running (pause asked)" in capsys.readouterr().out
    assert dve(live, "resume", job.id) == 0
    capsys.readouterr()
    codes: list[int] = []
    watching = threading.Thread(target=lambda: codes.append(main(["jobs", "watch", job.id])))
    watching.start()
    player.steps(6)
    player.succeed()
    watching.join(30)
    told = capsys.readouterr().out
    assert codes == [0] and told.count("step ") == 10 and "loss 0.2" in told
    assert f"succeeded ft:fake/model:1:dve::{job.id[-8:]}" in told
    assert dve(live, "cancel", job.id) == 2
    assert "has ended" in capsys.readouterr().err
    assert dve(live, "show", job.id, "--json") == 0
    assert json.loads(capsys.readouterr().out)["job"]["status"] == "succeeded"
    store.close()


def test_watching_a_job_that_fails(start: Callable[..., LiveServer], capsys: pytest.CaptureFixture[str]) -> None:
    live = start()
    file_id = live.openai.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune").id
    job = live.openai.fine_tuning.jobs.create(model="fake/model:1", training_file=file_id)
    store = open_store(None, live.data_dir)
    player = Player(store)
    player.start()
    store.leases.fail(player.held.lease, {"code": "nan_loss", "message": "the loss was [NaN]", "param": None})
    assert dve(live, "watch", job.id) == 1
    assert "failed nan_loss: the loss was [NaN]" in capsys.readouterr().out
    store.close()


def test_keys_and_servers_that_are_not_there(
    start: Callable[..., LiveServer],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    live = start(api_keys=f"training:{hashlib.sha256(b'sk-1').hexdigest()}")
    assert dve(live, "list") == 2 and "no API key was sent" in capsys.readouterr().err
    key = tmp_path / "key"
    key.write_text("sk-1\n")
    assert main(["jobs", "--url", live.url, "--key-file", str(key), "list"]) == 0
    monkeypatch.setenv("DVE_API_KEY", "sk-1")
    assert dve(live, "list") == 0
    assert dve(live, "show", "ftjob-none") == 2 and "no such fine-tuning job" in capsys.readouterr().err
    assert main(["jobs", "--url", "http://127.0.0.1:1", "list"]) == 2
    assert "no answer from the server" in capsys.readouterr().err
    assert main(["jobs", "--url", "nonsense", "list"]) == 2
    assert main(["jobs", "--key-file", str(tmp_path / "none"), "list"]) == 2
