"""What passes is counted once, and comes out as Prometheus and people read it."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kassa.messaging.breaker import FAILURES_MAX, Breaker
from kassa.observability.meters import BOUNDS_S, Meters, Passage, QueueCollector, quantile

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_records_of_a_batch_are_counted_by_their_latency() -> None:
    passage = Passage()
    early = NOW - timedelta(seconds=2)

    passage.took_since([early, early, None, NOW - timedelta(milliseconds=3)], NOW)

    assert passage.handled == 4
    assert sum(passage.buckets) == 3
    assert passage.latency_s == pytest.approx(4.003)


@pytest.mark.parametrize("times", [1, 3])
def test_a_batch_counts_as_its_records_one_by_one(times: int) -> None:
    """Also those that are as old as a bucket's end, older than all, or not born yet."""
    ages_s = [-5.0, 0.0, 0.002, 99_999.0, *BOUNDS_S, *(bound_s + 0.0001 for bound_s in BOUNDS_S)]
    together, one_by_one = Passage(), Passage()

    together.took_since([NOW - timedelta(seconds=age_s) for age_s in reversed(ages_s)] * times, NOW)
    for age_s in ages_s * times:
        one_by_one.took(age_s)

    assert together.buckets == one_by_one.buckets
    assert together.handled == one_by_one.handled
    assert together.latency_s == pytest.approx(one_by_one.latency_s)


def test_a_clock_that_is_behind_makes_no_latency_below_zero() -> None:
    passage = Passage()

    passage.took_since([NOW + timedelta(seconds=5)], NOW)

    assert (passage.buckets[0], passage.latency_s) == (1, 0.0)


def test_buckets_are_cumulative_on_the_page_and_have_no_gap() -> None:
    meters = Meters()
    for latency_s in (0.0005, 0.3, 99_999.0):
        meters.passage("payment_order", "kassa").took(latency_s)
    registry = CollectorRegistry()
    registry.register(QueueCollector(meters))

    lines = generate_latest(registry).decode().splitlines()

    counts = [float(line.split()[-1]) for line in lines if line.startswith("kassa_queue_latency_seconds_bucket")]
    assert len(counts) == len(BOUNDS_S) + 1
    assert counts[0] == 1.0 and counts[-1] == 3.0
    assert all(before <= after for before, after in pairwise(counts))


def test_open_circuit_breakers_are_counted_while_they_live() -> None:
    meters, now = Meters(), 0.0
    breaker = Breaker(lambda: now)
    meters.watch_breaker("mails", breaker)
    for _ in range(FAILURES_MAX):
        breaker.failed("smtp", now)

    assert list(meters.breakers()) == [("mails", 1)]

    now = 1000.0
    assert list(meters.breakers()) == [("mails", 0)]

    del breaker
    assert list(meters.breakers()) == [("mails", 0)]


@pytest.mark.parametrize(("part", "low", "high"), [(0.5, 0.001, 0.0025), (0.99, 0.5, 1.0), (1.0, 0.5, 1.0)])
def test_a_quantile_lies_in_its_bucket(part: float, low: float, high: float) -> None:
    passage = Passage()
    for latency_s in [0.002] * 90 + [0.7] * 10:
        passage.took(latency_s)

    found = quantile(passage.buckets, part)

    assert found is not None and low <= found <= high


def test_where_nothing_passed_there_is_no_quantile() -> None:
    assert quantile(Passage().buckets, 0.5) is None
