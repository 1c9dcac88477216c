"""Every binder of the registry, on its real server, with a journal to have effects in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from brokers.rabbit_house import at_once
from conformance.messaging import report
from conformance.messaging.house import PATIENCE_S, SERVERS, Bench
from kassa.db.pool import connect, open_pool
from kassa.errors import BrokerUnreachable
from kassa.ids import new_id
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Binder, Resources
from kassa.messaging.registry import REGISTRY, make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.supervisor import end_tasks
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
    # Whatever of it fails, the rest is let go of: else a test that has nothing to do with it fails when that is found.
    async with AsyncExitStack() as stack:
        pool = await open_pool(database_url, application="test")
        stack.push_async_callback(pool.close)
        version = await pool.fetchval("SELECT split_part(current_setting('server_version'), ' ', 1)")
        request.node.user_properties.append((report.POSTGRES, version))
        journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
        await journal.start()
        stack.push_async_callback(journal.stop)
        wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
        wakeups.follow(journal)
        telling = asyncio.create_task(wakeups.run())
        stack.push_async_callback(end_tasks, telling)
        binder = await stack.enter_async_context(make_binder(url, Resources(pool, wakeups, (topic,))))
        await provisioned(binder, topic)
        yield Bench(binder, topic, pool, journal, wakeups, DeadLetters(pool))


async def provisioned(binder: Binder, topic: Topic) -> None:
    """Asked for again where the broker does not answer in time, as by an operator of a busy machine."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await binder.provision([topic])
            except BrokerUnreachable:
                # A pause for a server that is busy; nothing is proven by its length.
                await asyncio.sleep(1.0)
            else:
                return
