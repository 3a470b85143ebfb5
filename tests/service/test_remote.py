"""Rows 3 and 5 of the hostile inputs, against real listeners on loopback that only a test may reach."""

import asyncio
import ipaddress
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from model_core.errors import DualVisionError, InvalidImageUrlError, OverloadedError
from service.addresses import AllowedHosts, is_public
from service.errors import ImageDownloadError, ImageFileTooLargeError
from service.remote import RemoteImages

#: A self-signed certificate of pictures.test with its key: worth nothing, trusted by these tests alone.
CERTIFICATE = Path(__file__).with_name("pictures.test.pem")
LOOPBACK = ipaddress.ip_address("127.0.0.1")
PICTURE = b"\x89PNG and so on"


def answer(body: bytes = PICTURE, status: str = "200 OK", **headers: str) -> bytes:
    told = {"content-length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in told.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Site:
    """A listener that answers each path from `pages`: bytes to send, or a coroutine that talks by itself."""

    def __init__(self, pages: dict[str, bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]]) -> None:
        self.pages, self.requests, self.names, self.num_open = pages, [], [], 0
        self.answers = [LOOPBACK]
        self.closed = asyncio.Event()

    async def __aenter__(self) -> "Site":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(CERTIFICATE)
        self._servers = [
            await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context) for context in (None, tls)
        ]
        self.ports = dict(zip((80, 443), (s.sockets[0].getsockname()[1] for s in self._servers), strict=True))
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()

    async def resolve(self, host: str, port: int) -> list:
        self.names.append((host, port))
        return [(address, self.ports[port]) for address in self.answers]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head.decode())
            page = self.pages[head.split(b" ")[1].decode()]
            if isinstance(page, bytes):
                writer.write(page)
                await writer.drain()
            else:
                await page(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            self.num_open -= 1
            self.closed.set()


def fetch(
    site_pages: dict,
    url: str = "http://pictures.test/x",
    *,
    answers: list | None = None,
    count: Callable[[int], None] = lambda _: None,
    hosts: str = "http://*",
    trusted: bool = True,
    allow_loopback: bool = True,
    seconds: float = 5.0,
    max_bytes: int = 1000,
) -> tuple[bytes | DualVisionError, Site]:
    """What came, or the error; and the site, to see what it was asked."""

    async def run() -> tuple[bytes | DualVisionError, Site]:
        async with Site(site_pages) as site:
            site.answers = answers or site.answers
            remote = RemoteImages(
                AllowedHosts.parse(hosts),
                max_bytes,
                seconds=seconds,
                resolve=site.resolve,
                is_allowed_address=lambda a: is_public(a) or (allow_loopback and a == LOOPBACK),
                ssl_context=ssl.create_default_context(cafile=str(CERTIFICATE)) if trusted else None,
            )
            try:
                return await remote.fetch(url, count), site
            except DualVisionError as error:
                return error, site

    return asyncio.run(run())


def test_a_picture_comes_with_nothing_told_about_us() -> None:
    counted = []
    found, site = fetch({"/x?a=1": answer()}, "http://pictures.test/x?a=1#f", count=counted.append)
    assert found == PICTURE and sum(counted) == len(PICTURE)
    head = site.requests[0].lower()
    assert head.startswith("get /x?a=1 http/1.1\r\n") and "host: pictures.test\r\n" in head
    assert "accept-encoding: identity" in head and "cookie" not in head and "authorization" not in head


@pytest.mark.parametrize(
    "page",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + PICTURE,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n\x89PN\r\na\r\nG and so o\r\n1\r\nn\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(content_type="text/plain", content_encoding="identity"),
        b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE,
    ],
)
def test_other_framings(page: bytes) -> None:
    assert fetch({"/x": page})[0] == PICTURE


def test_tls_is_checked_against_the_name_though_an_address_is_dialled() -> None:
    found, site = fetch({"/x": answer()}, "https://pictures.test/x")
    assert found == PICTURE and site.names == [("pictures.test", 443)]
    for url, trusted in (("https://other.test/x", True), ("https://pictures.test/x", False)):
        refused, site = fetch({"/x": answer()}, url, trusted=trusted)
        assert isinstance(refused, ImageDownloadError) and "TLS" in str(refused)
        assert site.requests == []


@pytest.mark.parametrize(
    "page",
    [
        answer(status="404 Not Found"), answer(status="500 No"), answer(status="204 No Content"),
        answer(status="206 Partial Content"), answer(status="304 Not Modified", body=b""),
        answer(content_type="text/html; charset=utf-8"), answer(content_encoding="gzip"), answer(content_encoding="br"),
        b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nshort", b"", b"SSH-2.0-OpenSSH\r\n", b"\0" * 300_000,
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000, b"HTTP/1.1 103 E\r\n\r\n" * 50_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
)  # fmt: skip
def test_what_is_no_picture(page: bytes) -> None:
    found, site = fetch({"/x": page})
    assert isinstance(found, ImageDownloadError), found
    assert "127.0.0.1" not in str(found) and "pictures.test" not in str(found)
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    "page",
    [
        answer(b"x" * 1001), b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000,
    ],
)  # fmt: skip
def test_too_many_bytes(page: bytes) -> None:
    assert isinstance(fetch({"/x": page})[0], ImageFileTooLargeError)
    assert fetch({"/x": answer(b"x" * 1000)})[0] == b"x" * 1000


def test_an_endless_body_is_cut_off_at_the_limit() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 100)
            await writer.drain()

    counted = []
    assert isinstance(fetch({"/x": endless}, count=counted.append)[0], ImageFileTooLargeError)
    assert sum(counted) <= 1000


@pytest.mark.parametrize(
    ("begin", "crumb"),
    [
        (b"", b"HTTP/1.1 103 E\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
)
def test_an_answer_in_crumbs_is_left(begin: bytes, crumb: bytes) -> None:
    """Parsing 64 KB of them takes the event loop a quarter of a second, and they may go on for ever."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        while True:
            writer.write(crumb * 100)
            await writer.drain()

    assert "crumbs" in str(fetch({"/x": drip}, max_bytes=10**7)[0])


def test_small_chunks_of_an_honest_picture_are_read() -> None:
    body = b"".join(b"200\r\n" + b"x" * 512 + b"\r\n" for _ in range(2000)) + b"0\r\n\r\n"
    page = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body
    assert fetch({"/x": page}, max_bytes=10**7)[0] == b"x" * 512 * 2000


def test_a_head_that_does_not_end_is_left() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"x: " + b"y" * 1000 + b"\r\n")
            await writer.drain()

    assert isinstance(fetch({"/x": endless})[0], ImageDownloadError)


@pytest.mark.parametrize("begin", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200"])
def test_a_slow_server_is_left_in_time(begin: bytes) -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        await asyncio.Event().wait()

    found, _ = fetch({"/x": silent}, seconds=0.05)
    assert isinstance(found, ImageDownloadError) and "0.05 s" in str(found)


def test_the_time_limit_holds_for_all_redirects_together() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        writer.write(answer(b"", "302 Found", location="/x"))

    found, site = fetch({"/x": slow}, seconds=0.15)
    assert "within 0.15 s" in str(found) and len(site.requests) <= 2


def test_a_resolver_that_hangs_or_fails() -> None:
    async def run(resolve: Callable) -> str:
        remote = RemoteImages(AllowedHosts.parse("*"), 100, seconds=0.05, resolve=resolve)
        with pytest.raises(ImageDownloadError) as caught:
            await remote.fetch("https://pictures.test/", lambda _: None)
        return str(caught.value)

    async def hang(*_: object) -> list:
        await asyncio.Event().wait()
        return []

    async def fail(*_: object) -> list:
        raise OSError("no such name in 10.0.0.2's zone")

    assert "within" in asyncio.run(run(hang))
    assert "10.0.0.2" not in asyncio.run(run(fail))


def to(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, location=location)


@pytest.mark.parametrize(
    "location", ["/y", "y", "http://pictures.test/y", "//pictures.test/y", "https://pictures.test/y"]
)
@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
def test_redirects_are_followed(location: str, status: str) -> None:
    found, site = fetch({"/x": to(location, status), "/y": answer()})
    assert found == PICTURE and len(site.names) == 2, "each hop is resolved and checked"


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.9/y", "http://[::1]/y", "file:///etc/passwd", "http://2130706433/", "http://u@pictures.test/y", "",
     "http://pictures.test:8080/y", "http://pictures.test\\@127.0.0.1/", "gopher://pictures.test/", "http://["],
)  # fmt: skip
def test_redirects_to_where_nobody_may_go(location: str) -> None:
    found, site = fetch({"/x": to(location), "/y": answer()})
    assert isinstance(found, InvalidImageUrlError), found
    assert len(site.requests) == 1 and len(site.names) == 1


def test_a_redirect_out_of_the_list_or_down_to_http() -> None:
    for location in ("https://elsewhere.test/y", "http://pictures.test/y"):
        found, site = fetch({"/x": to(location)}, "https://pictures.test/x", hosts="pictures.test")
        assert isinstance(found, InvalidImageUrlError) and len(site.requests) == 1


def test_loops_and_chains_end_after_three_redirects() -> None:
    found, site = fetch({"/x": to("/x")})
    assert isinstance(found, ImageDownloadError) and "3 redirects" in str(found) and len(site.requests) == 4
    chain = {f"/{i}": to(f"/{i + 1}") for i in range(3)} | {"/3": answer()}
    assert fetch(chain, "http://pictures.test/0")[0] == PICTURE


@pytest.mark.parametrize("others", [[], [ipaddress.ip_address("8.8.8.8")]])
def test_a_private_answer_makes_no_connection(others: list) -> None:
    """Also where it stands beside public ones."""
    found, site = fetch({"/x": answer()}, answers=[*others, LOOPBACK], allow_loopback=False)
    assert isinstance(found, InvalidImageUrlError) and site.requests == [] and site.num_open == 0
    assert len(site.names) == 1


def test_the_checked_address_is_dialled_and_no_name_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: an answer that changes between the check and the connection would go unseen."""
    asked = []
    original = asyncio.base_events.BaseEventLoop.getaddrinfo

    async def note(self, host, *args, **more):
        asked.append(host)
        return await original(self, host, *args, **more)

    async def run() -> tuple[bytes, list]:
        async with Site({"/x": answer()}) as site:
            asked.clear()
            monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", note)
            remote = RemoteImages(
                AllowedHosts.parse("http://*"), 100, resolve=site.resolve, is_allowed_address=lambda a: a == LOOPBACK
            )
            return await remote.fetch("http://pictures.test/x", lambda _: None), site.names

    found, names = asyncio.run(run())
    assert (found, names) == (PICTURE, [("pictures.test", 80)])
    assert set(asked) <= {"127.0.0.1"}


def test_a_dead_first_address_is_passed_over() -> None:
    dead = ipaddress.ip_address("127.0.0.2")

    async def run() -> bytes:
        async with Site({"/x": answer()}) as site:

            async def resolve(host: str, port: int) -> list:
                return [(dead, 1), *await site.resolve(host, port)]

            remote = RemoteImages(
                AllowedHosts.parse("http://*"), 100, resolve=resolve, is_allowed_address=lambda _: True
            )
            return await remote.fetch("http://pictures.test/x", lambda _: None)

    assert asyncio.run(run()) == PICTURE


def test_whoever_counts_the_bytes_may_stop_them() -> None:
    def full(_: int) -> None:
        raise OverloadedError("no room")

    assert isinstance(fetch({"/x": answer()}, count=full)[0], OverloadedError)


def test_a_cancelled_download_leaves_no_connection() -> None:
    async def run() -> None:
        reached = asyncio.Event()

        async def silent(writer: asyncio.StreamWriter) -> None:
            reached.set()
            while not writer.transport.is_closing():
                writer.write(b"HTTP/1.1 103 E\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0)

        async with Site({"/x": silent}) as site:
            remote = RemoteImages(
                AllowedHosts.parse("http://*"), 10**9, resolve=site.resolve, is_allowed_address=lambda _: True
            )
            task = asyncio.create_task(remote.fetch("http://pictures.test/x", lambda _: None))
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(site.closed.wait(), 5)
            assert site.num_open == 0

    asyncio.run(run())


def test_off_unless_hosts_are_listed() -> None:
    remote = RemoteImages(AllowedHosts.parse(""), 100)
    assert not remote.is_on
    with pytest.raises(InvalidImageUrlError):
        remote.check("https://pictures.test/x")
