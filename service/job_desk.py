"""The desk at which jobs are taken in: a validated body becomes a row of the store, or is refused in the body's words.

In: bodies, and who asks. Out: jobs and validation reports. Beside it in `JobDesk` lies what the routes need of the
store. Its methods block, unless they are async: routes call them in a thread. It trains nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_core.errors import InputError, InvalidRequestError, ModelNotFoundError
from model_core.training.config import TrainConfig, parse_config
from model_core.types import ModelInfo
from service.errors import InvalidBodyError, UploadNotFoundError, error_body
from service.jobs.files import FileFolder
from service.jobs.job import FileRecord, Job, NewJob
from service.jobs.store import Store
from service.keys import Caller
from service.preflight import Preflight
from service.protocol.fine_tuning import CreateJobRequest, FreezeRequest, JobFusion, check_supported
from service.recipes import ModelSource, files_of, num_gpus_of, to_freeze_settings, to_recipe
from service.registry import PublishedModel
from service.settings import Settings

_SEEDS = 2**31
#: A recipe's and the settings' names of the model that is served.
_BASE_KEYS = ("model", "qwen_model_name", "dinov2_model_name")


@dataclass(frozen=True, slots=True)
class Asking:
    """How a job was asked for: by whom, with which key and hash, and whether the client says it asked before.

    request_id, traceparent: of the request, for the worker's log and traces.
    """

    caller: Caller
    body_hash: str
    idempotency_key: str | None
    is_retry: bool
    request_id: str = ""
    traceparent: str = ""


def hash_body(raw: bytes) -> str:
    """Of the JSON's content: another order of keys is the same body."""
    return hashlib.sha256(json.dumps(json.loads(raw), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class JobDesk:
    """`turn`: jobs are created one after another, in the order in which requests came, so that a retry that overtakes
    nothing finds the job of the request that it repeats. published_as: a served model by its name, None for the base
    and its arms; asked in the event loop. Raises ModelNotFoundError."""

    settings: Settings
    store: Store
    folder: FileFolder
    preflight: Preflight
    published_as: Callable[[str], PublishedModel | None]
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def create(self, body: CreateJobRequest, asking: Asking, info: ModelInfo) -> Job:
        """A job in `validating_files`, or the one that an earlier request made. Raises InputError."""
        async with self.turn:
            return await asyncio.to_thread(self._create, body, asking, self._find(body.model, info))

    def _create(self, body: CreateJobRequest, asking: Asking, found: _Found) -> Job:
        owner = asking.caller.key_id
        earlier = self.store.jobs.find_earlier(owner, asking.body_hash, asking.idempotency_key, asking.is_retry)
        if earlier is not None:
            return earlier
        new, _ = self._plan(body, found, owner, asking)
        return self.store.jobs.create(new)[0]

    def _plan(
        self, body: CreateJobRequest, found: _Found, owner: str, asking: Asking | None = None
    ) -> tuple[NewJob, TrainConfig]:
        """What would be kept, and its recipe. Raises InputError."""
        check_supported(body)
        fusion = body.fusion or JobFusion()
        source = self._source(found)
        for file_id, place in files_of(body).items():
            self._check_file(file_id, place)
        earlier = self._job_to_go_on_from(fusion, source)
        # A run goes on with its own seed; another one would be another run.
        usual = secrets.randbelow(_SEEDS) if earlier is None else earlier.seed
        seed = usual if body.seed is None else body.seed
        recipe = to_recipe(body, source, seed)
        if earlier is not None:
            _check_same_recipe(recipe, earlier)
        new = NewJob(
            owner=owner,
            model=source.model_id,
            training_file=body.training_file,
            validation_file=body.validation_file,
            config=recipe.model_dump(mode="json"),
            seed=seed,
            suffix=body.suffix,
            hyperparameters=body.chosen_hyperparameters().model_dump(),
            metadata=body.metadata,
            fusion=echo(fusion),
            files=tuple(files_of(body)),
            priority=fusion.priority,
            num_gpus=num_gpus_of(fusion),
            is_dry_run=fusion.dry_run,
            resume_from=fusion.resume_from,
            body_hash=asking.body_hash if asking else "",
            idempotency_key=asking.idempotency_key if asking else None,
            is_retry=asking.is_retry if asking else False,
            request_id=asking.request_id if asking else "",
            traceparent=asking.traceparent if asking else "",
        )
        return new, recipe

    async def validate(self, body: CreateJobRequest, info: ModelInfo, owner: str) -> dict[str, Any]:
        """What `create` would say, without a job: errors, the resolved stages, the memory preflight."""
        report: dict[str, Any] = {
            "object": "fine_tuning.job.validation", "valid": True, "errors": [], "files": [], "stages": [],
            "cost": None, "cost_error": None,
        }  # fmt: skip
        try:
            _, recipe = await asyncio.to_thread(self._plan, body, self._find(body.model, info), owner)
        except InputError as error:
            report |= {"valid": False, "errors": [error_body(error, "")["error"]]}
            return report
        report["files"] = [
            {"id": record.id, "bytes": record.num_bytes, "status": record.status}
            for record in [await asyncio.to_thread(self.store.files.get, file_id) for file_id in files_of(body)]
        ]
        report["stages"] = [
            {
                "training_mode": stage.training_mode,
                "freeze": stage.freeze.model_dump(exclude_none=True, mode="json"),
                "epochs": stage.epochs,
                "learning_rates": dict(stage.learning_rates),
                "encoder_dropout": stage.encoder_dropout,
            }
            for stage in recipe.stages()
        ]
        report["cost"], report["cost_error"] = await self.preflight.cost(recipe)
        return report

    def switch(self, job_id: str, freeze: FreezeRequest) -> Job:
        """Ask a job for another freeze mode. Raises JobNotFoundError, JobFinishedError, JobStateError."""
        job = self.store.jobs.get(job_id)
        settings = to_freeze_settings(freeze)
        if not settings:
            raise InvalidRequestError(
                "'freeze' says nothing", allowed="a mode, flags or rules", fix="Name what is to train", param="freeze"
            )
        # What stands there is what was asked for; the table of GET .../freeze says what trains now.
        return self.store.jobs.request_switch(
            job_id, settings, {**job.fusion, "freeze": freeze.model_dump(mode="json", exclude_none=True)}
        )

    def _check_file(self, file_id: str, place: str) -> FileRecord:
        try:
            record = self.store.files.get(file_id)
        except UploadNotFoundError:
            raise InvalidBodyError(
                "there is no such file, or not any more", value=file_id, allowed="the id of an uploaded file",
                fix="Upload it again", param=place,
            ) from None  # fmt: skip
        if record.purpose != "fine-tune" or record.status == "error":
            raise InvalidBodyError(
                "this file can't be trained on", value=f"{record.purpose}, {record.status}",
                allowed="a file of the purpose fine-tune that was read without an error",
                fix="Upload a training file with the purpose fine-tune, and name its id", param=place,
            )  # fmt: skip
        return record

    def _job_to_go_on_from(self, fusion: JobFusion, source: ModelSource) -> Job | None:
        if fusion.resume_from is None:
            return None
        checkpoint = self.store.jobs.checkpoint(fusion.resume_from)
        if checkpoint is None:
            raise InvalidBodyError(
                "there is no such checkpoint", value=fusion.resume_from,
                allowed="an id of GET /v1/fine_tuning/jobs/{id}/checkpoints",
                fix="Name one of these, or leave 'fusion.resume_from' out", param="fusion.resume_from",
            )  # fmt: skip
        job = self.store.jobs.get(checkpoint.job_id)
        if job.model != source.model_id:
            raise InvalidBodyError(
                "the checkpoint was trained from another model", value=source.model_id, allowed=job.model,
                fix="Name that model, or leave 'fusion.resume_from' out", param="model",
            )  # fmt: skip
        return job

    def _find(self, name: str, info: ModelInfo) -> _Found:
        if name == info.model_id:
            return _Found(name, None, None, is_base=True)
        try:
            return _Found(name, self.published_as(name), None)
        except ModelNotFoundError as error:  # a checkpoint that nobody has chatted with is not published
            return _Found(name, None, error)

    def _source(self, found: _Found) -> ModelSource:
        base = _own_model(self.settings)
        if found.is_base:
            return ModelSource(found.name, base)
        if found.published is not None and found.published.id == found.name:
            return ModelSource(found.name, {**base, "start_from": str(found.published.folder)})
        checkpoint = self.store.jobs.checkpoint_of_model(found.name)
        if checkpoint is not None and _base_of(self.store.jobs.get(checkpoint.job_id)) == base:
            return ModelSource(found.name, {**base, "start_from": checkpoint.path})
        raise found.error or ModelNotFoundError(
            "there is no such model to train", value=found.name,
            allowed="the model that is served, a fine-tuned one or a checkpoint of one",
            fix="GET /v1/models lists the models, .../checkpoints those of a job", param="model",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Found:
    """What the server knows under a name; error: why it knows none."""

    name: str
    published: PublishedModel | None
    error: ModelNotFoundError | None
    is_base: bool = False


def _check_same_recipe(recipe: TrainConfig, earlier: Job) -> None:
    """As the trainer will: raises InvalidBodyError where a run can't be gone on with."""
    before = parse_config(earlier.config)
    if recipe.fingerprint() == before.fingerprint():
        return
    now, then = recipe.model_dump(mode="json"), before.model_dump(mode="json")
    changed = [key for key in sorted(now) if now[key] != then[key] and key not in TrainConfig.HARMLESS]
    raise InvalidBodyError(
        "a run goes on only as it began", value="; ".join(f"{key}: {now[key]}" for key in changed)[:500],
        allowed="; ".join(f"{key}: {then[key]}" for key in changed)[:500],
        fix="Ask for the same as its job, or train the checkpoint's model instead: name it as 'model'",
        param="fusion.resume_from",
    )  # fmt: skip


def echo(fusion: JobFusion) -> dict[str, Any]:
    """The `fusion` object as the job shows it: what was given, and null for the rest."""
    given = fusion.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return {name: given.get(name, _plain(field.default)) for name, field in JobFusion.model_fields.items()}


def _plain(default: Any) -> Any:
    return default if isinstance(default, int | bool) else None


def _base_of(job: Job) -> Mapping[str, str]:
    return {name: job.config[name] for name in _BASE_KEYS if job.config.get(name) is not None}


def _own_model(settings: Settings) -> Mapping[str, str]:
    """Of the server's own settings; a folder becomes absolute, since a worker stands elsewhere."""
    named = {name: getattr(settings, name) for name in _BASE_KEYS}
    return {
        key: str(Path(value).absolute()) if Path(value).exists() else value
        for key, value in named.items()
        if value is not None
    }
