"""Apache RocketMQ from 5.0 on, through its proxy.

    rocketmq://HOST:PORT?namesrv=HOST:PORT                the proxy's gRPC port, and the name server
    rocketmq://ACCESSKEY:SECRET@HOST:PORT?namesrv=…       signed, where the cluster has ACLs
        &tls=1                                            TLS to the proxy (it has no other password than the signature)
        &ca=FILE  &cert=FILE&key=FILE                     whom to trust, instead of gRPC's own list; our own certificate
        &server_name=NAME                                 what the proxy's certificate says, if not HOST

The name server is asked when topics and groups are made or looked for, and for depths; those questions go to the brokers' own
ports, without TLS. Several brokers need proxies in cluster mode, since each call goes to the proxy of the URL.

How topics look on the broker, for people who bring their own programs:

- RocketMQ's names have no dots: `kassa.events` is the topic `kassa--events`, and a hyphen stays what it is. So a name is words of
  letters, digits and `_` with single dots or hyphens between them; others are refused, and no two are the same.
- A group of ours is `topic---group` (`kassa--events---shop`), since RocketMQ's groups belong to no topic.
- A topic with keys is of the type FIFO with a queue per lane. The message group says the lane; its text is chosen so that
  RocketMQ's hash leads to the queue of that number. Who sends to it may have message groups of his own: what has none of our
  headers has its message group for key.
- A topic without keys (`payment_order`) is of the type NORMAL.
- CloudEvents attributes are properties `CE_…` with `CE_contenttype`, as in CloudEvents' Java SDK, and the event's type is the
  tag, so anybody may subscribe `payment.succeeded`. `reply-topic` and `correlation-id` are properties, the id is the message id.
  An empty body is not allowed there: it is one zero byte with the property `kassa-empty-body`.

A group that is new gets what is sent from then on. A packet is ours for INVISIBLE_S at first, and we extend that as long as we
hold it; of a process that dies nobody gets its lanes before. An acknowledgement is no proof: the broker writes them down every
five seconds, and repeats after a kill what it has forgotten.
"""

import asyncio
import json
import re
import zlib
from collections import deque
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import grpc.aio
import structlog

from kassa.clock import Clock, SystemClock
from kassa.errors import BrokerUnreachable, InvariantBroken, KassaError, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.ids import new_id
from kassa.messaging.binder import Resources
from kassa.messaging.binders import rocketmq_wire as wire
from kassa.messaging.binders.rocketmq_wire import Address, Channel, Identity, Server, make, resource
from kassa.messaging.model import Arrival, Confirmed, Failed, Packet, Receipt, Traits, Unknown
from kassa.messaging.packing import ENVELOPE_TYPE, ID
from kassa.messaging.supplied import SuppliedBinder
from kassa.messaging.topology import Topic, lane
from kassa.supervisor import end_tasks, is_ended

log = structlog.get_logger("kassa.messaging.rocketmq")

TRAITS = Traits(
    durable=True, ordered=True, delay_max_s=0.0, priorities=1, dead_letters=False, counts_attempts=True,
    acknowledges_in_change=False, deduplicates=False, batch_max=500, bytes_max=4 * 1024 * 1024 - 64 * 1024,
    reports_depth=True, request_reply=True,
)  # fmt: skip

"""durable: with flushDiskType=SYNC_FLUSH, or replicas. bytes_max: the proxy takes 4 MiB, if nobody changed it. batch_max: what
goes one by one within a deadline of ten seconds."""

INVISIBLE_S = 30.0
"""A packet's time in our hands; extended when half of it is over."""
MARGIN_S = 2.0
"""So long before the end it counts as over here, whatever the clocks say."""
POLL_S = 1.0
"""A question for packets waits so long there, since the broker sometimes misses to wake it: a packet that comes between its look
and its wait. A proxy as it comes makes 5 s of it (`grpcClientConsumerMinLongPollingTimeoutMillis`)."""
LATE_S = 10.0
"""An answer that is so late does not come: the connection is dead."""
RECEIVE_MAX = 32
"""More the proxy does not give at once."""
GATHER_S = 0.02
"""Where it gave as many, we wait so long for more before we hand them out."""
SEND_BATCH, SEND_BATCH_BYTES = 100, 2 * 1024 * 1024
"""Of packets without keys in one call."""
WINDOW = 64
"""Calls of one `send` under way."""
ACK_BATCH = 100
ACK_S = 5.0
"""Acknowledging is tried so long; then the packets come again."""
RETRY_S = 0.3
BEAT_S = 10.0
"""Between two signs of life. They also show whether the group is what it was."""
LOOK_S = 1.0
"""How often it is looked for packets whose time has to be extended."""
CONNECT_S = 5.0
GREETING_S = 5.0
FAREWELL_S = 3.0
ANY_TOPIC = "kassa"
"""What the proxy is asked for to see whether it answers us: it need not be there."""
LAST_ANSWER_S = 6.0
"""Who leaves waits so long for the answer to its last question: longer than a proxy as it comes keeps one."""
KNOWN_S = 30.0
"""The proxy remembers for twenty seconds that a topic or group was not there."""
BACK_S = 0.01
"""The invisible time of what is given back."""
DELIVERIES_MAX = 1000
"""Then it goes to `%DLQ%group`. Every restart of the broker or of a consumer counts as one, so this is high; what ends its
consumer is noticed by us after five (`supplied.py`)."""
PROPERTIES_MAX = 32 * 1024

EMPTY_BODY, EMPTY_HEADERS = "kassa-empty-body", "kassa-empty"
"""Properties that say what RocketMQ does not keep: that the body is empty, and the names of headers that are, as JSON."""
_EMPTY_BODY = b"\0"
_CE, _CE_CONTENT_TYPE = "CE_", "CE_contenttype"
_REPLY_TO, _REPLY_TOPIC = "reply-to", "reply-topic"
_CONTENT_TYPE = "content-type"
_THEIRS = "__"
"""Begins properties of RocketMQ's own that the proxy shows as if they were a user's."""
_TYPES = {wire.NORMAL: "NORMAL", wire.FIFO: "FIFO"}


def make_binder(url: str, resources: Resources) -> SuppliedBinder:
    """The registry's way in. Raises SettingInvalid."""
    return SuppliedBinder(RocketTransport(wire.read_url(url)), resources)


# Names

_NAME = re.compile(r"[a-zA-Z0-9_]+(?:[.-][a-zA-Z0-9_]+)*")
_THEIR_NAME = re.compile(r"[%|a-zA-Z0-9_-]{1,127}")
_TOPIC_MAX, _GROUP_MAX = 127, 120


def topic_name(name: str) -> str:
    """A topic as RocketMQ has it. Raises SettingInvalid for a name that it cannot have."""
    made = name.replace(".", "--")
    if not _NAME.fullmatch(name) or len(made) > _TOPIC_MAX:
        raise SettingInvalid(
            f"RocketMQ has no topic or group of the name {name!r}: words of letters, digits and '_', with single dots or "
            f"hyphens between them, at most {_TOPIC_MAX} characters where a dot counts twice.",
            broker="rocketmq",
        )
    return made


def group_name(topic: str, group: str) -> str:
    """A group of a topic. Raises SettingInvalid."""
    made = f"{topic_name(topic)}---{topic_name(group)}"
    if len(made) > _GROUP_MAX:
        raise SettingInvalid(f"RocketMQ has no group of the name {made!r}: at most {_GROUP_MAX} characters.")
    return made


@lru_cache
def message_group(number: int, lanes: int) -> str:
    """The text that leads to the queue `number` where there are as many queues as lanes."""
    for turn in count():
        text = f"lane-{number}" + (f"-{turn}" if turn else "")
        if _queue_of(text, lanes) == number:
            return text
    raise InvariantBroken("No text leads there.")


def _queue_of(text: str, queues: int) -> int:
    """Which queue the proxy chooses. Source: RocketMQ 5.5.0, proxy SendMessageActivity: Java's hash of the text, then Guava's
    consistentHash."""
    hashed = 0
    for unit in text.encode("utf-16-be")[1::2]:
        hashed = (hashed * 31 + unit) & 0xFFFFFFFF
    state = hashed - (1 << 32 if hashed >> 31 else 0)
    chosen = 0
    while True:
        state = (2862933555777941757 * state + 1) & 0xFFFFFFFFFFFFFFFF
        following = int((chosen + 1) / (((state >> 33) + 1) / 2.0**31))
        if not 0 <= following < queues:
            return chosen
        chosen = following


# Messages


def message_of(packet: Packet, topic: str, group: str) -> Any:
    """group: the message group, '' on a topic of the type NORMAL."""
    properties: dict[str, str] = {}
    for name, value in packet.headers.items():
        properties[_CE + name[3:] if name.startswith("ce-") else _REPLY_TOPIC if name == _REPLY_TO else name] = value
    if packet.id and packet.headers.get("ce-id") == packet.id:
        # Whose message has it, has its key beside it too: the message group is only its lane.
        properties.setdefault(ID, packet.id)
    type_ = packet.headers.get("ce-type", "")
    if type_ and (content_type := packet.headers.get(_CONTENT_TYPE)):
        properties[_CE_CONTENT_TYPE] = content_type
    if not packet.body:
        properties[EMPTY_BODY] = "1"
    if not all(packet.headers.values()):
        properties[EMPTY_HEADERS] = json.dumps([name for name, value in packet.headers.items() if not value])
    system = make(
        "SystemProperties", message_id=packet.id or new_id(), message_type=wire.FIFO if group else wire.NORMAL,
        body_encoding=wire.IDENTITY, born_host="kassa", message_group=group, tag=type_ if "|" not in type_ else "",
    )  # fmt: skip
    now = datetime.now(UTC).timestamp()
    system.born_timestamp.seconds = int(now)
    system.born_timestamp.nanos = int(now % 1 * 1e9)
    return make(
        "Message", topic=resource(topic), user_properties=properties, system_properties=system,
        body=packet.body or _EMPTY_BODY,
    )  # fmt: skip


def packet_of(message: Any) -> Packet:
    """What anybody has sent."""
    system = message.system_properties
    headers: dict[str, str] = {}
    for name, value in message.user_properties.items():
        if name.startswith(_CE):
            if name != _CE_CONTENT_TYPE:
                headers["ce-" + name[3:]] = value
        elif name not in (EMPTY_BODY, EMPTY_HEADERS) and not name.startswith(_THEIRS):
            headers[_REPLY_TO if name == _REPLY_TOPIC else name] = value
    if (content_type := message.user_properties.get(_CE_CONTENT_TYPE)) is not None:
        headers.setdefault(_CONTENT_TYPE, content_type)
    body: bytes = message.body
    headers.update(_empty(message.user_properties.get(EMPTY_HEADERS, "[]")))
    if EMPTY_BODY in message.user_properties and body == _EMPTY_BODY:
        body = b""
    elif system.body_encoding == wire.GZIP:
        body = _opened(body)
    is_ours = ID in headers or headers.get(_CONTENT_TYPE) == ENVELOPE_TYPE
    return Packet(system.message_id, "" if is_ours else system.message_group, body, headers)


def _empty(names: str) -> dict[str, str]:
    """Headers without a value."""
    # What is nested too deep for Python is no ValueError.
    with suppress(ValueError, RecursionError):
        found = json.loads(names)
        return {name: "" for name in found if _is_text(name)} if isinstance(found, list) else {}
    return {}


def _is_text(found: object) -> bool:
    """JSON's escapes may say half a character, which no database takes."""
    return isinstance(found, str) and found.encode(errors="ignore").decode() == found


def _opened(body: bytes) -> bytes:
    """What the official clients have compressed; what cannot be opened, or is larger than a packet may be, stays as it is."""
    opener = zlib.decompressobj(wbits=47)
    with suppress(zlib.error):
        # One more: what is as large as may be comes to its end only with room left.
        opened = opener.decompress(body, TRAITS.bytes_max + 1)
        if opener.eof and len(opened) <= TRAITS.bytes_max:
            return opened
    return body


def _sent_at(message: Any) -> datetime | None:
    born = message.system_properties.born_timestamp
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(born.seconds + born.nanos / 1e9, UTC) if born.seconds else None
    return None


# The connection


class Link:
    """The connection to the proxy; gRPC mends it, and where nothing answers any more it is made anew."""

    def __init__(self, server: Server) -> None:
        self.shown = server.shown
        self._server = server
        self._channel: Channel | None = None
        self._silent_since: float | None = None
        """When the first of the questions was asked that nothing has been answered since."""
        self._closing: set[asyncio.Task[None]] = set()

    async def live(self, within_s: float = CONNECT_S) -> Channel:
        """Raises BrokerUnreachable."""
        if self._channel is None:
            self._channel = Channel(self._server)
        channel = self._channel
        try:
            async with asyncio.timeout(within_s):
                await channel.ready()
        except TimeoutError:
            raise BrokerUnreachable(f"{self.shown} cannot be reached.", broker="rocketmq") from None
        except grpc.aio.UsageError:
            # While we waited somebody else gave this connection up.
            raise BrokerUnreachable(f"{self.shown}: the connection was given up.", broker="rocketmq") from None
        return channel

    async def answer(self, channel: Channel, call: Awaitable[Any]) -> Any:
        """Of a call on this channel. Where nothing has been answered for LATE_S the channel is left: a line that is open at our
        end alone says nothing, for ever. Raises AioRpcError."""
        clock = asyncio.get_running_loop().time
        if self._silent_since is None:
            self._silent_since = clock()
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._silent_since = None
            elif self._silent_since is not None and clock() - self._silent_since >= LATE_S:
                self.renew(channel)
            raise
        self._silent_since = None
        return answer

    def renew(self, dead: Channel) -> None:
        """Nothing answers on it. Calls on it have their time to end by themselves."""
        if self._channel is dead:
            self._channel = self._silent_since = None
            closing = asyncio.create_task(dead.close(POLL_S + LATE_S), name="dead channel")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        await end_tasks(*self._closing)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, KassaError):
        return error.detail
    return str(error) or type(error).__name__


class _Refused(Exception):
    """The proxy answers, and does not do it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code


def _require_ok(status: Any) -> None:
    if status.code != wire.OK:
        raise _Refused(status.code, status.message)


# Receiving


class _Held:
    """A packet in our hands, handed out or not."""

    __slots__ = ("epoch", "expires_at", "handle", "is_done", "lane", "message", "serial")

    def __init__(self, lane_: "_Lane", serial: int, message: Any, expires_at: float) -> None:
        self.lane = lane_
        self.serial = serial
        self.message = message
        self.handle: str = message.system_properties.receipt_handle
        self.expires_at = expires_at
        self.epoch = lane_.epoch
        self.is_done = False
        """Settled, and waits for one before it."""


class _Lane:
    """What we hold of one queue. Of a FIFO queue the broker gives nothing more while it takes us to hold something, so what
    comes while we do means that it has forgotten: then this is over, and there is a new one."""

    __slots__ = ("epoch", "held", "is_fifo", "is_over")

    def __init__(self, epoch: int, *, is_fifo: bool) -> None:
        self.epoch = epoch
        self.is_fifo = is_fifo
        self.is_over = False
        self.held: dict[int, _Held] = {}
        """In order."""

    def settle(self, one: _Held) -> list[_Held]:
        """What may be acknowledged now. In order on a FIFO queue: a broker that has forgotten what it gave out takes an
        acknowledgement for one of all that comes before."""
        one.is_done = True
        if not self.is_fifo:
            del self.held[one.serial]
            return [one]
        done: list[_Held] = []
        for held in self.held.values():
            if not held.is_done:
                break
            done.append(held)
        for held in done:
            del self.held[held.serial]
        return done

    def has(self, one: _Held, now: float) -> bool:
        """Whether it is ours and not settled."""
        # No more than one answer holds is looked through: a FIFO queue gives nothing else meanwhile.
        if self.is_fifo:
            self.drop_expired(now)
        return not (self.is_over or one.is_done) and one.serial in self.held and now < one.expires_at

    def drop_expired(self, now: float) -> None:
        """Of a NORMAL queue. Of a FIFO one it is all over: what is behind one that nobody has any more would never be acknowledged,
        and comes again behind it."""
        if not self.is_fifo:
            self.held = {serial: held for serial, held in self.held.items() if now < held.expires_at}
        elif any(now >= held.expires_at and not held.is_done for held in self.held.values()):
            self.is_over = True


class _Session:
    """What the proxy knows of a consumer, as long as a stream of telemetry lasts."""

    def __init__(self, channel: Channel, telemetry: Any) -> None:
        self.channel = channel
        self.telemetry = telemetry
        self.is_over = False
        self.reader: asyncio.Task[None] | None = None

    async def end(self) -> None:
        self.is_over = True
        if self.reader is not None:
            await end_tasks(self.reader)
        self.telemetry.cancel()


class RocketStream:
    """A consumer. The broker shares lanes out by itself: a lane belongs to who holds something of it."""

    def __init__(self, transport: "RocketTransport", topic: Topic, group: str) -> None:
        self._transport = transport
        self.topic = topic
        self._group = group
        self._wire_topic = topic_name(topic.name)
        self._wire_group = group_name(topic.name, group)
        self._identity = Identity(transport.server)
        self._session_now: _Session | None = None
        self._meeting = asyncio.Lock()
        self._handles = asyncio.Lock()
        """A handle is good for one thing at a time: to acknowledge, or to be exchanged for a newer one."""
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._ready: deque[_Held] = deque()
        """Not handed out yet."""
        self._news = asyncio.Event()
        self._asked = asyncio.Event()
        self._askers = 0
        self._limit = 1
        self._has_more = False
        """The last answer was full."""
        self._lost: BrokerUnreachable | None = None
        self._complaint = ""
        self._is_closed = False
        self._closing: asyncio.Task[None] | None = None
        self._brokers: frozenset[str] = frozenset()
        """Each has a fetcher."""
        self._fetchers: dict[str, asyncio.Task[None]] = {}
        self._keepers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises BrokerUnreachable, QueueNotFound, QueueMismatch."""
        brokers = await self._transport.brokers_of(self.topic, self._group)
        await self._greeted()
        self._ask_these(brokers)
        self._keepers = [asyncio.create_task(self._keep(), name=f"keeper of {self._wire_group}")]

    def _ask_these(self, brokers: Iterable[str]) -> None:
        """From now on; the fetcher of one that is not among them ends by itself."""
        self._brokers = frozenset(brokers)
        for broker in self._brokers:
            if broker not in self._fetchers or self._fetchers[broker].done():
                fetching = asyncio.create_task(self._fetch(broker), name=f"{self._wire_group} of {broker}")
                self._fetchers[broker] = fetching

    async def receive(self, limit: int, wait_s: float) -> list[Arrival]:
        deadline = asyncio.get_running_loop().time() + wait_s
        self._askers += 1
        self._limit = limit
        self._asked.set()
        try:
            while True:
                if self._ready:
                    await self._gather(limit)
                if found := self._take(limit):
                    return found
                if self._lost is not None:
                    raise self._lost
                self._news.clear()
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._news.wait()
                except TimeoutError:
                    return []
        finally:
            self._askers -= 1
            if not self._askers:
                self._asked.clear()

    def held(self, arrivals: Sequence[Arrival]) -> list[bool]:
        now = asyncio.get_running_loop().time()
        return [_is_held(arrival, now) for arrival in arrivals]

    async def settle(self, arrivals: Sequence[Arrival]) -> list[bool]:
        now = asyncio.get_running_loop().time()
        results = [_is_held(arrival, now) for arrival in arrivals]
        done: list[_Held] = []
        for arrival, is_held in zip(arrivals, results, strict=True):
            one = _token(arrival)
            if is_held and not one.is_done:
                done += one.lane.settle(one)
        if not done:
            return results
        refused = await self._acknowledge(done)
        return [
            result and _token(arrival).serial not in refused for arrival, result in zip(arrivals, results, strict=True)
        ]

    async def restart(self) -> None:
        """The broker need not know: what was handed out is handed out again."""
        for one in self._lanes.values():
            one.epoch = self._transport.next_epoch()
            for held in one.held.values():
                held.epoch = one.epoch
        waiting = [held for one in self._lanes.values() for held in one.held.values() if not held.is_done]
        self._ready = deque(sorted(waiting, key=lambda held: held.serial))
        self._news.set()

    def let_go(self) -> None:
        """What we hold is not there any more."""
        for one in self._lanes.values():
            one.is_over = True
        self._lanes.clear()
        self._ready.clear()

    async def close(self) -> None:
        """It ends once begun, though who waits for that is cancelled; whoever calls again waits for the same."""
        if self._closing is None:
            self._is_closed = True
            self._asked.set()
            self._closing = asyncio.create_task(self._close(), name=f"closing of {self._wire_group}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        # A question that is left alone is answered all the same, and what the answer brings then waits for INVISIBLE_S.
        if self._fetchers:
            await asyncio.wait(self._fetchers.values(), timeout=LAST_ANSWER_S)
        await end_tasks(*self._fetchers.values(), *self._keepers)
        with suppress(TimeoutError, KassaError):
            async with asyncio.timeout(FAREWELL_S):
                await self._give_back()
        if self._session_now is not None:
            await self._session_now.end()
        self.let_go()
        self._lost = BrokerUnreachable("The subscription was closed.", broker="rocketmq")
        self._news.set()
        self._transport.forget(self)

    async def _gather(self, limit: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_S):
                while self._has_more and len(self._ready) < limit:
                    self._news.clear()
                    await self._news.wait()

    def _take(self, limit: int) -> list[Arrival]:
        found: list[Arrival] = []
        now = asyncio.get_running_loop().time()
        while self._ready and len(found) < limit:
            held = self._ready.popleft()
            if held.lane.has(held, now):
                redeliveries = max(held.message.system_properties.delivery_attempt - 1, 0)
                found.append(Arrival(packet_of(held.message), redeliveries, _sent_at(held.message), held, held.epoch))
        return found

    # Fetching

    async def _fetch(self, broker: str) -> None:
        """Asks one broker for packets whenever somebody asks us."""
        # The same name until an answer has come whole: whoever asks under it again gets the same packets.
        attempt = new_id()
        loop = asyncio.get_running_loop()
        while True:
            await self._asked.wait()
            if self._is_closed or broker not in self._brokers:
                return
            session: _Session | None = None
            try:
                session = await self._session()
                began = loop.time()
                messages = await self._ask(session, broker, attempt)
            except (
                grpc.aio.AioRpcError,
                # The connection of this session was given up by somebody else, and is closed by now.
                grpc.aio.UsageError,
                asyncio.InvalidStateError,
                BrokerUnreachable,
                QueueNotFound,
                QueueMismatch,
                SettingInvalid,
                _Refused,
            ) as error:
                await self._mend(session, error)
                continue
            except asyncio.CancelledError as error:
                if is_ended():
                    raise
                # Likewise, and gRPC has ended what was under way on it.
                await self._mend(session, error)
                continue
            except Exception as error:
                # The outermost loop: without it nothing would be asked for any more, and nobody told. Once each, since the same
                # packets come again until they were taken.
                if _why(error) != self._complaint:
                    log.exception("rocketmq.fetcher", group=self._wire_group, reason=_why(error))
                await self._mend(session, error)
                continue
            attempt = new_id()
            if self._lost is not None:
                log.info("rocketmq.stream_back", group=self._wire_group)
                self._lost, self._complaint = None, ""
            if messages:
                self._take_in(broker, messages, began)

    async def _ask(self, session: _Session, broker: str, attempt: str) -> list[Any]:
        size = max(1, min(self._limit - len(self._ready), RECEIVE_MAX))
        request = make(
            "ReceiveMessageRequest",
            group=resource(self._wire_group),
            message_queue=make(
                "MessageQueue",
                topic=resource(self._wire_topic),
                id=-1,
                permission=2,
                broker=make("Broker", name=broker),
            ),
            filter_expression=make("FilterExpression", type=wire.TAG, expression="*"),
            batch_size=size,
            invisible_duration=wire.duration(INVISIBLE_S),
            long_polling_timeout=wire.duration(POLL_S),
            attempt_id=attempt,
        )
        asked = session.channel.receive(request, metadata=self._identity.metadata(), timeout=POLL_S + LATE_S)
        messages: list[Any] = []
        async for part in asked:
            if part.HasField("message"):
                messages.append(part.message)
            elif part.HasField("status") and part.status.code not in (wire.OK, wire.MESSAGE_NOT_FOUND, wire.NOT_FOUND):
                raise _Refused(part.status.code, part.status.message)
        self._has_more = len(messages) == size
        return messages

    def _take_in(self, broker: str, messages: Iterable[Any], began: float) -> None:
        """began: when they were asked for. Their time runs since they left the broker, and an answer may take long to us."""
        expires_at = began + INVISIBLE_S - MARGIN_S
        fresh: dict[tuple[str, int], _Lane] = {}
        for message in messages:
            place = (broker, message.system_properties.queue_id)
            one = fresh.get(place)
            if one is None:
                one = fresh[place] = self._lane_for(place)
            held = _Held(one, self._transport.next_serial(), message, expires_at)
            one.held[held.serial] = held
            self._ready.append(held)
        self._news.set()

    def _lane_for(self, place: tuple[str, int]) -> _Lane:
        """The lane that takes what has just come from a queue."""
        one = self._lanes.get(place)
        if one is not None and one.is_fifo and one.held:
            log.info("rocketmq.lane_given_again", group=self._wire_group, queue=place[1], held=len(one.held))
            one.is_over = True
            one = None
        if one is None:
            one = self._lanes[place] = _Lane(self._transport.next_epoch(), is_fifo=self.topic.keyed)
        return one

    async def _mend(self, session: _Session | None, error: BaseException) -> None:
        """Something went wrong: the next question begins anew."""
        if self._is_closed:
            return
        if session is not None:
            await self._end(session)
            if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._transport.link.renew(session.channel)
        complaint = _why(error)
        if complaint != self._complaint:
            log.warning("rocketmq.stream_lost", group=self._wire_group, reason=complaint)
            self._complaint = complaint
        if isinstance(error, QueueNotFound) or (isinstance(error, _Refused) and error.code == wire.TOPIC_NOT_FOUND):
            await self._make_again()
        if isinstance(error, BrokerUnreachable):
            self._lost = error
        else:
            self._lost = BrokerUnreachable(f"{self._transport.link.shown}: {complaint}", broker="rocketmq")
        self._news.set()
        await asyncio.sleep(RETRY_S)

    async def _make_again(self) -> None:
        try:
            await self._transport.make_again(self.topic, self._group)
        except asyncio.CancelledError:
            if is_ended():
                raise
            log.info("rocketmq.not_made_again", group=self._wire_group, reason="the connection was given up")
        except Exception as error:
            # Within the outermost loop, which it must not end either; it is tried again.
            log.exception("rocketmq.not_made_again", group=self._wire_group, reason=_why(error))

    # Session

    async def _session(self) -> _Session:
        async with self._meeting:
            if self._session_now is None or self._session_now.is_over:
                self._session_now = await self._greet()
            return self._session_now

    async def _end(self, session: _Session) -> None:
        await session.end()

    async def _greeted(self) -> None:
        """The first greeting: a group that has just been made may be unknown to the proxy for a while."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + KNOWN_S
        while True:
            try:
                await self._session()
                return
            except QueueNotFound:
                if loop.time() > deadline or not await self._transport.has_group(self.topic, self._group):
                    raise
                await asyncio.sleep(RETRY_S)

    async def _greet(self) -> _Session:
        """Tells the proxy who we are; it answers with what the group is. Raises BrokerUnreachable, QueueNotFound, QueueMismatch."""
        channel = await self._transport.link.live()
        telemetry = channel.telemetry(metadata=self._identity.metadata())
        session = _Session(channel, telemetry)
        try:
            async with asyncio.timeout(GREETING_S):
                await telemetry.write(self._settings())
                answer = await telemetry.read()
        except grpc.aio.AioRpcError as error:
            await session.end()
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise QueueNotFound(_why(error), topic=self.topic.name, group=self._group) from None
            raise BrokerUnreachable(f"{self._transport.link.shown}: {_why(error)}", broker="rocketmq") from error
        except TimeoutError:
            await session.end()
            self._transport.link.renew(channel)
            raise BrokerUnreachable(f"{self._transport.link.shown} does not answer.", broker="rocketmq") from None
        except BaseException:
            await session.end()
            raise
        # None is what protobuf cannot read.
        if answer is grpc.aio.EOF or answer is None:
            await session.end()
            raise BrokerUnreachable(f"{self._transport.link.shown} ends the conversation.", broker="rocketmq")
        if answer.HasField("status") and answer.status.code not in (0, wire.OK):
            await session.end()
            raise _Refused(answer.status.code, answer.status.message)
        try:
            self._check(answer)
        except QueueMismatch:
            await session.end()
            raise
        session.reader = asyncio.create_task(self._listen(session), name=f"telemetry of {self._wire_group}")
        return session

    def _check(self, answer: Any) -> None:
        if answer.HasField("settings") and answer.settings.subscription.fifo != self.topic.keyed:
            raise _group_mismatch(self._wire_group, is_fifo=answer.settings.subscription.fifo)

    async def _listen(self, session: _Session) -> None:
        """What the proxy says by itself is not for us, but for that it ends, or that the group has become another one."""
        try:
            while (answer := await session.telemetry.read()) is not grpc.aio.EOF:
                self._check(answer)
        except (grpc.aio.AioRpcError, QueueMismatch) as error:
            log.debug("rocketmq.telemetry_ended", group=self._wire_group, reason=_why(error))
        finally:
            session.is_over = True

    def _settings(self) -> Any:
        entry = make(
            "SubscriptionEntry",
            topic=resource(self._wire_topic),
            expression=make("FilterExpression", type=wire.TAG, expression="*"),
        )
        subscription = make(
            "Subscription",
            group=resource(self._wire_group),
            subscriptions=[entry],
            long_polling_timeout=wire.duration(POLL_S),
        )
        agent = make("UA", language=6, version=wire.VERSION, platform="kassa", hostname="kassa")
        return make(
            "TelemetryCommand",
            settings=make("Settings", client_type=wire.SIMPLE_CONSUMER, subscription=subscription, user_agent=agent),
        )

    # Keeping

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        beat_at = look_at = loop.time() + BEAT_S
        while True:
            await asyncio.sleep(LOOK_S)
            self._drop_expired(loop.time())
            session = self._session_now
            if (session is None or session.is_over) and not self._all_held():
                continue
            try:
                # A handler that takes long asks for nothing, and what it has is to stay ours.
                session = await self._session()
                if loop.time() >= beat_at:
                    beat_at = loop.time() + BEAT_S
                    await self._beat(session)
                await self._extend(session.channel)
                if loop.time() >= look_at:
                    look_at = loop.time() + BEAT_S
                    await self._look_for_brokers()
            except (
                grpc.aio.AioRpcError,
                # Somebody else gave the connection up, or ended the session while we spoke.
                grpc.aio.UsageError,
                asyncio.InvalidStateError,
                asyncio.CancelledError,
                KassaError,
                _Refused,
                TimeoutError,
            ) as error:
                if is_ended():
                    raise
                log.info("rocketmq.not_kept", group=self._wire_group, reason=_why(error))
                if session is not None:
                    await session.end()
            except Exception as error:
                # The outermost loop: without it nothing would be extended any more.
                log.exception("rocketmq.keeper", group=self._wire_group, reason=_why(error))

    async def _beat(self, session: _Session) -> None:
        request = make("HeartbeatRequest", group=resource(self._wire_group), client_type=wire.SIMPLE_CONSUMER)
        answer = await session.channel.heartbeat(request, metadata=self._identity.metadata(), timeout=GREETING_S)
        _require_ok(answer.status)
        async with asyncio.timeout(GREETING_S):
            await session.telemetry.write(self._settings())

    async def _look_for_brokers(self) -> None:
        """One that was away when we began, or was added since, has packets too; one that was taken away is no trouble."""
        # Whatever is wrong with the topic, the fetchers say so.
        with suppress(KassaError, _Refused):
            brokers = await self._transport.brokers_of(self.topic, self._group)
            if brokers and not self._is_closed:
                self._ask_these(brokers)

    async def _extend(self, channel: Channel) -> None:
        """Exchanges the handles of what we have held for half of its time."""
        async with self._handles:
            # Chosen now: who waited for the handles may have waited until some were over, or acknowledged.
            now = asyncio.get_running_loop().time()
            old = [held for held in self._all_held() if held.expires_at < now + INVISIBLE_S / 2]
            # Each to its end: a handle that is still being exchanged must not be used.
            changes = (self._change(channel, held, INVISIBLE_S) for held in old)
            results = await asyncio.gather(*changes, return_exceptions=True)
        for result in results:
            if result is not None:
                raise result

    async def _change(self, channel: Channel, held: _Held, seconds: float) -> None:
        request = make(
            "ChangeInvisibleDurationRequest",
            group=resource(self._wire_group),
            topic=resource(self._wire_topic),
            receipt_handle=held.handle,
            invisible_duration=wire.duration(seconds),
            message_id=held.message.system_properties.message_id,
        )
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await channel.change(request, metadata=self._identity.metadata(), timeout=FAREWELL_S)
        # What was over meanwhile stays over: whoever asked was told so, and nobody would settle what is held on.
        if answer.status.code == wire.OK and loop.time() < held.expires_at:
            held.handle = answer.receipt_handle or held.handle
            held.expires_at = began + seconds - MARGIN_S

    async def _acknowledge(self, done: Sequence[_Held]) -> set[int]:
        """The serials of those that the broker did not take."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ACK_S
        refused: set[int] = set()
        async with self._handles:
            for start in range(0, len(done), ACK_BATCH):
                batch = done[start : start + ACK_BATCH]
                while True:
                    try:
                        refused |= await self._acknowledge_once(batch, deadline - loop.time())
                    except (grpc.aio.AioRpcError, BrokerUnreachable) as error:
                        if loop.time() + RETRY_S < deadline and not self._is_closed:
                            await asyncio.sleep(RETRY_S)
                            continue
                        log.info("rocketmq.not_acknowledged", group=self._wire_group, reason=_why(error))
                        refused.update(held.serial for held in batch)
                    break
        return refused

    async def _acknowledge_once(self, batch: Sequence[_Held], within_s: float) -> set[int]:
        channel = await self._transport.link.live(within_s)
        entries = [
            make("AckMessageEntry", message_id=held.message.system_properties.message_id, receipt_handle=held.handle)
            for held in batch
        ]
        request = make(
            "AckMessageRequest", group=resource(self._wire_group), topic=resource(self._wire_topic), entries=entries
        )
        answer = await channel.ack(request, metadata=self._identity.metadata(), timeout=max(within_s, 0.1))
        if answer.status.code == wire.OK:
            return set()
        good = {entry.receipt_handle for entry in answer.entries if entry.status.code == wire.OK}
        bad = [held for held in batch if held.handle not in good]
        log.info("rocketmq.not_taken", group=self._wire_group, packets=len(bad), reason=answer.status.message)
        return {held.serial for held in bad}

    async def _give_back(self) -> None:
        held = self._all_held()
        if not held:
            return
        # Not the session's: that may have been given up just now.
        channel = await self._transport.link.live(FAREWELL_S)
        async with self._handles:
            # One that cannot be given back comes again when its time is over.
            await asyncio.gather(*(self._change(channel, one, BACK_S) for one in held), return_exceptions=True)

    def _drop_expired(self, now: float) -> None:
        for one in self._lanes.values():
            one.drop_expired(now)

    def _all_held(self) -> list[_Held]:
        """Whose time is not over."""
        now = asyncio.get_running_loop().time()
        self._drop_expired(now)
        return [
            held
            for one in self._lanes.values()
            if not one.is_over
            for held in one.held.values()
            if now < held.expires_at
        ]


def _token(arrival: Arrival) -> _Held:
    if not isinstance(arrival.token, _Held):
        raise InvariantBroken("A packet of another transport was settled here.", packet=arrival.packet.id)
    return arrival.token


def _is_held(arrival: Arrival, now: float) -> bool:
    one = _token(arrival)
    return one.lane.has(one, now) and one.epoch == arrival.epoch


def _group_mismatch(group: str, *, is_fifo: bool) -> QueueMismatch:
    return QueueMismatch(
        f"The group {group} {'is' if is_fifo else 'is not'} orderly on the broker, and its topic needs the other. Delete it "
        "while nobody consumes, and provision again: consumers get what is there once more, and handle nothing twice.",
        broker="rocketmq",
    )


# The broker


class _Route(NamedTuple):
    """Where a topic is, as the proxy says."""

    brokers: tuple[str, ...]
    types: frozenset[int]
    """Of the messages that it takes; empty where the proxy does not know."""


class _Sending:
    """The packets of one `send`, in chains: of a chain one step is under way at a time."""

    def __init__(self, topic: str, packets: Sequence[Packet], groups: Sequence[str], deadline: float) -> None:
        """groups: the message group of each packet, '' on a topic of the type NORMAL."""
        self.topic = topic
        self.packets = packets
        self.groups = groups
        self.deadline = deadline
        self.receipts: list[Receipt] = [Failed("not sent", is_retryable=True)] * len(packets)
        self.chains: deque[list[list[int]]] = deque()
        self.gone: list[int] = []
        """Places of those for which there is no topic, as the proxy says."""
        self.refusal: int | None = None
        """What the proxy says if we have no right to send there."""


class RocketTransport:
    """One RocketMQ."""

    name = "rocketmq"
    traits = TRAITS

    def __init__(self, server: Server, clock: Clock | None = None) -> None:
        self.server = server
        self.link = Link(server)
        self._clock = clock or SystemClock()
        self._identity = Identity(server)
        self._streams: list[RocketStream] = []
        self._made: dict[str, Topic] = {}
        """What this process provisioned, and may make again."""
        self._types: dict[str, int] = {}
        """Of topics that others have: what they take."""
        self._epochs = count(1)
        self._serials = count(1)

    async def open(self) -> None:
        channel = await self.link.live(2 * CONNECT_S)
        try:
            # A question that is refused shows that the URL has no right.
            answer = await self._ask_route(channel, ANY_TOPIC)
        except grpc.aio.AioRpcError as error:
            await self.link.close()
            raise BrokerUnreachable(f"{self.link.shown}: {_why(error)}", broker="rocketmq") from error
        except BaseException:
            await self.link.close()
            raise
        if answer.status.code in _NO_RIGHT:
            await self.link.close()
            raise SettingInvalid(f"{self.link.shown} refuses us: {answer.status.message}.", broker="rocketmq")

    async def close(self) -> None:
        for stream in list(self._streams):
            await stream.close()
        await self.link.close()

    def next_epoch(self) -> int:
        return next(self._epochs)

    def next_serial(self) -> int:
        return next(self._serials)

    def forget(self, stream: RocketStream) -> None:
        """It is closed."""
        if stream in self._streams:
            self._streams.remove(stream)

    # Sending

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        """A topic that is there keeps packets, whether or not somebody receives them."""
        try:
            name = topic_name(topic.name)
        except SettingInvalid as error:
            return [Failed(error.detail, is_retryable=False)] * len(packets)
        groups = [message_group(self._lane(topic, packet), topic.lanes) if topic.keyed else "" for packet in packets]
        deadline = asyncio.get_running_loop().time() + deadline_s
        sending = _Sending(name, packets, groups, deadline)
        await self._send(sending, range(len(packets)))
        while sending.gone:
            gone, sending.gone = sending.gone, []
            verdict = await self._verdict(topic, name, deadline)
            if verdict is not None:
                for place in gone:
                    sending.receipts[place] = verdict
                break
            await self._send(sending, gone)
        return sending.receipts

    async def reply(self, address: str, packets: Sequence[Packet], *, deadline_s: float) -> list[Receipt]:
        """An address is a topic: as RocketMQ calls it, or as we do. It may be of the type NORMAL or FIFO."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        try:
            name = address if _THEIR_NAME.fullmatch(address) else topic_name(address)
            async with asyncio.timeout_at(deadline):
                type_ = self._types.get(name) or await self._type_of(name)
        except SettingInvalid as error:
            return [Failed(error.detail, is_retryable=False)] * len(packets)
        except _Refused as error:
            return [Failed(_why(error), is_retryable=not await self._is_final(error.code, deadline))] * len(packets)
        except (BrokerUnreachable, TimeoutError, grpc.aio.AioRpcError) as error:
            return [Failed(f"RocketMQ cannot be reached: {_why(error)}", is_retryable=True)] * len(packets)
        groups = [packet.key or packet.id or "reply" if type_ == wire.FIFO else "" for packet in packets]
        sending = _Sending(name, packets, groups, deadline)
        await self._send(sending, range(len(packets)))
        for place in sending.gone:
            self._types.pop(name, None)
            sending.receipts[place] = Failed(f"there is no topic {name} that takes this", is_retryable=False)
        if sending.refusal is not None and await self._is_final(sending.refusal, deadline):
            # A right is one to the topic: what was not sent behind the first one would be refused too.
            return [one._replace(is_retryable=False) if isinstance(one, Failed) else one for one in sending.receipts]
        return sending.receipts

    async def _is_final(self, code: int, deadline: float) -> bool:
        """Whether an address of which the proxy says this takes no answer of ours. Any other refusal may pass.

        RocketMQ 5.5 says UNAUTHORIZED of a topic that we may not use, and of a key that it does not know: then it refuses whatever
        we ask, and nothing is wrong with the address. Source: `ResponseBuilder.buildStatus` of its proxy.
        """
        if code != wire.UNAUTHORIZED:
            return code in _NO_SUCH_TOPIC
        try:
            async with asyncio.timeout_at(deadline):
                answer = await self._ask_route(await self.link.live(), ANY_TOPIC)
        except (BrokerUnreachable, TimeoutError, grpc.aio.AioRpcError):
            return False
        return answer.status.code not in _NO_RIGHT

    async def _type_of(self, name: str) -> int:
        """Raises _Refused, also when it takes neither; BrokerUnreachable, AioRpcError."""
        types = (await self._route(name)).types
        if types and not types & {wire.NORMAL, wire.FIFO}:
            raise _Refused(wire.WRONG_TYPE, f"{name} takes no ordinary messages")
        self._types[name] = wire.FIFO if types and wire.NORMAL not in types else wire.NORMAL
        return self._types[name]

    def _lane(self, topic: Topic, packet: Packet) -> int:
        # An envelope holds one lane, and is named after it.
        if topic.envelopes and packet.key.isdecimal():
            return int(packet.key) % topic.lanes
        return lane(packet.key or packet.id, topic.lanes)

    async def _send(self, sending: _Sending, places: Iterable[int]) -> None:
        sending.chains.extend(_chains(sending, places))
        workers = [
            asyncio.create_task(self._send_chains(sending), name="send to rocketmq")
            for _ in range(min(WINDOW, len(sending.chains)))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()

    async def _send_chains(self, sending: _Sending) -> None:
        while sending.chains:
            steps = deque(sending.chains.popleft())
            while steps:
                step = steps.popleft()
                receipt = await self._send_step(sending, step)
                if receipt is _SPLIT:
                    # Nothing of it is there: one by one, so that what is wrong with one is not the others' fault.
                    sending.chains.extend([[place]] for place in step)
                    continue
                for place in step:
                    sending.receipts[place] = receipt
                if receipt is _GONE:
                    sending.gone += [place for one in (step, *steps) for place in one]
                    break
                if isinstance(receipt, Unknown) or (isinstance(receipt, Failed) and receipt.is_retryable):
                    for place in (place for one in steps for place in one):
                        sending.receipts[place] = Failed(
                            f"not sent, for one before it: {receipt.reason}", is_retryable=True
                        )
                    break

    async def _send_step(self, sending: _Sending, step: Sequence[int]) -> Receipt:
        loop = asyncio.get_running_loop()
        try:
            channel = await self.link.live(sending.deadline - loop.time())
        except BrokerUnreachable as error:
            return Failed(error.detail, is_retryable=True)
        left_s = sending.deadline - loop.time()
        if left_s <= 0:
            return Failed("RocketMQ does not take it in time", is_retryable=True)
        messages = [message_of(sending.packets[place], sending.topic, sending.groups[place]) for place in step]
        try:
            sent = channel.send(
                make("SendMessageRequest", messages=messages), metadata=self._identity.metadata(), timeout=left_s
            )
            answer = await self.link.answer(channel, sent)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Unknown("RocketMQ has not confirmed it in time")
            if "failed to connect" in (error.details() or "").lower():
                return Failed(_why(error), is_retryable=True)
            return Unknown(_why(error))
        except asyncio.CancelledError:
            if is_ended():
                raise
            # Somebody else gave the connection up, and gRPC has ended what was under way on it.
            return Unknown("the connection was given up before RocketMQ confirmed it")
        if answer.status.code in _NO_RIGHT:
            sending.refusal = answer.status.code
        return _receipt(answer.status, is_single=len(step) == 1)

    async def _verdict(self, topic: Topic, name: str, deadline: float) -> Receipt | None:
        """The proxy says that there is no such topic, or that it is of another type. None: send again."""
        loop = asyncio.get_running_loop()
        wanted = _type(topic)
        try:
            async with asyncio.timeout_at(deadline):
                types = await self._types_at_brokers(name)
                if not types and name in self._made:
                    await self._make_topic_again(self._made[name])
                    return None
                if not types:
                    return Failed(f"nobody receives {topic.name}", is_retryable=False)
                if types != {wanted}:
                    there = ", ".join(sorted(types))
                    return Failed(f"{name} is of the type {there} and not {wanted}", is_retryable=False)
                await asyncio.sleep(RETRY_S)
        except (BrokerUnreachable, SettingInvalid) as error:
            return Failed(error.detail, is_retryable=True)
        except TimeoutError:
            pass
        if loop.time() + RETRY_S >= deadline:
            return Failed("the topic is there, and the proxy does not know it yet", is_retryable=True)
        return None

    # Receiving

    async def subscribe(self, topic: Topic, group: str) -> RocketStream:
        stream = RocketStream(self, topic, group)
        self._streams.append(stream)
        try:
            await stream.start()
        except BaseException as error:
            await stream.close()
            if isinstance(error, _Refused):
                raise BrokerUnreachable(f"{self.link.shown}: {error}", broker="rocketmq") from error
            raise
        return stream

    async def brokers_of(self, topic: Topic, group: str) -> tuple[str, ...]:
        """Raises QueueNotFound, BrokerUnreachable."""
        try:
            return (await self._route(topic_name(topic.name))).brokers
        except _Refused as error:
            if error.code == wire.TOPIC_NOT_FOUND:
                raise QueueNotFound(_why(error), topic=topic.name, group=group) from None
            raise
        except grpc.aio.AioRpcError as error:
            raise BrokerUnreachable(f"{self.link.shown}: {_why(error)}", broker="rocketmq") from error

    async def depth(self, topic: Topic, group: str) -> int | None:
        """What is not acknowledged, in lanes; of a NORMAL topic, as the broker reckons."""
        if self.server.name_server is None:
            return None
        fields = {"consumerGroup": group_name(topic.name, group), "topic": topic_name(topic.name)}
        waiting = 0
        for place in await self._masters():
            answer = await wire.ask(self.server, place, wire.CONSUME_STATS, fields)
            if answer.code in (wire.NO_TOPIC, wire.NO_GROUP):
                raise QueueNotFound(answer.remark, topic=topic.name, group=group)
            found = _OFFSETS.findall(answer.body)
            if answer.code != wire.SUCCESS or not found:
                raise BrokerUnreachable(
                    f"{place.host}:{place.port}: {answer.remark or 'no offsets'}", broker="rocketmq"
                )
            with _reading(place):
                waiting += sum(int(end) - int(done) for end, done in found)
        return waiting

    # Topology

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool) -> list[tuple[str, str]]:
        known = await self._groups()
        said: list[tuple[str, str]] = []
        for topic in topics:
            types = await self._types_at_brokers(topic_name(topic.name))
            if types and types != {_type(topic)}:
                raise QueueMismatch(
                    f"The topic {topic_name(topic.name)} is of the type {', '.join(sorted(types))} and has to be "
                    f"{_type(topic)}. Delete it when it is empty, or give this topic another name; then provision again.",
                    topic=topic.name, broker=self.link.shown,
                )  # fmt: skip
            if not types and not topic.groups:
                said.append((topic.name, ""))
            if not types and not verify_only:
                await self._create_topic(topic)
            for group in topic.groups:
                name = group_name(topic.name, group)
                if name in known and known[name] != topic.keyed:
                    raise _group_mismatch(name, is_fifo=known[name])
                if name not in known or not types:
                    said.append((topic.name, group))
                if name not in known and not verify_only:
                    # Whatever comes to a topic that has just been made is for the groups that it was made with.
                    await (self._begin(topic, name) if types else self._create_group(topic, name))
            if not verify_only:
                self._made[topic_name(topic.name)] = topic
        return said

    async def make_again(self, topic: Topic, group: str) -> None:
        """Somebody deleted a topic or a group under a consumer. What this process had made is made again; the group then gets
        everything that is there, so nothing is missed."""
        made = self._made.get(topic_name(topic.name))
        if made is None:
            return
        try:
            if not await self._types_at_brokers(topic_name(topic.name)):
                await self._make_topic_again(made)
            name = group_name(topic.name, group)
            if name not in await self._groups():
                await self._create_group(topic, name)
                log.warning("rocketmq.group_made_again", topic=topic.name, group=group)
        except KassaError as error:
            log.warning("rocketmq.not_made_again", topic=topic.name, group=group, reason=_why(error))

    async def _make_topic_again(self, topic: Topic) -> None:
        # An acknowledgement of what was there would be taken for one of what comes to stand in its place.
        for stream in self._streams:
            if stream.topic.name == topic.name:
                stream.let_go()
        await self._create_topic(topic)
        log.warning("rocketmq.topic_made_again", topic=topic.name)

    async def has_group(self, topic: Topic, group: str) -> bool:
        """Whether the brokers have it, whatever the proxy remembers."""
        if self.server.name_server is None:
            return False
        return group_name(topic.name, group) in await self._groups()

    async def _route(self, name: str) -> _Route:
        """Raises _Refused, BrokerUnreachable, AioRpcError."""
        answer = await self._ask_route(await self.link.live(), name)
        _require_ok(answer.status)
        queues = answer.message_queues
        return _Route(
            tuple(sorted({queue.broker.name for queue in queues})),
            frozenset(one for queue in queues for one in queue.accept_message_types),
        )

    async def _ask_route(self, channel: Channel, name: str) -> Any:
        proxy = self.server.proxy
        endpoints = make("Endpoints", scheme=3, addresses=[make("Address", host=proxy.host, port=proxy.port)])
        request = make("QueryRouteRequest", topic=resource(name), endpoints=endpoints)
        asked = channel.query_route(request, metadata=self._identity.metadata(), timeout=CONNECT_S)
        return await self.link.answer(channel, asked)

    async def _masters(self) -> list[Address]:
        if self.server.name_server is None:
            raise SettingInvalid(
                f"{self.link.shown}: topics and groups are made and looked for at the brokers, so the URL needs "
                "namesrv=HOST:PORT, where the name server is: rocketmq://PROXY:8081?namesrv=NAMESERVER:9876.",
                broker="rocketmq",
            )
        answer = await wire.ask(self.server, self.server.name_server, wire.CLUSTER)
        if answer.code != wire.SUCCESS:
            raise BrokerUnreachable(f"The name server says: {answer.remark}", broker="rocketmq")
        found: list[Address] = []
        with _reading(self.server.name_server):
            for broker in answer.json().get("brokerAddrTable", {}).values():
                # The master of each has the number 0.
                if place := broker["brokerAddrs"].get("0"):
                    host, _, port = place.rpartition(":")
                    found.append(Address(host, int(port)))
        if not found:
            raise BrokerUnreachable("The name server knows no broker.", broker="rocketmq")
        return found

    async def _types_at_brokers(self, name: str) -> set[str]:
        """Of a topic; empty when a broker lacks it."""
        types: set[str] = set()
        for place in await self._masters():
            answer = await wire.ask(self.server, place, wire.TOPIC_CONFIG, {"topic": name})
            if answer.code == wire.NO_TOPIC:
                return set()
            _require_success(answer)
            with _reading(place):
                types.add(str(answer.json().get("attributes", {}).get("message.type", "NORMAL")))
        return types

    async def _groups(self) -> dict[str, bool]:
        """Those that all brokers have, and whether each is orderly. A question for one of them would make it."""
        found: list[dict[str, bool]] = []
        for place in await self._masters():
            answer = await wire.ask(self.server, place, wire.ALL_GROUPS)
            _require_success(answer)
            with _reading(place):
                table = answer.json().get("subscriptionGroupTable", {})
                found.append({name: bool(one.get("consumeMessageOrderly")) for name, one in table.items()})
        common = set.intersection(*(set(one) for one in found))
        return {name: orderly for name, orderly in found[0].items() if name in common}

    async def _create_topic(self, topic: Topic) -> None:
        """And waits until the proxy knows it."""
        name = topic_name(topic.name)
        queues = str(max(topic.lanes, 1))
        fields = {
            "topic": name, "defaultTopic": "TBW102", "readQueueNums": queues, "writeQueueNums": queues, "perm": "6",
            "topicFilterType": "SINGLE_TAG", "topicSysFlag": "0", "order": "false",
            "attributes": f"+message.type={_type(topic)}",
        }  # fmt: skip
        for place in await self._masters():
            _require_success(await wire.ask(self.server, place, wire.UPDATE_TOPIC, fields))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + KNOWN_S
        while loop.time() < deadline:
            with suppress(_Refused, grpc.aio.AioRpcError):
                if (wire.FIFO if topic.keyed else wire.NORMAL) in (await self._route(name)).types:
                    return
            await asyncio.sleep(0.05)
        raise BrokerUnreachable(f"{self.link.shown} does not come to know the topic {name}.", broker="rocketmq")

    async def _create_group(self, topic: Topic, name: str) -> None:
        settings = {
            "groupName": name, "consumeEnable": True, "consumeFromMinEnable": True, "consumeBroadcastEnable": False,
            "consumeMessageOrderly": topic.keyed, "retryQueueNums": 1, "retryMaxTimes": DELIVERIES_MAX, "brokerId": 0,
            "whichBrokerWhenConsumeSlowly": 1, "notifyConsumerIdsChangedEnable": True,
        }  # fmt: skip
        for place in await self._masters():
            _require_success(await wire.ask(self.server, place, wire.UPDATE_GROUP, body=json.dumps(settings).encode()))

    async def _begin(self, topic: Topic, name: str) -> None:
        """A new group gets what is sent from now on; else it would get everything that the topic still has."""
        wire_topic = topic_name(topic.name)
        ends: list[tuple[Address, dict[str, str]]] = []
        for place in await self._masters():
            answer = await wire.ask(self.server, place, wire.TOPIC_STATS, {"topic": wire_topic})
            _require_success(answer)
            for queue, end in _ENDS.findall(answer.body):
                if end != b"0":
                    fields = {"consumerGroup": name, "topic": wire_topic, "queueId": queue.decode()}
                    ends.append((place, {**fields, "commitOffset": end.decode()}))
        await self._create_group(topic, name)
        for place, fields in ends:
            _require_success(await wire.ask(self.server, place, wire.UPDATE_OFFSET, fields))


_OFFSETS = re.compile(rb'"brokerOffset":(\d+),"consumerOffset":(\d+)')
_ENDS = re.compile(rb'"queueId":(\d+),"topic":"[^"]*"\}:\{[^}]*?"maxOffset":(\d+)')
"""Of answers whose keys are objects, which no JSON reader takes."""

_NO_SUCH_TOPIC = (wire.TOPIC_NOT_FOUND, wire.ILLEGAL_TOPIC, wire.WRONG_TYPE, wire.FORBIDDEN)
"""What the proxy says of an address that takes no answer of ours."""
_NO_RIGHT = (wire.UNAUTHORIZED, wire.FORBIDDEN)
_GONE = Failed("there is no such topic, or it takes no such messages", is_retryable=False)
_SPLIT = Failed("something in it is wrong", is_retryable=False)


def _type(topic: Topic) -> str:
    return "FIFO" if topic.keyed else "NORMAL"


@contextmanager
def _reading(place: Address) -> Iterator[None]:
    """Makes BrokerUnreachable of an answer that is not what it should be."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BrokerUnreachable(
            f"{place.host}:{place.port} says what is not understood: {error!r}.", broker="rocketmq"
        ) from error


def _require_success(answer: wire.Answer) -> None:
    if answer.code == wire.NO_PERMISSION:
        raise SettingInvalid(f"The broker refuses us: {answer.remark}.", broker="rocketmq")
    if answer.code != wire.SUCCESS:
        raise BrokerUnreachable(f"The broker says {answer.code}: {answer.remark}", broker="rocketmq")


def _chains(sending: _Sending, places: Iterable[int]) -> list[list[list[int]]]:
    """Packets of one key one after the other; those without order in batches, or where only single ones have a lane, at once."""
    chains: list[list[list[int]]] = []
    by_key: dict[str, list[list[int]]] = {}
    batch: list[int] = []
    size = 0
    for place in places:
        packet = sending.packets[place]
        if sending.groups[place]:
            if not packet.key:
                chains.append([[place]])
            else:
                if packet.key not in by_key:
                    chains.append(by_key.setdefault(packet.key, []))
                by_key[packet.key].append([place])
            continue
        length = len(packet.body) + sum(len(name) + len(value) for name, value in packet.headers.items()) * 4
        if batch and (len(batch) == SEND_BATCH or size + length > SEND_BATCH_BYTES):
            chains.append([batch])
            batch, size = [], 0
        batch.append(place)
        size += length
    return [*chains, [batch]] if batch else chains


def _receipt(status: Any, *, is_single: bool) -> Receipt:
    """What became of the messages of one call."""
    code = status.code
    if code == wire.OK:
        return Confirmed()
    reason = f"{code} {status.message}"
    if code in (wire.TOPIC_NOT_FOUND, wire.WRONG_TYPE):
        return _GONE
    if code == wire.TOO_MANY or code in _NO_RIGHT:
        # Of a topic of ours somebody can give us the right.
        return Failed(reason, is_retryable=True)
    if 40_000 <= code < 50_000:
        return Failed(reason, is_retryable=False) if is_single else _SPLIT
    # It may be in memory there, or on one broker and not on its replica.
    return Unknown(reason)
