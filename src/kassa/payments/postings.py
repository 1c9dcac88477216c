"""Which transfers each event of a payment posts, by the chart of accounts. Pure. Amounts of zero post nothing."""

from kassa.errors import InvariantBroken
from kassa.ledger import chart
from kassa.ledger.chart import Posting
from kassa.ledger.model import AccountKey, HoldKey, Transfer, hold, release, settle, single
from kassa.payments.fees import fee_of
from kassa.payments.records import Payment, Refund

_NET, _FEE = 0, 1
"""The parts of a refund's hold."""


def success(payment: Payment) -> tuple[Transfer, ...]:
    """The payment has its money: it is the merchant's (less the fee), or the wallet's for a top-up."""
    source = chart.receivable(payment.home, payment.currency)
    if payment.kind == "topup":
        return (single(Posting.TOPUP, source, wallet_of(payment), payment.amount),)
    return _shared_out(payment, source, Posting.PAYMENT)


def late_success(payment: Payment) -> tuple[Transfer, ...]:
    """Money that came after the close waits in suspense."""
    return (_to_suspense(payment, Posting.LATE),)


def duplicate_success(payment: Payment) -> tuple[Transfer, ...]:
    """Money that came a second time waits in suspense."""
    return (_to_suspense(payment, Posting.DUPLICATE),)


def late_accepted(payment: Payment) -> tuple[Transfer, ...]:
    """Late money goes from suspense where it would have gone in time."""
    source = chart.suspense(payment.home, payment.currency)
    if payment.kind == "topup":
        return (single(Posting.LATE_ACCEPTED, source, wallet_of(payment), payment.amount),)
    return _shared_out(payment, source, Posting.LATE_ACCEPTED)


def refund_reserved(payment: Payment, refund: Refund) -> tuple[Transfer, ...]:
    """The refund's money is held before the channel is asked."""
    target = chart.receivable(payment.home, payment.currency)
    return tuple(
        hold(code, source, target, amount, HoldKey(refund.id, part))
        for code, source, amount, part in _refund_parts(payment, refund)
    )


def refund_done(payment: Payment, refund: Refund) -> tuple[Transfer, ...]:
    """The channel gave the money back: the holds become final."""
    return tuple(settle(code, HoldKey(refund.id, part)) for code, _, _, part in _refund_parts(payment, refund))


def refund_released(payment: Payment, refund: Refund) -> tuple[Transfer, ...]:
    """The refund did not happen and will not: the holds are given back."""
    return tuple(release(code, HoldKey(refund.id, part)) for code, _, _, part in _refund_parts(payment, refund))


def refund_reversed(payment: Payment, refund: Refund) -> tuple[Transfer, ...]:
    """The channel sent refunded money back to us: new transfers the other way."""
    source = chart.receivable(payment.home, payment.currency)
    return tuple(
        single(Posting.REVERSAL, source, target, amount) for _, target, amount, _ in _refund_parts(payment, refund)
    )


def wallet_refund(payment: Payment, refund: Refund) -> tuple[Transfer, ...]:
    """A wallet payment's refund is final at once."""
    target = wallet_of(payment)
    return tuple(single(code, source, target, amount) for code, source, amount, _ in _refund_parts(payment, refund))


def wallet_of(payment: Payment) -> AccountKey:
    """The account of the wallet that pays or is topped up. Raises InvariantBroken when there is none."""
    if payment.wallet is None:
        raise InvariantBroken("A payment that needs a wallet names none.", payment=payment.id)
    return chart.wallet(payment.home, payment.wallet, payment.currency)


def _shared_out(payment: Payment, source: AccountKey, code: Posting) -> tuple[Transfer, ...]:
    fee = fee_of(payment.amount, payment.fee_ppm)
    parts = (
        (code, chart.payable(payment.home, payment.currency), payment.amount - fee),
        (Posting.FEE, chart.fee_income(payment.home, payment.currency), fee),
    )
    return tuple(single(code, source, target, amount) for code, target, amount in parts if amount)


def _to_suspense(payment: Payment, code: Posting) -> Transfer:
    home, currency = payment.home, payment.currency
    return single(code, chart.receivable(home, currency), chart.suspense(home, currency), payment.amount)


def _refund_parts(payment: Payment, refund: Refund) -> tuple[tuple[Posting, AccountKey, int, int], ...]:
    """(posting, the account that it comes out of, amount, part of the hold), without empty parts."""
    home, currency = payment.home, payment.currency
    if refund.cause != "asked":
        return ((Posting.SUSPENSE_REFUND, chart.suspense(home, currency), refund.amount, _NET),)
    if payment.kind == "topup":
        return ((Posting.TOPUP_REFUND, wallet_of(payment), refund.amount, _NET),)
    parts = (
        (Posting.REFUND, chart.payable(home, currency), refund.amount - refund.fee_returned, _NET),
        (Posting.FEE_REFUND, chart.fee_income(home, currency), refund.fee_returned, _FEE),
    )
    return tuple(part for part in parts if part[2])
