"""The binder without a broker in between: peers talk to a hub over ZeroMQ, and PostgreSQL is the hub's memory.

ZeroMQ stores nothing and drops what does not fit, so nothing depends on it: a record is confirmed when the hub has committed
it to its queues in PostgreSQL, and it stays there until the receiver settles it. Each thing that a peer wants is a call with a
number; a call that is not answered is made again with its number, and the hub gives the first answer again. A peer receives
by a call that the hub answers when there is something, so what is asked for is the credit.

    zeromq://host:port                      the first process on a machine that opens it is the hub, the others are peers; when
                                            it ends, one of them is the next
    zeromq://host:port?role=peer            never the hub: a service on another machine (role=hub: it must be the hub)
    …?secret=FILE&peers=DIR                 the hub's CURVE key, and the public keys of those who may call (*.key)
    …?secret=FILE&server=FILE               a peer's CURVE key, and the hub's public key
    …?lease_s=30                            after how long comes again what was in hand when the hub was killed, if nobody has
                                            settled it by then

Outside loopback CURVE is required; `plain=yes` says that the network itself is trusted. `make_keys` makes key files.
Source: ZeroMQ RFC 28 (REQ-REP), 26 (CurveZMQ); https://rfc.zeromq.org, read 2026-11.
"""

import asyncio
import errno
import os
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import accumulate, islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakSet

import msgspec
import structlog
import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from kassa.errors import BrokerUnreachable, InvariantBroken, KassaError, QueueNotFound, SettingInvalid, TooMany
from kassa.ids import Id, new_id
from kassa.messaging.binder import Resources, Subscription
from kassa.messaging.binders.postgres import PostgresBinder, PostgresSubscription, ahead_s, as_record
from kassa.messaging.model import (
    Ack,
    Confirmed,
    Dead,
    Delivery,
    Depth,
    Failed,
    Receipt,
    Record,
    RetryAfter,
    Settlement,
    Traits,
    Unknown,
)
from kassa.messaging.packing import UNREADABLE, believed
from kassa.messaging.topology import Topic
from kassa.messaging.work import ClaimedMessage
from kassa.supervisor import end_tasks, is_ended

TRAITS = Traits(
    durable=False, ordered=True, delay_max_s=0.0, priorities=1, dead_letters=False, counts_attempts=False,
    acknowledges_in_change=False, deduplicates=True, batch_max=500, bytes_max=16 * 1024 * 1024, reports_depth=False,
    request_reply=True,
)  # fmt: skip

"""Of ZeroMQ itself; the hub's PostgreSQL supplies the rest."""
LEASE_S = 30.0
"""What was on its way to a peer, or in its hands, when the hub was killed comes again after so long; peers settle what they hold at
any hub until then. What a peer holds of the hub that there is stays its own: it says with each sign of life what that is."""
CALL_S = 5.0
RESEND_S = 1.0
"""An answer that did not come by then, and the time that the call takes on the wire, was lost with a connection."""
WIRE_BYTES_S = 500_000
"""A narrow line. Where it is narrower still, each repetition waits twice as long for the wire: it would only stand in the way."""
SILENCE_S = 5.0
"""A peer that has not called for so long is gone, and what it had goes to others. A waiting call counts as calling."""
RECEIVE_MAX_S = 2.0
"""A call to receive is answered by then, so that a hub that died is noticed soon."""
CALLS_MAX = 32
"""Of one peer at once; the hub takes no more, so a peer can only fill a bounded part of its memory."""
SUBSCRIPTIONS_MAX = 1000
"""Of one peer, and so many of its calls may wait to receive. These take no place among the others: almost all of them wait for
something that does not come, and nothing could be sent or settled meanwhile."""
ALWAYS = frozenset({"ping", "bye"})
"""These take no place among them: that a hub is dead is noticed by a ping, also while everything else waits for it."""
ANSWERS_MAX = 4 * CALLS_MAX
ANSWER_S = RECEIVE_MAX_S + CALL_S
"""Kept are so many answers of a peer in any case, and each for so long: no call waits longer but a send, which may be done twice.
By number alone, a busy peer would push out those that were lost with its connection, before it asks for them again."""
BEAT_S = 1.0
RENEW_S = 0.2
"""Before a socket is made in the place of one that failed: one that fails at once must not fill the log."""
HIGH_WATER = 10_000
"""Far above what can be under way, since ZeroMQ drops what is past it."""
HEARTBEAT_MS = 1000
PART_BYTES = 65_536
"""A heartbeat ends a connection on which no whole part comes for three seconds, so a long frame goes in parts."""
PART_BYTES_MAX = PART_BYTES + 1024
"""With what CURVE adds. Who says that a longer one comes is cut off, before any room is made for it."""
BATCH_BYTES = 262_144
"""Of bodies in one call or answer, unless one record is longer: each has to be through before its call is given up."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

log = structlog.get_logger("kassa.messaging.zeromq")


class Address(NamedTuple):
    """What the URL says."""

    host: str
    port: int
    role: str
    """auto, hub or peer."""
    secret: Path | None
    peers: Path | None
    server: Path | None
    lease_s: float


def make_binder(url: str, resources: Resources) -> "ZeroMQBinder":
    """The registry's way in."""
    return ZeroMQBinder(read_url(url), resources)


def read_url(url: str) -> Address:
    """The address in a URL. Raises SettingInvalid."""
    if "://" not in url:
        url = "zeromq://127.0.0.1:0"
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query))
    host = parts.hostname or "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    unknown = set(given) - {"role", "secret", "peers", "server", "plain", "lease_s"}
    if unknown or given.get("role", "auto") not in ("auto", "hub", "peer"):
        raise SettingInvalid(
            "A ZeroMQ address takes role=hub|peer, secret=FILE, peers=DIR, server=FILE, plain=yes and lease_s=SECONDS.",
            broker="zeromq",
        )
    secret, peers, server = (Path(given[name]) if name in given else None for name in ("secret", "peers", "server"))
    if host not in LOOPBACK and secret is None and given.get("plain") != "yes":
        raise SettingInvalid(
            f"{host} is not loopback, so ZeroMQ needs CURVE keys: add ?secret=FILE and peers=DIR (hub) or server=FILE "
            "(peer); `kassa queue keys` makes them. plain=yes trusts the network.",
            broker="zeromq",
        )  # fmt: skip
    return Address(
        host, parts.port or 0, given.get("role", "auto"), secret, peers, server, _seconds(given.get("lease_s"))
    )


def _seconds(text: str | None) -> float:
    try:
        seconds = LEASE_S if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise SettingInvalid(f"lease_s={text} of the ZeroMQ address is not 1 … 3600 seconds.", broker="zeromq")
    return seconds


def make_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """A new pair of CURVE keys in `directory`: NAME.key (public) and NAME.key_secret (mode 0600)."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    mask = os.umask(0o077)
    try:
        public, secret = zmq.auth.create_certificates(directory, name)
    finally:
        os.umask(mask)
    return Path(public), Path(secret)


# What travels


class _Call(msgspec.Struct, array_like=True):
    session: str
    number: int
    oldest: int
    """The lowest number that still waits for its answer: what the hub keeps of earlier ones it may forget."""
    method: str
    arguments: msgspec.Raw


class _Answer(msgspec.Struct, array_like=True):
    number: int
    result: msgspec.Raw
    error: str = ""
    """The code of what was refused."""
    detail: str = ""


class _Sent(msgspec.Struct, array_like=True):
    topic: str
    records: list[Record]
    deadline_s: float


class _Provision(msgspec.Struct, array_like=True):
    topics: list[tuple[str, tuple[str, ...]]]
    verify_only: bool


class _Group(msgspec.Struct, array_like=True):
    topic: str
    group: str


class _Receive(msgspec.Struct, array_like=True):
    subscription: str
    topic: str
    group: str
    limit: int
    wait_s: float


class _Handed(msgspec.Struct, array_like=True):
    record: Record
    attempts: int
    sent_at: datetime
    id: Id
    lease: int
    alone: bool = False


class _End(msgspec.Struct, array_like=True):
    """A settlement."""

    id: Id
    lease: int
    kind: Literal["ack", "retry", "dead", "release"]
    """release: nobody was given it, so it is as if it had never been claimed."""
    delay_s: float
    reason: str | None
    counts: bool


class _Settle(msgspec.Struct, array_like=True):
    subscription: str
    topic: str
    group: str
    ends: list[_End]


class _Receipt(msgspec.Struct, array_like=True):
    kind: str
    reason: str
    is_retryable: bool


_encode = msgspec.msgpack.Encoder().encode
_calls = msgspec.msgpack.Decoder(_Call)
_answers = msgspec.msgpack.Decoder(_Answer)
_NOTHING = msgspec.Raw(_encode(None))
_CONFIRMED = _Receipt("confirmed", "", False)


def _decode(raw: msgspec.Raw, kind: Any) -> Any:
    return msgspec.msgpack.decode(raw, type=kind)


def _receipt_out(receipt: Receipt) -> _Receipt:
    match receipt:
        case Confirmed():
            return _CONFIRMED
        case Failed(reason, is_retryable):
            return _Receipt("failed", reason, is_retryable)
        case Unknown(reason):
            return _Receipt("unknown", reason, True)


def _receipts_in(raw: msgspec.Raw, count: int) -> list[Receipt]:
    """Of so many records. All are confirmed as a rule, which is seen without a look at each."""
    if bytes(raw) == _encode([_CONFIRMED] * count):
        return [Confirmed()] * count
    return [_receipt_in(one) for one in _decode(raw, list[_Receipt])]


def _receipt_in(sent: _Receipt) -> Receipt:
    match sent.kind:
        case "confirmed":
            return Confirmed()
        case "failed":
            return Failed(sent.reason, sent.is_retryable)
        case _:
            return Unknown(sent.reason)


def _parts(frame: bytes) -> list[bytes]:
    return [frame[start : start + PART_BYTES] for start in range(0, len(frame), PART_BYTES)]


def _batch(records: Sequence[Record]) -> Sequence[Record]:
    """The first of them that travel together: at least one."""
    sizes = list(accumulate([len(record.body) for record in records]))
    return records[: max(bisect_right(sizes, BATCH_BYTES), 1)]


class _Line:
    """A socket, and the next one in its place when it fails. What was on its way is lost then, and asked for again."""

    def __init__(self, make: Callable[[], zmq.asyncio.Socket]) -> None:
        self._make = make
        self._socket = make()

    @property
    def port(self) -> int:
        return urlsplit(self._socket.getsockopt_string(zmq.LAST_ENDPOINT)).port or 0

    async def receive(self) -> list[bytes]:
        while True:
            socket = self._socket
            try:
                return await socket.recv_multipart()
            except (zmq.ZMQError, OSError) as error:
                self._give_up(socket, error)
            except asyncio.CancelledError:
                # Closing a socket that could not send cancels what waits for it.
                if is_ended():
                    raise
            await self._renew()

    async def send(self, parts: list[bytes]) -> None:
        """Raises nothing: what could not be sent is lost."""
        socket = self._socket
        try:
            await socket.send_multipart(parts)
        except (zmq.ZMQError, OSError) as error:
            # A peer that is gone is not told.
            if error.errno != errno.EHOSTUNREACH:
                self._give_up(socket, error)
        except asyncio.CancelledError:
            if is_ended():
                raise

    def close(self, linger: int) -> None:
        self._socket.close(linger=linger)

    def _give_up(self, socket: zmq.asyncio.Socket, error: Exception) -> None:
        if not socket.closed:
            log.warning("zeromq.socket_failed", error=str(error))
            socket.close(linger=0)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(zmq.ZMQError, OSError, KassaError):
                self._socket = self._make()
                return


# The hub


class _Left(NamedTuple):
    """What was claimed and not handed out yet."""

    claimed_at: float
    """By the loop's clock, or earlier: their lease runs since then."""
    handed: list[_Handed]


class _Kept(NamedTuple):
    """An answer, and when it was given."""

    at: float
    frame: bytes


class _Session:
    """One peer: the answers to its last calls, and what it subscribed to."""

    def __init__(self) -> None:
        self.answers: dict[int, _Kept] = {}
        """By the number of the call, oldest first."""
        self.running: set[int] = set()
        """The calls that are worked on, but those that receive."""
        self.receiving: set[int] = set()
        self.subscriptions: dict[str, PostgresSubscription] = {}
        self.left: dict[str, _Left] = {}
        """What a subscription was given and did not fit into its answer: the next one begins with it."""
        self.in_hand: dict[str, set[tuple[Id, int]]] = {}
        """What a subscription was handed out and has not settled, each with its lease."""
        self.said: set[int] = set()
        """The leases of which the peer has something in hand, as it said last."""
        self.handed_at: dict[int, float] = {}
        """When something of a lease was last handed out, of those that the peer may not have spoken of yet."""
        self.heard_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether none of its calls is worked on."""
        return not self.running and not self.receiving

    def beside(self, method: str) -> set[int]:
        """The calls with which one of this method shares the places."""
        return self.receiving if method == "receive" else self.running

    def is_full(self, method: str) -> bool:
        """Whether all the places for such a call are taken."""
        places = SUBSCRIPTIONS_MAX if method == "receive" else CALLS_MAX
        return method not in ALWAYS and len(self.beside(method)) >= places

    def is_in_hand(self, lease: int) -> bool:
        """Whether the peer has something of it, or may be about to: an answer that never came is in nobody's hands."""
        return lease in self.said or lease in self.handed_at

    def keep(self, number: int, answer: bytes, *, now: float) -> None:
        """For when it was lost. What a peer still waits for is its own word, so that alone must not bound it."""
        self.answers[number] = _Kept(now, answer)
        surplus = islice(self.answers.items(), max(0, len(self.answers) - ANSWERS_MAX))
        for old, _ in list(takewhile(lambda item: now - item[1].at > ANSWER_S, surplus)):
            del self.answers[old]


_Method = Callable[[_Session, msgspec.Raw], Awaitable[Any]]


class Hub:
    """Answers calls. Everything that it knows is in PostgreSQL, so any process may be it, and the next one goes on."""

    def __init__(self, memory: PostgresBinder, *, lease_s: float) -> None:
        """lease_s: the memory's."""
        self._memory = memory
        self._lease_s = lease_s
        self._sessions: dict[str, _Session] = {}
        self._line: _Line | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._methods: dict[str, _Method] = {
            "ping": self._ping,
            "bye": self._bye,
            "provision": self._provision,
            "send": self._send,
            "subscribe": self._subscribe,
            "receive": self._receive,
            "settle": self._settle,
            "close": self._close,
            "pause": self._pause,
            "resume": self._resume,
            "depth": self._depth,
        }

    def start(self, line: _Line) -> None:
        """line: a bound ROUTER."""
        self._line = line
        for loop in (self._listen(line), self._watch()):
            self._follow(asyncio.create_task(loop))

    async def stop(self) -> None:
        """Gives back what nobody works on yet: another hub may go on at once. What peers hold stays under its lease, since they
        settle it there."""
        await end_tasks(*self._tasks)
        for session in self._sessions.values():
            await self._end_but_in_hand(session)
        self._sessions.clear()
        await self._memory.close()
        if self._line is not None:
            self._line.close(linger=200)

    async def _listen(self, line: _Line) -> None:
        while True:
            identity, *parts = await line.receive()
            try:
                call = _calls.decode(b"".join(parts))
            except UNREADABLE as error:
                log.warning("zeromq.unreadable", error=str(error))
                continue
            self._follow(asyncio.create_task(self._answer(line, identity, call)))

    def _follow(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, line: _Line, identity: bytes, call: _Call) -> None:
        session = self._sessions.setdefault(call.session, _Session())
        clock = asyncio.get_running_loop().time
        session.heard_at = clock()
        for number in [number for number in session.answers if number < call.oldest]:
            del session.answers[number]
        kept = session.answers.get(call.number)
        if kept is not None:
            answer = kept.frame
        else:
            running = session.beside(call.method)
            if call.number in running or session.is_full(call.method):
                # Its first one is still being worked on and will be answered, or it comes again when there is room.
                return
            running.add(call.number)
            try:
                answer = _encode(await self._result(session, call))
            finally:
                running.discard(call.number)
            session.keep(call.number, answer, now=clock())
        await line.send([identity, *_parts(answer)])

    async def _result(self, session: _Session, call: _Call) -> _Answer:
        method = self._methods.get(call.method)
        if method is None:
            return _Answer(call.number, _NOTHING, "request.invalid", f"there is no call {call.method!r}")
        try:
            return _Answer(call.number, msgspec.Raw(_encode(await method(session, call.arguments))))
        except KassaError as error:
            return _Answer(call.number, _NOTHING, error.code, error.detail)
        except UNREADABLE as error:
            return _Answer(call.number, _NOTHING, "request.invalid", str(error))
        except Exception as error:
            # The outermost loop of a call: whatever it raises belongs to its caller.
            log.exception("zeromq.call_failed", method=call.method)
            return _Answer(call.number, _NOTHING, "system.unexpected", type(error).__name__)

    async def _watch(self) -> None:
        """Ends the sessions of peers that fell silent, and gives back what was left too long. While this process stood still it
        heard nobody, so that time does not count."""
        clock = asyncio.get_running_loop().time
        looked_at = clock()
        while True:
            await asyncio.sleep(SILENCE_S / 5)
            now = clock()
            late_s = now - looked_at - SILENCE_S / 5
            looked_at = now
            for name, session in list(self._sessions.items()):
                session.heard_at = min(now, session.heard_at + late_s)
                if session.is_idle and now - session.heard_at > SILENCE_S:
                    del self._sessions[name]
                    await self._lapse(session)
                else:
                    session.handed_at = {lease: at for lease, at in session.handed_at.items() if now - at <= SILENCE_S}
                    await self._release_left(session)

    async def _lapse(self, session: _Session) -> None:
        """What it had in hand may be what ended it, so that is not given back: its leases are over, and the next claim counts
        that."""
        in_hand = [{lease for _, lease in handed} for handed in session.in_hand.values()]
        await self._end_but_in_hand(session)
        for leases in filter(None, in_hand):
            try:
                await self._memory.lapse(leases)
            except Exception:
                # Whatever it is: these leases run out by themselves, and the watch goes on with the next session.
                log.exception("zeromq.not_lapsed")

    async def _release_left(self, session: _Session) -> None:
        """What its peer did not come for. It is in one lease with what it has in hand, and would stay as long as that."""
        old = [name for name, left in session.left.items() if not self._is_fresh(left)]
        for left, subscription in [(session.left.pop(name), session.subscriptions.get(name)) for name in old]:
            try:
                if subscription is not None:
                    await subscription.release(left.handed)
            except Exception:
                # Whatever it is: the watch goes on with the next one.
                log.exception("zeromq.not_released")

    async def _end_but_in_hand(self, session: _Session) -> None:
        for name, subscription in session.subscriptions.items():
            left = session.left.get(name)
            subscription.let_go(but={one.id for one in left.handed} if left else ())
        await self._end(session)

    async def _end(self, session: _Session) -> None:
        """Never raises: who ends sessions goes on with the next one."""
        ending = list(session.subscriptions.values())
        session.subscriptions.clear()
        session.left.clear()
        session.in_hand.clear()
        for subscription in ending:
            try:
                await subscription.close(0.0)
            except Exception:
                # Whatever the database has against this one; the leases run out by themselves.
                log.exception("zeromq.not_given_back")

    # Calls

    async def _ping(self, session: _Session, raw: msgspec.Raw) -> None:
        """Shows that the peer lives, and says what it has in hand (nothing: a peer of an earlier version)."""
        session.said = _decode(raw, set[int] | None) or set()

    async def _send(self, session: _Session, raw: msgspec.Raw) -> list[_Receipt]:
        sent: _Sent = _decode(raw, _Sent)
        records = [believed(record) for record in sent.records]
        receipts = await self._memory.send(sent.topic, records, deadline_s=sent.deadline_s)
        return [_receipt_out(receipt) for receipt in receipts]

    async def _provision(self, session: _Session, raw: msgspec.Raw) -> list[str]:
        wanted: _Provision = _decode(raw, _Provision)
        topics = [Topic(name, groups, "") for name, groups in wanted.topics]
        return await self._memory.provision(topics, verify_only=wanted.verify_only)

    async def _subscribe(self, session: _Session, raw: msgspec.Raw) -> None:
        wanted: _Receive = _decode(raw, _Receive)
        await self._subscription(session, wanted.subscription, wanted.topic, wanted.group)

    async def _subscription(self, session: _Session, name: str, topic: str, group: str) -> PostgresSubscription:
        found = session.subscriptions.get(name)
        if found is None:
            if len(session.subscriptions) >= SUBSCRIPTIONS_MAX:
                raise TooMany(f"A peer has at most {SUBSCRIPTIONS_MAX} subscriptions.")
            found = await self._memory.subscribe(topic, group, is_in_hand=session.is_in_hand)
            session.subscriptions[name] = found
        return found

    async def _receive(self, session: _Session, raw: msgspec.Raw) -> list[_Handed]:
        wanted: _Receive = _decode(raw, _Receive)
        wanted.limit = min(wanted.limit, TRAITS.batch_max)
        subscription = await self._subscription(session, wanted.subscription, wanted.topic, wanted.group)
        left = session.left.pop(wanted.subscription, None)
        if left is not None and not self._is_fresh(left):
            await subscription.release(left.handed)
            left = None
        found = left or await self._claim(subscription, wanted)
        count = min(wanted.limit, len(_batch([one.record for one in found.handed])))
        self._leave(session, wanted.subscription, found._replace(handed=found.handed[count:]))
        handed = found.handed[:count]
        session.in_hand.setdefault(wanted.subscription, set()).update((one.id, one.lease) for one in handed)
        session.handed_at.update(dict.fromkeys({one.lease for one in handed}, asyncio.get_running_loop().time()))
        return handed

    def _is_fresh(self, left: _Left) -> bool:
        """Whether enough of its lease is left for whoever gets it: a slow handler asks late for the rest, and by then another
        consumer may have it."""
        return asyncio.get_running_loop().time() - left.claimed_at <= self._lease_s / 2

    async def _claim(self, subscription: PostgresSubscription, wanted: _Receive) -> _Left:
        began = asyncio.get_running_loop().time() - ahead_s(self._lease_s)
        # In this order: a peer's NaN is no number to wait for, and `min` gives its first then.
        claimed = await subscription.claim(wanted.limit, min(RECEIVE_MAX_S, wanted.wait_s))
        return _Left(began, [_handed(one) for one in claimed])

    def _leave(self, session: _Session, name: str, rest: _Left) -> None:
        """For the next answer. Two calls of one subscription may be under way, when the peer has given up the first."""
        if rest.handed:
            other = session.left.get(name, _Left(rest.claimed_at, []))
            session.left[name] = _Left(min(rest.claimed_at, other.claimed_at), other.handed + rest.handed)

    async def _settle(self, session: _Session, raw: msgspec.Raw) -> list[bool]:
        wanted: _Settle = _decode(raw, _Settle)
        subscription = await self._subscription(session, wanted.subscription, wanted.topic, wanted.group)
        session.in_hand.get(wanted.subscription, set()).difference_update((end.id, end.lease) for end in wanted.ends)
        acked = [end for end in wanted.ends if end.kind == "ack"]
        failed = [(end, end.delay_s, end.reason, end.counts) for end in wanted.ends if end.kind == "retry"]
        dead = [(end, end.reason or "") for end in wanted.ends if end.kind == "dead"]
        await subscription.release([end for end in wanted.ends if end.kind == "release"])
        done = await subscription.end(acked, failed, dead)
        return [end.id in done for end in wanted.ends]

    async def _close(self, session: _Session, raw: msgspec.Raw) -> None:
        wanted: _Receive = _decode(raw, _Receive)
        session.left.pop(wanted.subscription, None)
        session.in_hand.pop(wanted.subscription, None)
        subscription = session.subscriptions.pop(wanted.subscription, None)
        if subscription is not None:
            await subscription.close(0.0)

    async def _pause(self, session: _Session, raw: msgspec.Raw) -> None:
        of: _Group = _decode(raw, _Group)
        await self._memory.pause(of.topic, of.group)

    async def _resume(self, session: _Session, raw: msgspec.Raw) -> None:
        of: _Group = _decode(raw, _Group)
        await self._memory.resume(of.topic, of.group)

    async def _depth(self, session: _Session, raw: msgspec.Raw) -> Depth:
        of: _Group = _decode(raw, _Group)
        return await self._memory.depth(of.topic, of.group)

    async def _bye(self, session: _Session, raw: msgspec.Raw) -> None:
        await self._end(session)


def _handed(message: ClaimedMessage) -> _Handed:
    record = as_record(message)
    return _Handed(record, message.attempts, message.created_at, message.id, message.lease, message.alone)


# The peer


class ZeroMQBinder:
    """Calls the hub; is the hub, where nobody else on this machine is."""

    name = "zeromq"
    traits = TRAITS

    def __init__(self, address: Address, resources: Resources) -> None:
        self._address = address
        self._hub = Hub(
            PostgresBinder(
                resources.pool,
                resources.wakeups,
                lease_s=address.lease_s,
                topics=resources.topics,
                meters=resources.meters,
            ),
            lease_s=address.lease_s,
        )
        self._is_hub = False
        self._context: zmq.asyncio.Context | None = None
        self._authenticator: AsyncioAuthenticator | None = None
        self._line: _Line | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._session = new_id()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[_Answer]] = {}
        self._subscriptions: WeakSet[ZeroMQSubscription] = WeakSet()
        """Those that somebody has, for what is in their hands."""
        self._places = asyncio.Semaphore(CALLS_MAX)
        self._receiving = asyncio.Semaphore(SUBSCRIPTIONS_MAX)

    @property
    def url(self) -> str:
        """Where peers reach the hub, with the port that it really has."""
        return f"zeromq://{self._address.host}:{self._address.port}"

    async def open(self) -> None:
        """Raises BrokerUnreachable when nobody answers there and this process cannot be the hub."""
        self._context = zmq.asyncio.Context()
        try:
            if self._address.role != "peer":
                self._be_hub()
            self._connect()
            await self.call("ping", None, CALL_S)
        except BaseException:
            # Also when it is cancelled: a context with an open socket never ends.
            await self.close()
            raise
        self._tasks.append(asyncio.create_task(self._beat(), name="zeromq"))

    async def close(self) -> None:
        try:
            if self._line is not None:
                with suppress(BrokerUnreachable):
                    await self.call("bye", None, RESEND_S)
                await end_tasks(*self._tasks)
                self._line.close(linger=0)
                self._line = None
            if self._is_hub:
                await self._hub.stop()
        finally:
            if self._authenticator is not None:
                self._authenticator.stop()
                self._authenticator = None
            if self._context is not None:
                # With every socket that is left, also where something went wrong before: it waits for them for ever, and so
                # does whoever tidies up a context that nobody has ended.
                self._context.destroy(linger=0)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool = False) -> list[str]:
        wanted = _Provision([(topic.name, topic.groups) for topic in topics], verify_only)
        said: list[str] = _decode(await self.call("provision", wanted, CALL_S), list[str])
        return said

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """Confirmed once the hub has committed it. What is not answered is asked again under the same number."""
        too_large = {place for place, record in enumerate(records) if len(record.body) > TRAITS.bytes_max}
        fitting = [record for place, record in enumerate(records) if place not in too_large] if too_large else records
        clock = asyncio.get_running_loop().time
        deadline = clock() + deadline_s
        answers: list[Receipt] = []
        while len(answers) < len(fitting):
            batch = _batch(fitting[len(answers) :])
            if answers and isinstance(answers[-1], Unknown):
                # Nothing overtakes what has to be sent again.
                answers += [answers[-1]] * len(batch)
            else:
                answers += await self._send(topic, batch, deadline - clock())
        if not too_large:
            return answers
        left = iter(answers)
        refusal = Failed(f"larger than the {TRAITS.bytes_max} bytes of zeromq", is_retryable=False)
        return [refusal if place in too_large else next(left) for place in range(len(records))]

    async def _send(self, topic: str, records: Sequence[Record], deadline_s: float) -> list[Receipt]:
        try:
            raw = await self.call("send", _Sent(topic, list(records), deadline_s), deadline_s)
        except BrokerUnreachable:
            return [Unknown("the hub does not answer")] * len(records)
        return _receipts_in(raw, len(records))

    async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """An address is a topic here."""
        return await self.send(address, records, deadline_s=deadline_s)

    async def subscribe(self, topic: str, group: str) -> Subscription:
        subscription = ZeroMQSubscription(self, topic, group)
        await subscription.open()
        self._subscriptions.add(subscription)
        return subscription

    async def pause(self, topic: str, group: str) -> None:
        await self.call("pause", _Group(topic, group), CALL_S)

    async def resume(self, topic: str, group: str) -> None:
        await self.call("resume", _Group(topic, group), CALL_S)

    async def depth(self, topic: str, group: str) -> Depth:
        depth: Depth = _decode(await self.call("depth", _Group(topic, group), CALL_S), Depth)
        return depth

    # Calling

    async def call(self, method: str, arguments: Any, deadline_s: float, resend_s: float = RESEND_S) -> msgspec.Raw:
        """The result. Raises QueueNotFound as the hub says, BrokerUnreachable when there is no answer in time, also when the time
        passes behind other calls."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        if method in ALWAYS:
            answer = await self._ask(method, arguments, deadline, resend_s)
        else:
            places = self._receiving if method == "receive" else self._places
            await self._take_place(places, deadline)
            try:
                answer = await self._ask(method, arguments, deadline, resend_s)
            finally:
                places.release()
        if answer.error == QueueNotFound.code:
            raise QueueNotFound(answer.detail)
        if answer.error:
            raise BrokerUnreachable(f"The hub refused {method}: {answer.detail}", broker="zeromq", code=answer.error)
        return answer.result

    async def _take_place(self, places: asyncio.Semaphore, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await places.acquire()
        except TimeoutError as error:
            raise BrokerUnreachable(
                f"Too many calls wait for the ZeroMQ hub at {self.url}.", broker="zeromq"
            ) from error

    async def _ask(self, method: str, arguments: Any, deadline: float, resend_s: float) -> _Answer:
        self._number += 1
        number = self._number
        oldest = min(self._waiting, default=number)
        frame = _encode(_Call(self._session, number, oldest, method, msgspec.Raw(_encode(arguments))))
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            return await self._insist(frame, future, deadline, resend_s)
        finally:
            del self._waiting[number]

    async def _insist(
        self, frame: bytes, future: "asyncio.Future[_Answer]", deadline: float, resend_s: float
    ) -> _Answer:
        clock = asyncio.get_running_loop().time
        wire_s = len(frame) / WIRE_BYTES_S
        while True:
            left_s = deadline - clock()
            if left_s <= 0 or self._line is None:
                raise BrokerUnreachable(f"No ZeroMQ hub answers at {self.url}.", broker="zeromq")
            try:
                async with asyncio.timeout(min(left_s, resend_s + wire_s)):
                    await self._line.send(_parts(frame))
                    return await asyncio.shield(future)
            except TimeoutError:
                wire_s *= 2

    async def _beat(self) -> None:
        """The hub takes a peer that says nothing for gone, however long its handlers take; and one of the peers is the next hub
        when there is none any more."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self._ping()
            except Exception:
                # The outermost loop: without it this process would be silent, and would never take over.
                log.exception("zeromq.beat_failed")

    async def _ping(self) -> None:
        try:
            in_hand = set[int]().union(*(subscription.leases for subscription in self._subscriptions))
            await self.call("ping", in_hand, CALL_S)
        except BrokerUnreachable:
            self._take_over()

    async def _listen(self, line: _Line) -> None:
        while True:
            parts = await line.receive()
            try:
                answer = _answers.decode(b"".join(parts))
            except UNREADABLE as error:
                log.warning("zeromq.unreadable", error=str(error))
                continue
            waiting = self._waiting.get(answer.number)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    # Sockets

    def _be_hub(self) -> None:
        """Binds, if nobody has. Raises BrokerUnreachable when this process must be the hub and cannot, SettingInvalid."""
        try:
            line = _Line(self._bound)
        except zmq.ZMQError as error:
            if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENODEV) and self._address.role == "auto":
                return
            raise BrokerUnreachable(f"Cannot be the ZeroMQ hub at {self.url}: {error}.", broker="zeromq") from error
        self._address = self._address._replace(port=line.port)
        self._is_hub = True
        self._hub.start(line)

    def _bound(self) -> zmq.asyncio.Socket:
        """Raises ZMQError when another process has the port, SettingInvalid."""
        socket = self._made(zmq.ROUTER)
        try:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            if self._address.secret is not None:
                self._secure_hub(socket, self._address.secret)
            socket.bind(f"tcp://{self._address.host}:{self._address.port or '*'}")
        except BaseException:
            # Raised again. A peer tries it with each beat, and a process has only so many sockets.
            socket.close(linger=0)
            raise
        return socket

    def _take_over(self) -> None:
        """Is the hub from now on, if the one before has left the port, and its peers would know this one by its key."""
        if self._address.role != "auto" or self._is_hub:
            return
        try:
            secret, server = self._address.secret, self._address.server
            if secret is None or _keys(secret)[0] == _keys(server)[0]:
                self._be_hub()
        except KassaError as error:
            log.warning("zeromq.not_taken_over", error=str(error))
        if self._is_hub:
            log.warning("zeromq.taken_over", url=self.url)

    def _secure_hub(self, socket: zmq.asyncio.Socket, secret_file: Path) -> None:
        public, secret = _keys(secret_file)
        if self._address.peers is None:
            raise SettingInvalid("A ZeroMQ hub with CURVE needs peers=DIR: the public keys of who may call.")
        if self._authenticator is None:
            self._authenticator = AsyncioAuthenticator(self._context)
            self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(self._address.peers))
        socket.curve_secretkey, socket.curve_publickey, socket.curve_server = secret, public, True

    def _connect(self) -> None:
        self._line = _Line(self._connected)
        self._tasks = [asyncio.create_task(self._listen(self._line), name="zeromq")]

    def _connected(self) -> zmq.asyncio.Socket:
        socket = self._made(zmq.DEALER)
        try:
            if self._address.secret is not None:
                public, secret = _keys(self._address.secret)
                server = public if self._is_hub else _keys(self._address.server)[0]
                socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, server
            # What cannot leave waits here, once, instead of piling up for the next hub each time that it is sent again.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.connect(f"tcp://{self._address.host}:{self._address.port}")
        except BaseException:
            # Raised again. It is tried again and again, and a process has only so many sockets.
            socket.close(linger=0)
            raise
        return socket

    def _made(self, kind: int) -> zmq.asyncio.Socket:
        if self._context is None:
            raise InvariantBroken("The binder is not open.")
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, PART_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if ":" in self._address.host:
            socket.setsockopt(zmq.IPV6, 1)
        return socket


def _keys(file: Path | None) -> tuple[bytes, bytes]:
    """(public, secret) of a key file; the secret is empty in a public one. Raises SettingInvalid."""
    if file is None:
        raise SettingInvalid("A ZeroMQ peer with CURVE needs server=FILE: the hub's public key.", broker="zeromq")
    try:
        public, secret = zmq.auth.load_certificate(file)
    except (OSError, ValueError) as error:
        raise SettingInvalid(f"{file} is not a CURVE key file: {error}.", broker="zeromq") from error
    return public, secret or b""


class ZeroMQSubscription:
    """A group's records at the hub. A delivery may be settled at any hub of the same database."""

    def __init__(self, binder: ZeroMQBinder, topic: str, group: str) -> None:
        self._binder = binder
        self._name = new_id()
        self._topic = topic
        self._group = group
        self._is_closed = False
        self._has_left = False
        """The hub knows, or is being told, that this one is closed."""
        self._held: dict[Id, int] = {}
        """What was handed out, with its lease."""
        self._drained = asyncio.Event()
        self._forgoing: set[asyncio.Task[None]] = set()
        """Each gives back what somebody asked for who was cancelled."""

    @property
    def leases(self) -> set[int]:
        """Under which something is in hand."""
        return set(self._held.values())

    async def open(self) -> None:
        """Raises QueueNotFound, BrokerUnreachable."""
        await self._binder.call("subscribe", self._wanted(0, 0.0), CALL_S)

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        while not self._is_closed:
            wait = max(0.0, min(deadline - clock(), RECEIVE_MAX_S))
            asking = asyncio.create_task(self._ask(limit, wait))
            try:
                handed = await asyncio.shield(asking)
            except asyncio.CancelledError:
                self._follow(self._forgo(asking))
                raise
            if handed:
                self._held.update((one.id, one.lease) for one in handed)
                return [
                    Delivery(one.record, one.attempts, one.sent_at, one, one.lease, alone=one.alone) for one in handed
                ]
            if clock() >= deadline:
                break
        return []

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        ends = [_end(delivery, end) for delivery, end in settled]
        try:
            raw = await self._settle(ends)
        except (BrokerUnreachable, QueueNotFound):
            return [False] * len(settled)
        finally:
            for end in ends:
                self._held.pop(end.id, None)
            if not self._held:
                self._drained.set()
        results: list[bool] = _decode(raw, list[bool])
        return results

    async def close(self, drain_s: float) -> None:
        self._is_closed = True
        if self._held:
            self._drained.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._drained.wait()
        self._has_left = True
        try:
            with suppress(BrokerUnreachable):
                await self._binder.call("close", self._wanted(0, 0.0), CALL_S)
        finally:
            # The hub has answered what they wait for, and taken back what it had handed out.
            for task in self._forgoing:
                task.cancel()
            self._held.clear()

    async def _ask(self, limit: int, wait_s: float) -> list[_Handed]:
        """Goes on when who asks is cancelled: the hub would take for his what the answer brings."""
        raw = await self._binder.call("receive", self._wanted(limit, wait_s), wait_s + CALL_S, wait_s + RESEND_S)
        handed: list[_Handed] = _decode(raw, list[_Handed])
        return handed

    async def _forgo(self, asking: asyncio.Task[list[_Handed]]) -> None:
        """What cannot be given back, its lease gives back."""
        with suppress(BrokerUnreachable, QueueNotFound):
            handed = await asking
            if handed and not self._has_left:
                await self._settle([_End(one.id, one.lease, "release", 0.0, None, False) for one in handed])

    async def _settle(self, ends: list[_End]) -> msgspec.Raw:
        return await self._binder.call("settle", _Settle(self._name, self._topic, self._group, ends), CALL_S)

    def _follow(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._forgoing.add(task)
        task.add_done_callback(self._forgoing.discard)

    def _wanted(self, limit: int, wait_s: float) -> _Receive:
        return _Receive(self._name, self._topic, self._group, limit, wait_s)


def _end(delivery: Delivery, end: Settlement) -> _End:
    handed = delivery.token
    if not isinstance(handed, _Handed):
        raise InvariantBroken("A delivery of another binder was settled here.", record=delivery.record.id)
    match end:
        case Ack():
            return _End(handed.id, handed.lease, "ack", 0.0, None, True)
        case RetryAfter(delay_s, reason, counts):
            return _End(handed.id, handed.lease, "retry", delay_s, reason, counts)
        case Dead(reason):
            return _End(handed.id, handed.lease, "dead", 0.0, reason, True)
