"""What a process counts reaches `kassa queue watch` over the database, whatever passes where."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from flows.messaging.house import put
from flows.service.conftest import until
from kassa.db.pool import close_pool, connect, open_pool
from kassa.ids import new_id
from kassa.messaging import activity
from kassa.messaging.activity import Counted, Publisher, counted
from kassa.messaging.binder import Resources
from kassa.messaging.metered import MeteredBinder
from kassa.messaging.registry import make_binder
from kassa.messaging.relay import MessageRelay
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import MessageWork, OutgoingMessage
from kassa.observability.meters import Meters

MAILS = Topic("shop.mails", ("mailer",), "What customers are told.")
PATIENCE_S = 30.0


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Any]:
    pool = await open_pool(database_url, application="test")
    yield pool
    await close_pool(pool)


async def relay_mails(pool: Any, url: str, meters: Meters, count: int) -> None:
    """Sends so many to a topic that `#shop.mails` on a broker's URL names, as `kassa worker relay` does."""
    wakeups = Wakeups(lambda: connect(url, application="test wake"))
    work = MessageWork(pool)
    mails = [OutgoingMessage(new_id(), 0, MAILS.name, "", 4, 0.0, {}, str(number).encode()) for number in range(count)]
    await put(pool, *mails)
    binder = make_binder("memory", Resources(pool, wakeups, (MAILS,), meters))
    assert isinstance(binder, MeteredBinder)
    async with binder:
        await binder.provision([MAILS])
        relay = MessageRelay(work, binder, MAILS.name, MAILS.name, wakeups, meters=meters)
        while await relay.step():
            pass


@asynccontextmanager
async def publishing(publisher: Publisher) -> AsyncIterator[None]:
    running = asyncio.create_task(publisher.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


async def leave_old_meter(pool: Any) -> None:
    """Of a process that ended ten minutes ago."""
    await pool.execute(
        "INSERT INTO queue_meter (process, topic, group_name, at, sent, received, handled, retried, dead, latency)"
        " VALUES ($1, 'gone', '', clock_timestamp() - $2::interval, 0, 0, 0, 0, 0, '{}')",
        new_id(), timedelta(minutes=10),
    )  # fmt: skip


async def is_forgotten(pool: Any) -> bool:
    return bool(await pool.fetchval("SELECT count(*) = 0 FROM queue_meter WHERE topic = 'gone'"))


async def test_what_leaves_for_a_topic_of_ones_own_is_one_row_with_what_was_sent_and_handled(
    pool: Any, database_url: str
) -> None:
    meters = Meters()
    meters.passage("payment_order", "kassa").received += 2
    await relay_mails(pool, database_url, meters, 3)
    publisher = Publisher(pool, meters)

    await publisher.publish()
    await publisher.publish()

    found = {(one.topic, one.group): one for one in await counted(pool)}
    mails = found[MAILS.name, ""]
    assert (mails.sent, mails.handled, sum(mails.latency)) == (3, 3, 3)
    orders = found["payment_order", "kassa"]
    assert (orders.sent, orders.received) == (0, 2)


async def test_what_was_only_sent_has_no_latency(pool: Any) -> None:
    meters = Meters()
    meters.sending(MAILS.name).confirmed += 5

    await Publisher(pool, meters).publish()

    (mails,) = await counted(pool)
    assert isinstance(mails, Counted)
    assert (mails.topic, mails.group, mails.sent, mails.handled, mails.latency) == (MAILS.name, "", 5, 0, [])


async def test_meters_of_processes_that_are_gone_are_forgotten_though_publishing_fails(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "PUBLISH_S", 0.01)
    meters = Meters()
    # More than a bigint holds, so that the row is refused.
    sending = meters.sending(MAILS.name)
    sending.confirmed = 2**63
    await leave_old_meter(pool)

    async def is_published() -> bool:
        return [one.sent for one in await counted(pool)] == [7]

    async with publishing(Publisher(pool, meters)):
        await until(lambda: is_forgotten(pool), PATIENCE_S)
        sending.confirmed = 7
        await until(is_published, PATIENCE_S)
