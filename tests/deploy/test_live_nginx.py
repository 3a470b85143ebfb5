"""A real nginx with the shipped configuration in front of the server: streams, limits, paths, clients that leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from service.main import build_app
from service.settings import JobSettings, Settings
from tests.deploy.live import until
from tests.service.conftest import LiveServer, ask, run_server
from tests.service.fakes import FakeEngine

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deploy/nginx"
CHAT = "/v1/chat/completions"
needs_nginx = [
    pytest.mark.ops,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed (make test-ops does)"),
]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
    raise AssertionError("nginx did not start")


@contextmanager
def nginx(folder: Path, upstream: str, *, resolver: str = "", **seconds: str) -> Iterator[str]:
    """The shipped files, with this upstream, this folder to write to, and some directives' times shortened."""
    port = free_port()
    config = (SHIPPED / "nginx.conf").read_text()
    config = config.replace("server:8000", upstream).replace("listen 8080", f"listen 127.0.0.1:{port}")
    if resolver:
        config = config.replace("resolver 127.0.0.11 valid=10s", f"resolver {resolver} valid=1s")
    config = config.replace("/tmp/", f"{folder}/").replace("/dev/stdout", f"{folder}/access.log")
    for directive, value in seconds.items():
        config, found = re.subn(rf"{directive} \w+;", f"{directive} {value};", config)
        assert found == 1, directive
    if os.geteuid() == 0:
        config = "user root;\n" + config  # its workers could not write to this folder
    (folder / "nginx.conf").write_text(config)
    shutil.copy(SHIPPED / "proxy.conf", folder)
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
    process = subprocess.Popen(command)
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with run_server(FakeEngine(), max_num_seqs=2, max_waiting=2) as server:
        yield server


@pytest.fixture(scope="module")
def edge(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nginx")
    with nginx(folder, urlsplit(live.url).netloc, client_header_timeout="1s", client_body_timeout="1s") as url:
        yield url


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=20)


def check(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def nginx_mark(test):
    for mark in needs_nginx:
        test = mark(test)
    return test


def test_every_path_but_the_metrics_is_let_through_and_limits_are_the_servers(tmp_path: Path) -> None:
    settings, jobs = Settings(data_dir=tmp_path), JobSettings(data_dir=tmp_path)
    app, _ = build_app(settings, jobs, FakeEngine)
    app.state.parts.desk.store.close()
    config = (SHIPPED / "nginx.conf").read_text()
    exact = set(re.findall(r"location = (\S+) \{ include proxy.conf;", config))
    prefixes = tuple(re.findall(r"location (/\S+) \{ include proxy.conf; \}", config))
    paths = {re.sub(r"\{.*", "x", path) for path in app.openapi()["paths"]}
    assert {path for path in paths if path not in exact and not path.startswith(prefixes)} == {"/metrics"}
    assert f"client_max_body_size {settings.max_body_bytes // 2**20}m;" in config
    # The form around a file is a little more.
    assert f"client_max_body_size {jobs.max_upload_bytes // 2**20 + 1}m;" in config
    assert "client_header_timeout 10s;" in config
    assert "client_body_timeout 10s;" in config
    assert settings.request_timeout_seconds < float(re.search(r"proxy_read_timeout (\d+)s", proxy_conf())[1])


def proxy_conf() -> str:
    return (SHIPPED / "proxy.conf").read_text()


@nginx_mark
def test_whole_answers_and_refusals_pass(edge: str) -> None:
    answer = httpx.post(edge + CHAT, json=ask(images=1), headers={"x-request-id": "abc"}, timeout=20)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "abc")
    assert httpx.get(edge + "/v1/models/fake/model:1@blind").json()["id"] == "fake/model:1@blind"
    check(httpx.post(edge + CHAT, json=ask(temperature=9)), 400, "invalid_value")
    assert httpx.get(edge + "/health/ready").json()["status"] == "ready"


@nginx_mark
@pytest.mark.parametrize(
    "path", ["/metrics", "/openapi.json", "/", "/nowhere", "/v1/chat/completions/", "/v1/../metrics"]
)
def test_other_paths_are_not_there(edge: str, path: str) -> None:
    check(httpx.get(edge + path), 404, "unknown_url")


@nginx_mark
def test_a_stream_passes_event_by_event(live: LiveServer, edge: str) -> None:
    """The first event arrives while the engine is held before the second."""
    with httpx.stream("POST", edge + CHAT, json=ask("forever", stream=True), timeout=20) as answer:
        lines = answer.iter_lines()
        seen = ""
        while '"content":"x"' not in seen:
            seen = next(lines)
        assert live.engine.rows, "it is still being answered"
    live.engine.wait_until(lambda: not live.engine.rows)


@nginx_mark
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_place(live: LiveServer, edge: str, is_stream: bool) -> None:
    before = len(live.engine.aborted)
    body = json.dumps(ask("forever", stream=is_stream)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    with closing(connect(edge)) as connection:
        connection.sendall(head.encode() + body)
        live.engine.wait_until(lambda: live.engine.rows)
    live.engine.wait_until(lambda: len(live.engine.aborted) == before + 1)
    assert not live.engine.rows


@nginx_mark
def test_a_body_over_the_cap_is_refused_before_it_is_sent(live: LiveServer, edge: str) -> None:
    with closing(connect(edge)) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {49 * 2**20}\r\n\r\n".encode()
        )
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


def read_all(connection: socket.socket) -> bytes:
    seen = b""
    try:
        while piece := connection.recv(65536):
            seen += piece
    except ConnectionResetError:
        pass
    return seen


@nginx_mark
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nhost: x\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{",
    ],
)
def test_slow_clients_are_cut_and_never_reach_the_server(live: LiveServer, edge: str, sent: bytes) -> None:
    asked = 'dve_http_requests_total{retry_after="false",route="/v1/chat/completions",status="499"}'
    before = live.metric(asked)
    with closing(connect(edge)) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    assert live.metric(asked) == before


@nginx_mark
def test_headers_over_the_limit_are_refused(edge: str) -> None:
    check(httpx.get(edge + "/v1/models", headers={"x": "y" * 20_000}), 431, "headers_too_large")
    check(httpx.get(edge + "/v1/models?" + "y" * 20_000), 431, "headers_too_large")


@nginx_mark
def test_malformed_requests_are_refused_in_the_shape_of_every_error(edge: str) -> None:
    with closing(connect(edge)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http_request"


@nginx_mark
def test_a_server_that_is_away_is_a_503_that_may_be_retried(tmp_path: Path) -> None:
    with nginx(tmp_path, f"127.0.0.1:{free_port()}") as url:
        answer = httpx.post(url + CHAT, json=ask())
    check(answer, 503, "server_unreachable")
    assert answer.headers["retry-after"] == "1"


@nginx_mark
def test_a_server_that_comes_back_at_another_address_is_found(tmp_path: Path) -> None:
    """As after an upgrade in compose: the name is the same."""
    port, where = free_port(), {"address": "127.0.0.2"}
    with name_server(where) as resolver, ExitStack() as servers:
        for address in ("127.0.0.2", "127.0.0.3"):
            servers.enter_context(who_answers(address, port))
        with nginx(tmp_path, f"server:{port}", resolver=resolver) as url:
            assert httpx.get(url + "/v1/models").text == "127.0.0.2"
            where["address"] = "127.0.0.3"
            seen: list[str] = []
            until(lambda: seen.append(httpx.get(url + "/v1/models").text) or seen[-1] == "127.0.0.3", str(seen), 20)
    assert set(seen) <= {"127.0.0.2", "127.0.0.3"}


@contextmanager
def name_server(where: dict[str, str]) -> Iterator[str]:
    """Docker's, as little of it as nginx asks: every name's one address, as it is now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))

        def answer() -> None:
            while len(asked := one.recvfrom(512)) and asked[0]:
                head = asked[0][:2] + b"\x81\x80" + b"\x00\x01" * 2 + bytes(4)
                found = b"\xc0\x0c\x00\x01\x00\x01" + (1).to_bytes(4) + b"\x00\x04" + socket.inet_aton(where["address"])
                one.sendto(head + asked[0][12:] + found, asked[1])

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{one.getsockname()[1]}"
        one.sendto(b"", one.getsockname())
        thread.join(10)


@contextmanager
def who_answers(address: str, port: int) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(address)))
            self.end_headers()
            self.wfile.write(address.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer((address, port), Handler) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield
        one.shutdown()
        thread.join(10)


@nginx_mark
def test_a_full_servers_own_words_pass(live: LiveServer, edge: str) -> None:
    """Its 503 has its own code: nginx must not put its page in its place."""
    live.engine.hold()
    room = 4
    threads = [
        threading.Thread(target=httpx.post, args=(edge + CHAT,), kwargs={"json": ask(), "timeout": 60})
        for _ in range(room)
    ]
    for thread in threads:
        thread.start()
    live.engine.wait_until(lambda: len(live.engine.rows) == room, 60)
    check(httpx.post(edge + CHAT, json=ask(), timeout=20), 503, "server_overloaded")
    live.engine.release()
    for thread in threads:
        thread.join(60)
