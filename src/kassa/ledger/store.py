"""Reads balances and statements."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import asyncpg

from kassa.db.queries import load
from kassa.ids import Id
from kassa.ledger.chart import Code
from kassa.ledger.model import Account, AccountKey, Kind

_SQL = load("kassa.ledger", "queries.sql")

OWN_CODES = (Code.MERCHANT_PAYABLE, Code.FEE_INCOME, Code.CHANNEL_RECEIVABLE, Code.SUSPENSE)
"""The accounts that a merchant's home has once per currency."""
NO_VERSION = (1 << 63) - 1
"""Above every version: a statement from the newest."""


class StatementLine(NamedTuple):
    """One transfer, seen from one account."""

    version: int
    """Counts the transfers of the account, without gaps."""
    balance: int
    """After it."""
    amount: int
    """What it added to the balance; holds and releases add nothing."""
    held: int
    """What it added to what is held."""
    at: datetime
    root: Id | None
    """The payment or top-up that it was made for."""
    place: tuple[int, int, int]
    """writer, seq and ord: its name for ever."""
    kind: Kind
    code: int


class TrialLine(NamedTuple):
    """All accounts of one purpose and currency."""

    currency: str
    code: int
    debits_posted: int
    credits_posted: int
    debits_pending: int
    credits_pending: int
    accounts: int


class LedgerStore:
    """The ledger in PostgreSQL."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def account(self, key: AccountKey) -> Account | None:
        """One account as it stands."""
        row = await self._pool.fetchrow(_SQL["account"], *key)
        return None if row is None else _account(row)

    async def accounts_of(self, home: int, code: int, owners: Sequence[str]) -> dict[str, Account]:
        """The accounts of several owners, by owner."""
        rows = await self._pool.fetch(_SQL["accounts_of_owners"], home, code, owners)
        return {row["owner"]: _account(row) for row in rows}

    async def own_accounts(self, home: int) -> list[Account]:
        """The merchant's own accounts, by currency and purpose."""
        rows = await self._pool.fetch(_SQL["own_accounts"], home, [int(code) for code in OWN_CODES])
        return [_account(row) for row in rows]

    async def currencies(self, home: int) -> list[str]:
        """The currencies in which the merchant has a balance."""
        return sorted({account.key.currency for account in await self.own_accounts(home)})

    async def statement(self, account_id: int, before_version: int | None, limit: int) -> list[StatementLine]:
        """What happened to an account, newest first; before_version None: from the newest."""
        below = NO_VERSION if before_version is None else before_version
        rows = await self._pool.fetch(_SQL["statement"], account_id, below, limit)
        return [_line(row) for row in rows]

    async def balance_at(self, account_id: int, at: datetime) -> int:
        """The balance as it was at a time; 0 before the first transfer."""
        row = await self._pool.fetchrow(_SQL["balance_at"], account_id, at)
        return 0 if row is None else int(row["balance"])

    async def trial_balance(self) -> list[TrialLine]:
        """Everything, by currency and purpose: the sum over a currency is zero, or something is broken."""
        rows = await self._pool.fetch(_SQL["trial_balance"])
        return [TrialLine(row["currency"], row["code"], *(int(value) for value in tuple(row)[2:])) for row in rows]


def _account(row: asyncpg.Record) -> Account:
    return Account(
        AccountKey(row["home"], row["code"], row["owner"], row["currency"]),
        row["id"],
        row["limit_side"],
        row["overdraft"],
        row["debits_posted"],
        row["credits_posted"],
        row["debits_pending"],
        row["credits_pending"],
        row["version"],
    )


def _line(row: asyncpg.Record) -> StatementLine:
    kind = Kind(row["kind"])
    held = {Kind.HOLD: row["hold_amount"], Kind.SINGLE: 0}.get(kind, -row["hold_amount"])
    return StatementLine(
        row["version"],
        row["balance"],
        0 if kind in (Kind.HOLD, Kind.RELEASE) else row["amount"],
        held,
        row["at"],
        None if row["root"] is None else Id(row["root"].hex),
        (row["writer"], row["seq"], row["ord"]),
        kind,
        row["code"],
    )
