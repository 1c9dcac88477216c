"""The sandbox's own books: what the provider believes happened. An independent truth to judge Kassa's ledger by.

SQLite in WAL mode: each operation is one transaction that is committed before it is answered, so what was answered
survives kill -9. (A power cut may lose the last moments; a sandbox does not pay for a disk flush per order.)
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FILE = "books.sqlite3"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS charge (
    out_trade_no TEXT PRIMARY KEY, state TEXT NOT NULL, trade_type TEXT NOT NULL, total INTEGER NOT NULL,
    request TEXT NOT NULL, prepay_id TEXT NOT NULL, code_url TEXT NOT NULL UNIQUE, code_until REAL NOT NULL,
    serial TEXT NOT NULL, created_at REAL NOT NULL, expires_at REAL NOT NULL, transaction_id TEXT UNIQUE,
    openid TEXT, paid_at REAL, declines INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refund (
    out_refund_no TEXT PRIMARY KEY, refund_id TEXT NOT NULL UNIQUE, out_trade_no TEXT NOT NULL, state TEXT NOT NULL,
    amount INTEGER NOT NULL, request TEXT NOT NULL, serial TEXT NOT NULL, created_at REAL NOT NULL, due_at REAL,
    succeeded_at REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS refund_by_charge ON refund (out_trade_no);
CREATE INDEX IF NOT EXISTS refund_due ON refund (due_at) WHERE due_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS notice (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, number TEXT NOT NULL, event_type TEXT NOT NULL, url TEXT NOT NULL,
    serial TEXT NOT NULL, plaintext TEXT NOT NULL, state TEXT NOT NULL, tries INTEGER NOT NULL, next_at REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS notice_due ON notice (next_at) WHERE next_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS delivery (notice TEXT NOT NULL, at REAL NOT NULL, what TEXT NOT NULL, status INTEGER);
CREATE INDEX IF NOT EXISTS delivery_by_notice ON delivery (notice);
CREATE TABLE IF NOT EXISTS setting (id INTEGER PRIMARY KEY CHECK (id = 1), value TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Charge:
    """One order. Times are seconds since 1970 by the sandbox's clock; amounts are fen."""

    out_trade_no: str
    state: str
    """NOTPAY, SUCCESS, REFUND (paid, and some refund was accepted) or CLOSED."""
    trade_type: str
    total: int
    request: str
    """The order as it was placed, canonical JSON: another one under this number is refused."""
    prepay_id: str
    code_url: str
    code_until: float
    serial: str
    """The kind of platform key that its callbacks are signed with: the `Wechatpay-Serial` that the merchant asked for."""
    created_at: float
    expires_at: float
    transaction_id: str | None = None
    openid: str | None = None
    paid_at: float | None = None
    declines: int = 0


@dataclass(frozen=True, slots=True)
class Refund:
    """One refund of a charge."""

    out_refund_no: str
    refund_id: str
    out_trade_no: str
    state: str
    """PROCESSING, SUCCESS, CLOSED, ABNORMAL, or REVERSED: succeeded, and the money came back (the wire says CLOSED)."""
    amount: int
    request: str
    serial: str
    created_at: float
    due_at: float | None = None
    """When a PROCESSING one succeeds by itself."""
    succeeded_at: float | None = None

    @property
    def takes_money(self) -> bool:
        return self.state not in ("CLOSED", "REVERSED")


@dataclass(frozen=True, slots=True)
class Notice:
    """One callback that the merchant shall get, until it says that it has it."""

    id: str
    kind: str
    """transaction or refund."""
    number: str
    event_type: str
    url: str
    serial: str
    plaintext: str
    state: str = "waiting"
    """waiting, taken, missing (a fault ate it) or given_up."""
    tries: int = 0
    next_at: float | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be turned on a running sandbox. Kept with the books."""

    clock_offset_s: float = 0.0
    """How far the sandbox's business clock is ahead. Signatures always carry the real time."""
    refund_gap_s: float = 60.0
    """Between two refunds of one order; the provider's minute."""
    refund_delay_ms: int = 500
    """From an accepted refund to its success."""
    callback_speed: float = 1.0
    """The retry schedule is so many times faster."""
    signtest_every: int = 10
    """Before every so-many-th callback goes a probe with a signature that must be refused; 0 sends none."""
    callback_key: str = "as_asked"
    """as_asked (by the order's Wechatpay-Serial), public_key or certificate."""
    has_funds: bool = True
    """Whether the merchant's account covers refunds; else NOT_ENOUGH."""


class Books:
    """Everything that has to outlive the process. One connection, used by one thread."""

    def __init__(self, directory: Path) -> None:
        path = directory / FILE
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
        self._db.execute("PRAGMA journal_mode = wal")
        self._db.execute("PRAGMA synchronous = normal")
        self._db.executescript(_SCHEMA)
        kept = self._db.execute("SELECT value FROM setting").fetchone()
        self.settings = Settings(**json.loads(kept[0])) if kept else Settings()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is there after it, or none of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def now(self) -> float:
        """The business clock: expiry, gaps and schedules follow it."""
        return time.time() + self.settings.clock_offset_s

    def change_settings(self, **changes: Any) -> None:
        self.settings = replace(self.settings, **changes)
        self._db.execute("INSERT OR REPLACE INTO setting VALUES (1, ?)", (json.dumps(asdict(self.settings)),))

    # Charges

    def charge(self, out_trade_no: str) -> Charge | None:
        return self._one_charge("out_trade_no", out_trade_no)

    def charge_by_transaction(self, transaction_id: str) -> Charge | None:
        return self._one_charge("transaction_id", transaction_id)

    def charge_by_code(self, code_url: str) -> Charge | None:
        return self._one_charge("code_url", code_url)

    def put_charge(self, charge: Charge) -> None:
        self._put("charge", charge)

    def _one_charge(self, column: str, value: str) -> Charge | None:
        row = self._db.execute(f"SELECT * FROM charge WHERE {column} = ?", (value,)).fetchone()
        return Charge(*row) if row else None

    # Refunds

    def refund(self, out_refund_no: str) -> Refund | None:
        row = self._db.execute("SELECT * FROM refund WHERE out_refund_no = ?", (out_refund_no,)).fetchone()
        return Refund(*row) if row else None

    def refund_by_id(self, refund_id: str) -> Refund | None:
        row = self._db.execute("SELECT * FROM refund WHERE refund_id = ?", (refund_id,)).fetchone()
        return Refund(*row) if row else None

    def refunds_of(self, out_trade_no: str) -> list[Refund]:
        rows = self._db.execute("SELECT * FROM refund WHERE out_trade_no = ? ORDER BY created_at", (out_trade_no,))
        return [Refund(*row) for row in rows]

    def due_refunds(self, limit: int) -> list[Refund]:
        """Those that succeed by now."""
        rows = self._db.execute("SELECT * FROM refund WHERE due_at <= ? ORDER BY due_at LIMIT ?", (self.now(), limit))
        return [Refund(*row) for row in rows]

    def put_refund(self, refund: Refund) -> None:
        self._put("refund", refund)

    # Notices

    def notice(self, notice_id: str) -> Notice | None:
        row = self._db.execute("SELECT * FROM notice WHERE id = ?", (notice_id,)).fetchone()
        return Notice(*row) if row else None

    def due_notices(self, limit: int) -> list[Notice]:
        """Those that have to be tried by now, the oldest first."""
        rows = self._db.execute("SELECT * FROM notice WHERE next_at <= ? ORDER BY next_at LIMIT ?", (self.now(), limit))
        return [Notice(*row) for row in rows]

    def put_notice(self, notice: Notice) -> None:
        self._put("notice", notice)

    def record_delivery(self, notice_id: str, what: str, status: int | None) -> None:
        self._db.execute("INSERT INTO delivery VALUES (?, ?, ?, ?)", (notice_id, self.now(), what, status))

    def next_due_s(self) -> float | None:
        """Seconds until a refund or a notice falls due; 0 when one has; None when nothing waits."""
        refund = self._db.execute("SELECT min(due_at) FROM refund WHERE due_at IS NOT NULL").fetchone()[0]
        notice = self._db.execute("SELECT min(next_at) FROM notice WHERE next_at IS NOT NULL").fetchone()[0]
        times = [at for at in (refund, notice) if at is not None]
        return max(0.0, min(times) - self.now()) if times else None

    # All of it

    def shown(self, out_trade_no: str | None = None) -> dict[str, Any]:
        """Charges with what was refunded of each, refunds, callbacks with every try; of one order, or of all."""
        where, values = (" WHERE out_trade_no = ?", (out_trade_no,)) if out_trade_no else ("", ())
        charges = [Charge(*row) for row in self._db.execute(f"SELECT * FROM charge{where} ORDER BY created_at", values)]
        refunds = [Refund(*row) for row in self._db.execute(f"SELECT * FROM refund{where} ORDER BY created_at", values)]
        refunded: dict[str, int] = {}
        for refund in refunds:
            if refund.state == "SUCCESS":
                refunded[refund.out_trade_no] = refunded.get(refund.out_trade_no, 0) + refund.amount
        numbers = [*(charge.out_trade_no for charge in charges), *(refund.out_refund_no for refund in refunds)]
        return {
            "charges": [_shown_charge(charge, refunded.get(charge.out_trade_no, 0)) for charge in charges],
            "refunds": [_shown_refund(refund) for refund in refunds],
            "callbacks": list(self._shown_notices(numbers if out_trade_no else None)),
        }

    def totals(self) -> dict[str, Any]:
        """Counts and sums by state, for when there are a million orders."""
        charges = self._db.execute("SELECT state, count(*), sum(total) FROM charge GROUP BY state")
        shown_charges = {state: {"count": count, "amount": amount} for state, count, amount in charges}
        refunds = self._db.execute("SELECT state, count(*), sum(amount) FROM refund GROUP BY state")
        shown_refunds = {state: {"count": count, "amount": amount} for state, count, amount in refunds}
        callbacks = dict(self._db.execute("SELECT state, count(*) FROM notice GROUP BY state").fetchall())
        return {"charges": shown_charges, "refunds": shown_refunds, "callbacks": callbacks}

    def _shown_notices(self, numbers: list[str] | None) -> Iterator[dict[str, Any]]:
        """Callbacks about these numbers, or all, each with every try."""
        where = "" if numbers is None else f" WHERE number IN ({', '.join('?' * len(numbers))})"
        for row in self._db.execute(f"SELECT * FROM notice{where} ORDER BY id", numbers or ()).fetchall():
            notice = Notice(*row)
            tries = self._db.execute("SELECT at, what, status FROM delivery WHERE notice = ? ORDER BY at", (notice.id,))
            yield {
                "id": notice.id,
                "kind": notice.kind,
                "number": notice.number,
                "event_type": notice.event_type,
                "state": notice.state,
                "tries": notice.tries,
                "deliveries": [{"at": at, "what": what, "status": status} for at, what, status in tries],
            }

    def _put(self, table: str, row: Charge | Refund | Notice) -> None:
        values = [getattr(row, name) for name in row.__slots__]
        marks = ", ".join("?" * len(values))
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", values)


def _shown_charge(charge: Charge, refunded: int) -> dict[str, Any]:
    return {
        "out_trade_no": charge.out_trade_no,
        "transaction_id": charge.transaction_id,
        "amount": charge.total,
        "state": charge.state,
        "refunded": refunded,
        "trade_type": charge.trade_type,
        "code_url": charge.code_url,
        "openid": charge.openid,
        "declines": charge.declines,
        "created_at": charge.created_at,
        "expires_at": charge.expires_at,
        "paid_at": charge.paid_at,
    }


def _shown_refund(refund: Refund) -> dict[str, Any]:
    return {
        "out_refund_no": refund.out_refund_no,
        "refund_id": refund.refund_id,
        "out_trade_no": refund.out_trade_no,
        "amount": refund.amount,
        "state": refund.state,
        "created_at": refund.created_at,
        "succeeded_at": refund.succeeded_at,
    }
