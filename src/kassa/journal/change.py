"""What one decision makes durable: a `Change`, and what the journal can answer to it. Pure.

A decision is a pure function that returns a Change; `journal.commit(change)` makes all of it durable, or none of it.
Where the decision depends on a root that exists already, it is given as a `Rule`: the journal calls it under the root's
lock, in order of arrival, with the root as it stands at that moment. So it cannot be stale, and of a hundred refunds at
once exactly those that fit get through, in one batch (docs/decisions/0002).
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from kassa.errors import KassaError
from kassa.ids import Id
from kassa.journal.table import Record, Table
from kassa.ledger.model import AccountKey, LedgerRefusal, Transfer

SYSTEM_HOME = 0
"""The home of what belongs to no merchant."""


class OnceKey(NamedTuple):
    """The second change with this key gets the first one's answer. Unique per home, operation and key."""

    operation: str
    key: str
    digest: bytes
    """Of path and validated body: another body under the same key is refused."""


class Claim(NamedTuple):
    """A name that must be new, for ever: an order_id, a refund_id. Unique per home and kind."""

    kind: str
    name: str
    resource: Id
    """What the name stands for from now on."""


class Move(NamedTuple):
    """A row changes: compare-and-set on `before.version`. `event` says why, as in the table of legal moves."""

    before: Record
    after: Record
    event: str


class Event(NamedTuple):
    """A fact about the change's root, for ever. Its sequence is given under the root's lock."""

    type: str
    data: bytes
    """JSON: the object as it was then."""


class Message(NamedTuple):
    """Work for one receiver: a row until it is done."""

    id: Id
    topic: str
    key: str
    """Messages of one key are handled in order."""
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    priority: int = 4
    """0 (can wait) to 9 (urgent)."""
    due: datetime | None = None
    """Not before; None: at once."""


class Timer(NamedTuple):
    """Something is due. Named by entity and kind, so setting it again replaces it; `due` None cancels it."""

    entity: Id
    kind: str
    due: datetime | None
    root: Id | None = None
    """The root that the entity belongs to, when it is not the entity itself."""


class TimerDone(NamedTuple):
    """This change acts on a timer that fired. Consumed, when the timer was set again or cancelled since."""

    entity: Id
    kind: str
    generation: int


class MessageDone(NamedTuple):
    """This change handles a message: its row goes in the same commit. Consumed, when it has gone already."""

    id: Id


class InboxDone(NamedTuple):
    """This change handles a record from a broker. Consumed, when the group has handled the record before."""

    group: str
    record: str


Done = TimerDone | MessageDone | InboxDone


class Reply(NamedTuple):
    """What a repeat of the request gets: the first status with the resource as it stands then, or the stored problem."""

    status: int
    resource: Id | None
    problem: bytes | None = None


class AccountOpen(NamedTuple):
    """An account that comes into being with this change, or whose limits change."""

    key: AccountKey
    limit: int
    overdraft: int = 0


class Aggregate(NamedTuple):
    """A root and the children that the rule asked for, as they stand under the root's lock."""

    root: Record
    children: tuple[Record, ...]


class Rule(NamedTuple):
    """A decision about a root that exists, made under its lock.

    decide: pure; gets the aggregate and the batch's time; returns the Change (home, root, once and claims of the outer
    one count) or the error that refuses it. It may be called more than once.
    children: which child tables it needs, all rows of the root; `ids` narrows them to these.
    """

    table: Table
    id: Id
    decide: "Callable[[Aggregate, datetime], Change | KassaError]"
    children: tuple[Table, ...] = ()
    ids: tuple[Id, ...] = ()


class Change(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that one decision makes durable: everything in it, or nothing."""

    home: int
    once: OnceKey | None = None
    claims: tuple[Claim, ...] = ()
    opens: tuple[AccountOpen, ...] = ()
    new: tuple[Record, ...] = ()
    moves: tuple[Move, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    root: Id | None = None
    """The root that events, new children and moves belong to; a new root, or the rule's."""
    events: tuple[Event, ...] = ()
    messages: tuple[Message, ...] = ()
    timers: tuple[Timer, ...] = ()
    done: tuple[Done, ...] = ()
    reply: Reply | None = None
    rule: Rule | None = None
    result: Any = None
    """For the caller: what the decision wants to hand back (the object as it stands after it)."""


# Answers. Refusals are values, one per change; they never disturb the other changes of a batch.


class Committed(NamedTuple):
    """It is durable."""

    result: Any
    at: datetime
    writer: int
    sequence: int
    """The change's place in its writer's chain."""


class Again(NamedTuple):
    """This key was used for the same request before; here is its answer. Nothing new happened."""

    reply: Reply


class KeyReused(NamedTuple):
    """This key was used for another request."""

    key: OnceKey


class Taken(NamedTuple):
    """A claimed name is not new."""

    claim: Claim
    by: Id


class Stale(NamedTuple):
    """A row is not as the decision saw it. Read again and decide again."""

    table: str
    id: Id


class Missing(NamedTuple):
    """The rule's root does not exist in this home."""

    table: str
    id: Id


class Consumed(NamedTuple):
    """What the change wanted to consume is gone: somebody else did it."""

    done: Done


class Refused(NamedTuple):
    """The rule said no."""

    error: KassaError


class Money(NamedTuple):
    """The ledger said no."""

    refusal: LedgerRefusal


Refusal = Again | KeyReused | Taken | Stale | Missing | Consumed | Refused | Money
Verdict = Committed | Refusal
