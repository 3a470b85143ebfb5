"""A histogram that is cheap to observe: a value is put down at once and sorted into its bucket later.

In: values, from any thread; out: the samples of a Prometheus histogram, for prometheus_client's registry. Its own class
does the sorting at every value, under two locks: 2.4 us against 0.3, which counts where there is a value a token. It
refuses nothing: bounds and labels come from metrics.py.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

#: Values that wait at most, between two scrapes: 32 KiB of pointers.
_MAX_PENDING = 4096


class Tally:
    """The values of one histogram with one set of label values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self._sum = 0.0
        self._pending: list[float] = []
        self._lock = threading.Lock()

    def observe(self, amount: float) -> None:
        """Count one value."""
        # One append, which no other thread can come between.
        self._pending.append(amount)
        if len(self._pending) >= _MAX_PENDING:
            self.sort()

    def read(self) -> tuple[list[int], float]:
        """How many values are at most each bound, and the sum of all."""
        self.sort()
        with self._lock:
            return list(accumulate(self._counts)), self._sum

    def sort(self) -> None:
        """Put what waits into its buckets."""
        with self._lock:
            values = self._pending[:]
            del self._pending[: len(values)]  # what came meanwhile stays
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += sum(values)


class Histogram(Collector):
    """One metric. Without labels it is observed itself; with labels, what `labels` gives is.

    Args:
        buckets: upper bounds, rising; one at infinity is added.
    """

    def __init__(
        self, name: str, documentation: str, labelnames: Sequence[str], *, buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:  # fmt: skip
        self._name, self._documentation, self._labelnames = name, documentation, tuple(labelnames)
        self._bounds = (*map(float, buckets), inf)
        self._les = tuple(map(floatToGoString, self._bounds))
        self._tallies: dict[tuple[str, ...], Tally] = {}
        if not labelnames:
            self.observe = self.labels().observe
        registry.register(self)

    def labels(self, *values: str) -> Tally:
        """The one of these label values, in the order of the names."""
        found = self._tallies.get(values)
        # Two threads that meet here get the same one.
        return found if found is not None else self._tallies.setdefault(values, Tally(self._bounds))

    def sort(self) -> None:
        """What a scrape would have to do first; only who measures its cost asks for it alone."""
        for tally in list(self._tallies.values()):
            tally.sort()

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The metric without samples: what a registry asks to know names."""
        yield HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The metric with its samples."""
        (family,) = self.describe()
        for values, tally in list(self._tallies.items()):
            counts, total = tally.read()
            family.add_metric(values, buckets=list(zip(self._les, counts, strict=True)), sum_value=total)
        yield family
