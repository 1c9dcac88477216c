"""A broker inside this process, for tests of what uses one: lanes, groups, sessions and redelivery, and no durability.

It speaks the port to a broker's wire like the others, so retries, delays and dead letters come from the same tables.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count

from kassa.clock import Clock, SystemClock
from kassa.errors import InvariantBroken, QueueNotFound
from kassa.messaging.binder import Resources
from kassa.messaging.model import Arrival, Confirmed, Failed, Packet, Receipt, Traits
from kassa.messaging.supplied import SuppliedBinder
from kassa.messaging.topology import Topic, lane

TRAITS = Traits(
    durable=False, ordered=True, delay_max_s=0.0, priorities=1, dead_letters=False, counts_attempts=True,
    acknowledges_in_change=False, deduplicates=False, batch_max=1000, bytes_max=16 * 1024 * 1024, reports_depth=True,
    request_reply=True,
)  # fmt: skip


def make_binder(url: str, resources: Resources) -> SuppliedBinder:
    """A broker of its own for each binder; `url` says nothing more."""
    return SuppliedBinder(MemoryTransport(), resources)


class _Lane:
    """Packets in order, those in a stream's hands apart; one stream has it at a time."""

    def __init__(self) -> None:
        self.owner: MemoryStream | None = None
        self.waiting: deque[tuple[int, Packet]] = deque()
        self.handed: dict[int, Packet] = {}
        """By serial number, in order."""

    def give_back(self) -> list[int]:
        """What its owner had comes again first; says which."""
        serials = list(self.handed)
        self.waiting.extendleft(reversed(self.handed.items()))
        self.handed.clear()
        return serials


class _Group:
    """The lanes of one group of a topic, shared out among its streams."""

    def __init__(self, lanes: int) -> None:
        self.lanes = [_Lane() for _ in range(lanes)]
        self.streams: list[MemoryStream] = []
        self.handed: dict[int, int] = {}
        """How often a packet was handed out and given back, by serial number."""

    def share_out(self) -> None:
        """Each lane to one stream; a lane that changes hands gives back what was in them."""
        for number, one in enumerate(self.lanes):
            owner = self.streams[number % len(self.streams)] if self.streams else None
            if owner is not one.owner:
                self.count(one.give_back())
                one.owner = owner
        for stream in self.streams:
            stream.wake()

    def count(self, serials: Iterable[int]) -> None:
        for serial in serials:
            self.handed[serial] = self.handed.get(serial, 0) + 1


class MemoryTransport:
    """Topics in this process."""

    name = "memory"
    traits = TRAITS

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._topics: dict[str, dict[str, _Group]] = {}
        self._serials = count(1)

    async def open(self) -> None:
        """Nothing to connect."""

    async def close(self) -> None:
        """Nothing to let go of."""

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool) -> list[tuple[str, str]]:
        said: list[tuple[str, str]] = []
        for topic in topics:
            groups = self._topics.get(topic.name, {})
            for group in topic.groups:
                if group not in groups:
                    said.append((topic.name, group))
                    if not verify_only:
                        groups[group] = _Group(topic.lanes)
            if not verify_only:
                self._topics[topic.name] = groups
        return said

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        groups = self._topics.get(topic.name)
        if groups is None or (must_arrive and not groups):
            return [Failed(f"nobody receives {topic.name}", is_retryable=False)] * len(packets)
        for packet in packets:
            for group in groups.values():
                one = group.lanes[lane(packet.key or packet.id, len(group.lanes))]
                one.waiting.append((next(self._serials), packet))
                if one.owner is not None:
                    one.owner.wake()
        return [Confirmed()] * len(packets)

    async def reply(self, address: str, packets: Sequence[Packet], *, deadline_s: float) -> list[Receipt]:
        return await self.send(Topic(address, (), ""), packets, deadline_s=deadline_s, must_arrive=True)

    async def subscribe(self, topic: Topic, group: str) -> "MemoryStream":
        found = self._group(topic, group)
        stream = MemoryStream(found, self._clock)
        found.streams.append(stream)
        found.share_out()
        return stream

    async def depth(self, topic: Topic, group: str) -> int | None:
        return sum(len(one.waiting) + len(one.handed) for one in self._group(topic, group).lanes)

    def _group(self, topic: Topic, group: str) -> _Group:
        found = self._topics.get(topic.name, {}).get(group)
        if found is None:
            raise QueueNotFound(topic=topic.name, group=group)
        return found


class MemoryStream:
    """A consumer: the packets of the lanes that it has."""

    def __init__(self, group: _Group, clock: Clock) -> None:
        self._group = group
        self._clock = clock
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    async def receive(self, limit: int, wait_s: float) -> list[Arrival]:
        try:
            async with asyncio.timeout(wait_s):
                while not (found := self._take(limit)):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return []
        return found

    def held(self, arrivals: Sequence[Arrival]) -> list[bool]:
        return [self._lane_of(arrival) is not None for arrival in arrivals]

    async def settle(self, arrivals: Sequence[Arrival]) -> list[bool]:
        return [self._settle(arrival) for arrival in arrivals]

    def _settle(self, arrival: Arrival) -> bool:
        mine = self._lane_of(arrival)
        if mine is None:
            return False
        serial = _serial(arrival)
        del mine.handed[serial]
        self._group.handed.pop(serial, None)
        return True

    def _lane_of(self, arrival: Arrival) -> _Lane | None:
        serial = _serial(arrival)
        if self._group.handed.get(serial, 0) != arrival.epoch:
            return None
        return next((one for one in self._group.lanes if one.owner is self and serial in one.handed), None)

    async def restart(self) -> None:
        for one in self._group.lanes:
            if one.owner is self:
                self._group.count(one.give_back())
        self.wake()

    async def close(self) -> None:
        self._group.streams.remove(self)
        self._group.share_out()

    def _take(self, limit: int) -> list[Arrival]:
        found: list[Arrival] = []
        for one in self._group.lanes:
            while one.owner is self and one.waiting and len(found) < limit:
                serial, packet = one.waiting.popleft()
                one.handed[serial] = packet
                redeliveries = self._group.handed.get(serial, 0)
                found.append(Arrival(packet, redeliveries, self._clock.now(), serial, redeliveries))
        return found


def _serial(arrival: Arrival) -> int:
    if not isinstance(arrival.token, int):
        raise InvariantBroken("A packet of another transport was settled here.", packet=arrival.packet.id)
    return arrival.token
