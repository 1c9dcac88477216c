"""What the binder without a broker promises beside what all binders do: what it refuses, and whoever goes while it claims."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit, urlunsplit

import pytest

from flows.messaging.counting import CountingPool
from flows.messaging.house import HOME, House
from kassa.db.pool import open_pool
from kassa.errors import BrokerUnreachable, SettingInvalid
from kassa.ids import new_id
from kassa.messaging.binder import Resources
from kassa.messaging.binders.postgres import PostgresBinder, PostgresSubscription
from kassa.messaging.lookout import Lookout
from kassa.messaging.model import Confirmed, Delivery, Failed, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import WINDOWS_MAX, ClaimedMessage, MessageWork

TOPIC = Topic("post", ("office",), "Letters, for the tests.")


class SlowWork(MessageWork):
    """Whose claims are committed, and answered when the test says so."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.has_claimed, self.goes_on = asyncio.Event(), asyncio.Event()

    async def claim(self, topic: str, limit: int, *, windows: int = WINDOWS_MAX) -> list[ClaimedMessage]:
        claimed = await super().claim(topic, limit, windows=windows)
        self.has_claimed.set()
        await self.goes_on.wait()
        return claimed


@pytest.fixture
async def binder(house: House) -> PostgresBinder:
    binder = PostgresBinder(house.pool, Wakeups(house.pool.acquire))
    await binder.provision([TOPIC])
    return binder


def letter(id: str, key: str = "") -> Record:
    return Record(id, key, b"{}", {}, home=HOME)


@pytest.fixture
async def reader(house: House) -> AsyncIterator[Any]:
    """Connections of a role that may read all tables, and nothing else."""
    role = f"reader_{new_id()[-12:]}"
    await house.pool.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'secret'; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"
    )
    parts = urlsplit(house.url)
    url = urlunsplit(parts._replace(netloc=f"{role}:secret@{parts.netloc.rpartition('@')[2]}"))
    pool = await open_pool(url, application="test reader")
    yield pool
    await pool.close()
    await house.pool.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(
    ("url", "refusal"),
    [("postgres", SettingInvalid), ("zeromq://127.0.0.1:0", BrokerUnreachable)],
)
async def test_verifying_needs_no_right_but_to_look(
    url: str, refusal: type[Exception], binder: PostgresBinder, reader: Any
) -> None:
    """ZeroMQ has no rights of its own: who may call its hub may do all that the hub's role may, since its queues are these."""
    more = TOPIC._replace(groups=(*TOPIC.groups, "archive"))

    async with make_binder(url, Resources(reader, Wakeups(reader.acquire))) as looking:
        assert await looking.provision([TOPIC], verify_only=True) == []
        assert await looking.provision([more], verify_only=True) == ["missing: post:archive"]
        with pytest.raises(refusal):
            await looking.provision([more])

    assert await binder.provision([more], verify_only=True) == ["missing: post:archive"]


async def test_a_key_that_no_index_takes_fails_for_good_and_alone(binder: PostgresBinder) -> None:
    """PostgreSQL compresses what it can: only what is random is too long for it."""
    letters = [letter("one"), letter("two", secrets.token_hex(2000)), letter("three")]

    receipts = await binder.send(TOPIC.name, letters, deadline_s=10.0)

    assert receipts[0] == receipts[2] == Confirmed()
    assert isinstance(receipts[1], Failed) and not receipts[1].is_retryable
    assert "maximum" in receipts[1].reason


async def test_nothing_is_sent_to_a_topic_that_cannot_be(binder: PostgresBinder) -> None:
    assert await binder.send("a\0b", [], deadline_s=9.0) == []


async def test_a_bad_record_is_found_in_a_few_statements(house: House) -> None:
    pool = CountingPool(house.pool)
    binder = PostgresBinder(cast(Any, pool), Wakeups(house.pool.acquire))
    await binder.provision([TOPIC])
    letters = [letter(f"{number}", "\0" if number == 70 else "") for number in range(100)]
    pool.statements.clear()

    receipts = await binder.send(TOPIC.name, letters, deadline_s=10.0)

    assert [number for number, receipt in enumerate(receipts) if receipt != Confirmed()] == [70]
    assert len(pool.statements) < 20


async def test_a_send_to_a_topic_that_is_known_is_one_statement(house: House) -> None:
    pool = CountingPool(house.pool)
    binder = PostgresBinder(cast(Any, pool), Wakeups(house.pool.acquire))
    await binder.provision([TOPIC])
    await binder.send(TOPIC.name, [letter("one")], deadline_s=10.0)
    pool.statements.clear()

    await binder.send(TOPIC.name, [letter("two"), letter("three")], deadline_s=10.0)

    assert len(pool.statements) == 1


async def test_group_of_a_moment_ago_gets_what_is_sent_by_whoever_knew_the_others(house: House) -> None:
    """And only once each: those who had it before do not get it again."""
    binder, other = (PostgresBinder(house.pool, Wakeups(house.pool.acquire)) for _ in range(2))
    await binder.provision([TOPIC])
    await binder.send(TOPIC.name, [letter("one")], deadline_s=10.0)

    await other.provision([TOPIC._replace(groups=("cellar",))])
    receipts = await binder.send(TOPIC.name, [letter("one"), letter("two")], deadline_s=10.0)

    assert receipts == [Confirmed(), Confirmed()]
    for group in ("office", "cellar"):
        subscription = await binder.subscribe(TOPIC.name, group)
        assert [one.record.id for one in await subscription.receive(10, 0.0)] == ["one", "two"]


async def test_topic_whose_last_group_went_is_received_by_nobody(house: House, binder: PostgresBinder) -> None:
    await binder.send(TOPIC.name, [letter("one")], deadline_s=10.0)

    await house.pool.execute("DELETE FROM subscription WHERE topic = $1", TOPIC.name)

    assert await binder.send(TOPIC.name, [letter("two")], deadline_s=10.0) == [
        Failed("nobody receives post", is_retryable=False)
    ]


@pytest.mark.parametrize("end", ["close", "cancel", "cancel and close"])
async def test_what_is_claimed_for_one_who_goes_meanwhile_is_free_at_once(house: House, end: str) -> None:
    """At each rolling restart: the claim is committed, and whoever asked for it does not hear the answer."""
    wakeups = Wakeups(house.pool.acquire)
    work, others = SlowWork(house.pool), MessageWork(house.pool)
    binder = PostgresBinder(house.pool, wakeups)
    await binder.provision([TOPIC])
    await binder.send(TOPIC.name, [letter("one", "a"), letter("two", "b")], deadline_s=10.0)
    going = PostgresSubscription(work, Lookout(work, wakeups), "post:office")
    receiving = asyncio.create_task(going.receive(10, 60.0))
    await work.has_claimed.wait()

    if "cancel" in end:
        receiving.cancel()
        with suppress(asyncio.CancelledError):
            await receiving
    closing = asyncio.create_task(going.close(60.0) if "close" in end else asyncio.sleep(0))
    await asyncio.sleep(0.05)
    assert await others.claim("post:office", 10) == []
    work.goes_on.set()
    await closing

    staying = PostgresSubscription(others, Lookout(others, wakeups), "post:office")
    found: list[Delivery] = []
    async with asyncio.timeout(10.0):
        while len(found) < 2:
            found += await staying.receive(10, 1.0)
    assert [(one.record.id, one.attempts) for one in found] == [("one", 0), ("two", 0)]
    assert end != "close" or await receiving == []
