"""What a route is given: the app's parts, reached through the request and never through a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from model_core.errors import ModelNotFoundError
from model_core.types import ChatMessage
from service.admission import Admission
from service.checkpoint_publisher import CheckpointPublisher
from service.engine_client import EngineClient
from service.fleet import Member
from service.fusion_history import FusionHistory
from service.hot_models import HotModels, name_without_arm
from service.job_desk import JobDesk
from service.keys import Caller
from service.media import MediaSource, is_remote
from service.messages import image_references, to_messages
from service.metrics import Metrics
from service.protocol.content import Message
from service.request_limits import RequestLimits
from service.settings import Settings
from service.streaming import until_disconnect
from service.waiting import WaitingBody, WaitingBytes

CHECKPOINT_MARK = ":ckpt-step-"
#: Base64 that takes a quarter of a millisecond.
_LITTLE_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class AppParts:
    """What the routes work with; made once by create_app, reached through the request."""

    settings: Settings
    request_limits: RequestLimits
    client: EngineClient
    models: HotModels
    metrics: Metrics
    history: FusionHistory
    waiting_bytes: WaitingBytes
    media: MediaSource
    desk: JobDesk
    checkpoints: CheckpointPublisher
    now: Callable[[], float]

    async def find_model(
        self, request: Request, name: str | None, give_back: Callable[[], None] = lambda: None
    ) -> Member:
        """Who answers under this name. A model that is not in memory is loaded, within an admission of its own.

        `give_back`: the place that was kept while the body came; a load takes one itself.
        Raises ModelNotFoundError, CheckpointError, ModelTooLargeError, OverloadedError, RequestTimeoutError.
        """
        try:
            found = self.models.find(name)
        except ModelNotFoundError:
            give_back()
            if name is None or not await self.publish_checkpoint(request, name):
                raise
            found = self.models.find(name)
        if isinstance(found, Member):
            return found
        give_back()
        with self.client.admit() as admission:
            return await until_disconnect(request, admission.wait(self.models.load(found)))

    async def publish_checkpoint(self, request: Request, name: str) -> bool:
        """Whether this name, or the one before its `@`, is a job's checkpoint that nobody had asked for yet.

        Raises CheckpointError, StorageFullError.
        """
        model_id = name_without_arm(name)
        if CHECKPOINT_MARK not in model_id:
            return False
        return await until_disconnect(request, self.checkpoints.publish(model_id))

    async def read_messages(
        self, admission: Admission, messages: Sequence[Message], body: WaitingBody, caller: Caller
    ) -> tuple[ChatMessage, ...]:
        """Fetches remote images, then decodes base64, much of it in the preprocess pool.

        What is fetched counts as part of the waiting `body`; uploads are the caller's. Raises ImageError,
        ContextLengthError.
        """
        references = image_references(messages)
        media = self.media.seen_by(caller.key_id)
        media.check(references)
        downloads: dict[str, bytes] = {}
        if any(map(is_remote, references)):
            downloads = await admission.fetch(media.download(references, body.add))
        info = admission.member.info

        def read() -> tuple[ChatMessage, ...]:
            return to_messages(messages, lambda reference: media.read(reference, downloads), info)

        # Little is decoded sooner than a thread is woken.
        if sum(len(reference.value) for reference in references) <= _LITTLE_CHARACTERS:
            return read()
        return await admission.in_pool(read)


def parts_of(request: Request) -> AppParts:
    return cast(AppParts, request.app.state.parts)


async def _inject(request: Request) -> AppParts:
    # Async, though it awaits nothing: FastAPI runs plain dependencies in a thread each.
    return parts_of(request)


Parts = Annotated[AppParts, Depends(_inject)]


def caller_of(request: Request) -> Caller:
    """Who asks, as the gate has found."""
    return cast(Caller, request.state.caller)


async def _inject_caller(request: Request) -> Caller:
    return caller_of(request)


#: Who asks, as the gate has found; see service/auth.py.
CallerOf = Annotated[Caller, Depends(_inject_caller)]
