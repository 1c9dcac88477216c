"""Reads merchants, their keys and channel accounts."""

from collections.abc import Sequence
from typing import cast

import asyncpg

from kassa.db.queries import load
from kassa.ids import Id
from kassa.merchants.model import Caller, read_scopes
from kassa.merchants.records import API_KEY, CHANNEL_ACCOUNT, MERCHANT, ApiKey, ChannelAccount, Merchant

_SQL = load("kassa.merchants", "queries.sql")
_FIRST_ID = Id("0" * 32)


class MerchantStore:
    """Merchants in PostgreSQL."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def next_home(self) -> int:
        """The home of the next merchant."""
        return cast(int, await self._pool.fetchval(_SQL["next_home"]))

    async def merchant(self, merchant_id: Id) -> Merchant | None:
        """One merchant, whichever home it has."""
        row = await self._pool.fetchrow(_SQL["merchant_by_id"], merchant_id)
        return None if row is None else cast(Merchant, MERCHANT.read(tuple(row)))

    async def merchants(self, after: Id | None, limit: int) -> list[Merchant]:
        """A page of all merchants, oldest first."""
        rows = await self._pool.fetch(_SQL["merchants"], after or _FIRST_ID, limit)
        return [cast(Merchant, MERCHANT.read(tuple(row))) for row in rows]

    async def keys(self, home: int) -> list[ApiKey]:
        """A merchant's API keys, oldest first."""
        rows = await self._pool.fetch(_SQL["keys_of_merchant"], home)
        return [cast(ApiKey, API_KEY.read(tuple(row))) for row in rows]

    async def key(self, key_id: Id) -> ApiKey | None:
        """One API key, whosever it is."""
        row = await self._pool.fetchrow(_SQL["key_by_id"], key_id)
        return None if row is None else cast(ApiKey, API_KEY.read(tuple(row)))

    async def callers(self, hashes: Sequence[bytes]) -> dict[bytes, Caller]:
        """Who the active ones of these keys belong to; what is missing is unknown or revoked."""
        rows = await self._pool.fetch(_SQL["callers"], hashes)
        return {
            row["key_hash"]: Caller(
                cast(Merchant, MERCHANT.read(tuple(row)[3:])), Id(row["key_id"].hex), read_scopes(row["scopes"])
            )
            for row in rows
        }

    async def channel_account(self, home: int, channel: str) -> ChannelAccount | None:
        """A merchant's account at one channel."""
        row = await self._pool.fetchrow(_SQL["channel_account"], home, channel)
        return None if row is None else cast(ChannelAccount, CHANNEL_ACCOUNT.read(tuple(row)))

    async def channel_accounts(self, home: int) -> list[ChannelAccount]:
        """A merchant's accounts at all channels."""
        rows = await self._pool.fetch(_SQL["channel_accounts"], home)
        return [cast(ChannelAccount, CHANNEL_ACCOUNT.read(tuple(row))) for row in rows]

    async def channel_versions(self, homes: Sequence[int]) -> dict[tuple[int, str], int]:
        """The versions of these merchants' active channel accounts."""
        rows = await self._pool.fetch(_SQL["channel_versions"], homes)
        return {(row["home"], row["channel"]): row["version"] for row in rows}

    async def announce(self, home: int) -> None:
        """Tells every process that something about this merchant changed."""
        await self._pool.execute(_SQL["announce"], str(home))
