"""RabbitMQ by aiormq, and by FastStream: publisher confirms, mandatory, persistent; quorum queues, acknowledged after use.

The topology is Kassa's, declared here: a topic exchange and a quorum queue per lane with a single active consumer, because
that is what keeps the order of a key while several consumers share the work.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage
from faststream.rabbit import Channel, ExchangeType, RabbitBroker, RabbitExchange, RabbitMessage, RabbitQueue
from pamqp import commands

from benchmarks.contenders.shape import (
    BATCH,
    BATCH_OF_ENVELOPES,
    PREFETCH,
    Failure,
    Message,
    in_batches,
    in_envelopes,
    one_by_one,
    records_in,
)
from kassa.messaging.model import Record
from kassa.messaging.topology import LANES

QUORUM: dict[str, Any] = {"x-queue-type": "quorum", "x-single-active-consumer": True}


def _queue(name: str, number: int) -> str:
    return f"{name}.{number}"


async def declare(channel: AbstractChannel, name: str) -> None:
    """Exchange, queues and bindings: the routing key is the number of the lane."""
    await channel.exchange_declare(name, exchange_type="topic", durable=True)
    for number in range(LANES):
        await channel.queue_declare(_queue(name, number), durable=True, arguments=QUORUM)
        await channel.queue_bind(_queue(name, number), name, str(number))


class Aiormq:
    """The client that Kassa's binder stands on, by its public methods."""

    def __init__(self, sending: AbstractChannel, receiving: AbstractChannel, name: str, *, envelopes: bool) -> None:
        self._sending = sending
        self._receiving = receiving
        self._name = name
        self._pack = in_envelopes if envelopes else one_by_one
        self._batch = BATCH_OF_ENVELOPES if envelopes else BATCH
        self._ack_every = LANES if envelopes else BATCH
        """A batch makes an envelope for each lane."""

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, self._batch, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        confirmations = await asyncio.gather(*(self._publish(message) for message in self._pack(batch)))
        for confirmation in confirmations:
            if not isinstance(confirmation, commands.Basic.Ack):
                raise Failure(f"aiormq: {confirmation}")

    def _publish(self, message: Message) -> Awaitable[Any]:
        headers: dict[str, Any] = {**message.headers, "kassa-key": message.key}
        properties = commands.Basic.Properties(
            content_type=headers.pop("content-type"), message_id=message.id, delivery_mode=2, headers=headers
        )
        return self._sending.basic_publish(
            message.body, exchange=self._name, routing_key=str(message.lane), properties=properties, mandatory=True
        )

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        """Acknowledged by the hundred, in one word."""
        found: list[str] = []
        waiting = 0
        done = asyncio.Event()

        async def on_message(message: DeliveredMessage) -> None:
            nonlocal waiting
            if not found:
                began()
            properties = message.header.properties
            headers: dict[str, Any] = {**(properties.headers or {}), "content-type": properties.content_type or ""}
            found.extend([one.id for one in records_in(headers.get("kassa-key", ""), headers, message.body)])
            waiting += 1
            is_last = len(found) >= count
            if waiting >= self._ack_every or is_last:
                waiting = 0
                await self._receiving.basic_ack(message.delivery_tag or 0, multiple=True)
            if is_last:
                done.set()

        await self._receiving.basic_qos(prefetch_count=PREFETCH)
        for number in range(LANES):
            await self._receiving.basic_consume(_queue(self._name, number), on_message)
        await done.wait()
        return found


@asynccontextmanager
async def by_aiormq(url: str, name: str, *, envelopes: bool) -> AsyncIterator[Aiormq]:
    """Two connections, as RabbitMQ advises."""
    sending, receiving = await aiormq.connect(url), await aiormq.connect(url)
    outgoing, incoming = await sending.channel(publisher_confirms=True), await receiving.channel()
    await declare(incoming, name)
    yield Aiormq(outgoing, incoming, name, envelopes=envelopes)
    await sending.close()
    await receiving.close()


class FastStream:
    """One message per record; it acknowledges each by itself and has no other way."""

    def __init__(self, broker: RabbitBroker, name: str) -> None:
        self._broker = broker
        self._name = name
        self._exchange = RabbitExchange(name, type=ExchangeType.TOPIC, declare=False)

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        confirmations = await asyncio.gather(*(self._publish(message) for message in one_by_one(batch)))
        for confirmation in confirmations:
            if not isinstance(confirmation, commands.Basic.Ack):
                raise Failure(f"FastStream: {confirmation}")

    def _publish(self, message: Message) -> Awaitable[Any]:
        headers: dict[str, Any] = {**message.headers, "kassa-key": message.key}
        return self._broker.publish(
            message.body,
            exchange=self._exchange,
            routing_key=str(message.lane),
            content_type=headers.pop("content-type"),
            message_id=message.id,
            headers=headers,
            persist=True,
        )

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        found: list[str] = []
        done = asyncio.Event()

        async def handle(body: bytes, message: RabbitMessage) -> None:
            if not found:
                began()
            found.append(message.headers["ce-id"])
            if len(found) >= count:
                done.set()

        for number in range(LANES):
            queue = RabbitQueue(_queue(self._name, number), declare=False)
            self._broker.subscriber(queue, decoder=_as_it_came)(handle)
        await self._broker.start()
        await done.wait()
        return found


async def _as_it_came(message: RabbitMessage) -> bytes:
    """Nobody else reads the body either."""
    return message.body


@asynccontextmanager
async def by_faststream(url: str, name: str) -> AsyncIterator[FastStream]:
    channel = Channel(prefetch_count=PREFETCH, publisher_confirms=True, on_return_raises=True)
    broker = RabbitBroker(url, default_channel=channel, logger=None)
    async with await aiormq.connect(url) as connection:
        await declare(await connection.channel(), name)
    await broker.connect()
    yield FastStream(broker, name)
    await broker.stop()
