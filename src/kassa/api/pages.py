"""Lists: a page of newest first, and a cursor to go on from. Pure.

A cursor is the place after which the next page begins. It is opaque to clients, but needs no signature: every query is
bounded by the caller's home, so a forged one only skips to another place of the caller's own list.
"""

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Annotated, Any, cast

import msgspec

from kassa.api.decode import refused
from kassa.ids import Id

LIMIT_DEFAULT = 20
LIMIT_MAX = 100

Limit = Annotated[int, msgspec.Meta(ge=1, le=LIMIT_MAX, description="How many at most")]
Cursor = Annotated[str, msgspec.Meta(min_length=1, max_length=200, description="next_cursor of the page before")]


def write_cursor(*place: str | int) -> str:
    """A cursor for a place in a list."""
    return urlsafe_b64encode(msgspec.json.encode(place)).rstrip(b"=").decode()


def read_id_cursor(cursor: str | None) -> Id | None:
    """The id after which the page begins; None: from the newest. Raises RequestInvalid."""
    if cursor is None:
        return None
    place = _read(cursor, tuple[Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]])
    return Id(place[0])


Place = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


def read_number_cursor(cursor: str | None) -> int | None:
    """The number before which the page begins; None: from the newest. Raises RequestInvalid."""
    return None if cursor is None else cast(int, _read(cursor, tuple[Place])[0])


def read_event_cursor(cursor: str | None) -> tuple[int, int, int, int] | None:
    """Time in microseconds, writer, seq and ord of an event; None: from the newest. Raises RequestInvalid."""
    if cursor is None:
        return None
    small = Annotated[int, msgspec.Meta(ge=0, le=32767)]
    time = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_000_000)]
    return cast(tuple[int, int, int, int], _read(cursor, tuple[time, small, Place, small]))


def _read(cursor: str, type: Any) -> Any:
    try:
        return msgspec.json.decode(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=type)
    except (msgspec.MsgspecError, binascii.Error, ValueError):
        raise refused("cursor", "is not a cursor of this list") from None
