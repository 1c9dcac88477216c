"""A broker that gets another name by its place in the settings would lose its place in the event log: Kassa says so and does not
start."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from kassa.db.pool import close_pool, open_pool
from kassa.errors import SettingInvalid
from kassa.messaging.broker_names import read_brokers
from kassa.messaging.brokers import Brokers
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.wake import Wakeups


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Any]:
    pool = await open_pool(database_url, application="test")
    yield pool
    await close_pool(pool)


async def start(pool: Any, urls: Sequence[str]) -> list[str]:
    """The names of these brokers, as a start of Kassa with them has them. They are never connected."""
    # `sleep` stands where a connection would be asked for, which nobody does.
    brokers = Brokers(read_brokers(urls), pool, Wakeups(asyncio.sleep), PAYMENT_ORDERS)  # type: ignore[arg-type]
    await brokers.recognize()
    return [broker.name for broker in brokers]


A, B, C = "amqp://guest:guest@a:5672/shop?heartbeat=5", "amqp://b", "amqp://c"
B_AS_2 = "amqp://b?name=2"
UPPER, LOWER = "amqp://h/Shop", "amqp://h/shop"
EVENTS_OF_A = f"{A}#kassa.events,kassa.events.batch"
ORDERS_OF_A = f"{A}#payment_order"


@pytest.mark.parametrize(
    ("starts", "now", "says"),
    [
        ([(A, B)], (B,), r"b was rabbitmq-2 when Kassa last ran, and would be rabbitmq now.*Add \?name=2"),
        ([(A, B)], ("amqps://somebody@B:5672/",), r"Add \?name=2"),
        ([(A, B)], (B, A), r"b was rabbitmq-2 .*Add \?name=2"),
        ([(A, B)], (B_AS_2, A), r"a:5672\S* was rabbitmq .*Name it before all other rabbitmq brokers"),
        ([(A, B)], (A, C, B), r"b was rabbitmq-2 .* would be rabbitmq-3"),
        ([(B, C, A)], (A,), r"Add \?name=3"),
        ([(UPPER, LOWER)], (LOWER, UPPER), r"Add \?name=2"),
        ([("kafka://x,y", "kafka://z")], ("kafka://z", "kafka://x,y"), r"Add \?name=2"),
        ([(A,)], (ORDERS_OF_A, EVENTS_OF_A), "Name it before"),
        ([("amqp://b?name=north",)], (B,), r"b was rabbitmq-north .* Add \?name=north"),
        ([(A,), (f"{A}&name=shop",)], (A,), r"was rabbitmq-shop .* Add \?name=shop"),
        ([(A, B), (EVENTS_OF_A, f"{B}#payment_order")], (B, A), r"Add \?name=2"),
        ([(A, B), (A,), ()], (B,), r"Add \?name=2"),
        ([(A, B), (A,), (A, C)], (A, C, B), "rabbitmq-2 when"),
    ],
)
async def test_a_broker_that_would_have_another_name_is_refused(
    pool: Any, starts: Sequence[Sequence[str]], now: Sequence[str], says: str
) -> None:
    for urls in starts:
        await start(pool, urls)

    with pytest.raises(SettingInvalid, match=says):
        await start(pool, now)

    await start(pool, starts[-1])


@pytest.mark.parametrize(
    ("before", "now", "names"),
    [
        ((A, B), (A, B), ["rabbitmq", "rabbitmq-2"]),
        ((A, B), (A,), ["rabbitmq"]),
        ((A, B), (A, C), ["rabbitmq", "rabbitmq-2"]),
        ((A, B), (B_AS_2,), ["rabbitmq-2"]),
        ((A, B), (A, B_AS_2), ["rabbitmq", "rabbitmq-2"]),
        ((A, B), (A, C, B_AS_2), ["rabbitmq", "rabbitmq-3", "rabbitmq-2"]),
        ((A,), (A, "kafka://k", B), ["rabbitmq", "kafka", "rabbitmq-2"]),
        ((A,), ("amqps://other@A:5672/shop?ca=ca.pem",), ["rabbitmq"]),
        ((A,), ("amqp://moved:5672/shop",), ["rabbitmq"]),
        ((A,), ("amqp://a:5672/shop?name=new",), ["rabbitmq-new"]),
        ((A,), (EVENTS_OF_A, ORDERS_OF_A), ["rabbitmq", "rabbitmq-2"]),
        ((UPPER,), (UPPER, LOWER), ["rabbitmq", "rabbitmq-2"]),
        ((f"{A}#kassa.events", f"{B}#mails"), (f"{B}#mails",), ["rabbitmq"]),
        (("postgres", "memory"), ("memory", "postgres"), ["memory", "postgres"]),
        ((A,), ("amqp://a:port/shop",), ["rabbitmq"]),
    ],
)
async def test_one_that_keeps_its_name_or_is_given_one_is_not(
    pool: Any, before: Sequence[str], now: Sequence[str], names: list[str]
) -> None:
    await start(pool, before)

    assert await start(pool, now) == names


async def test_two_starts_at_once_agree(pool: Any) -> None:
    answers = await asyncio.gather(start(pool, (A, B)), start(pool, (B, A)), return_exceptions=True)

    assert sorted(type(answer).__name__ for answer in answers) == ["SettingInvalid", "list"]
