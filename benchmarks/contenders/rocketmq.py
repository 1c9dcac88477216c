"""RocketMQ by its published stubs over grpc.aio: FIFO by the key's message group, one message per call, acknowledged in batches.

The published client above those stubs costs several times more and leaves threads behind, so it is no measure. Topic and group
are made by Kassa's binder, since gRPC can make none; so the queues are the same.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from rocketmq.grpc_protocol import definition_pb2 as model
from rocketmq.grpc_protocol import service_pb2 as service
from rocketmq.grpc_protocol.service_pb2_grpc import MessagingServiceStub

from benchmarks.contenders import kassa
from benchmarks.contenders.shape import BATCH, GROUP, SENDERS, Failure, in_batches
from kassa.ids import new_id
from kassa.messaging.binders.rocketmq import group_name, topic_name
from kassa.messaging.model import Record

OK = 20_000
INVISIBLE_S, POLLING_S = 60, 2
EMPTY_MAX = 10
"""Receives in turn that bring nothing, before something is wrong."""
RECEIVED_MAX = 32
"""What the broker gives out at once."""


class Stubs:
    """The protocol, spoken by hand."""

    def __init__(self, channel: Any, endpoint: str, name: str) -> None:
        self._stub: Any = MessagingServiceStub(channel)
        self._about_us = (
            ("x-mq-client-id", new_id()), ("x-mq-language", "PYTHON"), ("x-mq-protocol", "v2"),
            ("x-mq-client-version", "5.0.0"),
        )  # fmt: skip
        host, _, port = endpoint.partition(":")
        self._endpoints = model.Endpoints(
            scheme=model.AddressScheme.IPv4, addresses=[model.Address(host=host, port=int(port))]
        )
        self._topic = model.Resource(name=topic_name(name))
        self._group = model.Resource(name=group_name(name, GROUP))
        self._any_queue: Any = None
        self._everything = model.FilterExpression(type=model.FilterType.TAG, expression="*")

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        await asyncio.gather(*(self._send_one(one) for one in batch))

    async def _send_one(self, record: Record) -> None:
        message = model.Message(
            topic=self._topic,
            user_properties=record.headers,
            system_properties=model.SystemProperties(
                message_id=record.id, message_type=model.MessageType.FIFO, message_group=record.key, keys=[record.id],
                body_encoding=model.Encoding.IDENTITY, born_host="127.0.0.1",
            ),
            body=record.body,
        )  # fmt: skip
        message.system_properties.born_timestamp.GetCurrentTime()
        answer = await self._stub.SendMessage(
            service.SendMessageRequest(messages=[message]), metadata=self._about_us, timeout=30
        )
        if answer.status.code != OK:
            raise Failure(f"RocketMQ: {answer.status}")

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        """As many receivers as there are senders; a queue that one has something of is not given to another."""
        telemetry = self._stub.Telemetry(metadata=self._about_us)
        await telemetry.write(self._settings())
        await telemetry.read()
        route = await self._stub.QueryRoute(
            service.QueryRouteRequest(topic=self._topic, endpoints=self._endpoints), metadata=self._about_us
        )
        self._any_queue = route.message_queues[0]
        self._any_queue.id = -1
        found: list[str] = []
        async with asyncio.TaskGroup() as receivers:
            for _ in range(SENDERS):
                receivers.create_task(self._receive_all(found, count, began))
        telemetry.cancel()
        return found

    async def _receive_all(self, found: list[str], count: int, began: Callable[[], None]) -> None:
        empty = 0
        while len(found) < count:
            messages = await self._receive()
            empty = 0 if messages else empty + 1
            if empty > EMPTY_MAX:
                raise Failure(f"RocketMQ: {len(found)} of {count} came")
            if not messages:
                continue
            if not found:
                began()
            found += [message.user_properties["ce-id"] for message in messages]
            await self._acknowledge(messages)

    async def _receive(self) -> list[Any]:
        request = service.ReceiveMessageRequest(
            group=self._group, message_queue=self._any_queue, filter_expression=self._everything,
            batch_size=RECEIVED_MAX, invisible_duration=Duration(seconds=INVISIBLE_S),
            long_polling_timeout=Duration(seconds=POLLING_S),
        )  # fmt: skip
        call = self._stub.ReceiveMessage(request, metadata=self._about_us, timeout=30)
        return [part.message async for part in call if part.HasField("message")]

    async def _acknowledge(self, messages: Sequence[Any]) -> None:
        entries = [
            service.AckMessageEntry(
                message_id=one.system_properties.message_id, receipt_handle=one.system_properties.receipt_handle
            )
            for one in messages
        ]
        request = service.AckMessageRequest(group=self._group, topic=self._topic, entries=entries)
        answer = await self._stub.AckMessage(request, metadata=self._about_us, timeout=30)
        if answer.status.code != OK:
            raise Failure(f"RocketMQ: {answer.status}")

    def _settings(self) -> Any:
        """The proxy wants to know whom it talks to before it gives anything out."""
        entry = model.SubscriptionEntry(topic=self._topic, expression=self._everything)
        subscription = model.Subscription(
            group=self._group, subscriptions=[entry], fifo=True, long_polling_timeout=Duration(seconds=POLLING_S)
        )
        settings = model.Settings(client_type=model.ClientType.SIMPLE_CONSUMER, subscription=subscription)
        return service.TelemetryCommand(settings=settings)


@asynccontextmanager
async def by_stubs(url: str, database_url: str, name: str) -> AsyncIterator[Stubs]:
    """One gRPC channel for all."""
    async with kassa.binder(url, database_url, kassa.topic(name, envelopes=False)):
        pass
    endpoint = urlsplit(url).netloc.rpartition("@")[2]
    async with grpc.aio.insecure_channel(endpoint) as channel:
        yield Stubs(channel, endpoint, name)
