"""A Kafka that may be killed, with a listener behind a proxy and rights that can be given; and what its tests share."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from confluent_kafka import Consumer, KafkaException, Producer, TopicCollection

# The client has these; its types do not say so.
from confluent_kafka.admin import AclBindingFilter, AdminClient  # type: ignore[attr-defined]

from conformance.messaging.house import Bench, until
from kassa.db import embedded
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources
from kassa.messaging.binders.kafka import KafkaStream, KafkaTransport, read_url
from kassa.messaging.model import Arrival, Confirmed, Failed, Packet
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.tables import TABLES
from servers import Kafka

HOST = "127.0.0.1"
WAIT_S = 60.0
GONE_S = 0.3
"""A broker stops to take what is sent to a topic a moment after it has stopped to show it."""
DEADLINE_S = 10.0


class OwnKafka(Kafka):
    """A node for tests that harm it. Clients of `line_url` are told to come through the port `proxy`, where a test puts a
    proxy before the port `line`. Over TLS its user has only the rights that somebody gives; without, everybody has all."""

    PORTS: ClassVar[tuple[str, ...]] = (*Kafka.PORTS, "line", "proxy")  # type: ignore[assignment]

    @property
    def line_url(self) -> str:
        """Through the proxy."""
        return f"kafka://{HOST}:{self.port('proxy')}"

    @property
    def safe_url(self) -> str:
        """Over TLS, with user and password."""
        return f"kafka+ssl://{self.username}:{self.password}@{self.tls_bootstrap}?ca={self.certificates.authority}"

    def _configure(self) -> str:
        file = Path(super()._configure())
        text = file.read_text()
        text = re.sub(r"^listeners=", f"listeners=LINE://{HOST}:{self.port('line')},", text, flags=re.MULTILINE)
        told = f"advertised.listeners=LINE://{HOST}:{self.port('proxy')},"
        text = re.sub(r"^advertised.listeners=", told, text, flags=re.MULTILINE)
        text = text.replace("PLAINTEXT:PLAINTEXT,", "PLAINTEXT:PLAINTEXT,LINE:PLAINTEXT,")
        text += "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n"
        text += "super.users=User:ANONYMOUS\n"
        return str(self._write("server.properties", text))


@contextmanager
def own_kafka() -> Iterator[OwnKafka]:
    """A node as long as the block."""
    with embedded.temporary_directory("kassa-kafka-") as directory:
        server = OwnKafka(directory / "kafka")
        server.start()
        try:
            yield server
        finally:
            server.kill()


async def delete(kafka: Kafka, topic: Topic) -> None:
    """As a stranger does, and until it is gone: what a broker takes of a topic that is dying, and confirms, goes with it."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    dying = await _id_of(admin, topic)
    for future in admin.delete_topics([topic.name]).values():
        await asyncio.wrap_future(future)

    async def is_gone() -> bool:
        return await _id_of(admin, topic) != dying

    await until(is_gone)
    await asyncio.sleep(GONE_S)


async def _id_of(admin: AdminClient, topic: Topic) -> str | None:
    """None: it is not there."""
    (future,) = admin.describe_topics(TopicCollection([topic.name])).values()
    try:
        return str((await asyncio.wrap_future(future)).topic_id)
    except KafkaException:
        return None


async def insist(transport: KafkaTransport, topic: Topic, *packets: Packet) -> None:
    """As a relay does: what failed and is retryable is sent again; nothing may be refused for good."""
    left = list(packets)
    async with asyncio.timeout(WAIT_S):
        while left:
            receipts = await transport.send(topic, left, deadline_s=DEADLINE_S, must_arrive=True)
            assert not [one for one in receipts if isinstance(one, Failed) and not one.is_retryable], receipts
            left = [one for one, receipt in zip(left, receipts, strict=True) if receipt != Confirmed()]


def new_topic(groups: tuple[str, ...] = ("shop",), **more: Any) -> Topic:
    """A topic of its own, since the server is shared."""
    return Topic(f"orders-{new_id()[-12:]}", groups, "Orders, for the tests.", **more)


def packet(id: str, key: str = "", body: bytes = b"{}", headers: dict[str, str] | None = None) -> Packet:
    return Packet(id, key, body, {"kassa-id": id, **(headers or {})})


def ids(arrivals: Sequence[Arrival]) -> list[str]:
    return [arrival.packet.id for arrival in arrivals]


@asynccontextmanager
async def open_transport(url: str) -> AsyncIterator[KafkaTransport]:
    """The bare transport."""
    transport = KafkaTransport(read_url(url))
    await transport.open()
    try:
        yield transport
    finally:
        await transport.close()


async def take(stream: KafkaStream, wanted: int) -> list[Arrival]:
    """So many arrivals, however they are batched."""
    found: list[Arrival] = []
    async with asyncio.timeout(WAIT_S):
        while len(found) < wanted:
            found += await stream.receive(wanted - len(found), WAIT_S)
    return found


@asynccontextmanager
async def open_bench(url: str, database_url: str, topic: Topic) -> AsyncIterator[Bench]:
    """A binder with its topic, a journal and wake-ups."""
    pool = await open_pool(database_url, application="test")
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    wakeups = Wakeups(lambda: connect(database_url, application="test wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    try:
        async with make_binder(url, Resources(pool, wakeups, (topic,))) as binder:
            await binder.provision([topic])
            yield Bench(binder, topic, pool, journal, wakeups, DeadLetters(pool))
    finally:
        telling.cancel()
        with suppress(asyncio.CancelledError):
            await telling
        await journal.stop()
        await pool.close()


# Other people's programs


def publish(bootstrap: str, topic: str, *messages: dict[str, Any]) -> None:
    """A plain producer; each message as `Producer.produce` takes it."""
    producer = Producer({"bootstrap.servers": bootstrap})
    for message in messages:
        producer.produce(topic, **message)
    assert producer.flush(WAIT_S) == 0


def read(bootstrap: str, topic: str, wanted: int) -> list[Any]:
    """A plain consumer's messages, from the beginning of a topic."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": new_id(),
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([topic])
    try:
        return _until(lambda: consumer.consume(wanted, 0.2), wanted)
    finally:
        consumer.close()


def _until(more: Callable[[], list[Any]], wanted: int, rounds: int = 300) -> list[Any]:
    found: list[Any] = []
    for _ in range(rounds):
        found += more()
        if len(found) >= wanted:
            return found
    raise AssertionError(f"{len(found)} of {wanted} messages came")


def until_heard(admin: Any, binding: Any, *, is_given: bool) -> None:
    """Until the broker acts on a right that was given or taken: the controller has it first. binding: an AclBinding."""
    one = AclBindingFilter(
        binding.restype, binding.name, binding.resource_pattern_type, binding.principal, binding.host, binding.operation,
        binding.permission_type,
    )  # fmt: skip
    deadline = time.monotonic() + WAIT_S
    while bool(admin.describe_acls(one).result()) != is_given:
        assert time.monotonic() < deadline, f"{binding} is not acted on"
        time.sleep(0.02)
