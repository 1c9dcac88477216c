"""What goes wrong in a service's handlers and rows belongs to the message that it went wrong with, and stops no other."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from flows.service.conftest import Shop, running, shop_at, until
from kassa.errors import BrokerUnreachable, SettingInvalid
from kassa.ids import new_id
from kassa.messaging import Message, Messaging, NoReply, Topic, Unavailable, library, outbox
from kassa.messaging.outbox import INBOX_KEEP
from kassa.messaging.supplied import SuppliedBinder
from kassa.messaging.tables import SCHEMA
from kassa.messaging.work import LAPSES_MAX, DeadLetter

GROUP = "books"
PATIENCE_S = 30.0
HALF = "\ud800"
"""Half of a character, which no text of PostgreSQL, and nothing in UTF-8, can hold."""


@pytest.fixture(params=["postgres", "memory"])
async def shop(request: pytest.FixtureRequest, empty_database_url: str) -> AsyncIterator[Shop]:
    async with shop_at(request.param, empty_database_url) as shop:
        yield shop


@pytest.fixture
async def shop_in_memory(empty_database_url: str) -> AsyncIterator[Shop]:
    async with shop_at("memory", empty_database_url) as shop:
        yield shop


@pytest.fixture
def three_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder that is over soon."""
    monkeypatch.setattr(library, "message_delay", lambda attempts, chance: 0.0 if attempts < 3 else None)


async def note(connection: Any, number: str) -> None:
    await connection.execute("INSERT INTO orders (number) VALUES ($1)", number)


async def have(shop: Shop, *numbers: str) -> None:
    """Returns once exactly these orders are noted."""

    async def has() -> bool:
        return sorted(await shop.orders()) == sorted(numbers)

    await until(has, PATIENCE_S)


async def the_dead(messaging: Messaging, shop: Shop, count: int = 1) -> list[DeadLetter]:
    """The dead letters, once there are so many."""
    queue = f"{shop.topic.name}:{GROUP}"

    async def died() -> bool:
        return len(await messaging.dead_letters.browse(queue)) == count

    await until(died, PATIENCE_S)
    return await messaging.dead_letters.browse(queue)


@pytest.mark.usefixtures("three_tries")
async def test_an_error_with_half_a_character_in_its_text_stops_no_consumer(shop: Shop) -> None:
    messaging = shop.messaging()
    tries: list[int] = []

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        number = message.json()["number"]
        if number == "bad":
            tries.append(message.attempts)
            raise ValueError(f"{HALF} and\0 what somebody wrote")
        await note(connection, number)

    async with running(messaging):
        for number in ("1", "bad", "2"):
            await messaging.send(shop.topic.name, {"number": number})
        await have(shop, "1", "2")
        (dead,) = await the_dead(messaging, shop)
        await messaging.send(shop.topic.name, {"number": "3"})
        await have(shop, "1", "2", "3")

    assert tries == [0, 1, 2]
    assert dead.reason == "ValueError: ? and what somebody wrote"


async def test_a_service_that_was_stopped_and_started_again_gets_its_answers(shop: Shop) -> None:
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        await messaging.reply(message, {"done": message.json()["number"]}, connection=connection)

    answers = []
    for number in (1, 2):
        async with running(messaging):
            answer = await messaging.request(shop.topic.name, {"number": number}, timeout_s=PATIENCE_S)
            answers.append(answer.json())

    assert answers == [{"done": 1}, {"done": 2}]


class SlowMaking:
    """A broker that takes its time to make the queue of a service's answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        self.fails: list[Exception] = []
        """What it then says, the next time first."""
        self.may_end = asyncio.Event()
        self._provision = SuppliedBinder.provision
        # A function, which becomes a method of the binder.
        monkeypatch.setattr(SuppliedBinder, "provision", lambda *given, **options: self._slowly(*given, **options))

    async def _slowly(self, binder: SuppliedBinder, topics: Sequence[Topic], *, verify_only: bool = False) -> list[str]:
        if topics[0].name.startswith("replies."):
            self.times += 1
            await self.may_end.wait()
            if self.fails:
                raise self.fails.pop(0)
        return await self._provision(binder, topics, verify_only=verify_only)


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> SlowMaking:
    return SlowMaking(monkeypatch)


@asynccontextmanager
async def asking(shop: Shop) -> AsyncIterator[Messaging]:
    """A service that answers its own requests."""
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        await messaging.reply(message, {"done": message.json()["number"]}, connection=connection)

    async with running(messaging):
        yield messaging


def request(messaging: Messaging, shop: Shop, number: int, timeout_s: float = PATIENCE_S) -> "asyncio.Task[Message]":
    return asyncio.create_task(messaging.request(shop.topic.name, {"number": number}, timeout_s=timeout_s))


async def test_time_of_a_request_is_the_time_of_its_answers_queue_too(shop_in_memory: Shop, making: SlowMaking) -> None:
    async with asking(shop_in_memory) as messaging:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(NoReply):
                await request(messaging, shop_in_memory, 1, timeout_s=0.1)
        second = request(messaging, shop_in_memory, 2)
        await asyncio.sleep(0.1)
        making.may_end.set()

        assert (await second).json() == {"done": 2}
        assert making.times == 1, "it was not made anew"


async def test_requests_at_once_share_the_making_of_their_queue(shop_in_memory: Shop, making: SlowMaking) -> None:
    async with asking(shop_in_memory) as messaging:
        first, *others = (request(messaging, shop_in_memory, number) for number in (1, 2, 3))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.wait([first])
        making.may_end.set()

        assert first.cancelled()
        assert [answer.json() for answer in await asyncio.gather(*others)] == [{"done": 2}, {"done": 3}]
        assert making.times == 1


async def test_queue_of_answers_that_could_not_be_made_is_made_for_the_next_request(
    shop_in_memory: Shop, making: SlowMaking
) -> None:
    making.fails.append(BrokerUnreachable("not now"))
    async with asking(shop_in_memory) as messaging:
        two = [request(messaging, shop_in_memory, number) for number in (1, 2)]
        await asyncio.sleep(0.1)
        making.may_end.set()
        assert all(isinstance(said, BrokerUnreachable) for said in await asyncio.gather(*two, return_exceptions=True))

        assert (await request(messaging, shop_in_memory, 3)).json() == {"done": 3}
        assert making.times == 2


async def test_request_ends_when_the_messaging_is_stopped_before_its_queue_is_there(
    shop_in_memory: Shop, making: SlowMaking
) -> None:
    async with asking(shop_in_memory) as messaging:
        asked = request(messaging, shop_in_memory, 1)
        await asyncio.sleep(0.1)

    async with asyncio.timeout(PATIENCE_S / 2):
        with pytest.raises(NoReply):
            await asked
    making.may_end.set()
    async with running(messaging):
        assert (await request(messaging, shop_in_memory, 2)).json() == {"done": 2}


async def test_what_ends_whoever_sends_it_is_counted_as_given_up(shop_in_memory: Shop) -> None:
    shop, messaging = shop_in_memory, shop_in_memory.messaging()
    async with messaging:
        async with shop.pool.acquire() as connection, connection.transaction():
            await messaging.send(shop.topic.name, {"number": "1"}, connection=connection)
            await connection.execute(f"UPDATE {SCHEMA}.message SET lapses = $1", LAPSES_MAX)

        async def died() -> bool:
            return len(await messaging.dead_letters.browse(outbox.PREFIX + shop.topic.name)) == 1

        await until(died, PATIENCE_S)
        # The relay counts it when it has heard that it is dead.
        await asyncio.sleep(0.1)

    dead = {name: passage.dead for name, passage in messaging.meters.passages.items() if passage.dead}
    assert dead == {(outbox.PREFIX.rstrip(":"), shop.topic.name): 1}


async def test_what_ends_whoever_handles_it_is_counted_as_given_up(shop: Shop) -> None:
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        # The first one puts it off, and it ends all the others.
        raise Unavailable("printer", "not now")

    queue = f"{shop.topic.name}:{GROUP}"
    async with running(messaging):
        await messaging.send(shop.topic.name, {"number": "1"})

        async def waits() -> bool:
            said = await shop.pool.execute(
                f"UPDATE {SCHEMA}.message SET lapses = $1 WHERE topic = $2", LAPSES_MAX, queue
            )
            return bool(said != "UPDATE 0")

        await until(waits, PATIENCE_S)
        await the_dead(messaging, shop)
        await asyncio.sleep(0.1)

    assert messaging.meters.passage(shop.topic.name, GROUP).dead == 1


async def test_what_a_handler_cannot_decode_elsewhere_is_tried_again(shop: Shop) -> None:
    """As the answer of a service that it asked, which is cut off today and whole tomorrow."""
    messaging = shop.messaging()
    tries: list[int] = []

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        tries.append(message.attempts)
        msgspec.json.decode(b'{"rate": ' if message.attempts < 2 else b'{"rate": 7}')
        await note(connection, message.json()["number"])

    async with running(messaging):
        await messaging.send(shop.topic.name, {"number": "1"})
        await have(shop, "1")
        dead = await messaging.dead_letters.browse(f"{shop.topic.name}:{GROUP}")

    assert (tries, dead) == ([0, 1, 2], [])


@pytest.mark.parametrize("body", [b"no JSON", b'"\xff"', b"[" * 100_000], ids=["text", "no-utf-8", "deep"])
async def test_a_body_that_is_no_json_is_dead_at_once(shop: Shop, body: bytes) -> None:
    messaging = shop.messaging()
    tries: list[int] = []

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        tries.append(message.attempts)
        message.json()

    async with running(messaging):
        await messaging.send(shop.topic.name, body)
        (dead,) = await the_dead(messaging, shop)

    assert tries == [0]
    assert dead.reason.startswith("BodyUnreadable: ")


@pytest.mark.parametrize("headers", [{"tries": 1}, {"name": HALF}, {HALF: "x"}, {1: "x"}, {"raw": b"x"}, {"no": None}])
async def test_headers_that_are_no_text_are_refused_where_they_are_sent(headers: Any) -> None:
    messaging = Messaging("memory", "postgresql://nowhere/shop")

    with pytest.raises(SettingInvalid, match="headers"):
        await messaging.send("kassa.events", {}, headers=headers)
    with pytest.raises(SettingInvalid, match="headers"):
        messaging.send_now("kassa.events", {}, headers=headers, connection=None)


async def test_rows_of_other_programs_whose_headers_are_no_text_are_sent_beside_others(shop: Shop) -> None:
    messaging = shop.messaging()
    seen: dict[str, dict[str, str]] = {}

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        seen[message.json()["number"]] = message.headers
        await note(connection, message.json()["number"])

    async with messaging:
        raw = {"1": '{"tries": 1}', "2": '["x"]', "3": '{"a": "\\ud800"}', "4": "no JSON", "5": '{"good": "yes"}'}
        for number, headers in raw.items():
            await shop.pool.execute(
                f"INSERT INTO {SCHEMA}.message (id, home, topic, key, priority, due, created_at, headers, body)"
                " VALUES ($1, 0, $2, '', 4, now(), now(), $3, $4)",
                new_id(), outbox.PREFIX + shop.topic.name, headers, json.dumps({"number": number}).encode(),
            )  # fmt: skip
    async with running(messaging):
        await have(shop, *raw)

    assert seen["1"]["tries"] == "1"
    assert seen["3"]["a"] == "?"
    assert seen["5"]["good"] == "yes"


async def test_a_handler_that_lets_a_cancelled_wait_through_is_tried_again(shop: Shop) -> None:
    """Nobody has ended the consumer: what its handler waited for was cancelled."""
    messaging = shop.messaging()
    tries: list[int] = []

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        number = message.json()["number"]
        if number == "shared":
            tries.append(message.attempts)
            if message.attempts < 2:
                shared = asyncio.create_task(asyncio.sleep(PATIENCE_S))
                asyncio.get_running_loop().call_later(0.05, shared.cancel)
                await shared
        await note(connection, number)

    async with running(messaging):
        for number in ("1", "shared", "2"):
            await messaging.send(shop.topic.name, {"number": number})
        await have(shop, "1", "shared", "2")

    assert tries == [0, 1, 2]


async def test_run_that_is_cancelled_ends_though_a_handler_is_under_way(shop: Shop) -> None:
    messaging = shop.messaging()
    begun = asyncio.Event()

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        await note(connection, "never")
        begun.set()
        await asyncio.Event().wait()

    async with messaging:
        consuming = asyncio.create_task(messaging.run())
        await messaging.send(shop.topic.name, {})
        await asyncio.wait_for(begun.wait(), PATIENCE_S)
        consuming.cancel()
        ended, _ = await asyncio.wait([consuming], timeout=PATIENCE_S)

    assert ended == {consuming} and consuming.cancelled()
    assert await shop.orders() == []


async def test_a_service_forgets_only_what_its_own_groups_have_handled(shop: Shop) -> None:
    """Another service on the same database may have been told to remember for longer."""
    messaging = shop.messaging()

    @messaging.consumer(shop.topic.name, group=GROUP)
    async def take(message: Message, connection: Any) -> None:
        raise AssertionError(message)

    async def remembered() -> list[str]:
        return [row["group_name"] for row in await shop.pool.fetch(f"SELECT group_name FROM {SCHEMA}.inbox")]

    async def has_tidied() -> bool:
        return GROUP not in await remembered()

    async with messaging:
        for group in (GROUP, "others"):
            await outbox.note(messaging._started_pool(), group, "r-1")
        await shop.pool.execute(f"UPDATE {SCHEMA}.inbox SET at = now() - $1::interval", 2 * INBOX_KEEP)
    async with messaging:
        await until(has_tidied, PATIENCE_S)

    assert await remembered() == ["others"]
