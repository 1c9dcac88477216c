"""Strangers name their messages as they like, also all alike: different ones are all kept, and the same one is one."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import aiormq
import pytest
from pamqp import commands as spec

from brokers.rabbit_house import at_once, open_bench
from conformance.messaging.house import Bench, collect, until
from kassa.ids import new_id
from kassa.journal.change import Change
from kassa.messaging.consumer import Consumer
from kassa.messaging.model import Ack, Confirmed, Dead, Delivery, Packet, Record, RetryAfter, Settlement
from kassa.messaging.packing import ENVELOPE_TYPE
from kassa.messaging.supplied import SuppliedBinder
from kassa.messaging.topology import Topic

SECOND = [
    Packet("1", "", b'{"order_id": "2"}', {"correlation-id": "a"}),
    Packet("1", "", b'{"order_id": "1"}', {"correlation-id": "b"}),
    Packet("1", "", b'{"order_id": "1"}', {"correlation-id": "a", "tenant": "2"}),
]
FIRST = Packet("1", "", b'{"order_id": "1"}', {"correlation-id": "a"})


Publish = Callable[..., Awaitable[None]]


@pytest.fixture(params=["memory", pytest.param("amqp", marks=pytest.mark.needs("rabbitmq"))])
def url(request: pytest.FixtureRequest) -> str:
    return request.param if request.param == "memory" else at_once(request.getfixturevalue("rabbitmq").url)


@pytest.fixture
async def bench(url: str, database_url: str) -> AsyncIterator[Bench]:
    """A topic without lanes, as that of the requests."""
    name = f"orders-{new_id()[-12:]}"
    topic = Topic(name, ("shop",), "Orders.", lanes=1, keyed=False, exchange=name, declaration="plain")
    async with open_bench(url, database_url, topic) as opened:
        yield opened


@pytest.fixture
def publish(bench: Bench, url: str) -> Publish:
    """As a program does that knows nothing of Kassa."""

    async def in_memory(*packets: Packet) -> None:
        assert isinstance(bench.binder, SuppliedBinder)
        transport = bench.binder.transport
        receipts = await transport.send(bench.topic, packets, deadline_s=60, must_arrive=True)
        assert receipts == [Confirmed()] * len(packets)

    async def over_amqp(*packets: Packet) -> None:
        async with aiormq.connect(url) as connection:
            channel = await connection.channel()
            for packet in packets:
                headers = dict(packet.headers)
                properties = spec.Basic.Properties(
                    message_id=packet.id, correlation_id=headers.pop("correlation-id", None),
                    content_type=headers.pop("content-type", None), headers=dict(headers),
                )  # fmt: skip
                await channel.basic_publish(packet.body, routing_key=bench.topic.name, properties=properties)

    return in_memory if url == "memory" else over_amqp


def bodies(deliveries: Sequence[Delivery]) -> list[tuple[bytes, str | None]]:
    return sorted((one.record.body, one.record.headers.get("correlation-id")) for one in deliveries)


@pytest.mark.parametrize("second", SECOND, ids=["other body", "other correlation id", "other header"])
async def test_both_are_put_off_and_come_again(bench: Bench, publish: Publish, second: Packet) -> None:
    """Where they differ in nothing but a header the second is the first, sent again: then one comes."""
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    await publish(FIRST, second)
    deliveries = await collect(subscription, 2)
    different = {one.record.id: one for one in deliveries}

    settled = await subscription.settle([(one, RetryAfter(0.0, "later")) for one in deliveries])

    assert settled == [True, True]
    again = await collect(subscription, len(different))
    assert bodies(again) == bodies(list(different.values()))
    assert sorted(one.record.id for one in again) == sorted(different)
    assert [one.attempts for one in again] == [1] * len(different)
    assert await subscription.receive(10, 0.5) == []
    assert await subscription.settle([(one, Ack()) for one in again]) == [True] * len(different)
    assert await subscription.receive(10, 0.5) == []
    await subscription.close(0.0)


async def test_two_dead_letters_stay_two_each_with_its_reason(bench: Bench, publish: Publish) -> None:
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    await publish(FIRST, SECOND[0])

    deliveries = await collect(subscription, 2)
    await subscription.settle([(one, Dead(one.record.body.decode())) for one in deliveries])

    letters = await bench.letters.browse(f"{bench.topic.name}:shop")
    assert sorted(one.body for one in letters) == [FIRST.body, SECOND[0].body]
    assert all(one.reason == one.body.decode() for one in letters)
    await subscription.close(0.0)


async def test_two_that_nobody_can_read_are_two_dead_letters(bench: Bench, publish: Publish) -> None:
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    await publish(*(Packet("1", "", body, {"content-type": ENVELOPE_TYPE}) for body in (b"one", b"two")))

    async def died() -> bool:
        await subscription.receive(10, 0.1)
        return len(await bench.letters.browse(f"{bench.topic.name}:shop")) == 2

    await until(died, 30)
    await subscription.close(0.0)


@pytest.mark.parametrize("end", [RetryAfter(0.0, "later"), Dead("never")], ids=["put off", "given up"])
async def test_the_same_message_twice_is_one(bench: Bench, publish: Publish, end: Settlement) -> None:
    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    await publish(FIRST, FIRST)
    deliveries = await collect(subscription, 2)

    assert await subscription.settle([(one, end) for one in deliveries]) == [True, True]

    kept = await bench.pool.fetchval("SELECT (SELECT count(*) FROM message) + (SELECT count(*) FROM dead_letter)")
    assert kept == 1
    await subscription.close(0.0)


async def test_both_have_their_effect_and_a_repeat_has_none(bench: Bench, publish: Publish) -> None:
    """The inbox goes by the record's id."""

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    subscription = await bench.binder.subscribe(bench.topic.name, "shop")
    consumer = Consumer(subscription, "shop", bench.journal, handler)
    await publish(FIRST, SECOND[0], SECOND[1], FIRST)

    async def handled() -> bool:
        await consumer.step(1.0)
        return sum(consumer.counts) == 4

    await until(handled, 60)
    assert consumer.counts == (3, 1)
    await subscription.close(0.0)
