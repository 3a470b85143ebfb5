"""Images by every road into a server: remote URLs, uploaded files, frames of a video; what counts and refuses them."""

import base64
import ipaddress
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from model_core.types import VideoPart
from service.addresses import AllowedHosts
from service.remote import RemoteImages
from tests.service.conftest import LiveServer, ask, image_part, run_server
from tests.service.fakes import PNG, FakeEngine
from tests.service.test_bad_input import CHAT, check
from tests.service.test_disconnect import send


class Site(ThreadingHTTPServer):
    """Pictures on loopback. `/slow` answers when `go` is set; `/gone` is missing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Pictures)
        self.paths: list[str] = []
        self.asked, self.go = threading.Event(), threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that left is no news."""


class Pictures(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.asked.set()
        if self.path == "/slow":
            self.server.go.wait(20)
        body = b"x" * 5000 if self.path == "/big" else b"" if self.path == "/empty" else PNG
        self.send_response(404 if self.path == "/gone" else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not in the tests' output."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    found = Site()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.go.set()
    found.shutdown()
    found.server_close()
    thread.join(10)


def to_loopback(site: Site, max_bytes: int) -> RemoteImages:
    async def resolve(_: str, __: int) -> list:
        return [(ipaddress.ip_address("127.0.0.1"), site.server_port)]

    hosts = AllowedHosts.parse("http://*.test")
    return RemoteImages(hosts, max_bytes, resolve=resolve, is_allowed_address=lambda _: True)


@pytest.fixture(scope="module")
def live(site: Site) -> Iterator[LiveServer]:
    with run_server(FakeEngine(), remote=to_loopback(site, 1000), max_image_bytes=1000, max_images=4) as server:
        yield server


def url_part(path: str, host: str = "a.test") -> dict:
    return {"type": "image_url", "image_url": {"url": f"http://{host}{path}"}}


def post(live: LiveServer, *content: dict, path: str = CHAT, **more: object):
    body = {"model": "fake/model:1", "messages": [{"role": "user", "content": [*content]}], **more}
    return live.http.post(path, json=body)


@pytest.mark.parametrize("path", [CHAT, "/v1/fusion/analyze", "/v1/encoders/compare"])
def test_remote_images_reach_the_engine_and_each_is_fetched_once(live: LiveServer, site: Site, path: str) -> None:
    site.paths.clear()
    num_seen = len(live.engine.seen)
    before = live.metric('dve_preprocess_seconds_count{stage="download"}')
    response = post(live, url_part("/1"), image_part(PNG + b"2"), url_part("/1"), url_part("/3"), path=path)
    assert response.status_code == 200, response.text
    assert sorted(site.paths) == ["/1", "/3"]
    request = live.engine.seen[-1]
    assert [part.image for part in request.messages[0].parts] == [PNG, PNG + b"2", PNG, PNG]
    spent = [request.fetch_seconds for request in live.engine.seen[num_seen:]]
    assert spent[0] > 0 and not any(spent[1:]), "counted once, however many requests come of it"
    assert live.metric('dve_preprocess_seconds_count{stage="download"}') == before + 1


def test_remote_images_in_a_stream(live: LiveServer) -> None:
    response = post(live, url_part("/1"), stream=True)
    assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
    check(
        post(live, url_part("/gone"), stream=True),
        400,
        "failed_to_download_image",
        "messages[0].content[0].image_url.url",
    )


@pytest.mark.parametrize(
    ("path", "code"),
    [("/gone", "failed_to_download_image"), ("/big", "image_file_too_large"), ("/empty", "empty_image_file")],
)
def test_downloads_that_fail(live: LiveServer, path: str, code: str) -> None:
    before = live.metric(f'dve_media_rejected_total{{reason="{code}"}}')
    error = check(post(live, url_part("/1"), url_part(path)), 400, code, "messages[0].content[1].image_url.url")
    assert "127.0.0.1" not in error["message"] and "a.test" not in error["message"]
    assert live.metric(f'dve_media_rejected_total{{reason="{code}"}}') == before + 1


def test_hosts_off_the_list_are_not_asked(live: LiveServer, site: Site) -> None:
    # A path of its own: a download that the test before gave up may still arrive.
    for part in (url_part("/1", "elsewhere.example"), {"type": "input_image", "image_url": "https://a.test:8443/x"}):
        error = post(live, url_part("/unasked"), part).json()["error"]
        assert error["code"] == "invalid_image_url" and error["param"].startswith("messages[0].content[1].image_url")
    assert "/unasked" not in site.paths and "/x" not in site.paths


def test_remote_bytes_have_no_room_that_bodies_do_not_have(site: Site) -> None:
    limits = {"max_body_bytes": 2048, "max_waiting_bytes": 2048, "max_image_bytes": 1024}
    with run_server(FakeEngine(), remote=to_loopback(site, 9000), **limits) as live:
        body = {"model": "fake/model:1", "messages": [{"role": "user", "content": [url_part("/1")]}]}
        body["metadata"] = {"pad": ""}
        for pad in range(3):  # metadata of up to 512 characters each
            body["metadata"][f"pad{pad}"] = "x" * 512
        body["metadata"]["pad"] = "x" * (2040 - len(json.dumps(body, separators=(",", ":"))))
        # The body alone has room, and so has the picture; together they have not.
        response = live.http.post(CHAT, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "server_overloaded")
        assert live.metric("dve_waiting_body_bytes") == 0, "given back"
        # More than any request may have is no passing trouble.
        check(post(live, url_part("/big")), 400, "image_file_too_large", "messages[0].content[0].image_url.url")
        assert post(live, url_part("/1")).status_code == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_leaving_during_a_download(site: Site, is_stream: bool) -> None:
    with run_server(FakeEngine(), remote=to_loopback(site, 1000), max_num_seqs=1, max_waiting=0) as live:
        site.asked.clear()
        messages = [{"role": "user", "content": [url_part("/slow")]}]
        with closing(send(live, stream=is_stream, messages=messages)):
            assert site.asked.wait(10)
            assert live.chat().status_code == 503, "the only place is taken"
        for _ in range(1000):  # its place is free as soon as the server has seen the end of the connection
            if live.chat().status_code == 200:
                break
        else:
            pytest.fail("the place was never freed")
        assert all(part.text for request in live.engine.seen for part in request.messages[0].parts)


def data_url(data: bytes = PNG) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def video(*frames: object, **more: object) -> dict:
    return {"type": "video", "video": list(frames), **more}


def test_a_video_is_one_part_of_many_frames(live: LiveServer) -> None:
    upload = live.http.post("/v1/fusion/analyze", files={"file": ("x.png", PNG + b"4")}).json()["file_id"]
    frames = [data_url(PNG + b"1"), image_part(PNG + b"2"), url_part("/3"), {"type": "input_image", "file_id": upload}]
    response = post(live, {"type": "text", "text": "what"}, video(*frames, fps=4, detail="low"))
    assert response.status_code == 200, response.text
    assert len(response.json()["fusion"]) == 1
    part = live.engine.seen[-1].messages[0].parts[1]
    assert part == VideoPart((PNG + b"1", PNG + b"2", PNG, PNG + b"4"), 4.0, "low")
    streamed = post(live, video(data_url()), image_part(), stream=True, stream_options={"include_usage": True})
    assert streamed.status_code == 200 and streamed.text.count('"fusion":[{') == 2
    assert live.engine.seen[-1].messages[0].parts[0] == VideoPart((PNG,), 2.0, "auto")


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        (video(), "invalid_value", "video"),
        ({"type": "video"}, "invalid_value", "video"),
        ({"type": "video", "video": "clip.mp4"}, "invalid_value", "video"),
        (video(data_url(), fps=0), "invalid_value", "fps"),
        (video(data_url(), fps="2"), "invalid_value", "fps"),
        (video(data_url(), fps=1e9), "invalid_value", "fps"),
        (video(data_url(), detail="huge"), "invalid_value", "detail"),
        (video(data_url(), 7), "invalid_value", "video[1]"),
        (video({"type": "text", "text": "x"}), "invalid_value", "video[0].type"),
        (video(data_url(), video(data_url())), "invalid_value", "video[1].type"),
        (video(image_part(detail="low")), "invalid_value", "video[0].detail"),
        (video(data_url(), "file:///etc/passwd"), "invalid_image_url", "video[1]"),
        (video(data_url(), "data:image/png;base64,@"), "invalid_base64_image", "video[1]"),
        (video(image_part(), image_part(b"")), "empty_image_file", "video[1].image_url.url"),
        (video(*[data_url()] * 5), "invalid_value", None),
    ],
)
def test_videos_that_are_refused(live: LiveServer, part: dict, code: str, param: str | None) -> None:
    where = "messages" if param is None else f"messages[0].content[0].{param}"
    check(post(live, part), 400, code, where)


def test_unknown_keys_inside_parts_are_named(live: LiveServer) -> None:
    frame = image_part() | {"uuid": "x"}
    response = post(live, video(frame, nframes=3), {"type": "image_file", "image_file": {"file_id": "x", "y": 1}})
    assert response.status_code == 404
    response = post(live, video(frame, nframes=3))
    expected = "messages[0].content[0].nframes, messages[0].content[0].video[0].uuid"
    assert response.headers["x-dve-ignored"] == expected


@pytest.fixture
def file_id(live: LiveServer) -> str:
    response = live.http.post("/v1/fusion/analyze", files={"file": ("x.png", PNG + b"up")}, data={"question": "a?"})
    assert response.status_code == 200, response.text
    return response.json()["file_id"]


def test_an_uploaded_picture_is_kept_for_other_questions(live: LiveServer, file_id: str) -> None:
    for part in (
        {"type": "image_file", "image_file": {"file_id": file_id, "detail": "low"}},
        {"type": "input_image", "file_id": file_id, "detail": "low"},
    ):
        assert post(live, part).status_code == 200
        image = live.engine.seen[-1].messages[0].parts[0]
        assert (image.image, image.detail) == (PNG + b"up", "low")
    found = live.http.get("/fusion-weights", params={"file_id": file_id}).json()
    assert (found["object"], found["file_id"], found["images"][0]["qwen_weight"]) == ("fusion.analysis", file_id, 0.75)
    assert live.engine.seen[-1].encode_only


def test_comparing_an_upload(live: LiveServer) -> None:
    response = live.http.post("/v1/encoders/compare", files={"file": ("x", PNG)}, data={"question": "a fox?"})
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["answers"]["fused"]["content"] == "a red fox"
    assert live.http.get("/fusion-weights", params={"file_id": found["file_id"]}).status_code == 200
    assert live.engine.seen[-2].messages[0].parts[-1].text == "a fox?"


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_file", "image_file": {"file_id": "file-no"}}, "image_file.file_id"),
        ({"type": "input_image", "file_id": "../../etc/passwd"}, "file_id"),
        (video({"type": "input_image", "file_id": "file-no"}), "video[0].file_id"),
    ],
)
def test_files_that_are_not_there(live: LiveServer, part: dict, param: str) -> None:
    check(post(live, part), 404, "file_not_found", f"messages[0].content[0].{param}")
    check(live.http.get("/fusion-weights?file_id=file-no"), 404, "file_not_found", "file_id")


@pytest.mark.parametrize("part", [{}, {"image_url": data_url(), "file_id": "x"}])
def test_an_image_part_that_refers_to_nothing_or_to_two_things(live: LiveServer, part: dict) -> None:
    check(post(live, {"type": "input_image", **part}), 400, "invalid_value", "messages[0].content[0].image_url")


def test_one_question_at_a_time(live: LiveServer) -> None:
    check(live.http.get("/fusion-weights?file_id=x&request_id=y"), 400, "invalid_value", "file_id")


def test_pictures_and_stages_are_counted(start: Callable[..., LiveServer]) -> None:
    live = start(FakeEngine(counters={"encoder_batches": {"qwen": {2: 3}}}))
    for _ in range(2):
        live.chat(images=2)
    assert live.metric("dve_image_pixels_count") == 4
    assert live.metric("dve_image_pixels_sum") == 4 * 4096
    assert live.metric('dve_preprocess_seconds_count{stage="resize"}') == 2
    for _ in range(2):  # a second look counts nothing twice
        assert live.metric('dve_encoder_batch_images_count{encoder="qwen"}') == 3
        assert live.metric('dve_encoder_batch_images_sum{encoder="qwen"}') == 6
    assert live.chat(images=0).status_code == 200
    assert live.metric("dve_image_pixels_count") == 4


def test_remote_images_are_off_by_default(shared: LiveServer) -> None:
    body = ask() | {"messages": [{"role": "user", "content": [url_part("/1")]}]}
    error = check(shared.http.post(CHAT, json=body), 400, "invalid_image_url", "messages[0].content[0].image_url.url")
    assert "remote images are off" in error["message"]
