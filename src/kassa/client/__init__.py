"""The Python SDK: `Kassa` and its twin `AsyncKassa`, the objects that they return, and `webhooks.verify`.

Errors are those of `kassa.errors`.
"""

from kassa.client import webhooks
from kassa.client.asynchronous import AsyncKassa
from kassa.client.objects import (
    Attempt,
    Balance,
    Delivery,
    Entry,
    Event,
    Failure,
    Line,
    NextAction,
    Page,
    Payment,
    Refund,
    Replay,
    Topup,
    Wallet,
    WebhookEndpoint,
)
from kassa.client.synchronous import Kassa

__all__ = [
    "AsyncKassa",
    "Attempt",
    "Balance",
    "Delivery",
    "Entry",
    "Event",
    "Failure",
    "Kassa",
    "Line",
    "NextAction",
    "Page",
    "Payment",
    "Refund",
    "Replay",
    "Topup",
    "Wallet",
    "WebhookEndpoint",
    "webhooks",
]
