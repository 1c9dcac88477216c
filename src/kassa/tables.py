"""All tables of the house, in one list: what the journal writes and `ledger verify` proves."""

from kassa.journal.table import Tables
from kassa.merchants.records import API_KEY, CHANNEL_ACCOUNT, MERCHANT
from kassa.notifications.records import WEBHOOK_DELIVERY, WEBHOOK_ENDPOINT, WEBHOOK_REPLAY
from kassa.payments.records import ATTEMPT, EXCHANGE, PAYMENT, REFUND, WALLET

TABLES = Tables(
    [
        MERCHANT, API_KEY, CHANNEL_ACCOUNT, PAYMENT, ATTEMPT, REFUND, WALLET, EXCHANGE,
        WEBHOOK_ENDPOINT, WEBHOOK_DELIVERY, WEBHOOK_REPLAY,
    ]
)  # fmt: skip
