"""The server killed while jobs are being submitted: each exists once, or not at all and then once after the retry."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from service.jobs.store import open_store
from tests.service.jobs.player import add_file
from tests.service.test_program import running_program

JOBS = "/v1/fine_tuning/jobs"
JOBS_A_ROUND = 6


class Submitter:
    """What the clients of a server that dies again and again were told."""

    def __init__(self) -> None:
        self.told: dict[int, str] = {}
        self.ended = threading.Semaphore(0)

    def submit(self, url: str, number: int) -> None:
        """Nothing is told if the server dies under the request."""
        body = {"model": "fake/model:1", "training_file": "file-1", "seed": number}
        try:
            response = httpx.post(f"{url}{JOBS}", json=body, headers={"idempotency-key": f"k{number}"}, timeout=20)
        except httpx.TransportError:
            response = None
        if response is not None:
            assert response.status_code == 200, response.text
            self.told[number] = response.json()["id"]
        self.ended.release()

    def submit_all(self, url: str, numbers: range) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.submit, args=(url, number)) for number in numbers]
        for thread in threads:
            thread.start()
        return threads


def kill_while_submitting(folder: Path, rounds: int) -> None:
    """Each kill comes while requests are in flight, after none, one, two ... of the round's have ended."""
    store, clients = open_store(None, folder), Submitter()
    add_file(store)
    for round_ in range(rounds):
        with running_program(f"data_dir={folder}") as (process, url):
            first = round_ * JOBS_A_ROUND
            for lost in [number for number in range(first) if number not in clients.told]:
                clients.submit(url, lost)
                assert lost in clients.told
                clients.ended.acquire()
            threads = clients.submit_all(url, range(first, first + JOBS_A_ROUND))
            for _ in range(round_ % JOBS_A_ROUND):
                clients.ended.acquire()
            process.kill()
            for thread in threads:
                thread.join(30)
            clients.ended = threading.Semaphore(0)
    found = {job.seed: job.id for job in store.jobs.page(limit=10_000)[0]}
    assert store.jobs.counts()["validating_files"] == len(found), "none is there twice"
    assert {seed: found[seed] for seed in clients.told} == clients.told, "what was told is there"
    store.close()


def test_a_few_kills(tmp_path: Path) -> None:
    kill_while_submitting(tmp_path, rounds=2)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path: Path) -> None:
    kill_while_submitting(tmp_path, rounds=50)
