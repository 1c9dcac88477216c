"""Apache Kafka: a topic is a Kafka topic with one partition per lane, a group is a consumer group of its own per topic.

    kafka://host:9092,host2:9092                     plain
    kafka+ssl://user:password@host:9093?ca=ca.pem    TLS, and the user's password over SASL

What may be in the query:
- `tls=1` (what `kafka+ssl` says too), `ca=FILE` (the system's authorities otherwise), `cert=FILE`, `key=FILE`,
  `key_password=…`, `verify=full|chain|none` (chain: any host name; none: any server, for experiments);
- `sasl=PLAIN|SCRAM-SHA-256|SCRAM-SHA-512` for the user of the URL (PLAIN unless told otherwise);
- `replication=N`, `min_isr=N` of topics that are created here (3 and 2 where the cluster is large enough, else 1 and 1);
- `protocol=auto|classic|consumer`, how a group shares its lanes out. `consumer` is KIP-848, whose pace is the server's: as it
  comes, a lane moves within 10 s and a dead consumer is noticed after 45 s. `classic` (cooperative-sticky) has ours: 1 s
  and 6 s. `auto` takes `consumer` where the server was told to be as quick;
- `instance=NAME`, a name that only this process has and keeps over a restart: its consumers are static members then, so
  that a restart within 6 s moves no lane;
- `compression=none|lz4|zstd|snappy|gzip`;
- `local_queue=N`, packets that wait in this process for the broker, at most.

Who sends chooses the partition: crc32 of the key modulo the lanes; so a topic has to have as many partitions as lanes. The
producer is idempotent and wants all replicas. Offsets are committed after packets are settled: of each partition up to the
first one that is not, in the background, a few milliseconds later and for all of them together; a lane that goes and a consumer
that is closed wait for the answer. What was settled a moment before a process dies may so come again. A group is new while
nothing is committed for it: `provision` commits the end of what is there, and the beginning of a topic that it makes.

Kafka forgets: packets after the topic's `retention.ms`, and a group that nobody received for after the server's
`offsets.retention.minutes` (a week each, if nobody changed it).

A topic that somebody deletes is made again by a process that had provisioned it, with the partitions, replicas and settings that
it had then: by the next one who sends, or by who receives. What was in it is gone; Kassa's log still has its events.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import compress, count
from operator import methodcaller
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakSet

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)

# Its types do not tell that this module has what it takes from the client's core.
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    ConfigSource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from kassa.errors import BrokerUnreachable, InvariantBroken, KassaError, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.messaging.binder import Resources
from kassa.messaging.model import Arrival, Confirmed, Failed, Packet, Receipt, Traits, Unknown
from kassa.messaging.packing import ID, KEY
from kassa.messaging.supplied import SuppliedBinder
from kassa.messaging.topology import Topic, lane
from kassa.messaging.vanished import how_to_have_again
from kassa.observability.meters import Meters
from kassa.settings import without_password
from kassa.supervisor import end_tasks

log = structlog.get_logger("kassa.messaging.kafka")

TRAITS = Traits(
    durable=True, ordered=True, delay_max_s=0.0, priorities=1, dead_letters=False, counts_attempts=False,
    acknowledges_in_change=False, deduplicates=False, batch_max=1000, bytes_max=900_000, reports_depth=True,
    request_reply=True,
)  # fmt: skip

"""bytes_max: Kafka takes a megabyte with key and headers, if nobody changed it."""

ADMIN_S = 10.0
"""One question to the cluster."""
JOIN_S = 5.0
"""`subscribe` waits so long for the consumer's lanes; they come later too."""
GREETING_S, GREETINGS_MAX = 2.0, 5
"""The first question of all, and how often it is asked: ten seconds in all, but one refusal is told after two."""
FAREWELL_S = 0.1
TRIES_MAX, BETWEEN_TRIES_S = 100, 0.1
"""Ten seconds, for what passes by itself: a new topic that not every broker knows, a leader or coordinator that moves."""
CLOSE_S = 15.0
"""The last commit and the farewell to the group; then its thread is left to itself."""
COMMIT_S, COMMIT_AGAIN_S = 0.01, 0.1
"""Between two commits in the background: one tells of all that was settled meanwhile. The longer one after a commit that the
broker did not take."""
BUSY_S = 0.01
"""How long a consumer waits for packets or orders while there may be something to commit, or it has no lanes yet."""
TELL_S = 60.0
WATCH_S = 2.0
"""How often it is looked whether topics are still those that they were."""
IDLE_S = 0.5
"""How often a consumer that nobody asks looks after its place in the group."""
POLL_S = 0.2
"""How long a consumer's thread waits for a packet before it looks for other orders."""
AHEAD_MAX = 20
"""Packets that a consumer which nobody asks may still be given, one per look; then its lanes are paused."""
AHEAD_KB, PARTITION_KB = 4 * 1024, 256
"""What the client fetches ahead by itself, and of one partition with one question, however long the backlog. A packet that is
larger comes nevertheless."""
LEAPS_S = 2.0
"""Between two looks why packets are missing, and for how long a broker is asked."""
PAUSE_S = 1.0
"""Between two sessions of a consumer."""
FORGOTTEN_S = 0.5
"""After so long every broker knows that a topic is a new one, and has thrown away where the groups of the old one were."""
SESSION_S, HEARTBEAT_S = 6.0, 0.5
"""A dead consumer's lanes go to others after so long (6 s is the least that servers take); a new consumer is heard of
within a heartbeat."""
STUCK_S = 30.0
"""So long a producer may say nothing of what it is given, and twice as long as it holds a packet."""
TIMEOUTS_S = (1, 2, 5, 10, 20, 60, 300)
"""Producers by how long they hold a packet: the deadline of a send, rounded up, so that what is told to be unknown does not
leave much later. One process uses one or two of them."""
DEADLINE_S = 10.0
"""The one that most sends have."""
FEW_MAX, LINGER_MS = 10, 1
"""So few packets leave at once, by a producer of their own. One that waits a moment for more is a fifth quicker with many, and a
millisecond or two later with one."""
LOCAL_QUEUE = 50_000

_PASSING = frozenset({
    KafkaError.LEADER_NOT_AVAILABLE, KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR, KafkaError.NOT_CONTROLLER, KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError.FENCED_LEADER_EPOCH, KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.INVALID_REPLICATION_FACTOR,
})  # fmt: skip
"""The cluster is busy with itself. A replication that cannot be had is one when brokers are away: too many is refused by us."""
_MENDABLE = frozenset({
    KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError.INVALID_PARTITIONS,
    KafkaError.INVALID_CONFIG, KafkaError.INVALID_REQUEST, KafkaError.POLICY_VIOLATION,
})  # fmt: skip
"""Somebody has to change a setting or a right."""
_NO_TOPIC = frozenset({
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.UNKNOWN_TOPIC_ID, KafkaError._UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION, KafkaError.TOPIC_EXCEPTION,
})  # fmt: skip
_REFUSED = frozenset({KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError.SASL_AUTHENTICATION_FAILED})
_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE, KafkaError.RECORD_LIST_TOO_LARGE})
_NOT_TAKEN = frozenset({
    KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError.NOT_ENOUGH_REPLICAS, KafkaError.INVALID_RECORD,
    KafkaError.POLICY_VIOLATION, KafkaError.THROTTLING_QUOTA_EXCEEDED,
})  # fmt: skip
"""The broker said no and keeps nothing; somebody can mend it."""
_HAS_MEMBERS = frozenset({
    KafkaError.UNKNOWN_MEMBER_ID, KafkaError.NON_EMPTY_GROUP, KafkaError.ILLEGAL_GENERATION, KafkaError.STALE_MEMBER_EPOCH,
})  # fmt: skip
_OLD_SERVER = frozenset({KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE})

_EARLIEST: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
_LATEST: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]

AGAIN = "~made-again"
"""A group that nobody receives for; what is committed for it says that a topic was deleted and made again. Kafka forgets the groups
of a topic that is deleted, and one that was away meanwhile must not begin at the end, as if it were new."""

NAMES_MAX, NAME_CHARACTERS_MAX = 1024, 100
"""Names of headers whose translation is remembered."""
_TO_KAFKA = {"reply-to": "reply-topic"}
_FROM_KAFKA = {"reply-topic": "reply-to"}

T = TypeVar("T")
_Rebalance = Callable[[Consumer, list[TopicPartition]], None]
Headers = dict[str, Any]
"""Texts, or bytes where the client would not take or cut a text."""


def make_binder(url: str, resources: Resources) -> SuppliedBinder:
    """The registry's way in. Raises SettingInvalid."""
    return SuppliedBinder(KafkaTransport(read_url(url), meters=resources.meters), resources)


def group_id(topic: str, group: str) -> str:
    """A group of a topic as Kafka knows it: groups of two topics are two, so that neither disturbs the other."""
    return f"{topic}:{group}"


# Settings


class KafkaSettings(NamedTuple):
    """What the URL says."""

    url: str
    """Without its password, for people."""
    client: Mapping[str, str | int | float | bool]
    """librdkafka's settings for each kind of client."""
    replication: int | None
    min_isr: int | None
    protocol: str
    instance: str | None
    compression: str
    local_queue: int


def read_url(url: str) -> KafkaSettings:
    """Raises SettingInvalid, which names the URL without its password."""
    shown = without_password(url)
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    account, _, hosts = parts.netloc.rpartition("@")
    user, _, password = account.partition(":")

    def choice(name: str, default: str, *allowed: str) -> str:
        value = given.pop(name, default)
        if value not in allowed:
            raise SettingInvalid(f"{shown}: {name} is one of {', '.join(allowed)}.", broker="kafka")
        return value

    def number(name: str) -> int | None:
        value = given.pop(name, None)
        if value is not None and not (value.isdigit() and 0 < int(value) <= 1_000_000):
            raise SettingInvalid(f"{shown}: {name} is a positive number.", broker="kafka")
        return None if value is None else int(value)

    if not hosts:
        raise SettingInvalid(f"{shown}: a host is missing, as in kafka://127.0.0.1:9092.", broker="kafka")
    is_tls = choice("tls", "1" if parts.scheme.endswith("+ssl") else "0", "0", "1") == "1"
    client: dict[str, str | int | float | bool] = {"bootstrap.servers": hosts, **_COMMON}
    client["security.protocol"] = ("SASL_" if user else "") + ("SSL" if is_tls else "PLAINTEXT")
    if is_tls:
        for name, setting in _TLS_FILES.items():
            if name in given:
                client[setting] = given.pop(name)
        match choice("verify", "full", "full", "chain", "none"):
            case "chain":
                client["ssl.endpoint.identification.algorithm"] = "none"
            case "none":
                client["enable.ssl.certificate.verification"] = False
    if user:
        client["sasl.mechanism"] = choice("sasl", "PLAIN", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
        client["sasl.username"], client["sasl.password"] = unquote(user), unquote(password)
    settings = KafkaSettings(
        shown, client, number("replication"), number("min_isr"),
        choice("protocol", "auto", "auto", "classic", "consumer"), given.pop("instance", None),
        choice("compression", "none", "none", "lz4", "zstd", "snappy", "gzip"), number("local_queue") or LOCAL_QUEUE,
    )  # fmt: skip
    if for_tls := given.keys() & {*_TLS_FILES, "verify"}:
        raise SettingInvalid(
            f"{shown}: {', '.join(sorted(for_tls))} is for TLS: begin with kafka+ssl://, or add tls=1.", broker="kafka"
        )
    if "sasl" in given:
        raise SettingInvalid(f"{shown}: sasl is for a user: kafka://USER:PASSWORD@HOST:PORT.", broker="kafka")
    if given:
        raise SettingInvalid(f"{shown}: nobody knows {', '.join(sorted(given))} here.", broker="kafka")
    return settings


_TLS_FILES = {
    "ca": "ssl.ca.location",
    "cert": "ssl.certificate.location",
    "key": "ssl.key.location",
    "key_password": "ssl.key.password",
}
_COMMON: Mapping[str, str | int | float | bool] = {
    "client.id": "kassa",
    # What it has to say comes through callbacks; else it would write to standard error by itself.
    "log_level": 0,
    # A server that is frozen or behind a dead line is given up after this, and asked again on a new connection.
    "socket.timeout.ms": 10_000,
    "socket.keepalive.enable": True,
    "reconnect.backoff.ms": 50,
    "reconnect.backoff.max.ms": 1000,
    "topic.metadata.refresh.interval.ms": 30_000,
    "allow.auto.create.topics": False,
}


def _producer_settings(settings: KafkaSettings, timeout_s: int, linger_ms: int) -> dict[str, Any]:
    return {
        **settings.client,
        "acks": "all",
        "enable.idempotence": True,
        "message.timeout.ms": timeout_s * 1000,
        # A topic that was deleted is a failure soon, not only at the deadline.
        "topic.metadata.propagation.max.ms": 2000,
        "linger.ms": linger_ms,
        "retry.backoff.ms": 50,
        "retry.backoff.max.ms": 500,
        "compression.type": settings.compression,
        "queue.buffering.max.messages": settings.local_queue,
        "queue.buffering.max.kbytes": 64 * 1024,
        "message.max.bytes": 1_048_588,
    }


def _consumer_settings(settings: KafkaSettings, group: str, protocol: str, instance: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {
        **settings.client,
        "group.id": group,
        "group.protocol": protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # Where nothing is committed, nothing was received: from the beginning then, so that nothing is lost.
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",
        "enable.partition.eof": True,
        # What is fetched ahead, and how soon more is fetched when that was taken.
        "queued.min.messages": 5000,
        "queued.max.messages.kbytes": AHEAD_KB,
        "max.partition.fetch.bytes": PARTITION_KB * 1024,
        "fetch.queue.backoff.ms": 10,
        # Lanes that come late are in the next question only, so a question does not wait long.
        "fetch.wait.max.ms": 200,
        "fetch.error.backoff.ms": 100,
    }
    if protocol == "classic":
        made["partition.assignment.strategy"] = "cooperative-sticky"
        made["session.timeout.ms"] = int(SESSION_S * 1000)
        made["heartbeat.interval.ms"] = int(HEARTBEAT_S * 1000)
    if instance is not None:
        made["group.instance.id"] = instance
    return made


class _Troubles:
    """What a client says of its connections, once per kind and minute: it says it many times per second."""

    def __init__(self) -> None:
        self._told: dict[int, float] = {}

    def tell(self, event: str, error: KafkaError, **facts: str) -> None:
        """In a thread of the client's."""
        now = time.monotonic()
        if now - self._told.get(error.code(), -TELL_S) >= TELL_S:
            self._told[error.code()] = now
            log.info(event, error=error.str(), fatal=error.fatal(), **facts)


# Sending


class _Sending:
    """The packets of one `send`, until the last one is reported."""

    __slots__ = ("done", "left", "receipts")

    def __init__(self, packets: int, done: "asyncio.Future[None]") -> None:
        self.receipts: list[Receipt | None] = [None] * packets
        self.left = packets
        self.done = done

    def receipt(self, place: int, receipt: Receipt) -> None:
        """What became of one; the first word counts."""
        if self.receipts[place] is None:
            self.receipts[place] = receipt
            self.left -= 1
            if self.left == 0 and not self.done.done():
                self.done.set_result(None)

    def end(self, receipt: Receipt) -> list[Receipt]:
        """All of them; `receipt` for those of which nothing was heard."""
        self.left = -1
        return [receipt if one is None else one for one in self.receipts]


class _Outlet:
    """A producer with the thread that hears its reports. They reach the loop in bursts: one wake-up for as many as came."""

    def __init__(self, settings: KafkaSettings, timeout_s: int, linger_ms: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = _producer_settings(settings, timeout_s, linger_ms)
        self._troubles = _Troubles()
        self._producer = self._make()
        self._burst: list[tuple[_Sending, int, KafkaError | None]] = []
        self._room = asyncio.Event()
        self._is_closing = False
        self._grace_s = 0.0
        self._ended = asyncio.Event()
        self._is_broken = False
        self._silent_since: float | None = None
        """Of the monotonic clock: since when packets were handed over and nothing was heard of any but that its time is over."""
        self._stuck_s = max(STUCK_S, 2.0 * timeout_s)
        threading.Thread(target=self._hear, name="kafka reports", daemon=True).start()

    def produce(
        self,
        sending: _Sending,
        place: int,
        topic: str,
        partition: int,
        packet: Packet,
        headers: Headers,
    ) -> None:
        """Hands a packet to the producer, which sends it by itself. Raises BufferError when its queue is full, and
        KafkaException when it does not take the packet."""
        self._producer.produce(
            topic,
            packet.body,
            packet.key.encode() if packet.key else None,
            partition,
            on_delivery=partial(self._report, sending, place),
            headers=headers,
        )
        if self._silent_since is None:
            self._silent_since = time.monotonic()

    async def room(self, deadline: float) -> bool:
        """Waits until reports came in; False when the deadline (of the loop's clock) is over first."""
        self._room.clear()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._room.wait()
        except TimeoutError:
            return False

    async def learn(self, topic: str, deadline: float) -> None:
        """Has the producer ask again which partitions a topic has."""
        left_s = max(0.1, deadline - self._loop.time())
        with suppress(KafkaException):
            await asyncio.to_thread(self._producer.list_topics, topic, left_s)

    async def close(self, grace_s: float) -> None:
        """What is still on its way after that is unknown."""
        # First, since the thread reads it as soon as it sees the other.
        self._grace_s = grace_s
        self._is_closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s + CLOSE_S):
                await self._ended.wait()

    def _make(self) -> Producer:
        return Producer({**self._settings, "error_cb": self._erred})

    def _hear(self) -> None:
        with suppress(KafkaException):
            # A connection, so that its number comes with the first try; there is one per half second.
            self._producer.cluster_id(1.0)
        try:
            while not self._is_closing:
                self._poll(0.25)
                self._hand_over()
                if self._is_broken or self._is_stuck():
                    self._replace()
            self._end(self._producer, self._grace_s)
            self._hand_over()
        finally:
            _tell(self._loop, self._ended.set)

    def _is_stuck(self) -> bool:
        """A producer may lose its place without a word while its broker starts again, and then sends nothing more although
        the broker is there. One that only waits for a broker loses nothing by being replaced."""
        since = self._silent_since
        if since is None or time.monotonic() - since < self._stuck_s:
            return False
        log.info("kafka.producer_replaced", reason=f"it said nothing for {self._stuck_s:g} s")
        return True

    def _poll(self, timeout_s: float) -> None:
        try:
            self._producer.poll(timeout_s)
        except KafkaException as error:
            # It cannot go on, and says so each time.
            self._is_broken = True
            self._troubles.tell("kafka.producer_broken", error.args[0])

    def _end(self, producer: Producer, grace_s: float) -> None:
        """Whatever it has not delivered by then is reported as purged."""
        for step in (partial(producer.flush, grace_s), producer.purge, partial(producer.flush, 1.0)):
            with suppress(KafkaException):
                step()

    def _report(self, sending: _Sending, place: int, error: KafkaError | None, message: Message) -> None:
        self._burst.append((sending, place, error))

    def _hand_over(self) -> None:
        if self._burst:
            burst, self._burst = self._burst, []
            _tell(self._loop, self._resolve, burst)

    def _resolve(self, burst: list[tuple[_Sending, int, KafkaError | None]]) -> None:
        for sending, place, error in burst:
            receipt = _CONFIRMED if error is None else _receipt(error)
            if not isinstance(receipt, Unknown):
                self._silent_since = None
            if sending.left > 0:
                sending.receipt(place, receipt)
        self._room.set()

    def _erred(self, error: KafkaError) -> None:
        if error.fatal():
            self._is_broken = True
        self._troubles.tell("kafka.producer_erred", error)

    def _replace(self) -> None:
        """A producer that lost its place for good sends nothing more; what it had is unknown, the next one takes over."""
        self._end(self._producer, 0.0)
        self._hand_over()
        # One that has no right to send is broken at once, time after time.
        time.sleep(PAUSE_S)
        self._is_broken = False
        self._silent_since = None
        self._producer = self._make()


_CONFIRMED = Confirmed()
_GONE = Failed("there is no such topic", is_retryable=False)
"""As far as the producer knows, which learns late of a topic that was made, or made again."""
_NO_RIGHT = Failed("we have no right to write to the topic", is_retryable=True)
"""Somebody can give it to us, where the topic is ours."""


def _receipt(error: KafkaError) -> Receipt:
    """What a failed report means. A packet that was given up may have arrived before."""
    code = error.code()
    if code in _NO_TOPIC:
        return _GONE
    if code == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return _NO_RIGHT
    if code in _TOO_LARGE:
        return Failed(error.str(), is_retryable=False)
    if code in _NOT_TAKEN:
        return Failed(error.str(), is_retryable=True)
    return Unknown(error.str())


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """To the loop's thread; when the loop is gone nobody listens any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


class _Names:
    """What headers are called on the other side; most packets have the same few."""

    def __init__(self, translate: Callable[[str], str]) -> None:
        self._translate = translate
        self.known: dict[str, str] = {}

    def of(self, name: str) -> str:
        translated = self.known.get(name)
        if translated is None:
            translated = self._translate(name)
            # Others may give a header any name, of any length, so they are not all remembered.
            if len(self.known) < NAMES_MAX and len(name) <= NAME_CHARACTERS_MAX:
                self.known[name] = translated
        return translated


def _headers_out(packet: Packet) -> Headers:
    """Source: CloudEvents 1.0.2, Kafka protocol binding, 3.2 "Binary content mode": `ce_` and the attribute's name."""
    try:
        headers = {_KNOWN_OUT[name]: value for name, value in packet.headers.items()}
    except KeyError:
        headers = {_NAMES_OUT.of(name): value for name, value in packet.headers.items()}
    # Kafka has a place for it.
    headers.pop(KEY, None)
    if packet.id and ID not in headers and headers.get("ce_id") != packet.id:
        headers[ID] = packet.id
    said = "".join(headers.values())
    if not said.isascii() or "\0" in said:
        # Of a text the client sends what is before its first zero byte, and it takes none with half of a character.
        return {name: value.encode(errors="replace") for name, value in headers.items()}
    return headers


def _name_out(name: str) -> str:
    # Given half of a character in a name, the client ends the whole process.
    name = name.encode(errors="replace").decode()
    return "ce_" + name[3:] if name.startswith("ce-") else _TO_KAFKA.get(name, name)


_NAMES_OUT = _Names(_name_out)
_KNOWN_OUT = _NAMES_OUT.known


# Receiving


class _Held:
    """One partition in our hands, from its assignment until it is revoked or rewound: an epoch."""

    __slots__ = ("asked", "committed", "epoch", "handed", "is_held", "next", "partition", "settled", "upto")

    def __init__(self, partition: int, epoch: int) -> None:
        self.partition = partition
        self.epoch = epoch
        self.is_held = True
        self.handed: deque[int] = deque()
        """Offsets that came and are not settled, or wait for one before them."""
        self.settled: set[int] = set()
        """Those of them that are settled."""
        self.upto = -1
        """Everything before is settled."""
        self.asked = -1
        """What the broker was told of that."""
        self.committed = -1
        """What it has answered for."""
        self.next = -1
        """The offset behind the last packet that came, or that was settled before; -1: nobody knows."""

    def settle(self, offset: int) -> None:
        if offset < self.upto:
            return
        if self.handed and self.handed[0] == offset:
            self.handed.popleft()
            self.upto = offset + 1
        else:
            self.settled.add(offset)
        while self.settled and self.handed and self.handed[0] in self.settled:
            first = self.handed.popleft()
            self.settled.discard(first)
            self.upto = first + 1


_Mark = tuple[_Held, int]
"""An arrival's token: where it belongs, and its offset."""


class _SessionOver(Exception):
    """The consumer cannot go on and is made anew."""


class KafkaStream:
    """One consumer of a group, in a thread of its own, which alone polls it.

    The thread fetches while somebody asks. Else it only looks after its place in the group; what comes by that is bounded,
    then the partitions are paused. Only one thread may use the client at a time, and a call of another one waits for as long as
    this one polls; so this one commits too, without waiting for the answer. That of a commit in the background is read behind all
    that was fetched ahead of it.
    """

    def __init__(
        self, transport: "KafkaTransport", topic: str, topic_id: str | None, group: str, instance: str | None
    ) -> None:
        self._transport = transport
        self.topic = topic
        self._topic_id = topic_id
        """Which topic of that name it is: one that is deleted and made again has another id, and other offsets. Kafka's own
        client does not notice; it would go on where it was, and leave out what is before that. None: there is none."""
        self._group = group
        self._instance = instance
        self._loop = asyncio.get_running_loop()
        self._orders = threading.Condition()
        """Guards all below, in both threads; held for microseconds."""
        self._held: dict[int, _Held] = {}
        self._epochs = count(1)
        self._buffer: deque[Arrival] = deque()
        self._credit = 0
        """As much as the last one who received asked for: what may lie in the buffer."""
        self._commit_at = self._look_at = 0.0
        """When it is committed next, and looked after the place in the group though nobody asks; by the monotonic clock."""
        self._rewinds: list[asyncio.Future[None]] = []
        self._is_closing = False
        self._trouble: str | None = None
        """Why nothing comes, for the next one who receives."""
        self._news = asyncio.Event()
        self._joined = asyncio.Event()
        self._ended = asyncio.Event()
        self._troubles = _Troubles()
        self._revoked: set[int] = set()
        """Partitions that were taken away during the call that is under way."""
        self._crash: Exception | None = None
        """What went wrong in a callback of the call that is under way."""
        self._is_paused = self._has_joined = False
        self._paused: set[int] = set()
        """Partitions that the client has paused, also such as went away since."""
        self._unread: set[int] = set()
        """Partitions of which neither a packet nor the end has come yet."""
        self._session_topic: str | None = None
        self._leaps: list[tuple[int, int, int]] = []
        """Where a packet came that was not the next one: of which partition, which one would have been, and which came."""
        self._leaps_at = 0.0
        """When it is looked into those next."""
        threading.Thread(target=self._run, name=f"kafka {topic}", daemon=True).start()

    # For the loop's thread

    async def joined(self, timeout_s: float) -> None:
        """Waits until the consumer has its lanes and reads them, if that is soon: urgent packets come first from the start."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._joined.wait()

    async def receive(self, limit: int, wait_s: float) -> list[Arrival]:
        deadline = self._loop.time() + wait_s
        while not self._is_closing:
            self._news.clear()
            if found := self._take(limit):
                return found
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                return self._take(limit)
        raise BrokerUnreachable("This consumer was closed.", broker="kafka", topic=self.topic, group=self._group)

    def held(self, arrivals: Collection[Arrival]) -> list[bool]:
        return [held.is_held for held, _ in _marks(arrivals)]

    async def settle(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """True: its offset is committed soon, behind those before it. A commit that fails is made again as long as the session
        lasts; if it never comes about, so does the packet again."""
        marks = _marks(arrivals)
        with self._orders:
            for held, offset in marks:
                if held.is_held:
                    held.settle(offset)
            return [held.is_held for held, _ in marks]

    async def restart(self) -> None:
        rewound: asyncio.Future[None] = self._loop.create_future()
        with self._orders:
            for held in self._held.values():
                held.is_held = False
            self._buffer.clear()
            self._rewinds.append(rewound)
            self._orders.notify()
        if not self._ended.is_set():
            await asyncio.shield(rewound)

    def see(self, topic_id: str | None) -> None:
        """Which topic of that name is there now."""
        with self._orders:
            if topic_id != self._topic_id:
                self._topic_id = topic_id
                for held in self._held.values():
                    held.is_held = False
                self._buffer.clear()
                self._orders.notify()

    async def close(self) -> None:
        with self._orders:
            self._is_closing = True
            self._orders.notify()
        self._news.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._ended.wait()
        with self._orders:
            self._fence()
        self._transport.forget(self)

    def _take(self, limit: int) -> list[Arrival]:
        """What is there, and an order for more. Raises BrokerUnreachable when nothing comes for a reason."""
        with self._orders:
            if len(self._buffer) <= limit:
                found = list(self._buffer)
                self._buffer.clear()
            else:
                found = [self._buffer.popleft() for _ in range(limit)]
            self._credit = limit
            self._orders.notify()
            trouble, self._trouble = self._trouble, None
        if trouble is not None and not found:
            raise BrokerUnreachable(f"Kafka: {trouble}", topic=self.topic, group=self._group)
        return found

    # For either thread, under the lock

    def _offsets(self, held: Iterable[_Held]) -> list[TopicPartition]:
        return [TopicPartition(self.topic, one.partition, one.upto, self._session_topic) for one in held]

    def _fence(self) -> None:
        for held in self._held.values():
            held.is_held = False
        self._held.clear()
        self._buffer.clear()
        rewinds, self._rewinds = self._rewinds, []
        _tell(self._loop, _finish_all, rewinds)

    # For the consumer's thread

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._session()
            except Exception as error:
                # Whatever it is, the thread goes on: without it nobody would receive here any more, and nothing would say so.
                self._fail(str(error) or type(error).__name__)
                is_known = isinstance(error, (KafkaException, RuntimeError, _SessionOver))
                log.warning(
                    "kafka.session_over", topic=self.topic, group=self._group, error=str(error), exc_info=not is_known
                )
                with self._orders:
                    # Who waits to begin again has what he wants when there is no session.
                    self._fence()
                    self._orders.wait_for(lambda: self._is_closing, PAUSE_S)
        _tell(self._loop, self._ended.set)
        _tell(self._loop, self._news.set)

    def _session(self) -> None:
        """One consumer's life, with one topic."""
        with self._orders:
            self._session_topic = self._topic_id
        if self._session_topic is None:
            raise _SessionOver("there is no such topic")
        protocol = self._transport.protocol
        settings = _consumer_settings(
            self._transport.settings, group_id(self.topic, self._group), protocol, self._instance
        )
        consumer = Consumer({**settings, "error_cb": self._erred, "on_commit": self._committed})
        self._crash = None
        self._is_paused = self._has_joined = False
        self._paused.clear()
        self._unread.clear()
        self._leaps.clear()
        try:
            consumer.subscribe(
                [self.topic], on_assign=self._kept(self._assigned), on_revoke=self._kept(self._taken),
                on_lost=self._kept(self._lost),
            )  # fmt: skip
            while not self._is_closing:
                self._step(consumer)
                if self._topic_id != self._session_topic:
                    raise _SessionOver("the topic was deleted")
            self._commit_now(consumer, self._let_go(list(self._held)))
        finally:
            with self._orders:
                # Whatever was not settled comes again by itself, in the next session or elsewhere.
                self._fence()
            consumer.close()

    def _step(self, consumer: Consumer) -> None:
        """One round. Nothing wakes a thread that waits inside the client, so it waits there only for packets, and not long."""
        wanted, is_busy = self._await_orders()
        if self._rewinds:
            self._rewind(consumer)
        now = time.monotonic()
        if is_busy and now >= self._commit_at:
            self._commit(consumer)
        if not wanted and self._has_joined and now < self._look_at:
            return
        self._look_at = now + IDLE_S
        self._revoked.clear()
        if wanted > 0:
            if self._is_paused:
                self._resume(consumer, consumer.assignment())
        elif not self._is_paused and len(self._buffer) >= AHEAD_MAX + self._credit:
            self._pause(consumer, consumer.assignment())
        wait_s = BUSY_S if is_busy else POLL_S
        first = consumer.poll(wait_s if wanted else 0)
        found = [] if first is None else [first]
        if first is not None and wanted > 1:
            # It waits until it has as many as it may bring, so it may only bring what is there.
            found += consumer.consume(wanted - 1, 0)
        if self._crash is not None:
            raise self._crash
        if found:
            self._bring(found)
        if self._leaps and now >= self._leaps_at:
            self._look_into_leaps(consumer)

    def _await_orders(self) -> tuple[int, bool]:
        """Waits a while for somebody who wants packets or something else. How many packets are wanted, and whether there may be
        something to commit soon."""
        with self._orders:
            is_busy = any(held.handed or held.upto > held.asked for held in self._held.values())
            self._orders.wait_for(self._has_orders, BUSY_S if is_busy or not self._has_joined else IDLE_S)
            return self._wanted(), is_busy

    def _has_orders(self) -> bool:
        return self._wanted() > 0 or bool(self._rewinds) or self._is_closing

    def _wanted(self) -> int:
        return max(0, self._credit - len(self._buffer))

    def _commit(self, consumer: Consumer) -> None:
        """Tells the broker of everything that was settled, and waits for nothing."""
        with self._orders:
            due = [held for held in self._held.values() if held.is_held and held.upto > held.asked]
            offsets = self._offsets(due)
            for held in due:
                held.asked = held.upto
        if offsets:
            self._commit_at = time.monotonic() + COMMIT_S
            try:
                consumer.commit(offsets=offsets, asynchronous=True)
            except KafkaException as error:
                self._committed(error.args[0], offsets)

    def _committed(self, error: KafkaError | None, answers: Sequence[TopicPartition]) -> None:
        """The answer to a commit in the background, which is read behind all that was fetched before it came."""
        refused: KafkaError | None = None
        with self._orders:
            for answer in answers:
                held = self._held.get(answer.partition)
                if held is None:
                    continue
                refusal = answer.error if error is None else error
                if refusal is None:
                    held.committed = max(held.committed, min(answer.offset, held.upto))
                else:
                    held.asked, refused = held.committed, refusal
        if refused is not None:
            self._commit_at = time.monotonic() + COMMIT_AGAIN_S
            log.info("kafka.not_committed", topic=self.topic, group=self._group, error=str(refused))

    def _bring(self, messages: list[Message]) -> None:
        """messages: none is left in it."""
        arrivals: list[Arrival] = []
        messages.reverse()
        while messages:
            # Let go of before the next one is read: each holds all its headers, and Python's collector would go through them.
            message = messages.pop()
            partition, offset = message.partition(), message.offset()
            held = None if partition is None else self._held.get(partition)
            if (error := message.error()) is not None:
                if held is not None and offset is not None and error.code() == KafkaError._PARTITION_EOF:
                    self._leap(held, offset)
                self._judge(error, partition)
                continue
            if held is None or offset is None:
                continue
            if self._revoked and partition in self._revoked:
                # It went and came back within one call: nobody can tell of which time this packet is.
                raise _SessionOver("lanes moved twice at once")
            if offset != held.next:
                if offset < held.upto:
                    # Else it would wait for ever behind those that were settled under the same offsets.
                    raise _SessionOver("the log was cut back: what is there comes again")
                self._leap(held, offset)
            held.next = offset + 1
            held.handed.append(offset)
            arrivals.append(_arrival(message, held, offset))
        if arrivals:
            with self._orders:
                self._buffer.extend(arrivals)
            _tell(self._loop, self._news.set)
            if not self._has_joined:
                self._begun()

    def _leap(self, held: _Held, offset: int) -> None:
        """A packet or the end came at this offset."""
        if offset > held.next >= 0:
            self._leaps.append((held.partition, held.next, offset))
            held.next = offset

    def _look_into_leaps(self, consumer: Consumer) -> None:
        """What is before the beginning of a partition now was deleted: by somebody, or as it was too old. Other gaps are what
        transactions leave."""
        self._leaps_at = time.monotonic() + LEAPS_S
        leaps, self._leaps = self._leaps, []
        vanished = 0
        for partition in {partition for partition, *_ in leaps}:
            of_partition = [leap for leap in leaps if leap[0] == partition]
            try:
                answer = consumer.get_watermark_offsets(TopicPartition(self.topic, partition), LEAPS_S)
            except KafkaException as error:
                log.info("kafka.leap_unknown", topic=self.topic, partition=partition, error=str(error))
                answer = None
            if answer is None:
                self._leaps += of_partition
                continue
            vanished += sum([max(0, min(came, answer[0]) - wanted) for _, wanted, came in of_partition])
        if vanished:
            _tell(self._loop, self._transport.say_vanished, self.topic, self._group, vanished)

    def _begun(self) -> None:
        """Packets come, or it is known that there are none."""
        self._has_joined = True
        _tell(self._loop, self._joined.set)

    def _judge(self, error: KafkaError, partition: int | None) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            self._unread.discard(partition)
            if not self._unread and not self._has_joined:
                self._begun()
            return
        if code in _OLD_SERVER and self._transport.protocol == "consumer":
            log.warning("kafka.classic_groups", reason=error.str())
            self._transport.protocol = "classic"
            raise _SessionOver(error.str())
        if error.fatal() or code in _NO_TOPIC or code == KafkaError._MAX_POLL_EXCEEDED:
            raise _SessionOver(error.str())
        if not error.retriable():
            self._fail(error.str())

    def _fail(self, reason: str) -> None:
        with self._orders:
            self._trouble = reason
        _tell(self._loop, self._news.set)

    def _erred(self, error: KafkaError) -> None:
        self._troubles.tell("kafka.consumer_erred", error, topic=self.topic, group=self._group)

    def _kept(self, callback: _Rebalance) -> _Rebalance:
        """The client makes of its own exception, raised in a callback, one that no `except` can catch; so it is raised behind the
        call in which the callback ran."""

        def call(consumer: Consumer, partitions: list[TopicPartition]) -> None:
            try:
                callback(consumer, partitions)
            except Exception as error:
                # Not swallowed: `_step` raises it, out of the client's reach.
                self._crash = error

        return call

    def _assigned(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        with self._orders:
            for one in partitions:
                self._held[one.partition] = _Held(one.partition, next(self._epochs))
        consumer.incremental_assign(self._beginnings(consumer, partitions))
        if self._is_paused:
            self._pause(consumer, partitions)
        else:
            # The client remembers them as paused when they went so.
            self._resume(consumer, [one for one in partitions if one.partition in self._paused])
        self._unread.update(one.partition for one in partitions)
        if not self._unread and not self._has_joined:
            self._begun()

    def _pause(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._is_paused = True
        self._paused.update(one.partition for one in partitions)
        consumer.pause(list(partitions))

    def _resume(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._is_paused = False
        self._paused.difference_update(one.partition for one in partitions)
        if partitions:
            consumer.resume(list(partitions))

    def _beginnings(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> list[TopicPartition]:
        """Where to go on: at what is committed, unless that was of a topic that is gone. Where nothing is, the beginning is
        committed soon, before anything is settled: a group that has a place is no new one."""
        if not partitions:
            return []
        beginnings: list[TopicPartition] = []
        for one in consumer.committed(list(partitions), ADMIN_S):
            is_old = one.offset >= 0 and one.metadata and one.metadata != self._session_topic
            if one.error is None and (is_old or one.offset < 0):
                self._held[one.partition].upto = 0
            beginning = TopicPartition(self.topic, one.partition)
            if is_old:
                beginning.offset = OFFSET_BEGINNING
            elif one.error is None and one.offset >= 0:
                self._held[one.partition].next = one.offset
            beginnings.append(beginning)
        return beginnings

    def _let_go(self, partitions: Iterable[int]) -> list[TopicPartition]:
        """Nothing of these partitions is settled any more from now on; what is left to commit of them."""
        with self._orders:
            gone = [held for one in partitions if (held := self._held.pop(one, None)) is not None]
            due = self._offsets(held for held in gone if held.is_held and held.upto > held.committed)
            for held in gone:
                held.is_held = False
            self._buffer = deque(compress(self._buffer, self.held(self._buffer)))
        return due

    def _commit_now(self, consumer: Consumer, offsets: list[TopicPartition]) -> None:
        """Waits for the answer, behind all commits that were made in the background. What the broker does not take comes
        again."""
        if not offsets:
            return
        try:
            consumer.commit(offsets=offsets, asynchronous=False)
        except (KafkaException, RuntimeError) as error:
            log.info("kafka.not_committed", topic=self.topic, group=self._group, error=str(error))

    def _taken(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        """What is settled is committed while it still counts; the rest comes again where the lanes go."""
        self._commit_now(consumer, self._let_go(one.partition for one in partitions))
        self._gone(consumer, partitions)

    def _lost(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._let_go(one.partition for one in partitions)
        self._gone(consumer, partitions)

    def _gone(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._revoked.update(one.partition for one in partitions)
        consumer.incremental_unassign(list(partitions))

    def _rewind(self, consumer: Consumer) -> None:
        """Each partition goes back to its first packet that is not settled, as a new epoch."""
        if self._is_paused:
            self._resume(consumer, consumer.assignment())
        with self._orders:
            old = list(self._held.values())
            for one in old:
                self._held[one.partition] = fresh = _Held(one.partition, next(self._epochs))
                one.is_held = False
                fresh.upto, fresh.asked, fresh.committed = one.upto, one.asked, one.committed
                fresh.next = one.handed[0] if one.handed else one.next
            self._buffer.clear()
        for one in old:
            if one.handed:
                consumer.seek(TopicPartition(self.topic, one.partition, one.handed[0]))
        with self._orders:
            rewinds, self._rewinds = self._rewinds, []
        _tell(self._loop, _finish_all, rewinds)


def _finish_all(futures: "list[asyncio.Future[None]]") -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _marks(arrivals: Collection[Arrival]) -> list[_Mark]:
    marks: list[_Mark] = [arrival.token for arrival in arrivals if isinstance(arrival.token, tuple)]
    if len(marks) < len(arrivals):
        raise InvariantBroken("A packet of another transport was settled here.")
    return marks


def _arrival(message: Message, held: _Held, offset: int) -> Arrival:
    try:
        headers = _headers_in(_read_headers(message))
    except (UnicodeDecodeError, SystemError):
        # A header's name is no text, and the client tells none of them then. Another session would bring the same packet again,
        # and its lane would stand still for ever.
        log.warning("kafka.headers_unreadable", topic=message.topic(), partition=message.partition(), offset=offset)
        headers = {}
    id = headers.get(ID) or headers.get("ce-id", "")
    raw = message.key()
    try:
        key = raw.decode() if raw else ""
    except (UnicodeDecodeError, AttributeError):
        key = _text(raw)
    kind, milliseconds = message.timestamp()
    sent_at = None if kind == TIMESTAMP_NOT_AVAILABLE else _moment(milliseconds)
    return Arrival(Packet(id, key, message.value() or b"", headers), None, sent_at, (held, offset), held.epoch)


_read_headers = methodcaller("headers")
"""Calls it once, and never directly. With a name that is no text the client (2.16) returns a broken list and an error at once; from
code that has run often, Python looks for no error behind a result: it would surface anywhere, or the list end the process."""


@lru_cache(maxsize=1024)
def _moment(milliseconds: int) -> datetime | None:
    """Many packets have one time between them. None: somebody gave one that is in no calendar."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _headers_in(pairs: Any) -> dict[str, str]:
    """The last one of a name counts."""
    if not pairs:
        return {}
    try:
        return {_KNOWN_IN[name]: value.decode() for name, value in pairs}
    except (KeyError, UnicodeDecodeError, AttributeError):
        return {_NAMES_IN.of(name): _text(value) for name, value in pairs}


def _name_in(name: str) -> str:
    if name.startswith("ce_"):
        return "ce-" + name[3:]
    return _FROM_KAFKA.get(name, name.replace("\0", "\ufffd"))


_NAMES_IN = _Names(_name_in)
_KNOWN_IN = _NAMES_IN.known


def _text(value: str | bytes | None) -> str:
    """Others may send any bytes; what is no text is shown as such."""
    if value is None:
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


class _Asker:
    """Asks about a group, and commits for it while it has no members; no member itself.

    An admin client could do that, but must not: with librdkafka 2.16 it takes the process along when the group's coordinator
    has just moved or still loads (its answer is handled as if it were a consumer's), and is never answered again after that
    coordinator's connection was lost."""

    def __init__(self, settings: KafkaSettings, topic: str, group: str) -> None:
        self._topic = topic
        self._consumer = Consumer({**settings.client, "group.id": group_id(topic, group), "enable.auto.commit": False})
        self._alone = threading.Lock()

    def committed(self, partitions: int, topic_id: str) -> "_Places":
        """Blocks. Raises KafkaException."""
        asked = [TopicPartition(self._topic, one) for one in range(partitions)]
        with self._alone:
            # What it has to say of its connections would pile up.
            self._consumer.poll(0)
            answers = self._consumer.committed(asked, ADMIN_S)
        for answer in answers:
            if answer.error is not None and answer.error.code() not in _NO_TOPIC:
                raise KafkaException(answer.error)
        placed = [answer for answer in answers if answer.offset >= 0]
        ours = {answer.partition: answer.offset for answer in placed if answer.metadata in (None, "", topic_id)}
        return _Places(ours, is_of_old=len(ours) < len(placed))

    def commit(self, offsets: list[TopicPartition]) -> None:
        """Blocks. Raises KafkaException."""
        with self._alone:
            try:
                answers = self._consumer.commit(offsets=offsets, asynchronous=False)
            except KafkaException as error:
                # Somebody receives already: for him everything is there that nothing is committed of.
                if error.args[0].code() in _HAS_MEMBERS:
                    return
                raise
        for answer in answers:
            if answer.error is not None and answer.error.code() not in _HAS_MEMBERS:
                raise KafkaException(answer.error)

    def close(self) -> None:
        """Blocks for a moment."""
        with self._alone:
            self._consumer.close()


# The whole


class KafkaTransport:
    """A Kafka cluster."""

    name = "kafka"
    traits = TRAITS

    def __init__(self, settings: KafkaSettings, *, meters: Meters | None = None) -> None:
        """meters: where what vanished is counted."""
        self.settings = settings
        self.meters = meters or Meters()
        self.protocol = "classic" if settings.protocol == "auto" else settings.protocol
        """How groups share out, as the server can."""
        self._admin: AdminClient | None = None
        self._asked: set[asyncio.Future[Any]] = set()
        """Questions without an answer yet."""
        self._outlets: dict[tuple[int, int], _Outlet] = {}
        """By how long they hold a packet, and how long they wait for more."""
        self._askers: dict[tuple[str, str], _Asker] = {}
        self._partitions: dict[str, int] = {}
        """Of topics that were there when they were last looked for, with their groups."""
        self._made: dict[str, _Made] = {}
        """What this process provisioned, and may make again."""
        self._missing: set[str] = set()
        """Those of them that somebody deleted, until they are there again with their groups."""
        self._making: dict[str, asyncio.Task[_Seen]] = {}
        self._complaints: dict[str, str] = {}
        """By topic: why it is not made again, as the log has it already."""
        self._turns = count()
        self._instances: dict[tuple[str, str], Iterator[int]] = {}
        self._streams: WeakSet[KafkaStream] = WeakSet()
        self._refused: str | None = None
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        try:
            self._admin = self._make_admin()
        except KafkaException as error:
            raise SettingInvalid(f"{self.settings.url}: {error.args[0].str()}", broker="kafka") from error
        nodes = await self._greet()
        # A producer needs half a second for its number; the first one who sends should not have to wait for it.
        for packets in (1, FEW_MAX + 1):
            self._outlet(DEADLINE_S, packets)
        if self.settings.protocol == "auto":
            self.protocol = "consumer" if await self._is_quick(nodes[0].id) else "classic"
        self._watching = asyncio.create_task(self._watch(), name="kafka topics")

    async def close(self) -> None:
        if self._watching is not None:
            await end_tasks(self._watching)
        await end_tasks(*self._making.values())
        await asyncio.gather(*(stream.close() for stream in list(self._streams)))
        await asyncio.gather(*(outlet.close(1.0) for outlet in self._outlets.values()))
        self._outlets.clear()
        await asyncio.gather(*(asyncio.to_thread(asker.close) for asker in self._askers.values()))
        self._askers.clear()
        await self._let_go_of_admin()

    async def _let_go_of_admin(self) -> None:
        """A client that is let go of with a question open, or while its thread is still handing over the answer, takes the
        process along."""
        if self._asked:
            await asyncio.wait(list(self._asked), timeout=2 * ADMIN_S)
        await asyncio.sleep(FAREWELL_S)
        self._admin = None

    def say_vanished(self, topic: str, group: str, packets: int) -> None:
        """So many were deleted before the group had them."""
        self.meters.passage(topic, group).vanished += packets
        log.warning(
            "kafka.packets_vanished", topic=topic, group=group, packets=packets,
            reason="they were deleted before this group had them: by somebody, or as the topic's retention.ms was over",
            remedy=how_to_have_again(topic, "TIME"),
        )  # fmt: skip

    def forget(self, stream: KafkaStream) -> None:
        """It was closed."""
        self._streams.discard(stream)

    async def _greet(self) -> list[Any]:
        """The cluster's nodes. A wrong password or authority is told by the callback alone; the question runs out of time."""
        self._refused = None
        admin = self._the_admin()
        for _ in range(GREETINGS_MAX):
            asked = asyncio.ensure_future(self._answer(admin.describe_cluster(request_timeout=GREETING_S)))
            while not asked.done():
                await asyncio.to_thread(admin.poll, 0.05)
            if self._refused is not None:
                raise SettingInvalid(f"{self.settings.url}: the broker refuses us: {self._refused}", broker="kafka")
            if not isinstance(error := asked.exception(), BrokerUnreachable):
                break
        if isinstance(error, BrokerUnreachable):
            raise error
        return list(asked.result().nodes)

    # Topics and groups

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool) -> list[tuple[str, str]]:
        said: list[tuple[str, str]] = []
        for topic in topics:
            seen = await self._look(topic.name)
            if seen is not None and topic.keyed and seen.partitions != topic.lanes:
                raise QueueMismatch(
                    f"Kafka's topic {topic.name} has {seen.partitions} partitions, and is declared with {topic.lanes} lanes: "
                    f"declare it with {seen.partitions}, or let it run empty, delete it and provision again.",
                    topic=topic.name,
                )  # fmt: skip
            is_again = topic.name in self._missing
            is_new = seen is None or is_again
            if seen is None:
                _require_name(topic.name)
                if not topic.groups:
                    said.append((topic.name, ""))
                if verify_only:
                    said += [(topic.name, group) for group in topic.groups]
                    continue
                seen = await self._create(topic)
            for group in topic.groups:
                if await self._begin(topic.name, seen, group, is_new=is_new, verify_only=verify_only):
                    said.append((topic.name, group))
            if not verify_only:
                if is_again:
                    await self._mark(topic.name, seen)
                await self._remember(topic, seen)
        return said

    async def depth(self, topic: Topic, group: str) -> int | None:
        """Offsets between what is committed and the end: a transaction of somebody else's counts its marks too."""
        seen = await self._require(topic.name, group)
        partitions = seen.partitions
        ends, begins, committed = await asyncio.gather(
            self._patiently(partial(self._offsets, topic.name, partitions, _LATEST)),
            self._patiently(partial(self._offsets, topic.name, partitions, _EARLIEST)),
            self._patiently(partial(self._committed, topic.name, group, seen)),
        )
        places = committed.offsets
        return sum(max(0, ends[one] - max(places.get(one, 0), begins[one])) for one in range(partitions))

    async def subscribe(self, topic: Topic, group: str) -> KafkaStream:
        """The group itself is in Kassa's tables: Kafka makes one of any name, and forgets one that is not used."""
        seen = await self._find(topic.name)
        if seen is None:
            raise QueueNotFound(topic=topic.name, group=group)
        instance: str | None = None
        if self.settings.instance is not None:
            number = next(self._instances.setdefault((topic.name, group), count(1)))
            instance = f"{self.settings.instance}-{number}"
        stream = KafkaStream(self, topic.name, seen.id, group, instance)
        self._streams.add(stream)
        try:
            await stream.joined(JOIN_S)
        except BaseException:
            # Raised again. Nobody has this stream when it is cancelled, and its thread would keep its lanes for ever.
            await asyncio.shield(stream.close())
            raise
        return stream

    async def _begin(self, topic: str, seen: "_Seen", group: str, *, is_new: bool, verify_only: bool) -> bool:
        """Whether a group is new; it then gets what is sent from now on. The first groups of a new topic get all of it: somebody
        may send as soon as the topic is there."""
        partitions = seen.partitions
        # The ends first: whatever is sent after somebody else has made the group is behind what is read here.
        ends = await self._patiently(partial(self._offsets, topic, partitions, _EARLIEST if is_new else _LATEST))
        committed = await self._patiently(partial(self._committed, topic, group, seen))
        if committed.offsets:
            return False
        if not verify_only:
            if not is_new and (committed.is_of_old or await self._was_made_again(topic, seen)):
                ends = await self._patiently(partial(self._offsets, topic, partitions, _EARLIEST))
            await self._put(topic, seen, group, ends)
        return True

    async def _put(self, topic: str, seen: "_Seen", group: str, ends: Mapping[int, int]) -> None:
        offsets = [TopicPartition(topic, one, end, seen.id) for one, end in ends.items()]
        await self._patiently(partial(self._ask_group, topic, group, partial(_Asker.commit, offsets=offsets)))

    async def _was_made_again(self, topic: str, seen: "_Seen") -> bool:
        try:
            return bool((await self._patiently(partial(self._committed, topic, AGAIN, seen))).offsets)
        except (SettingInvalid, BrokerUnreachable):
            # Somebody may look at his own groups alone: whose group that is, the client asks until its time is over.
            return False

    async def _create(self, topic: Topic) -> "_Seen":
        admin = self._the_admin()
        nodes = len((await self._answer(admin.describe_cluster(request_timeout=ADMIN_S))).nodes)
        made = self._made.get(topic.name)
        # As many as it had, also while a broker is away.
        replication = made.seen.replication if made else self.settings.replication or (3 if nodes >= 3 else 1)
        min_isr = self.settings.min_isr or max(1, replication - 1)
        config = {"min.insync.replicas": str(min_isr), **(made.config if made else {})}
        new = NewTopic(topic.name, topic.lanes, replication, config=config)
        if replication > nodes:
            raise SettingInvalid(
                f"{self.settings.url}: {replication} replicas are asked for, and there are {nodes} brokers.",
                broker="kafka",
            )
        try:
            await self._patiently(lambda: self._answer(_only(admin.create_topics([new], request_timeout=ADMIN_S))))
        except _AlreadyThere:
            log.debug("kafka.created_by_another", topic=topic.name)
        return await self._patiently(partial(self._show, topic.name))

    async def _remember(self, topic: Topic, seen: "_Seen") -> None:
        """It is there with its groups, and may be made again as it is."""
        known = self._made.get(topic.name)
        groups = (*known.topic.groups, *topic.groups) if known else topic.groups
        topic = topic._replace(groups=tuple(dict.fromkeys(groups)), lanes=seen.partitions)
        self._is_whole(_Made(topic, seen, await self._config(topic.name)))

    def _is_whole(self, made: "_Made") -> None:
        topic, seen = made.topic.name, made.seen
        self._made[topic] = made
        self._missing.discard(topic)
        self._complaints.pop(topic, None)
        self._partitions[topic] = seen.partitions
        for stream in list(self._streams):
            if stream.topic == topic:
                stream.see(seen.id)

    async def _config(self, topic: str) -> dict[str, str]:
        """What was set for this topic alone; nothing where we may not see it."""
        asked = ConfigResource(ResourceType.TOPIC, topic)
        admin = self._the_admin()
        try:
            found = await self._answer(_only(admin.describe_configs([asked], request_timeout=ADMIN_S)))
        except (KassaError, _NotThere):
            return {}
        return {
            name: entry.value
            for name, entry in found.items()
            if entry.source == ConfigSource.DYNAMIC_TOPIC_CONFIG.value and entry.value is not None
        }

    async def _find(self, topic: str) -> "_Seen | None":
        """A topic as it is now, made again when somebody deleted one of ours. Raises BrokerUnreachable, SettingInvalid."""
        seen = await self._look(topic)
        if topic not in self._missing:
            return seen
        making = self._make_again(topic)
        # Who waits here may be in a hurry, or be cancelled: the others wait on.
        await asyncio.wait([making])
        if making.cancelled():
            raise BrokerUnreachable("The binder is closed.", broker="kafka", topic=topic)
        return making.result()

    def _make_again(self, topic: str) -> "asyncio.Task[_Seen]":
        """However many ask for it, one makes it."""
        making = self._making.get(topic)
        if making is None:
            making = asyncio.create_task(self._make_whole(topic), name=f"kafka makes {topic} again")
            self._making[topic] = making
            making.add_done_callback(partial(self._forget_making, topic))
        return making

    def _forget_making(self, topic: str, making: "asyncio.Task[_Seen]") -> None:
        del self._making[topic]
        if not making.cancelled():
            # Perhaps nobody waits for it.
            making.exception()

    async def _make_whole(self, topic: str) -> "_Seen":
        """The topic, then where its groups begin: at its beginning, so that they get all that comes. Nobody sends from here before
        that. A deletion that is still under way makes it fail, and it is tried again."""
        made = self._made[topic]
        try:
            seen = await self._look(topic)
            if seen is None:
                seen = await self._create(made.topic)
                log.warning("kafka.topic_made_again", topic=topic, partitions=seen.partitions)
            if seen.id != made.seen.id:
                # At once for a group that comes in this moment, and again behind whatever a slow broker throws away.
                is_marked = await self._mark(topic, seen)
                await asyncio.sleep(FORGOTTEN_S)
                for group in made.topic.groups:
                    await self._forgotten(topic, seen, group)
                if is_marked:
                    await self._mark(topic, seen)
                for group in made.topic.groups:
                    await self._begin(topic, seen, group, is_new=True, verify_only=False)
        except (KassaError, _NotThere) as error:
            reason = str(error)
            if self._complaints.get(topic) != reason:
                self._complaints[topic] = reason
                log.warning("kafka.not_made_again", topic=topic, reason=reason)
            raise BrokerUnreachable(
                f"the topic {topic} was deleted and is not there again: {reason}", broker="kafka", topic=topic
            ) from error
        self._is_whole(made._replace(seen=seen))
        return seen

    async def _forgotten(self, topic: str, seen: "_Seen", group: str) -> None:
        """Until Kafka has thrown away where a group of the old topic was: what is committed before that goes with it. Not for ever:
        a consumer elsewhere that does not know yet may have told again where it was."""
        for _ in range(TRIES_MAX):
            if not (await self._patiently(partial(self._committed, topic, group, seen))).is_of_old:
                return
            await asyncio.sleep(BETWEEN_TRIES_S)
        log.info("kafka.not_forgotten", topic=topic, group=group)

    async def _mark(self, topic: str, seen: "_Seen") -> bool:
        """For groups that only others know of. Whether it could be set: some may write for their own groups alone."""
        try:
            # Who has no right to the group is told after ten seconds when he asks, and after more than forty when he commits.
            await self._committed(topic, AGAIN, seen)
            await self._put(topic, seen, AGAIN, dict.fromkeys(range(seen.partitions), 0))
        except (SettingInvalid, BrokerUnreachable) as error:
            log.warning("kafka.not_marked", topic=topic, reason=str(error))
            return False
        return True

    async def _show(self, topic: str) -> "_Seen":
        """A topic that was made; the brokers learn of it one after the other."""
        seen = await self._look(topic)
        if seen is None:
            raise _Passing(f"{self.settings.url} does not show {topic}, which it has made.", broker="kafka")
        return seen

    async def _require(self, topic: str, group: str) -> "_Seen":
        seen = await self._look(topic)
        if seen is None:
            raise QueueNotFound(topic=topic, group=group)
        return seen

    async def _look(self, topic: str) -> "_Seen | None":
        """A topic as it is now; None when there is none. Raises BrokerUnreachable, SettingInvalid."""
        (seen,) = (await self._look_at([topic])).values()
        return seen

    async def _look_at(self, topics: Sequence[str], timeout_s: float = ADMIN_S) -> dict[str, "_Seen | None"]:
        admin = self._the_admin()
        futures = admin.describe_topics(TopicCollection(list(topics)), request_timeout=timeout_s)
        answers = await asyncio.gather(*(self._answer(future) for future in futures.values()), return_exceptions=True)
        found: dict[str, _Seen | None] = {}
        for topic, answer in zip(futures, answers, strict=True):
            if isinstance(answer, _NotThere):
                self._partitions.pop(topic, None)
                found[topic] = None
            elif isinstance(answer, BaseException):
                raise answer
            else:
                partitions = len(answer.partitions)
                replication = max((len(one.replicas) for one in answer.partitions), default=1)
                found[topic] = _Seen(str(answer.topic_id), partitions, replication)
                if topic not in self._missing:
                    self._partitions[topic] = partitions
            self._compare(topic, found[topic])
        return found

    def _compare(self, topic: str, seen: "_Seen | None") -> None:
        """Whether one of ours is still the one that it was; somebody may have made another one of its name."""
        made = self._made.get(topic)
        if made is not None and (seen is None or seen.id != made.seen.id):
            self._missing.add(topic)
            self._partitions.pop(topic, None)

    async def _watch(self) -> None:
        """Tells the consumers when their topic is gone, or another one of its name is there, and makes again what is ours."""
        while True:
            await asyncio.sleep(WATCH_S)
            streams = list(self._streams)
            if not streams:
                continue
            try:
                seen = await self._look_at(sorted({stream.topic for stream in streams}), WATCH_S)
            except KassaError as error:
                log.info("kafka.not_seen", error=str(error))
                continue
            for stream in streams:
                topic = seen[stream.topic]
                stream.see(None if topic is None else topic.id)
            for name in self._missing.intersection(seen):
                self._make_again(name)

    async def _offsets(self, topic: str, partitions: int, spec: OffsetSpec) -> dict[int, int]:
        asked = {TopicPartition(topic, one): spec for one in range(partitions)}
        admin = self._the_admin()
        futures = admin.list_offsets(asked, request_timeout=ADMIN_S)
        try:
            answers = await asyncio.gather(*(self._answer(future) for future in futures.values()))
            return {one.partition: answer.offset for one, answer in zip(futures, answers, strict=True)}
        except _NotThere as error:
            raise QueueNotFound(topic=topic) from error

    async def _committed(self, topic: str, group: str, seen: "_Seen") -> "_Places":
        question = partial(_Asker.committed, partitions=seen.partitions, topic_id=seen.id)
        return await self._ask_group(topic, group, question)

    async def _ask_group(self, topic: str, group: str, question: "Callable[[_Asker], T]") -> T:
        asker = self._askers.get((topic, group))
        if asker is None:
            asker = self._askers[topic, group] = _Asker(self.settings, topic, group)
        try:
            return await asyncio.to_thread(question, asker)
        except KafkaException as error:
            raise self._translated(error.args[0]) from error

    async def _is_quick(self, node: int) -> bool:
        """Whether the server has KIP-848's groups and was told to be as quick with them as we are."""
        asked = ConfigResource(ResourceType.BROKER, str(node))
        admin = self._the_admin()
        try:
            found = await self._answer(_only(admin.describe_configs([asked], request_timeout=ADMIN_S)))
        except KassaError:
            return False
        session, heartbeat = (
            found.get(f"group.consumer.{name}.ms") for name in ("session.timeout", "heartbeat.interval")
        )
        if session is None or heartbeat is None:
            return False
        return int(session.value) <= SESSION_S * 1000 and int(heartbeat.value) <= 2 * HEARTBEAT_S * 1000

    # Sending

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        """A topic that is there keeps packets, whether or not somebody receives them."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        partitions = self._partitions.get(topic.name) or await self._look_by(topic.name, deadline)
        if not isinstance(partitions, int):
            return [partitions] * len(packets)
        lanes = min(topic.lanes, partitions)
        receipts = await self._send(topic, lanes, packets, deadline, deadline_s)
        gone = [place for place, receipt in enumerate(receipts) if receipt is _GONE]
        if gone:
            answers = await self._send_again(topic, [packets[place] for place in gone], deadline, deadline_s)
            for place, answer in zip(gone, answers, strict=True):
                receipts[place] = answer
        return receipts

    async def _send_again(
        self, topic: Topic, packets: Sequence[Packet], deadline: float, deadline_s: float
    ) -> list[Receipt]:
        """Asks the cluster whether the topic is really not there."""
        partitions = await self._look_by(topic.name, deadline)
        if not isinstance(partitions, int):
            return [partitions] * len(packets)
        await self._outlet(deadline_s, len(packets)).learn(topic.name, deadline)
        receipts = await self._send(topic, min(topic.lanes, partitions), packets, deadline, deadline_s)
        late = Failed("the topic is there, and Kafka does not take it for there yet", is_retryable=True)
        return [late if receipt is _GONE else receipt for receipt in receipts]

    async def reply(self, address: str, packets: Sequence[Packet], *, deadline_s: float) -> list[Receipt]:
        """An address is a topic, of any number of partitions."""
        deadline = asyncio.get_running_loop().time() + deadline_s
        partitions = self._partitions.get(address) or await self._look_by(address, deadline)
        if not isinstance(partitions, int):
            return [partitions] * len(packets)
        topic = Topic(address, (), "", lanes=partitions)
        receipts = await self.send(topic, packets, deadline_s=deadline_s, must_arrive=True)
        if address in self._made:
            return receipts
        return [one._replace(is_retryable=False) if one is _NO_RIGHT else one for one in receipts]

    async def _look_by(self, topic: str, deadline: float) -> int | Failed:
        """Nothing has left us yet, so whatever goes wrong is a failure."""
        try:
            _require_name(topic)
            async with asyncio.timeout_at(deadline):
                seen = await self._find(topic)
        except SettingInvalid as error:
            # One that we made had a name and rights.
            return Failed(error.detail, is_retryable=topic in self._made)
        except (BrokerUnreachable, TimeoutError) as error:
            if topic in self._missing:
                return Failed(str(error) or f"the topic {topic} was deleted and is being made again", is_retryable=True)
            return Failed(f"Kafka cannot be reached: {error}", is_retryable=True)
        return Failed(f"nobody receives {topic}", is_retryable=False) if seen is None else seen.partitions

    async def _send(
        self, topic: Topic, lanes: int, packets: Sequence[Packet], deadline: float, deadline_s: float
    ) -> list[Receipt]:
        loop = asyncio.get_running_loop()
        outlet = self._outlet(deadline_s, len(packets))
        sending = _Sending(len(packets), loop.create_future())
        is_late = False
        for place, packet in enumerate(packets):
            headers = _headers_out(packet)
            lane_ = self._lane(topic, lanes, packet)
            while not is_late:
                try:
                    outlet.produce(sending, place, topic.name, lane_, packet, headers)
                except BufferError:
                    # Behind its deadline nothing more is handed over, though there may be room by then.
                    is_late = not await outlet.room(deadline)
                    continue
                except KafkaException as error:
                    sending.receipt(place, _not_produced(error))
                break
            else:
                sending.receipt(place, Failed("too much waits for Kafka in this process", is_retryable=True))
        try:
            async with asyncio.timeout_at(deadline):
                await sending.done
        except TimeoutError:
            return sending.end(Unknown("Kafka has not confirmed it in time"))
        return sending.end(Unknown("never heard of"))

    def _lane(self, topic: Topic, lanes: int, packet: Packet) -> int:
        if not packet.key:
            return next(self._turns) % lanes
        if topic.envelopes and packet.key.isdecimal():
            return int(packet.key) % lanes
        return lane(packet.key, lanes)

    def _outlet(self, deadline_s: float, packets: int) -> _Outlet:
        """For so many at once."""
        timeout_s = next((one for one in TIMEOUTS_S if one >= deadline_s), TIMEOUTS_S[-1])
        linger_ms = 0 if packets <= FEW_MAX else LINGER_MS
        outlet = self._outlets.get((timeout_s, linger_ms))
        if outlet is None:
            outlet = self._outlets[timeout_s, linger_ms] = _Outlet(self.settings, timeout_s, linger_ms)
        return outlet

    # Questions to the cluster

    def _make_admin(self) -> AdminClient:
        heard: dict[str, Any] = {"error_cb": self._erred}
        return AdminClient({**self.settings.client, **heard})

    def _the_admin(self) -> AdminClient:
        if self._admin is None:
            raise BrokerUnreachable("The binder is not open.", broker="kafka")
        # Errors of its connections pile up until somebody hears them.
        self._admin.poll(0)
        return self._admin

    async def _answer(self, future: Future[T]) -> T:
        """Not to be cancelled: the client's own thread would stumble over it."""
        asked = asyncio.wrap_future(future)
        self._asked.add(asked)
        asked.add_done_callback(self._forget_question)
        try:
            return await asyncio.shield(asked)
        except KafkaException as error:
            raise self._translated(error.args[0]) from error

    def _forget_question(self, asked: "asyncio.Future[Any]") -> None:
        self._asked.discard(asked)
        if not asked.cancelled():
            asked.exception()

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        for _ in range(TRIES_MAX - 1):
            try:
                return await ask()
            except _Passing:
                await asyncio.sleep(BETWEEN_TRIES_S)
        return await ask()

    def _translated(self, error: KafkaError) -> Exception:
        if error.code() in _NO_TOPIC:
            return _NotThere(error.str())
        if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return _AlreadyThere(error.str())
        if error.code() in _PASSING:
            return _Passing(f"{self.settings.url}: {error.str()}", broker="kafka")
        if error.code() in _MENDABLE:
            return SettingInvalid(f"{self.settings.url}: {error.str()}", broker="kafka")
        return BrokerUnreachable(f"{self.settings.url} cannot be reached: {error.str()}", broker="kafka")

    def _erred(self, error: KafkaError) -> None:
        if error.code() in _REFUSED:
            self._refused = error.str()


def _only(answers: Mapping[Any, Future[T]]) -> Future[T]:
    """The one answer to one question."""
    (future,) = answers.values()
    return future


class _Seen(NamedTuple):
    """A topic as the cluster shows it."""

    id: str
    partitions: int
    replication: int


class _Made(NamedTuple):
    """A topic as this process left it, with all groups that it knows of."""

    topic: Topic
    seen: _Seen
    config: Mapping[str, str]
    """What was set for it alone."""


class _Places(NamedTuple):
    """What is committed for a group."""

    offsets: Mapping[int, int]
    """By partition, of the topic as it is now."""
    is_of_old: bool
    """Some is of a deleted topic of the same name."""


class _NotThere(Exception):
    """There is no such topic."""


class _Passing(BrokerUnreachable):
    """The cluster is busy with itself; it will answer in a moment."""


class _AlreadyThere(Exception):
    """Somebody else has just made the topic."""


def _not_produced(error: KafkaException) -> Receipt:
    """It did not leave us."""
    code = error.args[0].code()
    if code in _NO_TOPIC:
        return _GONE
    return Failed(error.args[0].str(), is_retryable=code not in _TOO_LARGE)


_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def _require_name(topic: str) -> None:
    if not 0 < len(topic) <= 249 or topic in (".", "..") or not _NAME_CHARACTERS.issuperset(topic):
        raise SettingInvalid(
            f"Kafka has no topic of the name {topic!r}: letters, digits, '.', '_' and '-' only, at most 249 of them.",
            broker="kafka",
        )
