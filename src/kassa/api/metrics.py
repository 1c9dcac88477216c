"""What the API counts about itself, and the page that Prometheus reads."""

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kassa.api.http import Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class _Series:
    """The requests of one method, route and status."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS_S) + 1)
        self.seconds = 0.0


class RequestMetrics(Collector):
    """Counts answers by method, route and status. It is told of every request, so it does little."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, int], _Series] = {}

    def __call__(self, request: Request, status: int, seconds: float) -> None:
        name = (request.method, request.route, status)
        series = self._series.get(name)
        if series is None:
            # Bounded: methods, routes and statuses are few, and what matched no route has the route "".
            series = self._series[name] = _Series()
        series.buckets[bisect_left(_BOUNDS_S, seconds)] += 1
        series.seconds += seconds

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(
            "kassa_http_request_seconds",
            "Time from the last byte of a request to its answer",
            labels=("method", "route", "status"),
        )
        for (method, route, status), series in self._series.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), series.buckets, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric((method, route, str(status)), buckets, series.seconds)
        yield family


class BatchMetrics(Collector):
    """Counts the journal's commits: how many changes each held, and how long it took."""

    def __init__(self) -> None:
        self.batches = 0
        self.changes = 0
        self.seconds = 0.0

    def __call__(self, changes: int, seconds: float) -> None:
        self.batches += 1
        self.changes += changes
        self.seconds += seconds

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        yield CounterMetricFamily("kassa_journal_batches", "Commits of the journal", value=self.batches)
        yield CounterMetricFamily("kassa_journal_changes", "Changes in these commits", value=self.changes)
        yield CounterMetricFamily("kassa_journal_seconds", "Time spent in these commits", value=self.seconds)


class Gauges(Collector):
    """Numbers that are looked up when somebody asks."""

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        for name, (says, look) in self._gauges.items():
            yield GaugeMetricFamily(name, says, value=look())


def registry(*collectors: Collector) -> CollectorRegistry:
    """A registry of its own: two apps in one process (tests) do not mix."""
    made = CollectorRegistry()
    for collector in collectors:
        made.register(collector)
    return made


def page(made: CollectorRegistry) -> bytes:
    """The page for Prometheus."""
    return generate_latest(made)
