"""Names of things: 32 hexadecimal digits inside (a UUID version 7, so rows land in order of time), prefixed outside.

`pay_01932b…` is the payment `01932b…`; the prefix says what it is, and the database stores 16 bytes.
"""

import os
import re
import time
from typing import NewType

from kassa.errors import InvariantBroken

Id = NewType("Id", str)
"""32 lower-case hexadecimal digits."""

_VARIANTS = "89ab"
_DIGITS = re.compile(r"[0-9a-f]{32}").fullmatch
_TIMED = re.compile(
    r"([0-9a-f]{12})[0-9a-f]{20}|evt_[0-9a-f]{2}([0-9a-f]{2})[0-9a-f]{6}([0-9a-f]{10})[0-9a-f]{4}"
).fullmatch
"""An id begins with its time. An event's name has its writer and the number of its change, of which the lower digits do."""


class _Noise:
    """Random digits of the operating system, fetched for many ids at a time: the call costs more than the id."""

    DIGITS = 19
    """An id's: 74 bits and two of the variant."""
    IDS = 512

    def __init__(self) -> None:
        self._digits = ""
        self._taken = 0
        # A child of this process must not draw what its parent draws.
        os.register_at_fork(after_in_child=self.drop)

    def drop(self) -> None:
        self._digits = ""
        self._taken = 0

    def draw(self) -> str:
        start = self._taken
        if start >= len(self._digits):
            self._digits = os.urandom(self.DIGITS * self.IDS // 2).hex()
            start = 0
        self._taken = start + self.DIGITS
        return self._digits[start : self._taken]


_noise = _Noise()


def new_id() -> Id:
    """A fresh id: milliseconds since 1970 (48 bits), version 7, 74 random bits. RFC 9562, section 5.7."""
    noise = _noise.draw()
    return Id(f"{time.time_ns() // 1_000_000:012x}7{noise[:3]}{_VARIANTS[int(noise[3], 16) & 3]}{noise[4:]}")


def read_id(prefix: str, text: str) -> Id | None:
    """The inner id of `prefix_…`; None when the text is not such a name."""
    if not text.startswith(prefix):
        return None
    digits = text[len(prefix) :]
    return Id(digits) if _DIGITS(digits) is not None else None


def require_id(prefix: str, text: str) -> Id:
    """Like `read_id`, for names that we made ourselves. Raises InvariantBroken."""
    inner = read_id(prefix, text)
    if inner is None:
        raise InvariantBroken("A name that Kassa made itself cannot be read.", prefix=prefix, text=text)
    return inner


def time_digits(name: str) -> str | None:
    """Twelve digits that grow with the time at which an id (without prefix) or an event's name was made; None for other names."""
    match = _TIMED(name)
    return None if match is None else match[1] or f"{match[2]}{match[3]}"


def event_name(writer: int, seq: int, ord: int) -> str:
    """An event's public id: its place in its writer's chain, so that no index is needed to find it."""
    return f"evt_{writer:04x}{seq:016x}{ord:04x}"


def read_event_name(text: str) -> tuple[int, int, int] | None:
    """(writer, seq, ord) of an event's public id; None when the text is not one."""
    digits = text.removeprefix("evt_")
    if len(text) != 28 or len(digits) != 24 or not all(digit in "0123456789abcdef" for digit in digits):
        return None
    writer, seq, ord = int(digits[:4], 16), int(digits[4:20], 16), int(digits[20:], 16)
    # No event is beyond what the database counts to.
    return (writer, seq, ord) if writer < 2**15 and seq < 2**63 and ord < 2**15 else None
