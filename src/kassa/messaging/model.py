"""What travels: records, deliveries, receipts, and what a binder can do by itself (`Traits`). Pure.

A *record* is one fact or one piece of work, with an id that never changes. A *delivery* is one hand-over of a record
to a consumer; it ends by being settled.

What there is one or more of for each record that passes is a Struct where nobody takes it apart by position: made in a third of
the time of a NamedTuple, and read in less.
"""

from datetime import datetime
from typing import NamedTuple

import msgspec

from kassa.ids import Id, event_name
from kassa.journal.change import Done

ATTEMPTS_HEADER = "kassa-attempts"
"""How often a record was tried before, for brokers that lose count when it is sent again."""


PRIORITY_MAX = 9


class Place(NamedTuple):
    """Where an event stands in its writer's chain."""

    writer: int
    seq: int
    ord: int


class LogRecord(NamedTuple):
    """One event."""

    place: Place
    home: int
    root: Id
    sequence: int
    at: datetime
    type: str
    data: bytes
    """JSON: the object as it was then."""

    @property
    def name(self) -> str:
        """Its public id."""
        return event_name(*self.place)


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One record on its way."""

    id: str
    """Names the record for ever: sent again it has the same id, and whoever handled it refuses it."""
    key: str
    """Records of one key arrive in the order in which they were sent; '' has no order."""
    body: bytes
    headers: dict[str, str]
    priority: int = 4
    """0 (can wait) to 9 (urgent)."""
    delay_s: float = 0.0
    """Not before so many seconds."""
    home: int = 0


class Packet(msgspec.Struct, frozen=True, gc=False):
    """One message of a broker: a record by itself, or an envelope of several."""

    id: str
    """Of the record, or of the envelope's first; names the packet when it is sent again."""
    key: str
    """Packets of one key stay in order; '' has none. Of an envelope: the number of its lane."""
    body: bytes
    headers: dict[str, str]
    """CloudEvents attributes begin with `ce-`; each broker's file gives them the prefix of its own protocol."""


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A packet in a consumer's hands."""

    packet: Packet
    redeliveries: int | None
    """How often it was handed out before without being settled; None: nobody counted, and it may have been."""
    sent_at: datetime | None
    token: object
    """The transport's own mark."""
    epoch: int
    """The session that it came with; settled in another one it counts as not settled, and comes again."""


class Confirmed(NamedTuple):
    """The broker has it, as durably as its traits say."""


class Failed(NamedTuple):
    """The broker does not have it."""

    reason: str
    is_retryable: bool


class Unknown(NamedTuple):
    """Nobody knows whether the broker has it: send it again under the same id."""

    reason: str


Receipt = Confirmed | Failed | Unknown


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """A record in a consumer's hands."""

    record: Record
    attempts: int
    """Failed ones before this."""
    sent_at: datetime | None
    token: object
    """The binder's own mark."""
    epoch: int
    """The session that it came with; settled in another one it counts as not settled, and comes again."""
    done: tuple[Done, ...] = ()
    """What the effect's own Change has to consume. With it the commit is the acknowledgement (PostgreSQL)."""
    alone: bool = False
    """Its consumers ended with it in hand, again and again: nothing else is handled beside it."""


class Ack(NamedTuple):
    """It is done; the effect is durable."""


class RetryAfter(NamedTuple):
    """Not now. Later records of its key wait behind it."""

    delay_s: float
    reason: str | None
    counts: bool = True
    """False: nobody tried it, it only waited behind another one."""


class Dead(NamedTuple):
    """Given up; a person will look at it. Later records of its key go on."""

    reason: str


Settlement = Ack | RetryAfter | Dead


class Depth(NamedTuple):
    """How much of a topic waits for a group."""

    waiting: int
    """Records that are not done, those in flight and delayed ones included."""
    in_flight: int
    delayed: int
    dead: int
    oldest_s: float | None
    """Age of the oldest record that could be handled now."""


class Traits(NamedTuple):
    """What Kassa leaves to a broker. The rest it supplies from its own tables (`supplied.py`), also where the broker could do it,
    so behaviour is the same everywhere."""

    durable: bool
    """Confirmed records survive the death of the broker."""
    ordered: bool
    """Records of one key arrive in order, to one consumer at a time."""
    delay_max_s: float
    """The longest delay that it keeps by itself; 0: none."""
    priorities: int
    """How many classes of priority it tells apart; 1: none."""
    dead_letters: bool
    """It keeps what was given up, with reason and history."""
    counts_attempts: bool
    """It counts failed attempts of a record, also over a restart."""
    acknowledges_in_change: bool
    """The effect's commit is the acknowledgement (`Delivery.done`), so that no inbox is needed."""
    deduplicates: bool
    """A record that is sent again while it waits is there once."""
    batch_max: int
    """Records in one send."""
    bytes_max: int
    """Body of one packet."""
    reports_depth: bool
    request_reply: bool
