"""A route whose handler takes the request and gives the answer, with nothing of FastAPI's in between.

In: a coroutine from a Request to a Response. Out: a route in the OpenAPI document like any other. It refuses
parameters: FastAPI's resolving of them, even of none, was a tenth of a chat's way through this server.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response


class DirectRoute(APIRoute):
    """For `APIRouter(route_class=DirectRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint
