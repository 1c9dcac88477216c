"""The two journals, under one suite: `journal` is the database's and the memory's in turn."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from conformance.journal.house import TABLES, House, MemoryHouse, PostgresHouse
from kassa.journal.memory import MemoryJournal
from kassa.journal.writer import PostgresJournal


@pytest.fixture(params=["memory", "postgres"])
def house_url(request: pytest.FixtureRequest) -> str | None:
    """None for the memory journal; the server starts only for the other."""
    return request.getfixturevalue("database_url") if request.param == "postgres" else None


@pytest.fixture
async def house(house_url: str | None) -> AsyncIterator[House]:
    """A journal with a way to look at what it keeps."""
    if house_url is None:
        yield MemoryHouse(MemoryJournal(TABLES))
        return
    journal = PostgresJournal(lambda: asyncpg.connect(house_url), TABLES)
    await journal.start()
    pool = await asyncpg.create_pool(house_url, min_size=1, max_size=4)
    yield PostgresHouse(journal, pool, house_url)
    await journal.stop()
    await pool.close()
