"""Time that passes only when everybody waits: an event loop whose waiting costs nothing, its clock, and ids from a seed."""

import asyncio
import selectors
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random

from kassa.errors import InvariantBroken
from kassa.ids import Id

START = datetime(2026, 1, 1, tzinfo=UTC)
"""When every simulation begins."""


class _NoWaiting(selectors.SelectSelector):
    """Waits for no file: it moves the loop's time by as much as the loop would have waited."""

    elapsed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise InvariantBroken("Everybody waits, and nothing will ever happen.")
        self.elapsed_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs everything in an order that depends on nothing outside; no file is ever ready."""

    def __init__(self) -> None:
        self._virtual = _NoWaiting()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.elapsed_s


class VirtualClock:
    """The loop's time as a date."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> datetime:
        return START + timedelta(seconds=self._loop.time())


def seeded_ids(clock: VirtualClock, random: Random) -> Callable[[], Id]:
    """Ids of the same form as real ones, in order of the clock, the same for the same seed."""

    def fresh() -> Id:
        milliseconds = int(clock.now().timestamp() * 1000)
        noise = f"{random.getrandbits(72):018x}"
        return Id(f"{milliseconds:012x}7{noise[:3]}a{noise[3:]}")

    return fresh
