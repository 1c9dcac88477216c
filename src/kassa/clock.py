"""What time it is, passed in so that tests and simulations can stop it; and how a time is written, RFC 3339 in UTC."""

from datetime import UTC, datetime, timedelta
from typing import Protocol

from kassa.errors import RequestInvalid


class Clock(Protocol):
    """Says what time it is."""

    def now(self) -> datetime:
        """Aware, in UTC."""
        ...


class SystemClock:
    """The machine's clock. It may step; what is due is judged by the database's clock."""

    __slots__ = ()

    def now(self) -> datetime:
        return datetime.now(UTC)


class FrozenClock:
    """Stands still until it is moved."""

    __slots__ = ("_now",)

    def __init__(self, now: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = now.astimezone(UTC)

    def now(self) -> datetime:
        return self._now

    def advance(self, seconds: float) -> datetime:
        """Moves by so many seconds (back if negative) and says the new time."""
        self._now += timedelta(seconds=seconds)
        return self._now


def rfc3339(at: datetime) -> str:
    """`2026-08-01T12:00:00.123Z`: in UTC, cut (not rounded) to milliseconds. `at` must be aware.

    Raises ValueError for a time without a zone: guessing one is how money gets dated a day early.
    """
    if at.tzinfo is not UTC:
        if at.tzinfo is None:
            raise ValueError("A time without a zone cannot be written.")
        at = at.astimezone(UTC)
    # isoformat is written in C and several times quicker than strftime; this stands in every answer.
    return at.isoformat(timespec="milliseconds")[:-6] + "Z"


def parse_rfc3339(text: str) -> datetime:
    """The time of an RFC 3339 text, in UTC; any offset is read, microseconds are kept.

    Raises RequestInvalid for anything else, also for a time without a zone, a date alone, or the ISO 8601 forms that
    RFC 3339 does not know.
    """
    if len(text) < 20 or text[4] != "-" or text[7] != "-" or text[10] not in "Tt " or text[13] != ":":
        raise _unreadable(text)
    try:
        at = datetime.fromisoformat(text.upper())
        if at.tzinfo is None or not text.isascii():
            raise _unreadable(text)
        return at.astimezone(UTC)
    except (ValueError, OverflowError) as fault:
        raise _unreadable(text) from fault


def _unreadable(text: str) -> RequestInvalid:
    return RequestInvalid(f"{text[:40]!r} is not a time like 2026-08-01T12:00:00Z.")
