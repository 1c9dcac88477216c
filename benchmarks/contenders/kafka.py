"""Kafka by confluent-kafka's synchronous clients, and by FastStream over aiokafka, the faster of its two Kafka clients.

Both: idempotent producer, all replicas; one partition per lane; each batch committed before the next one is asked for. Kassa
commits in the background, every ten milliseconds, and waits for the last commit when it closes, before the clock stops.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from confluent_kafka import Consumer, KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]
from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage

from benchmarks.contenders import shape
from benchmarks.contenders.shape import BATCH, BATCH_OF_ENVELOPES, GROUP, SENDERS, Failure, in_batches, one_by_one
from kassa.messaging.model import Record
from kassa.messaging.topology import LANES

WAIT_S = 30.0


def servers(url: str) -> str:
    return urlsplit(url).netloc


def create(url: str, name: str) -> None:
    """A topic with a partition per lane."""
    admin = AdminClient({"bootstrap.servers": servers(url)})
    for made in admin.create_topics([NewTopic(name, LANES, 1)]).values():
        made.result(WAIT_S)


class Confluent:
    """A thread that produces and a thread that consumes, without an event loop: what the client can do by itself."""

    def __init__(self, url: str, name: str, *, envelopes: bool) -> None:
        self._name = name
        self._servers = servers(url)
        self._pack = shape.in_envelopes if envelopes else one_by_one
        self._batch = BATCH_OF_ENVELOPES if envelopes else BATCH
        self._producer = Producer({
            "bootstrap.servers": self._servers, "acks": "all", "enable.idempotence": True, "linger.ms": 1,
        })  # fmt: skip

    async def publish(self, records: Sequence[Record]) -> None:
        await asyncio.to_thread(self._publish, records)

    def _publish(self, records: Sequence[Record]) -> None:
        """As many records under way as the others have: SENDERS batches."""
        under_way = 0
        failed: list[KafkaError] = []

        def reported(error: KafkaError | None, _: Message) -> None:
            nonlocal under_way
            under_way -= 1
            if error is not None:
                failed.append(error)

        for start in range(0, len(records), self._batch):
            messages = self._pack(records[start : start + self._batch])
            for message in messages:
                under_way += 1
                self._producer.produce(
                    self._name, message.body, message.key, message.lane, reported, headers=message.headers  # type: ignore[arg-type]
                )  # fmt: skip
                self._producer.poll(0)
            while under_way > (SENDERS - 1) * len(messages):
                self._producer.poll(0.1)
        self._producer.flush(WAIT_S)
        if failed or under_way:
            raise Failure(f"confluent-kafka: {failed[:1]}, {under_way} not confirmed")

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        return await asyncio.to_thread(self._consume, count, began)

    def _consume(self, count: int, began: Callable[[], None]) -> list[str]:
        consumer = Consumer({
            "bootstrap.servers": self._servers, "group.id": f"{self._name}:{GROUP}", "auto.offset.reset": "earliest",
            "enable.auto.commit": False, "partition.assignment.strategy": "cooperative-sticky",
        })  # fmt: skip
        consumer.subscribe([self._name])
        found: list[str] = []
        while len(found) < count:
            # Asked for more than there is, it would wait for the rest. A batch makes an envelope for each lane.
            is_single = self._batch == BATCH
            wanted = min(BATCH if is_single else LANES, shape.messages_of(count - len(found), envelopes=not is_single))
            messages = consumer.consume(wanted, WAIT_S)
            if not messages:
                raise Failure(f"confluent-kafka: {len(found)} of {count} came")
            if not found:
                began()
            for message in messages:
                if (error := message.error()) is not None:
                    raise Failure(f"confluent-kafka: {error}")
                key, body = (message.key() or b"").decode(), message.value() or b""
                found += [one.id for one in shape.records_in(key, _headers(message), body)]
            consumer.commit(asynchronous=False)
        consumer.close()
        return found


def _headers(message: Message) -> dict[str, str]:
    pairs: Any = message.headers() or ()
    return {name: value.decode() for name, value in pairs}


@asynccontextmanager
async def by_confluent(url: str, name: str, *, envelopes: bool) -> AsyncIterator[Confluent]:
    await asyncio.to_thread(create, url, name)
    yield Confluent(url, name, envelopes=envelopes)


class FastStream:
    """One message per record; received and committed by the batch, which is its fastest way that loses nothing."""

    def __init__(self, broker: KafkaBroker, name: str) -> None:
        self._broker = broker
        self._name = name

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        await asyncio.gather(
            *(
                self._broker.publish(
                    one.body, self._name, key=one.key.encode(), partition=one.lane, headers=one.headers
                )
                for one in one_by_one(batch)
            )
        )

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        found: list[str] = []
        done = asyncio.Event()

        async def handle(bodies: list[bytes], message: KafkaMessage) -> None:
            if not found:
                began()
            found.extend(headers["ce-id"] for headers in message.batch_headers)
            if len(found) >= count:
                done.set()

        self._broker.subscriber(
            self._name,
            group_id=f"{self._name}:{GROUP}",
            batch=True,
            max_records=BATCH,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.NACK_ON_ERROR,
            decoder=_as_they_came,
        )(handle)
        await self._broker.start()
        await done.wait()
        return found


async def _as_they_came(message: Any) -> Any:
    """Nobody else reads the bodies either."""
    return message.body


@asynccontextmanager
async def by_faststream(url: str, name: str) -> AsyncIterator[FastStream]:
    await asyncio.to_thread(create, url, name)
    broker = KafkaBroker(servers(url), acks="all", enable_idempotence=True, linger_ms=1, logger=None)
    await broker.connect()
    yield FastStream(broker, name)
    await broker.stop()
