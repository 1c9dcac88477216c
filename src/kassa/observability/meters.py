"""What passes through queues, counted per topic and group in plain integers, once per batch.

Counters begin at 0 with each process, as Prometheus expects of them. Whoever wants them all reads `Meters`: /metrics does,
and `kassa queue watch` over the database.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Protocol
from weakref import WeakSet

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0, 300.0, 1800.0, 21600.0,
)  # fmt: skip
"""Upper ends of the buckets of latency. Produced to handled: a delivery may wait for a retry in half an hour."""
_BOUNDS = tuple(timedelta(seconds=bound_s) for bound_s in BOUNDS_S)
_ZERO = timedelta()


class Passage:
    """What one group did with one topic."""

    __slots__ = ("buckets", "dead", "handled", "latency_s", "put_off", "received", "retried", "vanished")

    def __init__(self) -> None:
        self.received = 0
        """Records handed out, each time that they were."""
        self.handled = 0
        self.retried = 0
        """Tried and failed, to be tried again."""
        self.put_off = 0
        """Not tried: they waited behind another one, or what they need was away."""
        self.dead = 0
        self.vanished = 0
        """Packets that somebody took from its queues at the broker, past all consumers."""
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        """Of the handled ones by their latency; the last bucket has no end. Not cumulative."""
        self.latency_s = 0.0

    def took(self, latency_s: float) -> None:
        """A record was handled so long after it was produced. Clocks of two machines may disagree: not below 0."""
        latency_s = max(latency_s, 0.0)
        self.handled += 1
        self.buckets[bisect_left(BOUNDS_S, latency_s)] += 1
        self.latency_s += latency_s

    def took_since(self, produced: Sequence[datetime | None], now: datetime) -> None:
        """One record for each time at which one was produced; None: nobody knows when."""
        self.handled += len(produced)
        ages = sorted([now - at for at in produced if at is not None])
        if not ages:
            return
        if ages[0] < _ZERO:
            ages = [max(age, _ZERO) for age in ages]
        self.latency_s += sum(ages, _ZERO).total_seconds()
        # Records that were handled together are about as old, so most of these are in one bucket.
        first, last, counted = bisect_left(_BOUNDS, ages[0]), bisect_left(_BOUNDS, ages[-1]), 0
        for place in range(first, last):
            end = bisect_right(ages, _BOUNDS[place])
            self.buckets[place] += end - counted
            counted = end
        self.buckets[last] += len(ages) - counted


class Sending:
    """What became of records that were sent to one topic."""

    __slots__ = ("confirmed", "failed", "unknown")

    def __init__(self) -> None:
        self.confirmed = 0
        self.failed = 0
        self.unknown = 0
        """No answer came; they are sent again under the same id."""


class Breaking(Protocol):
    """Something that knows which destinations are left alone for now."""

    def open_count(self) -> int: ...


class Meters:
    """The counters of one process."""

    def __init__(self) -> None:
        self.passages: dict[tuple[str, str], Passage] = {}
        """By topic and group."""
        self.sendings: dict[str, Sending] = {}
        """By topic."""
        self._breakers: dict[str, WeakSet[Breaking]] = {}

    def passage(self, topic: str, group: str) -> Passage:
        """Kept by whoever counts, so that a batch costs no look-up."""
        found = self.passages.get((topic, group))
        if found is None:
            found = self.passages[topic, group] = Passage()
        return found

    def sending(self, topic: str) -> Sending:
        """The same for what is sent."""
        found = self.sendings.get(topic)
        if found is None:
            found = self.sendings[topic] = Sending()
        return found

    def watch_breaker(self, group: str, breaker: Breaking) -> None:
        """Counts a group's open circuit breakers. Forgotten when the breaker is."""
        self._breakers.setdefault(group, WeakSet()).add(breaker)

    def breakers(self) -> Iterator[tuple[str, int]]:
        """Each group, and how many destinations it leaves alone at the moment."""
        for group, breakers in self._breakers.items():
            yield group, sum(breaker.open_count() for breaker in breakers)


_PASSED = (
    ("received", "received", "Records handed to a group's consumers, each time that they were."),
    ("handled", "handled", "Records whose effect is durable."),
    ("retried", "retried", "Records that failed and are tried again."),
    ("put_off", "put_off", "Records that were not tried yet: what they need is away, or they wait behind another one."),
    # How many dead letters there are is a gauge, kassa_queue_dead; this is how many ever died.
    ("dead", "given_up", "Records that were given up."),
    (
        "vanished",
        "vanished",
        "Packets that went from their queue at the broker though no consumer had them: purged, or expired.",
    ),
)
_SENT = (
    ("confirmed", "Records that the broker has."),
    ("failed", "Records that the broker did not take."),
    ("unknown", "Records of which nobody knows whether the broker has them; they are sent again."),
)
_LE = [*map(str, BOUNDS_S), "+Inf"]


class QueueCollector(Collector):
    """Meters as Prometheus reads them; for a registry of one's own: `registry.register(QueueCollector(meters))`."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    def collect(self) -> Iterable[Metric]:
        yield from (self._passed(attribute, name, text) for attribute, name, text in _PASSED)
        yield from (self._sent(name, text) for name, text in _SENT)
        yield self._latency()
        yield self._breakers()

    def _passed(self, attribute: str, name: str, text: str) -> Metric:
        family = CounterMetricFamily(f"kassa_queue_{name}", text, labels=("topic", "group"))
        for labels, passage in list(self._meters.passages.items()):
            family.add_metric(labels, getattr(passage, attribute))
        return family

    def _sent(self, name: str, text: str) -> Metric:
        family = CounterMetricFamily(f"kassa_queue_sent_{name}", text, labels=("topic",))
        for topic, sending in list(self._meters.sendings.items()):
            family.add_metric((topic,), getattr(sending, name))
        return family

    def _latency(self) -> Metric:
        family = HistogramMetricFamily(
            "kassa_queue_latency_seconds", "From produced to handled.", labels=("topic", "group")
        )
        for labels, passage in list(self._meters.passages.items()):
            upto = list(zip(_LE, accumulate(passage.buckets), strict=True))
            family.add_metric(labels, upto, passage.latency_s)
        return family

    def _breakers(self) -> Metric:
        family = GaugeMetricFamily(
            "kassa_breakers_open", "Destinations that a group leaves alone for a while.", labels=("group",)
        )
        for group, count in self._meters.breakers():
            family.add_metric((group,), count)
        return family


def quantile(buckets: Sequence[int], part: float) -> float | None:
    """The latency in seconds below which `part` of the records are, within its bucket as if they lay evenly; None: no record."""
    total = sum(buckets)
    if not total:
        return None
    rank, passed = part * total, 0
    for place, count in enumerate(buckets):
        if count and passed + count >= rank:
            low = BOUNDS_S[place - 1] if place else 0.0
            high = BOUNDS_S[place] if place < len(BOUNDS_S) else low
            return low + (high - low) * (rank - passed) / count
        passed += count
    return BOUNDS_S[-1]
