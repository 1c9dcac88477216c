"""Every kind of server, looked at through a client that knows nothing of it: it keeps what it confirmed, and it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import aio_pika
import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from brokers import rocketmq_client
from kassa.db import embedded
from servers import KINDS, RabbitMQ, RocketMQ, Server, ServerFailed
from servers.server import is_free


class Use(NamedTuple):
    """How a client uses one kind of server."""

    put: Callable[[Server, str, bytes], Awaitable[None]]
    """Send one message durably to a queue or topic of that name, which is made, and wait for the confirmation."""
    take: Callable[[Server, str], Awaitable[bytes]]
    """One message from there."""


async def _put_rabbitmq(server: Server, name: str, body: bytes) -> None:
    async with await aio_pika.connect(server.url) as connection:
        channel = await connection.channel(on_return_raises=True)
        await channel.declare_queue(name, durable=True)
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, name)
        # What was declared last is kept by what is declared after it (see `RabbitMQ`).
        await channel.declare_exchange(name, durable=True)


async def _take_rabbitmq(server: Server, name: str) -> bytes:
    async with await aio_pika.connect(server.url) as connection:
        queue = await (await connection.channel()).declare_queue(name, passive=True)
        message = await queue.get(no_ack=True, timeout=60)
        assert message is not None
        return message.body


async def _put_kafka(server: Server, name: str, body: bytes) -> None:
    await asyncio.to_thread(_produce, server.url.removeprefix("kafka://"), name, body)


async def _take_kafka(server: Server, name: str) -> bytes:
    return await asyncio.to_thread(_consume, server.url.removeprefix("kafka://"), name)


def _produce(bootstrap: str, name: str, body: bytes) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(name, 1, 1)])[name].result()
    reports: list[KafkaError | None] = []
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True})
    producer.produce(name, body, on_delivery=lambda error, message: reports.append(error))
    producer.flush()
    assert reports == [None]


def _consume(bootstrap: str, name: str) -> bytes:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": name, "enable.auto.commit": False})
    consumer.assign([TopicPartition(name, 0, 0)])
    message = consumer.poll(60)
    consumer.close()
    assert message is not None and not message.error()
    body = message.value()
    assert body is not None
    return body


async def _put_rocketmq(server: Server, name: str, body: bytes) -> None:
    assert isinstance(server, RocketMQ)
    await asyncio.to_thread(server.make_topic, name)
    await asyncio.to_thread(server.make_group, name)
    await rocketmq_client.send(server.endpoint, name, body)


async def _take_rocketmq(server: Server, name: str) -> bytes:
    assert isinstance(server, RocketMQ)
    return await rocketmq_client.receive(server.endpoint, name, name)


USES: Mapping[str, Use] = {
    "rabbitmq": Use(_put_rabbitmq, _take_rabbitmq),
    "kafka": Use(_put_kafka, _take_kafka),
    "rocketmq": Use(_put_rocketmq, _take_rocketmq),
}


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.needs(kind)) for kind in KINDS])
def one(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One of each kind, which these tests may kill: others share the one of the whole run."""
    with embedded.temporary_directory("kassa-servers-") as directory:
        server = KINDS[request.param](directory / request.param)
        yield server
        server.kill()


@pytest.fixture
def server(one: Server) -> Server:
    """It runs, whatever the test before has done to it."""
    return one.start()


@pytest.fixture
def name() -> str:
    """Of a queue or topic for one test."""
    return uuid4().hex


def test_every_kind_is_tried() -> None:
    assert set(USES) == set(KINDS)


async def test_what_was_confirmed_survives_kill_and_start(server: Server, name: str) -> None:
    use, url, pids = USES[server.name], server.url, dict(server.pids)
    await use.put(server, name, b"confirmed")

    await asyncio.to_thread(server.kill)
    assert not server.is_running
    assert not any(_is_there(pid) for pid in pids.values())
    await asyncio.to_thread(server.start)

    assert server.url == url
    assert not set(server.pids.values()) & set(pids.values())
    assert await use.take(server, name) == b"confirmed"


async def test_what_was_confirmed_survives_stop_and_start_by_another(server: Server, name: str) -> None:
    """By another object for the same directory, as `python -m servers stop` in another process has."""
    use = USES[server.name]
    await use.put(server, name, b"confirmed")
    other = KINDS[server.name](server.directory)
    assert other.is_running
    assert (other.url, other.pids) == (server.url, server.pids)

    await asyncio.to_thread(other.stop)
    assert not server.is_running
    assert all(is_free(server.port(name)) for name in server.PORTS)

    await asyncio.to_thread(server.start)
    assert await use.take(server, name) == b"confirmed"


async def test_a_frozen_server_answers_when_it_is_thawed(server: Server, name: str) -> None:
    use = USES[server.name]

    server.freeze()
    put = asyncio.ensure_future(use.put(server, name, b"late"))
    done, _ = await asyncio.wait([put], timeout=0.5)
    assert not done
    server.thaw()

    await put
    assert await use.take(server, name) == b"late"


async def test_its_memory_and_cpu_can_be_read(server: Server) -> None:
    memory = await asyncio.to_thread(server.memory)

    assert 0 < memory.pss_bytes <= memory.rss_bytes < 2**30
    assert server.cpu_s() > 0
    assert server.log.stat().st_size > 0


async def test_its_data_belong_to_its_user_alone(server: Server) -> None:
    status = server.directory.stat()

    assert status.st_uid == server.account.uid != 0
    assert status.st_mode & 0o077 == 0


@pytest.mark.needs("rabbitmq")
def test_a_server_that_does_not_come_up_says_why() -> None:
    with embedded.temporary_directory("kassa-servers-") as directory:
        server = RabbitMQ(directory / "rabbitmq").start()
        server.kill()
        node = server.directory / "data" / "kassa@localhost"
        node.rename(server.directory / "moved away")
        node.write_text("not a directory")

        with pytest.raises(ServerFailed, match="rabbitmq did not come up"):
            server.start()

        assert not server.is_running


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
