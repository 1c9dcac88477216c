"""A remote system that a handler needs and that is away: its messages wait, and none of them dies of it."""

from typing import Any

import pytest

from flows.service.conftest import Shop, running, until
from kassa.messaging import Message, Unavailable, breaker, library
from kassa.messaging.ladder import TRIES_MAX
from kassa.messaging.tables import SCHEMA

HOUR_S = 3600.0


async def test_messages_wait_for_what_is_away_in_order_and_without_counting_tries(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "PAUSE_S", 0.01)
    monkeypatch.setattr(breaker, "OPEN_S", 0.01)
    monkeypatch.setattr(breaker, "OPEN_MAX_S", 0.01)
    messaging = shop.messaging()
    attempts: list[int] = []

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        attempts.append(message.attempts)
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.json()["number"])
        if len(attempts) <= 2 * TRIES_MAX:
            raise Unavailable("bank", "connection refused")

    async def is_done() -> bool:
        return await shop.orders() == ["1", "2", "3"]

    async with running(messaging):
        for number in ("1", "2", "3"):
            await messaging.send(shop.topic.name, {"number": number}, key="k")
        await until(is_done)

        assert await messaging.dead_letters.browse(f"{shop.topic.name}:books") == []

    assert set(attempts) == {0} and len(attempts) > 2 * TRIES_MAX


async def test_what_is_known_to_be_away_is_left_alone_and_the_rest_goes_on(
    shop_alone: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "OPEN_S", HOUR_S)
    monkeypatch.setattr(breaker, "OPEN_MAX_S", HOUR_S)
    shop, messages = shop_alone, 20
    messaging = shop.messaging()
    tries, is_away = 0, True

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        nonlocal tries
        if message.json()["number"] == "bank":
            tries += 1
            if is_away:
                raise Unavailable("bank", "connection refused")
        await connection.execute("INSERT INTO orders (number) VALUES ($1)", message.json()["number"])

    async def hurry() -> None:
        await shop.pool.execute(f"UPDATE {SCHEMA}.message SET due = clock_timestamp()")

    async def all_wait_for_long() -> bool:
        statement = f"SELECT count(*) = $1 AND min(due) > clock_timestamp() + interval '1 minute' FROM {SCHEMA}.message"
        return bool(await shop.pool.fetchval(statement, messages))

    async def has(orders: int) -> bool:
        return len(await shop.orders()) == orders

    async with running(messaging):
        for _ in range(messages):
            await messaging.send(shop.topic.name, {"number": "bank"})
        await until(all_wait_for_long)
        tried = tries
        await hurry()
        await until(all_wait_for_long)
        await messaging.send(shop.topic.name, {"number": "other"})
        await until(lambda: has(1))

        # The first ones tell. Those that come later are tried once, so that it is known whom they need.
        assert tries == tried <= messages + breaker.FAILURES_MAX

        is_away = False
        circuits = messaging._breaker._circuits
        circuits["bank"] = circuits["bank"]._replace(open_until=0.0)
        await hurry()
        await until(lambda: has(1 + messages))
        assert circuits == {} and messaging._needs == {}
