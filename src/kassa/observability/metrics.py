"""What Kassa counts about itself, in one object with a registry of its own, and the page that Prometheus reads.

Names of labels are bounded: routes are patterns, topics and groups are declared, verdicts and outcomes are enums.
Recording is a dict lookup and one or two increments: well under two microseconds.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kassa.observability.meters import Meters, QueueCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of `Metrics.render`."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _Counters:
    """A counter's children by their label values, so that the hot path does not go through `labels()`."""

    __slots__ = ("_children", "_parent")

    def __init__(self, registry: CollectorRegistry, name: str, text: str, labels: Sequence[str]) -> None:
        self._parent = Counter(name, text, labels, registry=registry)
        self._children: dict[tuple[str | int, ...], Counter] = {}

    def add(self, values: tuple[str | int, ...], count: int = 1) -> None:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._parent.labels(*values)
        child.inc(count)


class _Histograms:
    """The same for histograms."""

    __slots__ = ("_children", "_parent")

    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]
    ) -> None:
        self._parent = Histogram(name, text, labels, buckets=bounds, registry=registry)
        self._children: dict[tuple[str, ...], Histogram] = {}

    def observe(self, values: tuple[str, ...], measured: float) -> None:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._parent.labels(*values)
        child.observe(measured)


class _Answers(Collector):
    """Answers of the API: counters that cost a look in a dict each, made into Prometheus' form when somebody reads them."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, int], int] = {}
        self._buckets: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def add(self, route: str, method: str, status: int, seconds: float) -> None:
        key = (route, method, status)
        self._counts[key] = self._counts.get(key, 0) + 1
        buckets = self._buckets.get(route)
        if buckets is None:
            buckets = self._buckets[route] = [0] * (len(_SECONDS) + 1)
            self._seconds[route] = 0.0
        buckets[bisect_left(_SECONDS, seconds)] += 1
        self._seconds[route] += seconds

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "kassa_http_requests", "Answers of the API.", labels=("route", "method", "status")
        )
        for (route, method, status), count in self._counts.items():
            requests.add_metric((route, method, str(status)), count)
        durations = HistogramMetricFamily(
            "kassa_http_seconds", "From the last byte of a request to its answer.", labels=("route",)
        )
        bounds = [*map(str, _SECONDS), "+Inf"]
        for route, buckets in self._buckets.items():
            upto = list(zip(bounds, accumulate(buckets), strict=True))
            durations.add_metric((route,), upto, self._seconds[route])
        return (requests, durations)


class Metrics:
    """All counters of one process; make one and hand it down."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._http = _Answers()
        registry.register(self._http)
        self._journal_batch_size = Histogram(
            "kassa_journal_batch_size", "Changes in one commit.", buckets=_BATCH_SIZES, registry=registry
        )
        self._journal_commit_seconds = Histogram(
            "kassa_journal_commit_seconds", "From judging a batch to its commit.", buckets=_SECONDS, registry=registry
        )
        self.batches = 0
        """Commits so far, for those who want to know whether the journal moves."""
        self._journal_queue_length = Gauge(
            "kassa_journal_queue_length", "Changes that wait or are being written.", registry=registry
        )
        self._database_up = Gauge(
            "kassa_database_up", "Whether the database answered when this page was made.", registry=registry
        )
        self._journal_writable = Gauge(
            "kassa_journal_writable", "0: the journal's last try to reach the database failed.", registry=registry
        )
        self._workers_idle = Gauge(
            "kassa_workers_idle", "Loops of this process that should run and do not.", registry=registry
        )
        self._channel_calls = _Counters(
            registry, "kassa_channel_calls", "Requests to channels.", ("channel", "operation", "outcome")
        )
        self._webhook_deliveries = _Counters(
            registry, "kassa_webhook_deliveries", "Tries to deliver a webhook.", ("result",)
        )
        self.meters = Meters()
        registry.register(QueueCollector(self.meters))
        by_group = ("topic", "group")
        self._queue_length = Gauge("kassa_queue_length", "Records not yet processed.", by_group, registry=registry)
        self._queue_oldest_age = Gauge(
            "kassa_queue_oldest_age_seconds", "Age of the oldest record that is due.", by_group, registry=registry
        )
        self._queue_dead = Gauge(
            "kassa_queue_dead", "Records that were given up and wait for a person.", by_group, registry=registry
        )
        self._queue_in_flight = Gauge(
            "kassa_queue_in_flight", "Records in somebody's hands.", by_group, registry=registry
        )
        self._queue_retrying = Gauge(
            "kassa_queue_retrying",
            "Records that failed before and wait for their next try.",
            by_group,
            registry=registry,
        )
        self._queue_delayed = Gauge(
            "kassa_queue_delayed",
            "Records that are not due yet: sent with a delay, or to be tried again.",
            by_group,
            registry=registry,
        )
        self._queue_paused = Gauge("kassa_queue_paused", "1: an operator paused it.", by_group, registry=registry)
        self._queue_is_read = Gauge(
            "kassa_queue_is_read",
            "Of groups that read the event log: 1 where a process does.",
            by_group,
            registry=registry,
        )
        self._broker_up = Gauge(
            "kassa_broker_up", "1: as far as this process knows nothing is wrong with the broker.", ("broker",),
            registry=registry,
        )  # fmt: skip
        self._broker_away = Gauge(
            "kassa_broker_away_seconds", "For how long the broker has been away; 0: it is not.", ("broker",),
            registry=registry,
        )  # fmt: skip
        self._timers_stuck = Gauge("kassa_timers_stuck", "Timers that failed five times or more.", registry=registry)
        self._timers_overdue = Gauge(
            "kassa_timers_overdue_seconds",
            "How long ago the oldest timer was due that nobody holds.",
            registry=registry,
        )
        self._oldest_transaction = Gauge(
            "kassa_database_oldest_transaction_seconds",
            "For how long the oldest transaction has been open that keeps deleted rows from being taken away.",
            registry=registry,
        )
        self._in_doubt = Gauge(
            "kassa_in_doubt", "Attempts and refunds of which the channel has not said what became of them.", ("noun",),
            registry=registry,
        )  # fmt: skip
        self._in_doubt_oldest = Gauge(
            "kassa_in_doubt_oldest_seconds",
            "For how long the oldest of them has been so.",
            ("noun",),
            registry=registry,
        )

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """One answer. `route` is the pattern, never the path; empty when there was none."""
        self._http.add(route, method, status, seconds)

    def journal_committed(self, size: int, seconds: float) -> None:
        self.batches += 1
        self._journal_batch_size.observe(size)
        self._journal_commit_seconds.observe(seconds)

    def journal_waiting(self, length: int) -> None:
        self._journal_queue_length.set(length)

    def channel_called(self, channel: str, operation: str, outcome: str) -> None:
        self._channel_calls.add((channel, operation, outcome))

    def webhook_tried(self, result: str) -> None:
        self._webhook_deliveries.add((result,))

    def process_seen(self, *, database_up: bool, workers_idle: int, journal_writable: bool = True) -> None:
        """How this process was when the page was made."""
        self._journal_writable.set(journal_writable)
        self._database_up.set(database_up)
        self._workers_idle.set(workers_idle)

    def forget_database(self) -> None:
        """Drops what a look at the database found: an old number is worse than none."""
        self.forget_queues()
        for gauge in (self._in_doubt, self._in_doubt_oldest):
            gauge.clear()

    def forget_queues(self) -> None:
        """Drops what a look at the queues found: one that is gone leaves no number behind."""
        for gauge in (
            self._queue_length, self._queue_oldest_age, self._queue_dead, self._queue_in_flight, self._queue_retrying,
            self._queue_delayed, self._queue_paused, self._queue_is_read,
        ):  # fmt: skip
            gauge.clear()

    def queue_seen(
        self,
        topic: str,
        group: str,
        *,
        length: int,
        oldest_age_s: float,
        dead: int,
        in_flight: int = 0,
        retrying: int = 0,
        delayed: int = 0,
        paused: bool = False,
        is_read: bool | None = None,
    ) -> None:
        """What a look at a queue found; not for the hot path."""
        self._queue_length.labels(topic, group).set(length)
        self._queue_oldest_age.labels(topic, group).set(oldest_age_s)
        self._queue_dead.labels(topic, group).set(dead)
        self._queue_in_flight.labels(topic, group).set(in_flight)
        self._queue_retrying.labels(topic, group).set(retrying)
        self._queue_delayed.labels(topic, group).set(delayed)
        self._queue_paused.labels(topic, group).set(paused)
        if is_read is not None:
            self._queue_is_read.labels(topic, group).set(is_read)

    def broker_seen(self, broker: str, away_s: float) -> None:
        """How a broker is, as far as the loops of this process know. away_s: 0 where it is not away."""
        self._broker_up.labels(broker).set(away_s == 0)
        self._broker_away.labels(broker).set(away_s)

    def timers_seen(self, *, stuck: int, overdue_s: float) -> None:
        """What a look at the timers found."""
        self._timers_stuck.set(stuck)
        self._timers_overdue.set(overdue_s)

    def transactions_seen(self, *, oldest_s: float) -> None:
        """What a look at the database's sessions found."""
        self._oldest_transaction.set(oldest_s)

    def doubts_seen(self, noun: str, *, count: int, oldest_s: float) -> None:
        """What a look at attempts or refunds found."""
        self._in_doubt.labels(noun).set(count)
        self._in_doubt_oldest.labels(noun).set(oldest_s)

    def delivery_handled(self, topic: str, group: str, latency_s: float) -> None:
        """One record that does not come over a binder: an event that a reader of the log handled."""
        self.meters.passage(topic, group).took(latency_s)

    def render(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self.registry)
