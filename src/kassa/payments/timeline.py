"""The whole story of one payment, in order: what came into being, what was said to and by channels, moves, postings,
events, and what of it reached the merchant. For people; it holds no secret and no personal data."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from kassa.db.queries import load
from kassa.ids import Id, event_name
from kassa.ledger.chart import NAMES, Code, Posting
from kassa.ledger.model import Kind
from kassa.money.amount import format_amount
from kassa.payments.records import ATTEMPT, PAYMENT, REFUND

_SQL = load("kassa.payments")

_PREFIXES = {"payment": "pay_", "topup": "top_", "attempt": "att_", "refund": "rfd_"}
_NOUNS = {PAYMENT.number: "payment", ATTEMPT.number: "attempt", REFUND.number: "refund"}
_CALL, _BIRTH, _MOVE, _POSTING, _EVENT, _DELIVERY = range(6)
"""The order of what happened in one change: the words that led to it, then what came of them."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the story. Fields that a kind does not have are left out."""

    at: datetime
    kind: str
    """created, request, callback, decision, move, posting, event, delivery or due."""
    subject: str
    """The public id of what it is about."""
    text: str
    """The line for people."""
    event: str | None = None
    from_state: str | None = None
    to_state: str | None = None
    status: int | None = None
    outcome: str | None = None
    debit: str | None = None
    credit: str | None = None
    amount: int | None = None
    currency: str | None = None
    duration_ms: int | None = None


class Delivery(msgspec.Struct, frozen=True):
    """One webhook delivery of one of the payment's events, as notifications tell it."""

    at: datetime
    event: str
    event_type: str
    endpoint: str
    state: str
    tries: int
    status: int | None
    error: str | None


Deliveries = Callable[[int, Id], Awaitable[Sequence[Delivery]]]
"""(home, root) to the deliveries of that root's events; injected, since they are another noun's rows."""

Row = Mapping[str, Any]


class Timeline:
    """Reads stories from PostgreSQL."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", deliveries: Deliveries | None = None) -> None:
        self._pool = pool
        self._deliveries = deliveries

    async def of(self, home: int, payment_id: Id) -> list[Entry] | None:
        """The story of a payment or top-up; None when the merchant has no such thing."""
        births = await self._pool.fetch(_SQL.births, home, payment_id)
        if not births:
            return None
        moves = await self._pool.fetch(_SQL.moves, home, payment_id)
        events = await self._pool.fetch(_SQL.events, home, payment_id)
        changes = sorted({row["seq"] for row in (*births, *moves, *events)})
        return assemble(
            births,
            moves,
            events,
            await self._pool.fetch(_SQL.exchanges, home, payment_id),
            await self._pool.fetch(_SQL.postings, payment_id, changes),
            await self._pool.fetch(_SQL.due, [row["id"] for row in births]),
            await self._deliveries(home, payment_id) if self._deliveries is not None else (),
        )


def assemble(
    births: Iterable[Row],
    moves: Iterable[Row],
    events: Iterable[Row],
    exchanges: Iterable[Row],
    postings: Iterable[Row],
    due: Iterable[Row],
    deliveries: Iterable[Delivery],
) -> list[Entry]:
    """All lines, in order of time; what one change did stands together, and what is still due comes last. Pure."""
    births = list(births)
    names = {row["id"]: _PREFIXES[row["noun"]] + row["id"].hex for row in births}
    root = next(names[row["id"]] for row in births if row["noun"] in ("payment", "topup"))
    placed: list[tuple[tuple[Any, ...], Entry]] = []

    def place(row: Row, rank: int, entry: Entry) -> None:
        placed.append(((entry.at, row["writer"], row["seq"], rank, row["ord"]), entry))

    # A birth's own time is when it was asked for; its place is with the change that made it durable.
    for row in births:
        place(row, _BIRTH, _created(row, names))
    for row in exchanges:
        place(row, _CALL, _said(row, names, root))
    for row in moves:
        place(row, _MOVE, _moved(row, names))
    for row in postings:
        place(row, _POSTING, _posted(row, root))
    for row in events:
        name = event_name(row["writer"], row["seq"], row["ord"])
        text = f"{row['type']} #{row['sequence']} ({name})"
        place(row, _EVENT, Entry(at=row["at"], kind="event", subject=root, text=text, event=row["type"]))
    for number, delivery in enumerate(deliveries):
        placed.append(((delivery.at, 0, 0, _DELIVERY, number), _delivered(delivery)))
    placed.sort(key=lambda pair: pair[0])
    return [entry for _, entry in placed] + [_due(row, names) for row in due]


def _created(row: Row, names: Mapping[Any, str]) -> Entry:
    amount = f" of {format_amount(row['amount'], row['currency'])}" if row["amount"] is not None else ""
    return Entry(
        at=row["at"],
        kind="created",
        subject=names[row["id"]],
        text=f"{row['noun']}{amount} ({row['note']})",
        amount=row["amount"],
        currency=row["currency"],
    )


def _said(row: Row, names: Mapping[Any, str], root: str) -> Entry:
    subject = names.get(row["subject"], root)
    if row["operation"] == "resolve":
        text = f"decided: {row['outcome']}, because: {row['text']}"
        return Entry(at=row["at"], kind="decision", subject=subject, text=text, outcome=row["outcome"])
    called = row["state"] != "sent"
    words = " ".join(str(part) for part in (row["method"], row["path"], row["status"], row["code"]) if part is not None)
    quarantined = " QUARANTINED" if row["state"] == "quarantined" else ""
    said = f": {row['text']}" if row["text"] else ""
    return Entry(
        at=row["at"],
        kind="callback" if called and row["operation"] == "callback" else "request",
        subject=subject,
        text=f"{row['operation']} {words} → {row['outcome']}{quarantined}{said}".replace("  ", " "),
        status=row["status"],
        outcome=row["outcome"],
        duration_ms=row["duration_ms"],
    )


def _moved(row: Row, names: Mapping[Any, str]) -> Entry:
    noun = _NOUNS.get(row["table_number"], "row")
    return Entry(
        at=row["at"],
        kind="move",
        subject=names.get(row["id"], noun),
        text=f"{noun} {row['from_state']} → {row['to_state']} ({row['event']})",
        event=row["event"],
        from_state=row["from_state"],
        to_state=row["to_state"],
    )


def _posted(row: Row, root: str) -> Entry:
    kind, amount = Kind(row["kind"]), row["amount"] or row["hold_amount"]
    debit, credit = NAMES[Code(row["debit"])], NAMES[Code(row["credit"])]
    verb = {Kind.SINGLE: "", Kind.HOLD: "hold ", Kind.SETTLE: "settle ", Kind.RELEASE: "release "}[kind]
    return Entry(
        at=row["at"],
        kind="posting",
        subject=root,
        text=f"{verb}{Posting(row['code']).name.lower()}: {debit} → {credit} {format_amount(amount, row['currency'])}",
        event=kind.name.lower(),
        debit=debit,
        credit=credit,
        amount=amount,
        currency=row["currency"],
    )


def _delivered(delivery: Delivery) -> Entry:
    said = delivery.status if delivery.status is not None else delivery.error or "not yet"
    tries = f"{delivery.tries} {'try' if delivery.tries == 1 else 'tries'}"
    return Entry(
        at=delivery.at,
        kind="delivery",
        subject=delivery.event,
        text=f"webhook {delivery.event_type} to {delivery.endpoint}: {delivery.state}, {tries}, {said}",
        event=delivery.event_type,
        status=delivery.status,
        outcome=delivery.state,
    )


def _due(row: Row, names: Mapping[Any, str]) -> Entry:
    failed = f", failed {row['tries']}×: {row['last_error']}" if row["tries"] and row["last_error"] else ""
    subject = names[row["entity"]]
    return Entry(at=row["due"], kind="due", subject=subject, text=f"timer {row['kind']}{failed}", event=row["kind"])
