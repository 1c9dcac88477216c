"""RabbitMQ from 3.10 on, over AMQP 0-9-1 with aiormq.

    amqp://USER:PASSWORD@HOST:PORT/VHOST        amqps://… over TLS
        ?ca=FILE          whom to trust, instead of the machine's authorities       ?verify=full|ca|none   none only for tests
        ?cert=FILE&key=FILE   our own certificate      ?auth=plain|external         external: the certificate is the login
        ?heartbeat=SECONDS    10 unless told otherwise        ?new_queue_pause=SECONDS   2.5 unless told otherwise

How topics look on the broker, for people who bring their own programs:

- A topic is a durable topic exchange of its name. A message's routing key is its event's type (`payment.succeeded`), else the
  topic's name, so anybody binds a queue of his own with `payment.*` or `#`. CloudEvents attributes are `ce-…` headers.
- A group of ours has a quorum queue per lane, `topic:group.N`, with a single active consumer, bound to `@lane.N`. The sender
  computes the lane from the key and names it in the `BCC` header, which the broker reads and takes out. No plugin is needed.
- What was handed out DELIVERIES_MAX times without being settled goes to `topic:group.dead`. That is a net under consumers that
  die before they can count; nobody reads it but people.
- A topic that is declared `plain`, `durable` or `passive` has one queue of its own name, bound with that name.

Quorum queues that are provisioned anew are bound after a pause. A RabbitMQ 3.10 that is killed within a second of making its last
one comes back with that queue dead, and with it what it had confirmed; a little later nothing is lost any more. Of classic queues
(and bindings, it seems) one in some thirty is gone then, since Mnesia's decision about them is not in its log yet. What somebody
deleted while we run is made again without a pause, in which its group would miss more.

Two connections: a broker that is short of memory stops reading from those that publish, and acknowledgements must not wait
there. A connection that is lost is built anew with everything on it; what belongs to it (delivery tags, who has what in hand)
is never carried over.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import structlog
from aiormq import exceptions as refused
from aiormq.channel import Channel
from aiormq.connection import Connection
from pamqp import commands as spec
from pamqp.frame import marshal

from kassa.clock import Clock, SystemClock, rfc3339
from kassa.errors import BrokerUnreachable, InvariantBroken, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.ids import new_id
from kassa.messaging.binder import Resources
from kassa.messaging.binders.amqp import (
    ASK_S,
    DIRECT,
    DIRECT_REPLY,
    LOST,
    Deliveries,
    Letter,
    Link,
    Live,
    Parcel,
    Publisher,
    Server,
    Wire,
    ask,
    close_channel,
    end_of,
    lacks_exchange,
    packet_of,
    read_url,
    text_of,
    uncancelled,
    went_nowhere,
    why,
)
from kassa.messaging.members import BEAT_S, Member, Members, share
from kassa.messaging.model import Arrival, Failed, Packet, Receipt, Traits
from kassa.messaging.supplied import CREDIT, SuppliedBinder
from kassa.messaging.topology import PAYMENT_ORDERS, Topic, lane
from kassa.messaging.vanished import NOBODY, Levels, Look, Vanished, how_to_have_again
from kassa.observability.meters import Meters
from kassa.supervisor import end_tasks

log = structlog.get_logger("kassa.messaging.rabbitmq")

TRAITS = Traits(
    durable=True, ordered=True, delay_max_s=0.0, priorities=1, dead_letters=False, counts_attempts=True,
    acknowledges_in_change=False, deduplicates=False, batch_max=1000, bytes_max=15 * 1024 * 1024, reports_depth=True,
    request_reply=True,
)  # fmt: skip

"""bytes_max: RabbitMQ 4 takes 16 MiB unless told otherwise."""

DELIVERIES_MAX = 1000
"""Given, because RabbitMQ 4 would take 20; high, because every restart of the broker or of a consumer counts as one, also for
records that nothing is wrong with. Those that end their consumer are noticed by us after five (`supplied.py`)."""
RETRY_S = 0.5
"""Between two tries to connect or to consume, with jitter."""
WINDOW_MIN = 100
"""What a lane may bring without being asked again, so that a consumer is not idle while its batch is settled."""
WINDOW_ENVELOPES = 8
"""The same where packets are envelopes of up to a hundred records: some megabytes of all lanes together."""
HELD_BYTES = 32 * 1024 * 1024
"""What a stream holds that nobody has asked for yet, about. RabbitMQ knows windows of packets only, and a stranger's may have
megabytes each. Two of the largest that we send fit; of lanes that hold more each has a packet, however large."""
HANDOVER_S = 5.0
"""A lane that goes to another consumer, or on with another window, is kept as long as packets of it are in hand, at most this
long."""
MISSING_S = 30.0
"""Between two looks whether all queues that we made or found are there, with jitter: as long may be lost what is sent to a group
whose consumers are down. A look is a question for each queue."""
ORPHANS_EVERY = 5
"""Beats between two looks for lanes that nobody consumes, and for bindings that are gone."""
BINDING_S = 4 * ORPHANS_EVERY * BEAT_S
"""An exchange that had to be made again gets nothing for so long: its consumers bind their queues again meanwhile."""


def make_binder(url: str, resources: Resources) -> SuppliedBinder:
    """For `amqp://…` and `amqps://…`. Raises SettingInvalid."""
    return SuppliedBinder(RabbitTransport(read_url(url), Members(resources.pool), meters=resources.meters), resources)


# Names and forms


def exchange_of(topic: Topic) -> str:
    return topic.exchange or topic.name


def queues_of(topic: Topic, group: str) -> list[str]:
    """The group's queues, by lane."""
    if topic.declaration != "kassa":
        return [topic.name]
    return [f"{topic.name}:{group}.{number}" for number in range(topic.lanes)]


def lane_key(number: int) -> str:
    """The routing key of a lane; `@` begins no event's type."""
    return f"@lane.{number}"


def dead_queue(topic: Topic, group: str) -> str:
    return f"{topic.name}:{group}.dead"


_QUORUM: Mapping[str, Any] = {"x-queue-type": "quorum", "x-queue-leader-locator": "balanced"}


def _lane_arguments(topic: Topic, group: str) -> dict[str, Any]:
    return {
        **_QUORUM,
        "x-single-active-consumer": True,
        "x-delivery-limit": DELIVERIES_MAX,
        "x-dead-letter-exchange": DIRECT,
        "x-dead-letter-routing-key": dead_queue(topic, group),
        # Without these two the net itself may lose what falls into it.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


# Receiving


class _Lane:
    """One queue that we consume, on a channel of its own, until the channel ends. Closing it gives back what is unsettled, in
    order and at once, and only then does the next consumer get anything; so order holds when a lane changes hands."""

    def __init__(self, queue: str, epoch: int, stream: "RabbitStream", window: int, window_full: int) -> None:
        """window: packets that it may bring unsettled; window_full: that of a lane whose packets are small."""
        self.queue = queue
        self.epoch = epoch
        self.window = window
        self.window_full = window_full
        self.is_resized = False
        """It brings nothing more: once nothing of it is in hand it goes on with another window."""
        self.bytes = 0
        """Of what is waiting."""
        self.given_back = 0
        """Packets that are the broker's again once the channel is closed, and that we have forgotten."""
        self.came = 0
        """Packets that came."""
        self.seen = self.largest = 0
        """As many of them, and the size of the largest, since it was thought about another window last."""
        self.waiting: deque[Parcel] = deque()
        """Here, and not handed out yet."""
        self.handed: dict[int, Parcel] = {}
        """By delivery tag, in order."""
        self.leaves_at: float | None = None
        """Somebody else is to have it, from then on at the latest."""
        self.is_over = False
        self.stream = stream
        self.channel: _LaneChannel | None = None

    def arrived(self, parcel: Parcel) -> None:
        self.came += 1
        if self.is_over:
            return
        if self.is_resized:
            self.given_back += 1
            return
        size = parcel.size
        self.waiting.append(parcel)
        self._weigh(size)
        self.seen += 1
        self.largest = max(self.largest, size)
        self.stream.news.set()
        if self.stream.bytes > HELD_BYTES:
            self.stream.narrow()
        elif self.seen >= self.window_full > self.window:
            self.stream.widen(self)

    def _weigh(self, size: int) -> None:
        self.bytes += size
        self.stream.bytes += size

    def end(self, *_: object) -> None:
        """What is unsettled comes again to whoever has the lane next."""
        self.is_over = True
        self._forget_waiting()
        self.given_back = 0
        self.handed.clear()
        self.stream.changed.set()

    def _forget_waiting(self) -> None:
        self.given_back += len(self.waiting)
        self.waiting.clear()
        self._weigh(-self.bytes)

    def resize(self) -> None:
        """What is in hand may still be settled; all that is behind it comes again, over a new channel. RabbitMQ changes no window
        of a consumer that has begun, and to cancel it would let the next one begin before what is in hand is settled."""
        self.is_resized = True
        self._forget_waiting()
        self.stream.changed.set()

    def largest_unsettled(self) -> int:
        return max([one.size for one in (*self.handed.values(), *self.waiting)], default=0)

    def take(self) -> Parcel | None:
        if not self.waiting or self.leaves_at is not None or self.is_resized or self.is_over:
            return None
        parcel = self.waiting.popleft()
        self._weigh(-parcel.size)
        self.handed[parcel.tag] = parcel
        return parcel

    def start_again(self, epoch: int) -> None:
        """What was handed out is handed out again, in order. The broker need not know."""
        self.waiting.extendleft(reversed(self.handed.values()))
        self._weigh(sum([one.size for one in self.handed.values()]))
        self.handed.clear()
        self.epoch = epoch
        if self.leaves_at is not None:
            self.stream.changed.set()

    def holds(self, tag: int, epoch: int) -> bool:
        return not self.is_over and epoch == self.epoch and tag in self.handed

    def settle(self, tags: Sequence[int]) -> None:
        """Tells the broker: in one word what has nothing unsettled before it, the rest one by one."""
        for tag in tags:
            del self.handed[tag]
        first_left = next(iter(self.handed), None) or (self.waiting[0].tag if self.waiting else None)
        done = [tag for tag in tags if first_left is None or tag < first_left]
        if self.channel is not None:
            self.channel.acknowledge(max(done, default=0), [tag for tag in tags if first_left and tag > first_left])
        if self.leaves_at is not None and not self.handed:
            self.stream.changed.set()


class _LaneChannel(Channel):
    """Hands messages to its lane as they come."""

    def __init__(self, connection: Connection, number: int, wire: Wire, lane: _Lane) -> None:
        super().__init__(connection, number, publisher_confirms=False)
        self.frames = Deliveries(lane.arrived)
        self._wire = wire
        self._lane = lane
        self._consumes = False
        self._end = self.closing
        self._end.add_done_callback(self._ended)
        # The queue was deleted, or its node is gone.
        self.on_consumer_cancel_callbacks.add(self._cancelled)

    async def consume(self, queue: str, window: int) -> None:
        await self.open()
        await self.basic_qos(prefetch_count=window)
        await self.basic_consume(queue, _never)
        self._consumes = True

    def _ended(self, end: "asyncio.Future[Any]") -> None:
        # Of a lost connection the keeper tells, and of a queue that it cannot consume.
        if isinstance(error := end_of(end), refused.ChannelPreconditionFailed):
            self._tell(why(error))
        self._lane.end()

    def _cancelled(self, _: object) -> None:
        self._tell("the broker cancelled its consumer")
        self._lane.end()

    def _tell(self, reason: str) -> None:
        """It is consumed again at once; but somebody may wonder why it all comes again."""
        if self._consumes and not self._lane.is_over:
            log.warning("rabbitmq.lane_ended", queue=self._lane.queue, reason=reason)

    def acknowledge(self, up_to: int, single: Iterable[int]) -> None:
        frames = [marshal(spec.Basic.Ack(delivery_tag=up_to, multiple=True), self.number)] if up_to else []
        frames += [marshal(spec.Basic.Ack(delivery_tag=tag), self.number) for tag in single]
        # uvloop raises when the connection was lost and nobody has been told yet; unsettled, it all comes again.
        if not self._wire.writer.is_closing():
            self._wire.writer.write(b"".join(frames))


async def _never(_: object) -> None:
    raise InvariantBroken("A message was delivered in the wrong way.")


class _Token(NamedTuple):
    """Which delivery of which lane."""

    lane: _Lane
    tag: int


def _token(arrival: Arrival) -> _Token:
    if not isinstance(arrival.token, _Token):
        raise InvariantBroken("A packet of another transport was settled here.", packet=arrival.packet.id)
    return arrival.token


class RabbitStream:
    """A consumer: the lanes that fall to it, on the connection that there is."""

    def __init__(self, transport: "RabbitTransport", topic: Topic, group: str) -> None:
        self.id = new_id()
        self.topic = topic
        self.group = group
        self.place = transport.place(topic, group)
        self.news = asyncio.Event()
        """Something to hand out, or a reason not to wait for it."""
        self.changed = asyncio.Event()
        """Something to do for the keeper."""
        self.is_up = False
        """Whether it can consume; one that cannot leaves its lanes to others."""
        self.bytes = 0
        """Of what waits in all lanes."""
        self._transport = transport
        self._queues = queues_of(topic, group)
        self._wanted = set(range(len(self._queues)))
        """The lanes that fall to us."""
        self._adopted: set[int] = set()
        """Lanes that fall to somebody who does not consume them."""
        self._orphans: set[int] = set()
        """Those that nobody consumed when we looked last."""
        self._lanes: dict[int, _Lane] = {}
        self._windows: dict[str, int] = {}
        """Of queues that have held too much. They outlive their lanes, which would learn the same again."""
        self._lost = ""
        """Why nothing comes; '' while there is a connection."""
        self._complaint = ""
        self._turn = 0
        self._is_closed = False
        self._keeper: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Consumes from now on. Raises what the broker says at the first try."""
        live = await self._transport.receiving.live()
        self.is_up = True
        await self._transport.announce()
        await self._set_up(live)
        self._keeper = asyncio.create_task(self._keep(live), name=f"keeper of {self.place}")

    async def receive(self, limit: int, wait_s: float) -> list[Arrival]:
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        while not (found := self._take(limit)):
            if self._lost:
                raise BrokerUnreachable(self._lost, broker=self._transport.shown)
            self.news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.news.wait()
            except TimeoutError:
                return []
        return found

    def held(self, arrivals: Sequence[Arrival]) -> list[bool]:
        tokens = [(_token(arrival), arrival.epoch) for arrival in arrivals]
        return [lane_.holds(tag, epoch) for (lane_, tag), epoch in tokens]

    async def settle(self, arrivals: Sequence[Arrival]) -> list[bool]:
        results: list[bool] = []
        by_lane: dict[_Lane, list[int]] = {}
        for arrival in arrivals:
            lane_, tag = _token(arrival)
            is_held = lane_.holds(tag, arrival.epoch)
            results.append(is_held)
            if is_held:
                by_lane.setdefault(lane_, []).append(tag)
        for lane_, tags in by_lane.items():
            lane_.settle(tags)
        return results

    async def restart(self) -> None:
        for one in self._lanes.values():
            one.start_again(self._transport.next_epoch())
        self.news.set()

    async def close(self) -> None:
        """Once and to its end, also when who asked for it is cancelled: channels left open would keep their lanes from others."""
        if self._closing is None:
            self._is_closed = True
            self.is_up = False
            self._closing = asyncio.create_task(self._close(), name=f"close of {self.place}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._keeper is not None:
            await end_tasks(self._keeper)
        await self._drop(self._lanes)
        self._lost = "The subscription was closed."
        self.news.set()
        await self._transport.forget(self)

    def in_hand(self) -> int:
        """Packets that the broker has given us and that are not settled."""
        return sum(len(one.waiting) + len(one.handed) + one.given_back for one in self._lanes.values())

    def lane_of(self, queue: str) -> _Lane | None:
        """The consumer that we have for it."""
        return next((one for one in self._lanes.values() if one.queue == queue and not one.is_over), None)

    def narrow(self) -> None:
        """Too much waits: the fullest lane gives it back, and goes on with a window that fits what it brought.

        A lane with a window of one packet never does, and one that did is not widened before as many packets came as its full
        window holds. So a packet is given back once or twice on its way, which no limit of deliveries minds, and all get on."""
        share = self._share_bytes()
        too_full = [one for one in self._lanes.values() if one.window > 1 and one.bytes > share]
        if too_full:
            fullest = max(too_full, key=lambda one: one.bytes)
            self._resize(fullest, min(fullest.window // 2, share // fullest.largest_unsettled()))

    def widen(self, one: _Lane) -> None:
        """A narrow lane has brought a full window of packets: it goes on with a wider one if they would all have fitted."""
        fitting = min(one.window_full, self._share_bytes() // max(1, one.largest))
        one.seen = one.largest = 0
        if fitting >= 2 * one.window:
            self._resize(one, fitting)

    def _share_bytes(self) -> int:
        return HELD_BYTES // max(1, len(self._wanted | self._adopted))

    def _resize(self, one: _Lane, window: int) -> None:
        self._windows[one.queue] = max(1, window)
        log.info("rabbitmq.window", queue=one.queue, packets=max(1, window), before=one.window)
        one.resize()

    def share_out(self, members: Mapping[str, int]) -> None:
        """These consumers are there. Of a queue without lanes everybody takes."""
        if self.topic.declaration == "kassa":
            wanted = share(len(self._queues), members, self.id)
            if wanted != self._wanted:
                self._wanted = wanted
                self._adopted.clear()
                self.changed.set()

    async def look_for_orphans(self) -> None:
        """Whatever the list of consumers says: a lane that nobody consumes twice in a row is consumed here, and one that its
        owner has come back to is left to him. Raises what aiormq raises."""
        if self.topic.declaration != "kassa" or not self.is_up:
            return
        live = await self._transport.receiving.live()
        counts = await ask(live, lambda channel: _consumers(channel, self._queues))
        alone = {number for number, consumers in enumerate(counts) if consumers == 0} - self._wanted
        # Others may have adopted it as well; each leaves it now or later, so that somebody stays.
        returned = {number for number in self._adopted if counts[number] > 1 and random.random() < 0.5}
        adopted = (self._adopted | (alone & self._orphans)) - returned - self._wanted
        self._orphans = alone
        if adopted != self._adopted:
            log.info("rabbitmq.lanes_adopted", queue=self.place, lanes=sorted(adopted))
            self._adopted = adopted
            self.changed.set()

    def _take(self, limit: int) -> list[Arrival]:
        """From each lane in turn, so that a full one does not keep the others back."""
        found: list[Arrival] = []
        lanes = list(self._lanes.values())
        self._turn += 1
        start = self._turn % len(lanes) if lanes else 0
        for one in lanes[start:] + lanes[:start]:
            while len(found) < limit and (parcel := one.take()) is not None:
                packet, redeliveries, sent_at = packet_of(parcel)
                found.append(Arrival(packet, redeliveries, sent_at, _Token(one, parcel.tag), one.epoch))
        return found

    # Keeping the lanes

    async def _keep(self, live: Live) -> None:
        """Until it is closed: has the lanes that it should have, and a connection to have them on."""
        while not self._is_closed:
            try:
                await self._mind(live)
                if self._is_closed:
                    return
                self.is_up = False
                self._lost = "The connection was lost."
                self.news.set()
                live = await self._reconnect()
            except Exception as error:
                # The outermost loop of a consumer: whatever it was, a subscription must not be stuck.
                log.exception("rabbitmq.keeper", queue=self.place, reason=why(error))
                await asyncio.sleep(RETRY_S)

    async def _mind(self, live: Live) -> None:
        """Returns when the connection is gone, or when the stream was closed."""
        live.connection.closing.add_done_callback(lambda _: self.changed.set())
        while not live.is_over and not self._is_closed:
            self.changed.clear()
            wait_s = await self._set_up_or_wait(live)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.changed.wait()
        await self._drop(self._lanes)

    async def _reconnect(self) -> Live:
        while True:
            try:
                live = await self._transport.receiving.live()
            except (BrokerUnreachable, SettingInvalid) as error:
                self._complain("rabbitmq.unreachable", error)
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))
                continue
            self.is_up = True
            self._lost = ""
            self._complaint = ""
            await self._transport.announce()
            return live

    async def _set_up_or_wait(self, live: Live) -> float | None:
        """Seconds after which to look again; None when nothing is left to do."""
        try:
            await self._set_up(live)
        except refused.ChannelNotFoundEntity as missing:
            # Somebody deleted what was there when we began.
            if not self._transport.has_made(self.topic):
                self._complain("rabbitmq.queue_missing", missing)
                return RETRY_S
            try:
                await self._transport.make_queues(live, self.topic, self.group)
                self._transport.say_made_again(self.topic, self.group, [self.place])
                return 0.0
            except (*LOST, QueueMismatch, QueueNotFound) as error:
                self._complain("rabbitmq.queue_missing", error)
                return RETRY_S
        except LOST as error:
            if not live.is_over:
                self._complain("rabbitmq.consuming", error)
            return RETRY_S
        self._complaint = ""
        leaving = [one.leaves_at for one in self._lanes.values() if one.leaves_at is not None]
        return max(0.0, min(leaving) - asyncio.get_running_loop().time()) if leaving else None

    def _complain(self, what: str, error: Exception) -> None:
        """Once for each reason, not twice a second."""
        if self._complaint != (reason := why(error)):
            self._complaint = reason
            log.warning(what, queue=self.place, reason=reason)

    async def _set_up(self, live: Live) -> None:
        """Lets go of the lanes that are another's or ended, or need another window, and takes those that are ours. Raises what the
        broker says."""
        now = asyncio.get_running_loop().time()
        going: dict[int, _Lane] = {}
        mine = self._wanted | self._adopted
        for number, one in self._lanes.items():
            if one.is_over:
                going[number] = one
            elif number in mine and not one.is_resized:
                one.leaves_at = None
                self.news.set()
            else:
                one.leaves_at = one.leaves_at or now + HANDOVER_S
                if not one.handed or one.leaves_at <= now:
                    going[number] = one
        await self._drop(going)
        missing = sorted(mine - self._lanes.keys())
        window = WINDOW_ENVELOPES if self.topic.envelopes else max(WINDOW_MIN, 2 * CREDIT // max(1, len(mine)))
        results = await asyncio.gather(
            *(self._take_lane(live, number, window) for number in missing), return_exceptions=True
        )
        for result in results:
            if result is not None:
                raise result

    async def _take_lane(self, live: Live, number: int, window_full: int) -> None:
        queue = self._queues[number]
        window = min(window_full, self._windows.get(queue, window_full))
        one = _Lane(queue, self._transport.next_epoch(), self, window, window_full)
        one.channel = live.add(lambda connection, free: _LaneChannel(connection, free, live.wire, one))
        try:
            async with asyncio.timeout(ASK_S):
                await uncancelled(one.channel.consume(one.queue, window))
        except BaseException:
            # The broker may still take it up, and then what it sends there would be nobody's.
            one.end()
            await close_channel(one.channel)
            raise
        self._lanes[number] = one
        # Something may have come before it was ours to look at.
        self.news.set()

    async def _drop(self, lanes: Mapping[int, _Lane]) -> None:
        """Closes their channels: what is unsettled goes back, in order."""
        going = dict(lanes)
        for number, one in going.items():
            self._lanes.pop(number, None)
            one.end()
        # Nobody knows of them any more, so they are closed also when whoever drops them is cancelled.
        await asyncio.shield(
            asyncio.gather(*(close_channel(one.channel) for one in going.values() if one.channel is not None))
        )


# The broker


class RabbitTransport:
    """One RabbitMQ."""

    name = "rabbitmq"
    traits = TRAITS

    def __init__(
        self, server: Server, members: Members, clock: Clock | None = None, *, meters: Meters | None = None
    ) -> None:
        """meters: where what vanished is counted."""
        self.shown = server.shown
        self.receiving = Link(server, "consumer")
        """Also for declarations."""
        self._sending = Link(server, "publisher")
        self._clock = clock or SystemClock()
        self._publisher = Publisher(self._sending, self._clock)
        self._server = server
        self._members = members
        self._streams: list[RabbitStream] = []
        self._epochs = count(1)
        self._lanes = count()
        self._made: dict[str, Topic] = {}
        """What this process declared, and may declare again, by topic: with all groups that it ever declared there."""
        self._found: dict[str, Topic] = {}
        """What was there when this process was told only to look, by topic: never made again from here."""
        self._seen_at: dict[tuple[str, str], datetime] = {}
        """When the queues of a topic and group were all there last."""
        self._missing: dict[tuple[str, str], str] = {}
        """What was said of those that are not, so that it is said once."""
        self._meters = meters or Meters()
        self._levels = Levels()
        self._making: set[str] = set()
        """Topics that a send declares again just now."""
        self._cluster = ""
        self._heart: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def open(self) -> None:
        # It says on its own what we say with more knowledge, as errors with their tracebacks.
        logging.getLogger("aiormq").setLevel(logging.CRITICAL)
        live = await self.receiving.live()
        self._cluster = text_of(live.connection.server_properties.get("cluster_name", self._server.url.host))
        self._heart = asyncio.create_task(self._beat(), name="heart of rabbitmq")
        # Apart from the heart, which must not wait for a slow answer.
        self._watch = asyncio.create_task(self._watch_queues(), name="watch over the queues of rabbitmq")

    async def close(self) -> None:
        await end_tasks(*(task for task in (self._heart, self._watch) if task is not None))
        for stream in list(self._streams):
            await stream.close()
        await self._sending.close()
        await self.receiving.close()

    # Sending

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        letters = [self._letter(topic, packet, must_arrive) for packet in packets]
        clock = asyncio.get_running_loop().time
        deadline = clock() + deadline_s
        made = self._made.get(topic.name)
        if made is not None and self._publisher.is_stopped(exchange_of(topic)):
            await self._make_again(made, deadline_s)
        receipts = await self._publish(topic, letters, deadline - clock())
        nowhere = [place for place, receipt in enumerate(receipts) if went_nowhere(receipt)]
        # Where there is an exchange and nobody receives, declaring no group again helps nobody.
        if nowhere and made is not None and (made.groups or lacks_exchange(receipts[nowhere[0]])):
            failed = await self._make_again(made, deadline - clock())
            if failed is None:
                again = await self._publish(topic, [letters[place] for place in nowhere], deadline - clock())
            else:
                again = [failed] * len(nowhere)
            for place, receipt in zip(nowhere, again, strict=True):
                receipts[place] = _later(receipt)
        return receipts

    async def _publish(self, topic: Topic, letters: Sequence[Letter], deadline_s: float) -> list[Receipt]:
        pause_s = BINDING_S if topic.declaration == "kassa" else 0.0
        return await self._publisher.send(exchange_of(topic), letters, deadline_s, pause_s=pause_s)

    async def _make_again(self, topic: Topic, within_s: float) -> Failed | None:
        """Somebody deleted what this process had declared: it is declared again, with its bindings. Those of groups that this
        process does not know are made by their consumers, and until then the broker would throw away what is theirs; so would
        it with ours while only some of them are bound, and nobody sends meanwhile.

        Returns what to say of its messages, unless it is there again or another send is making it."""
        if topic.declaration != "kassa":
            return await self._declare_again(topic, within_s)
        if topic.name in self._making:
            return None
        exchange = exchange_of(topic)
        self._making.add(topic.name)
        self._publisher.stop(exchange)
        try:
            failed = await self._declare_again(topic, within_s)
        finally:
            self._making.discard(topic.name)
        if failed is None:
            self._publisher.go_on(exchange, BINDING_S)
        elif not failed.is_retryable:
            self._publisher.leave(exchange)
        return failed

    async def _declare_again(self, topic: Topic, within_s: float) -> Failed | None:
        """Why it is not whole now. Its messages are to come again, unless it is not there and we may not make it."""
        is_begun = False
        try:
            async with asyncio.timeout(within_s):
                live = await self.receiving.live()
                for group in topic.groups or ("",):
                    await self.declare(live, topic, group)
                    is_begun = True
        except (*LOST, BrokerUnreachable, SettingInvalid, QueueMismatch, QueueNotFound) as error:
            log.warning("rabbitmq.topic_missing", topic=topic.name, reason=why(error))
            is_anothers = topic.declaration == "passive" and isinstance(error, QueueNotFound)
            may_come_again = is_begun or not (is_anothers or isinstance(error, refused.ChannelAccessRefused))
            return Failed(f"{topic.name} is not made again: {why(error)}", is_retryable=may_come_again)
        log.warning("rabbitmq.topic_made_again", topic=topic.name)
        return None

    async def reply(self, address: str, packets: Sequence[Packet], *, deadline_s: float) -> list[Receipt]:
        # What goes to a direct reply-to is returned as unroutable although it arrives.
        is_mandatory = not address.startswith(DIRECT_REPLY)
        letters = [Letter(packet, address, None, is_mandatory) for packet in packets]
        return await self._publisher.send(DIRECT, letters, deadline_s)

    def _letter(self, topic: Topic, packet: Packet, must_arrive: bool) -> Letter:
        if topic.declaration != "kassa":
            return Letter(packet, topic.name, None, must_arrive)
        type_ = packet.headers.get("ce-type", "")
        routing_key = type_ if type_ and len(type_.encode()) <= 255 else topic.name
        return Letter(packet, routing_key, lane_key(self._lane_of(topic, packet)), must_arrive)

    def _lane_of(self, topic: Topic, packet: Packet) -> int:
        if not packet.key:
            return next(self._lanes) % topic.lanes
        # An envelope holds one lane, and is named after it.
        return int(packet.key) % topic.lanes if topic.envelopes else lane(packet.key, topic.lanes)

    # Receiving

    async def subscribe(self, topic: Topic, group: str) -> RabbitStream:
        live = await self.receiving.live()
        stream = RabbitStream(self, topic, group)
        try:
            await ask(live, lambda channel: _ready(channel, queues_of(topic, group)))
            self._streams.append(stream)
            await stream.start()
            await self._tell_of_dead(live, topic, group)
        except BaseException as error:
            await stream.close()
            if isinstance(error, refused.ChannelNotFoundEntity):
                raise QueueNotFound(why(error), topic=topic.name, group=group) from None
            if isinstance(error, LOST):
                raise BrokerUnreachable(why(error), broker=self.shown) from error
            raise
        return stream

    async def _tell_of_dead(self, live: Live, topic: Topic, group: str) -> None:
        """What fell into the net is nobody's business but a person's."""
        if topic.declaration == "kassa":
            with suppress(*LOST):
                if dead := await ask(live, lambda channel: _ready(channel, [dead_queue(topic, group)])):
                    log.warning("rabbitmq.dead_letters", queue=dead_queue(topic, group), waiting=dead)

    async def depth(self, topic: Topic, group: str) -> int | None:
        """What is ready in the queues, and what consumers have in hand: ours exactly, others' as they said last."""
        live = await self.receiving.live()
        place = self.place(topic, group)
        ours = {one.id: one.in_hand() for one in self._streams if one.place == place}
        in_hand = await self._members.at(place) | ours
        try:
            ready = await ask(live, lambda channel: _ready(channel, queues_of(topic, group)))
        except refused.ChannelNotFoundEntity as error:
            raise QueueNotFound(why(error), topic=topic.name, group=group) from None
        except LOST as error:
            raise BrokerUnreachable(why(error), broker=self.shown) from error
        return ready + sum(in_hand.values())

    def next_epoch(self) -> int:
        return next(self._epochs)

    def place(self, topic: Topic, group: str) -> str:
        """What consumers share, by a name that says which broker: its cluster's own, whichever node one is connected to."""
        return f"{self._cluster} {self._server.vhost} {topic.name}:{group}"

    async def announce(self) -> None:
        """Tells the other processes which streams of ours are there, and the streams who else is. When the database is away
        everybody keeps what he has."""
        streams = [stream for stream in self._streams if stream.is_up]
        if not streams:
            return
        try:
            async with asyncio.timeout(2 * BEAT_S):
                found = await self._members.announce([Member(one.place, one.id, one.in_hand()) for one in streams])
        except (BrokerUnreachable, TimeoutError) as error:
            log.warning("rabbitmq.members_unknown", reason=why(error))
            return
        for stream in streams:
            stream.share_out(found[stream.place])

    async def forget(self, stream: RabbitStream) -> None:
        """It is closed. It stays among the others until all is said, so that `close` waits for it too."""
        try:
            with suppress(BrokerUnreachable, TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._members.leave([stream.id])
            await self.announce()
        finally:
            if stream in self._streams:
                self._streams.remove(stream)

    async def _beat(self) -> None:
        for number in count(1):
            await asyncio.sleep(BEAT_S)
            try:
                await self.announce()
                if number % ORPHANS_EVERY == 0:
                    for stream in list(self._streams):
                        await self._keep_up(stream)
            except Exception as error:
                # The outermost loop: without it no lane would ever change hands again.
                log.exception("rabbitmq.heart", reason=why(error))

    async def _keep_up(self, stream: RabbitStream) -> None:
        """Its orphan lanes and its bindings, each whatever becomes of the other: no stream's depend on another's. What goes wrong
        is tried again at a later beat."""
        for look in (stream.look_for_orphans, partial(self._bind_again, stream.topic, stream.group)):
            try:
                await look()
            except (*LOST, BrokerUnreachable, SettingInvalid, QueueMismatch, QueueNotFound):
                # The keeper of the stream, or who sends, says so.
                continue
            except Exception as error:
                # Whatever is wrong with this one: the next stream has its turn.
                log.exception("rabbitmq.upkeep", queue=stream.place, reason=why(error))

    async def _bind_again(self, topic: Topic, group: str) -> None:
        """Somebody may have deleted the exchange, and the bindings with it. An exchange of several groups is made by who sends,
        who then waits for all of them; that of a single queue is made here. Raises what `declare` raises."""
        if not self.has_made(topic):
            return
        live = await self.receiving.live()
        if topic.declaration == "kassa":
            await ask(live, lambda channel: _bind(channel, topic, group))
        else:
            await self.declare(live, topic, group)

    async def make_queues(self, live: Live, topic: Topic, group: str) -> None:
        """Somebody deleted them, and perhaps the exchange, which is made as `_bind_again` says. Raises what `declare` raises."""
        if topic.declaration != "kassa":
            await self.declare(live, topic, group)
            return
        await self._declare(live, topic, partial(_make_queues, topic=topic, group=group))
        with suppress(refused.ChannelNotFoundEntity):
            await ask(live, lambda channel: _bind(channel, topic, group))

    # What somebody deleted while nobody receives it

    async def _watch_queues(self) -> None:
        """Who sends is told nothing of a group whose queues are gone while another's are bound."""
        while True:
            await asyncio.sleep(MISSING_S * (0.5 + random.random()))
            for topic, group in self._watched():
                try:
                    await self._look_after(topic, group)
                except (*LOST, BrokerUnreachable, SettingInvalid):
                    # Whoever sends or receives says so.
                    continue
                except Exception as error:
                    # The outermost loop: whatever is wrong with this one, the others have their turn.
                    log.exception("rabbitmq.watch", topic=topic.name, group=group, reason=why(error))

    def _watched(self) -> list[tuple[Topic, str]]:
        """Topics with each of their groups, whoever receives it."""
        known = [*self._found.values(), *self._made.values()]
        return list({(topic.name, group): (topic, group) for topic in known for group in topic.groups}.values())

    async def _look_after(self, topic: Topic, group: str) -> None:
        """Makes again what is gone, or says that it is. Raises what aiormq raises, BrokerUnreachable, SettingInvalid."""
        began = self._clock.now()
        live = await self.receiving.live()
        queues = queues_of(topic, group)

        async def look(channel: Channel) -> list[Look]:
            return [await self._level(channel, topic, group, queue) for queue in queues]

        try:
            looks = await ask(live, look)
        except refused.ChannelNotFoundEntity:
            self._levels.forget((topic.name, group))
        else:
            self._is_whole(topic, group, began)
            self._say_vanished(topic, group, self._levels.see((topic.name, group), looks, began))
            return
        gone = [queue for queue in queues if not await _has(live, [queue])]
        if topic.name in self._made and group in self._made[topic.name].groups:
            await self._make_again_or_say(live, topic, group, gone)
        else:
            self._say_missing(topic, group, gone, "others make it, and this process only looks")

    def _say_vanished(self, topic: Topic, group: str, vanished: Vanished | None) -> None:
        """Somebody purged what waited."""
        # Counted from the first look on, so that the first ones are seen to come in addition.
        passage = self._meters.passage(topic.name, group)
        if vanished is None:
            return
        passage.vanished += vanished.packets
        since = rfc3339(vanished.since) if vanished.since else "TIME"
        log.warning(
            "rabbitmq.packets_vanished", queue=self.place(topic, group), packets=vanished.packets,
            reason="no consumer has had them: was the queue purged?" if vanished.is_sure
            else "nobody seems to have received them: was the queue purged, or did a consumer come and go?",
            remedy=how_to_have_again(topic.name, f"{since}, or earlier where the relay was behind"),
        )  # fmt: skip

    async def _level(self, channel: Channel, topic: Topic, group: str, queue: str) -> Look:
        ours = [one for stream in self._streams if (stream.topic.name, stream.group) == (topic.name, group)
                if (one := stream.lane_of(queue)) is not None]  # fmt: skip
        came = sum([one.came for one in ours])
        answer = await channel.queue_declare(queue, passive=True)
        waiting, consumers = answer.message_count or 0, answer.consumer_count or 0
        if not consumers:
            return Look(waiting, NOBODY)
        # Of a lane RabbitMQ counts the consumer that has it, and not those that wait for it; to these nothing ever came.
        if consumers > len(ours) or not came:
            return Look(waiting, None)
        return Look(waiting, frozenset(ours), came, sum([one.came for one in ours]), sum([one.window for one in ours]))

    async def _make_again_or_say(self, live: Live, topic: Topic, group: str, gone: Sequence[str]) -> None:
        try:
            await self.make_queues(live, topic, group)
        except (*LOST, QueueMismatch, QueueNotFound) as error:
            self._say_missing(topic, group, gone, why(error))
        else:
            self.say_made_again(topic, group, gone)

    def _is_whole(self, topic: Topic, group: str, at: datetime) -> None:
        self._seen_at[topic.name, group] = at
        self._missing.pop((topic.name, group), None)

    def _say_missing(self, topic: Topic, group: str, gone: Sequence[str], reason: str) -> None:
        if self._missing.get((topic.name, group)) != reason:
            self._missing[topic.name, group] = reason
            log.warning("rabbitmq.queue_missing", queue=gone, reason=reason, **self._what_to_do(topic, group))

    def say_made_again(self, topic: Topic, group: str, gone: Sequence[str]) -> None:
        """Once they are there: what is to be known of the time without them."""
        log.warning("rabbitmq.queue_made_again", queue=gone, **self._what_to_do(topic, group))
        self._is_whole(topic, group, self._clock.now())

    def _what_to_do(self, topic: Topic, group: str) -> dict[str, str]:
        seen_at = self._seen_at.get((topic.name, group))
        since = rfc3339(seen_at) if seen_at else "TIME"
        return {
            "missing": f"what waited there, and what was sent there since {since}",
            "remedy": how_to_have_again(topic.name, f"{since}, or earlier where much waited"),
        }

    # Topology

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool) -> list[tuple[str, str]]:
        live = await self.receiving.live()
        said: list[tuple[str, str]] = []
        try:
            for topic in topics:
                is_there = await _is_there(live, topic)
                if not topic.groups and not is_there:
                    said.append((topic.name, ""))
                for group in topic.groups:
                    if not is_there or not await _has(live, queues_of(topic, group)):
                        said.append((topic.name, group))
            if verify_only:
                self._remember(self._found, topics, set(said))
            else:
                await self._make(live, topics, {name for name, _ in said})
                self._remember(self._made, topics, set())
        except refused.ChannelAccessRefused as error:
            raise SettingInvalid(f"{why(error)}. Provision with an account that may, or only verify.") from None
        except LOST as error:
            raise BrokerUnreachable(why(error), broker=self.shown) from error
        return said

    def _remember(self, known: dict[str, Topic], topics: Sequence[Topic], missing: Set[tuple[str, str]]) -> None:
        """A topic may be declared with some of its groups today and with others tomorrow."""
        for topic in topics:
            before = known[topic.name].groups if topic.name in known else ()
            there = [group for group in topic.groups if (topic.name, group) not in missing]
            known[topic.name] = topic._replace(groups=tuple(dict.fromkeys((*before, *there))))
            for group in there:
                self._is_whole(topic, group, self._clock.now())

    def has_made(self, topic: Topic) -> bool:
        """Whether this process declared it. What others made is theirs to make again."""
        return topic.name in self._made

    async def _make(self, live: Live, topics: Sequence[Topic], new: Set[str]) -> None:
        """Queues first; those of topics that are new have a moment before anything can be sent to them. The exchange comes behind
        that moment, so that another process which comes meanwhile finds the topic new, too."""
        wanted = [(topic, group) for topic in topics for group in topic.groups or ("",)]
        young = [one for one in wanted if one[1] and one[0].name in new and one[0].declaration == "kassa"]
        if young:
            for topic, group in young:
                await self._declare(live, topic, partial(_make_queues, topic=topic, group=group))
            await asyncio.sleep(self._server.new_queue_pause_s)
        for topic, group in wanted:
            await self.declare(live, topic, group)
        if young:
            # The last binding is kept by what is declared after it.
            topic, group = young[-1]
            await ask(live, partial(_touch, queue=dead_queue(topic, group), exchange=exchange_of(topic)))

    async def declare(self, live: Live, topic: Topic, group: str) -> None:
        """The exchange, and the group's queues unless it is ''. Raises QueueMismatch, QueueNotFound, what aiormq raises."""
        await self._declare(live, topic, partial(_declare, topic=topic, group=group))

    async def _declare(self, live: Live, topic: Topic, question: Callable[[Channel], Awaitable[None]]) -> None:
        try:
            await ask(live, question)
        except (refused.ChannelPreconditionFailed, refused.ChannelLockedResource, ValueError) as error:
            raise QueueMismatch(f"{why(error)}. {_remedy(topic)}", topic=topic.name, broker=self.shown) from None
        except refused.ChannelNotFoundEntity as error:
            raise QueueNotFound(f"{why(error)}. It is declared passive: somebody else has to make it.") from None


def _later(receipt: Receipt) -> Receipt:
    """What is ours to make and was deleted once more is there again later."""
    if isinstance(receipt, Failed) and lacks_exchange(receipt):
        return receipt._replace(is_retryable=True)
    return receipt


async def _ready(channel: Channel, queues: Sequence[str]) -> int:
    return sum([(await channel.queue_declare(queue, passive=True)).message_count or 0 for queue in queues])


async def _consumers(channel: Channel, queues: Sequence[str]) -> list[int]:
    return [(await channel.queue_declare(queue, passive=True)).consumer_count or 0 for queue in queues]


async def _is_there(live: Live, topic: Topic) -> bool:
    try:
        await ask(live, lambda channel: channel.exchange_declare(exchange_of(topic), passive=True))
    except refused.ChannelNotFoundEntity:
        return False
    return True


async def _has(live: Live, queues: Sequence[str]) -> bool:
    try:
        await ask(live, lambda channel: _ready(channel, queues))
    except refused.ChannelNotFoundEntity:
        return False
    return True


async def _bind(channel: Channel, topic: Topic, group: str) -> None:
    for number, queue in enumerate(queues_of(topic, group)):
        await channel.queue_bind(queue, exchange_of(topic), lane_key(number))


async def _declare(channel: Channel, topic: Topic, group: str) -> None:
    exchange = exchange_of(topic)
    match topic.declaration:
        case "passive":
            await channel.exchange_declare(exchange, passive=True)
            await channel.queue_declare(topic.name, passive=True)
        case "plain" | "durable":
            is_durable = topic.declaration == "durable"
            await channel.exchange_declare(exchange, exchange_type="topic", durable=is_durable)
            await channel.queue_declare(topic.name, durable=is_durable)
            await channel.queue_bind(topic.name, exchange, topic.name)
        case "kassa":
            await channel.exchange_declare(exchange, exchange_type="topic", durable=True)
            if group:
                await _make_queues(channel, topic, group)
                await _bind(channel, topic, group)


async def _make_queues(channel: Channel, topic: Topic, group: str) -> None:
    await channel.queue_declare(dead_queue(topic, group), durable=True, arguments=dict(_QUORUM))
    for queue in queues_of(topic, group):
        await channel.queue_declare(queue, durable=True, arguments=_lane_arguments(topic, group))


async def _touch(channel: Channel, queue: str, exchange: str) -> None:
    """Something that the broker has to write down: a binding that nothing comes by, for a moment."""
    await channel.queue_bind(queue, exchange, "@nothing")
    await channel.queue_unbind(queue, exchange, "@nothing")


def _remedy(topic: Topic) -> str:
    """What a person can do about a mismatch."""
    other = {"plain": "durable", "durable": "plain"}.get(topic.declaration)
    if other is None:
        return "Delete what is there when it is empty, or give this topic another name; then provision again."
    if topic.name == PAYMENT_ORDERS.name:
        # The setting that decides on it.
        return (
            f"It was declared otherwise: KASSA_ORDER_QUEUE={other}, or KASSA_ORDER_QUEUE=passive to take it as it is."
        )
    return f"It was declared otherwise: set this topic's declaration to `{other}`, or to `passive` to take it as it is."
