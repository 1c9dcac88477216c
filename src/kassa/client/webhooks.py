"""Checks that a webhook comes from Kassa. Pure."""

import base64
import binascii
import hmac
import time
from collections.abc import Mapping

import msgspec

from kassa.client.objects import Event
from kassa.errors import WebhookInvalid

TOLERANCE_S = 300
"""Older or newer than this is refused, so that what somebody recorded cannot be played back later."""


def verify(
    headers: Mapping[str, str],
    body: bytes,
    secret: str,
    *,
    tolerance_s: int = TOLERANCE_S,
    now_s: float | None = None,
) -> Event:
    """The event that a webhook carries, once its signature and age are checked.

    headers: as received, in any case. body: the raw bytes as received; re-encoding breaks the signature.
    secret: `whsec_…` of the endpoint. now_s: seconds since 1970, for tests.
    The same event may come more than once: its id is the name to remember.
    Raises WebhookInvalid.
    Source: Standard Webhooks 1.0, "Verifying webhooks".
    """
    lower = {name.lower(): value for name, value in headers.items()}
    try:
        name, stamp, signatures = (lower[f"webhook-{part}"] for part in ("id", "timestamp", "signature"))
    except KeyError as missing:
        raise WebhookInvalid("A header of the webhook is missing.", header=missing.args[0]) from None
    _check_age(stamp, time.time() if now_s is None else now_s, tolerance_s)
    expected = hmac.digest(_key(secret), f"{name}.{stamp}.".encode() + body, "sha256")
    # Every signature is compared, in constant time, so that time tells nothing about which one was near.
    matches = [hmac.compare_digest(expected, given) for given in _signatures(signatures)]
    if not any(matches):
        raise WebhookInvalid("No signature of the webhook was made with this secret.", id=name)
    try:
        return msgspec.json.decode(body, type=Event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WebhookInvalid(f"The webhook's body is not an event: {error}.", id=name) from None


def _check_age(stamp: str, now_s: float, tolerance_s: int) -> None:
    if not (stamp.isascii() and stamp.isdecimal() and len(stamp) <= 12):
        raise WebhookInvalid("The webhook's timestamp is not a number of seconds.")
    if abs(now_s - int(stamp)) > tolerance_s:
        raise WebhookInvalid("The webhook is too old or too new.", timestamp=int(stamp), tolerance_s=tolerance_s)


def _key(secret: str) -> bytes:
    text = secret.removeprefix("whsec_")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if not key:
        # An empty key would verify what anybody can sign.
        raise WebhookInvalid("The secret is not one of a webhook endpoint.")
    return key


def _signatures(header: str) -> list[bytes]:
    """Those of version 1; one that is not base64 matches nothing."""
    found = []
    for part in header.split(" "):
        version, _, text = part.partition(",")
        if version == "v1":
            try:
                found.append(base64.b64decode(text, validate=True))
            except (ValueError, binascii.Error):
                continue
    return found
