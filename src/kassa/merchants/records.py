"""The rows of merchants, API keys and channel accounts. Shapes only."""

from datetime import datetime

from kassa.journal.table import Child, Root, Table


class Merchant(Root, frozen=True, gc=False):
    """A merchant and its policies. `home` is where all that belongs to it lives. State: active."""

    created_at: datetime
    # From here on: what moves.
    name: str
    fee_ppm: int = 0
    """What Kassa's operator takes of each payment, in parts per million."""
    fee_on_refund: str = "returned"
    """returned or kept."""
    late_success: str = "refund"
    """accept, refund or hold."""
    overdraft: int = 0
    """By how many minor units refunds may take the merchant's balance below zero."""


class ApiKey(Child, frozen=True, gc=False):
    """An API key; only its SHA-256 is stored. States: active, revoked."""

    key_hash: bytes
    label: str
    scopes: str
    """Space-separated: `all`, or `read`, `payments`, `refunds`, `wallets`, `webhooks`; of the house: `operator`."""
    shown: str
    """The first characters, so that a person can tell keys apart."""
    created_at: datetime
    revoked_at: datetime | None = None


class ChannelAccount(Child, frozen=True, gc=False):
    """A merchant's account at a channel. State: active, disabled."""

    channel: str
    created_at: datetime
    # From here on: what moves.
    credentials: bytes
    """JSON, encrypted under the key of the settings; never in clear."""
    updated_at: datetime


MERCHANT = Table(1, "merchant", Merchant, mutable=("name", "fee_ppm", "fee_on_refund", "late_success", "overdraft"))
API_KEY = Table(2, "api_key", ApiKey, mutable=("revoked_at",), parent=MERCHANT)
CHANNEL_ACCOUNT = Table(3, "channel_account", ChannelAccount, mutable=("credentials", "updated_at"), parent=MERCHANT)
