"""WeChat Pay API v3's signatures and ciphers, as pure functions. Both ends use them: the channel and its sandbox.

Texts are built from the bytes that travel and never from parsed values; re-encoding JSON breaks a signature.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from kassa.errors import ChannelMessageInvalid, SettingInvalid

SCHEME = "WECHATPAY2-SHA256-RSA2048"
ALGORITHM = "AEAD_AES_256_GCM"

_PADDING = PKCS1v15()
_HASH = SHA256()


# Signatures


def sign(private_key: RSAPrivateKey, text: bytes) -> str:
    """Base64 of the SHA256-RSA signature (PKCS#1 v1.5). Deterministic: the same text gives the same signature."""
    return base64.b64encode(private_key.sign(text, _PADDING, _HASH)).decode()


def verify(public_key: RSAPublicKey, text: bytes, signature: str) -> bool:
    """Whether `signature` is base64 of a signature over exactly `text`. Never raises on what a stranger may send."""
    raw = _canonical_base64(signature)
    if raw is None:
        return False
    try:
        public_key.verify(raw, text, _PADDING, _HASH)
    except InvalidSignature:
        return False
    return True


def request_text(method: str, path_with_query: str, timestamp: str | int, nonce: str, body: bytes) -> bytes:
    """What a request's signature covers: five lines, the last one ended too. The path is as sent, without host."""
    return f"{method}\n{path_with_query}\n{timestamp}\n{nonce}\n".encode() + body + b"\n"


def response_text(timestamp: str | int, nonce: str, body: bytes) -> bytes:
    """What a response's or notification's signature covers: three lines. A 204's empty body is an empty line."""
    return f"{timestamp}\n{nonce}\n".encode() + body + b"\n"


def authorization(*, mchid: str, serial_no: str, timestamp: str | int, nonce: str, signature: str) -> str:
    """The Authorization header of a request; `serial_no` is the merchant certificate's."""
    return (
        f'{SCHEME} mchid="{mchid}",nonce_str="{nonce}",signature="{signature}",'
        f'timestamp="{timestamp}",serial_no="{serial_no}"'
    )


_PAIR = re.compile(r'\s*([a-z_]+)="([^"]*)"\s*')
_AUTHORIZATION_KEYS = frozenset({"mchid", "nonce_str", "signature", "timestamp", "serial_no"})


def parse_authorization(header: str) -> dict[str, str]:
    """mchid, nonce_str, signature, timestamp and serial_no, in whatever order they came: published clients differ.

    Raises ChannelMessageInvalid when the scheme is another, a pair is malformed or doubled, or one is missing.
    """
    scheme, _, rest = header.strip().partition(" ")
    if scheme != SCHEME:
        raise ChannelMessageInvalid(f"The Authorization scheme must be {SCHEME}.")
    pairs: dict[str, str] = {}
    for part in rest.split(","):
        found = _PAIR.fullmatch(part)
        if found is None or found[1] in pairs:
            raise ChannelMessageInvalid('The Authorization header must be a list of distinct key="value" pairs.')
        pairs[found[1]] = found[2]
    missing = _AUTHORIZATION_KEYS - pairs.keys()
    if missing:
        raise ChannelMessageInvalid("The Authorization header lacks a part.", missing=", ".join(sorted(missing)))
    return pairs


class ClientKind(Enum):
    """Where the payer's client runs; the two sign the prepay id differently."""

    JSAPI = "jsapi"
    """Inside WeChat (official account, mini program): the fourth line is prepay_id=…"""
    APP = "app"
    """The merchant's own app: the fourth line is the bare id."""


def pay_sign(
    private_key: RSAPrivateKey, kind: ClientKind, *, appid: str, timestamp: str | int, nonce: str, prepay_id: str
) -> str:
    """The signature that the payer's client shows to WeChat: four lines, each ended."""
    return sign(private_key, pay_text(kind, appid=appid, timestamp=timestamp, nonce=nonce, prepay_id=prepay_id))


def pay_text(kind: ClientKind, *, appid: str, timestamp: str | int, nonce: str, prepay_id: str) -> bytes:
    """What `pay_sign` covers."""
    last = f"prepay_id={prepay_id}" if kind is ClientKind.JSAPI else prepay_id
    return f"{appid}\n{timestamp}\n{nonce}\n{last}\n".encode()


# The resource of a notification


def encrypt_resource(key: bytes, *, nonce: str, associated_data: str, plaintext: bytes) -> str:
    """Base64 of the AES-GCM ciphertext with its 16-byte tag at the end, as a notification or certificate carries it."""
    return base64.b64encode(AESGCM(key).encrypt(nonce.encode(), plaintext, associated_data.encode())).decode()


def decrypt_resource(key: bytes | AESGCM, *, nonce: str, associated_data: str, ciphertext: str) -> bytes:
    """The plaintext. Raises ChannelMessageInvalid when anything does not fit.

    key: 32 bytes for API v3, or the cipher made of them once; a shorter AES key works too (a published vector has 16),
    its length is checked where a channel's account is made.
    """
    raw = _canonical_base64(ciphertext)
    if raw is None:
        raise ChannelMessageInvalid("The encrypted resource is not base64.")
    try:
        cipher = AESGCM(key) if isinstance(key, bytes) else key
        return cipher.decrypt(nonce.encode(), raw, associated_data.encode())
    except (InvalidTag, ValueError) as error:
        raise ChannelMessageInvalid("The encrypted resource does not open with this API v3 key.") from error


def _canonical_base64(text: str) -> bytes | None:
    """The bytes, or None. Only the one canonical spelling is taken, so that no character can be changed unnoticed."""
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    return raw if binascii.b2a_base64(raw, newline=False).decode() == text else None


# Keys


@dataclass(frozen=True, slots=True)
class Certificate:
    """What matters of an X.509 certificate: who it is, its key, and when it may be used."""

    serial_no: str
    """Upper-case hexadecimal, as the wire writes it."""
    public_key: RSAPublicKey
    valid_from: datetime
    valid_until: datetime


def load_private_key(pem: str | bytes) -> RSAPrivateKey:
    """An RSA private key from PEM without passphrase. Raises SettingInvalid, which never repeats the key."""
    try:
        key = load_pem_private_key(_bytes(pem), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingInvalid("The private key is not PEM without passphrase.") from None
    if not isinstance(key, RSAPrivateKey):
        raise SettingInvalid("The private key is not an RSA key.")
    return key


def load_public_key(pem: str | bytes) -> RSAPublicKey:
    """An RSA public key from PEM. Raises SettingInvalid."""
    try:
        key = load_pem_public_key(_bytes(pem))
    except (ValueError, UnsupportedAlgorithm):
        raise SettingInvalid("The public key is not PEM.") from None
    if not isinstance(key, RSAPublicKey):
        raise SettingInvalid("The public key is not an RSA key.")
    return key


def load_certificate(pem: str | bytes) -> Certificate:
    """A certificate with an RSA key from PEM. Raises SettingInvalid."""
    try:
        certificate = x509.load_pem_x509_certificate(_bytes(pem))
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise SettingInvalid("The certificate is not PEM.") from None
    if not isinstance(key, RSAPublicKey):
        raise SettingInvalid("The certificate does not hold an RSA key.")
    return Certificate(
        serial_no=f"{certificate.serial_number:X}",
        public_key=key,
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
    )


def _bytes(pem: str | bytes) -> bytes:
    return pem.encode() if isinstance(pem, str) else pem
