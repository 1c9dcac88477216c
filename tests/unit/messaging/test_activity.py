"""Rates of counters that several processes tell, some of which begin again at 0."""

from datetime import UTC, datetime, timedelta

import pytest

from kassa.messaging.activity import Counted, Flows
from kassa.observability.meters import BOUNDS_S

START = datetime(2026, 1, 1, tzinfo=UTC)


def told(process: str, at_s: float, handled: int) -> Counted:
    latency = [0] * (len(BOUNDS_S) + 1)
    latency[3] = handled
    return Counted(
        process, "payment_order", "kassa", START + timedelta(seconds=at_s), 0, handled, handled, 0, 0, latency
    )


def test_rates_of_processes_add_up() -> None:
    flows = Flows()

    flows.add([told("a", 0, 100), told("b", 0.5, 1000)])
    flows.add([told("a", 2, 120), told("b", 1.5, 1030)])

    flow = flows.flows()["payment_order", "kassa"]
    assert flow.handled == pytest.approx(10 + 30)
    assert flow.p50_s is not None and BOUNDS_S[2] <= flow.p50_s <= BOUNDS_S[3]


def test_a_process_that_is_started_again_makes_no_rate_below_zero() -> None:
    flows = Flows()

    flows.add([told("a", 0, 5000)])
    flows.add([told("a2", 1, 0)])
    flows.add([told("a2", 2, 7)])

    assert flows.flows()["payment_order", "kassa"].handled == pytest.approx(7)


def test_only_the_last_seconds_count() -> None:
    flows = Flows(window_s=5.0)

    for second in range(60):
        flows.add([told("a", second, 0 if second < 50 else (second - 50) * 40)])

    assert flows.flows()["payment_order", "kassa"].handled == pytest.approx(40)


def test_what_was_told_only_once_is_not_known_however_often_it_is_read() -> None:
    flows = Flows()

    for _ in range(3):
        flows.add([told("a", 0, 100), told("b", 0, 1)])

    assert flows.flows() == {}
