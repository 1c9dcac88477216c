"""The fields that bodies and answers of several routes share, with their limits and descriptions."""

from datetime import datetime
from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

from kassa.api.pages import LIMIT_DEFAULT, Cursor, Limit
from kassa.payments.model import AMOUNT_MAX

Amount = Annotated[int, Meta(ge=1, le=AMOUNT_MAX, description="Whole minor units of the currency", examples=[100])]
Currency = Annotated[str, Meta(pattern="^[A-Z]{3}$", description="ISO 4217", examples=["CNY"])]
OrderId = Annotated[
    str, Meta(min_length=1, max_length=64, description="Your own number for it, used once", examples=["123456"])
]
Channel = Annotated[str, Meta(min_length=1, max_length=32, pattern="^[a-z0-9_]+$", examples=["wallet"])]
Method = Annotated[str, Meta(min_length=1, max_length=32, pattern="^[a-z0-9_]+$", examples=["native"])]
Description = Annotated[str, Meta(max_length=127, description="What it is for; the payer may see it")]
Reason = Annotated[str, Meta(max_length=80, description="Why; the payer may see it", examples=["cold coffee"])]
Url = Annotated[str, Meta(min_length=8, max_length=2048, pattern="^https?://[!-~]+$")]
Openid = Annotated[str, Meta(min_length=1, max_length=128, pattern="^[!-~]+$", description="The payer at the channel")]
Ip = Annotated[str, Meta(min_length=2, max_length=45, pattern="^[0-9a-fA-F.:]+$", description="The payer's address")]
WalletName = Annotated[str, Meta(pattern="^wal_[0-9a-f]{32}$", examples=["wal_01932b6f0c5a7d3e8f104b5c6d7e8f90"])]
User = Annotated[str, Meta(min_length=1, max_length=128, description="Your own name for the user", examples=["u-77"])]
ExpiresIn = Annotated[int, Meta(ge=60, le=7 * 86400, description="Seconds in which it may be paid")]
MetadataKey = Annotated[str, Meta(min_length=1, max_length=40)]
MetadataValue = Annotated[str, Meta(max_length=500)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue], Meta(max_length=50, description="Yours; kept and shown, not used")
]

State = Annotated[str, Meta(min_length=1, max_length=32, pattern="^[a-z_]+$")]


class Payer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """Who pays, as far as the channel or method needs to know."""

    wallet: WalletName | None = None
    """For channel wallet: the wallet that pays."""
    openid: Openid | None = None
    """For jsapi."""
    ip: Ip | None = None
    """For h5."""


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No fields; the body may be left out."""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """What every list can be asked for."""

    limit: Limit = LIMIT_DEFAULT
    cursor: Cursor | None = None


class Filters(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A list that can be narrowed."""

    order_id: OrderId | None = None
    state: State | None = None
    created_from: Annotated[datetime, Meta(tz=True, description="Not older")] | None = None
    created_to: Annotated[datetime, Meta(tz=True, description="Older than this")] | None = None


Item = TypeVar("Item")


class Listed(msgspec.Struct, Generic[Item], frozen=True):
    """A page of a list, newest first."""

    data: list[Item]
    next_cursor: str | None
    """Give it back as cursor for the next page; null at the end."""


class Line(msgspec.Struct, frozen=True, gc=False):
    """One line of a statement. Versions count without gaps, and each balance is the one before plus the amount."""

    id: str
    at: datetime
    kind: str
    """payment, fee, refund, fee_refund, topup …"""
    amount: int
    """What it added to the balance; nothing while money is only held."""
    balance: int
    """After it."""
    held: int
    """What it added to what is held for a refund on its way."""
    version: int
    resource: str | None
    """What it was for."""
