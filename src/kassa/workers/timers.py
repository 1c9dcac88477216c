"""Acts on timers that are due: one handler per kind, many at once, each under a lease."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import asyncpg
import structlog

from kassa.errors import KassaError
from kassa.messaging.wake import TIMERS, Wakeups
from kassa.messaging.work import FiredTimer, TimerWork
from kassa.supervisor import end_tasks

IN_FLIGHT_MAX = 64
"""Handlers at once; most of them wait for a network."""
LOOK_S = 1.0
"""Looks by itself this often: a lease that ran out, or a wake-up that was lost, is found then."""

log = structlog.get_logger("kassa.workers.timers")

Handler = Callable[[FiredTimer], Awaitable[None]]
"""Acts on one timer: commits a Change with its `done`. May raise NotYet, or an error: then it is tried again later."""


class NotYet(Exception):
    """It is not this timer's turn; again after `delay_s`, without counting a failure."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        super().__init__(delay_s)


class TimerLoop:
    """Acts on the timers of some kinds, until it is cancelled."""

    def __init__(
        self,
        work: TimerWork,
        wakeups: Wakeups,
        handlers: Mapping[str, Handler],
        *,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self._work = work
        self._handlers = handlers
        self._kinds = sorted(handlers)
        self._in_flight_max = in_flight_max
        self._watch = wakeups.watch(TIMERS)
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """For ever; what is being done when it is cancelled is done again after its lease."""
        try:
            while True:
                await self._round()
        finally:
            await end_tasks(*self._running)

    async def _round(self) -> None:
        free = self._in_flight_max - len(self._running)
        if not free:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            return
        fired = await self._work.claim_timers(self._kinds, free)
        for timer in fired:
            task = asyncio.create_task(self._act(timer), name=f"timer {timer.kind}")
            self._running.add(task)
            task.add_done_callback(self._ended)
        if not fired:
            due_s = await self._work.next_due(self._kinds)
            await self._watch.wait(LOOK_S if due_s is None else min(max(due_s, 0.01), LOOK_S))

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        self._watch.set()

    async def _act(self, timer: FiredTimer) -> None:
        try:
            try:
                await self._handlers[timer.kind](timer)
            except NotYet as not_yet:
                await self._work.postpone_timer(timer, not_yet.delay_s)
            except (KassaError, OSError, TimeoutError) as error:
                log.warning(
                    "timer.failed", kind=timer.kind, entity=timer.entity, tries=timer.tries + 1, error=str(error)
                )
                await self._work.retry_timer(timer, error=str(error))
            except Exception as error:
                # The outermost loop of this timer: what its handler could not handle is kept with it, and tried again.
                log.exception("timer.crashed", kind=timer.kind, entity=timer.entity, tries=timer.tries + 1)
                await self._work.retry_timer(timer, error=f"{type(error).__name__}: {error}")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            # The database is away; the lease runs out by itself.
            log.warning("timer.not_settled", kind=timer.kind, entity=timer.entity, error=type(error).__name__)
