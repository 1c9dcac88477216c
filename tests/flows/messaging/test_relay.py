"""From a commit through the log, the relay and a binder to an effect."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from flows.messaging.house import HOME, House
from kassa.ids import new_id
from kassa.journal.change import Change, Message
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.consumer import Consumer
from kassa.messaging.log import GroupReader, LogGroup
from kassa.messaging.model import Confirmed, Failed, Receipt, Record, Unknown
from kassa.messaging.relay import EventRelay, MessageRelay
from kassa.messaging.topology import EVENTS
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import MessageWork


class Doubtful(PostgresBinder):
    """Says of the first sends that it does not know, although they arrived."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.doubts = 2
        self.refuses: set[str] = set()

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        receipts = await super().send(topic, records, deadline_s=deadline_s)
        if self.doubts:
            self.doubts -= 1
            return [Unknown("cut")] * len(receipts)
        return [
            Failed("too large", is_retryable=False) if one.id in self.refuses else receipt
            for one, receipt in zip(records, receipts, strict=True)
        ]


async def test_every_event_has_its_effect_once_and_in_order_though_sends_are_repeated(house: House) -> None:
    wakeups = Wakeups(asyncio.sleep)  # type: ignore[arg-type]
    binder = Doubtful(house.pool, wakeups)
    await binder.provision([EVENTS._replace(groups=("books",))])
    roots = [await house.root() for _ in range(3)]
    for number in range(30):
        await house.happen((house.one, house.two)[number % 2], roots[number % 3])
    handled: list[Record] = []

    async def handler(records: Sequence[Record]) -> list[Change]:
        handled.extend(records)
        return [Change(home=HOME) for _ in records]

    group = LogGroup(house.pool, "relay")
    await group.create(from_now=False)
    await group.hold()
    reader = GroupReader(group, EventRelay(binder, EVENTS.name).handle, asyncio.sleep)
    while await reader.step():
        pass
    consumer = Consumer(await binder.subscribe(EVENTS.name, "books"), "books", house.one, handler)
    while await consumer.step(0.1):
        pass
    # The relay died before it moved its cursor: everything is sent again.
    await house.pool.execute("DELETE FROM cursor_position")
    while await reader.step():
        pass
    while await consumer.step(0.1):
        pass

    assert consumer.counts.handled == 33
    assert consumer.counts.repeated == 33
    for root in roots:
        sequences = [int(one.headers["ce-sequence"]) for one in handled[:33] if one.key == root]
        assert sequences == list(range(1, 12))
    assert handled[0].headers["ce-specversion"] == "1.0"
    assert handled[0].headers["ce-subject"].startswith("wal_")


async def test_messages_of_a_commit_reach_their_topic_and_leave_the_queue_when_confirmed(house: House) -> None:
    wakeups = Wakeups(asyncio.sleep)  # type: ignore[arg-type]
    binder, work = Doubtful(house.pool, wakeups), MessageWork(house.pool)
    await binder.provision([EVENTS._replace(name="replies", groups=("shop",))])
    messages = tuple(Message(new_id(), "out", "k", b"%d" % number) for number in range(5))
    await house.one.commit(Change(home=HOME, messages=messages))
    binder.refuses = {messages[2].id}
    relay = MessageRelay(work, binder, "out", "replies", wakeups)

    while await relay.step():
        await house.pool.execute("UPDATE message SET due = clock_timestamp()")
    subscription = await binder.subscribe("replies", "shop")
    delivered = await subscription.receive(10, 1)

    assert [one.record.body for one in delivered] == [b"0", b"1", b"2", b"3", b"4"]
    assert [one.topic for one in await work.queues("out")] == ["out"]
    assert (await work.queues("out"))[0].dead == 1


class Silent(PostgresBinder):
    """Takes what is sent, and never says what became of it."""

    def __init__(self, pool: Any, wakeups: Wakeups) -> None:
        super().__init__(pool, wakeups)
        self.is_asked = asyncio.Event()

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        self.is_asked.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_relay_that_ends_gives_back_what_is_not_confirmed(house: House) -> None:
    wakeups = Wakeups(house.pool.acquire)
    binder, work = Silent(house.pool, wakeups), MessageWork(house.pool)
    messages = tuple(Message(new_id(), "out", "k", b"%d" % number) for number in range(3))
    await house.one.commit(Change(home=HOME, messages=messages))
    running = asyncio.create_task(MessageRelay(work, binder, "out", "replies", wakeups).run())
    await asyncio.wait_for(binder.is_asked.wait(), 30)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert [one.body for one in await work.claim("out", 10)] == [b"0", b"1", b"2"]


class Slow(PostgresBinder):
    """Takes its time for each."""

    def __init__(self, pool: Any, wakeups: Wakeups, sent: list[int], takes_s: float) -> None:
        super().__init__(pool, wakeups)
        self.is_asked = asyncio.Event()
        self._sent = sent
        self._takes_s = takes_s

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        self.is_asked.set()
        await asyncio.sleep(self._takes_s)
        self._sent += [int(one.body) for one in records]
        return [Confirmed()] * len(records)


async def works_off(house: House) -> None:
    """Until the queue is empty."""
    left = 1
    while left:
        left = await house.pool.fetchval("SELECT count(*) FROM message WHERE topic = 'out'")
        await asyncio.sleep(0.05)


async def test_relay_whose_lease_runs_out_sends_nothing_behind_the_next_one(house: House) -> None:
    wakeups, sent = Wakeups(house.pool.acquire), list[int]()
    messages = tuple(Message(new_id(), "out", "k", b"%d" % number) for number in range(40))
    await house.one.commit(Change(home=HOME, messages=messages))
    running: list[asyncio.Task[None]] = []
    slow, quick = (Slow(house.pool, wakeups, sent, takes_s) for takes_s in (0.15, 0.05))
    for binder in (slow, quick):
        work = MessageWork(house.pool, lease_s=2.0)
        running.append(asyncio.create_task(MessageRelay(work, binder, "out", "replies", wakeups).run()))
        await asyncio.wait_for(slow.is_asked.wait(), 30)

    await asyncio.wait_for(works_off(house), 60)
    for task in running:
        task.cancel()
    await asyncio.wait(running)

    assert sent == list(range(40))
