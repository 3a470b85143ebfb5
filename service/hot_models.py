"""Fine-tuned models in memory beside the base: loaded in the background, swapped, and unloaded within a budget.

In: names as clients write them, and a `Registry`. Out: the `Member` that answers under a name. A version is loaded at
its first use, by `load`, or when another version of a model in memory is promoted; meanwhile everybody else is served,
that model's users by its old version. Whoever has begun stays on the version that he began with. Least recently used
models go when room is needed, never one with requests. It refuses to read weights itself and to know HTTP.

Everything here belongs to the event loop but `loader`, which runs in one thread of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from model_core.errors import (
    CheckpointError,
    DualVisionError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from model_core.types import ARMS, ModelInfo
from service.engine_client import EngineClient
from service.errors import ModelTooLargeError
from service.fleet import Member
from service.logs import log_failure, logger
from service.metrics import Metrics
from service.registry import PublishedModel, Registry
from service.variant_loader import KV_SHARE, VariantLoader

ModelStatus = Literal["ready", "loading", "loaded", "failed"]

#: How often models in memory are compared with the registry. Requests don't wait for it: each one looks itself.
_WATCH_SECONDS = 1.0
_MAX_NAMED = 20


@dataclass(slots=True, eq=False)
class _Hot:
    """One version in memory. used: a tick of a clock that only counts uses."""

    id: str
    version: str
    member: Member
    used: int


@dataclass(slots=True)
class _Model:
    """What is known of one id: its versions in memory, the one that answers, and why another one could not."""

    versions: dict[str, _Hot] = field(default_factory=dict)
    serving: _Hot | None = None
    loading: dict[str, asyncio.Task[Member]] = field(default_factory=dict)
    failed: dict[str, DualVisionError] = field(default_factory=dict)
    is_deleted: bool = False


class HotModels:
    """Owns the loader's thread and says who answers under which name."""

    def __init__(
        self,
        registry: Registry,
        client: EngineClient,
        loader: VariantLoader,
        metrics: Metrics,
        *,
        watch_seconds: float = _WATCH_SECONDS,
        on_pool_thread: Callable[[], None] | None = None,
    ) -> None:
        """`on_pool_thread` is called once in the loader's thread, before its first work."""
        self._registry, self._client, self._loader, self._metrics = registry, client, loader, metrics
        self._watch_seconds = watch_seconds
        self._models: dict[str, _Model] = {}
        self._ticks = itertools.count()
        self._room = asyncio.Lock()  # one load at a time, or two would count on the same room
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dve-load", initializer=on_pool_thread)
        self._watching: asyncio.Task[None] | None = None
        client.on_left = self._on_left

    def start(self) -> None:
        for model_id in self._registry.purge_deleted():
            logger.info("%s was deleted: its files are gone", model_id)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        tasks = [task for model in self._models.values() for task in model.loading.values()]
        for task in [*tasks, *([self._watching] if self._watching else [])]:
            task.cancel()
        await asyncio.gather(*tasks, *([self._watching] if self._watching else []), return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # Names

    def published(self) -> Sequence[PublishedModel]:
        """Those of this server's base, the newest first."""
        return [model for model in self._registry.models() if self._is_ours(model)]

    def published_as(self, name: str) -> PublishedModel | None:
        """None: it is the base, or one of its arms. Raises ModelNotFoundError; CheckpointError: it can't be read."""
        info = self._client.info
        model_id = name_without_arm(name)
        if info.model_id in (name, model_id):
            return None
        model = self._registry.find(model_id)
        if model is None:
            raise self._unknown(name)
        if not self._is_ours(model):
            raise ModelNotFoundError(
                "this model was made from another base than the one that is served", value=name,
                allowed=self._known_ids(), fix=f"Serve {model.record.base}", param="model",
            )  # fmt: skip
        return model

    def _is_ours(self, model: PublishedModel) -> bool:
        return f"fp_{model.record.base_fingerprint}" == self._client.info.fingerprint

    def _unknown(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(
            "there is no such model", value=name, allowed=self._known_ids(),
            fix="GET /v1/models lists all", param="model",
        )  # fmt: skip

    def _known_ids(self) -> str:
        base = self._client.info.model_id
        arms = ", ".join(base if arm == "fused" else f"{base}@{arm}" for arm in ARMS)
        ids = [model.id for model in self.published()]
        more = f" and {len(ids) - _MAX_NAMED} more" if len(ids) > _MAX_NAMED else ""
        return ", ".join([arms, *ids[:_MAX_NAMED]]) + more

    # Use

    def find(self, name: str | None) -> Member | PublishedModel:
        """Who answers under this name; a PublishedModel must be loaded first (`load`).

        Raises ModelNotFoundError, CheckpointError, NotReadyError.
        """
        base = self._client.base
        if name is None or name == base.info.model_id:
            return base
        model = self.published_as(name)
        if model is None:
            return base
        hot = self._current(model)
        if hot is not None:
            hot.used = next(self._ticks)
            return hot.member
        known = self._models.get(model.id)
        if known is not None and model.version in known.failed:
            raise _again(known.failed[model.version])
        return model

    def _current(self, model: PublishedModel) -> _Hot | None:
        """The version that answers now: the promoted one, or while that is not in memory the one before."""
        known = self._models.get(model.id)
        if known is None:
            return None
        self._drop_broken(known)
        promoted = known.versions.get(model.version)
        if promoted is not None:
            if known.serving is not None and known.serving is not promoted:
                self._metrics.model_swaps.labels("switched").inc()
            known.serving = promoted
        elif known.serving is not None and model.version not in known.failed:
            self._begin(model)
        return known.serving

    def _drop_broken(self, known: _Model) -> None:
        for hot in [hot for hot in known.versions.values() if hot.member.is_broken]:
            known.failed[hot.version] = CheckpointError("the model's engine broke", fix="Load it again, or roll back")
            self._unload(known, hot, "failed")

    async def load(self, model: PublishedModel, *, again: bool = False) -> Member:
        """Into memory, or wait for whoever does that. `again`: also where it failed before.

        Raises CheckpointError, ModelTooLargeError, OverloadedError: the models in use leave no room.
        """
        known = self._models.setdefault(model.id, _Model())
        known.is_deleted = False  # the registry has just given it
        self._drop_broken(known)  # that of a version which broke a moment ago is not what is asked for
        if again:
            known.failed.pop(model.version, None)
        if model.version not in known.versions:
            return await asyncio.shield(self._begin(model))
        hot = self._current(model)
        return (hot or known.versions[model.version]).member

    def _begin(self, model: PublishedModel) -> asyncio.Task[Member]:
        """One load of a version at a time, whoever asks for it; it goes on if all who asked have left."""
        known = self._models[model.id]
        task = known.loading.get(model.version)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(model, known))
            known.loading[model.version] = task
            # Nobody may be there to ask how it ended; `failed` has it.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _load(self, model: PublishedModel, known: _Model) -> Member:
        try:
            async with self._room:
                budget = self._loader.budget_bytes()
                kv_bytes = budget // KV_SHARE
                self._make_room(model, model.record.num_bytes + kv_bytes, budget)
                loaded = await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._loader.load, model.folder, model.id, kv_bytes
                )
                hot = _Hot(model.id, model.version, Member(loaded.engine, loaded.num_bytes), next(self._ticks))
                known.versions[model.version] = hot
                self._evict(budget, keep=hot)  # it may have turned out larger
        except OverloadedError:
            raise  # nothing is wrong with the model
        except DualVisionError as error:
            known.failed[model.version] = error
            self._metrics.model_swaps.labels("failed").inc()
            log_failure(f"{model.id}: version {model.version} can't be loaded", error)
            raise _again(error) from error
        finally:
            del known.loading[model.version]
        self._metrics.model_swaps.labels("loaded").inc()
        logger.info("%s: version %s is in memory, %d bytes", model.id, model.version, loaded.num_bytes)
        self._settle(model.id, known, hot)
        return hot.member

    def _settle(self, model_id: str, known: _Model, hot: _Hot) -> None:
        """It may have been deleted, or another version promoted, while this one was read."""
        try:
            now = None if known.is_deleted else self._registry.find(model_id)
        except CheckpointError:
            known.serving = known.serving or hot
            return
        if now is None:
            known.is_deleted = True
            self._forget_deleted(model_id, known)
        elif now.version == hot.version or known.serving is None:
            known.serving = hot
        self._publish_metrics()

    # Room

    def _all_hot(self) -> list[_Hot]:
        return [hot for model in self._models.values() for hot in model.versions.values()]

    def _make_room(self, model: PublishedModel, num_bytes: int, budget: int) -> None:
        if num_bytes > budget:
            raise ModelTooLargeError(
                "the model is larger than all the memory for variants", value=f"{num_bytes} bytes",
                allowed=f"{budget} bytes", fix="Raise --variant_memory_bytes",
            )  # fmt: skip
        if not self._evict(budget - num_bytes):
            raise OverloadedError(
                "models in use leave no room for another one", value=model.id, allowed=f"{budget} bytes",
                fix="Retry when requests to them have ended, or raise --variant_memory_bytes",
            )  # fmt: skip

    def _evict(self, max_bytes: int, keep: _Hot | None = None) -> bool:
        """Until what is in memory fits. False: what is left is in use."""
        while sum(hot.member.num_bytes for hot in self._all_hot()) > max_bytes:
            idle = [hot for hot in self._all_hot() if hot.member.num_active == 0 and hot is not keep]
            if not idle:
                return False
            # What is no longer served goes first, then what was not used for the longest time.
            oldest = min(idle, key=lambda hot: (self._models[hot.id].serving is hot, hot.used))
            self._unload(self._models[oldest.id], oldest, "evicted")
        return True

    def _unload(self, known: _Model, hot: _Hot, outcome: str) -> None:
        """Off the list; its memory is free once the last of its requests has ended."""
        known.versions.pop(hot.version, None)
        if known.serving is hot:
            known.serving = None
        self._metrics.model_swaps.labels(outcome).inc()
        logger.info("%s: version %s leaves the memory (%s)", hot.id, hot.version, outcome)
        self._publish_metrics()

    def _publish_metrics(self) -> None:
        serving: list[ModelInfo] = [m.serving.member.info for m in self._models.values() if m.serving is not None]
        self._metrics.set_models([self._client.info, *serving])

    # What an operator does

    def status(self, model: PublishedModel) -> tuple[ModelStatus, ModelInfo | None, DualVisionError | None]:
        """How a model stands, who answers for it now, and what was wrong with its promoted version."""
        known = self._models.get(model.id, _Model())
        info = None if known.serving is None else known.serving.member.info
        if (error := known.failed.get(model.version)) is not None:
            return "failed", info, error
        if model.version in known.versions:
            return "loaded", known.versions[model.version].member.info, None
        return ("loading" if model.version in known.loading else "ready"), info, None

    def unload(self, model: PublishedModel) -> None:
        """Every version out of memory; requests that have begun end as usual."""
        known = self._models.get(model.id)
        if known is not None:
            known.failed.clear()
            for hot in list(known.versions.values()):
                self._unload(known, hot, "unloaded")

    def roll_back(self, model: PublishedModel) -> PublishedModel:
        """The version before answers from now on; at once where it is still in memory."""
        earlier = self._registry.roll_back(model.id)
        self._current(earlier)
        self._publish_metrics()
        return earlier

    def delete(self, name: str) -> None:
        """Nobody finds it from now on; its files go when its last request has ended. Raises ModelNotFoundError."""
        model = self.published_as(name)
        if model is None or model.id != name:
            raise InvalidRequestError(
                "the base and its arms can't be deleted", value=name, allowed="a fine-tuned model's own id",
                fix="Name a fine-tuned model without an arm; GET /v1/models lists them", param="model",
            )  # fmt: skip
        self._registry.delete(model.id)
        known = self._models.setdefault(model.id, _Model())
        known.is_deleted = True
        self._forget_deleted(model.id, known)

    def _forget_deleted(self, model_id: str, known: _Model) -> None:
        known.serving = None
        for hot in [hot for hot in known.versions.values() if hot.member.num_active == 0]:
            self._unload(known, hot, "deleted")
        if not known.versions and not known.loading:
            del self._models[model_id]
            self._registry.purge(model_id)
        self._publish_metrics()

    def _on_left(self, member: Member) -> None:
        if member.num_active:
            return
        for model_id, known in [(i, k) for i, k in self._models.items() if k.is_deleted]:
            if any(hot.member is member for hot in known.versions.values()):
                self._forget_deleted(model_id, known)

    # What other processes do

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._watch_seconds)
            for model_id, known in list(self._models.items()):
                self._look_at(model_id, known)

    def _look_at(self, model_id: str, known: _Model) -> None:
        """Deleted elsewhere, or another version promoted: that is loaded before anybody asks for it."""
        try:
            model = self._registry.find(model_id)
        except CheckpointError as error:
            log_failure(f"{model_id} can't be looked at", error)
            return
        if model is not None and not known.is_deleted:
            self._current(model)
        elif known.versions or not known.loading:
            known.is_deleted = True
            self._forget_deleted(model_id, known)


def name_without_arm(name: str) -> str:
    """The id before an arm's `@`; a name without one is an id."""
    model_id, _, arm = name.rpartition("@")
    return model_id if arm in ARMS[1:] else name


def _again(error: DualVisionError) -> DualVisionError:
    """An error object of one's own: raising one in many requests would grow its traceback."""
    return type(error)(error.what, value=error.value, allowed=error.allowed, fix=error.fix, param=error.param)
