"""What the journal's conformance suite needs to look at: rows, balances, events, timers, the same for both journals."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import asyncpg
import msgspec

from kassa.errors import KassaError, RefundExceedsPaid
from kassa.ids import Id, new_id
from kassa.journal.change import (
    AccountOpen,
    Aggregate,
    Change,
    Claim,
    Committed,
    Event,
    Move,
    OnceKey,
    Reply,
    Rule,
    Verdict,
)  # fmt: skip
from kassa.journal.journal import Journal
from kassa.journal.memory import MemoryJournal
from kassa.journal.table import Record, Tables
from kassa.journal.writer import PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import AccountKey, Limit, single
from kassa.payments.records import ATTEMPT, EXCHANGE, PAYMENT, REFUND, WALLET, Payment, Refund, Wallet

TABLES = Tables([PAYMENT, ATTEMPT, REFUND, WALLET, EXCHANGE])
HOME = 7
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


class House(Protocol):
    """A journal and a view of what it keeps."""

    @property
    def journal(self) -> Journal: ...
    async def row(self, record: Record) -> Any: ...
    async def balance(self, key: AccountKey) -> tuple[int, int, int]: ...
    async def events(self, root: Id) -> list[tuple[int, str]]: ...
    async def timers(self) -> list[tuple[Id, str, int]]: ...
    async def messages(self) -> list[Id]: ...
    async def count(self, table: str) -> int: ...


class MemoryHouse:
    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal

    @property
    def journal(self) -> MemoryJournal:
        return self._journal

    async def row(self, record: Record) -> Any:
        return self.journal.rows.get((TABLES.of(record), record.id))

    async def balance(self, key: AccountKey) -> tuple[int, int, int]:
        account = self.journal.accounts[key]
        return account.balance, account.debits_pending, account.version

    async def events(self, root: Id) -> list[tuple[int, str]]:
        return [(event.sequence, event.type) for event in self.journal.events if event.root == root]

    async def timers(self) -> list[tuple[Id, str, int]]:
        return [(timer.entity, timer.kind, timer.generation) for timer in self.journal.timers.values()]

    async def messages(self) -> list[Id]:
        return list(self.journal.messages)

    async def count(self, table: str) -> int:
        kept = {"transfer": self.journal.entries, "once": self.journal.once, "claim": self.journal.claims}
        if table in kept:
            return len(kept[table])
        return len(self.journal.all_of(TABLES.by_name[table]))


class PostgresHouse:
    def __init__(self, journal: PostgresJournal, pool: asyncpg.Pool, url: str) -> None:
        self._journal = journal
        self.pool = pool
        self.url = url

    @property
    def journal(self) -> PostgresJournal:
        return self._journal

    async def row(self, record: Record) -> Any:
        table = TABLES.of(record)
        columns = ", ".join(f'"{name}"' for name in table.columns)
        row = await self.pool.fetchrow(f"SELECT {columns} FROM {table.name} WHERE id = $1", record.id)
        return table.read(row) if row else None

    async def balance(self, key: AccountKey) -> tuple[int, int, int]:
        row = await self.pool.fetchrow(
            "SELECT credits_posted - debits_posted AS balance, debits_pending, version FROM account "
            "WHERE home = $1 AND code = $2 AND owner = $3 AND currency = $4",
            *key,
        )
        return row["balance"], row["debits_pending"], row["version"]

    async def events(self, root: Id) -> list[tuple[int, str]]:
        rows = await self.pool.fetch("SELECT sequence, type FROM event WHERE root = $1 ORDER BY sequence", root)
        return [(row["sequence"], row["type"]) for row in rows]

    async def timers(self) -> list[tuple[Id, str, int]]:
        rows = await self.pool.fetch("SELECT entity, kind, generation FROM timer ORDER BY due")
        return [(Id(row["entity"].hex), row["kind"], row["generation"]) for row in rows]

    async def messages(self) -> list[Id]:
        return [Id(row["id"].hex) for row in await self.pool.fetch("SELECT id FROM message ORDER BY id")]

    async def count(self, table: str) -> int:
        return int(await self.pool.fetchval(f"SELECT count(*) FROM {table}"))


# Changes that the suite makes


def wallet(user: str = "u", home: int = HOME) -> Wallet:
    return Wallet(
        home=home, id=new_id(), version=0, sequence=0, state="open", user=user, currency="CNY", created_at=NOW
    )


def payment(order_id: str, amount: int = 100, payer: Id | None = None, home: int = HOME) -> Payment:
    return Payment(
        home=home, id=new_id(), version=0, sequence=0, state="succeeded", kind="payment", order_id=order_id,
        amount=amount, currency="CNY", channel="wallet", method="wallet", wallet=payer, openid=None, payer_ip=None,
        description="d", metadata=json.dumps({"k": "v"}), return_url=None, fee_ppm=6000, fee_on_refund="returned",
        late_success="refund", created_at=NOW, expires_at=NOW + timedelta(minutes=15),
    )  # fmt: skip


def funded(record: Wallet, amount: int) -> Change:
    """A wallet with money in it."""
    key = chart.wallet(record.home, record.id, record.currency)
    return Change(
        home=record.home, new=(record,), root=record.id, claims=(Claim("wallet", record.user, record.id),),
        opens=(AccountOpen(key, Limit.DEBITS_WITHIN_CREDITS),),
        transfers=(single(chart.Posting.TOPUP, chart.receivable(record.home, "CNY"), key, amount),),
    )  # fmt: skip


def paid(record: Payment, key: str | None = None, digest: bytes = b"d") -> Change:
    """A wallet payment: everything in one change."""
    payer = chart.wallet(record.home, record.wallet or Id(""), "CNY")
    return Change(
        home=record.home,
        once=OnceKey("api", key, digest) if key is not None else None,
        claims=(Claim("order", record.order_id, record.id),),
        new=(record,),
        root=record.id,
        transfers=(single(chart.Posting.PAYMENT, payer, chart.payable(record.home, "CNY"), record.amount),),
        events=(Event("payment.succeeded", b"{}"),),
        reply=Reply(201, record.id),
        result=record.id,
    )


def refunded(of: Payment, amount: int) -> Change:
    """Part of a payment back, bounded under the payment's lock."""

    def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
        current = aggregate.root
        if not isinstance(current, Payment):
            raise TypeError(type(current))
        if current.amount_refunded + amount > current.amount:
            return RefundExceedsPaid(paid=current.amount, refunded=current.amount_refunded, asked=amount)
        refund = Refund(
            home=of.home, id=new_id(), version=0, root=of.id, state="succeeded", attempt=None, refund_id=new_id(),
            amount=amount, currency="CNY", fee_returned=0, reason=None, cause="asked", metadata="{}", created_at=now, request=None,
        )  # fmt: skip
        after = msgspec.structs.replace(current, amount_refunded=current.amount_refunded + amount)
        back = chart.wallet(of.home, of.wallet or Id(""), "CNY")
        return Change(
            home=of.home, new=(refund,), moves=(Move(current, after, "refunded"),),
            transfers=(single(chart.Posting.REFUND, chart.payable(of.home, "CNY"), back, amount),),
            events=(Event("refund.succeeded", b"{}"),), result=after.amount_refunded,
        )  # fmt: skip

    return Change(home=of.home, rule=Rule(PAYMENT, of.id, decide))


def committed(verdict: Verdict) -> Committed:
    """The verdict, which must be Committed."""
    if not isinstance(verdict, Committed):
        raise AssertionError(f"not committed: {verdict}")
    return verdict
