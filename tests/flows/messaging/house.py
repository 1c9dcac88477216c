"""What the flows of the event log and of timers share."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from kassa.clock import SystemClock
from kassa.db.pool import connect
from kassa.ids import Id, new_id
from kassa.journal.change import Aggregate, Change, Committed, Event, Rule
from kassa.journal.writer import PostgresJournal
from kassa.messaging.work import OutgoingMessage, written
from kassa.payments.records import WALLET, Wallet
from kassa.tables import TABLES

HOME = 7


@dataclass
class House:
    """Two writers on one database."""

    url: str
    pool: Any
    one: PostgresJournal
    two: PostgresJournal

    async def root(self, journal: PostgresJournal | None = None) -> Id:
        """A wallet, with its first event."""
        id = new_id()
        wallet = Wallet(
            home=HOME, id=id, version=0, sequence=0, state="open", user=id, currency="CNY",
            created_at=SystemClock().now(),
        )  # fmt: skip
        change = Change(home=HOME, new=(wallet,), root=id, events=(_event("wallet.created", id),))
        assert isinstance(await (journal or self.one).commit(change), Committed)
        return id

    async def happen(self, journal: PostgresJournal, root: Id, type_: str = "wallet.paid") -> None:
        """One more event of a root."""

        def decide(aggregate: Aggregate, now: datetime) -> Change:
            return Change(home=HOME, events=(_event(type_, root),))

        assert isinstance(await journal.commit(Change(home=HOME, rule=Rule(WALLET, root, decide))), Committed)


def _event(type_: str, root: Id) -> Event:
    return Event(type_, msgspec.json.encode({"id": f"wal_{root}", "object": "wallet"}))


async def writer(url: str) -> PostgresJournal:
    """A journal of its own, as another process has it."""
    journal = PostgresJournal(lambda: connect(url, application="test writer"), TABLES)
    await journal.start()
    return journal


async def put(pool: Any, *messages: OutgoingMessage) -> None:
    """As if somebody had sent them there."""
    await pool.executemany(
        "INSERT INTO message (id, home, topic, key, priority, due, created_at, headers, body)"
        " VALUES ($1, $2, $3, $4, $5, clock_timestamp() + $6, clock_timestamp(), $7, $8)",
        [(*one[:5], timedelta(seconds=one.delay_s), written(one.headers), one.body) for one in messages],
    )
