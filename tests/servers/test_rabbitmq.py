"""The project's RabbitMQ, looked at through aio-pika."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from uuid import uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import AMQPConnectionError

from servers import RabbitMQ


@pytest.fixture
async def connection(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractConnection]:
    connection = await aio_pika.connect(rabbitmq.url)
    yield connection
    await connection.close()


async def test_a_message_goes_in_and_comes_out(connection: AbstractConnection) -> None:
    assert await _echo(connection, b"a payment") == b"a payment"


async def test_virtual_hosts_do_not_see_each_other(rabbitmq: RabbitMQ) -> None:
    url = await asyncio.to_thread(rabbitmq.virtual_host, uuid4().hex)
    async with await aio_pika.connect(url) as inside, await aio_pika.connect(rabbitmq.url) as outside:
        queue = await (await inside.channel()).declare_queue(uuid4().hex, durable=True)

        channel = await outside.channel()

        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await channel.declare_queue(queue.name, passive=True)


async def test_over_tls_with_the_right_password(rabbitmq: RabbitMQ) -> None:
    trusted = ssl.create_default_context(cafile=rabbitmq.certificates.authority)
    async with await aio_pika.connect(rabbitmq.tls_url, ssl_context=trusted) as connection:
        assert await _echo(connection, b"a secret") == b"a secret"


async def test_over_tls_a_stranger_is_not_trusted(rabbitmq: RabbitMQ) -> None:
    with pytest.raises(AMQPConnectionError):
        await aio_pika.connect(rabbitmq.tls_url, ssl_context=ssl.create_default_context())


async def test_over_tls_the_wrong_password_is_refused(rabbitmq: RabbitMQ) -> None:
    trusted = ssl.create_default_context(cafile=rabbitmq.certificates.authority)
    wrong = rabbitmq.tls_url.replace(rabbitmq.password, "wrong")

    with pytest.raises(aio_pika.exceptions.ProbableAuthenticationError):
        await aio_pika.connect(wrong, ssl_context=trusted)


@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_an_alarm_blocks_publishers_until_it_is_cleared(
    rabbitmq: RabbitMQ, connection: AbstractConnection, kind: str
) -> None:
    channel = await connection.channel()
    queue = await channel.declare_queue(uuid4().hex, exclusive=True)
    raise_alarm, clear_alarm = {
        "memory": (rabbitmq.raise_memory_alarm, rabbitmq.clear_memory_alarm),
        "disk": (rabbitmq.raise_disk_alarm, rabbitmq.clear_disk_alarm),
    }[kind]

    await asyncio.to_thread(raise_alarm)
    try:
        publish = asyncio.create_task(channel.default_exchange.publish(aio_pika.Message(b"waits"), queue.name))
        done, _ = await asyncio.wait([publish], timeout=0.5)
        assert not done
    finally:
        await asyncio.to_thread(clear_alarm)

    assert await publish is not None


async def _echo(connection: AbstractConnection, body: bytes) -> bytes:
    channel = await connection.channel()
    queue = await channel.declare_queue(uuid4().hex, exclusive=True)
    await channel.default_exchange.publish(aio_pika.Message(body), queue.name)
    message = await queue.get(no_ack=True, timeout=60)
    assert message is not None
    return message.body
