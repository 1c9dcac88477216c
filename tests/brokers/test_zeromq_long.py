"""ZeroMQ: what a peer that lives has in hand stays its own, however long it takes; what nobody has does not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest

from brokers.test_zeromq import DEADLINE_S, hub_process, parts
from brokers.test_zeromq_loops import leave_too_much
from brokers.test_zeromq_places import ORDERS, hub_with
from conformance.messaging.house import collect, record, tries_of
from kassa.messaging.binder import Resources
from kassa.messaging.binders.zeromq import RECEIVE_MAX_S, SILENCE_S, ZeroMQBinder, ZeroMQSubscription, read_url
from kassa.messaging.model import Confirmed
from kassa.messaging.wake import Wakeups

__all__ = ["parts"]

LEASE_S = 2


@asynccontextmanager
async def peers_of(url: str, parts: tuple[Any, Wakeups], count: int) -> AsyncIterator[list[ZeroMQBinder]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(ZeroMQBinder(read_url(f"{url}?role=peer"), Resources(*parts)))
            for _ in range(count)
        ]


async def lapses(parts: tuple[Any, Wakeups]) -> list[int]:
    return [row["lapses"] for row in await parts[0].fetch("SELECT lapses FROM message ORDER BY position")]


async def send(binder: ZeroMQBinder, *ids: str) -> None:
    receipts = await binder.send(ORDERS.name, [record(id, key="k") for id in ids], deadline_s=DEADLINE_S)
    assert receipts == [Confirmed()] * len(ids)


async def test_a_record_is_tried_by_one_at_a_time_however_long_that_takes(parts: tuple[Any, Wakeups]) -> None:
    """Longer than its lease, and than what was just handed out is believed to be in hand."""
    async with hub_with(parts, ORDERS, lease_s=LEASE_S) as hub, peers_of(hub.url, parts, 2) as peers:
        await send(hub, "r-1")
        consumers = [await peer.subscribe(ORDERS.name, "shop") for peer in peers]
        assert await tries_of(consumers, SILENCE_S + 2.5 * LEASE_S, partial(lapses, parts)) == [0, 1]


async def test_a_hub_that_is_killed_keeps_nothing_longer_than_its_lease(
    database_url: str, parts: tuple[Any, Wakeups]
) -> None:
    """The next one does not know it. Its leases are of two seconds."""
    with hub_process(database_url) as hub:
        async with peers_of(hub.url, parts, 2) as (one, two):
            await one.provision([ORDERS])
            await send(one, "r-1")
            await collect(await one.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)
            other = await two.subscribe(ORDERS.name, "shop")
            assert await other.receive(10, 3 * LEASE_S) == []

            hub.kill()
            await asyncio.to_thread(hub.start)

            (delivery,) = await collect(await two.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)
            assert delivery.attempts == 0
            assert await lapses(parts) == [1]


async def test_what_did_not_fit_goes_to_another_while_the_rest_is_handled(parts: tuple[Any, Wakeups]) -> None:
    """It is in one lease with what the slow peer has in hand, and that one is extended."""
    async with hub_with(parts, ORDERS, lease_s=LEASE_S) as hub, peers_of(hub.url, parts, 1) as (slow,):
        await leave_too_much(slow, ORDERS)

        (delivery,) = await collect(await hub.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)

        assert delivery.attempts == 0
        assert await lapses(parts) == [0, 0]
        assert len(await parts[0].fetch("SELECT FROM message_lease")) == 2, "the slow one has the other still"


async def test_what_came_to_nobody_comes_again_though_its_peer_lives(parts: tuple[Any, Wakeups]) -> None:
    """The peer has given up its call before the answer came."""
    async with hub_with(parts, ORDERS, lease_s=LEASE_S) as hub, peers_of(hub.url, parts, 1) as (peer,):
        await send(hub, "r-1")
        subscription = await peer.subscribe(ORDERS.name, "shop")
        assert isinstance(subscription, ZeroMQSubscription)
        await peer.call("receive", subscription._wanted(10, 1.0), DEADLINE_S)

        async with asyncio.timeout(SILENCE_S + 10 * LEASE_S):
            (delivery,) = await collect(await hub.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)

        assert await lapses(parts) == [1]
        assert delivery.attempts == 0


@pytest.mark.parametrize("is_closed", [False, True])
async def test_what_is_on_its_way_to_who_was_cancelled_is_anybodys(parts: tuple[Any, Wakeups], is_closed: bool) -> None:
    """Its lease would last an hour."""
    async with hub_with(parts, ORDERS) as hub, peers_of(hub.url, parts, 1) as (peer,):
        subscription = await peer.subscribe(ORDERS.name, "shop")
        receiving = asyncio.create_task(subscription.receive(10, DEADLINE_S))
        await asyncio.sleep(RECEIVE_MAX_S / 4)
        receiving.cancel()
        with suppress(asyncio.CancelledError):
            await receiving
        if is_closed:
            await subscription.close(DEADLINE_S)
        await send(hub, "r-1")

        (delivery,) = await collect(await hub.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)

        assert delivery.attempts == 0
        row = await parts[0].fetchrow("SELECT lapses, returned FROM message")
        assert (row["lapses"], row["returned"]) == (0, False)
        assert await parts[0].fetchval("SELECT count(*) FROM message_lease") == 1
