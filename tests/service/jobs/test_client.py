"""The official client against a started server, on both databases; a player stands in for the worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import FileObject, Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from model_core.published import folder_name, promote
from model_core.training.config import TRAINING_MODES, parse_config
from service.jobs.files import place_files
from service.jobs.job import NewEvent
from service.jobs.store import Store, open_store
from tests.model_core.versions import add_version
from tests.service.conftest import LiveServer
from tests.service.jobs.player import FREEZE_TABLE, Player
from tests.service.jobs.rows import PICTURE, jsonl

MODEL = "fake/model:1"
JOBS = "/v1/fine_tuning/jobs"
Served = tuple[LiveServer, Store]


def upload(client: openai.OpenAI, data: bytes = b"", **more) -> str:
    return client.files.create(file=("train.jsonl", data or jsonl()), purpose="fine-tune", **more).id


def create(client: openai.OpenAI, file_id: str, fusion: dict | None = None, **more):
    extra = {"extra_body": {"fusion": fusion}} if fusion is not None else {}
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file_id, **extra, **more)


def publish(live: LiveServer, model_id: str) -> Path:
    """As `dve publish` does by hand: the store knows nothing of it."""
    place = live.data_dir / "models" / folder_name(model_id)
    add_version(place, "v1", base_fingerprint="fake")
    promote(place, "v1")
    return place / "v1"


def test_a_job_begins_from_a_model_that_was_published_by_hand(start) -> None:
    live = start()
    file_id = upload(live.openai)
    folder = publish(live, f"ft:{MODEL}:me:x:ab12cd34")
    job = live.openai.fine_tuning.jobs.create(model=f"ft:{MODEL}:me:x:ab12cd34", training_file=file_id)
    store = open_store(None, live.data_dir)
    assert store.jobs.get(job.id).config["start_from"] == str(folder)
    store.close()
    # Of another base than the served one: it could be trained, and nobody here could ask it anything.
    add_version(live.data_dir / "models" / "ft:other:me:x:ab12cd34", "v1", base_fingerprint="0ther")
    promote(live.data_dir / "models" / "ft:other:me:x:ab12cd34", "v1")
    for wrong in ("ft:other:me:x:ab12cd34", f"ft:{MODEL}:me:x:ab12cd34@blind"):
        with pytest.raises(openai.NotFoundError) as caught:
            live.openai.fine_tuning.jobs.create(model=wrong, training_file=file_id)
        assert caught.value.param == "model"


def test_from_upload_to_a_trained_model(served: Served) -> None:
    live, store = served
    client = live.openai
    file = client.files.create(
        file=("train.jsonl", jsonl()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.filename, file.bytes, file.purpose) == ("train.jsonl", len(jsonl()), "fine-tune")
    assert file.expires_at == pytest.approx(file.created_at + 3600, abs=1)
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).content == jsonl()
    job = create(client, file.id, {"freeze": {"mode": "fusion_only"}}, suffix="my-run", seed=5, metadata={"team": "a"})
    assert (job.status, job.seed, job.metadata, job.organization_id) == (
        "validating_files",
        5,
        {"team": "a"},
        "org-dve",
    )
    assert job.fine_tuned_model is None and job.finished_at is None and job.error is None and job.result_files == []
    player = Player(store)
    player.start()
    player.freeze()
    player.steps(4)
    player.checkpoint()
    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running" and running.trained_tokens == 400
    assert running.fusion["progress"] == {"global_step": 4, "num_steps": 10, "ratio": 0.4}
    assert running.fusion["freeze_table"] == FREEZE_TABLE and running.fusion["attempt"] == 1
    assert running.estimated_finish is not None and running.estimated_finish >= running.created_at
    assert client.fine_tuning.jobs.pause(job.id).status == "running"
    store.leases.stopped(player.held.lease)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert player.start().attempt == 2
    player.steps(6)
    player.checkpoint("final")
    player.succeed()
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded" and done.finished_at is not None
    assert done.fine_tuned_model == f"ft:{MODEL}:dve:my-run:{job.id[-8:]}"
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [c.step_number for c in checkpoints] == [10, 4]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-10"
    metrics = checkpoints[0].metrics
    assert (metrics.step, metrics.train_loss, metrics.valid_loss, metrics.full_valid_loss) == (10, 0.5, 0.75, 0.75)
    assert metrics.valid_mean_token_accuracy == 0.5 and metrics.train_mean_token_accuracy is None
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert events[0].message == "The job has succeeded" and events[-1].message == "The job was created"
    steps = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == list(range(10, 0, -1))
    assert steps[0].data["train_loss"] == pytest.approx(0.2)
    # A model that was trained can be trained on; it was made of what is served, and so is the next one.
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model=done.fine_tuned_model, training_file=file.id)
    folder = publish(live, done.fine_tuned_model)
    again = client.fine_tuning.jobs.create(model=done.fine_tuned_model, training_file=file.id)
    recipe = parse_config(store.jobs.get(again.id).config)
    assert (recipe.start_from, recipe.model) == (str(folder), None)
    assert store.jobs.get(again.id).fine_tuned_name == f"ft:{MODEL}:dve::{again.id[-8:]}"
    client.fine_tuning.jobs.cancel(again.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_the_asynchronous_client(served: Served) -> None:
    live, store = served

    async def play() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            file = await client.files.create(file=("a.jsonl", jsonl()), purpose="fine-tune")
            await client.files.wait_for_processing(file.id)
            made = [
                await client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, metadata={"n": str(i)})
                for i in range(3)
            ]
            listed = [job.id async for job in client.fine_tuning.jobs.list(limit=2)]
            assert listed == [job.id for job in reversed(made)]
            player = Player(store)
            await asyncio.to_thread(player.start)
            await asyncio.to_thread(player.steps, 2)
            assert (await client.fine_tuning.jobs.cancel(made[0].id)).status == "running"
            await asyncio.to_thread(store.leases.stopped, player.held.lease)
            assert (await client.fine_tuning.jobs.retrieve(made[0].id)).status == "cancelled"
            kinds = [e.data["kind"] async for e in client.fine_tuning.jobs.list_events(made[0].id, limit=3)]
            assert len(kinds) == 8 and kinds[0] == "job:cancelled" and kinds[-1] == "job:created"

    asyncio.run(play())


def test_each_mode_and_a_curriculum_become_recipes(served: Served) -> None:
    live, store = served
    file_id, other, held_out = (upload(live.openai) for _ in range(3))
    for mode in TRAINING_MODES:
        job = create(live.openai, file_id, {"freeze": {"mode": mode}}, hyperparameters={"n_epochs": 2, "batch_size": 4})
        recipe = parse_config(store.jobs.get(job.id).config)
        assert (recipe.freeze.mode, recipe.num_epochs, recipe.batch_size) == (mode, 2, 4)
        assert job.hyperparameters.n_epochs == 2 and job.fusion["freeze"] == {"mode": mode}
    fusion = {
        "curriculum": [
            {"mode": "fusion_only", "epochs": 3, "description": "first"},
            {"mode": "full", "epochs": 1, "learning_rate": 1e-5, "dataset_weights": {file_id: 1, other: 0}},
        ],
        "datasets": [{"file": file_id, "weight": 2}, {"file": other, "type": "vqa"}],
        "losses": {"encoder_dropout": 0.1},
        "lora": {"llm": {"rank": 8}},
        "early_stopping": {"patience": 2},
        "bad_samples": {"policy": "quarantine", "max_ratio": 0.1},
        "resources": {"device": "cpu"},
        "priority": 7,
    }
    method = {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 2}}}
    job = create(live.openai, file_id, fusion, method=method, validation_file=held_out)
    row = store.jobs.get(job.id)
    recipe = place_files(row.config, lambda one: f"/there/{one}", output_dir="/out")
    assert [(stage.training_mode, stage.epochs) for stage in recipe.stages()] == [("fusion_only", 3), ("full", 1)]
    assert recipe.stages()[0].learning_rates["projections"] == pytest.approx(2e-4)
    assert recipe.stages()[1].learning_rates["projections"] == pytest.approx(1e-5)
    assert [(d.data_path, d.weight, d.type) for d in recipe.datasets] == [
        (f"/there/{file_id}", 2.0, "conversation"), (f"/there/{other}", 1.0, "vqa"),
    ]  # fmt: skip
    assert (recipe.val_data_path, recipe.output_dir, recipe.device) == (f"/there/{held_out}", "/out", "cpu")
    assert recipe.lora.llm is not None and recipe.lora.llm.rank == 8 and recipe.losses.encoder_dropout == 0.1
    assert recipe.bad_samples.policy == "quarantine" and recipe.early_stopping is not None
    assert (row.priority, sorted(row.files)) == (7, sorted([file_id, other, held_out]))
    assert job.fusion["priority"] == 7 and job.fusion["curriculum"][0]["description"] == "first"
    assert Player(store).claim().id == job.id, "the highest priority goes first"


def test_lists_filters_and_cursors(served: Served) -> None:
    live, _ = served
    file_id = upload(live.openai)
    made = [create(live.openai, file_id, metadata={"team": "a", "n": str(i)}).id for i in range(3)]
    made.append(create(live.openai, file_id).id)
    page = live.openai.fine_tuning.jobs.list(limit=3)
    assert [job.id for job in page.data] == made[:0:-1] and page.has_more
    assert [job.id for job in page.get_next_page().data] == made[:1]
    filtered = live.openai.fine_tuning.jobs.list(metadata={"team": "a", "n": "1"})
    assert [job.id for job in filtered] == [made[1]]
    assert live.http.get(JOBS, params={"metadata": "null"}).json()["data"][0]["id"] == made[3]
    assert len(live.openai.fine_tuning.jobs.list(metadata={"team": "b"}).data) == 0
    assert len(list(live.openai.fine_tuning.jobs.list_events(made[0], limit=1))) == 1
    for query in ("limit=0", "limit=101", "after=ftjob-x", "metadata=x", "metadata=null&metadata[a]=b"):
        assert live.http.get(f"{JOBS}?{query}").status_code == 400, query


def frames(response: httpx.Response) -> Iterator[dict | str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def test_events_as_they_come(served: Served) -> None:
    live, store = served
    job = create(live.openai, upload(live.openai))
    player = Player(store)
    with live.http.stream("GET", f"{JOBS}/{job.id}/events", params={"stream": "true"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = frames(response)
        assert next(stream)["data"]["kind"] == "job:created"
        player.start()
        assert [next(stream)["data"]["kind"] for _ in range(3)] == ["job:validated", "job:queued", "job:running"]
        for step in (1, 2):
            player.steps(1)
            event = next(stream)
            assert (event["type"], event["data"]["step"]) == ("metrics", step)
        player.succeed()
        assert next(stream)["message"] == "The job has succeeded"
        assert next(stream) == "[DONE]"
    # Taken up again behind an event that is known.
    rest = live.http.get(f"{JOBS}/{job.id}/events", params={"stream": "true", "after": event["id"]}).text
    assert rest.count("data: {") == 1 and "succeeded" in rest
    missing = live.http.get(f"{JOBS}/ftjob-none/events", params={"stream": "true"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "fine_tune_not_found")
    strange = live.http.get(f"{JOBS}/{job.id}/events", params={"stream": "true", "after": "ftevent-x"})
    assert (strange.status_code, strange.json()["error"]["param"]) == (400, "after")


def test_twenty_cancels_at_once(served: Served) -> None:
    live, store = served
    job = create(live.openai, upload(live.openai))
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: live.http.post(f"{JOBS}/{job.id}/cancel"), range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 19
    assert [e.kind for e in store.jobs.events(job.id)[0]] == ["job:cancelled", "job:created"]
    with pytest.raises(openai.ConflictError) as caught:
        live.openai.fine_tuning.jobs.cancel(job.id)
    assert caught.value.code == "job_finished" and caught.value.response.headers["x-should-retry"] == "false"


def test_a_retried_request_is_one_job(served: Served) -> None:
    live, _ = served
    file_id = upload(live.openai)
    body = {"model": MODEL, "training_file": file_id}

    def post(body: dict, **headers: str) -> httpx.Response:
        return live.http.post(JOBS, json=body, headers={name.replace("_", "-"): v for name, v in headers.items()})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(body, idempotency_key="one"), range(8)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    conflict = post({**body, "seed": 1}, idempotency_key="one")
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert conflict.headers["x-should-retry"] == "false"
    first = post({**body, "suffix": "x"})
    again = post({"suffix": "x", **body}, x_stainless_retry_count="1")
    assert again.json()["id"] == first.json()["id"], "another order of keys is the same body"
    assert post({**body, "suffix": "x"}, x_stainless_retry_count="0").json()["id"] != first.json()["id"]
    assert post(body, idempotency_key="x" * 256).status_code == 400
    live.openai.fine_tuning.jobs.cancel(answers[0].json()["id"])
    assert post(body, idempotency_key="one").json()["status"] == "cancelled", "the first one's job, as it is now"


def test_switching_the_mode_of_a_live_job(served: Served) -> None:
    live, store = served
    job = create(live.openai, upload(live.openai), {"freeze": {"mode": "fusion_only"}})
    player = Player(store)
    player.start()
    player.freeze()
    path = f"{JOBS}/{job.id}"
    switched = live.http.patch(f"{path}/fusion", json={"freeze": {"mode": "full", "flags": {"freeze_llm": True}}})
    assert switched.status_code == 200 and switched.json()["fusion"]["freeze"]["mode"] == "full"
    assert store.leases.renew(player.held.lease).num_switches == 1
    assert store.jobs.switches(job.id)[0].freeze == {"mode": "full", "freeze_llm": True}
    store.leases.mark_switched(player.held.lease, 1, 3)
    told = live.http.get(f"{path}/freeze").json()
    assert told["freeze_table"] == FREEZE_TABLE and told["requested"]["freeze"]["mode"] == "full"
    assert told["switches"][0]["applied_step"] == 3
    for body in ({"freeze": {}}, {"freeze": {"mode": "none"}}, {}, {"freeze": {"mode": "full"}, "epochs": 1}):
        assert live.http.patch(f"{path}/fusion", json=body).status_code == 400, body
    player.succeed()
    assert live.http.patch(f"{path}/fusion", json={"freeze": {"mode": "full"}}).status_code == 409


def test_going_on_from_a_checkpoint(served: Served) -> None:
    live, store = served
    file_id = upload(live.openai)
    first = create(live.openai, file_id)
    player = Player(store)
    player.start()
    player.steps(2)
    player.checkpoint()
    checkpoint = live.openai.fine_tuning.jobs.checkpoints.list(first.id).data[0]
    job = create(live.openai, file_id, {"resume_from": checkpoint.id})
    assert store.jobs.get(job.id).resume_from == checkpoint.id and job.fusion["resume_from"] == checkpoint.id
    assert job.seed == first.seed, "another one would be another run"
    with pytest.raises(openai.BadRequestError) as caught:
        create(live.openai, file_id, {"resume_from": checkpoint.id, "freeze": {"mode": "llm_only"}})
    assert caught.value.param == "fusion.resume_from" and "freeze_config" in caught.value.message
    from_weights = live.openai.fine_tuning.jobs.create(
        model=checkpoint.fine_tuned_model_checkpoint, training_file=file_id
    )
    assert parse_config(store.jobs.get(from_weights.id).config).start_from == "/somewhere/attempt-1/step-2"
    with pytest.raises(openai.BadRequestError) as caught:
        create(live.openai, file_id, {"resume_from": "ftckpt_" + "0" * 32})
    assert caught.value.param == "fusion.resume_from"


def test_pictures_are_kept_for_analysis(served: Served) -> None:
    live, _ = served
    picture = live.openai.files.create(file=("fox.png", PICTURE), purpose="vision")
    assert live.http.get("/fusion-weights", params={"file_id": picture.id}).json()["object"] == "fusion.analysis"
    part = {"type": "image_file", "image_file": {"file_id": picture.id}}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]}
    assert live.http.post("/v1/chat/completions", json=chat).json()["fusion"]
    with pytest.raises(openai.BadRequestError) as caught:
        create(live.openai, picture.id)
    assert caught.value.param == "training_file"
    assert [file.id for file in live.openai.files.list(purpose="vision")] == [picture.id]
    live.openai.files.delete(picture.id)
    assert live.http.get("/fusion-weights", params={"file_id": picture.id}).status_code == 404


def test_odd_texts_are_refused_or_kept_alike_on_both(served: Served) -> None:
    live, store = served
    file_id = upload(live.openai)
    for odd in ({"metadata": {"k": "a\0b"}}, {"metadata": {"k\0": "v"}}, {"model": "a\0b"}):
        refused = live.http.post(JOBS, json={"model": MODEL, "training_file": file_id, **odd})
        assert refused.status_code in (400, 404), refused.text
    raw = json.dumps({"model": MODEL, "training_file": file_id, "metadata": {"k": "\ud800"}})
    assert live.http.post(JOBS, content=raw, headers={"content-type": "application/json"}).status_code == 400
    for path in (
        f"{JOBS}/a%00b",
        f"{JOBS}?after=%00",
        f"{JOBS}?metadata[%00]=x",
        "/v1/files/%00",
        "/v1/files?after=%00",
    ):
        assert live.http.get(path).status_code in (200, 400, 404), path
    kept = {"k'\"%_\\": "\U0001f98a \u202e"}
    job = create(live.openai, file_id, metadata=kept)
    assert job.metadata == kept and [one.id for one in live.openai.fine_tuning.jobs.list(metadata=kept)] == [job.id]
    player = Player(store)
    player.start()
    data = {"loss": float("nan"), "text": "a\0b", "list": [float("inf"), 1.5]}
    store.leases.append_events(player.held.lease, [NewEvent(0, 1, "step", "a\0b", data)])
    event = live.openai.fine_tuning.jobs.list_events(job.id).data[0]
    assert (event.message, event.data["loss"], event.data["list"]) == ("ab", None, [None, 1.5])


def check_shape(kind: type[openai.BaseModel], raw: dict) -> None:
    """By the client's own types, which it does not check itself; and no field of theirs is absent, however empty."""
    kind.model_validate(raw, strict=True)
    assert {field.alias or name for name, field in kind.model_fields.items()} - set(raw) == set()


def test_objects_have_every_field_of_the_clients_types(served: Served) -> None:
    live, store = served
    file_id = upload(live.openai)
    check_shape(FileObject, live.http.get(f"/v1/files/{file_id}").json())
    job = create(live.openai, file_id, suffix="x", metadata={"a": "b"})
    check_shape(FineTuningJob, live.http.get(f"{JOBS}/{job.id}").json())
    player = Player(store)
    player.start()
    player.steps(1)
    player.checkpoint()
    check_shape(FineTuningJob, live.http.get(f"{JOBS}/{job.id}").json())
    store.leases.fail(player.held.lease, {"code": "nan_loss", "message": "NaN", "param": None})
    ended = live.http.get(f"{JOBS}/{job.id}").json()
    check_shape(FineTuningJob, ended)
    assert ended["status"] == "failed" and set(ended["error"]) == {"code", "message", "param"}
    for path, kind in (("events", FineTuningJobEvent), ("checkpoints", FineTuningJobCheckpoint)):
        page = live.http.get(f"{JOBS}/{job.id}/{path}").json()
        assert page["object"] == "list" and page["has_more"] is False and page["data"]
        for raw in page["data"]:
            check_shape(kind, raw)
    Model.model_validate(live.http.get(f"/v1/models/{MODEL}").json(), strict=True)
