"""Who a WeChat Pay sandbox is: its merchant's credentials and the platform's own keys, made at first start and kept.

One file in the sandbox's directory, mode 0600. The keys are throw-away: nothing real hangs on them.
"""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from kassa.channels.wechat_crypto import load_private_key

FILE = "identity.json"
KEYS_MAX = 2
"""Of each kind: the current one and the one before it, which stays good while a rotation is under way."""

_DIGITS = "0123456789"
_LETTERS = _DIGITS + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class PlatformKey:
    """A key that the provider signs with, and the form in which merchants get its public half."""

    serial: str
    """PUB_KEY_ID_… for a bare key; upper-case hexadecimal for a certificate."""
    private_pem: str
    public_pem: str
    """A public key, or a certificate."""
    effective_time: str
    expire_time: str


@dataclass(frozen=True)
class Identity:
    """All names and keys of one sandbox. The last key of each kind is the current one."""

    port: int
    mchid: str
    appid: str
    apiv3_key: str
    merchant_serial_no: str
    merchant_private_key_pem: str
    public_keys: tuple[PlatformKey, ...]
    certificates: tuple[PlatformKey, ...]

    def credentials(self) -> dict[str, str]:
        """What a merchant needs to use this sandbox: the object that `kassa sandbox wechat --json` prints."""
        return {
            "base_url": f"http://127.0.0.1:{self.port}",
            "mchid": self.mchid,
            "appid": self.appid,
            "merchant_serial_no": self.merchant_serial_no,
            "merchant_private_key_pem": self.merchant_private_key_pem,
            "apiv3_key": self.apiv3_key,
            "platform_public_key_pem": self.public_keys[-1].public_pem,
            "platform_public_key_id": self.public_keys[-1].serial,
            "platform_certificate_serial": self.certificates[-1].serial,
            "platform_certificate_pem": self.certificates[-1].public_pem,
        }

    @cached_property
    def merchant_public_key(self) -> RSAPublicKey:
        return load_private_key(self.merchant_private_key_pem).public_key()

    @cached_property
    def signing_keys(self) -> dict[str, RSAPrivateKey]:
        """Every platform key that still signs, by serial."""
        return {key.serial: load_private_key(key.private_pem) for key in (*self.public_keys, *self.certificates)}

    def with_new_certificate(self) -> "Identity":
        """The provider moves to a new certificate; the old one stays listed for a while."""
        return replace(self, certificates=(*self.certificates, new_certificate())[-KEYS_MAX:])

    def with_new_public_key(self) -> "Identity":
        """The provider moves to a new bare key; nobody can fetch it, merchants are given it."""
        return replace(self, public_keys=(*self.public_keys, new_public_key())[-KEYS_MAX:])


def new_identity(port: int) -> Identity:
    """Fresh names and keys. Takes about half a second: three RSA keys of 2048 bits."""
    return Identity(
        port=port,
        mchid="19" + _random(_DIGITS, 8),
        appid="wx" + secrets.token_hex(8),
        apiv3_key=_random(_LETTERS, 32),
        merchant_serial_no=f"{_new_serial():X}",
        merchant_private_key_pem=_private_pem(_new_key()),
        public_keys=(new_public_key(),),
        certificates=(new_certificate(),),
    )


def new_public_key() -> PlatformKey:
    """A bare key as new merchants use it."""
    key = _new_key()
    now = datetime.now(UTC)
    return PlatformKey(
        serial="PUB_KEY_ID_01" + _random(_DIGITS, 10) + now.strftime("%Y%m%d") + "0" + _random(_DIGITS, 9),
        private_pem=_private_pem(key),
        public_pem=key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        effective_time=now.isoformat(timespec="seconds"),
        expire_time="9999-12-31T23:59:59+00:00",
    )


def new_certificate() -> PlatformKey:
    """A platform certificate, signed by itself; clients trust it because the APIv3 key opens its envelope."""
    key = _new_key()
    serial = _new_serial()
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "CN"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Sandbox"),
            x509.NameAttribute(NameOID.COMMON_NAME, "Sandbox platform certificate"),
        ]
    )
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    end = start + timedelta(days=5 * 365)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .sign(key, SHA256())
    )
    return PlatformKey(
        serial=f"{serial:X}",
        private_pem=_private_pem(key),
        public_pem=certificate.public_bytes(Encoding.PEM).decode(),
        effective_time=start.isoformat(),
        expire_time=end.isoformat(),
    )


def load_identity(directory: Path) -> Identity | None:
    """Who lives in `directory`; None when nobody does yet. Reading is enough to adopt a sandbox that runs there."""
    try:
        kept: dict[str, Any] = json.loads((directory / FILE).read_text())
    except FileNotFoundError:
        return None
    public_keys = tuple(PlatformKey(**key) for key in kept.pop("public_keys"))
    certificates = tuple(PlatformKey(**key) for key in kept.pop("certificates"))
    return Identity(**kept, public_keys=public_keys, certificates=certificates)


def save_identity(directory: Path, identity: Identity) -> None:
    """Replaces the file in one step, so that a crash leaves the old or the new one."""
    draft = directory / (FILE + ".new")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(identity), file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(directory / FILE)


def settle_identity(directory: Path, port: int) -> Identity:
    """The identity of `directory`, made if there is none. Port 0 is the kept one, or a free one that is kept from now on."""
    identity = load_identity(directory)
    if identity is None:
        identity = new_identity(port or _free_port())
    elif port and port != identity.port:
        identity = replace(identity, port=port)
    save_identity(directory, identity)
    return identity


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _new_key() -> RSAPrivateKey:
    return generate_private_key(public_exponent=65537, key_size=2048)


def _private_pem(key: RSAPrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def _new_serial() -> int:
    """159 bits with the highest set: always 40 hexadecimal digits, so that no client has to guess leading zeros."""
    return (1 << 158) | secrets.randbits(158)


def _random(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))
