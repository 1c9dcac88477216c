"""One shop per test, on the memory journal and on PostgreSQL in turn, before the same real sandbox."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from flows.payments.house import MemoryBooks, PostgresBooks, Shop
from kassa.channels.runner import Runner
from kassa.channels.sandbox import http, wechat
from kassa.journal.memory import MemoryJournal
from kassa.journal.writer import PostgresJournal
from kassa.payments.memory import MemoryPayments
from kassa.payments.store import PaymentStore
from kassa.tables import TABLES


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """A provider's credentials; it runs in this process, on a port of its own."""
    ready: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(wechat.serve(tmp_path / "sandbox", 0, ready=ready.set_result))
    yield await asyncio.wait_for(ready, timeout=60)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture(params=["memory", "postgres"])
def journal_url(request: pytest.FixtureRequest) -> str | None:
    """None for the memory journal; the server starts only for the other."""
    return request.getfixturevalue("database_url") if request.param == "postgres" else None


@pytest.fixture
async def shop(journal_url: str | None, sandbox: dict[str, str]) -> AsyncIterator[Shop]:
    """A merchant with callbacks that the provider can reach."""
    async with Runner() as runner:
        if journal_url is None:
            journal = MemoryJournal(TABLES)
            found = Shop(journal, MemoryBooks(journal), MemoryPayments(journal), sandbox, runner)
            async with Reachable(found):
                yield found
            return
        database = PostgresJournal(lambda: asyncpg.connect(journal_url), TABLES)
        await database.start()
        async with asyncpg.create_pool(journal_url, min_size=1, max_size=4) as pool:
            found = Shop(database, PostgresBooks(pool), PaymentStore(pool), sandbox, runner)
            async with Reachable(found):
                yield found
            await database.stop()


class Reachable:
    """While entered, the provider reaches the shop's callbacks."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    async def __aenter__(self) -> None:
        self._server = await http.listen(self._shop.receive, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self._shop.listen_at(f"http://{host}:{port}")

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._shop.payments.stop()
