"""Gathers what one decision about a payment changes, so that a rule reads as a list of what happens. Pure.

Each row moves once in a Change: what moves twice in a draft goes from where it stood to where it ends, and every step
is checked against the table of legal moves.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

import msgspec

from kassa.channels.model import Outcome
from kassa.ids import Id
from kassa.journal.change import Aggregate, Change, Event, Move, Timer
from kassa.journal.table import Record
from kassa.ledger.model import Transfer
from kassa.payments import render
from kassa.payments.records import Attempt, Exchange, Payment, Refund
from kassa.payments.states import (
    ATTEMPT_OPEN,
    AttemptEvent,
    PaymentEvent,
    RefundEvent,
    attempt_after,
    payment_after,
    refund_after,
)

Row = TypeVar("Row", Attempt, Refund)

ATTEMPT_TIMER = "attempt"
"""An attempt is to be driven: sent, asked after, or closed."""
REFUND_TIMER = "refund"
"""A refund is to be driven: sent or asked after."""
EXPIRE_TIMER = "payment_expire"
LATE_TIMER = "payment_late"
"""The merchant's policy for late money is due."""
TIMERS = (ATTEMPT_TIMER, REFUND_TIMER, EXPIRE_TIMER, LATE_TIMER)

RECOVER_AFTER = timedelta(seconds=30)
"""How long a request to a channel may be on its way before the timer looks after it; a conversation is a few requests
of 8 seconds at most."""

GRACE = timedelta(minutes=10)
"""How long after its end (or after doubt began) a request that was thought lost might still arrive at a channel."""

ATTEMPT_PAUSES_S = (5, 10, 30, 60, 300, 300, 600, 1800, 3600)
"""Between questions about a charge; the last one goes on for as long as it takes."""
REFUND_PAUSES_S = (5, 60, 600, 3600, 21_600, 86_400)
"""Between questions about a refund that the channel has accepted: it can take days."""


class Operation(StrEnum):
    """What was or is to be said to a channel, or by it."""

    CREATE = "create"
    QUERY = "query"
    CLOSE = "close"
    REFUND = "refund"
    REFUND_QUERY = "refund_query"
    CALLBACK = "callback"
    RESOLVE = "resolve"
    """A person's decision; kept with the exchanges, so that the story is whole."""


class News(NamedTuple):
    """What a conversation with a channel, or its callback, brought; `exchanges` are its rows."""

    operation: Operation
    outcome: Outcome
    exchanges: tuple[Exchange, ...] = ()
    seen: int | None = None
    """The version of the attempt or refund when we began to ask; None when we did not ask."""


class Act(NamedTuple):
    """What is to be said to the channel now. What it needs is stored already."""

    operation: Operation
    channel: str
    payment: Payment
    subject: Attempt | Refund


class Decided(NamedTuple):
    """What a decision hands back: the rows as they stand after it, and what to do next."""

    payment: Payment
    attempts: tuple[Attempt, ...]
    refund: Refund | None = None
    act: Act | None = None
    accepted: bool = True
    """False: a channel's message did not fit and changed nothing."""
    late: bool = False
    """The policy for late money can be applied at once."""


def pause(pauses_s: tuple[int, ...], tries: int, jitter: float) -> timedelta:
    """The time until the next try: growing, capped, and spread by ±20 % so that many do not come at once.

    jitter: 0 <= jitter < 1, random.
    """
    return timedelta(seconds=pauses_s[min(tries, len(pauses_s) - 1)] * (0.8 + 0.4 * jitter))


class Draft:
    """One decision in the making, on a payment and those of its children that were read."""

    def __init__(self, aggregate: Aggregate, now: datetime, jitter: float = 0.5) -> None:
        root = aggregate.root
        if not isinstance(root, Payment):
            raise TypeError(f"{type(root).__name__} is not a payment")
        self.payment = root
        self.now = now
        self.jitter = jitter
        self.attempts = {row.id: row for row in aggregate.children if isinstance(row, Attempt)}
        self.refunds = {row.id: row for row in aggregate.children if isinstance(row, Refund)}
        self._moves: dict[Id, tuple[Record, str]] = {}
        self._new: list[Record] = []
        self._transfers: list[Transfer] = []
        self._events: list[tuple[str, Id | None]] = []
        self._timers: dict[tuple[Id, str], Timer] = {}

    # Rows

    def move_payment(self, event: PaymentEvent, **changes: Any) -> None:
        """The payment moves. Raises IllegalTransition."""
        self._moves[self.payment.id] = (self._before(self.payment), event.value)
        self.payment = msgspec.structs.replace(self.payment, state=payment_after(self.payment.state, event), **changes)

    def move_attempt(self, attempt: Attempt, event: AttemptEvent, **changes: Any) -> Attempt:
        """An attempt moves. Raises IllegalTransition."""
        self._moves[attempt.id] = (self._before(attempt), event.value)
        moved = msgspec.structs.replace(attempt, state=attempt_after(attempt.state, event), **changes)
        self.attempts[moved.id] = moved
        return moved

    def move_refund(self, refund: Refund, event: RefundEvent, **changes: Any) -> Refund:
        """A refund moves. Raises IllegalTransition."""
        self._moves[refund.id] = (self._before(refund), event.value)
        moved = msgspec.structs.replace(refund, state=refund_after(refund.state, event), **changes)
        self.refunds[moved.id] = moved
        return moved

    def add(self, row: Record) -> None:
        """A new row."""
        self._new.append(row)
        if isinstance(row, Attempt):
            self.attempts[row.id] = row
        elif isinstance(row, Refund):
            self.refunds[row.id] = row

    def keep(self, news: News, *, quarantined: str | None = None) -> None:
        """The exchanges become part of the payment's story; `quarantined` says what did not fit in the last one."""
        if quarantined is None:
            self._new += news.exchanges
            return
        self._new += news.exchanges[:-1]
        if news.exchanges:
            self._new.append(msgspec.structs.replace(news.exchanges[-1], state="quarantined", text=quarantined))

    def post(self, transfers: tuple[Transfer, ...]) -> None:
        """Money moves."""
        self._transfers += transfers

    # Facts and times

    def tell(self, what: str) -> None:
        """A fact about the payment: `succeeded` becomes payment.succeeded or topup.succeeded."""
        self._events.append((f"{self.payment.kind}.{what}", None))

    def tell_refund(self, what: str, refund: Refund) -> None:
        """A fact about a refund."""
        self._events.append((f"refund.{what}", refund.id))

    def due(self, row: Record, kind: str, at: datetime | None) -> None:
        """Something is due at a time; None: not any more."""
        self._timers[row.id, kind] = Timer(row.id, kind, at, self.payment.id)

    def due_attempt(self, attempt: Attempt) -> None:
        """The next look at an open attempt, by how often the channel was asked already."""
        self.due(attempt, ATTEMPT_TIMER, self.now + pause(ATTEMPT_PAUSES_S, attempt.tries, self.jitter))

    # The result

    @property
    def open_attempts(self) -> list[Attempt]:
        """Attempts that may still be paid."""
        return [attempt for attempt in self.attempts.values() if attempt.state in ATTEMPT_OPEN]

    @property
    def wanted(self) -> bool:
        """Whether the payment still wants money through an attempt."""
        return self.payment.state == "processing" and self.now < self.payment.expires_at

    def decided(
        self,
        *,
        refund: Refund | None = None,
        act: Operation | None = None,
        subject: Attempt | Refund | None = None,
        accepted: bool = True,
    ) -> Change:
        """The Change. Events carry the objects as they are after all of it."""
        next_act = None if act is None or subject is None else self._act(act, self._current(subject))
        return Change(
            home=self.payment.home,
            root=self.payment.id,
            new=tuple(self._new_rows()),
            moves=tuple(Move(before, self._current(before), event) for before, event in self._moves.values()),
            transfers=tuple(self._transfers),
            events=self._told(),
            timers=tuple(self._timers.values()),
            result=Decided(
                self.payment,
                tuple(self.attempts.values()),
                None if refund is None else self.refunds[refund.id],
                next_act,
                accepted,
                self.payment.state == "late_succeeded",
            ),
        )

    def _act(self, operation: Operation, subject: Attempt | Refund) -> Act:
        paid = subject if isinstance(subject, Attempt) else self.attempts[subject.attempt or Id("")]
        return Act(operation, paid.channel, self.payment, subject)

    def _before(self, row: Record) -> Record:
        moved = self._moves.get(row.id)
        return row if moved is None else moved[0]

    def _current(self, row: Record) -> Any:
        return self.attempts.get(row.id) or self.refunds.get(row.id) or self.payment

    def _new_rows(self) -> list[Record]:
        return [row if isinstance(row, Exchange) else self._current(row) for row in self._new]

    def _told(self) -> tuple[Event, ...]:
        if not self._events:
            return ()
        payment: bytes | None = None
        told: list[Event] = []
        for type_, refund in self._events:
            if refund is not None:
                told.append(Event(type_, render.refund_json(self.refunds[refund], self.payment)))
                continue
            if payment is None:
                payment = render.payment_json(self.payment, self.attempts.values())
            told.append(Event(type_, payment))
        return tuple(told)
