"""What one merchant may ask for at a time."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from kassa.api import limits
from kassa.api.http import Response
from kassa.api.limits import Fairness
from kassa.errors import TooMany
from kassa.ids import Id, new_id
from kassa.merchants.model import ALL_SCOPES, Caller
from kassa.merchants.records import Merchant

LOTS = 1_000_000


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def caller(home: int = 1, key: Id | None = None) -> Caller:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    merchant = Merchant(home=home, id=new_id(), version=0, sequence=0, state="active", name="Shop", created_at=at)
    return Caller(merchant, key or new_id(), int(ALL_SCOPES))


def test_a_key_gets_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    fairness, shop = Fairness(per_second=10, in_flight_max=LOTS, clock=clock), caller()
    for _ in range(20):
        fairness.admit(shop)

    with pytest.raises(TooMany) as refused:
        fairness.admit(shop)
    clock.now += 0.1001
    fairness.admit(shop)

    assert refused.value.facts["retry_after_s"] == 1
    with pytest.raises(TooMany):
        fairness.admit(shop)


def test_a_refused_request_does_not_make_the_wait_longer() -> None:
    clock = Clock()
    fairness, shop = Fairness(per_second=1, in_flight_max=LOTS, clock=clock), caller()
    fairness.admit(shop)
    fairness.admit(shop)
    for _ in range(50):
        with pytest.raises(TooMany):
            fairness.admit(shop)

    clock.now += 1.001

    assert fairness.admit(shop).taken == 3


def test_a_rate_below_one_a_second_is_possible() -> None:
    clock = Clock()
    fairness, shop = Fairness(per_second=0.1, in_flight_max=LOTS, clock=clock), caller()
    fairness.admit(shop)

    with pytest.raises(TooMany) as refused:
        fairness.admit(shop)

    assert refused.value.facts["retry_after_s"] == 10


def test_keys_have_buckets_of_their_own_and_share_their_merchants_places() -> None:
    fairness = Fairness(per_second=1, in_flight_max=3, burst_s=1, clock=Clock())
    first, second, third, fourth = caller(1), caller(1), caller(1), caller(1)

    places = [fairness.admit(one) for one in (first, second, third)]
    with pytest.raises(TooMany):
        fairness.admit(fourth)
    other = fairness.admit(caller(2))
    places[0].leave()

    assert fairness.admit(fourth).taken == 3
    assert other.taken == 1


async def test_a_place_is_given_back_whatever_becomes_of_the_request() -> None:
    fairness, shop = Fairness(per_second=LOTS, in_flight_max=LOTS), caller()

    async def fails() -> Response:
        raise ValueError

    async def hangs() -> Response:
        return await asyncio.Future()

    places = fairness.admit(shop)
    with pytest.raises(ValueError):
        await places.held(fails())
    cut = asyncio.create_task(fairness.admit(shop).held(hangs()))
    await asyncio.sleep(0)
    cut.cancel()
    await asyncio.gather(cut, return_exceptions=True)

    assert places.taken == 0


def test_memory_is_bounded_and_what_is_under_way_stays_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr(limits, "HELD_MAX", 10)
    clock = Clock()
    fairness = Fairness(per_second=1, in_flight_max=1, clock=clock)
    busy = caller(7)
    fairness.admit(busy)
    for home in range(100, 200):
        fairness.admit(caller(home)).leave()
        clock.now += 5

    with pytest.raises(TooMany):
        fairness.admit(busy)
    assert len(fairness._keys) <= 10 and len(fairness._merchants) <= 11
