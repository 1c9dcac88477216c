"""Wake-ups: whoever waits for work in PostgreSQL learns of it at once, in this process and in the others.

A NOTIFY inside every commit halves the speed of all of them (they share one lock), so each process says it on a connection
of its own: at once where little happens, and at most once in 25 milliseconds under load, when whoever listens has work anyway.
A wake-up may be lost; whoever waits looks by himself every 250 ms.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import asyncpg
import structlog

from kassa.db.away import AWAY
from kassa.db.queries import load
from kassa.errors import KassaError
from kassa.journal.journal import Journal, Written

_SQL = load("kassa.messaging")

CHANNEL = "kassa_wake"
EVENTS, MESSAGES, TIMERS = "events", "messages", "timers"
BRIEF_S, COALESCE_S = 0.005, 0.025
BUSY_PER_S = 1000
"""Between two NOTIFY of a process; the longer one where so many pieces of work came per second since the one before."""
POLL_S = 0.25
"""How often those who wait look by themselves."""
PAUSE_MAX_S = 5.0

log = structlog.get_logger("kassa.messaging.wake")


class Watch:
    """Waits for wake-ups. What comes between two waits ends the next one at once, so nothing is missed by looking
    first."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._has_work = False

    def set(self) -> None:
        """There may be work."""
        self._has_work = True
        self._event.set()

    def nudge(self) -> None:
        """Wakes whoever waits for another reason than this kind of work."""
        self._event.set()

    async def wait(self, timeout_s: float = POLL_S) -> bool:
        """Returns when there may be work or it was nudged, at the latest after `timeout_s`; whether there may be work."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(timeout_s, 0.0)):
                await self._event.wait()
        self._event.clear()
        has_work, self._has_work = self._has_work, False
        return has_work


class Wakeups:
    """Who waits for what. Works inside the process without `run`; with it, also across processes."""

    def __init__(self, connect: Callable[[], Awaitable[Any]]) -> None:
        """connect: opens an asyncpg connection, kept for LISTEN and NOTIFY alone."""
        self._connect = connect
        self._waiting: dict[str, WeakSet[Watch]] = {EVENTS: WeakSet(), MESSAGES: WeakSet(), TIMERS: WeakSet()}
        self._to_tell: set[str] = set()
        self._told = asyncio.Event()
        self._untold = 0
        """Pieces of work since the last NOTIFY."""
        self._pid = 0

    def follow(self, journal: Journal) -> None:
        """What this journal commits wakes whoever waits for it."""
        journal.on_commit(self._written)

    def touch(self, kind: str, count: int = 1) -> None:
        """There may be new work of a kind (EVENTS, MESSAGES, TIMERS), about so many pieces."""
        self._wake(kind)
        self._to_tell.add(kind)
        self._untold += count
        self._told.set()

    def watch(self, kind: str) -> "Watch":
        """For one who waits for work of a kind. Forgotten when it is dropped."""
        watch = Watch()
        self._waiting[kind].add(watch)
        return watch

    async def run(self) -> None:
        """Tells and hears other processes, until it is cancelled."""
        pause_s = 0.1
        while True:
            try:
                connection = await self._connect()
            except (*AWAY, KassaError, asyncpg.PostgresError) as error:
                log.warning("wake.unreachable", reason=type(error).__name__)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, PAUSE_MAX_S)
                continue
            try:
                await self._talk(connection)
            except (*AWAY, asyncpg.PostgresError) as error:
                log.warning("wake.lost", reason=type(error).__name__)
            finally:
                connection.terminate()
            # Also where connecting works and listening does not.
            await asyncio.sleep(0.1)
            pause_s = 0.1

    async def _talk(self, connection: Any) -> None:
        self._pid = connection.get_server_pid()
        await connection.add_listener(CHANNEL, self._heard)
        for kind in self._waiting:
            # What was said while we were away is lost; everybody looks once.
            self._wake(kind)
        pause_s = BRIEF_S
        while not connection.is_closed():
            try:
                async with asyncio.timeout(5.0):
                    await self._told.wait()
            except TimeoutError:
                continue
            self._told.clear()
            kinds, self._to_tell = self._to_tell, set()
            pause_s = COALESCE_S if self._untold > BUSY_PER_S * pause_s else BRIEF_S
            self._untold = 0
            await connection.execute(_SQL.wake, " ".join(sorted(kinds)))
            await asyncio.sleep(pause_s)

    def _heard(self, connection: Any, pid: int, channel: str, payload: str) -> None:
        # The connection may be closed by the time this is called, and then knows its own number no more.
        if pid != self._pid:
            for kind in payload.split():
                if kind in self._waiting:
                    self._wake(kind)

    def _wake(self, kind: str) -> None:
        for watch in self._waiting[kind]:
            watch.set()

    def _written(self, written: Written) -> None:
        for kind, count in ((EVENTS, written.events), (MESSAGES, written.messages), (TIMERS, written.timers)):
            if count:
                self.touch(kind, count)
