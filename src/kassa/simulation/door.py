"""The memory journal as a busy database is seen from outside: changes wait, go in batches, and sometimes nobody hears
what became of them."""

import asyncio
from collections.abc import Callable
from random import Random

from kassa.errors import KassaError, OutcomeUnknown
from kassa.journal.change import Change, Verdict
from kassa.journal.journal import Written, tell
from kassa.journal.memory import MemoryJournal

BATCH_AFTER_S = 0.02
DOUBT = 0.012
"""The share of batches whose connection dies in the middle of the commit."""


class Door:
    """A journal in front of a memory journal. `after_commit` is called after each batch, before anybody hears of it."""

    def __init__(self, journal: MemoryJournal, random: Random, after_commit: Callable[[], None]) -> None:
        self.tables = journal.tables
        self.is_kind = False
        """True: from now on nothing goes wrong here any more."""
        self.batches = 0
        self.doubts = 0
        self._journal = journal
        self._random = random
        self._after_commit = after_commit
        self._waiting: list[tuple[Change, asyncio.Future[Verdict]]] = []

    def submit(self, change: Change) -> "asyncio.Future[Verdict]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Verdict] = loop.create_future()
        self._waiting.append((change, future))
        if len(self._waiting) == 1:
            loop.call_later(self._random.random() * BATCH_AFTER_S, self._commit)
        return future

    def hand_in(self, change: Change, told: Callable[[Verdict | KassaError], None]) -> None:
        tell(self.submit(change), told)

    async def commit(self, change: Change) -> Verdict:
        return await self.submit(change)

    def on_commit(self, listener: Callable[[Written], None]) -> None:
        self._journal.on_commit(listener)

    def crash(self) -> None:
        """The process dies. What it had submitted is committed and nobody hears of it, or it never arrived."""
        if self._random.random() < 0.5:
            self._write()
        self._waiting = []

    def _commit(self) -> None:
        if not self._waiting:
            return
        waiting, doubtful = self._waiting, not self.is_kind and self._random.random() < DOUBT
        verdicts: list[Verdict] = []
        if not doubtful or self._random.random() < 0.5:
            verdicts = self._write()
        self._waiting = []
        if doubtful:
            self.doubts += 1
        for number, (_, future) in enumerate(waiting):
            if future.done():
                # Whoever asked has gone.
                continue
            if doubtful:
                future.set_exception(OutcomeUnknown())
            else:
                future.set_result(verdicts[number])

    def _write(self) -> list[Verdict]:
        verdicts = self._journal.commit_now([change for change, _ in self._waiting])
        self.batches += 1
        self._after_commit()
        return verdicts
