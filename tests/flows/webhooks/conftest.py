"""A shop with a real HTTP server, and everything that tells it things, on a real database."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from flows.webhooks.house import Kassa, Shop
from kassa.clock import SystemClock
from kassa.db.pool import connect, open_pool
from kassa.journal.writer import PostgresJournal
from kassa.merchants.vault import Vault
from kassa.messaging.log import EventLog
from kassa.messaging.wake import Wakeups
from kassa.notifications.sender import Sender
from kassa.notifications.service import Webhooks
from kassa.notifications.store import WebhookStore
from kassa.tables import TABLES


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    shop = Shop()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", shop.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    shop.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield shop
    await runner.cleanup()


@pytest.fixture
def answer_s() -> float:
    """How long a shop may take to answer."""
    return 30.0


@pytest.fixture
async def kassa(database_url: str, answer_s: float) -> AsyncIterator[Kassa]:
    pool = await open_pool(database_url, application="test")
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
    wakeups.follow(journal)
    store, events, vault = WebhookStore(pool), EventLog(pool), Vault(bytes(32))
    webhooks = Webhooks(journal, store, events, vault, SystemClock(), allow_private=True)
    sender = Sender(allow_private=True, timeout_s=answer_s)
    await sender.start()
    yield Kassa(database_url, pool, journal, store, events, webhooks, wakeups, sender)
    await sender.close()
    await journal.stop()
    await pool.close()
