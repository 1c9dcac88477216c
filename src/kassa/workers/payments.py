"""Drives payments by their timers: channels are asked, closed and sent again, payments expire, late money is decided about.

A timer is leased, acted on, and replaced by what the act decided; if we die in between, the lease ends and it fires again.
What fails comes back later with growing pauses, for ever. What is not final and has no timer gets one from the sweeper.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import asyncpg
import structlog

from kassa.errors import OutcomeUnknown
from kassa.ids import Id
from kassa.messaging.work import FiredTimer
from kassa.payments.draft import TIMERS

IN_FLIGHT_MAX = 64
"""Timers that are acted on at once. Nearly all of that time is waiting for channels."""
PER_MERCHANT_MAX = 16
"""Of them for one merchant, so that one whose channel hangs does not hold up the others."""
NOT_ITS_TURN_S = 1.0
"""A merchant that has its share is looked at again so soon."""
ACT_S = 45.0
"""Longer than a whole conversation with a channel, shorter than the lease."""
SWEEP_S = 60.0
SWEEP_MAX = 1000

log = structlog.get_logger("kassa.workers.payments")


class Timers(Protocol):
    """Timers that are due, leased to one worker at a time."""

    async def claim_timers(self, kinds: Sequence[str], limit: int) -> list[FiredTimer]: ...
    async def retry_timer(self, fired: FiredTimer, delay_s: float | None = None, error: str | None = None) -> None: ...
    async def postpone_timer(self, fired: FiredTimer, delay_s: float) -> None: ...


class Drives(Protocol):
    """What timers ask for."""

    async def fire(self, kind: str, home: int, root: Id, entity: Id) -> None: ...
    async def rearm(self, home: int, payment_id: Id) -> None: ...


class Unarmed(Protocol):
    """Finds what nobody would ever look at again."""

    async def unarmed(self, limit: int) -> list[tuple[int, Id]]: ...


class Wait(Protocol):
    """Returns when there may be work, at the latest after `timeout_s`."""

    async def wait(self, timeout_s: float = ...) -> object: ...


class PaymentWorker:
    """One loop over the timers of payments."""

    def __init__(self, timers: Timers, payments: Drives, watch: Wait, poll_s: float = 0.25) -> None:
        self._timers = timers
        self._payments = payments
        self._watch = watch
        self._poll_s = poll_s
        self._running: dict[asyncio.Task[None], int] = {}
        """Each act, and the merchant's home that it is for."""

    async def run(self) -> None:
        """For ever; when cancelled, what is under way is let go: its leases end by themselves."""
        try:
            while True:
                if not await self.step():
                    await self._watch.wait(self._poll_s)
        finally:
            for task in self._running:
                task.cancel()

    async def step(self) -> int:
        """Claims what is due and begins to act on it; how many were claimed."""
        room = IN_FLIGHT_MAX - len(self._running)
        if room <= 0:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            room = IN_FLIGHT_MAX - len(self._running)
        claimed = await self._timers.claim_timers(TIMERS, room)
        for fired in claimed:
            if sum(home == fired.home for home in self._running.values()) >= PER_MERCHANT_MAX:
                await self._timers.postpone_timer(fired, NOT_ITS_TURN_S)
                continue
            task = asyncio.create_task(self._act(fired))
            self._running[task] = fired.home
            task.add_done_callback(self._running.pop)
        return len(claimed)

    async def settle(self) -> None:
        """Waits until everything that was begun is done."""
        while self._running:
            await asyncio.wait(self._running)

    async def _act(self, fired: FiredTimer) -> None:
        try:
            async with asyncio.timeout(ACT_S):
                await self._payments.fire(fired.kind, fired.home, fired.root, fired.entity)
        except OutcomeUnknown:
            # Perhaps it is recorded, and perhaps the timer is already another one: the lease ends by itself.
            log.warning("timer.outcome_unknown", kind=fired.kind, entity=fired.entity)
        except Exception as error:
            # The outermost place for this timer: whatever went wrong with one must not end the loop, or the timer.
            log.warning("timer.failed", kind=fired.kind, entity=fired.entity, tries=fired.tries, error=repr(error))
            await self._retry(fired, f"{type(error).__name__}: {error}")

    async def _retry(self, fired: FiredTimer, why: str) -> None:
        try:
            await self._timers.retry_timer(fired, error=why)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("timer.left_to_its_lease", kind=fired.kind, entity=fired.entity, error=repr(error))


async def sweep(store: Unarmed, payments: Drives) -> int:
    """Sets timers for what is not final and has none; how many payments. None, unless something went wrong before."""
    lost = await store.unarmed(SWEEP_MAX)
    for home, payment_id in lost:
        log.error("payment.without_timer", home=home, payment=payment_id)
        await payments.rearm(home, payment_id)
    return len(lost)


async def sweep_for_ever(store: Unarmed, payments: Drives) -> None:
    """The sweeper's loop."""
    while True:
        await sweep(store, payments)
        await asyncio.sleep(SWEEP_S)
