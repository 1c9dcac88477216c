"""A broker that gets another name by its place in the settings would lose its place in the event log: Kassa says so and does not
start."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from kassa.db.pool import close_pool, open_pool
from kassa.errors import SettingInvalid
from kassa.messaging.brokers import Brokers, read_brokers
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.wake import Wakeups


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Any]:
    pool = await open_pool(database_url, application="test")
    yield pool
    await close_pool(pool)


async def start(pool: Any, urls: Sequence[str]) -> list[str]:
    """The names of these brokers, as a start of Kassa with them has them. They are never connected."""
    brokers = Brokers(read_brokers(urls), pool, Wakeups(asyncio.sleep), PAYMENT_ORDERS)  # type: ignore[arg-type]
    await brokers.recognize()
    return [broker.name for broker in brokers]


A, B = "amqp://guest:guest@a:5672/shop?heartbeat=5", "amqp://b"
BOTH = (A, B)


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (BOTH, (B,), r"b was rabbitmq-2 when Kassa last ran, and would be rabbitmq now.*Add \?name=2"),
        (BOTH, (B, A), r"Add \?name=2"),
        (("amqp://b", "amqp://c", A), (A,), r"Add \?name=3"),
        ((f"{A}#kassa.events", f"{A}#mails"), (f"{A}#mails",), r"Add \?name=2"),
        (("amqp://b?name=north",), (B,), r"b was rabbitmq-north .* Add \?name=north"),
        ((A, "kafka://k", B), ("amqp://x", A), r"shop\?\*\*\* was rabbitmq .* Name it first of all rabbitmq brokers"),
    ],
)
async def test_a_broker_that_would_have_another_name_is_refused(
    pool: Any, before: Sequence[str], now: Sequence[str], says: str
) -> None:
    await start(pool, before)

    with pytest.raises(SettingInvalid, match=says):
        await start(pool, now)

    await start(pool, before)


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        (BOTH, BOTH, ["rabbitmq", "rabbitmq-2"]),
        (BOTH, (A,), ["rabbitmq"]),
        (BOTH, ("amqp://b?name=2",), ["rabbitmq-2"]),
        ((A,), (A, "kafka://k", B), ["rabbitmq", "kafka", "rabbitmq-2"]),
        ((A,), ("amqps://other@A:5672/shop?ca=ca.pem",), ["rabbitmq"]),
        ((A,), ("amqp://moved:5672/shop",), ["rabbitmq"]),
        ((A,), ("amqp://a:5672/shop?name=new",), ["rabbitmq-new"]),
        ((f"{A}#kassa.events", f"{A}#mails"), (f"{A}#kassa.events,letters", f"{A}#mails"), ["rabbitmq", "rabbitmq-2"]),
        (("postgres", "memory"), ("memory", "postgres"), ["memory", "postgres"]),
    ],
)
async def test_one_that_keeps_its_name_or_is_given_one_is_not(
    pool: Any, before: Sequence[str], now: Sequence[str], names: list[str]
) -> None:
    await start(pool, before)

    assert await start(pool, now) == names


async def test_what_was_there_long_ago_is_remembered(pool: Any) -> None:
    """Its place in the log is still there."""
    await start(pool, BOTH)
    await start(pool, ())
    await start(pool, (A,))

    with pytest.raises(SettingInvalid, match="rabbitmq-2"):
        await start(pool, (B,))
