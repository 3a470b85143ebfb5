"""A long run of mixed load on the real processes: flat memory, no error, no stuck request. One hour unless
DVE_SOAK_SECONDS says otherwise: `make soak` or `pytest -m soak`.

Memory is the server's resident set, sampled every few seconds after a warm-up that fills the caches; the samples of a
twentieth of the time are one mean, so that neighbours do not count twice, and the slope of these means has a 95 %
interval. It is flat if the slope is under the bound and the interval is so narrow that this says something: noise is
not flatness. What a process holds open, and its threads, do not become more either.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.operations.plant import Plant, run_plant, until
from tests.operations.traffic import Tally, Traffic, create_job, job, send

SECONDS = float(os.environ.get("DVE_SOAK_SECONDS", "3600"))
_JOB_EVERY = 300.0
_NUM_MEANS = 20
#: Student's t, 97.5 %, for _NUM_MEANS - 2 degrees of freedom.
_T = 2.101
#: Half an interval, in bounds: wider, and a growth of several bounds could hide in it.
_WIDEST = 1.5
#: Connections and trainers come and go.
_SPARE_DESCRIPTORS, _SPARE_THREADS = 8, 4
_BYTES_A_REQUEST = 1024
_WORKER_BYTES_AN_HOUR = 20 * 2**20
#: Caches fill and the allocator finds its size.
WARM_SECONDS = SECONDS * 0.4


@dataclass
class Samples:
    """(seconds, bytes, descriptors, threads) of one process."""

    pid: int
    seen: list[tuple[float, int, int, int]] = field(default_factory=list)

    def take(self, now: float) -> None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        descriptors = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
        self.seen.append((now, int(status["VmRSS"].split()[0]) * 1024, descriptors, int(status["Threads"])))

    def slope(self, begin: float) -> tuple[float, float]:
        """Bytes a second from `begin` on, and half of its 95 % interval."""
        late = [(at, size) for at, size, _, _ in self.seen if at >= begin]
        means = block_means(late, _NUM_MEANS)
        return line_fit(means)


def block_means(points: list[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    edges = [len(points) * i // count for i in range(count + 1)]
    blocks = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in blocks if b]


def line_fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, _T * math.sqrt(rest / (n - 2) / spread)


class Jobs(threading.Thread):
    """A training job now and then; its model answers once and is deleted."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.client = httpx.Client(base_url=url, timeout=120)
        self.stopping, self.done, self.wrong = threading.Event(), 0, []

    def run(self) -> None:
        with self.client:
            self.go_on()

    def go_on(self) -> None:
        while not self.stopping.is_set():
            begin = time.monotonic()
            try:
                self.one()
                self.done += 1
            except (httpx.HTTPError, AssertionError, TimeoutError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}"[:500])
            self.stopping.wait(max(_JOB_EVERY - (time.monotonic() - begin), 1.0))

    def one(self) -> None:
        job_id = create_job(self.client)
        ended = ("succeeded", "failed", "cancelled")
        until(lambda: job(self.client, job_id)["status"] in ended, "the job", 600)
        told = job(self.client, job_id)
        assert told["status"] == "succeeded", told
        model = told["fine_tuned_model"]
        asked = {"model": model, "messages": [{"role": "user", "content": "what colour?"}], "max_tokens": 4}
        until(lambda: self.client.post("/v1/chat/completions", json=asked).status_code == 200, "the model", 120)
        assert self.client.delete(f"/v1/models/{model}").status_code == 200


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 1800)
def test_a_long_run_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Small caches are full soon; what grows after that is a leak.
    settings = {"encoder_cache_bytes": str(8 * 2**20), "kv_cache_bytes": str(64 * 2**20), "log_level": "warning"}
    with run_plant(tmp_path, **settings) as plant:
        server, worker = plant.start_server(), plant.start_worker()
        of_server, of_worker = Samples(server.pid), Samples(worker.pid)
        begin = time.monotonic()
        traffic, jobs = Traffic(plant.url).start(), Jobs(plant.url)
        jobs.start()
        while time.monotonic() - begin < SECONDS:
            time.sleep(max(SECONDS / 400, 0.25))
            for samples in (of_server, of_worker):
                samples.take(time.monotonic() - begin)
        jobs.stopping.set()
        tally = traffic.stop()
        jobs.join(700)
        check_idle(plant)
        codes = server.stop(), worker.stop()
        with capsys.disabled():
            sys.stdout.write(summary(tally, jobs, of_server, of_worker))
        assert tally.wrong == [] and jobs.wrong == [] and jobs.done > 0
        assert codes == (0, 0)
        assert [line for process in (server, worker) for line in process.log if line["level"] == "error"] == []
    bounds = {"server": _BYTES_A_REQUEST * tally.total / SECONDS, "worker": _WORKER_BYTES_AN_HOUR / 3600}
    for name, samples in (("server", of_server), ("worker", of_worker)):
        assert growth(*samples.slope(WARM_SECONDS), bounds[name]) is None, name
        assert more_of(samples.seen) == [], name


def growth(slope: float, half: float, bound: float) -> str | None:
    """What is wrong with a slope and half of its interval, or None."""
    if slope >= bound:
        return f"memory grows by {slope / bound:.1f} bounds"
    if half >= _WIDEST * bound:
        return f"nothing can be said: the interval is {2 * half / bound:.1f} bounds wide"
    return None


def more_of(seen: list[tuple[float, int, int, int]]) -> list[str]:
    """Of what the last third holds more than the first did."""
    third = len(seen) // 3
    kinds = (("descriptors", 2, _SPARE_DESCRIPTORS), ("threads", 3, _SPARE_THREADS))
    return [
        what
        for what, column, spare in kinds
        if max(s[column] for s in seen[-third:]) > max(s[column] for s in seen[:third]) + spare
    ]


def summary(tally: Tally, jobs: Jobs, of_server: Samples, of_worker: Samples) -> str:
    rate, (slope, half) = tally.total / SECONDS, of_server.slope(WARM_SECONDS)
    lines = [
        "",
        f"soak of {SECONDS:.0f} s: {tally.total} requests ({rate:.1f} a second), slowest {tally.slowest:.1f} s, "
        f"{len(tally.wrong)} wrong; {jobs.done} jobs, {len(jobs.wrong)} wrong",
        f"  by kind: {dict(tally.counts)}",
        f"  a request: {slope / rate:+.0f} +- {half / rate:.0f} bytes of the server's memory",
    ]
    for name, samples in (("server", of_server), ("worker", of_worker)):
        slope, half = (value * 3600 / 2**20 for value in samples.slope(WARM_SECONDS))
        curve = [f"{size / 2**20:.0f}" for _, size in block_means([one[:2] for one in samples.seen], 10)]
        first, last = samples.seen[len(samples.seen) // 3], samples.seen[-1]
        lines.append(
            f"  {name}: {slope:+.2f} +- {half:.2f} MiB an hour after warming up; MiB over time {' '.join(curve)}; "
            f"descriptors {first[2]} -> {last[2]}, threads {first[3]} -> {last[3]}"
        )
    return "\n".join([*lines, ""])


def check_idle(plant: Plant) -> None:
    """Nobody waits for anything any more: what left has left its place."""
    zero = ("dve_num_requests_running ", "dve_num_requests_waiting ", "dve_waiting_body_bytes ",
            "dve_kv_cache_usage_ratio ")  # fmt: skip

    def is_idle() -> bool:
        lines = httpx.get(f"{plant.url}/metrics", timeout=20).text.splitlines()
        found = [line for line in lines if line.startswith(zero)]
        return len(found) == len(zero) and all(float(line.split()[1]) == 0 for line in found)

    until(is_idle, "requests that nobody waits for are still held", 60)


def test_the_slope_and_its_interval() -> None:
    noisy = [(float(x), 3.0 * x + (-1) ** x) for x in range(400)]
    slope, half = line_fit(block_means(noisy, _NUM_MEANS))
    assert slope == pytest.approx(3.0, abs=1e-3) and half < 0.01


def test_what_is_flat_and_what_is_only_noisy() -> None:
    assert growth(0.2, 0.3, 1.0) is None and growth(-5.0, 0.3, 1.0) is None
    assert growth(1.2, 0.3, 1.0) == "memory grows by 1.2 bounds"
    assert growth(0.5, 40.0, 1.0) == "nothing can be said: the interval is 80.0 bounds wide"


def test_descriptors_and_threads_that_become_more_are_seen() -> None:
    steady = [(float(i), 0, 20 + i % 7, 5) for i in range(90)]
    assert more_of(steady) == []
    assert more_of([(at, size, held + int(at) // 3, threads) for at, size, held, threads in steady]) == ["descriptors"]
    assert more_of([(at, size, held, threads + int(at) // 6) for at, size, held, threads in steady]) == ["threads"]


@pytest.mark.parametrize(("status", "is_right"), [(200, True), (500, False), (503, False)])
def test_who_leaves_at_once_says_what_came_before(status: int, is_right: bool) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, text="x")

    tally = Tally()
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://x") as client:
        tally.add("leave at once", *ask_and_leave(client))
    assert (tally.wrong == []) == is_right


def test_who_left_at_once_had_no_answer() -> None:
    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("nothing came", request=request)

    with httpx.Client(transport=httpx.MockTransport(silent), base_url="http://x") as client:
        assert send(client, "leave at once", random.Random(0)) == (0, "")


def ask_and_leave(client: httpx.Client) -> tuple[int, float, str]:
    status, text = send(client, "leave at once", random.Random(0))
    return status, 0.0, text
