"""Whose money it is: accounts, transfers, holds, and the one pure function `post` that judges them.

The vocabulary is TigerBeetle's. A transfer moves a whole number of minor units from a debit account to a credit account
of one currency. It can be single, open a hold (money reserved on both sides), settle a hold (all of it or a part; the
rest is given back), or release it. Nothing here reads a clock or a database.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple

import msgspec

from kassa.ids import Id

AMOUNT_MAX = (1 << 63) - 1
"""Balances are signed 64-bit integers in the database; no account may pass that."""


class Kind(IntEnum):
    """What a transfer does."""

    SINGLE = 1
    HOLD = 2
    SETTLE = 3
    RELEASE = 4


class Limit(IntEnum):
    """Which side of an account may not exceed the other."""

    NONE = 0
    DEBITS_WITHIN_CREDITS = 1
    """A balance that may not go below zero (by more than `overdraft`): wallets, merchant payable."""
    CREDITS_WITHIN_DEBITS = 2
    """The other way round: assets that may not go negative."""


class AccountKey(NamedTuple):
    """An account's name: whose it is (home), what it is for (code, see chart.py), whom it serves, its currency."""

    home: int
    code: int
    owner: str
    """The id of a wallet, or "" for accounts that a home has once."""
    currency: str


class HoldKey(NamedTuple):
    """A hold's name: the id of what it was made for, and which part of it."""

    id: Id
    part: int


class Account(msgspec.Struct, gc=False):
    """An account as it stands. Mutable: `post` works on the batch's own copies."""

    key: AccountKey
    id: int
    limit: int = 0
    overdraft: int = 0
    """By how much the limited side may exceed the other."""
    debits_posted: int = 0
    credits_posted: int = 0
    debits_pending: int = 0
    credits_pending: int = 0
    version: int = 0
    """Counts the transfers that touched this account; a statement without gaps."""

    @property
    def balance(self) -> int:
        """Credits less debits, posted. What a wallet or a payable account holds."""
        return self.credits_posted - self.debits_posted

    @property
    def available(self) -> int:
        """What may still be debited where debits are limited: balance less what is held, without the overdraft."""
        return self.credits_posted - self.debits_posted - self.debits_pending


class Hold(msgspec.Struct, gc=False):
    """Money reserved on both sides until it is settled or released."""

    key: HoldKey
    debit: AccountKey
    credit: AccountKey
    amount: int
    expires_at: datetime | None = None
    state: str = "open"
    """open, settled or released."""


class Transfer(NamedTuple):
    """One instruction to the ledger. `hold` is named by HOLD, SETTLE and RELEASE.

    SETTLE and RELEASE take both accounts from the hold; `amount` 0 in SETTLE means all of it.
    """

    kind: int
    code: int
    """Why: a code of chart.py, shown in statements."""
    debit: AccountKey | None
    credit: AccountKey | None
    amount: int
    hold: HoldKey | None = None
    expires_at: datetime | None = None


class Entry(NamedTuple):
    """A transfer that was posted, with both sides' new balance and version. Immutable for ever."""

    kind: int
    code: int
    debit: Account
    credit: Account
    amount: int
    debit_version: int
    debit_balance: int
    credit_version: int
    credit_balance: int
    hold: HoldKey | None
    hold_amount: int
    """How much of pending a SETTLE or RELEASE takes off both sides; what a HOLD puts on."""


class InsufficientFunds(NamedTuple):
    """The debit account does not hold enough."""

    account: AccountKey
    available: int
    asked: int


class AccountMissing(NamedTuple):
    """An account that must exist does not."""

    account: AccountKey


class HoldRefused(NamedTuple):
    """The hold is missing, settled, released or expired, or too small."""

    hold: HoldKey
    reason: str


class TransferInvalid(NamedTuple):
    """The transfer itself is wrong: two currencies, no amount, one account on both sides, overflow."""

    reason: str


LedgerRefusal = InsufficientFunds | AccountMissing | HoldRefused | TransferInvalid


def post(
    accounts: Mapping[AccountKey, Account],
    holds: dict[HoldKey, Hold],
    transfers: Iterable[Transfer],
    now: datetime,
) -> list[Entry] | LedgerRefusal:
    """Judge transfers in order; all of them, or none.

    Changes the accounts and holds given, and returns the entries; on a refusal it leaves both as they were.
    """
    entries: list[Entry] = []
    saved: list[tuple[Account, int, int, int, int, int]] = []
    saved_holds: list[tuple[HoldKey, Hold | None, str]] = []
    for transfer in transfers:
        entry = _post_one(accounts, holds, transfer, now, saved, saved_holds)
        if not isinstance(entry, Entry):
            _undo(holds, saved, saved_holds)
            return entry
        entries.append(entry)
    return entries


def _post_one(
    accounts: Mapping[AccountKey, Account],
    holds: dict[HoldKey, Hold],
    transfer: Transfer,
    now: datetime,
    saved: list[tuple[Account, int, int, int, int, int]],
    saved_holds: list[tuple[HoldKey, Hold | None, str]],
) -> Entry | LedgerRefusal:
    kind, amount, hold_key = transfer.kind, transfer.amount, transfer.hold
    debit_key, credit_key = transfer.debit, transfer.credit
    hold: Hold | None = None
    if kind == Kind.SETTLE or kind == Kind.RELEASE:
        refusal = _hold_refusal(holds, transfer, now)
        if refusal is not None:
            return refusal
        if hold_key is None:
            return TransferInvalid("a hold must be named")
        hold = holds[hold_key]
        debit_key, credit_key = hold.debit, hold.credit
        amount = 0 if kind == Kind.RELEASE else amount or hold.amount
    if debit_key is None or credit_key is None:
        return TransferInvalid("both accounts must be named")
    if debit_key == credit_key:
        return TransferInvalid("debit and credit are the same account")
    if debit_key.currency != credit_key.currency:
        return TransferInvalid(f"two currencies: {debit_key.currency} and {credit_key.currency}")
    if kind != Kind.RELEASE and not 0 < amount <= AMOUNT_MAX:
        return TransferInvalid(f"amount {amount} is not between 1 and {AMOUNT_MAX}")
    debit, credit = accounts.get(debit_key), accounts.get(credit_key)
    if debit is None:
        return AccountMissing(debit_key)
    if credit is None:
        return AccountMissing(credit_key)
    if kind == Kind.HOLD:
        if hold_key is None:
            return TransferInvalid("a hold must be named")
        if hold_key in holds:
            return HoldRefused(hold_key, "exists")

    held = hold.amount if hold is not None else 0
    short = _shortfall(debit, credit, amount, held)
    if short is not None:
        return short
    saved.append(_snapshot(debit))
    saved.append(_snapshot(credit))
    if kind == Kind.HOLD:
        debit.debits_pending += amount
        credit.credits_pending += amount
        held = amount
        if hold_key is not None:
            saved_holds.append((hold_key, None, ""))
            holds[hold_key] = Hold(hold_key, debit_key, credit_key, amount, transfer.expires_at)
    else:
        if hold is not None:
            debit.debits_pending -= held
            credit.credits_pending -= held
            saved_holds.append((hold.key, hold, hold.state))
            hold.state = "settled" if kind == Kind.SETTLE else "released"
        debit.debits_posted += amount
        credit.credits_posted += amount
    debit.version += 1
    credit.version += 1
    return Entry(
        kind, transfer.code, debit, credit, amount,
        debit.version, debit.credits_posted - debit.debits_posted,
        credit.version, credit.credits_posted - credit.debits_posted,
        hold_key, held,
    )  # fmt: skip


def _hold_refusal(holds: Mapping[HoldKey, Hold], transfer: Transfer, now: datetime) -> LedgerRefusal | None:
    if transfer.hold is None:
        return TransferInvalid("a hold must be named")
    hold = holds.get(transfer.hold)
    if hold is None:
        return HoldRefused(transfer.hold, "missing")
    if hold.state != "open":
        return HoldRefused(transfer.hold, hold.state)
    if transfer.kind == Kind.SETTLE and hold.expires_at is not None and hold.expires_at <= now:
        return HoldRefused(transfer.hold, "expired")
    if transfer.amount > hold.amount or transfer.amount < 0:
        return HoldRefused(transfer.hold, "too small")
    return None


def _shortfall(debit: Account, credit: Account, amount: int, held: int) -> InsufficientFunds | TransferInvalid | None:
    """Whether the limits of both accounts allow it; `held` is what a settle gives back first."""
    if debit.limit == Limit.DEBITS_WITHIN_CREDITS and amount:
        room = debit.credits_posted + debit.overdraft - debit.debits_posted - debit.debits_pending + held
        if amount > room:
            return InsufficientFunds(debit.key, room, amount)
    if credit.limit == Limit.CREDITS_WITHIN_DEBITS and amount:
        room = credit.debits_posted + credit.overdraft - credit.credits_posted - credit.credits_pending + held
        if amount > room:
            return InsufficientFunds(credit.key, room, amount)
    if (
        debit.debits_posted + debit.debits_pending + amount > AMOUNT_MAX
        or credit.credits_posted + credit.credits_pending + amount > AMOUNT_MAX
    ):
        return TransferInvalid("the account would overflow")
    return None


def _snapshot(account: Account) -> tuple[Account, int, int, int, int, int]:
    return (
        account, account.debits_posted, account.credits_posted,
        account.debits_pending, account.credits_pending, account.version,
    )  # fmt: skip


def _undo(
    holds: dict[HoldKey, Hold],
    saved: list[tuple[Account, int, int, int, int, int]],
    saved_holds: list[tuple[HoldKey, Hold | None, str]],
) -> None:
    for account, debits, credits, debits_pending, credits_pending, version in reversed(saved):
        account.debits_posted, account.credits_posted = debits, credits
        account.debits_pending, account.credits_pending = debits_pending, credits_pending
        account.version = version
    for key, hold, state in reversed(saved_holds):
        if hold is None:
            del holds[key]
        else:
            hold.state = state


def single(code: int, debit: AccountKey, credit: AccountKey, amount: int) -> Transfer:
    """A transfer that is final at once."""
    return Transfer(Kind.SINGLE, code, debit, credit, amount)


def hold(
    code: int, debit: AccountKey, credit: AccountKey, amount: int, key: HoldKey, expires_at: datetime | None = None
) -> Transfer:
    """Reserve money on both sides."""
    return Transfer(Kind.HOLD, code, debit, credit, amount, key, expires_at)


def settle(code: int, key: HoldKey, amount: int = 0) -> Transfer:
    """Post a hold, all of it or `amount`; the rest is given back."""
    return Transfer(Kind.SETTLE, code, None, None, amount, key)


def release(code: int, key: HoldKey) -> Transfer:
    """Give a hold back."""
    return Transfer(Kind.RELEASE, code, None, None, 0, key)
