"""Reads payments from the memory journal: the twin of `store.py`, for simulations and rules without a database."""

from collections.abc import Sequence
from typing import cast

from kassa.ids import Id
from kassa.journal.memory import MemoryJournal
from kassa.ledger import chart
from kassa.ledger.model import Account
from kassa.payments.records import ATTEMPT, PAYMENT, REFUND, WALLET, Attempt, Payment, Refund, Wallet
from kassa.payments.states import ATTEMPT_OPEN, PAYMENT_OPEN, REFUND_OPEN

OPEN = {PAYMENT: PAYMENT_OPEN, ATTEMPT: ATTEMPT_OPEN, REFUND: REFUND_OPEN}


class MemoryPayments:
    """Payments of a memory journal."""

    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal

    async def payment(self, home: int, payment_id: Id) -> tuple[Payment, tuple[Attempt, ...]] | None:
        """A payment or top-up with its attempts, oldest first."""
        row = self._journal.rows.get((PAYMENT, payment_id))
        if row is None or row.home != home:
            return None
        attempts = tuple(cast(Attempt, child) for child in self._journal.children(ATTEMPT, payment_id))
        return cast(Payment, row), attempts

    async def refund(self, home: int, refund_id: Id) -> tuple[Refund, Payment] | None:
        """A refund and its payment."""
        row = self._journal.rows.get((REFUND, refund_id))
        if row is None or row.home != home:
            return None
        refund = cast(Refund, row)
        return refund, cast(Payment, self._journal.rows[PAYMENT, refund.root])

    async def wallet(self, home: int, wallet_id: Id) -> tuple[Wallet, Account] | None:
        """A wallet and its account."""
        row = self._journal.rows.get((WALLET, wallet_id))
        if row is None or row.home != home:
            return None
        wallet = cast(Wallet, row)
        return wallet, self._journal.accounts[chart.wallet(home, wallet_id, wallet.currency)]

    async def root_of_attempt(self, home: int, attempt_id: Id) -> Id | None:
        """The payment that an attempt belongs to."""
        row = self._journal.rows.get((ATTEMPT, attempt_id))
        return row.root_id if row is not None and row.home == home else None

    async def root_of_refund(self, home: int, refund_id: Id) -> Id | None:
        """The payment that a refund belongs to."""
        row = self._journal.rows.get((REFUND, refund_id))
        return row.root_id if row is not None and row.home == home else None

    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]:
        """The channel of each attempt and refund among (home, id); what is neither is left out."""
        found: dict[Id, str] = {}
        for _, id in subjects:
            refund = cast(Refund | None, self._journal.rows.get((REFUND, id)))
            attempt = self._journal.rows.get((ATTEMPT, id if refund is None else refund.attempt or id))
            if attempt is not None:
                found[id] = cast(Attempt, attempt).channel
        return found

    def unarmed(self) -> list[tuple[int, Id]]:
        """(home, payment) of what is not final and has no timer."""
        armed = {timer.entity for timer in self._journal.timers.values()}
        rows = [cast(Payment | Attempt | Refund, row) for table in OPEN for row in self._journal.all_of(table)]
        return sorted(
            {
                (row.home, row.root_id)
                for row in rows
                if row.state in OPEN[self._journal.tables.of(row)] and row.id not in armed
            }
        )
