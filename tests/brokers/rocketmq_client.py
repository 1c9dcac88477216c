"""The smallest client of RocketMQ: the official stubs over gRPC, one message a time, and nothing of Kassa's."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import uuid4

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from rocketmq.grpc_protocol import definition_pb2 as model
from rocketmq.grpc_protocol import service_pb2 as service
from rocketmq.grpc_protocol.service_pb2_grpc import MessagingServiceStub

OK = 20_000
NOT_FOUND = 40_404
_INVISIBLE_S = 30
_TRIES_MAX = 10


async def send(
    endpoint: str,
    topic: str,
    body: bytes,
    *,
    key: str = "",
    properties: Mapping[str, str] | None = None,
    is_gzip: bool = False,
    message_group: str = "",
) -> str:
    """Send one message; the id that the broker has confirmed. is_gzip: say that the body is compressed. message_group: of a
    message of the type FIFO; without one it is a normal message."""
    message = model.Message(
        topic=model.Resource(name=topic),
        user_properties=properties or {},
        system_properties=model.SystemProperties(
            message_id=uuid4().hex.upper(),
            message_type=model.MessageType.FIFO if message_group else model.MessageType.NORMAL,
            message_group=message_group,
            body_encoding=model.Encoding.GZIP if is_gzip else model.Encoding.IDENTITY,
            born_host="127.0.0.1",
            keys=[key] if key else [],
        ),
        body=body,
    )
    message.system_properties.born_timestamp.GetCurrentTime()
    async with _stub(endpoint) as (stub, about_us):
        answer = await stub.SendMessage(service.SendMessageRequest(messages=[message]), metadata=about_us)
    assert answer.status.code == OK, answer.status
    return str(answer.entries[0].message_id)


async def receive(endpoint: str, topic: str, group: str) -> bytes:
    """Receive one message for `group`, which must be there, and acknowledge it."""
    async with _stub(endpoint) as (stub, about_us):
        # The proxy asks whom it talks to, and refuses to give anything out before it knows.
        telemetry = stub.Telemetry(metadata=about_us)
        await telemetry.write(_settings(topic, group))
        await telemetry.read()
        message = await _received(stub, about_us, await _queue(stub, about_us, endpoint, topic), group)
        entry = service.AckMessageEntry(
            message_id=message.system_properties.message_id, receipt_handle=message.system_properties.receipt_handle
        )
        acknowledgement = service.AckMessageRequest(
            group=model.Resource(name=group), topic=model.Resource(name=topic), entries=[entry]
        )
        answer = await stub.AckMessage(acknowledgement, metadata=about_us)
        telemetry.cancel()
    assert answer.status.code == OK, answer.status
    return bytes(message.body)


async def _received(
    stub: MessagingServiceStub, about_us: tuple[tuple[str, str], ...], queue: model.MessageQueue, group: str
) -> model.Message:
    request = service.ReceiveMessageRequest(
        group=model.Resource(name=group),
        message_queue=queue,
        filter_expression=model.FilterExpression(type=model.FilterType.TAG, expression="*"),
        batch_size=1,
        invisible_duration=Duration(seconds=_INVISIBLE_S),
        long_polling_timeout=Duration(seconds=5),
    )
    for _ in range(_TRIES_MAX):
        # A stream of a status, messages, and the time of their delivery.
        async for part in stub.ReceiveMessage(request, metadata=about_us, timeout=30):
            if part.HasField("status"):
                assert part.status.code in (OK, NOT_FOUND), part.status
            elif part.HasField("message"):
                return part.message
    raise AssertionError(f"nothing in {queue.topic.name}")


async def _queue(
    stub: MessagingServiceStub, about_us: tuple[tuple[str, str], ...], endpoint: str, topic: str
) -> model.MessageQueue:
    """Any queue of the topic that may be read; the proxy then looks into all of them."""
    request = service.QueryRouteRequest(topic=model.Resource(name=topic), endpoints=_endpoints(endpoint))
    answer = await stub.QueryRoute(request, metadata=about_us)
    assert answer.status.code == OK, answer.status
    queue = answer.message_queues[0]
    queue.id = -1
    return queue


def _settings(topic: str, group: str) -> service.TelemetryCommand:
    entry = model.SubscriptionEntry(
        topic=model.Resource(name=topic),
        expression=model.FilterExpression(type=model.FilterType.TAG, expression="*"),
    )
    subscription = model.Subscription(
        group=model.Resource(name=group), subscriptions=[entry], long_polling_timeout=Duration(seconds=5)
    )
    settings = model.Settings(client_type=model.ClientType.SIMPLE_CONSUMER, subscription=subscription)
    return service.TelemetryCommand(settings=settings)


def _endpoints(endpoint: str) -> model.Endpoints:
    host, _, port = endpoint.partition(":")
    return model.Endpoints(scheme=model.AddressScheme.IPv4, addresses=[model.Address(host=host, port=int(port))])


@asynccontextmanager
async def _stub(endpoint: str) -> AsyncIterator[tuple[MessagingServiceStub, tuple[tuple[str, str], ...]]]:
    about_us = (
        ("x-mq-client-id", uuid4().hex),
        ("x-mq-language", "PYTHON"),
        ("x-mq-protocol", "v2"),
        ("x-mq-client-version", "5.0.0"),
    )
    async with grpc.aio.insecure_channel(endpoint) as channel:
        await asyncio.wait_for(channel.channel_ready(), 60)
        yield MessagingServiceStub(channel), about_us
