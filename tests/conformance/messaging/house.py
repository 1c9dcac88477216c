"""What the suite of the binders shares: a binder with what is beside it, and records."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kassa.clock import SystemClock
from kassa.ids import new_id
from kassa.journal.change import Change, Event
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Binder, Subscription
from kassa.messaging.log import EventLog
from kassa.messaging.model import Ack, Delivery, Record, RetryAfter
from kassa.messaging.topology import Topic, lane
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.payments.records import Wallet

HOME = 7
PATIENCE_S = 180.0
"""Far more than anything takes, also on a machine with a tenfold load."""

SERVERS = {"amqp": "rabbitmq", "kafka": "kafka", "rocketmq": "rocketmq"}
"""The fixture of the real server that a scheme needs; the others need none."""


@dataclass
class Bench:
    """A binder with a topic of its own, and what is beside it."""

    binder: Binder
    topic: Topic
    pool: Any
    journal: PostgresJournal
    wakeups: Wakeups
    letters: DeadLetters

    async def effects(self) -> list[str]:
        """The records that had their effect, in the order of their commits."""
        events = await EventLog(self.pool).of_home(HOME, 100_000)
        return [msgspec.json.decode(event.data)["record"] for event in reversed(events)]

    async def count(self) -> int:
        """How many effects there are, for who asks again and again: reading all of them would take the time of who makes them."""
        count: int = await self.pool.fetchval("SELECT count(*) FROM event WHERE home = $1", HOME)
        return count

    def effect(self, record: Record) -> Change:
        """An effect that can be counted: a wallet of its own with one event."""
        id = new_id()
        wallet = Wallet(
            home=HOME, id=id, version=0, sequence=0, state="open", user=id, currency="CNY",
            created_at=SystemClock().now(),
        )  # fmt: skip
        told = Event("wallet.created", msgspec.json.encode({"record": record.id}))
        return Change(home=HOME, new=(wallet,), root=id, events=(told,))


async def until(claim: Callable[[], Awaitable[bool]], timeout_s: float = PATIENCE_S) -> None:
    """Returns once the claim is true."""
    async with asyncio.timeout(timeout_s):
        is_true = False
        while not is_true:
            await asyncio.sleep(0.01)
            is_true = await claim()


async def collect(subscription: Subscription, count: int, wait_s: float = PATIENCE_S) -> list[Delivery]:
    """At least so many deliveries, however the broker batches them."""
    found: list[Delivery] = []
    async with asyncio.timeout(wait_s):
        while len(found) < count:
            found += await subscription.receive(max(count, 10), wait_s)
    return found


async def tries_of(
    subscriptions: Sequence[Subscription], each_s: float, lapses: Callable[[], Awaitable[list[int]]]
) -> list[int]:
    """The failed attempts with which the only record comes, to a handler that takes so long and fails the first time. Meanwhile
    nobody else has it, though all ask for it, and it does not lapse."""
    in_hand: list[str] = []
    tries: list[int] = []
    is_done = asyncio.Event()

    async def consume(subscription: Subscription) -> None:
        while not is_done.is_set():
            for delivery in await subscription.receive(10, 0.5):
                in_hand.append(delivery.record.id)
                assert len(in_hand) == 1
                await asyncio.sleep(each_s)
                in_hand.remove(delivery.record.id)
                tries.append(delivery.attempts)
                assert await lapses() == [0]
                end = Ack() if delivery.attempts else RetryAfter(0.0, "not now")
                assert await subscription.settle([(delivery, end)]) == [True]
                if delivery.attempts:
                    is_done.set()

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*map(consume, subscriptions))
    return tries


def key_of_another_lane(key: str, lanes: int) -> str:
    """A key that does not share the lane of `key`."""
    return next(f"j{number}" for number in range(1000) if lane(f"j{number}", lanes) != lane(key, lanes))


def record(id: str, key: str = "", priority: int = 4, delay_s: float = 0.0, body: bytes = b"{}") -> Record:
    """A record of the tests' home."""
    return Record(id, key, body, {"content-type": "application/json", "x": "ü"}, priority, delay_s, HOME)
