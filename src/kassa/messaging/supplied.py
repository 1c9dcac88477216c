"""A binder made of a broker's transport and Kassa's own tables: what the broker lacks is supplied, the same for all.

The broker is the way of records that nothing goes wrong with. Whatever has to wait (a delay, a retry, what comes behind it
in its key) or was given up is a row in PostgreSQL, in the queue of the topic and group, where the PostgreSQL binder would
have it. So retries, order after a failure, delays, dead letters and pausing behave alike on every broker, survive its death,
and are operated by the same commands (docs/decisions/0005).
"""

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Self

import msgspec
import structlog

from kassa.clock import Clock, SystemClock
from kassa.errors import BrokerUnreachable, InvariantBroken
from kassa.ids import new_id
from kassa.messaging.binder import Resources, Subscription
from kassa.messaging.binders.postgres import Parked, PostgresBinder, PostgresSubscription, queue_name
from kassa.messaging.model import (
    Ack,
    Arrival,
    Dead,
    Delivery,
    Depth,
    Failed,
    Receipt,
    Record,
    RetryAfter,
    Settlement,
)
from kassa.messaging.packing import Packed, Undecodable, pack, single, strangers_id, unpack
from kassa.messaging.topology import Topic, class_of, of_class, travelling
from kassa.messaging.transport import Stream, Transport
from kassa.messaging.wake import MESSAGES, POLL_S, Watch
from kassa.messaging.work import LAPSES_ALONE
from kassa.observability.meters import Meters, Passage
from kassa.supervisor import end_tasks

log = structlog.get_logger("kassa.messaging.supplied")

CREDIT = 100
"""Packets of one class that are asked for at once and kept until somebody wants them, at most; or twice as many as whoever receives
asks for, if that is more: more is fetched when half is taken, and who asks gets a full batch."""
CREDIT_FIRST, AHEAD_BYTES = 20, 1024 * 1024
"""Packets may be envelopes of many records, so what is fetched ahead is bounded in bytes, by the size of the last ones."""
FRESH_S = 0.1
"""That our own queue is empty is believed for so long, by everybody; it is looked at again at half that time."""
SEEN_S = 1.5 * FRESH_S
"""What was put there is seen by everybody after that."""
ASK_S = 1.0
"""A broker is asked for so long at a time: a group that is paused takes nothing more after that."""
CRASHES_MAX = 5
"""A packet that was handed out so often without being settled is opened up: its records go on alone, counted by us."""
EPOCHS_MAX = 256
"""Lanes that came to a consumer of which it is remembered that a first packet came."""
GLANCE_S = 0.02
"""Our own queue is looked at no more often than this while the broker delivers."""
PAUSE_S = 1.0
PURGE_FIRST_S = 5.0
"""A new consumer has to find its group together; Kafka's takes some seconds."""
PURGE_NEXT_S = 1.0


class SuppliedBinder:
    """One broker, complete."""

    def __init__(self, transport: Transport, resources: Resources, *, clock: Clock | None = None) -> None:
        self.name = transport.name
        self.traits = transport.traits
        self.transport = transport
        self._wakeups = resources.wakeups
        self._memory = PostgresBinder(resources.pool, resources.wakeups, meters=resources.meters)
        self._topics = {topic.name: topic for topic in resources.topics}
        self._clock = clock or SystemClock()
        self._meters = resources.meters or Meters()

    async def open(self) -> None:
        await self.transport.open()

    async def close(self) -> None:
        await self.transport.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool = False) -> list[str]:
        """The broker's part first: a group that is in our tables is there as a whole. Others may make that part; nobody else writes
        into our tables that its groups are received, so that is done also where the broker's part is only looked at, and is all
        there. Priority classes are topics of the broker's, each told by its own name."""
        self._topics.update((topic.name, topic) for topic in topics)
        expanded = [one for topic in topics for one in travelling(topic)]
        word = "missing" if verify_only else "created"
        said = [
            f"{word}: {queue_name(topic, group) if group else topic}"
            for topic, group in await self.transport.provision(expanded, verify_only=verify_only)
        ]
        if verify_only:
            if not said:
                await self._memory.provision(topics)
            return said
        return said + [line for line in await self._memory.provision(topics) if line not in said]

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """What is delayed waits in our own queues, the rest goes to the broker. These and the classes go side by side: none takes
        another one's time, and they have no order among each other."""
        known = self._topic(topic)
        if not known.classes and not any([record.delay_s > 0 for record in records]):
            return await self._send(known, records, deadline_s)
        at_once: dict[Topic, list[int]] = {}
        delayed: list[int] = []
        for place, record in enumerate(records):
            if record.delay_s > 0:
                delayed.append(place)
            elif known.classes:
                at_once.setdefault(of_class(known, class_of(record.priority)), []).append(place)
            else:
                at_once.setdefault(known, []).append(place)
        parts = list(at_once.values())
        sending = [self._send(raw, [records[place] for place in places], deadline_s) for raw, places in at_once.items()]
        if delayed:
            parts.append(delayed)
            sending.append(self._memory.send(topic, [records[place] for place in delayed], deadline_s=deadline_s))
        receipts: dict[int, Receipt] = {}
        for places, answers in zip(parts, await asyncio.gather(*sending), strict=True):
            receipts.update(zip(places, answers, strict=True))
        return [receipts[place] for place in range(len(records))]

    async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        return await self.transport.reply(address, [single(record) for record in records], deadline_s=deadline_s)

    async def subscribe(self, topic: str, group: str) -> Subscription:
        known = self._topic(topic)
        # In our tables first: a broker may make a group of any name by itself.
        await self._memory.is_paused(topic, group)
        streams: list[Stream] = []
        try:
            for raw in travelling(known):
                streams.append(await self.transport.subscribe(raw, group))
            memory = await self._memory.subscribe(topic, group)
        except BaseException:
            # Raised again. Also when it is cancelled: a consumer that nobody has keeps what the broker gives it.
            await asyncio.shield(asyncio.gather(*(stream.close() for stream in streams)))
            raise
        return SuppliedSubscription(
            known.name, group, streams, self._memory, memory, self._wakeups.watch(MESSAGES),
            self._meters.passage(topic, group),
        )  # fmt: skip

    async def pause(self, topic: str, group: str) -> None:
        """Kept in the database, so it holds for every process and over restarts."""
        await self._memory.pause(topic, group)

    async def resume(self, topic: str, group: str) -> None:
        await self._memory.resume(topic, group)

    async def depth(self, topic: str, group: str) -> Depth:
        """Our own queue and the broker's together. An envelope counts as one there."""
        ours = await self._memory.depth(topic, group)
        return ours._replace(waiting=ours.waiting + (await self.depth_elsewhere(topic, group) or 0))

    async def depth_elsewhere(self, topic: str, group: str) -> int | None:
        """What waits at the broker. None: it cannot say."""
        found = [await self.transport.depth(raw, group) for raw in travelling(self._topic(topic))]
        return None if None in found else sum(count or 0 for count in found)

    async def purge_elsewhere(self, topic: str, group: str, within_s: float) -> int:
        """Takes what nobody has as one more consumer, and settles it without handling. Lanes that a running consumer has stay
        his, with all that waits in them."""
        gone, clock = 0, asyncio.get_running_loop().time
        deadline = clock() + within_s
        for raw in travelling(self._topic(topic)):
            stream = await self.transport.subscribe(raw, group)
            try:
                wait_s = PURGE_FIRST_S
                while clock() < deadline and (arrivals := await stream.receive(CREDIT, wait_s)):
                    settled = await stream.settle(arrivals)
                    gone += sum(_count(one) for one, is_gone in zip(arrivals, settled, strict=True) if is_gone)
                    wait_s = PURGE_NEXT_S
            finally:
                await stream.close()
        return gone

    def _topic(self, name: str) -> Topic:
        return self._topics.get(name) or Topic(name, (), "")

    async def _send(self, topic: Topic, records: Sequence[Record], deadline_s: float) -> list[Receipt]:
        # What travels by itself needs no list of places.
        if not topic.envelopes and max([len(record.body) for record in records], default=0) <= self.traits.bytes_max:
            return await self.transport.send(
                topic, [single(record) for record in records], deadline_s=deadline_s, must_arrive=bool(topic.groups)
            )
        packed = pack(topic, records, self._clock.now())
        fitting = [one for one in packed if len(one.packet.body) <= self.traits.bytes_max]
        # What is not among the fitting is not sent.
        too_large = Failed(f"larger than the {self.traits.bytes_max} bytes of {self.name}", is_retryable=False)
        receipts: list[Receipt] = [too_large] * len(records)
        if fitting:
            answers = await self.transport.send(
                topic, [one.packet for one in fitting], deadline_s=deadline_s, must_arrive=bool(topic.groups)
            )
            for one, answer in zip(fitting, answers, strict=True):
                _fill(receipts, one, answer)
        return receipts


def _fill(receipts: list[Receipt], packed: Packed, receipt: Receipt) -> None:
    for place in packed.places:
        receipts[place] = receipt


class _Parcel(msgspec.Struct, eq=False, gc=False):
    """A packet in our hands, until the last of its records is settled."""

    arrival: Arrival
    stream: Stream
    left: int
    suspect: str = ""
    """What it is counted under; '' where that is not done."""


class _Ahead:
    """One class of a topic: its stream, and what it brought that nobody has asked for yet."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.arrivals: deque[Arrival] = deque()
        self.came_at = -math.inf
        """When the last ones came, by the loop's clock."""
        self.credit = CREDIT_FIRST
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.lost: BrokerUnreachable | None = None
        self._uncounted: dict[int, int] = {}
        """By epoch, where nobody counts how often packets are handed out: how many that come next have ended too many consumers."""

    def is_first(self, arrival: Arrival) -> bool:
        """Whether nobody counts how often it was handed out, and it is the first such one of its lane here."""
        if arrival.redeliveries is not None or arrival.epoch in self._uncounted:
            return False
        if len(self._uncounted) > EPOCHS_MAX:
            self._uncounted.clear()
        self._uncounted[arrival.epoch] = 0
        return True

    def wear(self, epoch: int, packets: int) -> None:
        """Who had this lane before ended again and again with one of so many in hand."""
        self._uncounted[epoch] = packets

    def is_worn(self, arrival: Arrival) -> bool:
        """Whether it has ended too many consumers, or may have. To be asked once of each."""
        if arrival.redeliveries is not None:
            return arrival.redeliveries >= CRASHES_MAX
        if left := self._uncounted.get(arrival.epoch, 0):
            self._uncounted[arrival.epoch] = left - 1
        return left > 0

    def bring(self, arrivals: Sequence[Arrival], limit: int, now: float) -> None:
        """These came. limit: how many may be ahead from now on."""
        self.arrivals.extend(arrivals)
        self.came_at = now
        size = sum([len(one.packet.body) for one in arrivals]) // len(arrivals)
        self.credit = max(1, min(limit, 2 * self.credit, AHEAD_BYTES // max(1, size)))
        self.look_for_room()

    def look_for_room(self) -> None:
        """More is asked for once half of it was taken, so that who receives gets full batches."""
        if len(self.arrivals) <= self.credit // 2:
            self.has_room.set()
        else:
            self.has_room.clear()


class SuppliedSubscription:
    """A group's records from the broker and from our own queue, as one."""

    def __init__(
        self,
        topic: str,
        group: str,
        streams: Sequence[Stream],
        tables: PostgresBinder,
        memory: PostgresSubscription,
        watch: Watch,
        passage: Passage,
    ) -> None:
        """streams: urgent ones first. passage: where what is given up here is counted."""
        self._topic = topic
        self._group = group
        self._tables = tables
        self._memory = memory
        self._watch = watch
        self._passage = passage
        self._ahead = [_Ahead(stream) for stream in streams]
        self._opened: deque[tuple[_Parcel, list[Delivery]]] = deque()
        """Envelopes of which some is handed out, and the rest of each."""
        self._held: set[_Parcel] = set()
        """Parcels in hand."""
        self._worn: set[_Parcel] = set()
        """Those that have ended too many consumers."""
        self._suspects: list[tuple[_Ahead, _Parcel]] = []
        """The first of lanes whose packets nobody counts: to be counted before they are handed out."""
        self._batch = 0
        """As many as the last one who received asked for."""
        self._opened_at = -math.inf
        """When the last packets came that were opened."""
        self._empty_at = -math.inf
        """When the last look began that found our own queue empty."""
        self._kept_at = -math.inf
        """When something was last put there from here, or taken."""
        self._keeping = 0
        """How much is being put there now."""
        self._looking: asyncio.Task[None] | None = None
        self._unseen: set[asyncio.Task[None]] = set()
        """Each settles packets once everybody has seen what was put into our own queue instead."""
        self._drained = asyncio.Event()
        self._is_closed = False
        self._is_paused = False
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._look_at = 0.0
        """When our own queue is looked at next, by the loop's clock."""
        self._pumps = [asyncio.create_task(self._pump(ahead), name="stream") for ahead in self._ahead]

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        self._batch = limit
        while not self._is_closed:
            found = await self._from_memory(max(1, limit // 2), clock())
            if not self._is_paused and not any(one.alone for one in found):
                try:
                    found += await self._from_broker(limit - len(found))
                except BrokerUnreachable:
                    # What was taken from our own queue does not wait for the broker; who asks again is told.
                    if not found:
                        raise
                except BaseException:
                    # Raised again. Also when it is cancelled: nobody would get these.
                    self._memory.forgo(found)
                    raise
            if found:
                return found
            left_s = deadline - clock()
            if left_s <= 0:
                return []
            if await self._watch.wait(max(0.0, min(left_s, self._look_at - clock()))):
                self._look_at = min(self._look_at, clock() + GLANCE_S) if self._has_news() else 0.0
        return []

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        parcels = [delivery.token for delivery, _ in settled if isinstance(delivery.token, _Parcel)]
        if len(parcels) == len(settled):
            if all([isinstance(end, Ack) for _, end in settled]):
                return await self._count_down(parcels)
            return await self._settle_parcels(settled)
        ours = [place for place, (delivery, _) in enumerate(settled) if not isinstance(delivery.token, _Parcel)]
        theirs = sorted(set(range(len(settled))).difference(ours))
        results = [False] * len(settled)
        for places, settle in ((ours, self._memory.settle), (theirs, self._settle_parcels)):
            if places:
                answers = await settle([settled[place] for place in places])
                for place, answer in zip(places, answers, strict=True):
                    results[place] = answer
        return results

    async def close(self, drain_s: float) -> None:
        self._is_closed = True
        self._watch.nudge()
        await end_tasks(*self._pumps, *([self._looking] if self._looking else []))
        if self._unseen:
            await asyncio.wait(self._unseen)
        if self._held:
            self._drained.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._drained.wait()
        try:
            await asyncio.gather(*(ahead.stream.close() for ahead in self._ahead))
        finally:
            await self._memory.close(0.0)

    # Receiving

    async def _pump(self, ahead: _Ahead) -> None:
        """Asks the broker whenever there is room, so that one class never waits for another."""
        clock = asyncio.get_running_loop().time
        has_stumbled = False
        while True:
            await ahead.has_room.wait()
            # What waits for a paused group waits at the broker, where it is counted and may be purged.
            await self._resumed.wait()
            try:
                if has_stumbled:
                    await self._start_again({ahead.stream})
                    has_stumbled = False
                arrivals = await ahead.stream.receive(ahead.credit - len(ahead.arrivals), ASK_S)
            except BrokerUnreachable as error:
                ahead.lost = error
                self._watch.nudge()
                await asyncio.sleep(PAUSE_S)
                continue
            except Exception as error:
                # The outermost loop of a stream: what a transport could not bear must not stop it without a word.
                log.exception("supplied.stream_crashed", topic=self._topic, group=self._group)
                ahead.lost = BrokerUnreachable(f"receiving failed: {error!r}", topic=self._topic, group=self._group)
                self._watch.nudge()
                await asyncio.sleep(PAUSE_S)
                has_stumbled = True
                continue
            if arrivals:
                ahead.bring(arrivals, max(CREDIT, 2 * self._batch), clock())
                self._watch.nudge()
                if self._looking is None and not self._is_empty(ahead.came_at, FRESH_S / 2):
                    self._looking = asyncio.create_task(self._look(), name="look for parked records")

    async def _look(self) -> None:
        """Whether our own queue is empty, asked after packets came and while those before them are handled."""
        clock = asyncio.get_running_loop().time
        try:
            while True:
                began = clock()
                if await self._tables.is_empty(self._topic, self._group):
                    self._empty_at = began
                if len(self._ahead) == 1 or began >= max([ahead.came_at for ahead in self._ahead]):
                    break
        except BrokerUnreachable:
            # Who wants to hand them out asks for himself, and is told.
            pass
        finally:
            self._looking = None

    async def _from_memory(self, limit: int, now: float) -> list[Delivery]:
        """What is due in our own queue. Most of the time there is nothing, so it is looked at when a wake-up came, when
        something is due, and else four times a second."""
        if now < self._look_at:
            return []
        self._is_paused = await self._tables.is_paused(self._topic, self._group)
        if self._is_paused:
            self._resumed.clear()
        else:
            self._resumed.set()
        due_s = None if self._is_paused else await self._tables.next_due_s(self._topic, self._group)
        found: list[Delivery] = []
        if due_s is not None and due_s <= 0:
            found = await self._memory.receive(limit, 0.0)
            self._kept_at = asyncio.get_running_loop().time()
        soon_s = 0.0 if found else POLL_S if due_s is None else min(max(due_s, GLANCE_S), POLL_S)
        self._look_at = now + soon_s
        return found

    async def _from_broker(self, limit: int) -> list[Delivery]:
        lost: BrokerUnreachable | None = None
        for ahead in self._ahead:
            if ahead.lost is not None:
                lost = ahead.lost
                ahead.lost = None
        ready = self._rest(limit)
        try:
            for ahead in self._ahead:
                await self._open(ahead, limit, ready)
            if ready:
                return await self._past_parked(ready)
        except BaseException:
            # Raised again. Whatever it is, these would be nobody's; if the database is away, what has to come before them is in it.
            # So all of it again, later and in order.
            await asyncio.shield(self._start_again({_parcel(one).stream for one in ready}))
            raise
        if lost is not None:
            raise lost
        return []

    def _has_news(self) -> bool:
        return any(ahead.arrivals or ahead.lost for ahead in self._ahead)

    def _rest(self, limit: int) -> list[Delivery]:
        """Of the envelopes that were opened before."""
        ready: list[Delivery] = []
        while self._opened and (room := limit - len(ready)) > 0:
            parcel, deliveries = self._opened.popleft()
            if not all(parcel.stream.held([parcel.arrival])):
                self._let_go([parcel])
                continue
            ready += deliveries[:room]
            if len(deliveries) > room:
                self._opened.appendleft((parcel, deliveries[room:]))
        return ready

    async def _open(self, ahead: _Ahead, limit: int, ready: list[Delivery]) -> None:
        """Adds to `ready` what was brought, up to `limit`. Raises BrokerUnreachable."""
        waiting = list(islice(ahead.arrivals, limit - len(ready)))
        if not waiting:
            return
        self._opened_at = max(self._opened_at, ahead.came_at)
        stream = ahead.stream
        parcels: list[_Parcel] = []
        unreadable: list[tuple[Arrival, str]] = []
        for arrival, is_held in zip(waiting, stream.held(waiting), strict=True):
            if len(ready) >= limit:
                break
            ahead.arrivals.popleft()
            if not is_held:
                continue
            try:
                records = unpack(arrival.packet, new_id)
            except Exception as error:
                # Whatever reading a packet stumbles over is that packet's.
                reason = str(error) if isinstance(error, Undecodable) else f"it cannot be read: {error!r}"
                unreadable.append((arrival, reason))
                continue
            parcel = _Parcel(arrival, stream, len(records))
            parcels.append(parcel)
            if ahead.is_first(arrival):
                parcel.suspect = _name(arrival)
                self._suspects.append((ahead, parcel))
            elif ahead.is_worn(arrival):
                self._worn.add(parcel)
            for record in records:
                ready.append(Delivery(record, 0, arrival.sent_at, parcel, arrival.epoch))
        self._held.update(parcels)
        if len(ready) > limit:
            self._opened.append((parcels[-1], ready[limit:]))
            del ready[limit:]
        ahead.look_for_room()
        if empty := [parcel for parcel in parcels if not parcel.left]:
            await self._finish(empty)
        for arrival, reason in unreadable:
            await self._bury_whole(stream, arrival, reason)
        if unreadable:
            ready[:] = self._still_held(ready)

    async def _past_parked(self, ready: list[Delivery]) -> list[Delivery]:
        """Those that nothing holds up. What is behind a parked record of its key is parked too, and so is what has ended
        too many consumers, so that it goes on alone. Raises BrokerUnreachable."""
        if self._suspects:
            await self._count_suspects(ready)
        if not self._worn and self._is_empty(self._opened_at, FRESH_S):
            return ready
        # Those without a key have no order, so nothing holds them up but themselves.
        keys = {one.record.key for one in ready} - {""}
        held_up: set[str] = set()
        if keys and not await self._nothing_waits():
            held_up = await self._tables.parked_keys(self._topic, self._group, sorted(keys))
        held_up |= {one.record.key for one in ready if one.token in self._worn} - {""}
        going = await self._park_behind(ready, held_up) if held_up or self._worn else ready
        return self._still_held(going)

    async def _count_suspects(self, ready: Sequence[Delivery]) -> None:
        """A lane that began too often with the same packet has one that ends its consumers: at its beginning, where the last one
        stopped. Raises BrokerUnreachable."""
        suspects, self._suspects = self._suspects, []
        before = await self._tables.suspect(self._topic, self._group, [one.suspect for _, one in suspects])
        for (ahead, first), times in zip(suspects, before, strict=True):
            if times >= CRASHES_MAX:
                lane = (first.stream, first.arrival.epoch)
                ahead.wear(first.arrival.epoch, max(CREDIT, 2 * self._batch))
                self._worn.add(first)
                opened = {parcel for one in ready if (parcel := _parcel(one)).arrival.redeliveries is None}
                self._worn.update(parcel for parcel in opened if (parcel.stream, parcel.arrival.epoch) == lane)

    def _still_held(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Without those that somebody else gets now, since something was waited for."""
        gone = {_parcel(one) for one in deliveries if not (one.token in self._held and _is_held(one))}
        self._let_go(gone)
        return [one for one in deliveries if one.token not in gone]

    async def _nothing_waits(self) -> bool:
        """Whether nothing in our own queue has to come before what was opened.

        Whoever puts something there leaves its packet unsettled for longer than anybody believes that the queue is empty, and a
        lane brings nothing to another consumer before that: it comes with the unsettled packet first."""
        if self._looking is not None and not self._is_empty(self._opened_at, FRESH_S):
            await asyncio.wait([self._looking])
        return self._is_empty(self._opened_at, FRESH_S)

    def _is_empty(self, came_at: float, age_max_s: float) -> bool:
        """Whether our own queue was found empty not longer ago than that, and nothing was put there from here since."""
        since = asyncio.get_running_loop().time() - age_max_s
        if len(self._ahead) > 1:
            # A key's records of another class are in another lane, which may be somebody else's.
            since = max(since, came_at)
        return self._empty_at >= since and self._empty_at > self._kept_at and not self._keeping

    async def _park(self, rows: Sequence[Parked]) -> None:
        """Into our own queue. Raises BrokerUnreachable."""
        self._keeping += 1
        try:
            await self._tables.park(self._topic, self._group, rows)
        finally:
            self._keeping -= 1
            self._kept_at = asyncio.get_running_loop().time()
        self._look_at = 0.0

    async def _park_behind(self, ready: list[Delivery], held_up: set[str]) -> list[Delivery]:
        """Parks what is of these keys or has ended too many consumers; the others. Raises BrokerUnreachable."""
        going: list[Delivery] = []
        behind: list[Delivery] = []
        rows: list[Parked] = []
        for one in ready:
            is_crashed = one.token in self._worn
            if one.record.key in held_up or is_crashed:
                behind.append(one)
                # A pause of hours or a restart counts as well: whatever it was, it is not given up for that.
                rows.append(Parked(one.record, lapses=LAPSES_ALONE if is_crashed else 0))
            else:
                going.append(one)
        if behind:
            await self._park(rows)
            self._count_down_once_seen(behind)
        return going

    # Settling

    async def _settle_parcels(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        dead = [(one.record, one.attempts + 1, end.reason) for one, end in settled if isinstance(end, Dead)]
        later = [
            Parked(one.record, end.delay_s, int(end.counts), end.reason)
            for one, end in settled
            if isinstance(end, RetryAfter)
        ]
        try:
            if dead:
                await self._tables.bury(self._topic, self._group, dead)
            if later:
                await self._park(later)
        except BrokerUnreachable as error:
            log.warning("supplied.memory_away", topic=self._topic, group=self._group, error=str(error))
            # It may answer whoever only reads, as one whose disk is full: these would come again at once, and be refused again.
            await asyncio.sleep(PAUSE_S)
            await self._start_again({_parcel(delivery).stream for delivery, _ in settled})
            return [False] * len(settled)
        self._count_down_once_seen([one for one, end in settled if isinstance(end, RetryAfter)])
        done = iter(await self._count_down([_parcel(one) for one, end in settled if not isinstance(end, RetryAfter)]))
        return [_is_held(one) if isinstance(end, RetryAfter) else next(done) for one, end in settled]

    def _count_down_once_seen(self, parked: Sequence[Delivery]) -> None:
        """These are in our own queue."""
        if not parked:
            return
        task = asyncio.create_task(self._count_down_later(parked), name="settle what was parked")
        self._unseen.add(task)
        task.add_done_callback(self._unseen.discard)

    async def _count_down_later(self, parked: Sequence[Delivery]) -> None:
        await asyncio.sleep(SEEN_S)
        await self._count_down([_parcel(delivery) for delivery in parked])

    async def _count_down(self, parcels: Sequence[_Parcel]) -> list[bool]:
        """A record of each is done, or kept elsewhere; a packet is settled with its last record. Of one whose packet has others
        left, the effect is durable and nothing can go wrong any more but that it comes again: True."""
        finished: list[_Parcel] = []
        for parcel in parcels:
            parcel.left -= 1
            if parcel.left == 0:
                finished.append(parcel)
        refused = await self._finish(finished)
        return [parcel not in refused for parcel in parcels] if refused else [True] * len(parcels)

    async def _finish(self, parcels: Sequence[_Parcel]) -> set[_Parcel]:
        """Settles packets with the broker; says which it did not take."""
        refused: set[_Parcel] = set()
        for ahead in self._ahead:
            some = [parcel for parcel in parcels if parcel.stream is ahead.stream]
            if some:
                answers = await ahead.stream.settle([parcel.arrival for parcel in some])
                if not all(answers):
                    refused.update(parcel for parcel, answer in zip(some, answers, strict=True) if not answer)
        self._let_go(parcels)
        if cleared := [parcel.suspect for parcel in parcels if parcel.suspect]:
            with suppress(BrokerUnreachable):
                await self._tables.clear(self._topic, self._group, cleared)
        return refused

    def _let_go(self, parcels: Iterable[_Parcel]) -> None:
        self._held.difference_update(parcels)
        self._worn.difference_update(parcels)
        if not self._held:
            self._drained.set()

    async def _bury_whole(self, stream: Stream, arrival: Arrival, reason: str) -> None:
        """A packet that nobody can read is one dead letter, as it came. Raises BrokerUnreachable."""
        packet = arrival.packet
        record = Record(strangers_id(packet) or new_id(), "", packet.body, packet.headers)
        log.warning("supplied.undecodable", topic=self._topic, group=self._group, packet=packet.id, reason=reason)
        try:
            await self._tables.bury(self._topic, self._group, [(record, 1, reason)])
        except BaseException:
            # Raised again. It is among those ahead no more, and nobody would settle it: it comes again, also to who was cancelled.
            await asyncio.shield(self._start_again({stream}))
            raise
        self._passage.dead += 1
        await stream.settle([arrival])

    async def _start_again(self, streams: set[Stream]) -> None:
        """What of these streams is in hand or ahead comes again, so it is forgotten here."""
        for ahead in self._ahead:
            if ahead.stream in streams:
                ahead.arrivals.clear()
                ahead.has_room.set()
        self._opened = deque(one for one in self._opened if one[0].stream not in streams)
        self._suspects = [one for one in self._suspects if one[1].stream not in streams]
        self._let_go([parcel for parcel in self._held if parcel.stream in streams])
        for stream in streams:
            await stream.restart()


def _count(arrival: Arrival) -> int:
    """The records of a packet; one that cannot be read counts as one."""
    try:
        return len(unpack(arrival.packet, new_id))
    except Undecodable:
        return 1


def _name(arrival: Arrival) -> str:
    """The same each time that the broker hands it out."""
    packet = arrival.packet
    said = repr((packet.id, packet.key)).encode(errors="backslashreplace")
    return hashlib.sha256(said + packet.body).hexdigest()


def _is_held(delivery: Delivery) -> bool:
    parcel = _parcel(delivery)
    return all(parcel.stream.held([parcel.arrival]))


def _parcel(delivery: Delivery) -> _Parcel:
    if not isinstance(delivery.token, _Parcel):
        raise InvariantBroken("A delivery of another binder was settled here.", record=delivery.record.id)
    return delivery.token
