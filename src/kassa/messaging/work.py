"""Work that waits in PostgreSQL: timers, messages, dead letters. Leases live here; effects go through the journal.

A lease only says who should act now. What makes an effect happen once is the `done` of the Change that has it: the
journal refuses the second one as Consumed.
"""

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from kassa.db.queries import load
from kassa.ids import Id
from kassa.journal.change import TimerDone
from kassa.messaging.ladder import timer_delay

_SQL = load("kassa.messaging", "queries.sql")

LEASE_S = 60.0
"""Longer than any handler may take; a worker that dies gives its work back after that."""
ERROR_CHARACTERS_MAX = 500


class FiredTimer(NamedTuple):
    """A timer that is due and leased to us. A Change that acts on it carries `done`."""

    home: int
    root: Id
    entity: Id
    kind: str
    generation: int
    tries: int
    """How often it failed before."""
    due: datetime

    @property
    def done(self) -> TimerDone:
        """What the Change that acts on it consumes."""
        return TimerDone(self.entity, self.kind, self.generation)


class StuckTimer(NamedTuple):
    """A timer that keeps failing, with its last error."""

    timer: FiredTimer
    last_error: str | None


class TimerWork:
    """Timers that are due, by the database's clock."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", *, lease_s: float = LEASE_S) -> None:
        self._pool = pool
        self._lease = timedelta(seconds=lease_s)

    async def claim_timers(self, kinds: Sequence[str], limit: int) -> list[FiredTimer]:
        """At most `limit` due timers of these kinds, oldest first; nobody else gets them until the lease is over."""
        rows = await self._pool.fetch(_SQL["claim_timers"], kinds, limit, self._lease)
        return sorted((_fired(row) for row in rows), key=_due)

    async def retry_timer(self, fired: FiredTimer, delay_s: float | None = None, error: str | None = None) -> None:
        """The work failed: again after `delay_s`, else growing with its tries up to an hour. It never dies."""
        if delay_s is None:
            delay_s = timer_delay(fired.tries, random.random())
        await self._pool.execute(
            _SQL["retry_timer"],
            fired.entity,
            fired.kind,
            fired.generation,
            timedelta(seconds=delay_s),
            shortened(error),
        )

    async def postpone_timer(self, fired: FiredTimer, delay_s: float) -> None:
        """It was not its turn: again after `delay_s`, without counting a try."""
        await self._pool.execute(
            _SQL["postpone_timer"], fired.entity, fired.kind, fired.generation, timedelta(seconds=delay_s)
        )

    async def next_due(self, kinds: Sequence[str]) -> float | None:
        """Seconds until the next timer of these kinds that nobody holds (≤ 0: now); None when there is none."""
        seconds: float | None = await self._pool.fetchval(_SQL["next_due"], kinds)
        return seconds

    async def stuck_timers(self, tries_min: int = 5, limit: int = 100) -> list[StuckTimer]:
        """What failed at least `tries_min` times (≥ 5), most tries first, for operators."""
        rows = await self._pool.fetch(_SQL["stuck_timers"], tries_min, limit)
        return [StuckTimer(_fired(row), row["last_error"]) for row in rows]


def _fired(row: asyncpg.Record) -> FiredTimer:
    return FiredTimer(
        row["home"],
        Id(row["root"].hex),
        Id(row["entity"].hex),
        row["kind"],
        row["generation"],
        row["tries"],
        row["due"],
    )


def _due(fired: FiredTimer) -> datetime:
    return fired.due


def shortened(error: str | None) -> str | None:
    """An error as it is stored: bounded, without the zero byte that PostgreSQL's text refuses."""
    return None if error is None else error.replace("\0", "")[:ERROR_CHARACTERS_MAX]
