"""Training files as tests upload them."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

#: As much of a picture as its magic says.
PICTURE = b"\x89PNG\r\n\x1a\n" + b"pixels" * 10


def row(answer: str = "a fox") -> dict[str, Any]:
    url = {"url": "data:image/png;base64,iVBORw0KGgo="}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def jsonl(count: int = 3) -> bytes:
    return b"".join(json.dumps(row(str(i))).encode() + b"\n" for i in range(count))


def zipped(**entries: bytes) -> bytes:
    """Names with `__` for a slash, since a keyword has none."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()
