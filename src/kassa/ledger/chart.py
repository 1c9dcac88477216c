"""The chart of accounts and of transfers: which event posts what. The codes are stored for ever; never reuse a number.

| event | debit → credit |
|---|---|
| payment succeeded | channel receivable → merchant payable (net), → fee income (fee) |
| wallet payment | user wallet → merchant payable (net), → fee income (fee) |
| refund requested | hold: merchant payable → channel receivable (net part), fee income → channel receivable (fee part) |
| refund succeeded, failed | settle, release |
| wallet refund | merchant payable → user wallet (net part), fee income → user wallet (fee part) |
| top-up succeeded | channel receivable → user wallet |
| top-up refund requested | hold: user wallet → channel receivable |
| late or duplicate success | channel receivable → suspense; then by policy |
"""

from enum import IntEnum

from kassa.ids import Id
from kassa.ledger.model import AccountKey, Limit


class Code(IntEnum):
    """What an account is for."""

    WALLET = 1
    """What we owe a user. Opened with the wallet; may not go below zero."""
    MERCHANT_PAYABLE = 2
    """What we owe the merchant. May go below zero by the merchant's overdraft."""
    FEE_INCOME = 3
    CHANNEL_RECEIVABLE = 4
    """What the channels owe us; debits exceed credits."""
    SUSPENSE = 5
    """Money that came without a claim to it: late and duplicate payments."""


class Posting(IntEnum):
    """Why a transfer was made."""

    PAYMENT = 1
    FEE = 2
    REFUND = 3
    FEE_REFUND = 4
    TOPUP = 5
    LATE = 6
    DUPLICATE = 7
    SUSPENSE_REFUND = 8
    REVERSAL = 9
    LATE_ACCEPTED = 10
    TOPUP_REFUND = 11


NAMES = {
    Code.WALLET: "wallet",
    Code.MERCHANT_PAYABLE: "merchant_payable",
    Code.FEE_INCOME: "fee_income",
    Code.CHANNEL_RECEIVABLE: "channel_receivable",
    Code.SUSPENSE: "suspense",
}

LIMITS = {
    Code.MERCHANT_PAYABLE: Limit.DEBITS_WITHIN_CREDITS,
    Code.FEE_INCOME: Limit.NONE,
    Code.CHANNEL_RECEIVABLE: Limit.NONE,
    Code.SUSPENSE: Limit.DEBITS_WITHIN_CREDITS,
}
"""The accounts that come into being when something is first posted to them, and their limits. A wallet does not."""


def wallet(home: int, wallet_id: Id, currency: str) -> AccountKey:
    return AccountKey(home, Code.WALLET, wallet_id, currency)


def payable(home: int, currency: str) -> AccountKey:
    return AccountKey(home, Code.MERCHANT_PAYABLE, "", currency)


def fee_income(home: int, currency: str) -> AccountKey:
    return AccountKey(home, Code.FEE_INCOME, "", currency)


def receivable(home: int, currency: str) -> AccountKey:
    return AccountKey(home, Code.CHANNEL_RECEIVABLE, "", currency)


def suspense(home: int, currency: str) -> AccountKey:
    return AccountKey(home, Code.SUSPENSE, "", currency)
