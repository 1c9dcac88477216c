"""The objects as outside programs see them, field by field in the order of the interface. Pure.

The same bytes answer a request and become the data of an event, so they are encoded once.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

import msgspec

from kassa.ids import Id
from kassa.payments.fees import fee_of
from kassa.payments.records import Attempt, Payment, Refund, Wallet

_NULL = msgspec.Raw(b"null")

_encode = msgspec.json.Encoder().encode


class FailureView(msgspec.Struct, frozen=True, gc=False):
    """Why something did not work, for people; `code` is the channel's or ours."""

    code: str
    reason: str | None


class AttemptView(msgspec.Struct, frozen=True, gc=False):
    """One request to one channel."""

    id: str
    state: str
    channel: str
    method: str
    number: str
    channel_id: str | None
    failure: FailureView | None


class PaymentView(msgspec.Struct, frozen=True, gc=False):
    """A payment."""

    id: str
    object: Literal["payment"]
    order_id: str
    amount: int
    currency: str
    state: str
    channel: str
    method: str
    next_action: msgspec.Raw
    amount_refunded: int
    amount_refunding: int
    fee: int
    attempts: list[AttemptView]
    description: str
    metadata: msgspec.Raw
    created_at: datetime
    expires_at: datetime
    succeeded_at: datetime | None
    closed_at: datetime | None
    failure: FailureView | None


class TopupView(msgspec.Struct, frozen=True, gc=False):
    """A top-up: a payment whose success credits a wallet."""

    id: str
    object: Literal["topup"]
    order_id: str
    wallet: str
    amount: int
    currency: str
    state: str
    channel: str
    method: str
    next_action: msgspec.Raw
    amount_refunded: int
    amount_refunding: int
    fee: int
    attempts: list[AttemptView]
    description: str
    metadata: msgspec.Raw
    created_at: datetime
    expires_at: datetime
    succeeded_at: datetime | None
    closed_at: datetime | None
    failure: FailureView | None


class RefundView(msgspec.Struct, frozen=True, gc=False):
    """Money given back."""

    id: str
    object: Literal["refund"]
    payment: str
    refund_id: str
    amount: int
    currency: str
    state: str
    reason: str | None
    number: str
    channel_id: str | None
    fee_returned: int
    failure: FailureView | None
    metadata: msgspec.Raw
    created_at: datetime
    succeeded_at: datetime | None


class WalletView(msgspec.Struct, frozen=True, gc=False):
    """A user's wallet with a merchant."""

    id: str
    object: Literal["wallet"]
    user: str
    currency: str
    balance: int
    available: int
    created_at: datetime


def payment_name(payment: Payment) -> str:
    """The public id: `pay_…`, or `top_…` for a top-up."""
    return ("top_" if payment.kind == "topup" else "pay_") + payment.id


def payment_json(payment: Payment, attempts: Iterable[Attempt] = ()) -> bytes:
    """A payment or top-up as JSON, with its attempts, oldest first."""
    return _encode(payment_view(payment, attempts))


def payment_view(payment: Payment, attempts: Iterable[Attempt] = ()) -> PaymentView | TopupView:
    """A payment or top-up as outside programs see it."""
    ordered = sorted(attempts, key=lambda attempt: attempt.id)
    action = _next_action(payment, ordered)
    fee = fee_of(payment.amount, payment.fee_ppm) if payment.state == "succeeded" else 0
    views = [_attempt_view(attempt) for attempt in ordered]
    metadata = msgspec.Raw(payment.metadata.encode())
    failure = _failure(payment.failure_code, payment.failure_reason)
    if payment.kind == "topup":
        return TopupView(
            "top_" + payment.id, "topup", payment.order_id, f"wal_{payment.wallet}", payment.amount, payment.currency,
            payment.state, payment.channel, payment.method, action, payment.amount_refunded, payment.amount_refunding,
            fee, views, payment.description, metadata, payment.created_at, payment.expires_at, payment.succeeded_at,
            payment.closed_at, failure,
        )  # fmt: skip
    return PaymentView(
        "pay_" + payment.id, "payment", payment.order_id, payment.amount, payment.currency,
        payment.state, payment.channel, payment.method, action, payment.amount_refunded, payment.amount_refunding,
        fee, views, payment.description, metadata, payment.created_at, payment.expires_at, payment.succeeded_at,
        payment.closed_at, failure,
    )  # fmt: skip


def refund_json(refund: Refund, payment: Payment) -> bytes:
    """A refund as JSON."""
    return _encode(refund_view(refund, payment_name(payment)))


def refund_view(refund: Refund, payment: str) -> RefundView:
    """A refund as outside programs see it. payment: the public id of its payment or top-up."""
    return RefundView(
        "rfd_" + refund.id,
        "refund",
        payment,
        refund.refund_id,
        refund.amount,
        refund.currency,
        refund.state,
        refund.reason,
        refund.id,
        refund.channel_id,
        refund.fee_returned,
        _failure(refund.failure_code, refund.failure_reason),
        msgspec.Raw(refund.metadata.encode()),
        refund.created_at,
        refund.succeeded_at,
    )


def wallet_json(wallet: Wallet, *, balance: int, available: int) -> bytes:
    """A wallet with its money as JSON."""
    return _encode(wallet_view(wallet, balance=balance, available=available))


def wallet_view(wallet: Wallet, *, balance: int, available: int) -> WalletView:
    """A wallet as outside programs see it."""
    return WalletView("wal_" + wallet.id, "wallet", wallet.user, wallet.currency, balance, available, wallet.created_at)


def wallet_name(wallet: Id) -> str:
    """A wallet's public id."""
    return "wal_" + wallet


def _attempt_view(attempt: Attempt) -> AttemptView:
    return AttemptView(
        "att_" + attempt.id,
        attempt.state,
        attempt.channel,
        attempt.method,
        attempt.id,
        attempt.channel_id,
        _failure(attempt.failure_code, attempt.failure_reason),
    )


def _failure(code: str | None, reason: str | None) -> FailureView | None:
    return FailureView(code, reason) if code is not None else None


def _next_action(payment: Payment, attempts: list[Attempt]) -> msgspec.Raw:
    """What the payer needs: that of the newest attempt that waits for the payer, as long as the payment wants money."""
    if payment.state != "processing":
        return _NULL
    for attempt in reversed(attempts):
        if attempt.state == "pending_payer" and attempt.next_action is not None:
            return msgspec.Raw(attempt.next_action.encode())
    return _NULL
