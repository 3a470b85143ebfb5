"""Who may ask what: an ASGI layer in front of every route, and the table of scopes that it goes by.

In: ASGI. Out: ASGI with `request.state.caller`, or a refusal before a byte of the body is read: 401, 403, or 429 with
the time to come back. What the table does not name takes the stricter scope. It refuses to see bodies: a route whose
scope hangs on one (the purpose of a file) calls `caller.require("training")` itself.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model_core.errors import DualVisionError
from service.errors import InvalidApiKeyError, RateLimitError, error_response
from service.keys import OPEN_CALLER, Caller, KeyRing, KeyScope
from service.limits import KeyLimits
from service.logs import request_id_var
from service.metrics import Metrics

_READ = ("GET", "HEAD")
_ANY: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScopeRule:
    """What a path and everything below it takes, for these methods (none named: for each)."""

    path: str
    methods: tuple[str, ...]
    scope: KeyScope | None

    def covers(self, method: str, path: str) -> bool:
        is_here = path == self.path or path.startswith(f"{self.path}/")
        return is_here and (not self.methods or method in self.methods)


#: The first rule that covers a request decides; None: no key. What no rule covers takes `training`: model loading and
#: deleting, fine-tuning, and whatever route somebody forgot to put here.
RULES: tuple[ScopeRule, ...] = (
    ScopeRule("/health", _READ, None),
    ScopeRule("/ui", _READ, None),
    ScopeRule("/v1/chat/completions", _ANY, "inference"),
    ScopeRule("/v1/models", _READ, "inference"),
    ScopeRule("/v1/fusion", _ANY, "inference"),
    ScopeRule("/v1/encoders", _ANY, "inference"),
    ScopeRule("/fusion-weights", _READ, "inference"),
    # Purpose `vision` needs no more; for any other purpose the route requires `training`.
    ScopeRule("/v1/files", _ANY, "inference"),
)

_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
#: A key in a URL ends up in histories and in other servers' logs.
_KEY_PARAMETERS = frozenset({"api_key", "api-key", "apikey", "key", "access_token", "authorization"})


def scope_of(method: str, path: str, public_paths: Sequence[str]) -> KeyScope | None:
    """What a request takes; None: no key."""
    if path in public_paths and method in _READ:
        return None
    return next((rule.scope for rule in RULES if rule.covers(method, path)), "training")


class KeyGate:
    """Lets a request through under its caller, counted against the limits of its key.

    `host_name`: what the server listens on, which is a name of this machine if it is open. `routes`: to name refused
    requests in logs and metrics as the router would have.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing,
        limits: KeyLimits,
        metrics: Metrics,
        public_paths: Sequence[str],
        host_name: str,
        routes: Sequence[BaseRoute],
    ) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics
        self._public_paths = tuple(public_paths)
        self._own_names = ("localhost", host_name.lower())
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            needed = scope_of(scope["method"], scope["path"], self._public_paths)
            if needed is None:
                await self._app(scope, receive, send)
            else:
                await self._pass(needed, scope, receive, send)
        else:  # no route speaks WebSocket: closed before it is open, which is a 403
            await send({"type": "websocket.close", "code": 1008})

    async def _pass(self, needed: KeyScope, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        try:
            caller = self._authenticate(scope)
            scope.setdefault("state", {})["caller"] = caller
            caller.require(needed)
            try:
                self._limits.enter(caller.key_id)
            finally:
                headers = self._limits.headers(caller.key_id)
        except DualVisionError as error:
            self._note_refusal(scope, error)
            if isinstance(error, InvalidApiKeyError):
                headers = {"www-authenticate": "Bearer"}
            await error_response(error, request_id_var.get(), headers)(scope, receive, send)
            return

        is_running = True

        async def send_with_headers(message: Message) -> None:
            nonlocal is_running
            if headers and message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            elif is_running and message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before the client has the end: its next request must find the place free.
                is_running = False
                self._limits.leave(caller.key_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            if is_running:
                self._limits.leave(caller.key_id)

    def _authenticate(self, scope: Scope) -> Caller:
        """Raises InvalidApiKeyError."""
        headers = Headers(scope=scope)
        if self._keys.is_open:
            self._check_is_local(headers)
            return OPEN_CALLER
        allowed, fix = "Authorization: Bearer KEY", "Ask whoever runs the server for a key"
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if any(name.lower() in _KEY_PARAMETERS for name, _ in query):
            raise InvalidApiKeyError("a key does not belong into a URL", allowed=allowed, fix="Send it as a header")
        sent = headers.getlist("authorization")
        if not sent:
            raise InvalidApiKeyError("no API key was sent", allowed=allowed, fix=fix)
        bearer = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
        if bearer is None:
            raise InvalidApiKeyError("the Authorization header holds no API key", allowed=allowed, fix=fix)
        caller = self._keys.find(bearer[1].encode("latin-1"))
        if caller is None:
            raise InvalidApiKeyError("this server does not know this API key", allowed="one of its own", fix=fix)
        return caller

    def _check_is_local(self, headers: Headers) -> None:
        """An open server is for programs of this machine, not for pages that a browser on it shows.

        Such a page names itself: as the origin, or as the host once its name has been made to point here.
        """
        named = [f"//{host}" for host in headers.getlist("host")] + headers.getlist("origin")
        if not all(self._is_own(url) for url in named):
            raise InvalidApiKeyError(
                "without keys this server answers only under this machine's own names",
                allowed="localhost or a loopback address as Host, and as Origin where there is one",
                fix="Configure API keys to serve others (dve keys create)",
            )

    def _is_own(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname or ""
            return host in self._own_names or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def _note_refusal(self, scope: Scope, error: DualVisionError) -> None:
        if isinstance(error, RateLimitError):
            self._metrics.admission_rejections.labels(error.code).inc()
        matches = [(route, route.matches(scope)[0]) for route in self._routes]
        found = [route for route, match in matches if match == Match.FULL]
        found += [route for route, match in matches if match == Match.PARTIAL]
        if found:
            scope["route"] = found[0]
