"""What an operator asks of queues at the edges: one that is gone with what was in it, a broker that is away, a time to come."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from flows.messaging.house import HOME, House, put
from kassa.errors import BrokerUnreachable
from kassa.ids import new_id
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.brokers import Brokers
from kassa.messaging.queues import Purged, Queues
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters, MessageWork, OutgoingMessage

OLD = "old_topic"
ORDERS = "payment_order:kassa"


def queues_of(house: House, *urls: str) -> Queues:
    # They never connect, as nobody runs them.
    wakeups = Wakeups(asyncio.sleep)  # type: ignore[arg-type]
    return Queues(house.pool, Brokers(read_brokers(urls), house.pool, wakeups, PAYMENT_ORDERS), wakeups)


async def three(house: House, queue: str) -> MessageWork:
    work = MessageWork(house.pool)
    await put(house.pool, *(OutgoingMessage(new_id(), HOME, queue, "", 4, 0.0, {}, b"{}") for _ in range(3)))
    return work


async def test_queue_that_was_nothing_but_its_rows_is_purged(house: House) -> None:
    await three(house, OLD)

    assert await queues_of(house, "postgres").purge(OLD) == Purged(3, 0)


async def test_nothing_is_purged_while_a_broker_of_the_queue_is_away(house: House) -> None:
    work = await three(house, ORDERS)

    with pytest.raises(BrokerUnreachable):
        await queues_of(house, "amqp://guest:guest@127.0.0.1:1").purge(ORDERS)

    assert len(await work.claim(ORDERS, 10)) == 3


async def test_what_dies_while_it_is_replayed_is_not_replayed_again(house: House) -> None:
    """Also with an end that is still to come."""
    work, letters = await three(house, OLD), DeadLetters(house.pool)

    async def kill() -> None:
        await work.bury([(message, "no") for message in await work.claim(OLD, 10)])

    async def kill_all() -> None:
        while True:
            await kill()
            await asyncio.sleep(0.01)

    await kill()
    killing = asyncio.create_task(kill_all())
    async with asyncio.timeout(30):
        moved = await letters.replay(OLD, died_to=datetime.now(UTC) + timedelta(days=1), per_second=10)
    killing.cancel()
    await asyncio.wait([killing])

    assert moved == 3
