"""A provider for pure tests: it signs and encrypts as WeChat Pay does, and a conversation with it needs no network."""

import json
from collections.abc import Callable, Generator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from kassa.channels import wechat_crypto
from kassa.channels.model import Charge, Method, Nonce, Refund, Request, Response
from kassa.channels.wechat import PlatformKey, WeChatAccount, WeChatPay

NOW = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)
MCHID = "1900007291"
APPID = "wxd678efh567hg6787"
APIV3_KEY = b"0123456789abcdefghijklmnopqrstuv"
KEY_ID = "PUB_KEY_ID_0119000072912026080100000000000001"
NUMBER = "20260801120000abcdef01"
REFUND_NUMBER = "20260801130000abcdef02"
TRANSACTION_ID = "4200001234202608011234567890"
OPENID = "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"

MERCHANT_KEY = generate_private_key(public_exponent=65537, key_size=2048)
PLATFORM = generate_private_key(public_exponent=65537, key_size=2048)
NEXT_PLATFORM = generate_private_key(public_exponent=65537, key_size=2048)

Done = TypeVar("Done")


def account(**changes: Any) -> WeChatAccount:
    """An account in public-key mode."""
    fields: dict[str, Any] = {
        "mchid": MCHID,
        "appid": APPID,
        "merchant_serial_no": "40AB",
        "private_key": MERCHANT_KEY,
        "apiv3_key": APIV3_KEY,
        "base_url": "http://127.0.0.1:1",
        "platform_keys": {KEY_ID: PlatformKey(KEY_ID, PLATFORM.public_key())},
        "public_key_id": KEY_ID,
    }
    return WeChatAccount(**fields | changes)


CHANNEL = WeChatPay(account())


def nonces() -> Nonce:
    """A frozen one."""
    return Nonce(NOW, "n" * 32)


def charge(**changes: Any) -> Charge:
    fields: dict[str, Any] = {
        "number": NUMBER,
        "amount": 100,
        "currency": "CNY",
        "method": Method.NATIVE,
        "description": "两杯咖啡",
        "expires_at": NOW + timedelta(minutes=15),
        "notify_url": "https://shop.example/v1/callbacks/wechat/mch_1",
        "attach": "pay_1",
    }
    return Charge(**fields | changes)


def refund(**changes: Any) -> Refund:
    fields: dict[str, Any] = {
        "number": REFUND_NUMBER,
        "charge_number": NUMBER,
        "amount": 30,
        "charge_amount": 100,
        "currency": "CNY",
        "notify_url": "https://shop.example/v1/callbacks/wechat/mch_1",
        "reason": "cold coffee",
    }
    return Refund(**fields | changes)


def trade(**changes: Any) -> dict[str, Any]:
    """A paid order, as query and notification show it; None takes a field out."""
    fields: dict[str, Any] = {
        "appid": APPID,
        "mchid": MCHID,
        "out_trade_no": NUMBER,
        "transaction_id": TRANSACTION_ID,
        "trade_type": "NATIVE",
        "trade_state": "SUCCESS",
        "trade_state_desc": "支付成功",
        "success_time": "2026-08-01T20:01:02+08:00",
        "attach": "pay_1",
        "payer": {"openid": OPENID},
        "amount": {"total": 100, "payer_total": 90, "currency": "CNY", "payer_currency": "CNY"},
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def refund_answer(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "refund_id": "50000000382019052709732678859",
        "out_refund_no": REFUND_NUMBER,
        "transaction_id": TRANSACTION_ID,
        "out_trade_no": NUMBER,
        "channel": "ORIGINAL",
        "user_received_account": "招商银行信用卡0403",
        "success_time": "2026-08-01T21:01:02+08:00",
        "create_time": "2026-08-01T21:00:00+08:00",
        "status": "SUCCESS",
        "amount": {"total": 100, "refund": 30, "payer_total": 90, "payer_refund": 27, "currency": "CNY"},
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def refund_notice(**changes: Any) -> dict[str, Any]:
    """Its state has another name than in an answer, and its amount no currency."""
    fields = refund_answer(status=None, channel=None, amount={"total": 100, "refund": 30, "payer_total": 90})
    return {
        name: value
        for name, value in (fields | {"mchid": MCHID, "refund_status": "SUCCESS"} | changes).items()
        if value is not None
    }


def signed_headers(
    body: bytes, *, at: datetime = NOW, key: RSAPrivateKey = PLATFORM, serial: str = KEY_ID, nonce: str = "abcdef"
) -> dict[str, str]:
    timestamp = int(at.timestamp())
    return {
        "wechatpay-timestamp": str(timestamp),
        "wechatpay-nonce": nonce,
        "wechatpay-signature": wechat_crypto.sign(key, wechat_crypto.response_text(timestamp, nonce, body)),
        "wechatpay-serial": serial,
        "wechatpay-signature-type": wechat_crypto.SCHEME,
    }


def to_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()


def signed(status: int, value: Any = b"", **how: Any) -> Response:
    """A signed answer."""
    body = to_bytes(value)
    return Response(status, signed_headers(body, **how), body)


def unsigned(status: int, value: Any = b"") -> Response:
    return Response(status, {"content-type": "application/json"}, to_bytes(value))


def encrypted(plain: bytes, associated_data: str = "transaction", key: bytes = APIV3_KEY) -> dict[str, str]:
    return {
        "algorithm": wechat_crypto.ALGORITHM,
        "nonce": "fdasflkja484",
        "associated_data": associated_data,
        "ciphertext": wechat_crypto.encrypt_resource(
            key, nonce="fdasflkja484", associated_data=associated_data, plaintext=plain
        ),
    }


def notification(event_type: str, plain: Any, **envelope: Any) -> bytes:
    """The body of a notification."""
    return to_bytes(
        {
            "id": "EV-2018022511223320873",
            "create_time": "2026-08-01T20:01:03+08:00",
            "resource_type": "encrypt-resource",
            "event_type": event_type,
            "summary": "支付成功",
            "resource": {"original_type": "transaction", **encrypted(to_bytes(plain))},
        }
        | envelope
    )


def certificate_pem(
    key: RSAPrivateKey,
    *,
    serial: int,
    valid_from: datetime = NOW - timedelta(days=1),
    valid_until: datetime = NOW + timedelta(days=1800),
) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Platform")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(valid_from)
        .not_valid_after(valid_until)
        .sign(key, SHA256())
    )
    return certificate.public_bytes(Encoding.PEM).decode()


def converse(
    steps: Generator[Request, Response, Done], *answers: Response | Callable[[Request], Response]
) -> tuple[Done, list[Request]]:
    """What a conversation comes to when it gets exactly these answers, and what it asked."""
    asked: list[Request] = []
    waiting: Iterable[Response | Callable[[Request], Response]] = iter(answers)
    try:
        request = next(steps)
        for answer in waiting:
            asked.append(request)
            request = steps.send(answer if isinstance(answer, Response) else answer(request))
    except StopIteration as end:
        left = list(waiting)
        if left:
            raise AssertionError(f"{len(left)} answers were not asked for") from None
        return end.value, asked
    raise AssertionError(f"{request.method} {request.path} found no answer")
