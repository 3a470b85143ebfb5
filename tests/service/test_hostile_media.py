"""The table of hostile media, row by row, against a server with the real demo model: exact status and code.

Rows 1 to 5 are also in test_addresses.py and test_remote.py, where no server stands in between.
"""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.service.conftest import LiveServer, run_server
from tests.service.test_bad_input import CHAT

PART = "messages[0].content[0]"
URL = f"{PART}.image_url.url"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    """Remote images are on for any public host: what is refused is refused for what it is."""
    from model_core.encoder import DualVisionEncoder
    from model_core.processing.images import ImageLimits

    encoder = DualVisionEncoder()
    encoder.configure(ImageLimits(max_visual_tokens=80))
    encoder.engine.release = lambda: None
    with run_server(encoder.engine, allowed_media_domains="*, http://*", max_images=8) as server:
        yield server


def encode(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def noise(width: int = 128, height: int = 128, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand: its header need not be true."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (*chunks, (b"IEND", b""))
    )


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def part(url: str, **more: object) -> dict:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def post(live: LiveServer, *content: dict, **more: object) -> httpx.Response:
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "what is this?"}]}]
    return live.http.post(CHAT, json={"model": "dve-demo", "messages": messages, "max_tokens": 1, **more})


def check(response: httpx.Response, status: int, code: str, param: str | None) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
    return error["message"]


PICTURE = encode(noise())
HUGE_BUT_REAL = png(12_000, 12_000, 1, 0, b"\0" * (1501 * 12_000))

BAD_URLS = {
    1: ["http://127.0.0.1/x", "http://127.0.0.1:8000/x", "http://[::1]/", "http://0.0.0.0/", "http://localhost./",
        "http://localhost/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://172.16.0.1/",
        "http://192.168.0.1/", "http://100.64.0.1/", "http://[fd00::1]/", "http://[fe80::1]/"],
    2: ["http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/", "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://224.0.0.1/", "http://[::7f00:1]/"],
    4: ["http://allowed.com\\@127.0.0.1/", "http://user@example.com/", "http://a.com/\r\nx", "http://a.com\t/",
        "https://a.com:8443/", "file:///etc/passwd", "/etc/passwd", "examples/dog.png", "gopher://a.com/", "ftp://a.com/",
        "C:\\x.png", "javascript:alert(1)", "//a.com/x", ""],
}  # fmt: skip


@pytest.mark.parametrize(("row", "url"), [(row, url) for row, urls in BAD_URLS.items() for url in urls])
def test_urls_that_are_refused(live: LiveServer, row: int, url: str) -> None:
    message = check(post(live, part(url)), 400, "invalid_image_url", URL)
    assert len(url) < 9 or url not in message
    check(
        post(live, {"type": "video", "video": [data_url(PICTURE), url]}), 400, "invalid_image_url", f"{PART}.video[1]"
    )


BAD_BYTES = {
    "6 a bomb of 69 bytes": (png(50_000, 50_000, 8, 2, b"\0"), "image_too_large"),
    "6 a real picture of 144 megapixels": (HUGE_BUT_REAL, "image_too_large"),
    "7 its first half": (PICTURE[: len(PICTURE) // 2], "image_parse_error"),
    "7 all but a byte": (PICTURE[:-1], "image_parse_error"),
    "7 its magic alone": (PICTURE[:8], "image_parse_error"),
    "7 a cut JPEG": (encode(noise(), "JPEG")[:-700], "image_parse_error"),
    "7 no image at all": (b"hello, I am a picture", "image_parse_error"),
    "10 SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image_media_type"),
    "10 HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0", "unsupported_image_media_type"),
    "10 PDF": (b"%PDF-1.7\n", "unsupported_image_media_type"),
    "10 PSD": (b"8BPS\0\1", "unsupported_image_media_type"),
    "10 EPS": (b"%!PS-Adobe-3.0 EPSF", "unsupported_image_media_type"),
    "10 TIFF": (encode(noise(), "TIFF"), "unsupported_image_media_type"),
    "10 a web page": (b"<!doctype html><html></html>", "unsupported_image_media_type"),
    "10 a ZIP": (b"PK\3\4", "unsupported_image_media_type"),
    "11 1 x 1": (encode(Image.new("RGB", (1, 1))), "image_too_small"),
    "11 1 x 60000": (encode(Image.new("1", (1, 60_000))), "image_too_large"),
    "11 60000 x 1": (encode(Image.new("1", (60_000, 1))), "image_too_large"),
    "11 0 x 0": (png(0, 0, 8, 2, b""), "image_parse_error"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_refused(live: LiveServer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, code = BAD_BYTES[name]
    if code in ("image_too_large", "image_too_small", "unsupported_image_media_type"):
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    check(post(live, part(data_url(data))), 400, code, PART)
    check(post(live, part(data_url(data)), stream=True), 400, code, PART)
    check(live.http.post("/v1/fusion/analyze", files={"file": ("x.png", data, "image/png")}), 400, code, "file")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,", "empty_image_file"),
        ("data:image/png;base64,@@@@", "invalid_base64_image"),
        ("data:image/png;base64,AAA", "invalid_base64_image"),
        ("data:image/png;base64,AAAA====", "invalid_base64_image"),
        ("data:image/png;base64,_-_-", "invalid_base64_image"),
        ("data:image/png,AAAA", "invalid_base64_image"),
        ("data:", "invalid_base64_image"),
    ],
)
def test_row_7_data_urls(live: LiveServer, url: str, code: str) -> None:
    check(post(live, part(url)), 400, code, URL)


def test_row_10_the_magic_decides_and_not_the_declared_type(live: LiveServer) -> None:
    for kind in ("image/jpeg", "text/html", "application/pdf", ""):
        assert post(live, part(data_url(PICTURE, kind))).status_code == 200


ANIMATED = {
    "GIF": encode(noise().quantize(16), "GIF", save_all=True, append_images=[noise(seed=1).quantize(16)]),
    "WEBP": encode(noise(), "WEBP", save_all=True, append_images=[noise(seed=1)], lossless=True),
    "PNG": encode(noise(), "PNG", save_all=True, append_images=[noise(seed=1)]),
}


@pytest.mark.parametrize("name", ANIMATED)
def test_row_8_animations_are_their_first_frame_and_say_so(live: LiveServer, name: str) -> None:
    first = noise().quantize(16).convert("RGB") if name == "GIF" else noise()
    still = post(live, part(data_url(encode(first)))).json()["fusion"][0]
    moving = post(live, part(data_url(ANIMATED[name]))).json()["fusion"][0]
    assert still["warnings"] == [] and "several frames" in moving["warnings"][0]
    assert moving["qwen_weight"] == still["qwen_weight"], "the same pixels, hence the same features"
    streamed = post(live, part(data_url(ANIMATED[name])), stream=True).text.splitlines()[0]
    assert "several frames" in json.loads(streamed.removeprefix("data: "))["fusion"][0]["warnings"][0]


def grey_ramp() -> np.ndarray:
    return np.linspace(0, 255, 128 * 128).reshape(128, 128).astype(np.uint8)


def sixteen_bit() -> tuple[bytes, Image.Image]:
    ramp = grey_ramp()
    return encode(Image.fromarray(ramp.astype(np.uint16) * 257)), Image.fromarray(ramp).convert("RGB")


def transparent() -> tuple[bytes, Image.Image]:
    image = noise().convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 64, 128))
    white = noise()
    white.paste((255, 255, 255), (0, 0, 64, 128))
    return encode(image), white


def palette() -> tuple[bytes, Image.Image]:
    image = noise().quantize(64)
    return encode(image), image.convert("RGB")


def oriented(orientation: int) -> tuple[bytes, Image.Image]:
    tags = Image.Exif()
    tags[0x0112] = orientation
    upright = noise(112, 140)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's Transpose
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    return encode(stored, exif=tags), upright


@pytest.mark.parametrize(
    "given", [sixteen_bit, transparent, palette, *(lambda n=n: oriented(n) for n in range(1, 9))]
)  # fmt: skip
def test_row_9_colours_and_turns_reach_the_encoders(live: LiveServer, given) -> None:
    """Pixel values are proven in model_core; here, that the server's patches are those of the upright RGB picture."""
    from model_core.types import ChatMessage, GenerationRequest, ImagePart

    def pixels(data: bytes) -> np.ndarray:
        request = GenerationRequest("p", (ChatMessage("user", (ImagePart(data),)),))
        return live.engine.prepare(request).inputs.pixels

    data, upright = given()
    assert np.array_equal(pixels(data), pixels(encode(upright)))
    found = post(live, part(data_url(data)))
    assert found.status_code == 200 and found.json()["fusion"][0]["warnings"] == []


def test_row_9_cmyk(live: LiveServer) -> None:
    red = encode(Image.new("CMYK", (128, 128), (0, 255, 255, 0)), "JPEG", quality=100)
    found = post(live, part(data_url(red))).json()["fusion"][0]["qwen_weight"]
    expected = post(live, part(data_url(encode(Image.new("RGB", (128, 128), (254, 0, 0)))))).json()
    assert found == pytest.approx(expected["fusion"][0]["qwen_weight"], abs=0.02)


def test_detail_sets_the_number_of_image_tokens(live: LiveServer) -> None:
    def tokens(**more: object) -> int:
        usage = post(live, part(data_url(encode(noise(400, 400))), **more)).json()["usage"]
        return usage["prompt_tokens_details"]["multimodal_tokens"]

    counts = {detail: tokens(detail=detail) for detail in ("low", "auto", "high")}
    assert counts == {"low": 25, "auto": 36, "high": 36} and tokens() == 36


def test_a_video_through_the_demo_model(live: LiveServer) -> None:
    frames = [data_url(encode(noise(seed=i))) for i in range(3)]
    clip = {"type": "video", "video": frames, "fps": 1.0}
    found = post(live, clip, part(frames[0])).json()
    assert len(found["fusion"]) == 2
    assert found["usage"]["prompt_tokens_details"]["multimodal_tokens"] == 2 * 25 + 25
    assert post(live, clip | {"detail": "low"}).json()["usage"]["prompt_tokens_details"]["multimodal_tokens"] == 50
    streamed = post(live, clip, stream=True)
    assert streamed.text.count('"fusion":[{') == 1 and streamed.text.endswith("data: [DONE]\n\n")


def test_too_many_vision_tokens(live: LiveServer) -> None:
    message = check(post(live, *[part(data_url(PICTURE))] * 4), 400, "image_too_large", "messages")
    assert "100 tokens (25, 25, 25, 25)" in message and "80 tokens" in message


def test_row_12_counts_before_any_decode(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    check(post(live, *[part(data_url(PICTURE))] * 9), 400, "invalid_value", "messages")
    check(post(live, *[part("data:,")] * 1000), 400, "invalid_value", "messages")


def form(live: LiveServer, body: bytes, content_type: str = "multipart/form-data; boundary=b") -> httpx.Response:
    return live.http.post("/v1/fusion/analyze", content=body, headers={"content-type": content_type})


FIELD = b'--b\r\ncontent-disposition: form-data; name="question"\r\n\r\nx\r\n'


@pytest.mark.parametrize("path", ["/v1/fusion/analyze", "/v1/encoders/compare"])
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (FIELD * 10_000 + b"--b--\r\n", "multipart/form-data; boundary=b"),
        (FIELD + b"--b--\r\n", "multipart/form-data; boundary=b"),
        (b"x", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=b"),
        (b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n' + PICTURE + b"\r\n--b--\r\n",
         "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\n\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\n" + b"x: y\r\n" * 10_000, "multipart/form-data; boundary=b"),
        (FIELD, "multipart/form-data; boundary=" + "b" * 10_000),
    ],
)  # fmt: skip
def test_row_31_forms(live: LiveServer, path: str, body: bytes, content_type: str) -> None:
    response = live.http.post(path, content=body, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_value"


def test_it_still_answers(live: LiveServer) -> None:
    """The last of this file: nothing above has left the server worse."""
    assert post(live, part(data_url(PICTURE))).status_code == 200
    assert live.client.stats.num_running == live.client.stats.num_waiting == 0
    assert live.metric("dve_waiting_body_bytes") == 0
