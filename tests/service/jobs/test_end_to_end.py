"""From an upload to a model that answers as it was trained: the official client, a real worker, a real small model.

The base is a pair of checkpoints, as in most people's hands. Heavy: each story starts a dozen interpreters: a short
one, and a long one with every mode, a killed worker and both clients on both databases.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.service.jobs.place import ANSWERS, BASE, Place, open_place, training_file

MODES = ("full", "encoders_only", "llm_only", "fusion_only", "qwen_only", "dinov2_only")
QUICK = {"n_epochs": 1, "batch_size": 2, "learning_rate_multiplier": 100}
#: Long enough to be paused, killed and resumed in the middle.
LONG = {**QUICK, "n_epochs": 4}


async def upload(place: Place, num_rows: int = 60) -> str:
    file = await place.call(
        place.client.files.create, file=("train.jsonl", training_file(num_rows)), purpose="fine-tune"
    )
    file = await place.call(place.client.files.wait_for_processing, file.id)
    assert file.status == "processed"
    return str(file.id)


async def create(place: Place, file_id: str, fusion: dict[str, Any], model: str = BASE, **more: Any) -> str:
    body = {"hyperparameters": QUICK, "extra_body": {"fusion": fusion}, **more}
    job = await place.call(place.jobs.create, model=model, training_file=file_id, **body)
    assert job.status == "validating_files" and job.model == model
    return str(job.id)


async def check_answers(place: Place, model: str) -> None:
    """As it was trained, and not as its base answers."""
    for colour in ANSWERS:
        text, version = await place.answer(model, colour)
        assert text == colour
        base, base_version = await place.answer(BASE, colour)
        assert base != colour and base_version != version


async def delete(place: Place, model: str) -> None:
    assert (await place.call(place.client.models.delete, model)).deleted
    with pytest.raises(openai.NotFoundError):
        await place.answer(model, "red")


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_a_pair_is_trained_published_asked_and_deleted(tmp_path: Path) -> None:
    """A base of two names trained, and then could not be published: `dve publish` took the demo for its base."""
    with open_place(tmp_path) as place:
        place.start_worker()

        async def story() -> None:
            job_id = await create(place, await upload(place), {"freeze": {"mode": "full"}}, suffix="mine")
            done = await place.until_status(job_id, "succeeded")
            assert done.fine_tuned_model == f"ft:{BASE}:dve:mine:{job_id[-8:]}"
            await check_answers(place, done.fine_tuned_model)
            await delete(place, done.fine_tuned_model)

        asyncio.run(story())


async def trained_on(place: Place, file_id: str, model: str) -> None:
    """What is published is only what differs from its base, and a job from it could not begin."""
    (checkpoint, *_) = (await place.call(place.jobs.checkpoints.list, await job_of(place, model))).data
    brief = {"hyperparameters": {"n_epochs": 1, "batch_size": 30}}
    for source in (model, checkpoint.fine_tuned_model_checkpoint):
        await check_answers(place, source)
        job_id = await create(place, file_id, {"freeze": {"mode": "fusion_only"}}, model=source, **brief)
        done = await place.until_status(job_id, "succeeded")
        assert done.fine_tuned_model == f"ft:{BASE}:dve::{job_id[-8:]}"
        await check_answers(place, done.fine_tuned_model)


async def job_of(place: Place, model: str) -> str:
    listed = (await place.call(place.jobs.list, limit=100)).data
    return next(job.id for job in listed if job.fine_tuned_model == model)


async def every_mode(place: Place, file_id: str) -> None:
    """Each mode and a curriculum, with what trained told by the job itself; found again by its metadata."""
    brief = {"hyperparameters": {**QUICK, "batch_size": 30}}
    ids = {
        mode: await create(place, file_id, {"freeze": {"mode": mode}}, metadata={"mode": mode}, **brief)
        for mode in MODES
    }
    stages = [{"mode": "fusion_only", "epochs": 1}, {"mode": "encoders_only", "epochs": 1, "learning_rate": 1e-3}]
    many = {"hyperparameters": {"batch_size": 30}}
    ids["stages"] = await create(place, file_id, {"curriculum": stages}, metadata={"mode": "stages"}, **many)
    listed = await place.call(place.jobs.list, limit=100)
    assert [job.id for job in listed.data] == list(ids.values())[::-1]
    for mode, job_id in ids.items():
        found = await place.call(place.jobs.list, metadata={"mode": mode})
        assert [job.id for job in found.data] == [job_id]
        done = await place.until_status(job_id, "succeeded")
        assert done.trained_tokens > 0 and done.error is None and done.finished_at >= done.created_at
        rows = done.fusion["freeze_table"]["rows"]
        assert any(row["trainable"] for row in rows) and done.fusion["progress"]["ratio"] == 1.0
        (result,) = done.result_files
        text = (await place.call(place.client.files.content, result)).text
        assert text.startswith("step,train_loss") and len(text.splitlines()) > 1
        text, version = await place.answer(done.fine_tuned_model, "red")
        assert version != (await place.answer(BASE, "red"))[1]
        await place.answer(f"{done.fine_tuned_model}@qwen-only", "red")
    assert done.fusion["stage"] == 1


async def twin(place: Place, file_id: str) -> str:
    """A job that nobody disturbs; its version's name is made of its weights."""
    job_id = await create(place, file_id, {"freeze": {"mode": "full"}}, hyperparameters=LONG, seed=11)
    done = await place.until_status(job_id, "succeeded")
    return (await place.answer(done.fine_tuned_model, "red"))[1]


async def disturbed(place: Place, file_id: str, weights: str) -> str:
    """Paused, its worker killed, resumed: to the bit what its undisturbed twin is, every event once."""
    job_id = await create(place, file_id, {"freeze": {"mode": "full"}}, hyperparameters=LONG, seed=11, suffix="mine")
    await place.until(job_id, lambda job: job.fusion["progress"]["global_step"] >= 35)
    assert (await place.call(place.jobs.pause, job_id)).fusion["requested_action"] == "pause"
    paused = await place.until_status(job_id, "paused")
    step = paused.fusion["progress"]["global_step"]
    saved = (await place.call(place.jobs.checkpoints.list, job_id)).data
    assert saved[0].step_number == step and saved[0].fusion["reason"] == "requested"
    await place.call(place.jobs.resume, job_id)
    await place.until(job_id, lambda job: job.fusion["progress"]["global_step"] >= step + 5)
    place.workers[-1].send_signal(signal.SIGKILL)
    place.workers[-1].wait()
    place.start_worker()
    done = await place.until_status(job_id, "succeeded")
    assert done.fusion["attempt"] == 3
    assert (await place.answer(done.fine_tuned_model, "red"))[1] == weights
    await check_events(place, job_id)
    await check_answers(place, done.fine_tuned_model)
    return str(done.fine_tuned_model)


async def check_events(place: Place, job_id: str) -> None:
    page = await place.call(place.jobs.list_events, job_id, limit=100)
    found = list(page.data)
    while page.has_more:
        page = await place.call(place.jobs.list_events, job_id, limit=100, after=found[-1].id)
        found += page.data
    steps = [event.data["step"] for event in found if event.data["kind"] == "step"]
    assert steps == list(range(steps[0], 0, -1))
    told = httpx.get(f"{place.live.url}/v1/fine_tuning/jobs/{job_id}/events?stream=true", timeout=60).text
    assert told.endswith("data: [DONE]\n\n")
    assert [line[4:] for line in told.splitlines() if line.startswith("id: ")] == [event.id for event in found[::-1]]


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
def test_the_whole_story(kind: type[Any], database_url: str | None, tmp_path: Path) -> None:
    with open_place(tmp_path, kind, database_url) as place:
        place.start_worker()

        async def story() -> None:
            file_id = await upload(place)
            await every_mode(place, file_id)
            model = await disturbed(place, file_id, await twin(place, file_id))
            await trained_on(place, file_id, model)
            await delete(place, model)
            assert (await place.call(place.client.files.delete, file_id)).deleted
            await place.call(place.client.close)  # the asynchronous one in its own loop

        asyncio.run(story())
