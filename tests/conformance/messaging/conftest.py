"""Every binder of the registry, on its real server, with a journal to have effects in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from brokers.rabbit_house import at_once
from conformance.messaging import report
from conformance.messaging.house import SERVERS, Bench
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources
from kassa.messaging.registry import REGISTRY, make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.tables import TABLES


def schemes() -> list[object]:
    """One parameter per binder, however many schemes it has; it needs its server."""
    binders = {REGISTRY[scheme]: scheme for scheme in sorted(REGISTRY, reverse=True)}
    return [
        pytest.param(scheme, marks=pytest.mark.needs(SERVERS[scheme]) if scheme in SERVERS else ())
        for scheme in sorted(binders.values())
    ]


@pytest.fixture(params=schemes())
async def bench(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Bench]:
    server = SERVERS.get(request.param)
    url = request.param if server is None else request.getfixturevalue(server).url
    if request.param == "amqp":
        url = at_once(url)
    # A name of its own, since the servers are shared.
    topic = Topic(f"orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.", classes=True)
    pool = await open_pool(database_url, application="test")
    version = await pool.fetchval("SELECT split_part(current_setting('server_version'), ' ', 1)")
    request.node.user_properties.append((report.POSTGRES, version))
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    async with make_binder(url, Resources(pool, wakeups, (topic,))) as binder:
        await binder.provision([topic])
        yield Bench(binder, topic, pool, journal, wakeups, DeadLetters(pool))
    telling.cancel()
    with suppress(asyncio.CancelledError):
        await telling
    await journal.stop()
    await pool.close()
