"""ZeroMQ with many subscriptions in one process, and what one peer may take of the hub."""

import asyncio
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from brokers.test_zeromq import DEADLINE_S, parts, query
from conformance.messaging.house import collect, record
from kassa.errors import BrokerUnreachable
from kassa.messaging.binder import Resources, Subscription
from kassa.messaging.binders.zeromq import (
    PART_BYTES,
    PART_BYTES_MAX,
    SUBSCRIPTIONS_MAX,
    ZeroMQBinder,
    ZeroMQSubscription,
    make_binder,
    make_keys,
)
from kassa.messaging.model import Ack, Confirmed, Delivery, Depth
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.supervisor import end_tasks

__all__ = ["parts"]

ORDERS = Topic("orders", ("shop",), "Orders, for the tests.")
QUIET = Topic("quiet", ("shop",), "Nothing is ever sent there.")
NIL = b"\xc0"
PING_1, PING_2 = (b"\x95\xa1s" + number + b"\x00\xa4ping" for number in (b"\x01", b"\x02"))
"""All but their argument."""
LENGTH_BYTES = 5
"""With which a long argument begins."""
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
    try:
        yield
    finally:
        await end_tasks(*waiting)


async def test_everything_is_settled_beside_many_subscriptions_that_wait(parts: tuple[Any, Wakeups]) -> None:
    """Each of them has a call under way that ends only when something comes."""
    async with hub_with(parts, ORDERS, QUIET) as binder, idle_subscriptions(binder, IDLE):
        busy = await binder.subscribe(ORDERS.name, "shop")

        for number in range(5):
            sent = await binder.send(ORDERS.name, [record(f"r-{number}")], deadline_s=DEADLINE_S)
            assert sent == [Confirmed()]
            async with asyncio.timeout(DEADLINE_S):
                deliveries = await received(busy)
            assert await busy.settle([(delivery, Ack()) for delivery in deliveries]) == [True]

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


async def test_answer_holds_at_most_a_batch(parts: tuple[Any, Wakeups]) -> None:
    batch_max = ZeroMQBinder.traits.batch_max
    async with hub_with(parts, ORDERS) as binder:
        for start in (0, batch_max):
            many = [record(f"r-{number}") for number in range(start, start + batch_max)]
            assert await binder.send(ORDERS.name, many, deadline_s=DEADLINE_S) == [Confirmed()] * batch_max
        subscription = await binder.subscribe(ORDERS.name, "shop")

        first = await subscription.receive(10 * batch_max, DEADLINE_S)
        rest = await collect(subscription, 2 * batch_max - len(first), DEADLINE_S)

        assert len(first) == batch_max
        assert len({delivery.record.id for delivery in (*first, *rest)}) == 2 * batch_max


async def test_call_to_receive_ends_also_when_its_time_is_no_number(parts: tuple[Any, Wakeups]) -> None:
    async with hub_with(parts, ORDERS) as binder:
        subscription = await binder.subscribe(ORDERS.name, "shop")
        assert isinstance(subscription, ZeroMQSubscription)

        answer = await binder.call("receive", subscription._wanted(10, math.nan), DEADLINE_S)

        assert bytes(answer) == b"\x90"


@pytest.mark.parametrize(
    ("length", "answered"), [(PART_BYTES, 1), (PART_BYTES_MAX + 1, 2)], ids=["as long as may be", "longer"]
)
async def test_hub_cuts_off_who_sends_a_part_that_is_too_long(
    parts: tuple[Any, Wakeups], length: int, answered: int
) -> None:
    """It would make room for what somebody only says is coming."""
    long = b"\xc6" + (length - LENGTH_BYTES).to_bytes(4, "big") + bytes(length - LENGTH_BYTES)
    async with hub_with(parts, ORDERS) as hub:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(hub.url.replace("zeromq", "tcp"))
            await stranger.send_multipart([PING_1, long])
            answer = b""
            async with asyncio.timeout(DEADLINE_S):
                while not answer:
                    with suppress(TimeoutError):
                        answer = await asyncio.wait_for(stranger.recv(), 1.0)
                    await stranger.send_multipart([PING_2, NIL])

        assert answer[1] == answered


async def test_long_record_passes_encrypted_too(parts: tuple[Any, Wakeups], tmp_path: Path) -> None:
    """CURVE makes each part longer."""
    public, secret = make_keys(tmp_path, "hub")
    url = f"zeromq://127.0.0.1:0?{query(secret=secret, peers=tmp_path, server=public)}"
    body = random.randbytes(8_000_000)
    async with make_binder(url, Resources(*parts, (ORDERS,))) as binder:
        await binder.provision((ORDERS,))

        assert await binder.send(ORDERS.name, [record("r-1", body=body)], deadline_s=DEADLINE_S) == [Confirmed()]

        (delivery,) = await collect(await binder.subscribe(ORDERS.name, "shop"), 1, DEADLINE_S)
        assert delivery.record.body == body
