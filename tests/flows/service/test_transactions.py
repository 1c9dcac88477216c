"""What a service sends and does belongs to its own transaction, whatever its driver: all of it or nothing, and at once.

Only the service's database matters here, so one broker is enough.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timedelta, tzinfo
from functools import partial
from typing import Any, Self

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from flows.service.conftest import Shop, running, until
from kassa.errors import SettingInvalid
from kassa.messaging import Message, Messaging, outbox, relay
from kassa.messaging.library import INBOX_KEEP_MAX
from kassa.messaging.outbox import INBOX_KEEP, WAKES_PER_S, Bell
from kassa.messaging.tables import SCHEMA

HOUR_S = 3600.0
PATIENCE_S = 30.0
SETTLED_S = 0.6
"""By then the relay has looked, and looked again after work."""

Begin = Callable[[], AbstractAsyncContextManager[Any]]
"""Opens a transaction and gives what sends in it."""


class Broken(Exception):
    """What goes wrong in a transaction."""


def taking_orders(shop: Shop) -> Messaging:
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.json()["number"])

    return messaging


@asynccontextmanager
async def asyncpg_transaction(shop: Shop) -> AsyncIterator[Any]:
    async with shop.pool.acquire() as connection, connection.transaction():
        yield connection


@asynccontextmanager
async def psycopg_transaction(shop: Shop) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(shop.database_url) as connection:
        yield connection


@asynccontextmanager
async def core_transaction(shop: Shop) -> AsyncIterator[Any]:
    engine = create_async_engine(shop.sqlalchemy_url)
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


@asynccontextmanager
async def session_transaction(shop: Shop) -> AsyncIterator[Any]:
    engine = create_async_engine(shop.sqlalchemy_url)
    try:
        async with AsyncSession(engine) as session, session.begin():
            yield session
    finally:
        await engine.dispose()


@asynccontextmanager
async def blocking_psycopg_transaction(shop: Shop) -> AsyncIterator[Any]:
    with psycopg.connect(shop.database_url) as connection:
        yield connection


@asynccontextmanager
async def blocking_core_transaction(shop: Shop) -> AsyncIterator[Any]:
    engine = sqlalchemy.create_engine(shop.database_url.replace("postgresql://", "postgresql+psycopg://"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


WAYS = [
    asyncpg_transaction,
    psycopg_transaction,
    core_transaction,
    session_transaction,
    blocking_psycopg_transaction,
    blocking_core_transaction,
]


async def send(messaging: Messaging, topic: str, number: str, connection: Any, *, delay_s: float = 0.0) -> None:
    """As a service of this kind sends."""
    if isinstance(connection, psycopg.Connection | sqlalchemy.Connection):
        messaging.send_now(topic, {"number": number}, key="k", connection=connection, delay_s=delay_s)
    else:
        await messaging.send(topic, {"number": number}, key="k", connection=connection, delay_s=delay_s)


def put_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this process is an hour ahead, for whoever in the outbox looks at it."""

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(hours=1)

    monkeypatch.setattr(outbox, "datetime", Ahead, raising=False)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + HOUR_S)


@pytest.fixture
def wrong_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    put_ahead(monkeypatch)


def sleepy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relays do not look by themselves any more."""
    monkeypatch.setattr(relay, "POLL_S", HOUR_S)
    monkeypatch.setattr(relay, "AGAIN_S", ())


async def fall_asleep(shop: Shop, messaging: Messaging) -> None:
    """The service is up, hears what PostgreSQL tells, and its relay has sent order 0 and found nothing more."""

    async def hears() -> bool:
        return messaging._wakeups is not None and messaging._wakeups._pid != 0

    await until(hears)
    await messaging.send(shop.topic.name, {"number": "0"})
    await until(lambda: has(shop, ["0"]))
    await until(lambda: is_empty(shop))
    await asyncio.sleep(SETTLED_S)


async def is_empty(shop: Shop) -> bool:
    """Whether nothing is in the outbox."""
    return bool(await shop.pool.fetchval(f"SELECT count(*) = 0 FROM {SCHEMA}.message"))


@pytest.mark.parametrize("way", WAYS)
async def test_what_was_sent_in_a_transaction_that_rolls_back_is_never_sent(
    shop_alone: Shop, way: Callable[[Shop], AbstractAsyncContextManager[Any]]
) -> None:
    shop, messaging = shop_alone, taking_orders(shop_alone)
    async with running(messaging):
        with pytest.raises(Broken):
            async with way(shop) as connection:
                await send(messaging, shop.topic.name, "never", connection)
                raise Broken
        async with way(shop) as connection:
            await send(messaging, shop.topic.name, "1", connection)

        await until(lambda: has(shop, ["1"]))
        await until(lambda: is_empty(shop))

    # The same key: what was sent before would be there before.
    assert await shop.orders() == ["1"]


@pytest.mark.parametrize("way", WAYS)
async def test_commit_wakes_the_relay(
    shop_alone: Shop, way: Callable[[Shop], AbstractAsyncContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay does not look by itself for an hour, and has looked in vain before the commit."""
    shop, messaging = shop_alone, taking_orders(shop_alone)
    sleepy(monkeypatch)
    async with running(messaging):
        await fall_asleep(shop, messaging)
        async with way(shop) as connection:
            await send(messaging, shop.topic.name, "1", connection)
            await asyncio.sleep(SETTLED_S)
            assert await shop.orders() == ["0"]

        await until(lambda: has(shop, ["0", "1"]), timeout_s=60.0)


async def test_service_that_runs_elsewhere_wakes_the_relay(shop_alone: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a web server's process does, which only sends: nothing is started there."""
    shop, messaging, elsewhere = shop_alone, taking_orders(shop_alone), shop_alone.messaging()
    sleepy(monkeypatch)

    def sell() -> None:
        with psycopg.connect(shop.database_url) as connection:
            elsewhere.send_now(shop.topic.name, {"number": "1"}, connection=connection)

    async with running(messaging):
        await fall_asleep(shop, messaging)
        await asyncio.to_thread(sell)

        await until(lambda: has(shop, ["0", "1"]), timeout_s=60.0)


async def test_what_a_handler_sends_leaves_with_its_commit(shop_alone: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    sleepy(monkeypatch)
    shop = shop_alone
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group="chain")
    async def take(message: Message, connection: Any) -> None:
        number = message.json()["number"]
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", str(number))
        if number < 3:
            await messaging.send(shop.topic.name, {"number": number + 1}, connection=connection)
            await asyncio.sleep(SETTLED_S)

    async with running(messaging):
        await messaging.send(shop.topic.name, {"number": 1})

        await until(lambda: has(shop, ["1", "2", "3"]), timeout_s=60.0)


async def test_transaction_can_be_prepared_where_commits_do_not_notify(shop_alone: Shop) -> None:
    """PostgreSQL refuses PREPARE TRANSACTION after a NOTIFY."""
    shop = shop_alone
    loud, quiet = shop.messaging(), shop.messaging(notify=False)
    async with loud:

        def prepare(messaging: Messaging) -> None:
            with psycopg.connect(shop.database_url) as connection:
                connection.tpc_begin(connection.xid(1, shop.topic.name, "shop"))
                messaging.send_now(shop.topic.name, {"number": "1"}, connection=connection)
                connection.tpc_prepare()
                connection.tpc_rollback()

        with pytest.raises(psycopg.Error, match="NOTIFY"):
            prepare(loud)
        prepare(quiet)


@pytest.mark.parametrize("way", [asyncpg_transaction, psycopg_transaction, core_transaction])
async def test_handler_that_fails_leaves_neither_effect_nor_inbox_row(
    shop_alone: Shop, way: Callable[[Shop], AbstractAsyncContextManager[Any]]
) -> None:
    shop = shop_alone
    messaging = shop.messaging(transaction=partial(way, shop))
    left: list[tuple[int, int]] = []

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        # What the tries before this one left behind, seen from outside.
        left.append(await rows(shop))
        statement = "INSERT INTO orders (number) VALUES ('1')"
        await connection.execute(sqlalchemy.text(statement) if way is core_transaction else statement)
        if len(left) < 3:
            raise Broken

    async with running(messaging):
        await messaging.send(shop.topic.name, {})
        await until(lambda: has(shop, ["1"]))
        await asyncio.sleep(SETTLED_S)

    assert left == [(0, 0)] * 3
    assert await rows(shop) == (1, 1)


async def rows(shop: Shop) -> tuple[int, int]:
    """Effects and inbox rows that are committed."""
    row = await shop.pool.fetchrow(f"SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM {SCHEMA}.inbox)")
    return row[0], row[1]


async def has(shop: Shop, numbers: list[str]) -> bool:
    return sorted(await shop.orders()) == sorted(numbers)


async def test_service_remembers_as_long_as_it_is_told(shop_alone: Shop) -> None:
    shop = shop_alone
    old = INBOX_KEEP + INBOX_KEEP / 2

    async def remembers() -> int:
        count: int = await shop.pool.fetchval(f"SELECT count(*) FROM {SCHEMA}.inbox")
        return count

    def books(keep: timedelta) -> Messaging:
        """A process that consumes; one that only sends forgets nothing."""
        messaging = shop.messaging(inbox_keep=keep)

        @messaging.consumer(shop.topic.name, group="books")
        async def handle(message: Message, connection: Any) -> None:
            raise AssertionError

        return messaging

    async with books(2 * INBOX_KEEP) as messaging:
        assert await outbox.note(messaging._started_pool(), "books", "r-1")
        await shop.pool.execute(f"UPDATE {SCHEMA}.inbox SET at = now() - $1::interval", old)
    async with books(2 * INBOX_KEEP), shop.messaging():
        await asyncio.sleep(SETTLED_S)
        assert await remembers() == 1
    async with books(INBOX_KEEP):
        await until(lambda: is_zero(remembers))


async def is_zero(count: Callable[[], Any]) -> bool:
    return bool(await count() == 0)


@pytest.mark.parametrize("keep", [INBOX_KEEP / 2, -INBOX_KEEP, INBOX_KEEP_MAX * 2])
def test_service_that_would_forget_too_soon_or_never_is_refused(keep: Any) -> None:
    with pytest.raises(SettingInvalid, match="8 days"):
        Messaging("memory", "postgresql://nowhere/shop", inbox_keep=keep)


def test_bell_rings_for_each_where_little_happens_and_for_some_under_load() -> None:
    now = 0.0

    def clock() -> float:
        return now

    bell = Bell(clock)
    first = sum(bell.rings() for _ in range(1000))
    now += 0.5
    later = sum(bell.rings() for _ in range(1000))
    now += HOUR_S
    after_rest = sum(bell.rings() for _ in range(1000))

    assert (first, later, after_rest) == (WAKES_PER_S, WAKES_PER_S / 2, WAKES_PER_S)


async def test_in_a_pipeline_of_psycopg_a_repeat_is_known(shop_alone: Shop) -> None:
    shop = shop_alone
    async with (
        shop.messaging(),
        await psycopg.AsyncConnection.connect(shop.database_url) as connection,
        connection.pipeline(),
    ):
        assert [await outbox.note(connection, "shop", "r-1") for _ in range(2)] == [True, False]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wakes", [True, False], ids=["wakes", "quiet"])
async def test_a_message_is_due_by_the_clock_of_the_database(
    shop_alone: Shop, way: Callable[[Shop], AbstractAsyncContextManager[Any]], wakes: bool, wrong_clock: None
) -> None:
    """A service whose clock is ahead would send late, and be overtaken in its key by one whose clock is right."""
    shop = shop_alone
    messaging = shop.messaging(notify=wakes)
    # It makes the tables, and its relay has ended.
    async with messaging:
        pass
    async with way(shop) as connection:
        await send(messaging, shop.topic.name, "1", connection)
        await send(messaging, shop.topic.name, "2", connection, delay_s=HOUR_S)
        await send(messaging, shop.topic.name, "3", connection, delay_s=60)

    rows = await shop.pool.fetch(
        f"SELECT due - created_at AS delay, now() - created_at AS age FROM {SCHEMA}.message ORDER BY position"
    )
    assert [round(row["delay"].total_seconds()) for row in rows] == [0, HOUR_S, 60]
    assert all(0.0 <= row["age"].total_seconds() < PATIENCE_S for row in rows)


async def test_messages_of_a_key_come_in_order_though_the_clock_of_one_sender_is_ahead(
    shop_alone: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop, messaging = shop_alone, taking_orders(shop_alone)
    async with running(messaging):
        async with asyncpg_transaction(shop) as connection:
            with monkeypatch.context() as clock:
                put_ahead(clock)
                await send(messaging, shop.topic.name, "1", connection)
        async with asyncpg_transaction(shop) as connection:
            await send(messaging, shop.topic.name, "2", connection)
        await until(lambda: has(shop, ["1", "2"]), PATIENCE_S)

    assert await shop.orders() == ["1", "2"]


@pytest.mark.parametrize("way", [asyncpg_transaction, psycopg_transaction, core_transaction])
async def test_what_was_handled_is_noted_by_the_clock_of_the_database(
    shop_alone: Shop, way: Callable[[Shop], AbstractAsyncContextManager[Any]], wrong_clock: None
) -> None:
    """It is forgotten by that clock, too."""
    shop = shop_alone
    async with shop.messaging():
        async with way(shop) as connection:
            assert await outbox.note(connection, "books", "r-1")

        age_s = await shop.pool.fetchval(f"SELECT extract(epoch FROM now() - at)::float8 FROM {SCHEMA}.inbox")

    assert 0.0 <= age_s < PATIENCE_S


async def test_in_a_pipeline_of_psycopg_a_delay_is_that_of_the_message(shop_alone: Shop) -> None:
    shop = shop_alone
    async with shop.messaging() as messaging:
        async with (
            await psycopg.AsyncConnection.connect(shop.database_url) as connection,
            connection.pipeline(),
        ):
            for delay_s in (HOUR_S, 2 * HOUR_S):
                await send(messaging, shop.topic.name, "1", connection, delay_s=delay_s)
        rows = await shop.pool.fetch(f"SELECT due - created_at AS delay FROM {SCHEMA}.message ORDER BY position")

    assert [round(row["delay"].total_seconds()) for row in rows] == [HOUR_S, 2 * HOUR_S]


@pytest.mark.parametrize("delay_s", [float("nan"), float("inf"), 1e12])
async def test_a_delay_that_never_ends_is_refused_where_it_is_sent(delay_s: float) -> None:
    messaging = Messaging("memory", "postgresql://nowhere/shop")

    with pytest.raises(SettingInvalid, match="delay"):
        await messaging.send("kassa.events", {}, delay_s=delay_s)
