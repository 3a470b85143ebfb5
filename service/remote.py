"""Remote images: a URL -> the bytes behind it, by the one path that leads out of this server.

In: a URL that a client named. Out: bytes, undecoded, never more than the limit. Each hop is parsed, listed, resolved
once and checked, and the very address that was checked is dialled, so that a name which changes its answer gains
nothing. It refuses proxies, cookies, credentials, compression and more than three redirects.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin

import h11

from model_core.errors import DualVisionError
from service.addresses import Address, AllowedHosts, Target, check_addresses, is_public, parse_url, refuse
from service.errors import ImageDownloadError, ImageFileTooLargeError

#: (host, port) -> every address of it, each with the port to dial.
Resolve = Callable[[str, int], Awaitable[Sequence[tuple[Address, int]]]]
#: Told of bytes as they arrive; may raise.
Count = Callable[[int], None]

_MAX_REDIRECTS = 3
_MAX_AT_ONCE = 32
_CHUNK_BYTES = 65_536
#: Headers and the framing of chunks come on top of the picture.
_OVERHEAD_BYTES = 262_144
#: Parsing is work of the event loop, so an answer in crumbs costs others their time: so many events are free, then each
#: must bring so many bytes.
_FREE_EVENTS = 1024
_BYTES_PER_EVENT = 512
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


async def resolve_host(host: str, port: int) -> list[tuple[Address, int]]:
    """The system's resolver, in a thread of the event loop's own pool."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]), port) for *_, sockaddr in found]


@dataclass(frozen=True, slots=True)
class _Answer:
    """Either a redirect's `location` or the `body`."""

    location: str | None
    body: bytes


class RemoteImages:
    """Fetches images from listed hosts. Belongs to one event loop.

    `resolve`, `is_allowed_address` and `ssl_context` are for tests, which have nothing but loopback to listen on.
    """

    def __init__(
        self,
        hosts: AllowedHosts,
        max_bytes: int,
        *,
        seconds: float = 5.0,
        resolve: Resolve = resolve_host,
        is_allowed_address: Callable[[Address], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts, self._max_bytes, self._seconds = hosts, max_bytes, seconds
        self._resolve, self._is_allowed_address = resolve, is_allowed_address
        # Made once: reading the system's certificates takes tens of milliseconds.
        self._ssl_context = ssl_context or (None if hosts.is_empty else ssl.create_default_context())
        self._slots = asyncio.Semaphore(_MAX_AT_ONCE)

    @property
    def is_on(self) -> bool:
        return not self._hosts.is_empty

    def check(self, url: str) -> Target:
        """What can be refused without a lookup. Raises InvalidImageUrlError."""
        target = parse_url(url)
        self._hosts.check(target)
        if target.address is not None:
            check_addresses([target.address], self._is_allowed_address)
        return target

    async def fetch(self, url: str, count: Count) -> bytes:
        """The whole download within the time limit, redirects included.

        Raises:
            InvalidImageUrlError: this URL, or one that it redirects to, may not be fetched.
            ImageDownloadError: no picture came in time. ImageFileTooLargeError: more than the limit came.
        """
        self.check(url)
        async with self._slots:
            try:
                async with asyncio.timeout(self._seconds):
                    return await self._follow(url, count)
            except TimeoutError:
                raise _failed(f"no whole picture within {self._seconds:g} s") from None

    async def _follow(self, url: str, count: Count) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            answer = await self._get(self.check(url), count)
            if answer.location is None:
                return answer.body
            url = _join(url, answer.location)
        raise _failed(f"more than {_MAX_REDIRECTS} redirects")

    async def _get(self, target: Target, count: Count) -> _Answer:
        try:
            async with self._connection(target) as (reader, writer):
                return await _Exchange(reader, writer, self._max_bytes, count).run(target)
        except ssl.SSLError:
            raise _failed("its certificate or TLS is not in order") from None
        except (OSError, EOFError) as error:
            raise _failed("the connection failed") from error
        except h11.ProtocolError:
            raise _failed("the answer is not whole or not HTTP/1.1") from None

    @contextlib.asynccontextmanager
    async def _connection(
        self, target: Target
    ) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
        dialled = await self._dial(await self._addresses(target))
        try:
            tls = self._ssl_context if target.scheme == "https" else None
            # The certificate is checked against the name, though an address was dialled.
            name = target.host if tls is not None else None
            reader, writer = await asyncio.open_connection(sock=dialled, ssl=tls, server_hostname=name)
        except BaseException:
            dialled.close()
            raise
        try:
            yield reader, writer
        finally:
            # Not `close`: that would wait for the other side's goodbye, which may never come.
            writer.transport.abort()

    async def _addresses(self, target: Target) -> Sequence[tuple[Address, int]]:
        try:
            found = await self._resolve(str(target.address or target.host), target.port)
        except (OSError, UnicodeError):
            raise _failed("its host name is not known") from None
        check_addresses([address for address, _ in found], self._is_allowed_address)
        return found

    async def _dial(self, found: Sequence[tuple[Address, int]]) -> socket.socket:
        """A connection to the first of these addresses that takes one; no name is looked up any more."""
        loop = asyncio.get_running_loop()
        failure: OSError = OSError("no address")
        for address, port in found:
            one = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
            try:
                one.setblocking(False)
                await loop.sock_connect(one, (str(address), port))
            except OSError as error:
                one.close()
                failure = error
            except BaseException:
                one.close()
                raise
            else:
                return one
        raise failure


class _Exchange:
    """One GET on one connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: int, count: Count
    ) -> None:
        self._reader, self._writer, self._max_bytes, self._count = reader, writer, max_bytes, count
        self._http = h11.Connection(h11.CLIENT)
        self._left = 2 * max_bytes + _OVERHEAD_BYTES
        self._num_events = self._num_bytes = 0

    async def run(self, target: Target) -> _Answer:
        headers = [
            ("host", target.authority), ("accept", "image/*"), ("accept-encoding", "identity"),
            ("user-agent", "dual-vision-encoder"), ("connection", "close"),
        ]  # fmt: skip
        request = h11.Request(method="GET", target=target.target, headers=headers)
        self._writer.write((self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        await self._writer.drain()
        response = await self._event()
        while isinstance(response, h11.InformationalResponse):
            response = await self._event()
        if not isinstance(response, h11.Response):
            raise _failed("the answer is not whole or not HTTP/1.1")
        told = {bytes(name): bytes(value) for name, value in response.headers}
        if response.status_code in _REDIRECTS:
            return _Answer(told.get(b"location", b"").decode("ascii", "replace"), b"")
        self._check_head(response.status_code, told)
        return _Answer(None, await self._body())

    def _check_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        if status != 200:
            raise _failed(f"the answer has status {status}")
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise _failed("the answer is compressed, which was not asked for")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind in (b"text/html", b"application/xhtml+xml"):
            raise _failed("the answer is a web page")
        length = headers.get(b"content-length", b"")
        if length.isdigit():
            self._check_size(int(length))

    async def _body(self) -> bytes:
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            self._check_size(len(body) + len(event.data))
            self._count(len(event.data))
            body += event.data
        return bytes(body)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ImageFileTooLargeError(
                "the remote image file is too large",
                value=f"at least {num_bytes} bytes",
                allowed=f"at most {self._max_bytes} bytes",
                fix="Scale it down or compress it",
            )

    async def _event(self) -> object:
        """The next event of the response; what comes beyond any honest size, or in crumbs, is cut off."""
        self._num_events += 1
        if self._num_events > _FREE_EVENTS + self._num_bytes // _BYTES_PER_EVENT:
            raise _failed("the answer comes in crumbs")
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._reader.read(_CHUNK_BYTES)
            self._left -= len(data)
            self._num_bytes += len(data)
            if self._left < 0:
                raise _failed("the answer does not end")
            self._http.receive_data(data)
        return event


def _join(url: str, location: str) -> str:
    """What a redirect names, still to be checked like any other URL."""
    try:
        # A fragment is the browser's business; everything else odd is refused by the parser.
        return urljoin(url, location).partition("#")[0] if location.isprintable() and location else ""
    except ValueError:
        raise refuse("a redirect names something that is no URL") from None


def _failed(why: str) -> DualVisionError:
    return ImageDownloadError(
        "the image could not be downloaded", value=why, allowed="a picture at a public URL that answers in time",
        fix="Check the URL, or send the picture itself as a data URL",
    )  # fmt: skip
