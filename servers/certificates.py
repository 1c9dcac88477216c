"""Certificates for tests of TLS, made on the fly: an authority of our own and a server of 127.0.0.1 and localhost."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_LIFE = timedelta(days=3650)
"""The data of a server that `make servers` keeps may be years old."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files."""

    authority: Path
    """What a client must trust."""
    server: Path
    key: Path
    """PKCS8, without a password; for the server alone."""
    server_with_key: Path
    """Both in one file, as Kafka wants them."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return (self.authority, self.server, self.key, self.server_with_key)


def certificates(directory: Path) -> Certificates:
    """Those in `directory`, made when there are none."""
    found = Certificates(*(directory / name for name in ("ca.pem", "server.pem", "server.key", "server-and-key.pem")))
    if not all(file.exists() for file in found.files):
        _make(found)
    return found


def _make(files: Certificates) -> None:
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("Kassa's test authority", authority_key, None, authority_key)
    server = _certificate("localhost", server_key, authority, authority_key)
    key = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    certificate = server.public_bytes(Encoding.PEM)
    files.authority.write_bytes(authority.public_bytes(Encoding.PEM))
    for file, content in ((files.server, certificate), (files.key, key), (files.server_with_key, key + certificate)):
        file.touch(mode=0o600)
        file.write_bytes(content)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate of `key`; of an authority when there is no issuer. Python's strict check wants every extension here."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    is_authority = issuer is None
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _LIFE)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(_usage(is_authority=is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_authority:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
