"""The small Protocols that a channel implements as far as it can. It has the methods it has; there are no stubs."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable

from kassa.channels.model import Charge, Nonce, Notice, Outcome, Refund, Request, Response, Steps

Nonces = Callable[[], Nonce]
"""Gives a fresh time and random token for each signed request."""


@runtime_checkable
class Charges(Protocol):
    """Takes money."""

    def charge(self, command: Charge, nonces: Nonces) -> Steps:
        """Ask for money: Pending(next_action) is the happy answer; Succeeded where the channel is immediate."""
        ...

    def query(self, number: str, nonces: Nonces) -> Steps:
        """What became of the charge with this number of ours."""
        ...

    def query_by_channel_id(self, channel_id: str, nonces: Nonces) -> Steps:
        """What became of the charge with this number of theirs."""
        ...

    def close(self, number: str, nonces: Nonces) -> Steps:
        """Ask the channel to close an unpaid charge: Closed when it agreed, Succeeded or Unknown otherwise."""
        ...


@runtime_checkable
class Refunds(Protocol):
    """Gives money back."""

    def refund(self, command: Refund, nonces: Nonces) -> Steps:
        """Ask to give money back: Pending is acceptance; Succeeded, Failed, Abnormal where the answer is final."""
        ...

    def query_refund(self, number: str, nonces: Nonces) -> Steps:
        """What became of the refund with this number of ours."""
        ...


@runtime_checkable
class Callbacks(Protocol):
    """Is called by its provider."""

    def read_callback(self, headers: Mapping[str, str], body: bytes, *, now: datetime) -> Notice:
        """What the provider tells us, once signature and age are checked.

        Raises ChannelMessageInvalid when it is not authentic, too old or not readable; of these, ChannelKeyUnknown
        when it names a key of the provider that we do not have (a forger can do that: refresh at a bounded rate only).
        Raises ChannelMismatch when it is authentic but meant for another account.
        """
        ...

    def callback_accepted(self) -> tuple[int, Mapping[str, str], bytes]:
        """The provider's own form of «taken»: status, headers, body."""
        ...

    def callback_refused(self, reason: str, *, status: int = 500) -> tuple[int, Mapping[str, str], bytes]:
        """The provider's own form of «not taken, send it again»; `status` is 4xx or 5xx."""
        ...


@dataclass(frozen=True, slots=True)
class FreshKeys:
    """The provider's keys were fetched: from now on use `channel`, which is the same account and knows them."""

    channel: "Channel"
    serials: tuple[str, ...]
    """Every key that it knows now."""


KeySteps = Generator[Request, Response, FreshKeys | Outcome]
"""A conversation that fetches keys; an Outcome says why there are none."""


@runtime_checkable
class KeyRefresh(Protocol):
    """Has provider keys that rotate."""

    def fetch_keys(self, nonces: Nonces) -> KeySteps:
        """Fetch the keys that the provider signs with now. Bounding how often is the caller's affair."""
        ...


Channel = Charges
"""The least that a channel is; the rest is asked with isinstance."""
