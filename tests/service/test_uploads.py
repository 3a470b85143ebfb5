"""Uploads: one owner's, bounded in bytes and time, the least recently used goes first, safe between threads."""

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
    first, second = store.put(b"abc", "../x.png", "k"), store.put(b"abc", "y" * 500, "k")
    assert first.id != second.id and len(first.id) == 37 and first.id.startswith("file-")
    assert store.get(first.id, "k") == (first, b"abc")
    assert (first.filename, first.num_bytes, first.created_unix, first.expires_unix) == ("../x.png", 3, 1000, 1060)
    assert len(second.filename) == 200
    assert store.num_bytes == 6 and store.records("k") == [second, first]


def test_the_least_recently_used_one_makes_room() -> None:
    store = UploadStore(10, 60, Clock())
    old, used = store.put(b"12345", "a", "k"), store.put(b"123", "b", "k")
    store.get(old.id, "k")
    new = store.put(b"1234", "c", "k")
    assert store.get(old.id, "k")[1] == b"12345" and store.get(new.id, "k")[1] == b"1234" and store.num_bytes == 9
    with pytest.raises(UploadNotFoundError):
        store.get(used.id, "k")
    with pytest.raises(ImageFileTooLargeError):
        store.put(b"x" * 11, "d", "k")
    assert store.num_bytes == 9


def test_their_time_ends() -> None:
    clock = Clock()
    store = UploadStore(10, 60, clock)
    record = store.put(b"1", "a", "k")
    clock.time += 59
    assert store.get(record.id, "k")[1] == b"1"
    clock.time += 1
    with pytest.raises(UploadNotFoundError):
        store.get(record.id, "k")
    assert store.num_bytes == 0 and store.records("k") == []


def test_deleting() -> None:
    store = UploadStore(10, 60, Clock())
    record = store.put(b"1", "a", "k")
    assert store.delete(record.id, "k") and not store.delete(record.id, "k") and not store.delete("file-x", "k")
    assert store.num_bytes == 0


def test_another_owner_sees_nothing_of_a_file() -> None:
    store = UploadStore(10, 60, Clock())
    mine, theirs = store.put(b"1", "a", "k"), store.put(b"2", "b", "other")
    refusals = set()
    for file_id in (theirs.id, "file-x"):
        with pytest.raises(UploadNotFoundError) as caught:
            store.get(file_id, "k")
        refusals.add(str(caught.value).replace(file_id, ""))
    assert len(refusals) == 1, "another's file is refused in the words of one that is not there"
    assert not store.delete(theirs.id, "k") and store.records("k") == [mine]
    assert store.get(theirs.id, "other")[1] == b"2"


def test_threads_share_it() -> None:
    store = UploadStore(50, 60, Clock())

    def work() -> None:
        for _ in range(300):
            record = store.put(b"x" * 7, "a", "k")
            store.delete(record.id, "k")
            store.put(b"y" * 9, "b", "k")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert store.num_bytes == sum(record.num_bytes for record in store.records("k")) <= 50
