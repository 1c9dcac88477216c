"""Handlers keep a connection while they run, and send, reply and ask all the same: the library's pool is never all theirs."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from flows.service.conftest import Shop, running, shop_at, until
from kassa.errors import SettingInvalid
from kassa.messaging import Message, Messaging, NoReply, Topic
from kassa.messaging.library import CONNECTIONS, OWN, OWN_MIN

NUMBERS = [str(number) for number in range(20)]
"""More than the pool has connections."""
PATIENCE_S = 30.0
SOON_S = 5.0


@pytest.fixture
async def shop(empty_database_url: str) -> AsyncIterator[Shop]:
    """Where the broker is the pool's database, too."""
    async with shop_at("postgres", empty_database_url) as shop:
        yield shop


def topics(shop: Shop, *names: str) -> list[Topic]:
    return [shop.topic, *(Topic(f"{shop.topic.name}-{name}", (), "Of the shop.") for name in names)]


def service(shop: Shop, name: str, *more: str, **options: Any) -> Messaging:
    return Messaging(shop.broker, shop.database_url, topics=topics(shop, *more), name=name, **options)


async def have(shop: Shop, numbers: Sequence[str]) -> None:
    async def has() -> bool:
        return sorted(await shop.orders()) == sorted(numbers)

    await until(has, PATIENCE_S)


async def note(connection: Any, number: str) -> None:
    await connection.execute("INSERT INTO orders (number) VALUES ($1)", number)


async def send_all(messaging: Messaging, topic: str, connection: Any) -> None:
    """All in one commit, so that they are delivered together."""
    async with connection.transaction():
        for number in NUMBERS:
            await messaging.send(topic, {"number": number}, key=number, connection=connection)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same", "other"])
async def test_handlers_that_ask_get_their_answers_however_many_there_are(shop: Shop, elsewhere: bool) -> None:
    _, prices = topics(shop, "prices")
    asker = service(shop, "asker", "prices")
    teller = service(shop, "teller", "prices") if elsewhere else asker

    @asker.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        number = message.json()["number"]
        answer = await asker.request(prices.name, {"number": number}, timeout_s=PATIENCE_S)
        await note(connection, answer.json()["number"])

    @teller.consumer(prices.name, group="prices")
    async def tell(message: Message, connection: Any) -> None:
        await teller.reply(message, message.json())

    async with asyncio.timeout(PATIENCE_S), running(*{id(one): one for one in (teller, asker)}.values()):
        async with shop.pool.acquire() as connection:
            await send_all(asker, shop.topic.name, connection)
        await have(shop, NUMBERS)


async def test_handlers_that_send_without_a_connection_all_end(shop: Shop) -> None:
    _, sent = topics(shop, "sent")
    messaging = service(shop, "shop", "sent")
    begun: set[str] = set()
    are_many = asyncio.Event()

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        number = message.json()["number"]
        await note(connection, number)
        # As many as can be under way at once send together.
        begun.add(number)
        if len(begun) >= CONNECTIONS - OWN - 1:
            are_many.set()
        await are_many.wait()
        await messaging.send(sent.name, {"number": f"sent-{number}"})

    @messaging.consumer(sent.name, group="books")
    async def take_sent(message: Message, connection: Any) -> None:
        await note(connection, message.json()["number"])

    async with asyncio.timeout(PATIENCE_S), running(messaging):
        async with shop.pool.acquire() as connection:
            await send_all(messaging, shop.topic.name, connection)
        await have(shop, [*NUMBERS, *(f"sent-{number}" for number in NUMBERS)])


async def test_busy_consumer_leaves_a_connection_to_each_other_one(shop: Shop) -> None:
    _, quick = topics(shop, "quick")
    messaging = service(shop, "shop", "quick")
    is_over = asyncio.Event()
    under_way = 0

    @messaging.consumer(shop.topic.name, group="slow")
    async def wait(message: Message, connection: Any) -> None:
        nonlocal under_way
        under_way += 1
        await is_over.wait()

    @messaging.consumer(quick.name, group="quick")
    async def take(message: Message, connection: Any) -> None:
        await note(connection, message.json()["number"])

    async def are_all_that_can() -> bool:
        return under_way == CONNECTIONS - OWN

    async with asyncio.timeout(PATIENCE_S), running(messaging):
        async with shop.pool.acquire() as connection:
            await send_all(messaging, shop.topic.name, connection)
        await until(are_all_that_can, PATIENCE_S)
        for number in NUMBERS:
            await messaging.send(quick.name, {"number": number})
        await have(shop, NUMBERS)
        assert await are_all_that_can()
        is_over.set()


async def test_pool_grows_with_the_consumers_unless_it_is_told_its_size(shop: Shop) -> None:
    names = [f"t{number}" for number in range(CONNECTIONS)]

    def consuming(**options: Any) -> Messaging:
        messaging = service(shop, "many", *names, **options)
        for topic in topics(shop, *names)[1:]:

            @messaging.consumer(topic.name, group="books")
            async def take(message: Message, connection: Any) -> None:
                await note(connection, message.topic)

        return messaging

    with pytest.raises(SettingInvalid, match=f"{CONNECTIONS + OWN_MIN} or more"):
        await consuming(connections=CONNECTIONS + OWN_MIN - 1).start()
    with pytest.raises(SettingInvalid, match=f"{OWN_MIN} or more"):
        await service(shop, "none", connections=0).start()
    for given, size in ((None, 2 * CONNECTIONS - 1), (30, 30), (CONNECTIONS + OWN_MIN, CONNECTIONS + OWN_MIN)):
        async with consuming(connections=given) as messaging:
            own, handlers = messaging._started_pool(), messaging._handlers
            assert own.get_max_size() + handlers.get_max_size() == size
            assert handlers.get_max_size() >= CONNECTIONS


async def test_consumer_that_is_registered_after_the_start_holds_up_nobody(shop: Shop) -> None:
    names = [f"t{number}" for number in range(CONNECTIONS - OWN)]
    messaging, earlier = service(shop, "shop", *names), service(shop, "earlier", *names)

    async def take(message: Message, connection: Any) -> None:
        await note(connection, message.json()["number"])

    for topic in topics(shop, *names)[1:]:
        messaging.consumer(topic.name, group="books")(take)
    earlier.consumer(shop.topic.name, group="late")(take)
    # It makes the group.
    async with earlier:
        pass

    async with asyncio.timeout(PATIENCE_S), messaging:
        messaging.consumer(shop.topic.name, group="late")(take)
        consuming = asyncio.create_task(messaging.run())
        async with shop.pool.acquire() as connection:
            await send_all(messaging, shop.topic.name, connection)
        await have(shop, NUMBERS)
        await messaging.send(topics(shop, *names)[-1].name, {"number": "other"})
        await have(shop, [*NUMBERS, "other"])
        consuming.cancel()
        await asyncio.wait([consuming])


async def test_request_that_cannot_even_be_sent_says_so_in_time(shop: Shop) -> None:
    messaging = service(shop, "asker")
    async with asyncio.timeout(PATIENCE_S), messaging, shop.pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE kassa_messaging.message IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(SOON_S):
            with pytest.raises(NoReply):
                await messaging.request(shop.topic.name, {}, timeout_s=0.2)


async def test_handler_that_is_cancelled_while_it_waits_for_a_connection_takes_none(shop: Shop) -> None:
    messaging = service(shop, "shop")
    is_over = asyncio.Event()
    under_way = 0

    @messaging.consumer(shop.topic.name, group="books")
    async def take(message: Message, connection: Any) -> None:
        nonlocal under_way
        under_way += 1
        await note(connection, message.json()["number"])
        await is_over.wait()

    async def are_all_that_can() -> bool:
        return under_way == CONNECTIONS - OWN

    async with asyncio.timeout(PATIENCE_S), messaging:
        consuming = asyncio.create_task(messaging.run())
        async with shop.pool.acquire() as connection:
            await send_all(messaging, shop.topic.name, connection)
        await until(are_all_that_can, PATIENCE_S)
        consuming.cancel()
        await asyncio.wait([consuming])
        is_over.set()
        consuming = asyncio.create_task(messaging.run())
        await have(shop, NUMBERS)
        consuming.cancel()
        await asyncio.wait([consuming])
