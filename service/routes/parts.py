"""What a route is given: the app's parts, reached through the request and never through a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from model_core.types import ChatMessage
from service.engine_client import EngineClient
from service.fusion_history import FusionHistory
from service.media import MediaLimits, check_image_count, read_image_url
from service.metrics import Metrics
from service.protocol.chat import Message
from service.settings import Settings
from service.translate import count_images, to_messages
from service.waiting import WaitingBytes


@dataclass(frozen=True, slots=True)
class AppParts:
    """What the routes work with; made once by create_app, reached through the request."""

    settings: Settings
    client: EngineClient
    metrics: Metrics
    history: FusionHistory
    waiting_bytes: WaitingBytes
    now: Callable[[], float]

    @property
    def media_limits(self) -> MediaLimits:
        return MediaLimits(self.settings.max_images, self.settings.max_image_bytes)

    def read_messages(self, messages: Sequence[Message]) -> tuple[ChatMessage, ...]:
        """Decodes base64, so it belongs in the preprocess pool. Raises ImageError, ContextLengthError."""
        limits = self.media_limits
        check_image_count(count_images(messages), limits)
        return to_messages(messages, lambda url, param: read_image_url(url, limits, param), self.client.info)


def parts_of(request: Request) -> AppParts:
    return cast(AppParts, request.app.state.parts)


async def _inject(request: Request) -> AppParts:
    # Async, though it awaits nothing: FastAPI runs plain dependencies in a thread each.
    return parts_of(request)


Parts = Annotated[AppParts, Depends(_inject)]
