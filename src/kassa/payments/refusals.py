"""What the journal's verdicts mean for whoever asked: a refusal of the error tree."""

from kassa.errors import (
    IdempotencyKeyReused,
    InvariantBroken,
    KassaError,
    PaymentNotFound,
    PaymentOrderExists,
    RefundIdExists,
    RefundInsufficientBalance,
    WalletExists,
    WalletInsufficientFunds,
    WalletNotFound,
)
from kassa.ids import Id
from kassa.journal.change import Claim, KeyReused, Missing, Money, Refused, Taken, Verdict
from kassa.ledger.chart import NAMES, Code
from kassa.ledger.model import AccountMissing, InsufficientFunds, LedgerRefusal


def refusal(verdict: Verdict) -> KassaError:
    """The error that says why nothing happened. InvariantBroken for verdicts that no request of this noun can get."""
    match verdict:
        case Refused(error):
            return error
        case Money(reason):
            return _money(reason)
        case Taken(claim, by):
            return _taken(claim, by)
        case KeyReused():
            return IdempotencyKeyReused()
        case Missing():
            return PaymentNotFound()
        case _:
            return InvariantBroken("The journal gave a verdict that was not expected.", verdict=type(verdict).__name__)


def _taken(claim: Claim, by: Id) -> KassaError:
    match claim.kind:
        case "order":
            return PaymentOrderExists(order_id=claim.name, payment=f"pay_{by}")
        case "topup":
            return PaymentOrderExists(
                "There is already a top-up for this order_id.", order_id=claim.name, topup=f"top_{by}"
            )
        case "refund":
            return RefundIdExists(refund_id=claim.name, refund=f"rfd_{by}")
        case "wallet":
            return WalletExists(wallet=f"wal_{by}")
        case _:
            return InvariantBroken("A claim of another noun was refused.", kind=claim.kind)


def _money(reason: LedgerRefusal) -> KassaError:
    match reason:
        case InsufficientFunds(account, available, asked) if account.code == Code.WALLET:
            return WalletInsufficientFunds(wallet=f"wal_{account.owner}", available=available, asked=asked)
        case InsufficientFunds(account, available, asked) if account.code == Code.MERCHANT_PAYABLE:
            return RefundInsufficientBalance(available=available, asked=asked)
        case InsufficientFunds(account, available, asked):
            # Suspense can only give back what it got; if it cannot, our own books are wrong.
            return InvariantBroken(account=NAMES[Code(account.code)], available=available, asked=asked)
        case AccountMissing(account) if account.code == Code.WALLET:
            return WalletNotFound(wallet=f"wal_{account.owner}", currency=account.currency)
        case _:
            return InvariantBroken("The ledger refused what must be possible.", reason=str(reason))
