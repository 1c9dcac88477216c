"""Programs of people who have never heard of Kassa, with plain pika, as they are."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event

from brokers.rabbit_house import open_bench
from conformance.messaging.house import Bench, collect
from kassa.clock import SystemClock
from kassa.ids import new_id
from kassa.messaging.model import Ack, Confirmed, LogRecord, Place, Record
from kassa.messaging.relay import event_record
from kassa.messaging.topology import EVENTS, PAYMENT_ORDERS, Topic
from servers import RabbitMQ

PROGRAMS = Path(__file__).parent / "pika_programs"


@pytest.fixture
def place(rabbitmq: RabbitMQ) -> Iterator[str]:
    """The URL of a virtual host of its own, since these programs use fixed names."""
    yield rabbitmq.virtual_host(f"pika-{new_id()[-12:]}")


@asynccontextmanager
async def running(program: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """One of the programs, with what it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAMS / program), *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_of(process: asyncio.subprocess.Process) -> str:
    """What it prints next."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def serve_one(bench: Bench) -> Record:
    """Takes one request, and answers it where it wants an answer."""
    subscription = await bench.binder.subscribe(PAYMENT_ORDERS.name, "kassa")
    (delivery,) = await collect(subscription, 1)
    asked = delivery.record
    if address := asked.headers.get("reply-to"):
        headers = {"content-type": "application/json", "correlation-id": asked.headers["correlation-id"]}
        answer = Record(new_id(), "", b'{"state": "processing"}', headers)
        assert await bench.binder.reply(address, [answer], deadline_s=60) == [Confirmed()]
    assert await subscription.settle([(delivery, Ack())]) == [True]
    await subscription.close(1)
    return asked


async def test_ten_line_publisher_is_understood(place: str, database_url: str) -> None:
    async with open_bench(place, database_url, PAYMENT_ORDERS) as bench, running("publisher.py", place) as process:
        asked = await serve_one(bench)

        assert await process.wait() == 0
        assert json.loads(asked.body) == {"order_id": "123456", "amount": 100}
        assert asked.id and asked.headers == {}


async def test_publisher_may_declare_everything_before_us(place: str, database_url: str) -> None:
    async with running("publisher.py", place) as process:
        assert await process.wait() == 0

    async with open_bench(place, database_url, PAYMENT_ORDERS) as bench:
        assert json.loads((await serve_one(bench)).body)["amount"] == 100


@pytest.mark.parametrize("address", [(), ("amq.rabbitmq.reply-to",)], ids=["own queue", "direct reply-to"])
async def test_asker_gets_its_answer(place: str, database_url: str, address: tuple[str, ...]) -> None:
    async with (
        open_bench(place, database_url, PAYMENT_ORDERS) as bench,
        running("asker.py", place, *address) as process,
    ):
        asked = await serve_one(bench)
        answer = json.loads(await line_of(process))

        assert await process.wait() == 0
        assert asked.headers["correlation-id"] == "c-1"
        assert answer == {"correlation_id": "c-1", "type": "application/json", "body": '{"state": "processing"}'}


def an_event(type: str) -> Record:
    """An event as the relay sends it."""
    return event_record(LogRecord(Place(1, 7, 0), 7, new_id(), 3, SystemClock().now(), type, b'{"amount": 100}'))


async def test_listener_gets_cloud_events_by_type(place: str, database_url: str) -> None:
    topic = Topic(EVENTS.name, (), EVENTS.about)
    async with open_bench(place, database_url, topic) as bench, running("listener.py", place, topic.name) as process:
        assert await line_of(process) == "listening"
        sent = [an_event("refund.created"), an_event("payment.succeeded")]
        assert await bench.binder.send(topic.name, sent, deadline_s=60) == [Confirmed()] * 2
        message = json.loads(await line_of(process))

    event = from_rabbitmq_event(RabbitMQMessage(message["headers"], message["type"], message["body"].encode()))
    assert message["key"] == event.get_type() == "payment.succeeded"
    assert event.get_data() == {"amount": 100}
    assert (event.get_id(), event.get_source(), event.get_subject()) == (
        sent[1].headers["ce-id"],
        "kassa",
        sent[1].headers["ce-subject"],
    )
