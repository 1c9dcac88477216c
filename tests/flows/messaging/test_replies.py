"""Answers on their way over a broker, of which some addresses do not take any."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from flows.messaging.house import HOME, House, put
from kassa.ids import Id, new_id
from kassa.messaging import replies
from kassa.messaging.binder import Binder
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.model import Confirmed, Receipt, Record, Unknown
from kassa.messaging.replies import REPLY_TO, ReplyRelay, reply_queue
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import WINDOWS_MAX, ClaimedMessage, DeadLetters, MessageWork, OutgoingMessage

QUEUE = reply_queue("slow")
PATIENCE_S = 30.0
LATE_S = 0.2


class Slow(PostgresBinder):
    """A broker that confirms nothing to the address "bad", and says so when it is let."""

    def __init__(self, pool: Any, wakeups: Wakeups) -> None:
        super().__init__(pool, wakeups)
        self.name = "slow"
        self.is_asked, self.says_so = asyncio.Event(), asyncio.Event()
        self.arrived = 0

    async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        if address == "bad":
            self.is_asked.set()
            await self.says_so.wait()
            return [Unknown("no confirm")] * len(records)
        self.arrived += len(records)
        return [Confirmed()] * len(records)

    async def binder(self) -> Binder:
        return self

    def is_away(self, reason: str) -> None:
        raise AssertionError(reason)


class NotedWork(MessageWork):
    """Remembers for how long answers were put off."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.delays_s: list[float] = []

    async def retry(self, failed: Sequence[tuple[Any, float, str | None, bool]]) -> set[Id]:
        self.delays_s += [delay_s for _, delay_s, _, _ in failed]
        return await super().retry(failed)


class LateWork(MessageWork):
    """Hears only after a while what it has claimed, as over a slow line."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.has_claimed = asyncio.Event()

    async def claim(self, topic: str, limit: int, *, windows: int = WINDOWS_MAX) -> list[ClaimedMessage]:
        claimed = await super().claim(topic, limit, windows=windows)
        self.has_claimed.set()
        await asyncio.sleep(LATE_S)
        return claimed


async def answer(
    pool: Any, address: str, count: int = 1, headers: dict[str, str] | None = None, delay_s: float = 0.0
) -> None:
    """So many answers wait for an address."""
    headers = {REPLY_TO: address, **(headers or {})}
    await put(pool, *(OutgoingMessage(new_id(), HOME, QUEUE, "", 4, delay_s, headers, b"{}") for _ in range(count)))


async def look(home: int, noun: str, resource: Id) -> bytes | None:
    raise LookupError(resource)


@pytest.fixture
def wakeups(house: House) -> Wakeups:
    return Wakeups(house.pool.acquire)


async def test_an_address_that_confirms_nothing_holds_up_no_other(house: House, wakeups: Wakeups) -> None:
    work, broker = MessageWork(house.pool), Slow(house.pool, wakeups)
    await answer(house.pool, "bad", 5)
    await answer(house.pool, "good", 300)
    running = asyncio.create_task(ReplyRelay(work, broker, look, wakeups).run())

    left = 305
    async with asyncio.timeout(PATIENCE_S):
        await broker.is_asked.wait()
        await answer(house.pool, "bad", 5)
        while left > 10:
            await asyncio.sleep(0.05)
            left = await house.pool.fetchval("SELECT count(*) FROM message")

    assert broker.arrived == 300
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_an_address_that_confirms_nothing_is_tried_more_and_more_seldom(
    house: House, wakeups: Wakeups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "SOON_S", 0.0)
    work, broker = NotedWork(house.pool), Slow(house.pool, wakeups)
    relay = ReplyRelay(work, broker, look, wakeups)
    broker.says_so.set()
    await answer(house.pool, "bad")

    async with asyncio.timeout(PATIENCE_S):
        while len(work.delays_s) < 6:
            await house.pool.execute("UPDATE message SET due = clock_timestamp() WHERE topic = $1", QUEUE)
            await relay.step()
            await asyncio.sleep(0.01)

    assert work.delays_s == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


async def test_a_relay_that_ends_gives_back_what_it_could_not_send(house: House, wakeups: Wakeups) -> None:
    work, broker = MessageWork(house.pool), Slow(house.pool, wakeups)
    await answer(house.pool, "bad", 3)
    running = asyncio.create_task(ReplyRelay(work, broker, look, wakeups).run())
    await asyncio.wait_for(broker.is_asked.wait(), PATIENCE_S)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert len(await work.claim(QUEUE, 10)) == 3


async def test_a_relay_that_ends_while_it_claims_gives_back_what_it_would_have_got(
    house: House, wakeups: Wakeups
) -> None:
    work = LateWork(house.pool)
    await answer(house.pool, "good", 3)
    running = asyncio.create_task(ReplyRelay(work, Slow(house.pool, wakeups), look, wakeups).run())
    await asyncio.wait_for(work.has_claimed.wait(), PATIENCE_S)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert [message.attempts for message in await MessageWork(house.pool).claim(QUEUE, 10)] == [0, 0, 0]


async def test_an_answer_that_cannot_be_looked_up_holds_up_no_other_and_is_tried_again(
    house: House, wakeups: Wakeups
) -> None:
    work, broker = NotedWork(house.pool), Slow(house.pool, wakeups)
    relay = ReplyRelay(work, broker, look, wakeups)
    await answer(house.pool, "one", headers={"kassa-owed": "payment x"})
    await answer(house.pool, "one")
    await answer(house.pool, "two")

    assert await relay.step() == 3

    (queue,) = await work.queues(QUEUE)
    (left,) = await work.peek(QUEUE)
    assert (broker.arrived, queue.in_flight, queue.delayed) == (2, 0, 1)
    assert (left.attempts, left.last_error) == (1, "LookupError('x')")
    assert work.delays_s == [1.0]


async def test_an_answer_that_nobody_could_look_up_for_an_hour_is_a_dead_letter(house: House, wakeups: Wakeups) -> None:
    work = MessageWork(house.pool)
    await answer(house.pool, "one", headers={"kassa-owed": "payment x"})
    await house.pool.execute("UPDATE message SET attempts = 60")

    await ReplyRelay(work, Slow(house.pool, wakeups), look, wakeups).step()

    (letter,) = await DeadLetters(house.pool).browse(QUEUE)
    assert (letter.reason, letter.attempts) == ("LookupError('x')", 61)


async def test_a_database_that_is_away_costs_an_address_a_pause_and_no_try(house: House, wakeups: Wakeups) -> None:
    async def look_in_vain(home: int, noun: str, resource: Id) -> bytes | None:
        raise ConnectionResetError(noun)

    work, broker = NotedWork(house.pool), Slow(house.pool, wakeups)
    await answer(house.pool, "one", headers={"kassa-owed": "payment x"})
    await answer(house.pool, "one")

    await ReplyRelay(work, broker, look_in_vain, wakeups).step()

    assert work.delays_s == [replies.PAUSE_S] * 2
    assert [(message.attempts, message.leased_until) for message in await work.peek(QUEUE)] == [(0, None)] * 2
    assert broker.arrived == 0


async def test_a_broker_that_breaks_costs_an_address_a_pause_and_no_try(house: House, wakeups: Wakeups) -> None:
    class Broken(Slow):
        async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
            if address == "bad":
                raise RuntimeError(address)
            return await super().reply(address, records, deadline_s=deadline_s)

    work, broker = NotedWork(house.pool), Broken(house.pool, wakeups)
    await answer(house.pool, "bad", 2)
    await answer(house.pool, "good")

    await ReplyRelay(work, broker, look, wakeups).step()

    assert work.delays_s == [replies.PAUSE_S] * 2
    assert [(message.attempts, message.leased_until) for message in await work.peek(QUEUE)] == [(0, None)] * 2
    assert broker.arrived == 1


async def test_purging_leaves_an_answer_that_is_owed_and_not_due(house: House, wakeups: Wakeups) -> None:
    """Whoever asks the channel replaces it; were it gone, who asked would never hear."""
    work, owed = MessageWork(house.pool), {"kassa-owed": "payment x"}
    await answer(house.pool, "later", headers=owed, delay_s=3600.0)
    await answer(house.pool, "due", headers=owed)
    await answer(house.pool, "known")
    await answer(house.pool, "known later", delay_s=3600.0)

    assert await work.purge(QUEUE) == 3

    (left,) = await work.peek(QUEUE)
    assert left.headers[REPLY_TO] == "later"
