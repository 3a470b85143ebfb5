"""Pictures that were uploaded to be looked at again: bytes by file id, in memory, bounded in bytes and in time.

In: bytes, a file name, whose they are. Out: a record with an id that can't be guessed, and the bytes again for the same
owner under that id until they are the least recently used ones and room is needed, or their time is over. To anybody
else they are not there. It touches no disk itself.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import ImageFileTooLargeError, UploadNotFoundError

_MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """`filename` is the client's word and names nothing here. `expires_unix` holds unless room is needed sooner.

    `owner` is the id of the key that uploaded it.
    """

    id: str
    owner: str
    filename: str
    num_bytes: int
    created_unix: int
    expires_unix: int


class UploadStore:
    """Methods may be called from any thread. `now` is a wall clock: its seconds are told to clients.

    `kept`: by (id, owner), the bytes of a picture that lies elsewhere, on a disk, and when it came; or None.
    """

    def __init__(
        self,
        max_bytes: int,
        ttl_seconds: float,
        now: Callable[[], float],
        kept: Callable[[str, str], tuple[bytes, float] | None] | None = None,
    ) -> None:
        self._max_bytes, self._ttl_seconds, self._now, self._kept = max_bytes, ttl_seconds, now, kept
        self._lock = threading.Lock()
        #: The least recently used one first.
        self._held: OrderedDict[str, tuple[UploadRecord, bytes]] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def put(self, data: bytes, filename: str, owner: str) -> UploadRecord:
        """Keep the bytes; the least recently used others go if there is no room. Raises ImageFileTooLargeError."""
        if len(data) > self._max_bytes:
            raise ImageFileTooLargeError(
                "the file is larger than all room for uploads",
                value=f"{len(data)} bytes",
                allowed=f"{self._max_bytes} bytes",
                fix="Scale it down or compress it",
            )
        now = self._now()
        name = filename[:_MAX_NAME_CHARACTERS]
        file_id, expires = f"file-{uuid.uuid4().hex}", int(now + self._ttl_seconds)
        record = UploadRecord(file_id, owner, name, len(data), int(now), expires)
        with self._lock:
            self._drop_expired(now)
            while self._num_bytes + len(data) > self._max_bytes:
                self._drop(next(iter(self._held)))
            self._held[record.id] = (record, data)
            self._num_bytes += len(data)
        return record

    def get(self, file_id: str, owner: str) -> tuple[UploadRecord, bytes]:
        """The record and the bytes. Raises UploadNotFoundError, for another's file as for none."""
        with self._lock:
            self._drop_expired(self._now())
            held = self._held.get(file_id)
            if held is not None and held[0].owner == owner:
                self._held.move_to_end(file_id)
                return held
        if self._kept is not None and (kept := self._kept(file_id, owner)) is not None:
            data, created = kept
            return UploadRecord(file_id, owner, "", len(data), int(created), int(created)), data
        raise UploadNotFoundError(
            "there is no such file, or not any more",
            value=file_id,
            allowed=f"the id of your own upload of the last {self._ttl_seconds:g} s, or of a file for vision",
            fix="Upload it again",
            param="file_id",
        )

    def delete(self, file_id: str, owner: str) -> bool:
        """Whether there was one of this owner."""
        with self._lock:
            self._drop_expired(self._now())
            held = self._held.get(file_id)
            if held is None or held[0].owner != owner:
                return False
            self._drop(file_id)
            return True

    def records(self, owner: str) -> list[UploadRecord]:
        """Of this owner's files, the least recently used one first."""
        with self._lock:
            self._drop_expired(self._now())
            return [record for record, _ in self._held.values() if record.owner == owner]

    def _drop_expired(self, now: float) -> None:
        for file_id in [
            record.id for record, _ in self._held.values() if now >= record.created_unix + self._ttl_seconds
        ]:
            self._drop(file_id)

    def _drop(self, file_id: str) -> None:
        _, data = self._held.pop(file_id)
        self._num_bytes -= len(data)
