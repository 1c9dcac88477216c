"""AMQP 0-9-1 as RabbitMQ speaks it: settings, messages, connections, and sending with a receipt for each.

What topics, groups and lanes are on a broker is in `rabbitmq.py`. aiormq gives connections, channels and declarations; what is
done per message is done here in bursts, because a task and a future for each message is most of what a client costs.
"""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from math import inf
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

from kassa.clock import Clock
from kassa.errors import BrokerUnreachable, InvariantBroken, SettingInvalid
from kassa.messaging.model import Confirmed, Failed, Packet, Receipt, Unknown
from kassa.messaging.packing import ID
from kassa.settings import without_password
from kassa.supervisor import end_tasks, is_ended

log = structlog.get_logger("kassa.messaging.amqp")

CONNECT_S = 5.0
ASK_S = 10.0
"""For one declaration. A quorum queue that has just lost its leader answers after some seconds."""
HEARTBEAT_S = 10
NEW_QUEUE_PAUSE_S = 2.5
IN_FLIGHT_MAX = 2000
IN_FLIGHT_BYTES_MAX = 32 * 1024 * 1024
"""What may be unconfirmed at a time; more waits in the senders until their deadlines."""
BURST = 64
BURST_BYTES = 128 * 1024
"""Written at once; then the socket is given the time to take it."""
FRAMES_AHEAD = 300
"""Frames that a channel takes from the connection before it has handled them: a batch's."""
PIECE = 256 * 1024
"""Read at once: several frames, also of envelopes; what does not fit is copied once more."""
LOST = (refused.AMQPError, OSError, TimeoutError, RuntimeError)
"""What aiormq raises when a connection or channel ends or is over."""
DIRECT_REPLY = "amq.rabbitmq.reply-to."
DIRECT = ""
"""The exchange whose routing keys are the names of queues."""
_CE_OTHERS = ("cloudEvents:", "cloudEvents_")
"""How the binding for AMQP 1.0 begins an attribute; the one for RabbitMQ (AMQP 0-9-1), which we speak, says `ce-` as we do."""
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
_REDELIVERIES_MAX = 1000
"""More is no count of a broker: it gives up long before."""
_NOBODY, _NO_EXCHANGE = "nobody receives ", "there is no exchange "
"""How the reasons begin for which a topic may have to be made again."""
_UNDECODABLE = (PAMQPException, ValueError, OverflowError, RecursionError)
"""What pamqp raises over the bytes of somebody else."""
_NAME_OF_MISSING = re.compile(r"no exchange '(.*)' in vhost")
T = TypeVar("T")


# Settings


class Server(NamedTuple):
    """Where the broker is and who we are there."""

    shown: str
    """The URL without its password, for people."""
    url: URL
    """As aiormq reads it."""
    vhost: str
    tls: ssl.SSLContext | None
    new_queue_pause_s: float
    """How long a queue that was just made waits for its first message."""


def read_url(url: str) -> Server:
    """The settings in a URL. Raises SettingInvalid, which never shows the password."""
    shown = without_password(url)
    parts = urlsplit(url)
    try:
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
        heartbeat = int(query.pop("heartbeat", HEARTBEAT_S))
        pause_s = float(query.pop("new_queue_pause", NEW_QUEUE_PAUSE_S))
    except ValueError as error:
        raise SettingInvalid(f"{shown}: {error}.", broker=shown) from None
    auth = query.pop("auth", "plain")
    tls = _tls(query, shown) if parts.scheme == "amqps" else None
    if parts.scheme != "amqps" and (for_tls := query.keys() & {"ca", "cert", "key", "verify"}):
        raise SettingInvalid(f"{shown}: {', '.join(sorted(for_tls))} is for TLS: begin with amqps://.", broker=shown)
    if query or auth not in ("plain", "external") or not 1 <= heartbeat <= 600 or not 0 <= pause_s <= 60:
        wrong = ", ".join(sorted(query)) or "auth (plain or external), heartbeat (1 … 600) or new_queue_pause (0 … 60)"
        raise SettingInvalid(f"{shown}: wrong setting: {wrong}.", broker=shown)
    place = URL.build(
        scheme=parts.scheme,
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password or "guest"),
        host=parts.hostname or "localhost",
        port=port,
        query={"auth": auth, "heartbeat": str(heartbeat)},
    )
    return Server(shown, place, unquote(parts.path[1:]) or "/", tls, pause_s)


def _tls(query: dict[str, str], shown: str) -> ssl.SSLContext:
    verify = query.pop("verify", "full")
    ca, cert, key = query.pop("ca", None), query.pop("cert", None), query.pop("key", None)
    if verify not in ("full", "ca", "none"):
        raise SettingInvalid(f"{shown}: verify is full, ca or none.", broker=shown)
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert:
            context.load_cert_chain(cert, key)
    except OSError as error:
        files = ", ".join(f"{name}={file}" for name, file in (("ca", ca), ("cert", cert), ("key", key)) if file)
        raise SettingInvalid(f"{shown}: certificates cannot be read ({files}): {error}.", broker=shown) from None
    context.check_hostname = verify == "full"
    if verify == "none":
        context.verify_mode = ssl.CERT_NONE
    return context


# What travels


class Letter(NamedTuple):
    """A packet with its address."""

    packet: Packet
    routing_key: str
    also: str | None
    """A second routing key, which nobody sees who receives it."""
    is_mandatory: bool


@lru_cache(maxsize=1024)
def _publish_frame(channel: int, exchange: str, routing_key: str, is_mandatory: bool) -> bytes:
    return marshal(spec.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=is_mandatory), channel)


def _encoded(letter: Letter, exchange: str, channel: int, frame_max: int, sent_us: int) -> bytes:
    """The frames of one message. Raises ValueError or TypeError for what AMQP cannot say."""
    packet = letter.packet
    header = ContentHeader(body_size=len(packet.body), properties=_properties(packet, letter.also, sent_us))
    head = marshal(header, channel)
    if len(head) > frame_max:
        raise ValueError(f"its headers are larger than {frame_max} bytes")
    parts = [_publish_frame(channel, exchange, letter.routing_key, letter.is_mandatory), head]
    size = frame_max - 8
    for start in range(0, len(packet.body), size):
        parts.append(marshal(ContentBody(packet.body[start : start + size]), channel))
    return b"".join(parts)


def _properties(packet: Packet, also: str | None, sent_us: int) -> spec.Basic.Properties:
    properties = spec.Basic.Properties(delivery_mode=2)
    headers: dict[str, Any] = {}
    for name, value in packet.headers.items():
        if value and (property_ := _PROPERTIES.get(name)):
            setattr(properties, property_, value)
        elif name in _READ_BY_BROKER or name.startswith(_ESCAPE):
            headers[_ESCAPE + name] = value
        else:
            headers[name] = value
    if any(len(name) > 32 and len(name.encode()) > _NAME_MAX for name in headers):
        raise ValueError(f"a header's name is longer than {_NAME_MAX} bytes")
    if len(packet.id) <= 64 or len(packet.id.encode()) <= 255:
        properties.message_id = packet.id
    headers[_SENT_AT] = sent_us
    if also is not None:
        headers["BCC"] = [also]
    properties.headers = headers
    return properties


class Parcel(NamedTuple):
    """A message as it came."""

    tag: int
    redelivered: bool
    properties: spec.Basic.Properties
    body: bytes
    head_size: int = 0
    """Bytes of its headers."""

    @property
    def size(self) -> int:
        return self.head_size + len(self.body)


def packet_of(parcel: Parcel) -> tuple[Packet, int | None, datetime | None]:
    """The packet, how often it came before (None: it did, from a queue that does not count), and when it was sent."""
    properties = parcel.properties
    headers: dict[str, str] = {}
    sent_at = properties.timestamp
    redeliveries = None if parcel.redelivered else 0
    for name, value in (properties.headers or {}).items():
        if isinstance(value, str):
            headers[_name_in(name)] = value
        elif name == _SENT_AT and isinstance(value, int):
            sent_at = _moment(value)
        elif name == _DELIVERY_COUNT and isinstance(value, int):
            # Only queues that count write it, and only when they deliver again; a classic queue hands on what a stranger wrote.
            if parcel.redelivered:
                redeliveries = min(max(int(value), 0), _REDELIVERIES_MAX)
        else:
            headers[_name_in(name)] = text_of(value)
    for name, property_ in _PROPERTIES.items():
        if (text := getattr(properties, property_)) is not None:
            headers[name] = text
    return Packet(properties.message_id or "", "", parcel.body, headers), redeliveries, sent_at


@lru_cache(maxsize=1024)
def _name_in(name: str) -> str:
    if name.startswith(_CE_OTHERS):
        return "ce-" + name[len(_CE_OTHERS[0]) :]
    return name.removeprefix(_ESCAPE)


def _moment(microseconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(microseconds / 1_000_000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def text_of(value: object) -> str:
    """A header of somebody else as text: a table or a list as JSON."""
    match value:
        case str():
            return value
        case bytes() | bytearray():
            return bytes(value).decode(errors="replace")
        case bool() | None | dict() | list():
            try:
                return msgspec.json.encode(value, enc_hook=str).decode()
            except RecursionError:
                return "nested too deeply"
        case _:
            return str(value)


# Connections


class _Reader(asyncio.StreamReader):
    """What came, in large pieces: aiormq asks nine times per message for a few bytes, and the stream's own way of cutting them off
    costs more than decoding them."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._piece = b""
        self._place = 0

    def at_eof(self) -> bool:
        return self._place >= len(self._piece) and self._reader.at_eof()

    async def readexactly(self, n: int) -> bytes:
        end = self._place + n
        if end > len(self._piece):
            await self._read_on(n)
            end = n
        data = self._piece[self._place : end]
        self._place = end
        return data

    async def _read_on(self, n: int) -> None:
        if len(self._piece) >= PIECE:
            # However much has come, others have their turn.
            await asyncio.sleep(0)
        parts = [self._piece[self._place :]]
        missing = n - len(parts[0])
        self._piece, self._place = b"", 0
        while missing > 0:
            part = await self._reader.read(PIECE)
            if not part:
                raise asyncio.IncompleteReadError(b"".join(parts), n)
            parts.append(part)
            missing -= len(part)
        self._piece = b"".join(parts)


class _Mended(_Reader):
    """Frames as they come, but for those that the client cannot decode and would end the connection over, for ever: somebody
    sent bytes that are no text, a date beyond all calendars, or lists in lists without end. Such a message arrives without its
    properties."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._head = b""

    async def readexactly(self, n: int) -> bytes:
        """aiormq reads a frame's head (7 bytes, in two parts), then the rest."""
        data = await super().readexactly(n)
        if len(self._head) < constants.FRAME_HEADER_SIZE:
            self._head += data
            return data
        frame, self._head = self._head + data, b""
        try:
            unmarshal(frame)
        except _UNDECODABLE:
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


class Wire(TransportFactory):
    """Keeps hold of the socket, which aiormq does not show: to write many frames at once, and to let go without waiting."""

    def __init__(self, tls: ssl.SSLContext | None, *, mends: bool) -> None:
        self._tls = tls
        self._mends = mends
        self._writer: asyncio.StreamWriter | None = None
        self.is_cut = False

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self._writer = await asyncio.open_connection(url.host, url.port, ssl=self._tls, limit=PIECE)
        return (_Mended(reader) if self._mends else _Reader(reader)), self._writer

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


class Live(NamedTuple):
    """A connection that was open a moment ago."""

    connection: Connection
    wire: Wire

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


class Link:
    """One connection at a time. Whoever needs it makes it; those who need it meanwhile wait for the same attempt."""

    def __init__(self, server: Server, purpose: str) -> None:
        self._server = server
        self._purpose = purpose
        self._live: Live | None = None
        self._attempt: asyncio.Task[Live] | None = None
        self._is_closed = False
        self._mends = False
        """Whether what comes is looked at before the client decodes it, since it once could not. It costs some speed."""

    async def live(self) -> Live:
        """Raises BrokerUnreachable, SettingInvalid."""
        if self._live is not None and not self._live.is_over:
            return self._live
        if self._is_closed:
            raise BrokerUnreachable("The connection was closed.", broker=self._server.shown)
        if self._attempt is None or self._attempt.done():
            self._attempt = asyncio.create_task(self._connect(), name=f"connect to {self._purpose}")
            self._attempt.add_done_callback(_look)
        # An attempt goes on when the one who asked for it first has lost patience.
        try:
            return await asyncio.shield(self._attempt)
        except asyncio.CancelledError:
            if is_ended():
                raise
            # The attempt was, by `close`.
            raise BrokerUnreachable("The connection was closed.", broker=self._server.shown) from None

    async def close(self) -> None:
        self._is_closed = True
        if self._attempt is not None:
            await end_tasks(self._attempt)
        if self._live is not None:
            # aiormq waits until everything is written, and a broker that is frozen takes nothing more.
            cutting = asyncio.get_running_loop().call_later(CONNECT_S, self._live.wire.cut)
            try:
                with suppress(*LOST):
                    await uncancelled(self._live.connection.close())
            finally:
                cutting.cancel()
                self._live.wire.cut()

    async def _connect(self) -> Live:
        self._mends = self._mends or (self._live is not None and _was_undecodable(self._live.connection))
        wire = Wire(self._server.tls, mends=self._mends)
        connection = Connection(
            self._server.url,
            transport_factory=wire,
            client_properties={"connection_name": f"kassa {self._purpose}"},
        )
        connection.vhost = self._server.vhost
        try:
            async with asyncio.timeout(CONNECT_S):
                await uncancelled(connection.connect())
        except refused.ProbableAuthenticationError as error:
            raise SettingInvalid(f"{self._server.shown} refuses us: {why(error)}.", broker=self._server.shown) from None
        except refused.AuthenticationError as error:
            raise SettingInvalid(
                f"{self._server.shown} offers other ways to log in: {error.args[0]}.", broker=self._server.shown
            ) from None
        except refused.InvalidFrameError:
            wire.cut()
            raise BrokerUnreachable(
                f"It speaks AMQP and lets us not in. Is there a virtual host {self._server.vhost}, may this user use it, "
                "and are there fewer connections than it allows?",
                broker=self._server.shown,
            ) from None
        except ssl.SSLCertVerificationError as error:
            raise SettingInvalid(
                f"{self._server.shown} shows a certificate that is not trusted: {error.verify_message}. "
                "Name its authority with ?ca=FILE.",
                broker=self._server.shown,
            ) from None
        except (*LOST, StopAsyncIteration) as error:
            wire.cut()
            raise BrokerUnreachable(why(error), broker=self._server.shown) from error
        except asyncio.CancelledError:
            # It may be open all the same.
            wire.cut()
            raise
        self._live = Live(connection, wire)
        return self._live


def _was_undecodable(connection: Connection) -> bool:
    reason = end_of(connection.closing)
    if not isinstance(reason, (refused.InvalidFrameError, *_UNDECODABLE)):
        return False
    log.warning("rabbitmq.undecodable", reason=why(reason))
    return True


def end_of(closing: "asyncio.Future[Any]") -> BaseException:
    """Why a channel or connection ended."""
    if not closing.done() or closing.cancelled():
        return refused.ChannelClosed("closed")
    return closing.exception() or refused.ChannelClosed("closed")


def _look(done: "asyncio.Task[Any]") -> None:
    """Its failure was seen, also when nobody waits for it any more."""
    if not done.cancelled():
        done.exception()


def why(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


async def uncancelled(call: Awaitable[T]) -> T:
    """Keeps apart what aiormq mixes up: that a connection was lost, and that we were cancelled.

    It ends what waits for a lost connection as if that had been cancelled, or with a bare `Exception`; both are told as what they
    are. And a cancellation of ours it may take for its own, and go on or raise something else: it would be lost, and whoever
    waits for our end would wait for ever.

    Raises what aiormq raises."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        result = await call
    except asyncio.CancelledError:
        if is_ended():
            raise
        raise refused.ConnectionClosed(0, "lost") from None
    except Exception as error:
        # Nothing is swallowed: a lost cancellation is raised, a bare `Exception` gets its name, all else goes on as it is.
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        if type(error) is Exception:
            raise refused.ConnectionClosed(0, "lost") from error
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


async def ask(live: Live, question: Callable[[Channel], Awaitable[T]]) -> T:
    """One question on a channel of its own, since a refusal closes the channel.

    Raises what aiormq raises, and TimeoutError."""
    channel = live.add(lambda connection, number: Channel(connection, number, publisher_confirms=False))
    async with asyncio.timeout(ASK_S):
        await uncancelled(channel.open())
        try:
            return await uncancelled(question(channel))
        finally:
            await close_channel(channel)


async def close_channel(channel: Channel) -> None:
    """To its end, also when who asked for it is cancelled: aiormq would say it a second time then, and RabbitMQ ends the whole
    connection over a channel that is closed twice."""
    await asyncio.shield(_close_channel(channel))


async def _close_channel(channel: Channel) -> None:
    with suppress(*LOST):
        await uncancelled(channel.close(timeout=CONNECT_S))


# Sending


class _Batch:
    """Letters that are sent together: what became of each."""

    def __init__(self, exchange: str, letters: Sequence[Letter]) -> None:
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

    def __init__(self, connection: Connection, number: int, wire: Wire) -> None:
        super().__init__(connection, number, publisher_confirms=True, frame_buffer=FRAMES_AHEAD)
        self._wire = wire
        self._frame_max = connection.connection_tune.frame_max or 131_072
        self._in_flight: dict[int, _Sent] = {}
        """By the number that the broker counts too, in order."""
        self._bytes = 0
        self._next_tag = 1
        self._to_write: list[bytes] = []
        self._flushing: asyncio.Handle | None = None
        self._room = asyncio.Event()
        self.heard_at = 0.0
        """When something was confirmed last, by the loop's clock."""
        self.exchanges = {DIRECT}
        """Those that are there, as far as we asked: publishing to one that is not would end the channel for all."""
        self.is_over = False
        self.missed: str | None = None
        """The exchange that was not there any more, and ended the channel."""
        self._end = self.closing
        self._end.add_done_callback(self._lose)

    async def write(self, batch: _Batch, now: Callable[[], datetime]) -> None:
        """Gives the letters to the socket as fast as the broker takes them. Returns early when the connection goes."""
        with suppress(OSError):
            while batch.written < len(batch.letters) and not self.is_over:
                # The broker says `connection.blocked` when it is short of memory or disk, and reads nothing more.
                await self.connection.ready()
                await self._wire.writer.drain()
                if batch.written:
                    # The others have their turn, and what is written goes out.
                    await asyncio.sleep(0)
                while self.is_full() and not self.is_over:
                    self._room.clear()
                    await self._room.wait()
                if not self.is_over:
                    self._write_burst(batch, int(now().timestamp() * 1_000_000))
        if self.is_over and batch.lost is None:
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
        self._to_write += parts
        if len(self._in_flight) == len(parts):
            # Nobody else is sending, so there is nothing to wait for.
            self._flush()
        elif self._flushing is None:
            self._flushing = self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        """What all senders of one turn of the loop wrote, in one call to the system."""
        self._flushing = None
        if self._to_write:
            self._wire.writer.write(b"".join(self._to_write))
            self._to_write.clear()

    def is_full(self) -> bool:
        return len(self._in_flight) >= IN_FLIGHT_MAX or self._bytes >= IN_FLIGHT_BYTES_MAX

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
        properties, _ = await content(self)
        exchange, routing_key = frame.exchange or "", frame.routing_key or ""
        id = properties.message_id or (properties.headers or {}).get(ID)
        for sent in self._in_flight.values():
            letter = sent.batch.letters[sent.place]
            if (
                sent.returned is None
                and letter.is_mandatory
                and letter.packet.id == (id or letter.packet.id)
                and letter.routing_key == routing_key
                and sent.batch.exchange == exchange
            ):
                sent.returned = f"{_NOBODY}{routing_key} ({frame.reply_text})"
                return

    def _lose(self, end: "asyncio.Future[Any]") -> None:
        self.is_over = True
        self._room.set()
        error = end_of(end)
        if isinstance(error, refused.ChannelNotFoundEntity) and (found := _NAME_OF_MISSING.search(why(error))):
            self.missed = found[1]
        reason = f"the connection was lost: {why(error)}"
        batches = {id(sent.batch): sent.batch for sent in self._in_flight.values()}
        self._in_flight.clear()
        self._to_write.clear()
        for batch in batches.values():
            batch.lose(reason)

    def cut(self) -> None:
        """Lets go of the connection without waiting for an answer."""
        self.is_over = True
        self._wire.cut()


async def content(channel: Channel) -> tuple[spec.Basic.Properties, bytes]:
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


class Deliveries(asyncio.Queue[Any]):
    """The frames of a channel that consumes. Messages are handed on as they come: a queue, and a task that waits at its end, would
    cost as much as what is left."""

    def __init__(self, arrived: Callable[[Parcel], None]) -> None:
        super().__init__(FRAMES_AHEAD)
        self._arrived = arrived
        self._announced: spec.Basic.Deliver | None = None
        self._properties = spec.Basic.Properties()
        self._parts: list[bytes] = []
        self._missing = 0
        self._head_size = 0

    async def put(self, item: Any) -> None:
        frame = item[1]
        if isinstance(frame, spec.Basic.Deliver):
            self._announced = frame
        elif self._announced is not None and isinstance(frame, ContentHeader):
            self._properties, self._missing = frame.properties, frame.body_size
            self._head_size = item[0]
            self._look()
        elif self._announced is not None and isinstance(frame, ContentBody):
            self._parts.append(frame.value)
            self._missing -= len(frame.value)
            self._look()
        else:
            await super().put(item)

    def _look(self) -> None:
        """Whether the message is whole."""
        if self._missing > 0 or self._announced is None:
            return
        announced, self._announced = self._announced, None
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._arrived(
            Parcel(announced.delivery_tag or 0, bool(announced.redelivered), self._properties, body, self._head_size)
        )


class Publisher:
    """Sends over one channel, which it makes again when it has to."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._outlet: _Outlet | None = None
        self._making = asyncio.Lock()
        self._held: dict[str, float] = {}
        """By exchange: until when nothing is sent there, by the loop's clock; `inf` before it is made again."""
        self._missed: set[str] = set()
        """Exchanges that were gone when we sent, and that we have not seen again."""

    async def send(
        self, exchange: str, letters: Sequence[Letter], deadline_s: float, *, pause_s: float = 0.0
    ) -> list[Receipt]:
        """A receipt for each within the deadline; never raises for the broker.

        pause_s: for how long an exchange gets nothing that was gone and that somebody else has made again."""
        if not letters:
            return []
        reason = f"exchange {exchange} was deleted; it is made again, or its consumers bind their queues to it"
        held: list[Receipt] = [Failed(reason, is_retryable=True)] * len(letters)
        if self._is_held(exchange):
            return held
        batch = _Batch(exchange, letters)
        began = asyncio.get_running_loop().time()
        outlet: _Outlet | None = None
        otherwise = f"the broker did not take and confirm it within {deadline_s:g} s"
        try:
            async with asyncio.timeout(deadline_s):
                outlet = await self._open()
                if not await self._exists(outlet, exchange, pause_s):
                    return [Failed(f"{_NO_EXCHANGE}{exchange}", is_retryable=False)] * len(letters)
                # Another send may have begun to make it again while this one asked.
                if self._is_held(exchange):
                    return held
                await outlet.write(batch, self._clock.now)
                await batch.done.wait()
        except TimeoutError:
            if outlet is not None and (batch.written or outlet.is_full()):
                await _cut_if_silent(outlet, began)
        except (BrokerUnreachable, SettingInvalid) as error:
            otherwise = str(error)
        except LOST as error:
            otherwise = why(error)
        return batch.answer(otherwise)

    def stop(self, exchange: str) -> None:
        """It may be there without all bindings: nothing is sent there before whoever makes it again says `go_on`."""
        self._held[exchange] = inf
        self._missed.discard(exchange)

    def go_on(self, exchange: str, after_s: float) -> None:
        self._held[exchange] = asyncio.get_running_loop().time() + after_s
        self._missed.discard(exchange)

    def leave(self, exchange: str) -> None:
        """Somebody else has to make it; once he did, there is the pause of one that was gone."""
        self._held.pop(exchange, None)
        self._missed.add(exchange)

    def is_stopped(self, exchange: str) -> bool:
        return self._held.get(exchange) == inf

    async def _open(self) -> _Outlet:
        if self._outlet is not None and not self._outlet.is_over:
            return self._outlet
        async with self._making:
            if self._outlet is None or self._outlet.is_over:
                live = await self._link.live()
                outlet = live.add(lambda connection, number: _Outlet(connection, number, live.wire))
                await uncancelled(outlet.open())
                if self._outlet is not None and self._outlet.missed is not None:
                    self._missed.add(self._outlet.missed)
                self._outlet = outlet
            return self._outlet

    def _is_held(self, exchange: str) -> bool:
        return asyncio.get_running_loop().time() < self._held.get(exchange, 0.0)

    async def _exists(self, outlet: _Outlet, exchange: str, pause_s: float) -> bool:
        if exchange not in outlet.exchanges:
            live = await self._link.live()
            try:
                await ask(live, lambda channel: channel.exchange_declare(exchange, passive=True))
            except (refused.ChannelNotFoundEntity, ValueError):
                return False
            outlet.exchanges.add(exchange)
            if exchange in self._missed:
                # Whoever made it again may have bound the queues of some groups only.
                self._missed.discard(exchange)
                self._held[exchange] = max(self._held.get(exchange, 0.0), asyncio.get_running_loop().time() + pause_s)
        return True


def went_nowhere(receipt: Receipt) -> bool:
    return lacks_exchange(receipt) or (isinstance(receipt, Failed) and receipt.reason.startswith(_NOBODY))


def lacks_exchange(receipt: Receipt) -> bool:
    return isinstance(receipt, Failed) and receipt.reason.startswith(_NO_EXCHANGE)


async def _cut_if_silent(outlet: _Outlet, since: float) -> None:
    """A connection that confirmed nothing for a whole deadline is dead or half open, unless the broker said that it is
    blocked. What was sent on it is unknown either way, and the next sender gets a new one."""
    if outlet.heard_at >= since:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await outlet.connection.ready()
            outlet.cut()
