"""The rows of payments, attempts, refunds, wallets and exchanges with channels. Shapes only; `model.py` decides.

A payment is the root of its attempts, refunds and exchanges: its lock protects them, and its events are counted on it.
A top-up is a payment whose success credits a wallet; it lives in the same table, with order numbers of its own.
"""

from datetime import datetime

from kassa.ids import Id
from kassa.journal.table import Child, Root, Table


class Payment(Root, frozen=True, gc=False):
    """An order to be paid. States: processing, succeeded, closing, closed, late_succeeded, late_refunding,
    late_refunded, held."""

    kind: str
    """payment or topup."""
    order_id: str
    amount: int
    """Minor units of `currency`."""
    currency: str
    channel: str
    """The channel of the first attempt, or wallet."""
    method: str
    wallet: Id | None
    """The wallet that pays (channel wallet) or that is topped up."""
    openid: str | None
    payer_ip: str | None
    description: str
    metadata: str
    """JSON text, as the merchant gave it."""
    return_url: str | None
    fee_ppm: int
    """The merchant's fee when the payment was made, in parts per million of the amount."""
    fee_on_refund: str
    """returned or kept."""
    late_success: str
    """accept, refund or hold: what happens to money that comes after the close."""
    created_at: datetime
    expires_at: datetime
    # From here on: what moves.
    succeeded_at: datetime | None = None
    closed_at: datetime | None = None
    paid_attempt: Id | None = None
    """The attempt whose money this payment has; None for wallet payments."""
    failure_code: str | None = None
    failure_reason: str | None = None
    amount_refunded: int = 0
    amount_refunding: int = 0
    fee_refunded: int = 0
    """What of the fee went back with refunds that succeeded."""
    fee_refunding: int = 0
    refunds: int = 0
    """How many refunds were asked for; a channel may bound it."""
    refund_slot_at: datetime | None = None
    """The earliest time at which the channel takes the next refund of this payment (WeChat: a minute apart)."""


class Attempt(Child, frozen=True, gc=False):
    """One request to one channel; its id is its number there. States: new, sending, pending_payer, unknown, succeeded,
    failed, closed, duplicate_paid."""

    channel: str
    method: str
    openid: str | None
    payer_ip: str | None
    created_at: datetime
    request: str | None
    """JSON text of the command, sent again unchanged as long as the outcome is open."""
    # From here on: what moves.
    channel_id: str | None = None
    next_action: str | None = None
    """JSON text of what the payer needs."""
    failure_code: str | None = None
    failure_reason: str | None = None
    tries: int = 0
    """How often the channel was asked since the last move; the pace of polling."""
    doubt_since: datetime | None = None
    """Since when the outcome has been unknown; the stuck list is sorted by it."""
    done_at: datetime | None = None


class Refund(Child, frozen=True, gc=False):
    """Money given back; its id is its number at the channel. States: reserved, sending, processing, unknown, succeeded,
    failed, abnormal, reversed, cancelled."""

    attempt: Id | None
    """The attempt whose money goes back; None for wallet payments."""
    refund_id: str
    amount: int
    currency: str
    fee_returned: int
    """The part of `amount` that comes out of fee income."""
    reason: str | None
    cause: str
    """asked (by the merchant), late or duplicate (by Kassa itself; such refunds do not count in amount_refunded)."""
    metadata: str
    created_at: datetime
    request: str | None
    """JSON text of the command, sent again unchanged as long as the outcome is open. None for wallet payments."""
    # From here on: what moves.
    channel_id: str | None = None
    failure_code: str | None = None
    failure_reason: str | None = None
    tries: int = 0
    doubt_since: datetime | None = None
    succeeded_at: datetime | None = None
    sent_at: datetime | None = None
    """When the channel was asked last; None: it never was."""
    sent_before: datetime | None = None
    """When it was asked the time before that. What was sent then may still arrive, whatever the last answer says."""


class Wallet(Root, frozen=True, gc=False):
    """A user's wallet with a merchant; its money is a ledger account. State: open."""

    user: str
    currency: str
    created_at: datetime


class Exchange(Child, frozen=True, gc=False):
    """What was said to or by a channel, without secrets and personal data. Born final; for people. State: sent,
    received or quarantined."""

    subject: Id
    """The attempt or refund that it was about."""
    operation: str
    """create, query, close, refund, refund_query or callback."""
    method: str | None
    path: str | None
    status: int | None
    outcome: str
    """What we took it to mean: the name of an Outcome."""
    code: str | None
    text: str | None
    at: datetime
    duration_ms: int


PAYMENT = Table(
    10, "payment", Payment,
    mutable=(
        "succeeded_at", "closed_at", "paid_attempt", "failure_code", "failure_reason",
        "amount_refunded", "amount_refunding", "fee_refunded", "fee_refunding", "refunds", "refund_slot_at",
    ),
)  # fmt: skip
ATTEMPT = Table(
    11, "attempt", Attempt,
    mutable=("channel_id", "next_action", "failure_code", "failure_reason", "tries", "doubt_since", "done_at"),
    parent=PAYMENT,
)  # fmt: skip
REFUND = Table(
    12, "refund", Refund,
    mutable=(
        "channel_id", "failure_code", "failure_reason", "tries", "doubt_since", "succeeded_at", "sent_at", "sent_before",
    ),
    parent=PAYMENT,
)  # fmt: skip
WALLET = Table(13, "wallet", Wallet, mutable=())
EXCHANGE = Table(14, "exchange", Exchange, mutable=(), parent=PAYMENT)
