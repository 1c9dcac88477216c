"""What the suite of the binders shares: a binder with what is beside it, and records."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from kassa.clock import SystemClock
from kassa.ids import new_id
from kassa.journal.change import Change, Event
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Binder
from kassa.messaging.log import EventLog
from kassa.messaging.model import Record
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.payments.records import Wallet

HOME = 7
TOPIC = Topic("orders", ("shop",), "Orders, for the tests.")


@dataclass
class Bench:
    """A binder, and what is beside it."""

    binder: Binder
    pool: Any
    journal: PostgresJournal
    wakeups: Wakeups
    letters: DeadLetters

    async def effects(self) -> list[str]:
        """The records that had their effect, in the order of their commits."""
        events = await EventLog(self.pool).of_home(HOME, 100_000)
        return [msgspec.json.decode(event.data)["record"] for event in reversed(events)]

    def effect(self, record: Record) -> Change:
        """An effect that can be counted: a wallet of its own with one event."""
        id = new_id()
        wallet = Wallet(
            home=HOME, id=id, version=0, sequence=0, state="open", user=id, currency="CNY",
            created_at=SystemClock().now(),
        )  # fmt: skip
        told = Event("wallet.created", msgspec.json.encode({"record": record.id}))
        return Change(home=HOME, new=(wallet,), root=id, events=(told,))


async def until(claim: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Returns once the claim is true."""
    async with asyncio.timeout(timeout_s):
        is_true = False
        while not is_true:
            await asyncio.sleep(0.01)
            is_true = await claim()


def record(id: str, key: str = "", priority: int = 4, delay_s: float = 0.0, body: bytes = b"{}") -> Record:
    """A record of the tests' home."""
    return Record(id, key, body, {"content-type": "application/json", "x": "ü"}, priority, delay_s, HOME)
