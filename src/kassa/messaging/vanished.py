"""Packets that went from a queue at a broker though nobody received them: purged by somebody, or expired. Pure.

A broker says nothing of a purge. But whoever looks twice knows how many waited, and who alone could have received them meanwhile.
"""

from collections.abc import Hashable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from kassa.messaging.topology import EVENT_BATCHES, EVENTS

_IN_THE_LOG = frozenset({EVENTS.name, EVENT_BATCHES.name})
"""Topics that can be sent again from here."""
NOBODY = "nobody"
SPARE = timedelta(minutes=30)
"""What vanished may have been written so long before its queue was seen empty: it was in the hands of a consumer that ended (which
RabbitMQ lets have it for as long), or a relay was behind."""


class Look(NamedTuple):
    """What was seen of one queue."""

    waiting: int
    """Packets that no consumer has."""
    reader: Hashable | None
    """Our consumer, where it alone receives; NOBODY where there is none. None: others receive, or may; how much is not known."""
    came_before: int = 0
    """Packets that our consumer had received when the question was asked."""
    came_after: int = 0
    """The same when the answer was there."""
    window: int = 0
    """As many more may be on their way to it."""


class Vanished(NamedTuple):
    """What went."""

    packets: int
    """At least so many."""
    since: datetime | None
    """They were hardly sent before that; None: nobody knows when the oldest was."""
    is_sure: bool
    """Whether a consumer of ours was there all the time. Else somebody may have come, received them, and gone."""


class _Seen(NamedTuple):
    looks: Sequence[Look]
    at: datetime
    empty_at: datetime | None
    """When none of the queues had anything, last, nor at the look after that."""

    @property
    def is_empty(self) -> bool:
        return not any(one.waiting for one in self.looks)


class Levels:
    """Remembers what was seen of groups' queues."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Seen] = {}
        self._suspected: set[Hashable] = set()

    def see(self, group: Hashable, looks: Sequence[Look], at: datetime) -> Vanished | None:
        """A look at all queues of a group, in the same order each time; what vanished since the one before. It is told once the
        look after that says so too: a broker that has just lost a node may say that nothing waits."""
        before = self._seen.get(group)
        went = [] if before is None else [_went(*pair) for pair in zip(before.looks, looks, strict=True)]
        if any(went) and group not in self._suspected:
            self._suspected.add(group)
            return None
        self._suspected.discard(group)
        seen = _Seen(looks, at, None if before is None else before.empty_at)
        if before is not None and before.is_empty and seen.is_empty:
            seen = seen._replace(empty_at=before.at)
        self._seen[group] = seen
        if before is None or not any(went):
            return None
        since = None if before.empty_at is None else before.empty_at - SPARE
        is_sure = all(one.reader != NOBODY for one, packets in zip(looks, went, strict=True) if packets)
        return Vanished(sum(went), since, is_sure)

    def forget(self, group: Hashable) -> None:
        """Its queues are not those that were seen any more."""
        self._seen.pop(group, None)
        self._suspected.discard(group)


def how_to_have_again(topic: str, since: str) -> str:
    """What a person does who misses packets that were sent since then."""
    if topic in _IN_THE_LOG:
        return f"kassa queue replay relay:BROKER:{topic} --since {since}"
    return "whoever sent them sends them again: they are in no log of ours"


def _went(before: Look, now: Look) -> int:
    """What cannot have been received; whatever was sent meanwhile makes it less."""
    if before.reader is None or before.reader != now.reader:
        return 0
    return max(0, before.waiting - now.waiting - (now.came_after - before.came_before) - now.window)
