"""The objects of Kassa's API, typed. Fields that a newer server adds are ignored, so that old programs go on working.

Amounts are whole minor units of `currency`; times carry their zone.
"""

from datetime import datetime
from typing import Any, Generic, TypeVar

import msgspec


class Object(msgspec.Struct, frozen=True, kw_only=True):
    """What all objects have in common: they cannot be changed, and a repeat is asked for by id."""


class Failure(Object, frozen=True, kw_only=True):
    """Why something did not work, for people; `code` is the channel's or Kassa's."""

    code: str
    reason: str | None = None


class NextAction(Object, frozen=True, kw_only=True):
    """What the payer needs to go on. Which fields are there depends on `type`."""

    type: str
    """qr_code, redirect, jsapi or app."""
    code_url: str | None = None
    """Of a qr_code: what to draw."""
    url: str | None = None
    """Of a redirect: where to send the payer."""
    params: dict[str, Any] | None = None
    """Of jsapi and app: what to hand to the provider's own library."""


class Attempt(Object, frozen=True, kw_only=True):
    """One request to one channel. States: new, sending, pending_payer, unknown, succeeded, failed, closed,
    duplicate_paid."""

    id: str
    state: str
    channel: str
    method: str
    number: str
    """Its name at the channel."""
    channel_id: str | None = None
    """The channel's own name for it."""
    failure: Failure | None = None


class Payment(Object, frozen=True, kw_only=True):
    """A payment. States: processing, succeeded, closing, closed, late_succeeded, late_refunding, late_refunded, held."""

    id: str
    object: str = "payment"
    order_id: str
    amount: int
    currency: str
    state: str
    channel: str
    method: str
    next_action: NextAction | None = None
    amount_refunded: int = 0
    amount_refunding: int = 0
    fee: int = 0
    attempts: tuple[Attempt, ...] = ()
    description: str = ""
    metadata: dict[str, Any] = {}
    created_at: datetime
    expires_at: datetime
    succeeded_at: datetime | None = None
    closed_at: datetime | None = None
    failure: Failure | None = None


class Topup(Payment, frozen=True, kw_only=True):
    """A top-up: a payment whose success credits a wallet."""

    object: str = "topup"
    wallet: str


class Refund(Object, frozen=True, kw_only=True):
    """Money given back. States: reserved, sending, processing, unknown, succeeded, failed, abnormal, reversed,
    cancelled."""

    id: str
    object: str = "refund"
    payment: str
    refund_id: str
    amount: int
    currency: str
    state: str
    reason: str | None = None
    number: str
    channel_id: str | None = None
    fee_returned: int = 0
    failure: Failure | None = None
    metadata: dict[str, Any] = {}
    created_at: datetime
    succeeded_at: datetime | None = None


class Wallet(Object, frozen=True, kw_only=True):
    """A user's wallet with the merchant."""

    id: str
    object: str = "wallet"
    user: str
    currency: str
    balance: int
    available: int
    created_at: datetime


class Line(Object, frozen=True, kw_only=True):
    """One line of a statement. Versions count without gaps; each balance is the one before plus the amount."""

    id: str
    at: datetime
    kind: str
    amount: int
    balance: int
    version: int
    held: int = 0
    resource: str | None = None


class Balance(Object, frozen=True, kw_only=True):
    """The merchant's money in one currency."""

    object: str = "balance"
    currency: str
    balance: int
    available: int
    held: int = 0
    fees: int = 0
    receivable: int = 0
    suspense: int = 0


class Event(Object, frozen=True, kw_only=True):
    """A fact, for ever. `sequence` counts the events of one root without gaps."""

    id: str
    type: str
    root: str
    sequence: int
    timestamp: datetime
    data: dict[str, Any]
    """The object as it was then."""

    @property
    def object(self) -> "Payment | Topup | Refund | dict[str, Any]":
        """`data` as the object that it is; as it came when this version of the client does not know its kind."""
        kind = _KINDS.get(self.data.get("object", ""))
        return self.data if kind is None else msgspec.convert(self.data, kind)


_KINDS: dict[str, type[Payment] | type[Refund]] = {"payment": Payment, "topup": Topup, "refund": Refund}


class WebhookEndpoint(Object, frozen=True, kw_only=True):
    """Where the merchant wants to be told. States: enabled, disabled, paused (dead for too long)."""

    id: str
    object: str = "webhook_endpoint"
    url: str
    events: tuple[str, ...]
    description: str = ""
    state: str
    created_at: datetime
    failing_since: datetime | None = None
    paused_reason: str | None = None
    secret: str | None = None
    """Shown when the endpoint is made and when the secret is rotated, and never again."""


class Delivery(Object, frozen=True, kw_only=True):
    """One event for one endpoint, and what came of it. States: due, delivered, exhausted, dropped."""

    id: str
    object: str = "webhook_delivery"
    endpoint: str
    event: str
    type: str
    """Of the event."""
    state: str
    replay: int = 0
    """0 for the first delivery of the event to the endpoint."""
    tries: int = 0
    created_at: datetime
    next_at: datetime | None = None
    last_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
    last_duration_ms: int | None = None


class Replay(Object, frozen=True, kw_only=True):
    """A time whose events are delivered again. States: running, done."""

    id: str
    object: str = "webhook_replay"
    endpoint: str
    state: str
    created_from: datetime
    created_to: datetime
    created_at: datetime
    deliveries: int = 0


class Entry(Object, frozen=True, kw_only=True):
    """One thing that happened to a payment. Fields that a kind does not have are None."""

    at: datetime
    kind: str
    """created, request, callback, decision, move, posting, event, delivery or due."""
    subject: str = ""
    """The id of what it is about."""
    text: str = ""
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


Item = TypeVar("Item")


class Page(Object, Generic[Item], frozen=True, kw_only=True):
    """A page of a list, newest first."""

    data: tuple[Item, ...]
    next_cursor: str | None = None
    """Give it back as `cursor` for the next page; None at the end."""
