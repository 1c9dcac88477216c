"""How fast a backlog of events is drained: at a pace while somebody writes, so that payments have the machine, and else as fast
as it goes. Never more slowly than twice of what is written, so it always comes to its end.

Written means events, not changes: effects of the consumers that a drain feeds are changes, too, and would pass for payments.
Consumers whose effects write events make the pace run away: the more is drained, the more is written, and twice of that is
drained next. Then a backlog goes as fast as without a pace, and not more slowly.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from kassa.db.queries import load

_SQL = load("kassa.messaging")

FIRST_S = 0.1
"""A backlog that lasts no longer is a burst. It goes as it comes: nobody has counted yet what is written."""
LOOK_S = 0.5
"""While there is a backlog, what is written is counted so often."""
SILENT_LOOKS = 2
"""So many in a row that found nothing, which is a second at least: nobody writes. Not by the clock, so that a machine that stood
still does not pass for one that has nothing to do."""
AHEAD = 2
"""So many times what is written is drained at least."""
COUNTED_MAX = 10_000
"""Events of a writer that are counted at a time: a few milliseconds. Where there are more, nothing waits until the next look."""


# The pure part


class Writing(NamedTuple):
    """What is known of those who write."""

    per_s: float
    """Events a second, when it was looked last; infinite where they were too many to count."""
    silent: int
    """Looks in a row that found nothing."""


NOBODY = Writing(0.0, SILENT_LOOKS)


def after_look(writing: Writing, counted: Sequence[int], took_s: float) -> Writing:
    """What is known when it was counted again. counted: events of each writer in the last `took_s` seconds."""
    if not any(counted):
        return Writing(0.0, writing.silent + 1)
    if max(counted) >= COUNTED_MAX:
        return Writing(math.inf, 0)
    return Writing(sum(counted) / took_s, 0)


def allowed_per_s(backlog_per_s: float, writing: Writing) -> float:
    """Events a second that a backlog is drained at, at most. backlog_per_s 0: no limit."""
    if backlog_per_s == 0 or writing.silent >= SILENT_LOOKS:
        return math.inf
    return max(backlog_per_s, AHEAD * writing.per_s)


# What counts


class Pace:
    """The pace of one reader. It costs two small statements every `LOOK_S` seconds, and only while there is a backlog."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", backlog_per_s: float) -> None:
        """backlog_per_s: events a second while somebody writes less than half of that; 0: no limit."""
        self._pool = pool
        self._backlog_per_s = backlog_per_s
        self._writing = NOBODY
        self._heads: dict[int, int] = {}
        """Each writer's last change when it was looked last."""
        self._looked_at: float | None = None
        self._look_at = -math.inf

    def page(self, most: int) -> int:
        """How many events to read at a time: a second's at most, so that a slow pace is an even one."""
        return int(max(1, min(most, allowed_per_s(self._backlog_per_s, self._writing))))

    async def turn_s(self, events: int, now: float) -> float:
        """How long so many events of a backlog take at least. To be asked again while it is waited for. now: seconds of any
        clock that only goes forward."""
        if self._backlog_per_s > 0 and now >= self._look_at:
            await self._look(now)
        return events / allowed_per_s(self._backlog_per_s, self._writing)

    def rest(self) -> None:
        """There is no backlog any more. The next one is another matter."""
        self._writing, self._looked_at, self._look_at = NOBODY, None, -math.inf

    async def _look(self, now: float) -> None:
        before = self._heads
        self._heads = {row["writer"]: row["seq"] for row in await self._pool.fetch(_SQL.log_heads)}
        if self._looked_at is None:
            self._look_at = now + FIRST_S
        else:
            # A writer that had no head then is new.
            since = [before.get(writer, -1) for writer in self._heads]
            rows = await self._pool.fetch(
                _SQL.count_written, list(self._heads), since, list(self._heads.values()), COUNTED_MAX
            )
            self._writing = after_look(self._writing, [row["events"] for row in rows], now - self._looked_at)
            self._look_at = now + LOOK_S
        self._looked_at = now
