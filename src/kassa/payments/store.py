"""Reads payments, attempts, refunds and wallets from PostgreSQL; also what is stuck, and what nobody would look at again."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, cast

import asyncpg

from kassa.db.queries import load
from kassa.ids import Id
from kassa.ledger import chart
from kassa.ledger.model import Account
from kassa.payments.records import ATTEMPT, PAYMENT, REFUND, WALLET, Attempt, Payment, Refund, Wallet

_SQL = load("kassa.payments")

_LAST_ID = Id("f" * 32)
_ID_SLACK = timedelta(minutes=1)
"""An id is made a moment before its row's time is read."""

WithAttempts = tuple[Payment, tuple[Attempt, ...]]


class Stuck(NamedTuple):
    """Something that is in doubt for too long, or waits for a person."""

    noun: str
    """attempt, refund, payment or exchange."""
    home: int
    payment: Id
    id: Id
    state: str
    since: datetime
    tries: int
    note: str | None


class PaymentStore:
    """Payments in PostgreSQL."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    # One

    async def payment(self, home: int, payment_id: Id) -> WithAttempts | None:
        """A payment or top-up with its attempts, oldest first."""
        row = await self._pool.fetchrow(_SQL.payment, home, payment_id)
        if row is None:
            return None
        return (await self._with_attempts(home, [_payment(row)]))[0]

    async def payment_by_order(self, home: int, kind: str, order_id: str) -> WithAttempts | None:
        """The payment (or, kind topup, the top-up) with the merchant's own number."""
        claim = "topup" if kind == "topup" else "order"
        row = await self._pool.fetchrow(_SQL.payment_by_order, home, claim, order_id)
        if row is None:
            return None
        return (await self._with_attempts(home, [_payment(row)]))[0]

    async def refund(self, home: int, refund_id: Id) -> tuple[Refund, Payment] | None:
        """A refund and its payment."""
        row = await self._pool.fetchrow(_SQL.refund, home, refund_id)
        if row is None:
            return None
        return (await self._with_payments(home, [_refund(row)]))[0]

    async def wallet(self, home: int, wallet_id: Id) -> tuple[Wallet, Account] | None:
        """A wallet and its account in the ledger."""
        row = await self._pool.fetchrow(_SQL.wallet, home, wallet_id)
        if row is None:
            return None
        wallet = cast(Wallet, WALLET.read(tuple(row)))
        key = chart.wallet(home, wallet_id, wallet.currency)
        account = await self._pool.fetchrow(_SQL.wallet_account, *key)
        return None if account is None else (wallet, Account(key, *account))

    async def root_of_attempt(self, home: int, attempt_id: Id) -> Id | None:
        """The payment that an attempt belongs to."""
        return _id(await self._pool.fetchval(_SQL.root_of_attempt, home, attempt_id))

    async def root_of_refund(self, home: int, refund_id: Id) -> Id | None:
        """The payment that a refund belongs to."""
        return _id(await self._pool.fetchval(_SQL.root_of_refund, home, refund_id))

    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]:
        """The channel of each attempt and refund among (home, id); what is neither is left out."""
        rows = await self._pool.fetch(_SQL.channels_of, [home for home, _ in subjects], [id for _, id in subjects])
        return {Id(row["id"].hex): row["channel"] for row in rows}

    async def names_of(self, home: int, roots: Collection[Id]) -> dict[Id, str]:
        """The public ids, `pay_…` or `top_…`, of what money was moved for; what is neither is left out."""
        rows = await self._pool.fetch(_SQL.kinds_of, home, list(roots))
        return {Id(row["id"].hex): ("top_" if row["kind"] == "topup" else "pay_") + row["id"].hex for row in rows}

    async def home_of_payment(self, payment_id: Id) -> int | None:
        """Whose a payment is; for operators, who have its id alone."""
        return cast(int | None, await self._pool.fetchval(_SQL.home_of_payment, payment_id))

    # Pages

    async def payments(
        self,
        home: int,
        kind: str,
        *,
        before: Id | None,
        limit: int,
        order_id: str | None,
        state: str | None,
        created_from: datetime | None,
        created_to: datetime | None,
    ) -> list[WithAttempts]:
        """A page of payments (or, kind topup, of top-ups), newest first, from those before a given one."""
        if order_id is not None:
            found = await self.payment_by_order(home, kind, order_id)
            if found is None or not _is_within(found[0], before, state, created_from, created_to):
                return []
            return [found]
        below, above = _bounds(before, created_from, created_to)
        sql = _SQL.topups if kind == "topup" else _SQL.payments
        rows = await self._pool.fetch(sql, home, below, above, state, created_from, created_to, limit)
        return await self._with_attempts(home, [_payment(row) for row in rows])

    async def refunds(
        self,
        home: int,
        *,
        payment: Id | None,
        before: Id | None,
        limit: int,
        order_id: str | None,
        state: str | None,
        created_from: datetime | None,
        created_to: datetime | None,
    ) -> list[tuple[Refund, Payment]]:
        """A page of refunds, newest first; of one payment or top-up by its id, or of both by the merchant's order number."""
        roots = None if payment is None else [payment]
        if order_id is not None:
            both = [await self.payment_by_order(home, kind, order_id) for kind in ("payment", "topup")]
            roots = [found[0].id for found in both if found is not None and payment in (None, found[0].id)]
        below, above = _bounds(before, created_from, created_to)
        bounds = (below, above, state, created_from, created_to, limit)
        if roots is None:
            rows = await self._pool.fetch(_SQL.refunds, home, *bounds)
        else:
            rows = await self._pool.fetch(_SQL.refunds_of_payment, home, roots, *bounds)
        return await self._with_payments(home, [_refund(row) for row in rows])

    # For operators and the sweeper

    async def unarmed(self, limit: int = 1000) -> list[tuple[int, Id]]:
        """(home, payment) of what is not final and has no timer."""
        rows = await self._pool.fetch(_SQL.unarmed, limit)
        return [(row["home"], Id(row["root"].hex)) for row in rows]

    async def stuck(self, home: int | None, before: datetime, limit: int = 100) -> list[Stuck]:
        """What has been in doubt since before a time, and what waits for a person; home None: of all merchants."""
        rows = await self._pool.fetch(_SQL.stuck, home, before, limit)
        return [
            Stuck(
                row["noun"], row["home"], Id(row["root"].hex), Id(row["id"].hex), row["state"], row["since"],
                row["tries"], row["note"],
            )
            for row in rows
        ]  # fmt: skip

    async def doubts(self) -> list[tuple[str, int, float]]:
        """Attempts and refunds that are in doubt: noun, how many, seconds of the oldest one."""
        rows = await self._pool.fetch(_SQL.doubts)
        return [(row["noun"], row["count"], row["oldest_s"] or 0.0) for row in rows]

    # Together

    async def _with_attempts(self, home: int, payments: Sequence[Payment]) -> list[WithAttempts]:
        wanted = [payment.id for payment in payments if payment.channel != "wallet"]
        attempts: dict[Id, list[Attempt]] = defaultdict(list)
        for row in await self._pool.fetch(_SQL.attempts, home, wanted) if wanted else []:
            attempt = cast(Attempt, ATTEMPT.read(tuple(row)))
            attempts[attempt.root].append(attempt)
        return [(payment, tuple(attempts[payment.id])) for payment in payments]

    async def _with_payments(self, home: int, refunds: Sequence[Refund]) -> list[tuple[Refund, Payment]]:
        wanted = {refund.root for refund in refunds}
        rows = await self._pool.fetch(_SQL.payments_by_id, home, list(wanted)) if wanted else []
        payments = {payment.id: payment for payment in map(_payment, rows)}
        return [(refund, payments[refund.root]) for refund in refunds]


def _payment(row: asyncpg.Record) -> Payment:
    return cast(Payment, PAYMENT.read(tuple(row)))


def _refund(row: asyncpg.Record) -> Refund:
    return cast(Refund, REFUND.read(tuple(row)))


def _id(value: object) -> Id | None:
    digits = getattr(value, "hex", None)
    return Id(digits) if isinstance(digits, str) else None


def _bounds(before: Id | None, created_from: datetime | None, created_to: datetime | None) -> tuple[Id, Id]:
    """Ids below and from which a page lies: a version 7 id begins with its milliseconds since 1970."""
    below = before or _LAST_ID
    if created_to is not None:
        below = min(below, _first_id(created_to + _ID_SLACK))
    above = Id("0" * 32) if created_from is None else _first_id(created_from - _ID_SLACK)
    return below, above


def _first_id(at: datetime) -> Id:
    milliseconds = int((at - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000)
    return Id(f"{min(max(milliseconds, 0), (1 << 48) - 1):012x}" + "0" * 20)


def _is_within(
    payment: Payment,
    before: Id | None,
    state: str | None,
    created_from: datetime | None,
    created_to: datetime | None,
) -> bool:
    return (
        (before is None or payment.id < before)
        and state in (None, payment.state)
        and (created_from is None or payment.created_at >= created_from)
        and (created_to is None or payment.created_at < created_to)
    )
