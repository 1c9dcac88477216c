"""What the first request of a key was told, where that turned out only after its effect was stored: 201, or 202.

The effect and its reply are one commit of the journal (`change.Reply`); this is a correction to the status alone.
"""

from typing import Any

from kassa.db.queries import load
from kassa.journal.change import OnceKey

_SQL = load("kassa.journal")


class FirstStatuses:
    """The statuses kept under idempotency keys."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    async def note(self, home: int, once: OnceKey, status: int) -> None:
        """Repeats of this key are told `status` from now on. May be repeated. Raises what a database that is away does."""
        await self._pool.execute(_SQL.note_first_status, home, once.operation, once.key, status)
