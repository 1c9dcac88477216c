"""Signatures and ciphers against what the provider and its SDKs publish.

RSA PKCS#1 v1.5 is deterministic: a published signature that verifies over our text proves the text, as signing would.
"""

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from kassa.channels import wechat_crypto
from kassa.channels.wechat_crypto import ClientKind
from kassa.errors import ChannelMessageInvalid, SettingInvalid
from unit.channels import vectors
from unit.channels.provider import MERCHANT_KEY, PLATFORM, certificate_pem


def _key(spki: str) -> RSAPublicKey:
    return wechat_crypto.load_public_key(f"-----BEGIN PUBLIC KEY-----\n{spki}\n-----END PUBLIC KEY-----\n")


DOCUMENTATION_KEY = _key(vectors.DOCUMENTATION_KEY)
PREPAY = {
    "appid": "wx2421b1c4370ec43b",
    "timestamp": vectors.TIMESTAMP,
    "nonce": vectors.NONCE,
    "prepay_id": "wx201410272009395522657a690389285100",
}

PUBLISHED = {
    "order": (
        wechat_crypto.request_text(
            "POST", "/v3/pay/transactions/jsapi", vectors.TIMESTAMP, vectors.NONCE, vectors.ORDER_BODY.encode()
        ),
        vectors.ORDER_SIGNATURE,
    ),
    "refund query": (
        wechat_crypto.request_text(
            "GET", "/v3/refund/domestic/refunds/123123123123", int(vectors.TIMESTAMP), vectors.NONCE, b""
        ),
        vectors.REFUND_QUERY_SIGNATURE,
    ),
    "jsapi client": (wechat_crypto.pay_text(ClientKind.JSAPI, **PREPAY), vectors.JSAPI_SIGNATURE),
    "app client": (wechat_crypto.pay_text(ClientKind.APP, **PREPAY), vectors.APP_SIGNATURE),
}


@pytest.mark.parametrize(("text", "signature"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_signatures_verify_over_our_texts(text: bytes, signature: str) -> None:
    assert wechat_crypto.verify(DOCUMENTATION_KEY, text, signature)
    assert not wechat_crypto.verify(DOCUMENTATION_KEY, text + b"\n", signature)


def test_published_notification_verifies_and_opens() -> None:
    body = vectors.NOTICE_BODY.encode()
    text = wechat_crypto.response_text(vectors.NOTICE_TIMESTAMP, vectors.NOTICE_NONCE, body)
    resource = json.loads(body)["resource"]

    plain = wechat_crypto.decrypt_resource(
        vectors.NOTICE_APIV3_KEY,
        nonce=resource["nonce"],
        associated_data=resource["associated_data"],
        ciphertext=resource["ciphertext"],
    )

    assert wechat_crypto.verify(_key(vectors.NOTICE_KEY), text, vectors.NOTICE_SIGNATURE)
    assert plain.decode() == vectors.NOTICE_PLAINTEXT


def test_published_ciphertext_is_what_we_would_write() -> None:
    resource = json.loads(vectors.NOTICE_BODY)["resource"]

    ours = wechat_crypto.encrypt_resource(
        vectors.NOTICE_APIV3_KEY,
        nonce=resource["nonce"],
        associated_data=resource["associated_data"],
        plaintext=vectors.NOTICE_PLAINTEXT.encode(),
    )

    assert ours == resource["ciphertext"]


def test_an_empty_body_is_an_empty_line() -> None:
    assert wechat_crypto.response_text(1, "n", b"") == b"1\nn\n\n"
    assert wechat_crypto.request_text("GET", "/a?b=c", 1, "n", b"") == b"GET\n/a?b=c\n1\nn\n\n"


@given(st.binary(max_size=200))
def test_what_we_sign_verifies(text: bytes) -> None:
    assert wechat_crypto.verify(MERCHANT_KEY.public_key(), text, wechat_crypto.sign(MERCHANT_KEY, text))


@given(st.text(max_size=400))
def test_no_invented_signature_verifies_or_raises(signature: str) -> None:
    assert not wechat_crypto.verify(MERCHANT_KEY.public_key(), b"text", signature)


def test_base64_has_one_spelling_only() -> None:
    """The last letter before the padding carries bits that mean nothing; another letter there is not the signature."""
    signature = wechat_crypto.sign(MERCHANT_KEY, b"text")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature[:-3] + alphabet[alphabet.index(signature[-3]) ^ 1] + "=="

    assert base64.b64decode(other) == base64.b64decode(signature)
    assert not wechat_crypto.verify(MERCHANT_KEY.public_key(), b"text", other)


PAIRS = {"mchid": "1900007291", "serial_no": "40AB", "timestamp": "1554208460", "nonce": "abc", "signature": "a+/=="}


def test_authorization_is_read_back() -> None:
    read = wechat_crypto.parse_authorization(wechat_crypto.authorization(**PAIRS))

    assert read == {
        "mchid": "1900007291",
        "serial_no": "40AB",
        "timestamp": "1554208460",
        "nonce_str": "abc",
        "signature": "a+/==",
    }


@given(st.permutations(wechat_crypto.authorization(**PAIRS).removeprefix(wechat_crypto.SCHEME + " ").split(",")))
def test_authorization_pairs_come_in_any_order(pairs: list[str]) -> None:
    header = f"{wechat_crypto.SCHEME} {', '.join(pairs)}"

    assert wechat_crypto.parse_authorization(header)["nonce_str"] == "abc"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer abc",
        wechat_crypto.SCHEME,
        wechat_crypto.authorization(**PAIRS).replace("SHA256", "SM3"),
        wechat_crypto.authorization(**PAIRS).replace('mchid="1900007291",', ""),
        wechat_crypto.authorization(**PAIRS) + ',mchid="2"',
        wechat_crypto.authorization(**PAIRS) + ",x",
        wechat_crypto.authorization(**PAIRS).replace('"', "'"),
    ],
)
def test_a_malformed_authorization_is_refused(header: str) -> None:
    with pytest.raises(ChannelMessageInvalid):
        wechat_crypto.parse_authorization(header)


@pytest.mark.parametrize(
    ("key", "nonce", "associated_data", "change"),
    [
        (b"l" * 32, "n" * 12, "data", 0),
        (b"k" * 32, "m" * 12, "data", 0),
        (b"k" * 32, "n" * 12, "", 0),
        (b"k" * 32, "n" * 12, "data", 1),
        (b"k" * 32, "", "data", 0),
        (b"k" * 32, "\ud800" * 12, "data", 0),
    ],
)
def test_a_resource_opens_only_as_it_was_closed(key: bytes, nonce: str, associated_data: str, change: int) -> None:
    ciphertext = wechat_crypto.encrypt_resource(
        b"k" * 32, nonce="n" * 12, associated_data="data", plaintext=b'{"total":1}'
    )
    first = "A" if ciphertext[0] != "A" else "B"

    with pytest.raises(ChannelMessageInvalid):
        wechat_crypto.decrypt_resource(
            key,
            nonce=nonce,
            associated_data=associated_data,
            ciphertext=first + ciphertext[1:] if change else ciphertext,
        )


def test_keys_are_read_from_pem() -> None:
    pem = MERCHANT_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = MERCHANT_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    certificate = wechat_crypto.load_certificate(certificate_pem(PLATFORM, serial=0xABC123))

    assert wechat_crypto.load_private_key(pem).private_numbers() == MERCHANT_KEY.private_numbers()
    assert wechat_crypto.load_public_key(public) == MERCHANT_KEY.public_key()
    assert certificate.serial_no == "ABC123"
    assert certificate.public_key == PLATFORM.public_key()


def test_keys_of_another_kind_are_refused_without_being_shown() -> None:
    key = generate_ec_key(SECP256R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    for load, pem in (
        (wechat_crypto.load_private_key, private),
        (wechat_crypto.load_private_key, "-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----"),
        (wechat_crypto.load_public_key, public),
        (wechat_crypto.load_public_key, "secret"),
        (wechat_crypto.load_certificate, "secret"),
    ):
        with pytest.raises(SettingInvalid) as caught:
            load(pem)
        assert "secret" not in str(caught.value)
        assert private.splitlines()[1] not in str(caught.value)
