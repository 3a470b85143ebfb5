"""A small client of this server's own API, for `dve jobs`: JSON answers and streams of events, by http.client.

In: a base URL, a key if there is one. Out: JSON objects; an answer that is an error becomes one of ours, in the
server's words. It refuses redirects, and to know what the objects mean.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from model_core.errors import DualVisionError, InvalidRequestError
from service.errors import InvalidBodyError, NotReadyError

_SECONDS = 30.0
_MAX_LINE_BYTES = 1 << 20


class ServerUnreachableError(DualVisionError):
    """Nobody answers at the URL."""

    code = "server_unreachable"


class ApiClient:
    """One server. Every call has a connection of its own. Raises ServerUnreachableError and the server's refusals."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            allowed, fix = "http://HOST:PORT", "Correct --url or DVE_URL"
            raise InvalidRequestError("this is no URL of a server", value=url, allowed=allowed, fix=fix)
        self._url, self._parts = url, parts
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str, query: Mapping[str, object] | None = None) -> dict[str, Any]:
        return self._call("GET", path, query)

    def post(self, path: str) -> dict[str, Any]:
        return self._call("POST", path, None)

    def _call(self, method: str, path: str, query: Mapping[str, object] | None) -> dict[str, Any]:
        connection, response = self._send(method, path, query)
        try:
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        return answer

    def events(self, path: str, query: Mapping[str, object]) -> Iterator[dict[str, Any]]:
        """The objects of a stream until its `[DONE]`. A stream that breaks off raises ServerUnreachableError."""
        connection, response = self._send("GET", path, query)
        try:
            while line := response.readline(_MAX_LINE_BYTES):
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: "):
                    event: dict[str, Any] = json.loads(line[6:])
                    if "error" in event and "object" not in event:
                        raise NotReadyError(
                            str(event["error"].get("message")), value=self._url,
                            fix="Run the command again in a moment; the server's log tells what was wrong",
                        )  # fmt: skip
                    yield event
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            connection.close()
        raise ServerUnreachableError(
            "the stream broke off", value=self._url, allowed="a stream that ends with [DONE]",
            fix="Run the command again; if it breaks off anew, look into the server's log",
        )  # fmt: skip

    def _send(
        self, method: str, path: str, query: Mapping[str, object] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self._connect()
        target = quote(self._parts.path.rstrip("/") + path) + (f"?{urlencode(query)}" if query else "")
        try:
            connection.request(method, target, headers=self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response
            body = response.read(_MAX_LINE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from None
        connection.close()
        raise self._refused(response.status, body)

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=_SECONDS)

    def _unreachable(self, error: Exception) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"no answer from the server ({str(error) or type(error).__name__})", value=self._url,
            fix="Start it with `dve serve`, or name it with --url",
        )  # fmt: skip

    def _refused(self, status: int, body: bytes) -> InvalidBodyError:
        try:
            return InvalidBodyError(str(json.loads(body)["error"]["message"]))  # it says itself what to do
        except (ValueError, KeyError, TypeError):
            return InvalidBodyError(
                f"the server answered {status}", value=self._url, allowed="an answer of `dve serve`",
                fix="Name the server itself with --url, or look into the log of what answers there",
            )  # fmt: skip
