"""Which channels there are, what each can do, and how one is made of credentials. A new one is one line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kassa.channels import wechat
from kassa.channels.channel import Channel
from kassa.channels.model import Method
from kassa.errors import ChannelNotFound


class Opened(NamedTuple):
    """A channel, and where it is reached."""

    channel: Channel
    base_url: str


@dataclass(frozen=True, slots=True)
class ChannelKind:
    """What holds for every merchant's account at this channel."""

    open: Callable[[Mapping[str, Any]], Opened]
    """Raises SettingInvalid, which names the credential that is wrong."""
    methods: frozenset[Method]
    currencies: frozenset[str]
    refunds_max: int
    """Refunds of one payment, at most."""
    refund_gap_s: int
    """Seconds between two refunds of one payment, at least."""
    secrets: frozenset[str]
    """The credentials that must never be shown."""


def _open_wechat(credentials: Mapping[str, Any]) -> Opened:
    account = wechat.read_account(credentials)
    return Opened(wechat.WeChatPay(account), account.base_url)


CHANNELS: Mapping[str, ChannelKind] = {
    "wechat": ChannelKind(
        open=_open_wechat,
        methods=frozenset({Method.NATIVE, Method.JSAPI, Method.H5, Method.APP}),
        currencies=frozenset({wechat.CURRENCY}),
        refunds_max=wechat.REFUNDS_MAX,
        refund_gap_s=wechat.REFUND_GAP_S,
        secrets=wechat.SECRET_CREDENTIALS,
    ),
}


def open_channel(name: str, credentials: Mapping[str, Any]) -> Opened:
    """The channel of this name with these credentials. Raises ChannelNotFound, then SettingInvalid."""
    kind = CHANNELS.get(name)
    if kind is None:
        raise ChannelNotFound("There is no channel of this name.", channel=name)
    return kind.open(credentials)
