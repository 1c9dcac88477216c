"""Keeps loops running: one that crashes is logged, counted, and started again after a pause that grows. And ends them."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog

from kassa.db.away import AWAY
from kassa.errors import BrokerUnreachable, Busy, DatabaseUnreachable, OutcomeUnknown

log = structlog.get_logger("kassa.supervisor")

PAUSE_S = 0.5
PAUSE_MAX_S = 30.0
"""A loop that crashes at once, again and again, must neither fill the log nor stay away for long."""
STEADY_S = 60.0
"""Who ran so long has recovered; the next crash is the first one again."""
AGAIN_S = 10.0
"""More than any task needs to end."""

SAID_MAX = 300
"""Characters of an error that health answers show."""

Loop = Callable[[], Awaitable[None]]
"""Runs until it is cancelled."""


async def end_tasks(*tasks: "asyncio.Task[Any]") -> None:
    """Cancels tasks, and returns when each is done, whatever it raised.

    One that goes on is cancelled again: what it waited for may have taken the first time for its own (`asyncio.wait_for` of
    Python 3.11 does, when its answer comes at that very moment; aiormq makes a lost connection of it)."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)
    # Whatever they raised was seen.
    await asyncio.gather(*tasks, return_exceptions=True)


def is_ended() -> bool:
    """Whether somebody has cancelled this task, whatever became of that on its way."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


class Worker:
    """One loop, and how it is doing."""

    def __init__(self, name: str, loop: Loop) -> None:
        self.name = name
        self.crashes = 0
        self.last_error: str | None = None
        self.is_running = False
        self._loop = loop

    async def run(self) -> None:
        """Runs the loop for ever, whatever happens to it."""
        pause_s = PAUSE_S
        while True:
            started = time.monotonic()
            self.is_running = True
            try:
                await self._loop()
                self._note(RuntimeError("the loop ended"))
            except (*AWAY, BrokerUnreachable, Busy, DatabaseUnreachable, OutcomeUnknown) as error:
                # No fault of the loop; it goes on as soon as what it needs is back.
                self.last_error = said(error)[:SAID_MAX]
                log.warning("worker.waits", worker=self.name, error=self.last_error)
                pause_s = PAUSE_S
            except asyncio.CancelledError as error:
                if is_ended():
                    raise
                # Nobody has ended us: something inside was cancelled that the loop waited for.
                self._note(error)
            except Exception as error:
                # The outermost loop: what a worker could not handle must not end it for ever.
                self._note(error)
            finally:
                # Also where the loop was cancelled: a task that somebody ended does not run.
                self.is_running = False
            if is_ended():
                return
            if time.monotonic() - started > STEADY_S:
                pause_s = PAUSE_S
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(pause_s * 2, PAUSE_MAX_S)

    def _note(self, error: BaseException) -> None:
        self.crashes += 1
        self.last_error = said(error)[:SAID_MAX]
        try:
            log.error("worker.crashed", worker=self.name, crashes=self.crashes, exc_info=error)
        except UnicodeError:
            # Half of a character in somebody's text, which a service's own log may not take.
            log.error("worker.crashed", worker=self.name, crashes=self.crashes, error=ascii(self.last_error))


def said(error: BaseException) -> str:
    """What went wrong, by its kind alone where it cannot even be shown: somebody's handler may raise anything."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        # Its own `__str__` failed, in whatever way.
        return type(error).__name__


class Supervisor:
    """All loops of one process."""

    def __init__(self, loops: Mapping[str, Loop]) -> None:
        self.workers = [Worker(name, loop) for name, loop in loops.items()]
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def crashes(self) -> int:
        """Of all loops together, since the start."""
        return sum(worker.crashes for worker in self.workers)

    @property
    def idle(self) -> list[Worker]:
        """Loops that should run and do not."""
        return [worker for worker in self.workers if not worker.is_running]

    def start(self) -> None:
        """Starts every loop."""
        self._tasks = [asyncio.create_task(worker.run(), name=f"worker {worker.name}") for worker in self.workers]

    async def stop(self) -> None:
        """Ends every loop at its next wait. What was being done is in the database, or will be done again."""
        await end_tasks(*self._tasks)
        self._tasks = []
        for worker in self.workers:
            worker.is_running = False
