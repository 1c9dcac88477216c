"""What passes through queues in all processes together: each writes its counters to the database once a second.

So whoever watches needs no address of any process, and a process that is started again only begins at 0.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from itertools import count
from typing import NamedTuple

import asyncpg
import structlog

from kassa.db.away import AWAY
from kassa.db.queries import load
from kassa.ids import new_id
from kassa.observability.meters import BOUNDS_S, Meters, Passage, quantile

_SQL = load("kassa.messaging")

log = structlog.get_logger("kassa.messaging.activity")

PUBLISH_S = 1.0
FORGET_ROUNDS = 30
WINDOW_S = 5.0
"""Rates and latencies are those of the last few seconds."""


class Counted(NamedTuple):
    """What one process has counted of one topic and group since it began. group '': what was sent to the topic, and what of it left
    through a relay."""

    process: str
    topic: str
    group: str
    at: datetime
    sent: int
    received: int
    handled: int
    retried: int
    dead: int
    latency: list[int]


class Flow(NamedTuple):
    """How a queue moves, over the last few seconds. Rates are records a second; latencies are seconds, None: none passed."""

    sent: float = 0.0
    received: float = 0.0
    handled: float = 0.0
    retried: float = 0.0
    dead: float = 0.0
    p50_s: float | None = None
    p99_s: float | None = None


class Publisher:
    """Tells others what this process counts."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", meters: Meters) -> None:
        self._pool = pool
        self._meters = meters
        self._process = new_id()

    async def run(self) -> None:
        """Until it is cancelled. A database that is away is waited for."""
        for rounds in count():
            await _try(self.publish)
            if rounds % FORGET_ROUNDS == 0:
                await _try(self._forget)
            await asyncio.sleep(PUBLISH_S)

    async def publish(self) -> None:
        """Everything once; nothing, where nothing was counted yet."""
        rows = _rows(self._meters)
        if rows:
            await self._pool.execute(_SQL.publish_meters, self._process, *map(list, zip(*rows, strict=True)))

    async def _forget(self) -> None:
        await self._pool.execute(_SQL.forget_meters)


_Row = tuple[str, str, int, int, int, int, int, str]


def _rows(meters: Meters) -> list[_Row]:
    """One for each topic and group: what was sent to a topic, and what left for it through a relay, are both of no group."""
    sent = {(topic, ""): sending.confirmed for topic, sending in meters.sendings.items()}
    rows = [_row(*name, sent.pop(name, 0), passage) for name, passage in meters.passages.items()]
    return rows + [(*name, confirmed, 0, 0, 0, 0, "{}") for name, confirmed in sent.items()]


def _row(topic: str, group: str, sent: int, passage: Passage) -> _Row:
    latency = "{" + ",".join(map(str, passage.buckets)) + "}"
    return topic, group, sent, passage.received, passage.handled, passage.retried, passage.dead, latency


async def counted(pool: "asyncpg.Pool[asyncpg.Record]") -> list[Counted]:
    """What all processes that are alive have counted so far."""
    return [Counted._make((row[0].hex, *row[1:])) for row in await pool.fetch(_SQL.meters)]


class Flows:
    """Makes rates of counters that are looked at again and again. Pure."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: dict[tuple[str, str, str], deque[Counted]] = {}

    def add(self, found: Sequence[Counted]) -> None:
        """One look at all counters. What is not there any more is forgotten."""
        seen: dict[tuple[str, str, str], deque[Counted]] = {}
        for one in found:
            name = (one.process, one.topic, one.group)
            history = self._seen.get(name, deque())
            if not history or one.at > history[-1].at:
                history.append(one)
            while len(history) > 2 and (one.at - history[1].at).total_seconds() >= self._window_s:
                history.popleft()
            seen[name] = history
        self._seen = seen

    def flows(self) -> dict[tuple[str, str], Flow]:
        """By topic and group, of all processes together. What was told only once is not in it: nobody knows how it moves."""
        histories: dict[tuple[str, str], list[deque[Counted]]] = {}
        for (_, topic, group), history in self._seen.items():
            if len(history) > 1:
                histories.setdefault((topic, group), []).append(history)
        return {name: _flow(some) for name, some in histories.items()}


class Follower:
    """Looks once a second, so that whoever asks at any moment is told of the last few seconds."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool
        self._flows = Flows()

    async def run(self) -> None:
        """Until it is cancelled. A database that is away is waited for."""
        while True:
            await _try(self._look)
            await asyncio.sleep(PUBLISH_S)

    async def _look(self) -> None:
        self._flows.add(await counted(self._pool))

    def flows(self) -> dict[tuple[str, str], Flow]:
        """By topic and group. What no process tells, or told only once so far, is not in it."""
        return self._flows.flows()


async def _try(action: Callable[[], Awaitable[None]]) -> None:
    try:
        await action()
    except (*AWAY, asyncpg.PostgresError) as error:
        log.warning("activity.waits", error=type(error).__name__)


def _flow(histories: Sequence[deque[Counted]]) -> Flow:
    rates = [0.0] * 5
    buckets = [0] * (len(BOUNDS_S) + 1)
    for history in histories:
        first, last = history[0], history[-1]
        over_s = (last.at - first.at).total_seconds()
        for place, (before, after) in enumerate(zip(first[4:9], last[4:9], strict=True)):
            rates[place] += (after - before) / over_s
        # Another version may have other buckets; its records are counted, and their latency is not.
        if len(first.latency) == len(last.latency) == len(buckets):
            for place in range(len(buckets)):
                buckets[place] += last.latency[place] - first.latency[place]
    sent, received, handled, retried, dead = rates
    return Flow(sent, received, handled, retried, dead, quantile(buckets, 0.5), quantile(buckets, 0.99))
