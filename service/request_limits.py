"""What a request may be: what the settings say, and what follows from it.

In: settings. Out: one `RequestLimits`, made once at the composition root; tests make their own. What follows is
derived and no setting, so that no two of them can contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from service.settings import JobSettings, Settings

#: Bodies that wait: five of the largest by default, or 1,300 of 200 KB.
_WAITING_BYTES = 256 * 2**20
#: What a request costs is its vision tokens; but each picture is also a decode, so that many tiny ones stay few.
_TOKENS_AN_IMAGE = 1024


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """max_waiting_bytes: the bodies of all requests that wait, together. max_image_bytes: one picture, encoded.

    max_images: frames of videos included. body_seconds: what a small body may take to come.
    """

    max_body_bytes: int
    max_upload_bytes: int
    max_waiting_bytes: int
    max_image_bytes: int
    max_images: int
    body_seconds: float = 10.0

    @classmethod
    def from_settings(cls, settings: Settings, jobs: JobSettings) -> Self:
        body = settings.max_body_bytes
        return cls(
            max_body_bytes=body,
            max_upload_bytes=jobs.max_upload_bytes,
            # Two of the largest bodies always fit, so that one which waits does not shut the door.
            max_waiting_bytes=max(_WAITING_BYTES, 2 * body),
            # 20 MiB of 48: in base64 five ninths of the body, the rest is for text and smaller pictures.
            max_image_bytes=body * 5 // 12,
            max_images=max(1, settings.max_visual_tokens // _TOKENS_AN_IMAGE),
        )
