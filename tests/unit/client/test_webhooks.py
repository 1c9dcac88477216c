"""`webhooks.verify` against signatures made by the standard's own library."""

import base64
import json
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from kassa.client import webhooks
from kassa.errors import WebhookInvalid

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
OTHER = "whsec_" + base64.b64encode(b"o" * 32).decode()
AT = datetime(2026, 11, 23, 10, 0, 0, tzinfo=UTC)
EVENT = {"id": "evt_1", "type": "payment.succeeded", "root": "pay_1", "sequence": 3,
         "timestamp": "2026-11-23T10:00:00Z", "data": {"object": "strange", "name": "你好"}}  # fmt: skip
BODY = json.dumps(EVENT, ensure_ascii=False).encode()


def headers(*secrets: str, body: bytes = BODY) -> dict[str, str]:
    signatures = [Webhook(secret).sign("evt_1", AT, body.decode()) for secret in secrets]
    return {
        "Webhook-Id": "evt_1",
        "Webhook-Timestamp": str(int(AT.timestamp())),
        "Webhook-Signature": " ".join(signatures),
    }


def test_what_the_standard_signs_is_verified() -> None:
    event = webhooks.verify(headers(SECRET), BODY, SECRET, now_s=AT.timestamp() + 5)

    assert event.id == "evt_1"
    assert event.object == {"object": "strange", "name": "你好"}


def test_while_a_secret_rotates_either_verifies() -> None:
    both = headers(OTHER, SECRET)

    assert webhooks.verify(both, BODY, SECRET, now_s=AT.timestamp()).id == "evt_1"
    assert webhooks.verify(both, BODY, OTHER, now_s=AT.timestamp()).id == "evt_1"


@pytest.mark.parametrize(
    ("given", "body", "secret", "later_s"),
    [
        (headers(OTHER), BODY, SECRET, 0),
        (headers(SECRET), BODY.replace(b"3", b"4"), SECRET, 0),
        (headers(SECRET), BODY, SECRET, 301),
        (headers(SECRET), BODY, SECRET, -301),
        ({**headers(SECRET), "Webhook-Id": "evt_2"}, BODY, SECRET, 0),
        ({**headers(SECRET), "Webhook-Timestamp": "1e9"}, BODY, SECRET, 0),
        ({**headers(SECRET), "Webhook-Signature": "v1,!!! v2,abc nonsense"}, BODY, SECRET, 0),
        ({"Webhook-Id": "evt_1"}, BODY, SECRET, 0),
        (headers(SECRET), BODY, "whsec_", 0),
        (headers(SECRET), BODY, "not base64 at all", 0),
        (headers(SECRET, body=b"[]"), b"[]", SECRET, 0),
    ],
)
def test_what_is_forged_old_or_broken_is_refused(given: dict[str, str], body: bytes, secret: str, later_s: int) -> None:
    with pytest.raises(WebhookInvalid):
        webhooks.verify(given, body, secret, now_s=AT.timestamp() + later_s)
