"""The port: what everybody who decides something needs of the journal. `writer.py` keeps it in PostgreSQL, `memory.py` without."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from kassa.errors import KassaError
from kassa.journal.change import Change, Verdict
from kassa.journal.table import Tables


class Written(NamedTuple):
    """What a batch wrote, for wake-ups."""

    events: int
    messages: int
    timers: int
    """That were set; one that goes is nobody's work."""


def tell(judged: "asyncio.Future[Verdict]", told: Callable[[Verdict | KassaError], None]) -> None:
    """What a future of `submit` holds, as `hand_in` tells it."""

    def done(judged: "asyncio.Future[Verdict]") -> None:
        error = judged.exception()
        told(error if isinstance(error, KassaError) else judged.result())

    judged.add_done_callback(done)


class Journal(Protocol):
    """The one door for every durable write."""

    tables: Tables

    def submit(self, change: Change) -> "asyncio.Future[Verdict]":
        """Queue a change; the future holds its verdict once it is durable or refused.

        Raises Busy when the queue is full: nothing was taken. The future raises OutcomeUnknown when the journal cannot find
        out in time what became of the commit (same key, safe to repeat), DatabaseUnreachable when nothing can be written.
        """
        ...

    def hand_in(self, change: Change, told: Callable[[Verdict | KassaError], None]) -> None:
        """Like `submit`, for whoever cannot afford a future: `told` is called once, with what the future would hold.

        It must be quick and must not raise. Raises Busy.
        """
        ...

    async def commit(self, change: Change) -> Verdict:
        """Submit and wait."""
        ...

    def on_commit(self, listener: Callable[[Written], None]) -> None:
        """Called after each commit with what it wrote, so that readers in this process wake at once."""
        ...
