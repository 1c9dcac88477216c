"""Encryption of secrets at rest: AES-256-GCM under a key that is not in the database. Pure but for randomness.

Each secret is bound to whose it is and what it is for, so that a row copied to another merchant cannot be opened there.
"""

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kassa.errors import SettingInvalid

_FORMAT = b"\x01"
"""First byte of what is stored, so that the form may change later."""
_NONCE_BYTES = 12


class Vault:
    """Seals and opens secrets. `key`: 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, home: int, purpose: str, plain: bytes) -> bytes:
        """The secret, encrypted: format byte, nonce, ciphertext with tag."""
        nonce = os.urandom(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, plain, _bound_to(home, purpose))

    def open(self, home: int, purpose: str, sealed: bytes) -> bytes:
        """The secret in clear. Raises SettingInvalid when the key or the bytes are not those of then."""
        if sealed[:1] != _FORMAT:
            raise SettingInvalid("A secret at rest has a form that this program does not know.", purpose=purpose)
        nonce, ciphertext = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return self._cipher.decrypt(nonce, ciphertext, _bound_to(home, purpose))
        except InvalidTag:
            raise SettingInvalid(
                "A secret at rest cannot be opened: the secrets_key is not the one that it was sealed with, "
                "or the row was changed.",
                purpose=purpose,
                home=home,
            ) from None


def _bound_to(home: int, purpose: str) -> bytes:
    return f"kassa:{home}:{purpose}".encode()
