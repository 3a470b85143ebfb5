"""Uploads: bounded in bytes and time, the least recently used goes first, safe to share between threads."""

import threading

import pytest

from service.errors import ImageFileTooLargeError, UploadNotFoundError
from service.uploads import UploadStore


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_bytes_come_back_under_an_id_of_their_own() -> None:
    store = UploadStore(100, 60, Clock())
    first, second = store.put(b"abc", "../x.png"), store.put(b"abc", "y" * 500)
    assert first.id != second.id and len(first.id) == 37 and first.id.startswith("file-")
    assert store.get(first.id) == (first, b"abc")
    assert (first.filename, first.num_bytes, first.created_unix, first.expires_unix) == ("../x.png", 3, 1000, 1060)
    assert len(second.filename) == 200
    assert store.num_bytes == 6 and store.records() == [second, first]


def test_the_least_recently_used_one_makes_room() -> None:
    store = UploadStore(10, 60, Clock())
    old, used = store.put(b"12345", "a"), store.put(b"123", "b")
    store.get(old.id)
    new = store.put(b"1234", "c")
    assert store.get(old.id)[1] == b"12345" and store.get(new.id)[1] == b"1234" and store.num_bytes == 9
    with pytest.raises(UploadNotFoundError):
        store.get(used.id)
    with pytest.raises(ImageFileTooLargeError):
        store.put(b"x" * 11, "d")
    assert store.num_bytes == 9


def test_their_time_ends() -> None:
    clock = Clock()
    store = UploadStore(10, 60, clock)
    record = store.put(b"1", "a")
    clock.time += 59
    assert store.get(record.id)[1] == b"1"
    clock.time += 1
    with pytest.raises(UploadNotFoundError):
        store.get(record.id)
    assert store.num_bytes == 0 and store.records() == []


def test_deleting() -> None:
    store = UploadStore(10, 60, Clock())
    record = store.put(b"1", "a")
    assert store.delete(record.id) and not store.delete(record.id) and not store.delete("file-x")
    assert store.num_bytes == 0


def test_threads_share_it() -> None:
    store = UploadStore(50, 60, Clock())

    def work() -> None:
        for _ in range(300):
            record = store.put(b"x" * 7, "a")
            store.delete(record.id)
            store.put(b"y" * 9, "b")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert store.num_bytes == sum(record.num_bytes for record in store.records()) <= 50
