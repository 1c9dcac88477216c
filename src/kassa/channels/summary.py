"""What may be shown of a message to or from a channel: for the timeline and the log. Pure.

An allowlist: a field that is not in it is named, and its value is left out. So a field that a provider adds tomorrow
cannot leak, and a reader still sees that it was there.
"""

from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec

TEXT_MAX = 2_000
"""Characters of one summary."""
_VALUE_MAX = 200
_ITEMS_MAX = 10
_DEPTH_MAX = 6

HIDDEN = "…"

SHOWN = frozenset(
    {
        "amount", "appid", "attach", "channel", "code", "create_time", "currency", "data", "discount_refund",
        "effective_time", "event_type", "expire_time", "field", "id", "issue", "location", "mchid", "notify_url",
        "out_refund_no", "out_trade_no", "payer_currency", "payer_refund", "payer_total", "refund", "refund_fee",
        "refund_id", "refund_status", "resource_type", "serial_no", "settlement_refund", "settlement_total",
        "status", "success_time", "time_expire", "total", "trade_state", "trade_type", "transaction_id", "type",
    }
)  # fmt: skip
"""Numbers, amounts, states, times: nothing that names a person, opens a door or lets somebody pay."""


def summarise(body: bytes) -> str:
    """The harmless part of a JSON body as compact JSON; of any other body only its size."""
    if not body:
        return ""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"({len(body)} bytes, not JSON)"
    if not isinstance(value, dict | list):
        return f"({len(body)} bytes, no object)"
    return msgspec.json.encode(_shown(value, _DEPTH_MAX)).decode()[:TEXT_MAX]


def show_path(path: str) -> str:
    """The path; of its query only the harmless values."""
    parts = urlsplit(path)
    if not parts.query:
        return parts.path
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    return parts.path + "?" + "&".join(f"{quote(k)}={quote(v) if k in SHOWN else HIDDEN}" for k, v in pairs)


def _shown(value: Any, depth: int) -> Any:
    if depth == 0:
        return HIDDEN
    if isinstance(value, dict):
        return {
            name[:_VALUE_MAX]: _shown(item, depth - 1) if name in SHOWN else HIDDEN
            for name, item in list(value.items())[: _ITEMS_MAX * 5]
        }
    if isinstance(value, list):
        return [_shown(item, depth - 1) for item in value[:_ITEMS_MAX]]
    return value[:_VALUE_MAX] if isinstance(value, str) else value
