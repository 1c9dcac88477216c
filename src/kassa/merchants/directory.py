"""Who asks, and how to reach their channels: kept in memory, because every request needs it. At most 2 seconds stale.

What is held is read again every second in one query, and at once when another process announces a change. When the
database cannot be read, nothing is held to be true for longer than that: then each question waits for the database.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

from kassa.channels.channel import Channel
from kassa.channels.registry import Opened
from kassa.db.away import AWAY
from kassa.errors import ChannelNotFound, DatabaseUnreachable
from kassa.ids import Id
from kassa.merchants.model import Caller, hash_key
from kassa.merchants.records import ChannelAccount, Merchant
from kassa.merchants.vault import Vault

STALE_S = 2.0
"""What is older than this is not believed."""
REFRESH_S = 1.0
"""Half of it, so that one slow refresh is no reason to ask the database at every request."""
IDLE_S = 300.0
"""What nobody asked for so long is dropped; the next question costs one query."""
HELD_MAX = 100_000
"""Keys held at most, wrong ones included, so that guessing keys cannot fill the memory."""
CHANGES = "kassa_config"
"""The name under which changes are announced."""

Read = TypeVar("Read")

log = structlog.get_logger("kassa.merchants.directory")


class MerchantReads(Protocol):
    """What the directory needs of the store."""

    async def callers(self, hashes: Sequence[bytes]) -> dict[bytes, Caller]: ...
    async def merchant(self, merchant_id: Id) -> Merchant | None: ...
    async def channel_account(self, home: int, channel: str) -> ChannelAccount | None: ...
    async def channel_versions(self, homes: Sequence[int]) -> dict[tuple[int, str], int]: ...


class _Held:
    """One key: who it belongs to (None: nobody), and when somebody last asked."""

    __slots__ = ("asked_at", "caller")

    def __init__(self, caller: Caller | None, asked_at: float) -> None:
        self.caller = caller
        self.asked_at = asked_at


ChannelMaker = Callable[[str, dict[str, Any]], Opened]
"""Makes a channel of its name and its credentials."""


class Directory:
    """Callers by key, channels by merchant. `clock` counts seconds and never goes back."""

    def __init__(
        self,
        store: MerchantReads,
        vault: Vault,
        make_channel: ChannelMaker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._vault = vault
        self._make_channel = make_channel
        self._clock = clock
        self._keys: dict[bytes, _Held] = {}
        self._channels: dict[tuple[int, str], tuple[int, Opened]] = {}
        self._homes: dict[Id, int] = {}
        self._fresh_until = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self._epoch = 0
        """Counts what was forgotten: what was read before is not kept after."""

    def known(self, key: str) -> Caller | None:
        """Who this key belongs to, if that is in memory and fresh; None: ask `caller`."""
        now = self._clock()
        held = self._keys.get(hash_key(key))
        if held is None or now > self._fresh_until:
            return None
        held.asked_at = now
        return held.caller

    async def caller(self, key: str) -> Caller | None:
        """Who this key belongs to; None: nobody, or revoked. Raises DatabaseUnreachable."""
        digest = hash_key(key)
        if self._clock() > self._fresh_until and self._keys:
            await self.refresh()
        held = self._keys.get(digest)
        if held is not None:
            held.asked_at = self._clock()
            return held.caller
        epoch = self._epoch
        found = (await self._read(self._store.callers([digest]))).get(digest)
        if epoch == self._epoch:
            self._hold(digest, found)
        return found

    async def for_merchant(self, home: int, channel: str) -> Opened:
        """A merchant's channel, ready to talk to. Raises ChannelNotFound, DatabaseUnreachable."""
        held = self._channels.get((home, channel))
        if held is not None and self._clock() <= self._fresh_until:
            return held[1]
        epoch = self._epoch
        account = await self._read(self._store.channel_account(home, channel))
        if account is None or account.state != "active":
            raise ChannelNotFound(channel=channel)
        if held is not None and held[0] == account.version:
            return held[1]
        credentials = msgspec.json.decode(self._vault.open(home, channel, account.credentials), type=dict[str, Any])
        opened = self._make_channel(channel, credentials)
        if epoch == self._epoch:
            self._channels[home, channel] = (account.version, opened)
        return opened

    async def home_of(self, merchant_id: Id) -> int | None:
        """A merchant's home, which never changes; None when there is no such merchant. Raises DatabaseUnreachable."""
        home = self._homes.get(merchant_id)
        if home is None:
            merchant = await self._read(self._store.merchant(merchant_id))
            if merchant is None:
                return None
            home = self._homes[merchant_id] = merchant.home
        return home

    def learn(self, home: int, channel: str, fresh: Channel) -> None:
        """A channel learnt something (new provider keys): the same account from now on with this object."""
        held = self._channels.get((home, channel))
        if held is not None:
            version, opened = held
            self._channels[home, channel] = (version, Opened(fresh, opened.base_url))

    def forget_key(self, digest: bytes) -> None:
        """The key is nobody's from now on in this process."""
        self._epoch += 1
        self._keys[digest] = _Held(None, self._clock())

    def forget_home(self, home: int) -> None:
        """What is held of this merchant is asked again."""
        self._epoch += 1
        for digest, held in list(self._keys.items()):
            if held.caller is not None and held.caller.merchant.home == home:
                del self._keys[digest]
        for name in [name for name in self._channels if name[0] == home]:
            del self._channels[name]

    async def refresh(self) -> None:
        """Reads everything that is held again, in two queries; callers at the same time share one reading.

        Raises DatabaseUnreachable.
        """
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    def heard(self, payload: str) -> None:
        """Another process announced that a merchant changed."""
        if payload.isdecimal():
            self.forget_home(int(payload))

    async def run(self) -> None:
        """Refreshes every second, for ever. A database that is away is waited for."""
        while True:
            try:
                await self.refresh()
            except DatabaseUnreachable as error:
                log.warning("directory.stale", error=str(error))
            await asyncio.sleep(REFRESH_S)

    async def _refresh(self) -> None:
        started, epoch = self._clock(), self._epoch
        self._drop_idle(started)
        digests = list(self._keys)
        callers = await self._read(self._store.callers(digests)) if digests else {}
        homes = sorted({home for home, _ in self._channels})
        versions = await self._read(self._store.channel_versions(homes)) if homes else {}
        if epoch != self._epoch:
            # Something was forgotten while we read; what we read may be older than that. The next round has it right.
            return
        for digest in digests:
            held = self._keys.get(digest)
            if held is not None:
                held.caller = callers.get(digest)
        for name, (version, _) in list(self._channels.items()):
            if name[0] in homes and versions.get(name) != version:
                del self._channels[name]
        self._fresh_until = started + STALE_S

    def _hold(self, digest: bytes, caller: Caller | None) -> None:
        if len(self._keys) >= HELD_MAX:
            self._keys = {name: held for name, held in self._keys.items() if held.caller is not None}
        if len(self._keys) >= HELD_MAX:
            self._keys = {}
        if not self._keys:
            self._fresh_until = self._clock() + STALE_S
        self._keys[digest] = _Held(caller, self._clock())

    def _drop_idle(self, now: float) -> None:
        for digest, held in list(self._keys.items()):
            if now - held.asked_at >= IDLE_S:
                del self._keys[digest]

    async def _read(self, reading: Awaitable[Read]) -> Read:
        try:
            return await reading
        except AWAY as error:
            raise DatabaseUnreachable(reason=type(error).__name__) from error
