"""What a route is given: the app's parts, reached through the request and never through a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from model_core.types import ChatMessage
from service.engine_client import Admission, EngineClient
from service.fleet import Member
from service.fusion_history import FusionHistory
from service.hot_models import HotModels
from service.media import MediaSource, is_remote
from service.messages import image_references, to_messages
from service.metrics import Metrics
from service.protocol.content import Message
from service.settings import Settings
from service.streaming import until_disconnect
from service.waiting import WaitingBody, WaitingBytes


@dataclass(frozen=True, slots=True)
class AppParts:
    """What the routes work with; made once by create_app, reached through the request."""

    settings: Settings
    client: EngineClient
    models: HotModels
    metrics: Metrics
    history: FusionHistory
    waiting_bytes: WaitingBytes
    media: MediaSource
    now: Callable[[], float]

    async def find_model(self, request: Request, name: str | None) -> Member:
        """Who answers under this name. A model that is not in memory is loaded, within an admission of its own.

        Raises ModelNotFoundError, CheckpointError, ModelTooLargeError, OverloadedError, RequestTimeoutError.
        """
        found = self.models.find(name)
        if isinstance(found, Member):
            return found
        with self.client.admit() as admission:
            return await until_disconnect(request, admission.wait(self.models.load(found)))

    async def read_messages(
        self, admission: Admission, messages: Sequence[Message], body: WaitingBody
    ) -> tuple[ChatMessage, ...]:
        """Fetches remote images, then decodes base64 in the preprocess pool. Raises ImageError, ContextLengthError.

        What is fetched counts as part of the waiting `body`.
        """
        references = image_references(messages)
        self.media.check(references)
        downloads: dict[str, bytes] = {}
        if any(map(is_remote, references)):
            downloads = await admission.fetch(self.media.download(references, body.add))
        info = admission.member.info
        return await admission.in_pool(lambda: to_messages(messages, lambda r: self.media.read(r, downloads), info))


def parts_of(request: Request) -> AppParts:
    return cast(AppParts, request.app.state.parts)


async def _inject(request: Request) -> AppParts:
    # Async, though it awaits nothing: FastAPI runs plain dependencies in a thread each.
    return parts_of(request)


Parts = Annotated[AppParts, Depends(_inject)]
