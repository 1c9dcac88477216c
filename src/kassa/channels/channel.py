"""The small Protocols that a channel implements as far as it can. A channel has the methods it has; there are no stubs."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Protocol, runtime_checkable

from kassa.channels.model import Charge, Nonce, Notice, Refund, Request, Steps

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
        """What the provider tells us, once signature and age are checked. Raises ChannelMessageInvalid."""
        ...

    def callback_accepted(self) -> tuple[int, Mapping[str, str], bytes]:
        """The provider's own form of «taken»: status, headers, body."""
        ...

    def callback_refused(self, reason: str) -> tuple[int, Mapping[str, str], bytes]:
        """The provider's own form of «not taken, send it again»."""
        ...


@runtime_checkable
class KeyRefresh(Protocol):
    """Has provider keys that rotate: knows how to fetch them and which are missing."""

    def fetch_keys(self, nonces: Nonces) -> "object":
        """A generator that yields requests and returns a new channel object that knows the fetched keys."""
        ...


Channel = Charges
"""The least that a channel is; the rest is asked with isinstance."""

__all__ = ["Callbacks", "Channel", "Charges", "KeyRefresh", "Nonces", "Refunds", "Request"]
