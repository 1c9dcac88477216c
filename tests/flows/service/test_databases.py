"""A service's own database, and the one in which Kassa's queues are when its broker is PostgreSQL."""

from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from flows.service.conftest import Shop, running, shop_at, until
from kassa.db.pool import connect
from kassa.errors import DatabaseRefused, SettingInvalid
from kassa.ids import new_id
from kassa.messaging import Message, Messaging
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.model import Confirmed, Record
from kassa.messaging.topology import TOPOLOGY
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import MessageWork

GRANTS = """
GRANT SELECT, INSERT, UPDATE, DELETE ON message, message_lease, dead_letter, subscription TO {role};
GRANT USAGE ON SEQUENCE message_lease_number TO {role};
GRANT SELECT ON schema_migration TO {role};
"""
"""As docs/guides/messaging.md says."""


@pytest.fixture
async def kassa_as_shop(database_url: str) -> Any:
    """The URL of Kassa's database, for a role that may use its queues and nothing else."""
    role = f"shop_{new_id()[-8:]}"
    owner = await asyncpg.connect(database_url)
    await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'shop'")
    await owner.execute(GRANTS.format(role=role))
    parts = urlsplit(database_url)
    yield urlunsplit(parts._replace(netloc=f"{role}:shop@{parts.netloc.rpartition('@')[2]}"))
    await owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    await owner.close()


async def test_events_of_a_kassa_without_a_broker_reach_a_service_by_its_database(
    database_url: str, kassa_as_shop: str, empty_database_url: str
) -> None:
    async with shop_at(kassa_as_shop, empty_database_url) as shop:
        messaging = shop.messaging()

        @messaging.consumer("kassa.events", group="shop", types=["payment.succeeded"])
        async def paid(message: Message, connection: Any) -> None:
            number = message.json()["order_id"]
            await connection.execute("INSERT INTO orders (number) VALUES ($1)", number)
            await messaging.send(shop.topic.name, {"number": number}, key=number, connection=connection)

        @messaging.consumer(shop.topic.name, group="warehouse")
        async def pack(message: Message, connection: Any) -> None:
            number = message.json()["number"]
            if number == "3":
                raise ValueError("it does not fit")
            answer = await messaging.request("shop.prices", {"number": number})
            await connection.execute("INSERT INTO orders (number) VALUES ($1)", answer.json())

        messaging._topics["shop.prices"] = shop.topic._replace(name="shop.prices")

        @messaging.consumer("shop.prices", group="prices")
        async def price(message: Message, connection: Any) -> None:
            await messaging.reply(message, f"price of {message.json()['number']}", connection=connection)

        async with running(messaging):
            await tell(database_url, "1", "2", "2", "3")
            await until(lambda: has(shop, ["1", "2", "3", "price of 1", "price of 2"]))
            # Nothing is left of it in Kassa's queues, but for what failed.
            async with asyncpg.create_pool(database_url, min_size=1, max_size=1) as pool:
                waiting = await MessageWork(pool).queues(f"{shop.topic.name}:warehouse")
            assert [queue.depth for queue in waiting] == [1]


async def tell(database_url: str, *orders: str) -> None:
    """Events, as Kassa's relay sends them; the same order twice is the same event."""
    records = [
        Record(f"evt-{order}", f"pay-{order}", b'{"order_id": "%s"}' % order.encode(), {"ce-type": "payment.succeeded"})
        for order in orders
    ]
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2) as pool:
        wakeups = Wakeups(lambda: connect(database_url, application="test"))
        async with PostgresBinder(pool, wakeups, topics=TOPOLOGY) as binder:
            for record in records:
                assert await binder.send("kassa.events", [record], deadline_s=10.0) == [Confirmed()]


async def has(shop: Shop, numbers: list[str]) -> bool:
    return sorted(await shop.orders()) == numbers


async def test_database_that_is_no_kassas_is_refused_as_a_broker(shop_alone: Shop) -> None:
    messaging = Messaging(shop_alone.database_url, shop_alone.database_url)

    with pytest.raises(DatabaseRefused, match="kassa migrate"):
        await messaging.start()


async def test_kassas_events_are_not_waited_for_in_vain_in_the_services_own_database(shop_alone: Shop) -> None:
    messaging = Messaging("postgres", shop_alone.database_url)

    @messaging.consumer("kassa.events", group="shop")
    async def never(message: Message, connection: Any) -> None:
        raise AssertionError("nobody sends here")

    with pytest.raises(SettingInvalid, match=r"kassa\.events is Kassa's.*URL of Kassa's database"):
        await messaging.start()
    with pytest.raises(SettingInvalid, match="payment_order is Kassa's"):
        await messaging.send("payment_order", {"amount": 100})


async def test_handlers_see_the_services_own_tables_whatever_their_names(shop_alone: Shop) -> None:
    """Kassa's have names that others use as well, and a service's tables may be in a schema of its own."""
    tables = ("subscription", "message", "inbox", "sales")
    await shop_alone.pool.execute("CREATE SCHEMA app")
    for table in tables:
        await shop_alone.pool.execute(f"CREATE TABLE app.{table} (what text)")
    shop = Shop("memory", f"{shop_alone.database_url}?options=-csearch_path%3Dapp", shop_alone.pool)
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        for table in tables:
            await connection.execute(f"INSERT INTO {table} (what) VALUES ($1)", message.json())
        await messaging.send(shop.topic.name, "sent", type="sent", connection=connection)

    @messaging.consumer(shop.topic.name, group="sent", types="sent")
    async def sent(message: Message, connection: Any) -> None:
        await connection.execute("INSERT INTO public.orders (number) VALUES ($1)", message.json())

    async with running(messaging):
        await messaging.send(shop.topic.name, "first", type="first")

        async def are_there() -> bool:
            return await shop.orders() != []

        await until(are_there)
        for table in tables:
            assert await shop.pool.fetchval(f"SELECT what FROM app.{table} LIMIT 1") == "first"
