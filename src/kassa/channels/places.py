"""How many conversations one merchant may have with one channel at a time, so that its slow or many ones leave the
connections to others. What a conversation says is not decided here."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

PER_ACCOUNT = 64
"""A quarter of the connections to one provider (`runner.py`). At 100 ms an answer that is 640 requests a second, which is more
than a provider takes from one merchant."""
WAIT_S = 8.0
"""As long as a request waits for a connection."""


class Crowded(Exception):
    """No place came free in time; nothing was sent."""


class _Account:
    __slots__ = ("places", "users")

    def __init__(self, places: int) -> None:
        self.places = asyncio.Semaphore(places)
        self.users = 0


class Places:
    """Places by account: whatever names a merchant at a channel. First come, first served within an account."""

    def __init__(self, *, per_account: int = PER_ACCOUNT, wait_s: float = WAIT_S) -> None:
        self._per_account = per_account
        self._wait_s = wait_s
        self._accounts: dict[Hashable, _Account] = {}

    @asynccontextmanager
    async def at(self, name: Hashable) -> AsyncIterator[None]:
        """One place for as long as the block runs. Raises Crowded."""
        account = self._accounts.setdefault(name, _Account(self._per_account))
        account.users += 1
        try:
            await self._take(account)
            try:
                yield
            finally:
                account.places.release()
        finally:
            account.users -= 1
            if not account.users:
                del self._accounts[name]

    async def _take(self, account: _Account) -> None:
        try:
            async with asyncio.timeout(self._wait_s if account.places.locked() else None):
                await account.places.acquire()
        except TimeoutError:
            raise Crowded from None
