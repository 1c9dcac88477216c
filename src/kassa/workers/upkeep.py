"""What must be done from time to time: give expired holds back, drop old answers, anchor the chain."""

import asyncio
from datetime import timedelta
from typing import Any

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kassa.clock import Clock
from kassa.db.queries import load
from kassa.ids import Id
from kassa.journal.change import Change, Committed, Money
from kassa.journal.journal import Journal
from kassa.journal.verify import write_anchor
from kassa.ledger.model import HoldKey, release

_SQL = load("kassa.workers")

HOLDS_S = 5.0
"""An expired hold cannot be settled any more, so a few seconds late only keep money reserved that long."""
HOLDS_MAX = 500
RETENTION_S = 3600.0
RETENTION_ROWS = 5000
"""Rows deleted at a time: short locks, and room for others in between."""
RETENTION_PAUSE_S = 0.1
ANCHOR_S = 300.0
"""How much history could be rewritten by someone with all rights on the database and none on the key."""

log = structlog.get_logger("kassa.workers.upkeep")


async def release_expired_holds(pool: Any, journal: Journal) -> int:
    """Gives back holds whose time is over; how many. One that was settled at that moment stays settled."""
    rows = await pool.fetch(_SQL.expired_holds, HOLDS_MAX)
    released = 0
    for row in rows:
        key = HoldKey(Id(row["id"].hex), row["part"])
        change = Change(home=row["home"], root=key.id, transfers=(release(row["code"], key),))
        verdict = await journal.commit(change)
        released += isinstance(verdict, Committed)
        if not isinstance(verdict, Committed | Money):
            log.error("hold.not_released", hold=key.id, part=key.part, verdict=type(verdict).__name__)
    return released


async def drop_old_answers(pool: Any, keep: timedelta) -> int:
    """Deletes what was kept under idempotency keys for longer than promised; how many. Claims stay for ever."""
    dropped = 0
    while True:
        rows = int((await pool.execute(_SQL.drop_old_answers, keep, RETENTION_ROWS)).rpartition(" ")[2])
        dropped += rows
        if rows < RETENTION_ROWS:
            return dropped
        await asyncio.sleep(RETENTION_PAUSE_S)


async def anchor(pool: Any, key: bytes, clock: Clock) -> int:
    """Signs the writers' heads; the anchor's number."""
    async with pool.acquire() as connection:
        return await write_anchor(connection, Ed25519PrivateKey.from_private_bytes(key), clock.now())


async def release_for_ever(pool: Any, journal: Journal) -> None:
    """The loop of expired holds."""
    while True:
        await release_expired_holds(pool, journal)
        await asyncio.sleep(HOLDS_S)


async def drop_for_ever(pool: Any, keep: timedelta) -> None:
    """The loop of old answers."""
    while True:
        await drop_old_answers(pool, keep)
        await asyncio.sleep(RETENTION_S)


async def anchor_for_ever(pool: Any, key: bytes, clock: Clock) -> None:
    """The loop of anchors."""
    while True:
        await anchor(pool, key, clock)
        await asyncio.sleep(ANCHOR_S)
