"""The port to one broker's wire: what a broker file has to do. `supplied.py` makes a `Binder` of it.

A transport moves packets and says honestly what became of them. It knows nothing of retries, delays, dead letters, inboxes
or priorities: those are Kassa's, from its own tables, and so the same on every broker.
"""

from collections.abc import Sequence
from typing import Protocol

from kassa.messaging.model import Arrival, Packet, Receipt, Traits
from kassa.messaging.topology import Topic


class Stream(Protocol):
    """One consumer's packets of one topic for one group. Several streams of a group share its packets.

    Packets of one key come in order, and only to one stream at a time: a broker's lane (queue, partition, message group) has
    one active consumer. What comes and is not settled when the session ends comes again, to whoever has the lane then.
    """

    async def receive(self, limit: int, wait_s: float) -> list[Arrival]:
        """At most `limit` packets; waits up to `wait_s` for the first one. What is asked for is the credit: nothing more is
        fetched ahead without bound, and a stream that nobody asks keeps its place in the group. When it is cancelled nothing
        is lost.

        Raises BrokerUnreachable; the session comes back by itself, as a new epoch.
        """
        ...

    def held(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """Of each whether the session that it came with still goes on. If not, somebody else gets it, so it is dropped here."""
        ...

    async def settle(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """They are done. False: not settled, because the session that they came with is over (also after `close`), or the
        broker did not take it: they come again. Never raises for that.

        True does not wait for the broker, where that is slow (Kafka, RabbitMQ): it is told at once or within milliseconds, and
        `close` lets it hear of everything. Should the process die before, they come again and the inbox refuses them."""
        ...

    async def restart(self) -> None:
        """Ends the session: everything that was not settled comes again, in order, in a new epoch."""
        ...

    async def close(self) -> None:
        """Ends the session for good."""
        ...


class Transport(Protocol):
    """One broker."""

    name: str
    """What people call it: rabbitmq, kafka …"""
    traits: Traits

    async def open(self) -> None:
        """Connects. Raises BrokerUnreachable, SettingInvalid. A connection that is lost later comes back by itself."""
        ...

    async def close(self) -> None:
        """Lets go of every connection."""
        ...

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool) -> list[tuple[str, str]]:
        """Creates what is missing, and may be repeated; says which (topic, group) it created ('' for a topic without groups),
        or with `verify_only` which are missing, creating nothing and needing no right to.

        Raises BrokerUnreachable, QueueMismatch where something of that name is there in another form.
        """
        ...

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        """One receipt per packet, in order. Never raises for the broker: a connection that was lost is Unknown; a topic that
        is not there and not ours to make again, or that nobody receives (where `must_arrive`), is Failed for good; a broker
        that takes no more within `deadline_s` is Failed and retryable where nothing left us, else Unknown.

        Packets of one key leave in order; whoever sends one again after others of its key arrived has lost their order, so
        senders who care have one of a key under way at a time."""
        ...

    async def reply(self, address: str, packets: Sequence[Packet], *, deadline_s: float) -> list[Receipt]:
        """Sends to an address that a request gave as `reply-to`: a queue on RabbitMQ, a topic elsewhere. An address that
        does not exist is Failed for good where the broker can tell."""
        ...

    async def subscribe(self, topic: Topic, group: str) -> Stream:
        """A consumer of the group. Raises QueueNotFound when the topic has no such group, BrokerUnreachable."""
        ...

    async def depth(self, topic: Topic, group: str) -> int | None:
        """Packets that wait for the group, those in somebody's hands included as far as the broker tells; None where it
        cannot say. Raises QueueNotFound, BrokerUnreachable."""
        ...
