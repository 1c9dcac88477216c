"""RabbitMQ from 3.10 on, over AMQP 0-9-1 with aiormq.

    amqp://USER:PASSWORD@HOST:PORT/VHOST        amqps://… over TLS
        ?ca=FILE          whom to trust, instead of the machine's authorities       ?verify=full|ca|none   none only for tests
        ?cert=FILE&key=FILE   our own certificate      ?auth=plain|external         external: the certificate is the login
        ?heartbeat=SECONDS    10 unless told otherwise

How topics look on the broker, for people who bring their own programs:

- A topic is a durable topic exchange of its name. A message's routing key is its event's type (`payment.succeeded`), else the
  topic's name, so anybody binds a queue of his own with `payment.*` or `#`. CloudEvents attributes are `cloudEvents:…` headers.
- A group of ours has a quorum queue per lane, `topic:group.N`, with a single active consumer, bound to `@lane.N`. The sender
  computes the lane from the key and names it in the `BCC` header, which the broker reads and takes out. No plugin is needed.
- What was handed out DELIVERIES_MAX times without being settled goes to `topic:group.dead`. That is a net under consumers that
  die before they can count; nobody reads it but people.
- A topic that is declared `plain`, `durable` or `passive` has one queue of its own name, bound with that name.

Two connections: a broker that is short of memory stops reading from those that publish, and acknowledgements must not wait
there. A connection that is lost is built anew with everything on it; what belongs to it (delivery tags, who has what in hand)
is never carried over. aiormq gives connections, channels and declarations; what is done per message is done here in bursts,
because a task and a future for each message is most of what a client costs.
"""

import asyncio
import logging
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec
import structlog
from aiormq import exceptions as refused
from aiormq.abc import ConfirmationFrameType
from aiormq.channel import Channel
from aiormq.connection import Connection, TransportFactory
from pamqp import commands as spec
from pamqp import constants
from pamqp.body import ContentBody
from pamqp.exceptions import PAMQPException
from pamqp.frame import marshal, unmarshal
from pamqp.header import ContentHeader
from yarl import URL

from kassa.clock import Clock, SystemClock
from kassa.errors import BrokerUnreachable, InvariantBroken, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.ids import new_id
from kassa.messaging.binder import Resources
from kassa.messaging.members import BEAT_S, Member, Members, share
from kassa.messaging.model import Arrival, Confirmed, Failed, Packet, Receipt, Traits, Unknown
from kassa.messaging.supplied import CREDIT, SuppliedBinder
from kassa.messaging.topology import Topic, lane
from kassa.settings import without_password

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
CONNECT_S = 5.0
ASK_S = 10.0
"""For one declaration. A quorum queue that has just lost its leader answers after some seconds."""
RETRY_S = 0.5
"""Between two tries to connect or to consume, with jitter."""
HEARTBEAT_S = 10
IN_FLIGHT_MAX = 2000
IN_FLIGHT_BYTES_MAX = 32 * 1024 * 1024
"""What may be unconfirmed at a time; more waits in the senders until their deadlines."""
BURST = 64
BURST_BYTES = 128 * 1024
"""Written at once; then the socket is given the time to take it."""
WINDOW_MIN = 32
"""What a lane may bring without being asked again, so that a consumer is not idle while its batch is settled."""
HANDOVER_S = 5.0
"""A lane that goes to another consumer is kept as long as packets of it are in hand, at most this long."""
ORPHANS_EVERY = 5
"""Beats between two looks for lanes that nobody consumes."""
FRAMES_AHEAD = 300
"""Frames that a channel takes from the connection before it has handled them: a batch's."""

_LOST = (refused.AMQPError, refused.ChannelInvalidStateError, OSError, TimeoutError)
_DIRECT_REPLY = "amq.rabbitmq.reply-to."
_DIRECT = ""
"""The exchange whose routing keys are the names of queues."""
_CE = "cloudEvents:"
_CE_OTHER = "cloudEvents_"
"""The binding allows both; the second one is what JMS can say."""
_ESCAPE = "kassa."
_READ_BY_BROKER = frozenset({"CC", "BCC"})
_PROPERTIES = {
    "content-type": "content_type",
    "correlation-id": "correlation_id",
    "reply-to": "reply_to",
    "content-encoding": "content_encoding",
}
"""Headers that AMQP has a place of their own for; an empty one it cannot tell from none, so that stays among the others."""
_NAME_MAX = 128
_SENT_AT = "kassa-sent-us"
_DELIVERY_COUNT = "x-delivery-count"
_NOBODY, _NO_EXCHANGE = "nobody receives ", "there is no exchange "
"""How the reasons begin for which a topic may have to be made again."""
T = TypeVar("T")


def make_binder(url: str, resources: Resources) -> SuppliedBinder:
    """For `amqp://…` and `amqps://…`. Raises SettingInvalid."""
    return SuppliedBinder(RabbitTransport(read_url(url), Members(resources.pool)), resources)


# Settings


class Server(NamedTuple):
    """Where the broker is and who we are there."""

    shown: str
    """The URL without its password, for people."""
    url: URL
    """As aiormq reads it."""
    vhost: str
    tls: ssl.SSLContext | None


def read_url(url: str) -> Server:
    """The settings in a URL. Raises SettingInvalid, which never shows the password."""
    shown = without_password(url)
    parts = urlsplit(url)
    try:
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
        heartbeat = int(query.pop("heartbeat", HEARTBEAT_S))
    except ValueError as error:
        raise SettingInvalid(f"{shown}: {error}.", broker=shown) from None
    auth = query.pop("auth", "plain")
    tls = _tls(query, shown) if parts.scheme == "amqps" else None
    if query or auth not in ("plain", "external") or not 0 <= heartbeat <= 600:
        wrong = ", ".join(sorted(query)) or "auth (plain or external) or heartbeat (0 … 600)"
        raise SettingInvalid(f"{shown}: wrong setting: {wrong}.", broker=shown)
    place = URL.build(
        scheme=parts.scheme,
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password or "guest"),
        host=parts.hostname or "localhost",
        port=port,
        query={"auth": auth, "heartbeat": str(heartbeat)},
    )
    return Server(shown, place, unquote(parts.path[1:]) or "/", tls)


def _tls(query: dict[str, str], shown: str) -> ssl.SSLContext:
    verify = query.pop("verify", "full")
    cert, key = query.pop("cert", None), query.pop("key", None)
    if verify not in ("full", "ca", "none"):
        raise SettingInvalid(f"{shown}: verify is full, ca or none.", broker=shown)
    try:
        context = ssl.create_default_context(cafile=query.pop("ca", None))
        if cert:
            context.load_cert_chain(cert, key)
    except OSError as error:
        raise SettingInvalid(f"{shown}: its certificates cannot be read: {error}.", broker=shown) from None
    context.check_hostname = verify == "full"
    if verify == "none":
        context.verify_mode = ssl.CERT_NONE
    return context


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


def _dead_queue(topic: Topic, group: str) -> str:
    return f"{topic.name}:{group}.dead"


_QUORUM: Mapping[str, Any] = {"x-queue-type": "quorum", "x-queue-leader-locator": "balanced"}


def _lane_arguments(topic: Topic, group: str) -> dict[str, Any]:
    return {
        **_QUORUM,
        "x-single-active-consumer": True,
        "x-delivery-limit": DELIVERIES_MAX,
        "x-dead-letter-exchange": _DIRECT,
        "x-dead-letter-routing-key": _dead_queue(topic, group),
        # Without these two the net itself may lose what falls into it.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


# What travels


class _Letter(NamedTuple):
    """A packet with its address."""

    packet: Packet
    routing_key: str
    lane: int | None
    is_mandatory: bool


@lru_cache(maxsize=1024)
def _publish_frame(channel: int, exchange: str, routing_key: str, is_mandatory: bool) -> bytes:
    return marshal(spec.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=is_mandatory), channel)


def _encoded(letter: _Letter, exchange: str, channel: int, frame_max: int, sent_us: int) -> bytes:
    """The frames of one message. Raises ValueError or TypeError for what AMQP cannot say."""
    packet = letter.packet
    header = ContentHeader(body_size=len(packet.body), properties=_properties(packet, letter.lane, sent_us))
    head = marshal(header, channel)
    if len(head) > frame_max:
        raise ValueError(f"its headers are larger than {frame_max} bytes")
    parts = [_publish_frame(channel, exchange, letter.routing_key, letter.is_mandatory), head]
    size = frame_max - 8
    for start in range(0, len(packet.body), size):
        parts.append(marshal(ContentBody(packet.body[start : start + size]), channel))
    return b"".join(parts)


def _properties(packet: Packet, lane_number: int | None, sent_us: int) -> spec.Basic.Properties:
    properties = spec.Basic.Properties(delivery_mode=2)
    headers: dict[str, Any] = {}
    for name, value in packet.headers.items():
        if value and (property_ := _PROPERTIES.get(name)):
            setattr(properties, property_, value)
        elif name.startswith("ce-"):
            headers[_CE + name[3:]] = value
        elif name in _READ_BY_BROKER or name.startswith(_ESCAPE):
            headers[_ESCAPE + name] = value
        else:
            headers[name] = value
    if any(len(name) > 32 and len(name.encode()) > _NAME_MAX for name in headers):
        raise ValueError(f"a header's name is longer than {_NAME_MAX} bytes")
    if len(packet.id) <= 64 or len(packet.id.encode()) <= 255:
        properties.message_id = packet.id
    headers[_SENT_AT] = sent_us
    if lane_number is not None:
        headers["BCC"] = [lane_key(lane_number)]
    properties.headers = headers
    return properties


class _Parcel(NamedTuple):
    """A message as it came."""

    tag: int
    redelivered: bool
    properties: spec.Basic.Properties
    body: bytes


def _packet(parcel: _Parcel) -> tuple[Packet, int, datetime | None]:
    """The packet, how often it came before, and when it was sent."""
    properties = parcel.properties
    headers: dict[str, str] = {}
    sent_at = properties.timestamp
    redeliveries = int(parcel.redelivered)
    for name, value in (properties.headers or {}).items():
        if name == _SENT_AT and isinstance(value, int):
            sent_at = _moment(value)
        elif name == _DELIVERY_COUNT and isinstance(value, int):
            redeliveries = value
        elif name.startswith((_CE, _CE_OTHER)):
            headers["ce-" + name[len(_CE) :]] = _text(value)
        else:
            headers[name.removeprefix(_ESCAPE)] = _text(value)
    for name, property_ in _PROPERTIES.items():
        if (text := getattr(properties, property_)) is not None:
            headers[name] = text
    return Packet(properties.message_id or "", "", parcel.body, headers), redeliveries, sent_at


def _moment(microseconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(microseconds / 1_000_000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _text(value: object) -> str:
    """A header of somebody else as text: a table or a list as JSON."""
    match value:
        case str():
            return value
        case bytes() | bytearray():
            return bytes(value).decode(errors="replace")
        case bool() | None | dict() | list():
            return msgspec.json.encode(value, enc_hook=str).decode()
        case _:
            return str(value)


# Connections


class _Mended(asyncio.StreamReader):
    """Frames as they come, but for those that the client cannot decode and would end the connection over, for ever: somebody
    sent bytes that are no text, or a date beyond all calendars. Such a message arrives without its properties."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._head = b""

    def at_eof(self) -> bool:
        return self._reader.at_eof()

    async def readexactly(self, n: int) -> bytes:
        """aiormq reads a frame's head (7 bytes, in two parts), then the rest."""
        data = await self._reader.readexactly(n)
        if len(self._head) < constants.FRAME_HEADER_SIZE:
            self._head += data
            return data
        frame, self._head = self._head + data, b""
        try:
            unmarshal(frame)
        except (PAMQPException, ValueError, OverflowError):
            return _mended(frame)[constants.FRAME_HEADER_SIZE :]
        return data


_FIRST_OF_METHOD, _FLAGS_OF_HEADER = 11, 19
"""Where in a frame a method's first field is, and the flags that say which properties a message has."""


def _mended(frame: bytes) -> bytes:
    """A frame of the same length: a message's without properties, an announcement's with `?` in its texts."""
    bytes_ = bytearray(frame)
    if frame[0] == constants.FRAME_HEADER:
        bytes_[_FLAGS_OF_HEADER : _FLAGS_OF_HEADER + 2] = b"\0\0"
    elif frame[0] == constants.FRAME_METHOD and frame[7:11] == _DELIVER:
        after_tag = _FIRST_OF_METHOD + 1 + frame[_FIRST_OF_METHOD] + 9
        # What follows are two texts; their lengths are no part of them.
        exchange_end = after_tag + 1 + frame[after_tag]
        for place in range(after_tag + 1, len(frame) - 1):
            if bytes_[place] >= 0x80 and place != exchange_end:
                bytes_[place] = 0x3F
    return bytes(bytes_)


_DELIVER = spec.Basic.Deliver.index.to_bytes(4, "big")


class _Wire(TransportFactory):
    """Keeps hold of the socket, which aiormq does not show: to write many frames at once, and to let go without waiting."""

    def __init__(self, tls: ssl.SSLContext | None, *, mends: bool) -> None:
        self._tls = tls
        self._mends = mends
        self._writer: asyncio.StreamWriter | None = None
        self.is_cut = False

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self._writer = await asyncio.open_connection(url.host, url.port, ssl=self._tls)
        return (_Mended(reader) if self._mends else reader), self._writer

    @property
    def writer(self) -> asyncio.StreamWriter:
        if self._writer is None:
            raise InvariantBroken("A connection was used before it was open.")
        return self._writer

    def cut(self) -> None:
        """Without a word to the other side, which may be frozen."""
        self.is_cut = True
        if self._writer is not None:
            self._writer.transport.abort()


class _Live(NamedTuple):
    """A connection that was open a moment ago."""

    connection: Connection
    wire: _Wire

    @property
    def is_over(self) -> bool:
        return self.connection.is_closed or self.wire.is_cut

    def add(self, make: Callable[[Connection, int], T]) -> T:
        """A channel with the next number that is free."""
        channels = self.connection.channels
        number = next(one for one in count(1) if one not in channels)
        channel = make(self.connection, number)
        channels[number] = channel  # type: ignore[assignment]
        return channel


class _Link:
    """One connection at a time. Whoever needs it makes it; those who need it meanwhile wait for the same attempt."""

    def __init__(self, server: Server, purpose: str) -> None:
        self._server = server
        self._purpose = purpose
        self._live: _Live | None = None
        self._attempt: asyncio.Task[_Live] | None = None
        self._is_closed = False
        self._mends = False
        """Whether what comes is looked at before the client decodes it, since it once could not. It costs some speed."""

    async def live(self) -> _Live:
        """Raises BrokerUnreachable, SettingInvalid."""
        if self._live is not None and not self._live.is_over:
            return self._live
        if self._is_closed:
            raise BrokerUnreachable("The connection was closed.", broker=self._server.shown)
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._connect(), name=f"connect to {self._purpose}")
            self._attempt.add_done_callback(_look)
        # An attempt goes on when the one who asked for it first has lost patience.
        return await asyncio.shield(self._attempt)

    def cut(self) -> None:
        """Lets go of a connection that does not answer."""
        if self._live is not None:
            self._live.wire.cut()

    async def close(self) -> None:
        self._is_closed = True
        if self._attempt is not None:
            self._attempt.cancel()
            await asyncio.gather(self._attempt, return_exceptions=True)
        if self._live is not None:
            with suppress(*_LOST):
                await self._live.connection.close(timeout=CONNECT_S)
            self._live.wire.cut()

    async def _connect(self) -> _Live:
        self._mends = self._mends or (self._live is not None and _was_undecodable(self._live.connection))
        wire = _Wire(self._server.tls, mends=self._mends)
        connection = Connection(
            self._server.url,
            transport_factory=wire,
            client_properties={"connection_name": f"kassa {self._purpose}"},
        )
        connection.vhost = self._server.vhost
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()
        except (refused.ProbableAuthenticationError, refused.AuthenticationError) as error:
            raise SettingInvalid(
                f"{self._server.shown} refuses us: {_why(error)}.", broker=self._server.shown
            ) from None
        except ssl.SSLCertVerificationError as error:
            raise SettingInvalid(
                f"{self._server.shown} shows a certificate that is not trusted: {error.verify_message}. "
                "Name its authority with ?ca=FILE.",
                broker=self._server.shown,
            ) from None
        except _LOST as error:
            wire.cut()
            raise BrokerUnreachable(_why(error), broker=self._server.shown) from error
        self._live = _Live(connection, wire)
        return self._live


def _was_undecodable(connection: Connection) -> bool:
    reason = _end_of(connection.closing)
    if not isinstance(reason, refused.InvalidFrameError | ValueError | OverflowError):
        return False
    log.warning("rabbitmq.undecodable", reason=_why(reason))
    return True


def _end_of(closing: "asyncio.Future[Any]") -> BaseException:
    """Why a channel or connection ended."""
    if not closing.done() or closing.cancelled():
        return refused.ChannelClosed("closed")
    return closing.exception() or refused.ChannelClosed("closed")


def _look(done: "asyncio.Task[Any]") -> None:
    """Its failure was seen, also when nobody waits for it any more."""
    if not done.cancelled():
        done.exception()


def _why(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


async def _ask(live: _Live, question: Callable[[Channel], Awaitable[T]]) -> T:
    """One question on a channel of its own, since a refusal closes the channel.

    Raises what aiormq raises, and TimeoutError."""
    channel = live.add(lambda connection, number: Channel(connection, number, publisher_confirms=False))
    async with asyncio.timeout(ASK_S):
        await channel.open()
        try:
            return await question(channel)
        finally:
            with suppress(*_LOST):
                await channel.close()


# Sending


class _Batch:
    """Letters that are sent together: what became of each."""

    def __init__(self, exchange: str, letters: Sequence[_Letter]) -> None:
        self.exchange = exchange
        self.letters = letters
        self.receipts: list[Receipt | None] = [None] * len(letters)
        self.left = len(letters)
        self.written = 0
        """How many of them may have left us, from the first one on."""
        self.lost: str | None = None
        self.done = asyncio.Event()

    def note(self, place: int, receipt: Receipt) -> None:
        if self.receipts[place] is None:
            self.receipts[place] = receipt
            self.left -= 1
            if not self.left:
                self.done.set()

    def lose(self, reason: str) -> None:
        """The connection is gone: nobody knows about those that were written."""
        self.lost = reason
        self.done.set()

    def answer(self, otherwise: str) -> list[Receipt]:
        """A receipt for each. otherwise: why those that have none by now have none."""
        reason = self.lost or otherwise
        receipts: list[Receipt] = []
        for place, receipt in enumerate(self.receipts):
            if receipt is None:
                receipt = Unknown(reason) if place < self.written else Failed(reason, is_retryable=True)
            receipts.append(receipt)
        return receipts


class _Sent:
    """A letter that waits for its confirmation."""

    __slots__ = ("batch", "place", "returned", "size")

    def __init__(self, batch: _Batch, place: int, size: int) -> None:
        self.batch = batch
        self.place = place
        self.size = size
        self.returned: str | None = None


class _Outlet(Channel):
    """The channel that we publish on, with what is unconfirmed there. It is over with its connection, or when the broker
    objects to something; then there is a new one."""

    def __init__(self, connection: Connection, number: int, wire: _Wire) -> None:
        super().__init__(connection, number, publisher_confirms=True, frame_buffer=FRAMES_AHEAD)
        self._wire = wire
        self._frame_max = connection.connection_tune.frame_max or 131_072
        self._in_flight: dict[int, _Sent] = {}
        """By the number that the broker counts too, in order."""
        self._bytes = 0
        self._next_tag = 1
        self._room = asyncio.Event()
        self.heard_at = 0.0
        """When something was confirmed last, by the loop's clock."""
        self.exchanges: dict[str, bool] = {_DIRECT: True}
        """Whether they are there, as far as we asked: publishing to one that is not would end the channel for all."""
        self.is_over = False
        self._end = self.closing
        self._end.add_done_callback(self._lose)

    async def write(self, batch: _Batch, now: Callable[[], datetime]) -> None:
        """Gives the letters to the socket as fast as the broker takes them. Returns early when the connection goes."""
        with suppress(OSError):
            while batch.written < len(batch.letters) and not self.is_over:
                # The broker says `connection.blocked` when it is short of memory or disk, and reads nothing more.
                await self.connection.ready()
                while not self.is_over and (
                    len(self._in_flight) >= IN_FLIGHT_MAX or self._bytes >= IN_FLIGHT_BYTES_MAX
                ):
                    self._room.clear()
                    await self._room.wait()
                if self.is_over:
                    break
                self._write_burst(batch, int(now().timestamp() * 1_000_000))
                await self._wire.writer.drain()
                await asyncio.sleep(0)
        if self.is_over:
            batch.lose("the connection was lost")

    def _write_burst(self, batch: _Batch, sent_us: int) -> None:
        """Numbers and bytes go together without a pause between, or the confirmations would mean others."""
        parts: list[bytes] = []
        size = 0
        for place in range(batch.written, len(batch.letters)):
            letter = batch.letters[place]
            batch.written = place + 1
            try:
                frames = _encoded(letter, batch.exchange, self.number, self._frame_max, sent_us)
            except (ValueError, TypeError) as error:
                batch.note(place, Failed(f"it cannot be sent over AMQP: {error}", is_retryable=False))
                continue
            self._in_flight[self._next_tag] = _Sent(batch, place, len(frames))
            self._next_tag += 1
            parts.append(frames)
            size += len(frames)
            if len(parts) == BURST or size >= BURST_BYTES:
                break
        self._bytes += size
        self._wire.writer.write(b"".join(parts))

    async def _on_confirm_frame(self, frame: ConfirmationFrameType) -> None:
        tag = frame.delivery_tag or 0
        is_taken = isinstance(frame, spec.Basic.Ack)
        self.heard_at = self.loop.time()
        if getattr(frame, "multiple", False):
            tags = []
            for one in self._in_flight:
                if one > tag:
                    break
                tags.append(one)
        else:
            tags = [tag]
        for one in tags:
            self._confirm(one, is_taken=is_taken)
        self._room.set()

    def _confirm(self, tag: int, *, is_taken: bool) -> None:
        sent = self._in_flight.pop(tag, None)
        if sent is None:
            return
        self._bytes -= sent.size
        if sent.returned is not None:
            sent.batch.note(sent.place, Failed(sent.returned, is_retryable=False))
        elif is_taken:
            sent.batch.note(sent.place, Confirmed())
        else:
            sent.batch.note(sent.place, Failed("the broker refused it: its queue is full or away", is_retryable=True))

    async def _on_return_frame(self, frame: spec.Basic.Return) -> None:
        """Nobody receives it. It comes before the confirmation of the same message, and says no number; of two that are
        the same to the last letter it does not matter which is meant."""
        properties, _ = await _content(self)
        exchange, routing_key = frame.exchange or "", frame.routing_key or ""
        for sent in self._in_flight.values():
            letter = sent.batch.letters[sent.place]
            if (
                sent.returned is None
                and letter.is_mandatory
                and letter.packet.id == (properties.message_id or letter.packet.id)
                and letter.routing_key == routing_key
                and sent.batch.exchange == exchange
            ):
                sent.returned = f"{_NOBODY}{routing_key} ({frame.reply_text})"
                return

    def _lose(self, end: "asyncio.Future[Any]") -> None:
        self.is_over = True
        self._room.set()
        reason = f"the connection was lost: {_why(_end_of(end))}"
        batches = {id(sent.batch): sent.batch for sent in self._in_flight.values()}
        self._in_flight.clear()
        for batch in batches.values():
            batch.lose(reason)

    def cut(self) -> None:
        """Lets go of the connection without waiting for an answer."""
        self.is_over = True
        self._wire.cut()


async def _content(channel: Channel) -> tuple[spec.Basic.Properties, bytes]:
    """What follows a frame that announces a message."""
    header = await channel._get_frame()
    if not isinstance(header, ContentHeader):
        raise refused.InvalidFrameError(header)
    body = b""
    if header.body_size:
        parts: list[bytes] = []
        missing = header.body_size
        while missing > 0:
            part = await channel._get_frame()
            if not isinstance(part, ContentBody):
                raise refused.InvalidFrameError(part)
            parts.append(part.value)
            missing -= len(part.value)
        body = parts[0] if len(parts) == 1 else b"".join(parts)
    return header.properties, body


class _Publisher:
    """Sends over one channel, which it makes again when it has to."""

    def __init__(self, link: _Link, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._outlet: _Outlet | None = None
        self._making = asyncio.Lock()

    async def send(self, exchange: str, letters: Sequence[_Letter], deadline_s: float) -> list[Receipt]:
        """A receipt for each within the deadline; never raises for the broker."""
        batch = _Batch(exchange, letters)
        began = asyncio.get_running_loop().time()
        outlet: _Outlet | None = None
        otherwise = f"the broker did not take and confirm it within {deadline_s:g} s"
        try:
            async with asyncio.timeout(deadline_s):
                outlet = await self._open()
                if not await self._exists(outlet, exchange):
                    return [Failed(f"{_NO_EXCHANGE}{exchange}", is_retryable=False)] * len(letters)
                await outlet.write(batch, self._clock.now)
                await batch.done.wait()
        except TimeoutError:
            if outlet is not None and batch.written:
                await _cut_if_silent(outlet, began)
        except (BrokerUnreachable, SettingInvalid) as error:
            otherwise = str(error)
        except _LOST as error:
            otherwise = _why(error)
        return batch.answer(otherwise)

    async def _open(self) -> _Outlet:
        if self._outlet is not None and not self._outlet.is_over:
            return self._outlet
        async with self._making:
            if self._outlet is None or self._outlet.is_over:
                live = await self._link.live()
                outlet = live.add(lambda connection, number: _Outlet(connection, number, live.wire))
                await outlet.open()
                self._outlet = outlet
            return self._outlet

    async def _exists(self, outlet: _Outlet, exchange: str) -> bool:
        if exchange not in outlet.exchanges:
            live = await self._link.live()
            try:
                await _ask(live, lambda channel: channel.exchange_declare(exchange, passive=True))
            except (refused.ChannelNotFoundEntity, ValueError):
                return False
            outlet.exchanges[exchange] = True
        return True


def _went_nowhere(receipt: Receipt) -> bool:
    return isinstance(receipt, Failed) and receipt.reason.startswith((_NOBODY, _NO_EXCHANGE))


async def _cut_if_silent(outlet: _Outlet, since: float) -> None:
    """A connection that confirmed nothing for a whole deadline is dead or half open, unless the broker said that it is
    blocked. What was sent on it is unknown either way, and the next sender gets a new one."""
    if outlet.heard_at >= since:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await outlet.connection.ready()
            outlet.cut()


# Receiving


class _Lane:
    """One queue that we consume, on a channel of its own, until the channel ends. Closing it gives back what is unsettled, in
    order and at once, and only then does the next consumer get anything; so order holds when a lane changes hands."""

    def __init__(self, queue: str, epoch: int, stream: "RabbitStream") -> None:
        self.queue = queue
        self.epoch = epoch
        self.waiting: deque[_Parcel] = deque()
        """Here, and not handed out yet."""
        self.handed: dict[int, _Parcel] = {}
        """By delivery tag, in order."""
        self.leaves_at: float | None = None
        """Somebody else is to have it, from then on at the latest."""
        self.is_over = False
        self.stream = stream
        self.channel: _LaneChannel | None = None

    def arrived(self, parcel: _Parcel) -> None:
        self.waiting.append(parcel)
        self.stream.news.set()

    def end(self, *_: object) -> None:
        """What is unsettled comes again to whoever has the lane next."""
        self.is_over = True
        self.waiting.clear()
        self.handed.clear()
        self.stream.changed.set()

    def take(self) -> _Parcel | None:
        if not self.waiting or self.leaves_at is not None or self.is_over:
            return None
        parcel = self.waiting.popleft()
        self.handed[parcel.tag] = parcel
        return parcel

    def start_again(self, epoch: int) -> None:
        """What was handed out is handed out again, in order. The broker need not know."""
        self.waiting.extendleft(reversed(self.handed.values()))
        self.handed.clear()
        self.epoch = epoch

    def holds(self, arrival: Arrival) -> bool:
        return not self.is_over and arrival.epoch == self.epoch and _token(arrival)[1] in self.handed

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
    """Hands messages to its lane without a task for each."""

    def __init__(self, connection: Connection, number: int, wire: _Wire, lane: _Lane) -> None:
        super().__init__(connection, number, publisher_confirms=False, frame_buffer=FRAMES_AHEAD)
        self._wire = wire
        self._lane = lane
        self._end = self.closing
        self._end.add_done_callback(lane.end)
        # The queue was deleted, or its node is gone.
        self.on_consumer_cancel_callbacks.add(lane.end)

    async def consume(self, queue: str, window: int) -> None:
        await self.open()
        await self.basic_qos(prefetch_count=window)
        await self.basic_consume(queue, _never)

    async def _on_deliver_frame(self, frame: spec.Basic.Deliver) -> None:
        properties, body = await _content(self)
        self._lane.arrived(_Parcel(frame.delivery_tag or 0, bool(frame.redelivered), properties, body))

    def acknowledge(self, up_to: int, single: Iterable[int]) -> None:
        frames = [marshal(spec.Basic.Ack(delivery_tag=up_to, multiple=True), self.number)] if up_to else []
        frames += [marshal(spec.Basic.Ack(delivery_tag=tag), self.number) for tag in single]
        self._wire.writer.write(b"".join(frames))


async def _never(_: object) -> None:
    raise InvariantBroken("A message was delivered in the wrong way.")


def _token(arrival: Arrival) -> tuple[_Lane, int]:
    match arrival.token:
        case (_Lane() as lane_, int() as tag):
            return lane_, tag
        case _:
            raise InvariantBroken("A packet of another transport was settled here.", packet=arrival.packet.id)


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
        self._transport = transport
        self._queues = queues_of(topic, group)
        self._wanted = set(range(len(self._queues)))
        """The lanes that fall to us."""
        self._adopted: set[int] = set()
        """Lanes that fall to somebody who does not consume them."""
        self._orphans: set[int] = set()
        """Those that nobody consumed when we looked last."""
        self._lanes: dict[int, _Lane] = {}
        self._lost: BrokerUnreachable | None = None
        self._turn = 0
        self._is_closed = False
        self._keeper: asyncio.Task[None] | None = None

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
            if self._lost is not None:
                raise self._lost
            self.news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.news.wait()
            except TimeoutError:
                return []
        return found

    def holds(self, arrival: Arrival) -> bool:
        return _token(arrival)[0].holds(arrival)

    async def settle(self, arrivals: Sequence[Arrival]) -> list[bool]:
        results = [self.holds(arrival) for arrival in arrivals]
        by_lane: dict[int, tuple[_Lane, list[int]]] = {}
        for arrival, is_held in zip(arrivals, results, strict=True):
            if is_held:
                lane_, tag = _token(arrival)
                by_lane.setdefault(id(lane_), (lane_, []))[1].append(tag)
        for lane_, tags in by_lane.values():
            lane_.settle(tags)
        return results

    async def restart(self) -> None:
        for one in self._lanes.values():
            one.start_again(self._transport.next_epoch())
        self.news.set()

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.is_up = False
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._drop(self._lanes)
        self._lost = BrokerUnreachable("The subscription was closed.", broker=self._transport.shown)
        self.news.set()
        await self._transport.forget(self)

    def in_hand(self) -> int:
        """Packets that the broker has given us and that are not settled."""
        return sum(len(one.waiting) + len(one.handed) for one in self._lanes.values())

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
        counts = await _ask(live, lambda channel: _consumers(channel, self._queues))
        alone = {number for number, consumers in enumerate(counts) if consumers == 0} - self._wanted
        returned = {number for number in self._adopted if counts[number] > 1}
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
                packet, redeliveries, sent_at = _packet(parcel)
                found.append(Arrival(packet, redeliveries, sent_at, (one, parcel.tag), one.epoch))
        return found

    # Keeping the lanes

    async def _keep(self, live: _Live) -> None:
        """For ever: has the lanes that it should have, and a connection to have them on."""
        while True:
            try:
                await self._mind(live)
                self.is_up = False
                self._lost = BrokerUnreachable("The connection was lost.", broker=self._transport.shown)
                self.news.set()
                live = await self._reconnect()
            except _LOST as error:
                log.warning("rabbitmq.consuming", queue=self.place, reason=_why(error))
                await asyncio.sleep(RETRY_S)

    async def _mind(self, live: _Live) -> None:
        """Returns when the connection is gone."""
        live.connection.closing.add_done_callback(lambda _: self.changed.set())
        while not live.is_over:
            self.changed.clear()
            wait_s = await self._set_up_or_wait(live)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.changed.wait()
        await self._drop(self._lanes)

    async def _reconnect(self) -> _Live:
        while True:
            try:
                live = await self._transport.receiving.live()
            except (BrokerUnreachable, SettingInvalid) as error:
                log.warning("rabbitmq.unreachable", queue=self.place, reason=str(error))
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))
                continue
            self.is_up = True
            self._lost = None
            await self._transport.announce()
            return live

    async def _set_up_or_wait(self, live: _Live) -> float | None:
        """Seconds after which to look again; None when nothing is left to do."""
        try:
            await self._set_up(live)
        except refused.ChannelNotFoundEntity:
            # Somebody deleted what was there when we began.
            try:
                await self._transport.declare(live, self.topic, self.group)
                log.warning("rabbitmq.queue_made_again", queue=self.place)
                return 0.0
            except (*_LOST, QueueMismatch) as error:
                log.warning("rabbitmq.queue_missing", queue=self.place, reason=_why(error))
                return RETRY_S
        except _LOST as error:
            if not live.is_over:
                log.warning("rabbitmq.consuming", queue=self.place, reason=_why(error))
            return RETRY_S
        leaving = [one.leaves_at for one in self._lanes.values() if one.leaves_at is not None]
        return max(0.0, min(leaving) - asyncio.get_running_loop().time()) if leaving else None

    async def _set_up(self, live: _Live) -> None:
        """Lets go of the lanes that are another's or ended, and takes those that are ours. Raises what the broker says."""
        now = asyncio.get_running_loop().time()
        going: dict[int, _Lane] = {}
        mine = self._wanted | self._adopted
        for number, one in self._lanes.items():
            if one.is_over:
                going[number] = one
            elif number in mine:
                one.leaves_at = None
                self.news.set()
            else:
                one.leaves_at = one.leaves_at or now + HANDOVER_S
                if not one.handed or one.leaves_at <= now:
                    going[number] = one
        await self._drop(going)
        missing = sorted(mine - self._lanes.keys())
        window = max(WINDOW_MIN, 2 * CREDIT // max(1, len(mine)))
        results = await asyncio.gather(
            *(self._take_lane(live, number, window) for number in missing), return_exceptions=True
        )
        for result in results:
            if result is not None:
                raise result

    async def _take_lane(self, live: _Live, number: int, window: int) -> None:
        one = _Lane(self._queues[number], self._transport.next_epoch(), self)
        one.channel = live.add(lambda connection, free: _LaneChannel(connection, free, live.wire, one))
        async with asyncio.timeout(ASK_S):
            await one.channel.consume(one.queue, window)
        self._lanes[number] = one
        # Something may have come before it was ours to look at.
        self.news.set()

    async def _drop(self, lanes: Mapping[int, _Lane]) -> None:
        """Closes their channels: what is unsettled goes back, in order."""
        going = dict(lanes)
        for number, one in going.items():
            self._lanes.pop(number, None)
            one.end()
        await asyncio.gather(*(_close(one.channel) for one in going.values() if one.channel is not None))


async def _close(channel: Channel) -> None:
    with suppress(*_LOST):
        await channel.close(timeout=CONNECT_S)


# The broker


class RabbitTransport:
    """One RabbitMQ."""

    name = "rabbitmq"
    traits = TRAITS

    def __init__(self, server: Server, members: Members, clock: Clock | None = None) -> None:
        self.shown = server.shown
        self.receiving = _Link(server, "consumer")
        """Also for declarations."""
        self._sending = _Link(server, "publisher")
        self._publisher = _Publisher(self._sending, clock or SystemClock())
        self._server = server
        self._members = members
        self._streams: list[RabbitStream] = []
        self._epochs = count(1)
        self._lanes = count()
        self._made: set[Topic] = set()
        """What this process declared, and may declare again."""
        self._cluster = ""
        self._heart: asyncio.Task[None] | None = None

    async def open(self) -> None:
        # It says on its own what we say with more knowledge, as errors with their tracebacks.
        logging.getLogger("aiormq").setLevel(logging.CRITICAL)
        live = await self.receiving.live()
        self._cluster = _text(live.connection.server_properties.get("cluster_name", self._server.url.host))
        self._heart = asyncio.create_task(self._beat(), name="heart of rabbitmq")

    async def close(self) -> None:
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
        for stream in list(self._streams):
            await stream.close()
        await self._sending.close()
        await self.receiving.close()

    # Sending

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        letters = [self._letter(topic, packet, must_arrive) for packet in packets]
        began = asyncio.get_running_loop().time()
        receipts = await self._publisher.send(exchange_of(topic), letters, deadline_s)
        nowhere = [place for place, receipt in enumerate(receipts) if _went_nowhere(receipt)]
        if nowhere and topic in self._made:
            left_s = deadline_s - (asyncio.get_running_loop().time() - began)
            if await self._make_again(topic, left_s):
                left_s = deadline_s - (asyncio.get_running_loop().time() - began)
                again = await self._publisher.send(exchange_of(topic), [letters[place] for place in nowhere], left_s)
                for place, receipt in zip(nowhere, again, strict=True):
                    receipts[place] = receipt
        return receipts

    async def _make_again(self, topic: Topic, within_s: float) -> bool:
        """Somebody deleted what this process had declared: it is declared again, with its bindings."""
        try:
            async with asyncio.timeout(within_s):
                await self._declare_all(await self.receiving.live(), topic)
        except (*_LOST, BrokerUnreachable, SettingInvalid, QueueMismatch, QueueNotFound) as error:
            log.warning("rabbitmq.topic_missing", topic=topic.name, reason=_why(error))
            return False
        log.warning("rabbitmq.topic_made_again", topic=topic.name)
        return True

    async def reply(self, address: str, packets: Sequence[Packet], *, deadline_s: float) -> list[Receipt]:
        # What goes to a direct reply-to is returned as unroutable although it arrives.
        is_mandatory = not address.startswith(_DIRECT_REPLY)
        letters = [_Letter(packet, address, None, is_mandatory) for packet in packets]
        return await self._publisher.send(_DIRECT, letters, deadline_s)

    def _letter(self, topic: Topic, packet: Packet, must_arrive: bool) -> _Letter:
        if topic.declaration != "kassa":
            return _Letter(packet, topic.name, None, must_arrive)
        type_ = packet.headers.get("ce-type", "")
        routing_key = type_ if type_ and len(type_.encode()) <= 255 else topic.name
        return _Letter(packet, routing_key, self._lane_of(topic, packet), must_arrive)

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
            await _ask(live, lambda channel: _ready(channel, queues_of(topic, group)))
            self._streams.append(stream)
            await stream.start()
        except refused.ChannelNotFoundEntity as error:
            await stream.close()
            raise QueueNotFound(_why(error), topic=topic.name, group=group) from None
        except _LOST as error:
            await stream.close()
            raise BrokerUnreachable(_why(error), broker=self.shown) from error
        return stream

    async def depth(self, topic: Topic, group: str) -> int | None:
        """What is ready in the queues, and what consumers have in hand: ours exactly, others' as they said last."""
        live = await self.receiving.live()
        place = self.place(topic, group)
        ours = {one.id: one.in_hand() for one in self._streams if one.place == place}
        in_hand = await self._members.at(place) | ours
        try:
            ready = await _ask(live, lambda channel: _ready(channel, queues_of(topic, group)))
        except refused.ChannelNotFoundEntity as error:
            raise QueueNotFound(_why(error), topic=topic.name, group=group) from None
        except _LOST as error:
            raise BrokerUnreachable(_why(error), broker=self.shown) from error
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
            async with asyncio.timeout(BEAT_S):
                found = await self._members.announce([Member(one.place, one.id, one.in_hand()) for one in streams])
        except (BrokerUnreachable, TimeoutError) as error:
            log.warning("rabbitmq.members_unknown", reason=_why(error))
            return
        for stream in streams:
            stream.share_out(found[stream.place])

    async def forget(self, stream: RabbitStream) -> None:
        """It is closed."""
        if stream in self._streams:
            self._streams.remove(stream)
        with suppress(BrokerUnreachable, TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await self._members.leave([stream.id])
        await self.announce()

    async def _beat(self) -> None:
        for number in count(1):
            await asyncio.sleep(BEAT_S)
            await self.announce()
            if number % ORPHANS_EVERY == 0:
                for stream in list(self._streams):
                    with suppress(*_LOST, BrokerUnreachable, SettingInvalid):
                        await stream.look_for_orphans()

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
                    if not is_there or not await _has_queues(live, topic, group):
                        said.append((topic.name, group))
                if not verify_only:
                    await self._declare_all(live, topic)
                    self._made.add(topic)
        except refused.ChannelAccessRefused as error:
            raise SettingInvalid(f"{_why(error)}. Provision with an account that may, or only verify.") from None
        except _LOST as error:
            raise BrokerUnreachable(_why(error), broker=self.shown) from error
        return said

    async def _declare_all(self, live: _Live, topic: Topic) -> None:
        for group in topic.groups or ("",):
            await self.declare(live, topic, group)

    async def declare(self, live: _Live, topic: Topic, group: str) -> None:
        """The exchange, and the group's queues unless it is ''. Raises QueueMismatch, QueueNotFound, what aiormq raises."""
        try:
            await _ask(live, lambda channel: _declare(channel, topic, group))
        except (refused.ChannelPreconditionFailed, refused.ChannelLockedResource, ValueError) as error:
            raise QueueMismatch(f"{_why(error)}. {_remedy(topic)}", topic=topic.name, broker=self.shown) from None
        except refused.ChannelNotFoundEntity as error:
            raise QueueNotFound(f"{_why(error)}. It is declared passive: somebody else has to make it.") from None


async def _ready(channel: Channel, queues: Sequence[str]) -> int:
    return sum([(await channel.queue_declare(queue, passive=True)).message_count or 0 for queue in queues])


async def _consumers(channel: Channel, queues: Sequence[str]) -> list[int]:
    return [(await channel.queue_declare(queue, passive=True)).consumer_count or 0 for queue in queues]


async def _is_there(live: _Live, topic: Topic) -> bool:
    try:
        await _ask(live, lambda channel: channel.exchange_declare(exchange_of(topic), passive=True))
    except refused.ChannelNotFoundEntity:
        return False
    return True


async def _has_queues(live: _Live, topic: Topic, group: str) -> bool:
    try:
        await _ask(live, lambda channel: _ready(channel, queues_of(topic, group)))
    except refused.ChannelNotFoundEntity:
        return False
    return True


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
                await channel.queue_declare(_dead_queue(topic, group), durable=True, arguments=dict(_QUORUM))
                for number, queue in enumerate(queues_of(topic, group)):
                    await channel.queue_declare(queue, durable=True, arguments=_lane_arguments(topic, group))
                    await channel.queue_bind(queue, exchange, lane_key(number))


def _remedy(topic: Topic) -> str:
    """What a person can do about a mismatch."""
    match topic.declaration:
        case "plain":
            return "It was declared otherwise: set this topic's declaration to `durable`, or to `passive` to take it as it is."
        case "durable":
            return "It was declared otherwise: set this topic's declaration to `plain`, or to `passive` to take it as it is."
        case _:
            return "Delete what is there when it is empty, or give this topic another name; then provision again."
