"""What the tests of RocketMQ share: a shop on a real server, with a journal to have effects in."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from conformance.messaging.house import Bench
from kassa.db.pool import connect, open_pool
from kassa.errors import BrokerUnreachable
from kassa.ids import new_id
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources
from kassa.messaging.binders import rocketmq_wire as wire
from kassa.messaging.binders.rocketmq import RocketStream, RocketTransport
from kassa.messaging.model import Arrival, Packet
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.tables import TABLES
from servers import RocketMQ

DELETE_TOPIC, DELETE_TOPIC_ROUTE, DELETE_GROUP = 215, 216, 207


def new_topic() -> Topic:
    """A topic of its own, since the server is shared."""
    return Topic(f"shop.orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.")


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
async def open_transport(url: str) -> AsyncIterator[RocketTransport]:
    """The bare transport, as another process would have it."""
    transport = RocketTransport(wire.read_url(url))
    try:
        await transport.open()
        yield transport
    finally:
        await transport.close()


def packet(id: str, key: str = "", body: bytes = b"{}", **headers: str) -> Packet:
    return Packet(id, key, body, {name.replace("_", "-"): value for name, value in headers.items()})


async def take(stream: RocketStream, count: int, within_s: float = 60) -> list[Arrival]:
    """At least so many, however they come and whatever happens meanwhile."""
    found: list[Arrival] = []
    async with asyncio.timeout(within_s):
        while len(found) < count:
            try:
                found += await stream.receive(100, within_s)
            except BrokerUnreachable:
                await asyncio.sleep(0.05)
    return found


def ids(arrivals: Sequence[Arrival]) -> list[str]:
    return [arrival.packet.id for arrival in arrivals]


async def tell_broker(server: RocketMQ, code: int, fields: dict[str, str]) -> wire.Answer:
    """Somebody else's order."""
    place = wire.Address("127.0.0.1", server.port("broker"))
    answer = await wire.ask(wire.read_url(server.url), place, code, fields)
    assert answer.code == wire.SUCCESS, answer
    return answer


async def delete_topic(server: RocketMQ, name: str) -> None:
    await tell_broker(server, DELETE_TOPIC, {"topic": name})
    place = wire.Address("127.0.0.1", server.port("name_server"))
    await wire.ask(wire.read_url(server.url), place, DELETE_TOPIC_ROUTE, {"topic": name})
