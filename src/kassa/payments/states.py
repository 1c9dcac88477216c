"""The legal moves of payments, attempts and refunds: one table each, and one function. Pure.

A state is left only by an event that the table knows; everything else raises IllegalTransition. What is final stays
final, but for named events: a late success, a reversal, a person's decision about held money.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from kassa.errors import IllegalTransition


class PaymentState(StrEnum):
    """Where an order (or top-up) stands. "Partially refunded" is derived from its refunds, never stored."""

    CREATED = "created"
    """Never leaves the first commit."""
    PROCESSING = "processing"
    """Waits for one of its attempts, or for another attempt, until it expires."""
    SUCCEEDED = "succeeded"
    CLOSING = "closing"
    """Is to be closed; waits until every attempt is closed at its channel."""
    CLOSED = "closed"
    LATE_SUCCEEDED = "late_succeeded"
    """The money came after the close and lies in suspense; the merchant's policy is due."""
    LATE_REFUNDING = "late_refunding"
    LATE_REFUNDED = "late_refunded"
    HELD = "held"
    """Late money that a person must decide about."""


class PaymentEvent(StrEnum):
    """What can happen to a payment."""

    SEND = "send"
    PAY = "pay"
    ATTEMPT_FAILED = "attempt_failed"
    CLOSE = "close"
    """Somebody asked, or it expired, while attempts are open."""
    CLOSE_DONE = "close_done"
    """No attempt is open any more."""
    LATE_PAY = "late_pay"
    ACCEPT = "accept"
    REFUND = "refund"
    HOLD = "hold"
    LATE_REFUND_DONE = "late_refund_done"
    LATE_REFUND_FAILED = "late_refund_failed"
    LATE_REFUND_REVERSED = "late_refund_reversed"
    REFUND_RESERVED = "refund_reserved"
    REFUND_DONE = "refund_done"
    REFUND_RELEASED = "refund_released"
    REFUND_REVERSED = "refund_reversed"


class AttemptState(StrEnum):
    """Where one request to one channel stands. Doubt belongs here, not to the payment."""

    NEW = "new"
    """It is proven that the channel has not got it."""
    SENDING = "sending"
    """Stored before the first byte left; if the process dies now, the channel is queried, never blindly sent again."""
    PENDING_PAYER = "pending_payer"
    UNKNOWN = "unknown"
    """Perhaps it happened."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CLOSED = "closed"
    DUPLICATE_PAID = "duplicate_paid"
    """Paid, but another attempt had paid the order already."""


class AttemptEvent(StrEnum):
    """What can happen to an attempt."""

    SEND = "send"
    ACCEPTED = "accepted"
    PAID = "paid"
    PAID_AGAIN = "paid_again"
    """Paid when the order had its money already."""
    FAILED = "failed"
    CLOSED = "closed"
    LOST = "lost"
    """The answer was lost, or says nothing."""
    NOT_SENT = "not_sent"
    ASKED = "asked"
    """The channel was asked; nothing new."""


class RefundState(StrEnum):
    """Where a refund stands."""

    RESERVED = "reserved"
    SENDING = "sending"
    PROCESSING = "processing"
    UNKNOWN = "unknown"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ABNORMAL = "abnormal"
    """The channel cannot credit the payer: a person must act; the reservation stays."""
    REVERSED = "reversed"
    """It had succeeded; then the channel sent the money back."""
    CANCELLED = "cancelled"


class RefundEvent(StrEnum):
    """What can happen to a refund."""

    SEND = "send"
    ACCEPTED = "accepted"
    DONE = "done"
    FAILED = "failed"
    ABNORMAL = "abnormal"
    LOST = "lost"
    NOT_SENT = "not_sent"
    ASKED = "asked"
    REVERSED = "reversed"
    CANCEL = "cancel"
    RESOLVED = "resolved"
    """A person decided about the money that could not be given back."""


_P, _PE = PaymentState, PaymentEvent
_A, _AE = AttemptState, AttemptEvent
_R, _RE = RefundState, RefundEvent

PAYMENT_EDGES: dict[tuple[PaymentState, PaymentEvent], PaymentState] = {
    (_P.CREATED, _PE.SEND): _P.PROCESSING,
    (_P.CREATED, _PE.PAY): _P.SUCCEEDED,
    (_P.PROCESSING, _PE.PAY): _P.SUCCEEDED,
    (_P.PROCESSING, _PE.ATTEMPT_FAILED): _P.PROCESSING,
    (_P.PROCESSING, _PE.CLOSE): _P.CLOSING,
    (_P.PROCESSING, _PE.CLOSE_DONE): _P.CLOSED,
    (_P.CLOSING, _PE.PAY): _P.SUCCEEDED,
    (_P.CLOSING, _PE.ATTEMPT_FAILED): _P.CLOSING,
    (_P.CLOSING, _PE.CLOSE_DONE): _P.CLOSED,
    (_P.CLOSED, _PE.LATE_PAY): _P.LATE_SUCCEEDED,
    (_P.LATE_SUCCEEDED, _PE.ACCEPT): _P.SUCCEEDED,
    (_P.LATE_SUCCEEDED, _PE.REFUND): _P.LATE_REFUNDING,
    (_P.LATE_SUCCEEDED, _PE.HOLD): _P.HELD,
    (_P.LATE_REFUNDING, _PE.LATE_REFUND_DONE): _P.LATE_REFUNDED,
    (_P.LATE_REFUNDING, _PE.LATE_REFUND_FAILED): _P.HELD,
    (_P.LATE_REFUNDED, _PE.LATE_REFUND_REVERSED): _P.HELD,
    (_P.HELD, _PE.ACCEPT): _P.SUCCEEDED,
    (_P.HELD, _PE.REFUND): _P.LATE_REFUNDING,
    (_P.SUCCEEDED, _PE.REFUND_RESERVED): _P.SUCCEEDED,
    (_P.SUCCEEDED, _PE.REFUND_DONE): _P.SUCCEEDED,
    (_P.SUCCEEDED, _PE.REFUND_RELEASED): _P.SUCCEEDED,
    (_P.SUCCEEDED, _PE.REFUND_REVERSED): _P.SUCCEEDED,
}

ATTEMPT_EDGES: dict[tuple[AttemptState, AttemptEvent], AttemptState] = {
    (_A.NEW, _AE.SEND): _A.SENDING,
    (_A.NEW, _AE.CLOSED): _A.CLOSED,
    (_A.NEW, _AE.PAID): _A.SUCCEEDED,
    (_A.NEW, _AE.PAID_AGAIN): _A.DUPLICATE_PAID,
    (_A.SENDING, _AE.SEND): _A.SENDING,
    (_A.SENDING, _AE.ACCEPTED): _A.PENDING_PAYER,
    (_A.SENDING, _AE.PAID): _A.SUCCEEDED,
    (_A.SENDING, _AE.PAID_AGAIN): _A.DUPLICATE_PAID,
    (_A.SENDING, _AE.FAILED): _A.FAILED,
    (_A.SENDING, _AE.CLOSED): _A.CLOSED,
    (_A.SENDING, _AE.LOST): _A.UNKNOWN,
    (_A.SENDING, _AE.NOT_SENT): _A.NEW,
    (_A.PENDING_PAYER, _AE.ACCEPTED): _A.PENDING_PAYER,
    (_A.PENDING_PAYER, _AE.PAID): _A.SUCCEEDED,
    (_A.PENDING_PAYER, _AE.PAID_AGAIN): _A.DUPLICATE_PAID,
    (_A.PENDING_PAYER, _AE.FAILED): _A.FAILED,
    (_A.PENDING_PAYER, _AE.CLOSED): _A.CLOSED,
    (_A.PENDING_PAYER, _AE.ASKED): _A.PENDING_PAYER,
    (_A.UNKNOWN, _AE.SEND): _A.SENDING,
    (_A.UNKNOWN, _AE.ACCEPTED): _A.PENDING_PAYER,
    (_A.UNKNOWN, _AE.PAID): _A.SUCCEEDED,
    (_A.UNKNOWN, _AE.PAID_AGAIN): _A.DUPLICATE_PAID,
    (_A.UNKNOWN, _AE.FAILED): _A.FAILED,
    (_A.UNKNOWN, _AE.CLOSED): _A.CLOSED,
    (_A.UNKNOWN, _AE.ASKED): _A.UNKNOWN,
    # Late: the channel took the payer's money after it had said no.
    (_A.FAILED, _AE.PAID): _A.SUCCEEDED,
    (_A.FAILED, _AE.PAID_AGAIN): _A.DUPLICATE_PAID,
    (_A.CLOSED, _AE.PAID): _A.SUCCEEDED,
    (_A.CLOSED, _AE.PAID_AGAIN): _A.DUPLICATE_PAID,
}

REFUND_EDGES: dict[tuple[RefundState, RefundEvent], RefundState] = {
    (_R.RESERVED, _RE.SEND): _R.SENDING,
    (_R.RESERVED, _RE.CANCEL): _R.CANCELLED,
    (_R.RESERVED, _RE.ACCEPTED): _R.PROCESSING,
    (_R.RESERVED, _RE.DONE): _R.SUCCEEDED,
    (_R.RESERVED, _RE.ABNORMAL): _R.ABNORMAL,
    (_R.SENDING, _RE.SEND): _R.SENDING,
    (_R.SENDING, _RE.ACCEPTED): _R.PROCESSING,
    (_R.SENDING, _RE.DONE): _R.SUCCEEDED,
    (_R.SENDING, _RE.FAILED): _R.FAILED,
    (_R.SENDING, _RE.ABNORMAL): _R.ABNORMAL,
    (_R.SENDING, _RE.LOST): _R.UNKNOWN,
    (_R.SENDING, _RE.NOT_SENT): _R.RESERVED,
    (_R.UNKNOWN, _RE.SEND): _R.SENDING,
    (_R.UNKNOWN, _RE.ACCEPTED): _R.PROCESSING,
    (_R.UNKNOWN, _RE.DONE): _R.SUCCEEDED,
    (_R.UNKNOWN, _RE.FAILED): _R.FAILED,
    (_R.UNKNOWN, _RE.ABNORMAL): _R.ABNORMAL,
    (_R.UNKNOWN, _RE.ASKED): _R.UNKNOWN,
    (_R.PROCESSING, _RE.DONE): _R.SUCCEEDED,
    (_R.PROCESSING, _RE.FAILED): _R.FAILED,
    (_R.PROCESSING, _RE.ABNORMAL): _R.ABNORMAL,
    (_R.PROCESSING, _RE.ASKED): _R.PROCESSING,
    (_R.ABNORMAL, _RE.DONE): _R.SUCCEEDED,
    (_R.ABNORMAL, _RE.FAILED): _R.FAILED,
    (_R.ABNORMAL, _RE.ASKED): _R.ABNORMAL,
    (_R.SUCCEEDED, _RE.REVERSED): _R.REVERSED,
    (_R.FAILED, _RE.RESOLVED): _R.FAILED,
    (_R.REVERSED, _RE.RESOLVED): _R.REVERSED,
}

PAYMENT_OPEN = frozenset({_P.PROCESSING, _P.CLOSING, _P.LATE_SUCCEEDED})
"""A payment that goes on by itself; it always has a timer."""

ATTEMPT_OPEN = frozenset({_A.NEW, _A.SENDING, _A.PENDING_PAYER, _A.UNKNOWN})
"""An attempt that may still be paid; it always has a timer."""

ATTEMPT_IN_DOUBT = frozenset({_A.SENDING, _A.UNKNOWN})
"""As long as one is here, no other way to pay is offered."""

ATTEMPT_PAID = frozenset({_A.SUCCEEDED, _A.DUPLICATE_PAID})

REFUND_OPEN = frozenset({_R.RESERVED, _R.SENDING, _R.PROCESSING, _R.UNKNOWN, _R.ABNORMAL})
"""A refund whose money is reserved; it always has a timer."""

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


def after(edges: Mapping[tuple[State, Event], State], state: State, event: Event) -> State:
    """The state that follows. Raises IllegalTransition when the table has no such move."""
    following = edges.get((state, event))
    if following is None:
        raise IllegalTransition(state=state.value, event=event.value)
    return following


def payment_after(state: str, event: PaymentEvent) -> str:
    """The next state of a payment. Raises IllegalTransition."""
    return after(PAYMENT_EDGES, PaymentState(state), event).value


def attempt_after(state: str, event: AttemptEvent) -> str:
    """The next state of an attempt. Raises IllegalTransition."""
    return after(ATTEMPT_EDGES, AttemptState(state), event).value


def refund_after(state: str, event: RefundEvent) -> str:
    """The next state of a refund. Raises IllegalTransition."""
    return after(REFUND_EDGES, RefundState(state), event).value
