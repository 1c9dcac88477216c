"""The port to a broker: provision, send a batch with a receipt per record, receive by pull, settle each delivery.

A binder is one file in `binders/` and one line in `registry.py`. It translates and says honestly what it can do; retries,
dead letters, inbox, order after failure, circuit breakers and metrics live above it and are the same for all.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self, runtime_checkable

import asyncpg

from kassa.messaging.model import Delivery, Depth, Receipt, Record, Settlement, Traits
from kassa.messaging.topology import TOPOLOGY, Topic
from kassa.messaging.wake import Wakeups
from kassa.observability.meters import Meters


class Resources(NamedTuple):
    """What a binder may use of this process."""

    pool: "asyncpg.Pool[asyncpg.Record]"
    """Of the database that is its memory: retries, delays, dead letters."""
    wakeups: Wakeups
    topics: tuple[Topic, ...] = TOPOLOGY
    """What is sent and received; a topic that is not among them is taken for one without groups, lanes or envelopes."""
    meters: Meters | None = None
    """What passes is counted there; None: it is not."""


class Subscription(Protocol):
    """One consumer's stream of one topic for one group. Several subscriptions of a group share its records."""

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        """At most `limit` deliveries; waits up to `wait_s` for the first one. What is asked for is the credit:
        nothing more is fetched ahead without bound. Records of one key come in order, and only to one consumer at a
        time.

        Raises BrokerUnreachable.
        """
        ...

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        """Ends deliveries. False: not settled, because the session or lease that it came with is over; it comes
        again, so only the consumer's inbox makes its effect happen once. Never raises for that."""
        ...

    async def close(self, drain_s: float) -> None:
        """No more records; what was received may still be settled for `drain_s` seconds, the rest comes again
        elsewhere."""
        ...


class Binder(Protocol):
    """One broker."""

    name: str
    """What people call it: postgres, rabbitmq …"""
    traits: Traits
    """What the broker does by itself; all binders behave the same."""

    async def open(self) -> None:
        """Connects. Raises BrokerUnreachable. A connection that is lost later comes back by itself, as a new epoch."""
        ...

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool = False) -> list[str]:
        """Creates what is missing, and may be repeated; says what it did, or with `verify_only` what is missing."""
        ...

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """One receipt per record, in order. Never raises for the broker: a lost connection is Unknown, a topic that
        nobody receives is Failed, a broker that does not take more within `deadline_s` is Failed and retryable."""
        ...

    async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """Sends to an address that a request gave as `reply-to`; else like `send`."""
        ...

    async def subscribe(self, topic: str, group: str) -> Subscription:
        """A consumer of the group. Raises QueueNotFound when the topic has no such group, BrokerUnreachable."""
        ...

    async def pause(self, topic: str, group: str) -> None:
        """No consumer of the group gets anything until `resume`; what is sent waits. Survives a restart where the
        broker is durable."""
        ...

    async def resume(self, topic: str, group: str) -> None: ...

    async def depth(self, topic: str, group: str) -> Depth:
        """How much waits. Raises QueueNotFound."""
        ...

    async def close(self) -> None:
        """Lets go of every connection."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Elsewhere(Protocol):
    """A binder whose records wait outside of our database too, as long as nothing goes wrong with them."""

    async def depth_elsewhere(self, topic: str, group: str) -> int | None:
        """How many of the broker's messages wait there; an envelope is one. None: it cannot say.

        Raises QueueNotFound, BrokerUnreachable."""
        ...

    async def purge_elsewhere(self, topic: str, group: str, within_s: float) -> int:
        """Forgets what waits there and is in nobody's hands; says how many records. What a consumer holds, or fetched ahead,
        stays his; what there was no time for stays too. Raises QueueNotFound, BrokerUnreachable."""
        ...
