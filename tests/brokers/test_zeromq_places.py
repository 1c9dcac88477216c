"""ZeroMQ with many subscriptions in one process, and what one peer may take of the hub."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from brokers.test_zeromq import DEADLINE_S, parts
from conformance.messaging.house import collect, record
from kassa.errors import BrokerUnreachable
from kassa.messaging.binder import Resources, Subscription
from kassa.messaging.binders.zeromq import SUBSCRIPTIONS_MAX, ZeroMQBinder, make_binder
from kassa.messaging.model import Ack, Confirmed, Delivery, Depth
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.supervisor import end_tasks

__all__ = ["parts"]

ORDERS = Topic("orders", ("shop",), "Orders, for the tests.")
QUIET = Topic("quiet", ("shop",), "Nothing is ever sent there.")
IDLE = 130
"""So many that a call behind all of them, in places for 32, waits for longer than a settlement may."""


@asynccontextmanager
async def hub_with(parts: tuple[Any, Wakeups], *topics: Topic, lease_s: int = 3600) -> AsyncIterator[ZeroMQBinder]:
    """The hub and a peer of it in one. Its lease is so long that nothing comes again by itself."""
    url = f"zeromq://127.0.0.1:0?lease_s={lease_s}"
    async with make_binder(url, Resources(*parts, topics)) as binder:
        await binder.provision(topics)
        yield binder


async def received(subscription: Subscription) -> list[Delivery]:
    """What comes next; goes on, as a consumer does, when the hub has no time for it."""
    while True:
        with suppress(BrokerUnreachable):
            if deliveries := await subscription.receive(10, DEADLINE_S):
                return deliveries


@asynccontextmanager
async def idle_subscriptions(binder: ZeroMQBinder, count: int) -> AsyncIterator[None]:
    subscriptions = [await binder.subscribe(QUIET.name, "shop") for _ in range(count)]
    waiting = [asyncio.create_task(received(one)) for one in subscriptions]
    yield
    await end_tasks(*waiting)


async def test_everything_is_settled_beside_many_subscriptions_that_wait(parts: tuple[Any, Wakeups]) -> None:
    """Each of them has a call under way that ends only when something comes."""
    async with hub_with(parts, ORDERS, QUIET) as binder, idle_subscriptions(binder, IDLE):
        busy = await binder.subscribe(ORDERS.name, "shop")
        settled: list[bool] = []

        for number in range(5):
            sent = await binder.send(ORDERS.name, [record(f"r-{number}")], deadline_s=DEADLINE_S)
            assert sent == [Confirmed()]
            deliveries = await received(busy)
            settled += await busy.settle([(delivery, Ack()) for delivery in deliveries])

        assert settled == [True] * 5
        assert await binder.depth(ORDERS.name, "shop") == Depth(0, 0, 0, 0, None)


async def test_peer_has_only_so_many_subscriptions(parts: tuple[Any, Wakeups]) -> None:
    """Those that it has go on, and one that it closes makes room."""
    async with hub_with(parts, ORDERS) as binder:
        many = [await binder.subscribe(ORDERS.name, "shop") for _ in range(SUBSCRIPTIONS_MAX)]

        with pytest.raises(BrokerUnreachable, match="at most"):
            await binder.subscribe(ORDERS.name, "shop")

        await binder.send(ORDERS.name, [record("r-1")], deadline_s=DEADLINE_S)
        (delivery,) = await collect(many[0], 1, DEADLINE_S)
        assert await many[0].settle([(delivery, Ack())]) == [True]
        await many[1].close(0.0)
        await binder.subscribe(ORDERS.name, "shop")
