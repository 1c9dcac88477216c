"""Drives payments by their timers: channels are asked, closed and sent again, payments expire, late money is decided about.

A timer is leased, acted on, and replaced by what the act decided; if we die in between, the lease ends and it fires again.
What fails comes back later with growing pauses, for ever. What is not final and has no timer gets one from the sweeper.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import asyncpg
import structlog

from kassa.errors import OutcomeUnknown
from kassa.ids import Id
from kassa.messaging.work import FiredTimer
from kassa.payments.draft import TIMERS

IN_FLIGHT_MAX = 256
"""Timers that are acted on at once. Nearly all of that time is waiting for channels."""
PER_CHANNEL_MAX = 64
"""Of them at one channel, so that one that hangs does not hold up the others."""
PER_ACCOUNT_MAX = 16
"""Of them for one merchant at one channel, so that it does not hold up the channel's other merchants."""
NOT_ITS_TURN_S = 1.0
"""What has to wait for its share is looked at again after that, or twice that."""
OURS = ""
"""The line of timers that ask no channel."""
ACT_S = 45.0
"""Longer than a whole conversation with a channel, shorter than the lease."""
SWEEP_S = 60.0
SWEEP_MAX = 1000

log = structlog.get_logger("kassa.workers.payments")


class Timers(Protocol):
    """Timers that are due, leased to one worker at a time."""

    async def claim_timers(self, kinds: Sequence[str], limit: int) -> list[FiredTimer]: ...
    async def retry_timer(self, fired: FiredTimer, delay_s: float | None = None, error: str | None = None) -> None: ...
    async def postpone_timers(self, fired: Sequence[FiredTimer], delay_s: float) -> None: ...


class Drives(Protocol):
    """What timers ask for."""

    async def fire(self, kind: str, home: int, root: Id, entity: Id) -> None: ...
    async def rearm(self, home: int, payment_id: Id) -> None: ...


class ChannelsOf(Protocol):
    """Knows which channel an attempt or refund belongs to."""

    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]: ...


class Unarmed(Protocol):
    """Finds what nobody would ever look at again."""

    async def unarmed(self, limit: int) -> list[tuple[int, Id]]: ...


class Wait(Protocol):
    """Returns when there may be work, at the latest after `timeout_s`."""

    async def wait(self, timeout_s: float = ...) -> object: ...


class PaymentWorker:
    """One loop over the timers of payments."""

    def __init__(
        self, timers: Timers, payments: Drives, subjects: ChannelsOf, watch: Wait, poll_s: float = 0.25
    ) -> None:
        self._timers = timers
        self._payments = payments
        self._subjects = subjects
        self._watch = watch
        self._poll_s = poll_s
        self._running: set[asyncio.Task[None]] = set()
        self._at_channel: Counter[str] = Counter()
        self._at_account: Counter[tuple[int, str]] = Counter()

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
        if claimed:
            await self._begin(claimed)
        return len(claimed)

    async def _begin(self, claimed: Sequence[FiredTimer]) -> None:
        channels = await self._subjects.channels_of([(fired.home, fired.entity) for fired in claimed])
        too_many = []
        for fired in claimed:
            account = fired.home, channels.get(fired.entity, OURS)
            if self._is_crowded(account):
                too_many.append(fired)
                continue
            task = asyncio.create_task(self._act(fired))
            self._running.add(task)
            self._at_channel[account[1]] += 1
            self._at_account[account] += 1
            task.add_done_callback(partial(self._ended, account))
        if too_many:
            await self._timers.postpone_timers(too_many, NOT_ITS_TURN_S)

    def _is_crowded(self, account: tuple[int, str]) -> bool:
        _, channel = account
        if channel == OURS:
            return False
        return self._at_channel[channel] >= PER_CHANNEL_MAX or self._at_account[account] >= PER_ACCOUNT_MAX

    def _ended(self, account: tuple[int, str], task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._at_channel[account[1]] -= 1
        self._at_account[account] -= 1
        if not self._at_account[account]:
            del self._at_account[account]

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
