"""Every binder of the registry, on its real server, with a journal to have effects in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from conformance.messaging.house import TOPIC, Bench
from kassa.db.pool import connect, open_pool
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import REGISTRY, Resources, make_binder
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.tables import TABLES


@pytest.fixture(params=sorted(REGISTRY))
async def bench(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Bench]:
    pool = await open_pool(database_url, application="test")
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    async with make_binder(request.param, Resources(pool, wakeups)) as binder:
        await binder.provision([TOPIC])
        yield Bench(binder, pool, journal, wakeups, DeadLetters(pool))
    telling.cancel()
    with suppress(asyncio.CancelledError):
        await telling
    await journal.stop()
    await pool.close()
