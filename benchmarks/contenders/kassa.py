"""Kassa's binders, as its relays and consumers use them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from benchmarks.contenders.shape import BATCH, BATCH_OF_ENVELOPES, GROUP, Failure, in_batches
from kassa.db.pool import connect, open_pool
from kassa.messaging.binder import Binder, Resources
from kassa.messaging.model import Ack, Confirmed, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import EVENTS, Topic
from kassa.messaging.wake import Wakeups
from kassa.observability.meters import Meters

DEADLINE_S = 30.0
ACK = Ack()


def topic(name: str, *, envelopes: bool) -> Topic:
    """Like `kassa.events`, or `kassa.events.batch`."""
    return EVENTS._replace(name=name, groups=(GROUP,), envelopes=envelopes)


class Kassa:
    """One binder on one topic."""

    def __init__(self, binder: Binder, topic: Topic) -> None:
        self._binder = binder
        self._topic = topic
        self._batch = BATCH_OF_ENVELOPES if topic.envelopes else BATCH

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, self._batch, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        receipts = await self._binder.send(self._topic.name, batch, deadline_s=DEADLINE_S)
        for receipt in receipts:
            if not isinstance(receipt, Confirmed):
                raise Failure(f"{self._binder.name}: {receipt}")

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        subscription = await self._binder.subscribe(self._topic.name, GROUP)
        found: list[str] = []
        while len(found) < count:
            deliveries = await subscription.receive(self._batch, DEADLINE_S)
            if not deliveries:
                raise Failure(f"{self._binder.name}: {len(found)} of {count} came")
            if not found:
                began()
            found += [one.record.id for one in deliveries]
            if not all(await subscription.settle([(one, ACK) for one in deliveries])):
                raise Failure(f"{self._binder.name}: not settled")
        await subscription.close(1.0)
        return found


@asynccontextmanager
async def binder(broker: str, database_url: str, topic: Topic) -> AsyncIterator[Kassa]:
    """A process' worth of Kassa: pool, wake-ups, meters, the binder."""
    pool = await open_pool(database_url, application="binders")
    wakeups = Wakeups(lambda: connect(database_url, application="binders wake"))
    telling = asyncio.create_task(wakeups.run())
    async with make_binder(broker, Resources(pool, wakeups, (topic,), Meters())) as made:
        await made.provision([topic])
        yield Kassa(made, topic)
    telling.cancel()
    with suppress(asyncio.CancelledError):
        await telling
    await pool.close()
