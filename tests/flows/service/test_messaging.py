"""kassa.messaging outside Kassa: a service's own tables, its own transactions, its own driver."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.resources import files
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from flows.service.conftest import Shop, running, until
from kassa.errors import SettingInvalid
from kassa.messaging import Message, Messaging, NoReply, Reject
from kassa.messaging.tables import SCHEMA, make_tables, statements, with_schema
from kassa.messaging.work import MessageWork


def taking_orders(shop: Shop, **options: Any) -> Messaging:
    """A service that writes down each order that it is told of."""
    messaging = shop.messaging(**options)

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.json()["number"])

    return messaging


async def test_message_arrives_once_and_only_if_its_transaction_commits(shop: Shop) -> None:
    messaging = taking_orders(shop)
    async with running(messaging):
        async with shop.pool.acquire() as connection:
            with pytest.raises(RuntimeError):
                async with connection.transaction():
                    await messaging.send(shop.topic.name, {"number": "never"}, key="1", connection=connection)
                    raise RuntimeError("the order could not be written")
            async with connection.transaction():
                await messaging.send(shop.topic.name, {"number": "1"}, key="1", connection=connection)
                await messaging.send(shop.topic.name, {"number": "2"}, key="1", connection=connection)

        await until(lambda: is_true(shop, ["1", "2"]))
        await asyncio.sleep(0.2)

        assert await shop.orders() == ["1", "2"]


async def is_true(shop: Shop, numbers: list[str]) -> bool:
    return sorted(await shop.orders()) == sorted(numbers)


async def test_sqlalchemy_and_psycopg_send_in_their_own_transactions(shop: Shop) -> None:
    messaging = taking_orders(shop)
    engine = create_async_engine(shop.database_url.replace("postgresql://", "postgresql+asyncpg://"))
    plain = sqlalchemy.create_engine(shop.database_url.replace("postgresql://", "postgresql+psycopg://"))
    async with running(messaging):
        async with engine.begin() as connection:
            await messaging.send(shop.topic.name, {"number": "core"}, connection=connection)
        async with AsyncSession(engine) as session, session.begin():
            await messaging.send(shop.topic.name, {"number": "session"}, connection=session)
        async with await psycopg.AsyncConnection.connect(shop.database_url) as psycopg_connection:
            await messaging.send(shop.topic.name, {"number": "psycopg"}, connection=psycopg_connection)
        with psycopg.connect(shop.database_url) as blocking:
            messaging.send_now(shop.topic.name, {"number": "blocking"}, connection=blocking)
        with plain.begin() as core:
            messaging.send_now(shop.topic.name, {"number": "plain"}, connection=core)

        await until(lambda: is_true(shop, ["core", "session", "psycopg", "blocking", "plain"]))
    await engine.dispose()
    plain.dispose()


async def test_effect_happens_in_the_services_own_kind_of_transaction(shop: Shop) -> None:
    engine = create_async_engine(shop.database_url.replace("postgresql://", "postgresql+asyncpg://"))
    messaging = shop.messaging()

    @asynccontextmanager
    async def psycopg_transaction() -> AsyncIterator[Any]:
        async with await psycopg.AsyncConnection.connect(shop.database_url) as connection:
            yield connection

    def begin() -> AbstractAsyncContextManager[Any]:
        return engine.begin()

    @messaging.consumer(shop.topic.name, group="alchemists", transaction=begin)
    async def alchemy(message: Message, connection: Any) -> None:
        await connection.execute(sqlalchemy.text("INSERT INTO orders (number) VALUES ('a')"))

    @messaging.consumer(shop.topic.name, group="psychologists", transaction=psycopg_transaction)
    async def psycho(message: Message, connection: Any) -> None:
        await connection.execute("INSERT INTO orders (number) VALUES (%s)", ("p",))

    async with running(messaging):
        await messaging.send(shop.topic.name, {})
        await until(lambda: is_true(shop, ["a", "p"]))
    await engine.dispose()


async def test_handler_that_fails_leaves_nothing_and_is_tried_again_in_order(shop: Shop) -> None:
    messaging = shop.messaging()
    failures = 2

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        nonlocal failures
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.json()["number"])
        if message.json()["number"] == "1" and failures:
            failures -= 1
            raise ConnectionResetError("the printer is away")

    async with running(messaging):
        for number in ("1", "2", "3"):
            await messaging.send(shop.topic.name, {"number": number}, key="k")
        await until(lambda: is_true(shop, ["1", "2", "3"]))

    assert await shop.orders() == ["1", "2", "3"]
    assert failures == 0


async def test_rejected_and_unreadable_messages_are_dead_at_once_and_can_be_replayed(shop: Shop) -> None:
    messaging = shop.messaging()
    is_mended = False

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        if not is_mended:
            raise Reject("there is no such order")
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.json()["number"])

    queue = f"{shop.topic.name}:books"

    async def is_dead() -> bool:
        return len(await messaging.dead_letters.browse(queue)) == 1

    async with running(messaging):
        await messaging.send(shop.topic.name, {"number": "1"})
        await until(is_dead)
        (letter,) = await messaging.dead_letters.browse(queue)
        assert "no such order" in letter.reason

        is_mended = True
        assert await messaging.dead_letters.replay(queue) == 1
        await until(lambda: is_true(shop, ["1"]))
        await messaging.send(shop.topic.name, b"\xff")
        await until(is_dead)


async def test_only_the_wanted_types_of_events_are_handed_over(shop: Shop) -> None:
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group="books", types=["order.paid"])
    async def take(message: Message, connection: Any) -> None:
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.type)

    async with running(messaging):
        await messaging.send(shop.topic.name, {}, type="order.made", key="k")
        await messaging.send(shop.topic.name, {}, type="order.paid", key="k")
        await until(lambda: is_true(shop, ["order.paid"]))


async def test_request_gets_its_answer_from_another_service(shop: Shop) -> None:
    server = shop.messaging()

    @server.consumer(shop.topic.name, group="prices")
    async def price(message: Message, connection: Any) -> None:
        await server.reply(message, {"price": message.json()["pieces"] * 3}, connection=connection)

    # A broker in memory is of one service.
    client = server if shop.broker == "memory" else shop.messaging()
    async with running(*{id(one): one for one in (server, client)}.values()):
        answers = await asyncio.gather(
            *(client.request(shop.topic.name, {"pieces": pieces}, timeout_s=30) for pieces in range(20))
        )

    assert [answer.json() for answer in answers] == [{"price": pieces * 3} for pieces in range(20)]


async def test_request_that_nobody_answers_says_that_it_may_have_been_done(shop: Shop) -> None:
    messaging = taking_orders(shop)
    async with running(messaging):
        with pytest.raises(NoReply) as refused:
            await messaging.request(shop.topic.name, {"number": "1"}, timeout_s=0.5)

        assert refused.value.outcome == "unknown"
        await until(lambda: is_true(shop, ["1"]))


async def test_message_waits_in_the_outbox_while_the_service_is_down(shop: Shop) -> None:
    if shop.broker == "memory":
        first = second = taking_orders(shop)
    else:
        first, second = shop.messaging(), taking_orders(shop)
        async with second:
            pass
    async with first:
        pass
    async with shop.pool.acquire() as connection, connection.transaction():
        await first.send(shop.topic.name, {"number": "1"}, connection=connection)
    assert await shop.orders() == []

    async with running(second):
        await until(lambda: is_true(shop, ["1"]))


async def test_delayed_message_waits(shop: Shop) -> None:
    messaging = taking_orders(shop)
    async with running(messaging):
        await messaging.send(shop.topic.name, {"number": "later"}, key="k", delay_s=6.0)
        await messaging.send(shop.topic.name, {"number": "sooner"}, key="k")
        await until(lambda: is_true(shop, ["later", "sooner"]))

    assert await shop.orders() == ["sooner", "later"]


async def test_urgent_messages_come_first_where_the_topic_has_classes(shop_alone: Shop) -> None:
    shop = shop_alone
    shop.topic = shop.topic._replace(classes=True)
    messaging = taking_orders(shop)

    async def is_sent() -> bool:
        return bool(await shop.pool.fetchval(f"SELECT count(*) = 0 FROM {SCHEMA}.message"))

    async with messaging:
        for number, priority in (("low", 0), ("normal", 4), ("urgent", 9)):
            await messaging.send(shop.topic.name, {"number": number}, key="k", priority=priority)
            await until(is_sent)
        receiving = asyncio.create_task(messaging.run())
        await until(lambda: is_true(shop, ["low", "normal", "urgent"]))
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)

    assert await shop.orders() == ["urgent", "normal", "low"]


async def test_topic_that_was_not_declared_is_told_before_anything_is_sent(shop: Shop) -> None:
    messaging = shop.messaging()
    async with messaging:
        with pytest.raises(SettingInvalid, match="topics="):
            await messaging.send("elsewhere", {})
        with pytest.raises(SettingInvalid, match="connection"):
            await messaging.send(shop.topic.name, {}, connection=object())


async def test_tables_are_made_once_by_whoever_is_first(empty_database_url: str) -> None:
    async def make() -> bool:
        connection = await asyncpg.connect(empty_database_url)
        try:
            return await make_tables(connection)
        finally:
            await connection.close()

    assert sorted(await asyncio.gather(*(make() for _ in range(4)))) == [False, False, False, True]


async def test_tables_of_an_earlier_version_become_those_of_this_one(empty_database_url: str) -> None:
    first = files("kassa.db").joinpath("migrations", "0001_first.sql").read_text(encoding="utf-8")
    connection = await asyncpg.connect(with_schema(empty_database_url))
    await connection.execute(f"CREATE SCHEMA {SCHEMA}")
    for statement in statements(first):
        await connection.execute(statement)
    await connection.execute(
        "INSERT INTO message (id, home, topic, key, priority, due, created_at, lease, headers, body) "
        "SELECT gen_random_uuid(), 1, 'post:office', '', 4, now(), now(), 3, '{}', $1",
        b"from before",
    )

    assert await make_tables(connection)
    assert not await make_tables(connection)

    assert await connection.fetchval("SELECT returned FROM message")
    async with asyncpg.create_pool(with_schema(empty_database_url), min_size=1, max_size=2) as pool:
        work = MessageWork(pool)
        (message,) = await work.claim("post:office", 10)
        assert message.body == b"from before"
        assert await work.acknowledge([message]) == {message.id}
    await connection.close()
