"""What the tests of RabbitMQ share: a shop on a real server, with a journal to have effects in, and loads to put on it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from conformance.messaging.house import Bench, record
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.journal.change import Change
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources
from kassa.messaging.binders.amqp import read_url
from kassa.messaging.binders.rabbitmq import RabbitTransport
from kassa.messaging.consumer import Consumer
from kassa.messaging.members import Members
from kassa.messaging.model import Confirmed, Failed, Packet, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.tables import TABLES


def new_topic() -> Topic:
    """A topic of its own, since the server is shared."""
    return Topic(f"orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.")


def at_once(url: str) -> str:
    """The same broker, of which nobody expects that it is killed a moment after queues were made."""
    return f"{url}{'&' if '?' in url else '?'}new_queue_pause=0"


@asynccontextmanager
async def open_bench(url: str, database_url: str, topic: Topic) -> AsyncIterator[Bench]:
    """A binder with its topic, a journal and wake-ups."""
    pool = await open_pool(database_url, application="test")
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    try:
        async with make_binder(url, Resources(pool, wakeups, (topic,))) as binder:
            await binder.provision([topic])
            yield Bench(binder, topic, pool, journal, wakeups, DeadLetters(pool))
    finally:
        telling.cancel()
        with suppress(asyncio.CancelledError):
            await telling
        await journal.stop()
        await pool.close()


@asynccontextmanager
async def open_transport(url: str, database_url: str) -> AsyncIterator[RabbitTransport]:
    """The bare transport, as another process would have it."""
    pool = await open_pool(database_url, application="test")
    transport = RabbitTransport(read_url(at_once(url)), Members(pool))
    try:
        await transport.open()
        yield transport
    finally:
        await transport.close()
        await pool.close()


def packet(id: str, key: str = "", body: bytes = b"{}", **headers: str) -> Packet:
    return Packet(id, key, body, {name.replace("_", "-"): value for name, value in headers.items()})


@asynccontextmanager
async def consuming(bench: Bench) -> AsyncIterator[Consumer]:
    """A consumer whose effects are counted, for as long as the block lasts."""

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    consumer = Consumer(await bench.binder.subscribe(bench.topic.name, "shop"), "shop", bench.journal, handler)
    running = asyncio.create_task(consumer.run())
    try:
        yield consumer
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Load:
    """Senders side by side, each with a key of its own and one record of it under way; what is not confirmed is sent again."""

    def __init__(self, bench: Bench, senders: int = 16, deadline_s: float = 3.0) -> None:
        self._bench = bench
        self._deadline_s = deadline_s
        self.confirmed: list[str] = []
        self.doubts = 0
        """Receipts that said something else than Confirmed."""
        self._stopping = False
        self._tasks = [asyncio.create_task(self._send(number)) for number in range(senders)]

    async def until(self, confirmed: int) -> None:
        """Returns when so many are confirmed altogether."""
        while len(self.confirmed) < confirmed:
            await asyncio.sleep(0.01)
            for task in self._tasks:
                if task.done():
                    task.result()

    async def stop(self) -> None:
        """Everything that was sent is confirmed afterwards."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _send(self, number: int) -> None:
        place = 0
        while not self._stopping:
            one = record(f"{number}-{place}", key=str(number))
            while (
                receipt := (await self._bench.binder.send(self._bench.topic.name, [one], deadline_s=self._deadline_s))[
                    0
                ]
            ) != Confirmed():
                assert not (isinstance(receipt, Failed) and not receipt.is_retryable), receipt
                self.doubts += 1
                await asyncio.sleep(0.05)
            self.confirmed.append(one.id)
            place += 1


def assert_once_and_in_order(confirmed: Sequence[str], effects: Sequence[str]) -> None:
    """Each confirmed record had its effect, none twice, and those of a key in the order in which they were sent."""
    assert len(effects) == len(set(effects))
    assert set(confirmed) <= set(effects)
    by_key: dict[str, list[int]] = {}
    for effect in effects:
        key, place = effect.split("-")
        by_key.setdefault(key, []).append(int(place))
    assert all(places == sorted(places) for places in by_key.values())
