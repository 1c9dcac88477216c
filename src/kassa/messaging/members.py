"""Who consumes what now, in all processes: how several consumers share out the lanes of a group on a broker that does not.

Each says every second that it is there, in PostgreSQL, and learns who else is. What comes of it is only a proposal: the
broker lets one consumer have a lane (RabbitMQ: the single active consumer), so a wrong one costs speed and nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg

from kassa.db.away import AWAY
from kassa.db.queries import load
from kassa.errors import BrokerUnreachable

_SQL = load("kassa.messaging")

BEAT_S = 1.0
"""How often a consumer says that it is there; others learn of it as late as that."""
GONE_S = 4.0
"""Who was silent for so long is not there: some beats may be late on a busy machine."""


class Member(NamedTuple):
    """One consumer of a place (a broker's topic, for a group)."""

    place: str
    id: str
    """Later ones have greater ids, so that a newcomer moves few lanes."""
    in_hand: int
    """Packets that it has and has not settled."""


class Members:
    """The consumers' list."""

    def __init__(self, pool: "asyncpg.Pool[Any]") -> None:
        self._pool = pool

    async def announce(self, mine: Sequence[Member]) -> dict[str, dict[str, int]]:
        """Says that these are there; gives everybody at their places: place → id → in hand, in the order of their ids.

        Raises BrokerUnreachable when the database is away.
        """
        places, ids = [one.place for one in mine], [one.id for one in mine]
        try:
            rows = await self._pool.fetch(_SQL.announce_consumers, places, ids, [one.in_hand for one in mine], GONE_S)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        found: dict[str, dict[str, int]] = {place: {} for place in places}
        for place, id, in_hand in sorted([*rows, *mine]):
            found[place][id] = in_hand
        return found

    async def at(self, place: str) -> dict[str, int]:
        """Who is there, without being one of them. Raises BrokerUnreachable when the database is away."""
        try:
            rows = await self._pool.fetch(_SQL.consumers_at, place, GONE_S)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        return {id: in_hand for id, in_hand in rows}

    async def leave(self, ids: Sequence[str]) -> None:
        """These are not there any more, and neither are those who died long ago. Raises BrokerUnreachable."""
        try:
            await self._pool.execute(_SQL.forget_consumers, ids)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error


def share(lanes: int, members: Mapping[str, int] | Sequence[str], me: str) -> set[int]:
    """My lanes among those of all members: neighbours, so that few move when one comes or goes. Pure."""
    ids = sorted(members)
    return {number for number in range(lanes) if ids[number * len(ids) // lanes] == me} if me in ids else set()
