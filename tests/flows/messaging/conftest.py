"""Two writers on a real database."""

from collections.abc import AsyncIterator

import pytest

from flows.messaging.house import House, writer
from kassa.db.pool import open_pool


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[House]:
    pool = await open_pool(database_url, application="test")
    one, two = await writer(database_url), await writer(database_url)
    yield House(database_url, pool, one, two)
    await one.stop()
    await two.stop()
    await pool.close()
