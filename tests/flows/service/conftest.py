"""A service of somebody's own, with its database, on every binder."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import pytest

from conformance.messaging.conftest import schemes
from conformance.messaging.house import SERVERS
from kassa.ids import new_id
from kassa.messaging import Messaging, Topic


class Shop:
    """A service with orders, and what it needs to speak with others."""

    def __init__(self, broker: str, database_url: str, pool: Any) -> None:
        self.broker = broker
        self.database_url = database_url
        self.pool = pool
        self.topic = Topic(f"shop-{new_id()[-12:]}", (), "Orders of the shop.")

    @property
    def sqlalchemy_url(self) -> str:
        """For an engine of SQLAlchemy with asyncpg."""
        return self.database_url.replace("postgresql://", "postgresql+asyncpg://")

    def messaging(self, **options: Any) -> Messaging:
        return Messaging(self.broker, self.database_url, topics=[self.topic], name=f"s{new_id()[-8:]}", **options)

    async def orders(self) -> list[str]:
        return [row["number"] for row in await self.pool.fetch("SELECT number FROM orders ORDER BY place")]


@pytest.fixture(params=schemes())
async def shop(request: pytest.FixtureRequest, empty_database_url: str) -> AsyncIterator[Shop]:
    server = SERVERS.get(request.param)
    broker = request.param if server is None else request.getfixturevalue(server).url
    if broker == "zeromq":
        # The first service is the hub, and the others have to find it.
        broker = f"zeromq://127.0.0.1:{free_port()}"
    async with shop_at(broker, empty_database_url) as shop:
        yield shop


@pytest.fixture
async def shop_alone(empty_database_url: str) -> AsyncIterator[Shop]:
    """Where only the service's own database matters."""
    async with shop_at("memory", empty_database_url) as shop:
        yield shop


@asynccontextmanager
async def shop_at(broker: str, database_url: str) -> AsyncIterator[Shop]:
    """A shop with its table."""
    async with asyncpg.create_pool(database_url, min_size=1, max_size=4) as pool:
        await pool.execute("CREATE TABLE orders (place bigint GENERATED ALWAYS AS IDENTITY, number text NOT NULL)")
        yield Shop(broker, database_url, pool)


@asynccontextmanager
async def running(*services: Messaging) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Started, and handling what comes."""
    async with AsyncExitStack() as stack:
        for service in services:
            await stack.enter_async_context(service)
        tasks = [asyncio.create_task(service.run()) for service in services]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until(claim: Callable[[], Awaitable[bool]], timeout_s: float = 120.0) -> None:
    """Returns once the claim is true."""
    async with asyncio.timeout(timeout_s):
        is_true = False
        while not is_true:
            await asyncio.sleep(0.02)
            is_true = await claim()
