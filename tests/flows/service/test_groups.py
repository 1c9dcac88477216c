"""Consumers of one service in one group: each message goes to the one that wants it, and to no other."""

from typing import Any

import pytest

from flows.service.conftest import Shop, running, until
from kassa.errors import QueueNotFound, SettingInvalid
from kassa.messaging import Message

PAID, REFUNDED = "payment.succeeded", "refund.succeeded"


async def test_consumers_of_one_group_share_its_messages_by_their_types(shop: Shop) -> None:
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group="books", types=[PAID])
    async def paid(message: Message, connection: Any) -> None:
        await note(connection, f"paid {message.json()}")

    @messaging.consumer(shop.topic.name, group="books", types=REFUNDED)
    async def refunded(message: Message, connection: Any) -> None:
        await note(connection, f"refunded {message.json()}")

    @messaging.consumer(shop.topic.name, group="others")
    async def all_of_them(message: Message, connection: Any) -> None:
        await note(connection, f"saw {message.json()}")

    expected = [f"{what} {number}" for number in range(10) for what in ("paid", "refunded")]
    expected += [f"saw {number}" for number in range(10) for _ in range(3)]
    async with running(messaging):
        for number in range(10):
            for type in (PAID, REFUNDED, "payment.closed"):
                await messaging.send(shop.topic.name, number, key=str(number), type=type)

        async def are_done() -> bool:
            return len(await shop.orders()) >= len(expected)

        await until(are_done)
        assert sorted(await shop.orders()) == sorted(expected)


@pytest.mark.parametrize(
    ("first", "second"), [((PAID,), (PAID, REFUNDED)), ((), (PAID,)), ((PAID,), ()), ((), ()), (PAID, PAID)]
)
def test_two_consumers_that_want_the_same_message_in_one_group_are_refused(first: Any, second: Any) -> None:
    messaging = Shop("memory", "postgresql://nowhere/shop", None).messaging()
    messaging.consumer("kassa.events", group="shop", types=first)(never)
    messaging.consumer("kassa.events", group="others", types=second)(never)

    with pytest.raises(SettingInvalid, match="group shop want"):
        messaging.consumer("kassa.events", group="shop", types=second)(never)


async def test_service_without_consumers_runs_until_it_is_cancelled(shop_alone: Shop) -> None:
    messaging = shop_alone.messaging()

    async with running(messaging) as tasks:
        await messaging.send(shop_alone.topic.name, 1)
        await until(lambda: has_left(shop_alone))
        assert not any(task.done() for task in tasks)


async def test_topic_that_nobody_made_is_missed_at_the_start_where_others_make_them(shop: Shop) -> None:
    messaging = shop.messaging(provision=False)
    messaging.consumer(shop.topic.name, group="books")(never)

    with pytest.raises(QueueNotFound, match=rf"provision=False.*{shop.topic.name}"):
        await messaging.start()


async def never(message: Message, connection: Any) -> None:
    raise AssertionError("nobody sends here")


async def note(connection: Any, what: str) -> None:
    await connection.execute("INSERT INTO orders (number) VALUES ($1)", what)


async def has_left(shop: Shop) -> bool:
    return not await shop.pool.fetchval("SELECT count(*) FROM kassa_messaging.message")
