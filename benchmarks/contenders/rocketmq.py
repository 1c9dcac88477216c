"""RocketMQ by the published client (rocketmq-python-client 5.1): FIFO by the key's message group, acknowledged one by one.

It has no batches in either direction. Topic and group are made by Kassa's binder, since the client can make none; so the
queues are the same.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from benchmarks.contenders import kassa
from benchmarks.contenders.shape import BATCH, GROUP, Failure, in_batches, one_by_one
from kassa.messaging.binders.rocketmq import group_name, topic_name
from kassa.messaging.model import Record
from rocketmq import ClientConfiguration, Credentials, FilterExpression, Message, Producer, SimpleConsumer

INVISIBLE_S = 60
RECEIVED_MAX = 32
"""What the broker gives out at once."""


class Published:
    """Its own threads do the work; the calls that wait are made in one of ours."""

    def __init__(self, producer: Any, configuration: Any, name: str) -> None:
        self._producer = producer
        self._configuration = configuration
        self._name = name

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        await asyncio.gather(
            *(asyncio.wrap_future(self._producer.send_async(message)) for message in self._made(batch))
        )

    def _made(self, batch: Sequence[Record]) -> list[Any]:
        made = []
        for one in one_by_one(batch):
            message = Message()
            message.topic = topic_name(self._name)
            message.body = one.body
            message.keys = one.id
            message.message_group = one.key
            for name, value in one.headers.items():
                message.add_property(name, value)
            made.append(message)
        return made

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        return await asyncio.to_thread(self._consume, count, began)

    def _consume(self, count: int, began: Callable[[], None]) -> list[str]:
        group = group_name(self._name, GROUP)
        consumer = SimpleConsumer(self._configuration, group, {topic_name(self._name): FilterExpression()}, 5)
        consumer.startup()
        found: list[str] = []
        idle = 0
        while len(found) < count:
            messages = consumer.receive(RECEIVED_MAX, INVISIBLE_S)
            idle = 0 if messages else idle + 1
            if idle > 10:
                raise Failure(f"rocketmq-python-client: {len(found)} of {count} came")
            if messages and not found:
                began()
            for message in messages or ():
                found.append(message.properties["ce-id"])
            for acknowledged in [consumer.ack_async(message) for message in messages or ()]:
                acknowledged.result()
        consumer.shutdown()
        return found


@asynccontextmanager
async def by_client(url: str, database_url: str, name: str) -> AsyncIterator[Published]:
    """Its producer, started; a consumer of its own for `consume`."""
    async with kassa.binder(url, database_url, kassa.topic(name, envelopes=False)):
        pass
    configuration = ClientConfiguration(urlsplit(url).netloc.rpartition("@")[2], Credentials())
    producer = Producer(configuration, (topic_name(name),))
    await asyncio.to_thread(producer.startup)
    yield Published(producer, configuration, name)
    await asyncio.to_thread(producer.shutdown)
