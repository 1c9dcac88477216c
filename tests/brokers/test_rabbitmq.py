"""RabbitMQ for itself: what it alone can do, and what it may do to us. What it shares with the others is in conformance."""

import asyncio
import json
import re
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from pamqp import commands as spec
from structlog.testing import capture_logs

from brokers.rabbit_house import (
    Load,
    assert_once_and_in_order,
    at_once,
    consuming,
    new_topic,
    open_bench,
    open_transport,
    packet,
)
from brokers.streams import ended_by_its_first, see
from conformance.journal.cutter import Cut, Cutter
from conformance.messaging.house import Bench, collect, record, until
from kassa.db import embedded
from kassa.errors import BrokerUnreachable, QueueMismatch, SettingInvalid
from kassa.ids import new_id
from kassa.messaging.binders import amqp
from kassa.messaging.binders import rabbitmq as ours
from kassa.messaging.binders.amqp import read_url
from kassa.messaging.binders.rabbitmq import (
    RabbitStream,
    RabbitTransport,
    exchange_of,
    lane_key,
    queues_of,
)
from kassa.messaging.members import GONE_S, Member, share
from kassa.messaging.model import Ack, Arrival, Confirmed, Failed, Packet, Receipt, Unknown
from kassa.messaging.relay import send_surely
from kassa.messaging.supplied import CRASHES_MAX, CREDIT
from kassa.messaging.topology import EVENT_BATCHES, EVENTS, PAYMENT_ORDERS, Topic, lane
from servers import RabbitMQ

pytestmark = pytest.mark.needs("rabbitmq")

DEADLINE_S = 60.0
DELETIONS_MAX = 10


@pytest.fixture(scope="module")
def own_server() -> Iterator[RabbitMQ]:
    """One that may be killed."""
    with embedded.temporary_directory("kassa-rabbitmq-") as directory:
        server = RabbitMQ(directory / "rabbitmq").start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
async def transport(rabbitmq: RabbitMQ, database_url: str) -> AsyncIterator[RabbitTransport]:
    async with open_transport(rabbitmq.url, database_url) as opened:
        yield opened


@asynccontextmanager
async def stranger(url: str) -> AsyncIterator[AbstractChannel]:
    """Somebody else's channel, who may do anything."""
    async with aiormq.connect(url) as connection:
        yield await connection.channel()


async def ready(transport: RabbitTransport) -> Topic:
    """A topic that is there."""
    topic = new_topic()
    await transport.provision([topic], verify_only=False)
    return topic


async def send(transport: RabbitTransport, topic: Topic, *packets: Packet) -> list[Receipt]:
    return await transport.send(topic, packets, deadline_s=DEADLINE_S, must_arrive=True)


async def take(stream: RabbitStream, count: int) -> list[Arrival]:
    """At least so many, however they come."""
    found: list[Arrival] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            try:
                found += await stream.receive(100, 60)
            except BrokerUnreachable:
                await asyncio.sleep(0.05)
    return found


def ids(arrivals: list[Arrival]) -> list[str]:
    return [arrival.packet.id for arrival in arrivals]


async def until_depth(transport: RabbitTransport, topic: Topic, expected: int) -> None:
    """Acknowledgements have no answer."""

    async def is_there() -> bool:
        return await transport.depth(topic, "shop") == expected

    await until(is_there)


def key_of(number: int, lanes: int = 8) -> str:
    """A key that falls into a lane."""
    return next(f"k{one}" for one in range(1000) if lane(f"k{one}", lanes) == number)


# What travels


async def test_headers_come_back_as_they_were(transport: RabbitTransport) -> None:
    """Also those that the broker itself would read, or that have a place of their own in AMQP."""
    topic = await ready(transport)
    headers = {
        "content-type": "text/plain", "correlation-id": "", "reply-to": "somewhere", "content-encoding": "identity",
        "ce-type": "order.made", "ce-id": "1-2-3", "CC": "audit", "BCC": "hidden", "kassa.x": "1", "ü": "ö", "empty": "",
    }  # fmt: skip

    assert await send(transport, topic, Packet("r-1", "k", b"\x00\xff", headers)) == [Confirmed()]

    (arrival,) = await take(await transport.subscribe(topic, "shop"), 1)
    assert arrival.packet == Packet("r-1", "", b"\x00\xff", headers)
    assert arrival.redeliveries == 0
    assert arrival.sent_at is not None


async def test_large_packet_travels_in_many_frames(transport: RabbitTransport) -> None:
    topic = await ready(transport)
    body = Random(1).randbytes(1_000_000)

    assert await send(transport, topic, packet("r-1", body=body), packet("r-2", body=b"")) == [Confirmed()] * 2

    arrivals = await take(await transport.subscribe(topic, "shop"), 2)
    assert {arrival.packet.id: arrival.packet.body for arrival in arrivals} == {"r-1": body, "r-2": b""}


@pytest.mark.parametrize(
    "bad",
    [
        packet("r-2", content_type="x" * 256),
        Packet("r-2", "", b"{}", {"x" * 200: "name"}),
        packet("r-2", large="x" * 200_000),
    ],
    ids=["long property", "long name", "large headers"],
)
async def test_what_amqp_cannot_say_fails_alone(transport: RabbitTransport, bad: Packet) -> None:
    topic = await ready(transport)

    first, second, third = await send(transport, topic, packet("r-1"), bad, packet("r-3"))

    assert first == third == Confirmed()
    assert isinstance(second, Failed) and not second.is_retryable
    assert sorted(ids(await take(await transport.subscribe(topic, "shop"), 2))) == ["r-1", "r-3"]


async def test_sender_decides_the_lane(transport: RabbitTransport, rabbitmq: RabbitMQ) -> None:
    topic = await ready(transport)
    envelopes = topic._replace(envelopes=True)

    await send(transport, topic, packet("r-1", key="wallet-1"))
    await send(transport, envelopes, packet("r-2", key="5"))

    async with stranger(rabbitmq.url) as channel:
        full = {
            number
            for number, queue in enumerate(queues_of(topic, "shop"))
            if (await channel.queue_declare(queue, passive=True)).message_count
        }
    assert full == {lane("wallet-1", 8), 5}


async def test_foreign_message_is_received_with_whatever_it_has(transport: RabbitTransport, rabbitmq: RabbitMQ) -> None:
    topic = await ready(transport)
    headers: dict[str, Any] = {
        "n": 7,
        "on": True,
        "list": ["a", 1],
        "raw": bytearray(b"\xff"),
        "cloudEvents_type": "shop.made",
    }

    async with stranger(rabbitmq.url) as channel:
        await channel.basic_publish(
            b"hello", exchange=topic.name, routing_key=lane_key(0), properties=spec.Basic.Properties(headers=headers)
        )

    (arrival,) = await take(await transport.subscribe(topic, "shop"), 1)
    expected = {"n": "7", "on": "true", "list": '["a",1]', "raw": "�", "ce-type": "shop.made"}
    assert arrival.packet == Packet(arrival.packet.id, "", b"hello", expected)
    assert arrival.sent_at is None


async def test_program_that_publishes_as_the_reference_says_is_received(rabbitmq: RabbitMQ, database_url: str) -> None:
    """The program of docs/reference/queues.md, as it is written there."""
    place = await asyncio.to_thread(rabbitmq.virtual_host, f"place-{new_id()[-12:]}")
    topic = Topic("shop.mails", ("mailer",), "Mails of a shop.")
    async with open_bench(at_once(place), database_url, topic) as bench:
        await run_program(program_of_the_reference(), place)
        await run_program(program_of_the_reference(), place)
        subscription = await bench.binder.subscribe(topic.name, "mailer")
        one, again = [delivery.record for delivery in await collect(subscription, 2)]
        await subscription.close(1)

        assert (one.key, json.loads(one.body)) == ("order-17", {"to": "ann@example.com"})
        assert one.headers["content-type"] == "application/json"
        assert one.id == again.id and one.id.startswith("mail-17")


async def test_program_of_the_reference_is_told_that_nobody_receives(rabbitmq: RabbitMQ) -> None:
    place = await asyncio.to_thread(rabbitmq.virtual_host, f"place-{new_id()[-12:]}")
    async with stranger(place) as channel:
        await channel.exchange_declare("shop.mails", exchange_type="topic", durable=True)

    with pytest.raises(AssertionError, match="UnroutableError"):
        await run_program(program_of_the_reference(), place)


def program_of_the_reference() -> str:
    page = (Path(__file__).parents[2] / "docs/reference/queues.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return str(program)


async def run_program(program: str, *arguments: str) -> None:
    """Fails with what it says when it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 0, said.decode()


@pytest.mark.parametrize("first", range(5))
async def test_garbage_ends_nothing(transport: RabbitTransport, rabbitmq: RabbitMQ, first: int) -> None:
    """Bytes that no client can decode, in every place that has text, a date beyond all calendars, lists in lists in lists; each
    of them may be what shows that there is such a thing."""
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")

    await asyncio.to_thread(publish_garbage, rabbitmq.url, topic.name, first)
    await send(transport, topic, packet("r-1", key=key_of(0)))

    seen: list[Arrival] = []
    while not seen or seen[-1].packet.id != "r-1":
        arrivals = await take(stream, 1)
        assert await stream.settle(arrivals) == [True] * len(arrivals)
        seen += arrivals
    expected = [b"garbage %d" % ((first + number) % 5) for number in range(5)]
    assert [arrival.packet.body for arrival in seen] == [*expected, b"{}"]


def test_header_that_is_nested_too_deeply_ends_nothing() -> None:
    assert amqp.text_of(nested(100_000)) == "nested too deeply"


def publish_garbage(url: str, exchange: str, first: int) -> None:
    """With a client that sends what it is told to; five messages to the first lane."""
    import pika

    key = lane_key(0)
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    # All of it is in the queue, in order, before anybody sends something else.
    channel.confirm_delivery()
    garbage = [
        (key, pika.BasicProperties(content_type=BadText("text/plain"))),
        (key, pika.BasicProperties(headers={BadText("header-name"): "x"})),
        (key, pika.BasicProperties(timestamp=2**62)),
        (BadText("routing-key"), pika.BasicProperties(headers={"CC": [key]})),
        (key, pika.BasicProperties(headers={"deep": nested(600)})),
    ]
    for number in range(first, first + len(garbage)):
        routing_key, properties = garbage[number % len(garbage)]
        channel.basic_publish(exchange, routing_key, b"garbage %d" % (number % len(garbage)), properties)
    connection.close()


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class BadText(str):
    """A text that is sent in an encoding that nobody expects."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"\xff\xfe" + super().encode(encoding, errors)[2:]


# Addresses


async def test_reply_to_a_queue_that_is_gone_has_failed(transport: RabbitTransport) -> None:
    (receipt,) = await transport.reply("amq.gen-nobody", [packet("r-1")], deadline_s=DEADLINE_S)

    assert isinstance(receipt, Failed) and not receipt.is_retryable


async def test_group_without_queues_is_a_failure_although_the_topic_is_there(transport: RabbitTransport) -> None:
    topic = new_topic()
    await transport.provision([topic._replace(groups=())], verify_only=False)

    (receipt,) = await send(transport, topic, packet("r-1"))

    assert isinstance(receipt, Failed) and not receipt.is_retryable
    nobody_must = await transport.send(topic, [packet("r-2")], deadline_s=DEADLINE_S, must_arrive=False)
    assert nobody_must == [Confirmed()]


async def test_message_with_a_long_id_is_told_from_the_others_when_it_is_returned(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str
) -> None:
    """AMQP has no place for an id of more than 255 bytes, and says no number with what it returns."""
    topic = await ready(transport)
    async with stranger(rabbitmq.url) as channel:
        await channel.queue_unbind(queues_of(topic, "shop")[0], topic.name, lane_key(0))
    packets = [packet(id * 300, key=key_of(lane), kassa_id=id * 300) for id, lane in (("a", 1), ("b", 0), ("c", 1))]

    async with open_transport(rabbitmq.url, database_url) as sender:
        first, second, third = await send(sender, topic, *packets)

    assert first == third == Confirmed()
    assert isinstance(second, Failed) and not second.is_retryable


async def test_missing_topic_ends_nothing_for_the_others(transport: RabbitTransport) -> None:
    topic = await ready(transport)

    results = await asyncio.gather(
        *(send(transport, topic, packet(f"r-{number}")) for number in range(50)),
        *(send(transport, new_topic(), packet("lost")) for _ in range(5)),
    )

    assert [receipts for receipts in results[:50] if receipts != [Confirmed()]] == []
    assert all(isinstance(receipt, Failed) and not receipt.is_retryable for (receipt,) in results[50:])


# Declarations


async def test_other_declaration_is_refused_with_the_remedy(transport: RabbitTransport, rabbitmq: RabbitMQ) -> None:
    topic = new_topic()._replace(declaration="durable", exchange=f"payment-{new_id()[-12:]}")
    await transport.provision([topic], verify_only=False)

    with pytest.raises(QueueMismatch, match=r"durable.*declaration to `durable`, or to `passive`"):
        await transport.provision([topic._replace(declaration="plain")], verify_only=False)
    assert "KASSA_ORDER_QUEUE=durable, or KASSA_ORDER_QUEUE=passive" in ours._remedy(PAYMENT_ORDERS)
    assert await transport.provision([topic._replace(declaration="passive")], verify_only=False) == []


async def test_queue_of_another_form_in_our_place_is_named(transport: RabbitTransport, rabbitmq: RabbitMQ) -> None:
    topic = new_topic()
    async with stranger(rabbitmq.url) as channel:
        await channel.queue_declare(queues_of(topic, "shop")[3], durable=True)

    with pytest.raises(QueueMismatch, match=r"shop\.3"):
        await transport.provision([topic], verify_only=False)


async def test_verifying_needs_no_right_to_create(
    rabbitmq: RabbitMQ, transport: RabbitTransport, database_url: str
) -> None:
    topic = await ready(transport)
    name = f"reader_{new_id()[-12:]}"
    await asyncio.to_thread(
        rabbitmq.evaluate,
        f'rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"secret">>, <<"kassa">>), '
        f'rabbit_auth_backend_internal:set_permissions(<<"{name}">>, <<"/">>, <<"^$">>, <<".*">>, <<".*">>, <<"kassa">>)',
    )

    async with open_transport(f"amqp://{name}:secret@127.0.0.1:{rabbitmq.port('amqp')}/", database_url) as reader:
        assert await reader.provision([topic], verify_only=True) == []
        missing = new_topic()
        assert await reader.provision([missing], verify_only=True) == [(missing.name, "shop")]
        with pytest.raises(SettingInvalid, match="ACCESS_REFUSED"):
            await reader.provision([missing], verify_only=False)
        assert await send(reader, topic, packet("r-1")) == [Confirmed()]
        assert ids(await take(await reader.subscribe(topic, "shop"), 1)) == ["r-1"]


# Security


async def test_tls_with_password(rabbitmq: RabbitMQ, database_url: str) -> None:
    url = f"{rabbitmq.tls_url}?ca={rabbitmq.certificates.authority}"
    async with open_transport(url, database_url) as transport:
        topic = await ready(transport)
        assert await send(transport, topic, packet("r-1")) == [Confirmed()]
        assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["r-1"]


async def test_wrong_password_is_told_without_it(rabbitmq: RabbitMQ, database_url: str) -> None:
    url = f"{rabbitmq.tls_url}?ca={rabbitmq.certificates.authority}".replace(rabbitmq.password, "guessed")

    with pytest.raises(SettingInvalid, match=r"refuses us.*ACCESS_REFUSED") as told:
        async with open_transport(url, database_url):
            pass
    assert "guessed" not in str(told.value)


async def test_server_of_an_unknown_authority_is_not_trusted(rabbitmq: RabbitMQ, database_url: str) -> None:
    with pytest.raises(SettingInvalid, match="not trusted"):
        async with open_transport(rabbitmq.tls_url, database_url):
            pass


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:hidden@h/?colour=red",
        "amqp://u:hidden@h/?heartbeat=soon",
        "amqp://u:hidden@h/?new_queue_pause=61",
        "amqp://u:hidden@h/?new_queue_pause=nan",
        "amqps://u:hidden@h/?ca=/nowhere",
        "amqps://u:hidden@h/?verify=maybe",
        "amqp://u:hidden@h/?auth=kerberos",
        "amqp://u:hidden@h:port/",
    ],
)
def test_setting_that_nobody_understands_is_refused(url: str) -> None:
    with pytest.raises(SettingInvalid) as told:
        read_url(url)
    assert "hidden" not in str(told.value)


async def test_virtual_host_that_is_not_there_is_named(rabbitmq: RabbitMQ, database_url: str) -> None:
    with pytest.raises(BrokerUnreachable, match="virtual host nowhere"):
        async with open_transport(f"{rabbitmq.url}nowhere", database_url):
            pass


async def test_way_to_log_in_that_it_has_not_is_told(rabbitmq: RabbitMQ, database_url: str) -> None:
    with pytest.raises(SettingInvalid, match="PLAIN"):
        async with open_transport(f"{rabbitmq.url}?auth=external", database_url):
            pass


async def test_broker_that_is_not_there_is_unreachable(database_url: str) -> None:
    with pytest.raises(BrokerUnreachable):
        async with open_transport("amqp://127.0.0.1:1/", database_url):
            pass


# Consumers


async def test_consumers_of_several_processes_share_the_lanes(rabbitmq: RabbitMQ, database_url: str) -> None:
    async with open_transport(rabbitmq.url, database_url) as one, open_transport(rabbitmq.url, database_url) as two:
        topic = await ready(one)
        streams = [await one.subscribe(topic, "shop"), await two.subscribe(topic, "shop")]

        await until_shared(one, topic, streams)
        await streams[0].close()
        await send(one, topic, *(packet(f"r-{number}", key=key_of(number)) for number in range(8)))
        await see(streams[1], *(f"r-{number}" for number in range(8)))


async def until_shared(transport: RabbitTransport, topic: Topic, streams: list[RabbitStream]) -> None:
    """Returns once both get something."""
    got = [0, 0]
    async with asyncio.timeout(GONE_S + 60):
        while 0 in got:
            await send(transport, topic, *(packet(new_id(), key=key_of(number)) for number in range(8)))
            for place, stream in enumerate(streams):
                arrivals = await stream.receive(100, 0.1)
                got[place] += len(arrivals)
                await stream.settle(arrivals)


async def test_lanes_of_a_process_that_was_cut_off_go_to_the_others(rabbitmq: RabbitMQ, database_url: str) -> None:
    """It says nothing any more and the broker sees its connection end; nobody closed anything."""
    cutter = Cutter(rabbitmq.url)
    through = await cutter.start()
    async with open_transport(rabbitmq.url, database_url) as one, open_transport(through, database_url) as two:
        topic = await ready(one)
        streams = [await one.subscribe(topic, "shop"), await two.subscribe(topic, "shop")]
        await until_shared(one, topic, streams)

        cutter.is_refusing = True
        await cutter.stop()
        await send(one, topic, *(packet(f"r-{number}", key=key_of(number)) for number in range(8)))
        await see(streams[0], *(f"r-{number}" for number in range(8)))


async def test_close_that_was_cancelled_leaves_its_lanes_all_the_same(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str
) -> None:
    """Channels that stay open keep what they were given, and the lanes of a single active consumer, from everybody else."""
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    await send(transport, topic, *(packet(f"r-{number}", key=key_of(number)) for number in range(8)))
    await take(stream, 8)

    closing = asyncio.create_task(stream.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    await stream.close()

    async with open_transport(rabbitmq.url, database_url) as other:
        await see(await other.subscribe(topic, "shop"), *(f"r-{number}" for number in range(8)))


async def test_shares_stay_when_the_database_is_away(transport: RabbitTransport) -> None:
    topic = await ready(transport)
    streams = [await transport.subscribe(topic, "shop") for _ in range(2)]
    await until_shared(transport, topic, streams)

    await transport._members._pool.close()
    await transport.announce()
    await until_shared(transport, topic, streams)

    assert [stream._wanted for stream in streams] == [{0, 1, 2, 3}, {4, 5, 6, 7}]


async def test_lane_that_nobody_consumes_is_adopted_until_its_owner_comes(
    transport: RabbitTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list says that somebody is there, but he is not at his queues."""
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    monkeypatch.setattr(ours, "ORPHANS_EVERY", 1)
    ghost = Member(stream.place, "zz-ghost", 0)

    async def is_adopted() -> bool:
        await transport._members.announce([ghost])
        await send(transport, topic, packet("r-1", key=key_of(7)))
        return bool(stream._wanted == {0, 1, 2, 3} and await stream.receive(100, 0.1))

    await until(is_adopted)
    owner = await transport.subscribe(topic, "shop")
    async with asyncio.timeout(60):
        while not await owner.receive(100, 0.1):
            await transport._members.announce([ghost])
            await send(transport, topic, *(packet("r-2", key=key_of(number)) for number in range(8)))
            await stream.settle(await stream.receive(100, 0.1))


@pytest.mark.parametrize("members", range(1, 12))
def test_shares_cover_every_lane_once(members: int) -> None:
    names = [f"m{number:02}" for number in range(members)]

    shares = [share(8, names, name) for name in names]

    assert sorted(number for one in shares for number in one) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


async def test_slow_consumer_fetches_no_more_than_its_window(transport: RabbitTransport) -> None:
    topic = (await ready(transport))._replace(lanes=1)
    stream = await transport.subscribe(topic, "shop")
    key = key_of(0)
    for start in range(0, 2000, 500):
        await send(transport, topic, *(packet(f"r-{number}", key=key) for number in range(start, start + 500)))

    first = await take(stream, 100)

    assert stream.in_hand() <= len(first) + CREDIT < 2000
    assert await transport.depth(topic, "shop") == 2000


def held_bytes(stream: RabbitStream) -> int:
    """In bodies that nobody has asked for yet."""
    return sum(len(parcel.body) for one in stream._lanes.values() for parcel in one.waiting)


async def holds(stream: RabbitStream, size: int) -> bool:
    return held_bytes(stream) == size


async def publish(url: str, topic: Topic, sizes: Iterable[int]) -> list[str]:
    """A stranger's messages, all to the first lane; their names."""
    names = []
    async with stranger(url) as channel:
        routing_key = lane_key(0) if topic.declaration == "kassa" else topic.name
        for number, size in enumerate(sizes):
            names.append(f"r-{number}")
            properties = spec.Basic.Properties(message_id=names[-1])
            await channel.basic_publish(
                bytes(size), exchange=exchange_of(topic), routing_key=routing_key, properties=properties
            )
    return names


@pytest.mark.parametrize("declaration", ["kassa", "durable"])
async def test_strangers_large_messages_are_held_by_their_bytes(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch, declaration: str
) -> None:
    """RabbitMQ would send as many as the window says. Those that are handed out meanwhile are settled as ever."""
    monkeypatch.setattr(ours, "HELD_BYTES", 1_000_000)
    topic = new_topic()._replace(lanes=1) if declaration == "kassa" else SINGLE._replace(name=new_id())
    await transport.provision([topic], verify_only=False)
    names = await publish(rabbitmq.url, topic, [300_000] * 60)

    with capture_logs() as logs:
        stream = await transport.subscribe(topic, topic.groups[0])
        arrivals = await take(stream, 1)
        most = 0
        for _ in range(200):
            most = max(most, held_bytes(stream))
            await asyncio.sleep(0.01)
        assert most <= 1_300_000
        settled = await settled_in_order(stream, arrivals, len(names))

    assert [arrival.packet.id for arrival in settled] == names
    assert max(arrival.redeliveries or 0 for arrival in settled) <= 2
    assert len([one for one in logs if one["event"] == "rabbitmq.window"]) <= 2


async def settled_in_order(stream: RabbitStream, arrivals: list[Arrival], count: int) -> list[Arrival]:
    """Takes and settles until so many were, beginning with these; those that were settled, each once."""
    settled: list[Arrival] = []
    async with asyncio.timeout(DEADLINE_S):
        while True:
            results = await stream.settle(arrivals)
            settled += [one for one, is_settled in zip(arrivals, results, strict=True) if is_settled]
            if len(settled) >= count:
                return settled
            arrivals = await stream.receive(20, DEADLINE_S)


async def test_what_is_in_hand_when_a_lane_is_given_back_is_settled_as_ever(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "HELD_BYTES", 1_000_000)
    monkeypatch.setattr(ours, "HANDOVER_S", DEADLINE_S)
    topic = new_topic()._replace(lanes=1)
    await transport.provision([topic], verify_only=False)
    stream = await transport.subscribe(topic, "shop")
    first = [(await publish(rabbitmq.url, topic, [10]))[0]]
    arrivals = await take(stream, 1)

    names = await publish(rabbitmq.url, topic, [300_000] * 20)
    await until(partial(is_given_back, stream))
    await until_depth(transport, topic, 1 + len(names))
    assert await stream.settle(arrivals) == [True]

    settled = await settled_in_order(stream, [], len(names))
    assert [arrival.packet.id for arrival in arrivals + settled] == first + names


async def is_given_back(stream: RabbitStream) -> bool:
    return held_bytes(stream) == 0 and stream.in_hand() > 1


async def test_messages_larger_than_all_that_may_be_held_come_one_by_one(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are given back once, not each time."""
    monkeypatch.setattr(ours, "HELD_BYTES", 100_000)
    topic = await ready(transport)
    names = await publish(rabbitmq.url, topic, [200_000] * 30)

    with capture_logs() as logs:
        stream = await transport.subscribe(topic, "shop")
        await until(partial(holds, stream, 200_000))
        # Nothing more comes, nor is it given back again: for as long as a lane takes to begin anew, and some more.
        await asyncio.sleep(1)
        assert await holds(stream, 200_000)
        settled = await settled_in_order(stream, [], len(names))

    assert [arrival.packet.id for arrival in settled] == names
    assert [one["packets"] for one in logs if one["event"] == "rabbitmq.window"] == [1]


async def test_lane_that_was_narrow_is_wide_again_once_its_messages_are_small(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bursts of large ones among small ones: nothing is given back so often that it would look as if it ended its consumers."""
    monkeypatch.setattr(ours, "HELD_BYTES", 1_000_000)
    topic = new_topic()._replace(lanes=1)
    await transport.provision([topic], verify_only=False)
    random = Random(20261130)
    sizes = [size for _ in range(4) for size in [400_000] * 5 + [10] * random.randint(1, 400)] + [10] * 600
    names = await publish(rabbitmq.url, topic, sizes)

    with capture_logs() as logs:
        stream = await transport.subscribe(topic, "shop")
        settled = await settled_in_order(stream, [], len(names))
        (one,) = stream._lanes.values()

    assert [arrival.packet.id for arrival in settled] == names
    assert max(arrival.redeliveries or 0 for arrival in settled) < CRASHES_MAX
    assert one.window == one.window_full == 2 * CREDIT
    assert 2 <= len([one for one in logs if one["event"] == "rabbitmq.window"]) <= 20


async def test_settling_out_of_order_settles_no_more_than_that(transport: RabbitTransport) -> None:
    topic = await ready(transport)
    key = key_of(2)
    await send(transport, topic, *(packet(f"r-{number}", key=key) for number in range(6)))
    stream = await transport.subscribe(topic, "shop")
    arrivals = await take(stream, 6)

    assert await stream.settle([arrivals[1], arrivals[4]]) == [True, True]
    assert await stream.settle([arrivals[1], arrivals[0]]) == [False, True]
    await stream.close()

    again = await take(await transport.subscribe(topic, "shop"), 3)
    assert ids(again) == ["r-2", "r-3", "r-5"]
    assert [arrival.redeliveries for arrival in again] == [1, 1, 1]


async def test_packet_that_is_never_settled_falls_into_the_net(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A net under consumers that die before they can count: what ends them again and again goes aside."""
    monkeypatch.setattr(ours, "DELIVERIES_MAX", 2)
    topic = await ready(transport)
    await send(transport, topic, packet("r-1", key="k"))

    counts = []
    for _ in range(3):
        stream = await transport.subscribe(topic, "shop")
        counts += [arrival.redeliveries for arrival in await take(stream, 1)]
        await stream.close()

    async def is_aside() -> bool:
        async with stranger(rabbitmq.url) as channel:
            return (await channel.queue_declare(f"{topic.name}:shop.dead", passive=True)).message_count == 1

    await until(is_aside)
    assert counts == [0, 1, 2]
    await until_depth(transport, topic, 0)


async def test_started_again_it_gives_the_same_in_order_and_the_broker_counts_nothing(
    transport: RabbitTransport,
) -> None:
    """While our own database is away everything is taken again each second; it must not use up the delivery limit."""
    topic = await ready(transport)
    key = key_of(2)
    await send(transport, topic, *(packet(f"r-{number}", key=key) for number in range(4)))
    stream = await transport.subscribe(topic, "shop")
    stale = await take(stream, 4)
    await stream.settle(stale[:1])

    await stream.restart()

    assert await stream.settle(stale[1:]) == [False] * 3
    again = await take(stream, 3)
    assert [(arrival.packet.id, arrival.redeliveries) for arrival in again] == [("r-1", 0), ("r-2", 0), ("r-3", 0)]
    assert await stream.settle(again) == [True] * 3
    await until_depth(transport, topic, 0)


async def test_who_asks_again_and_again_through_an_outage_is_told_the_same_each_time(
    own_server: RabbitMQ, database_url: str
) -> None:
    """Not a longer story each time."""
    async with open_transport(own_server.url, database_url) as transport:
        stream = await transport.subscribe(await ready(transport), "shop")
        await killed(own_server)
        try:
            lengths = [await told(stream) for _ in range(20)]
        finally:
            await asyncio.to_thread(own_server.start)

    assert len(set(lengths)) == 1


async def told(stream: RabbitStream) -> int:
    """The length of the traceback."""
    with pytest.raises(BrokerUnreachable) as raised:
        await stream.receive(1, DEADLINE_S)
    return len(list(traceback.walk_tb(raised.value.__traceback__)))


async def test_consumer_goes_on_after_its_queues_were_deleted(transport: RabbitTransport, rabbitmq: RabbitMQ) -> None:
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    await send(transport, topic, packet("r-1", key=key_of(1)))
    (stale,) = await take(stream, 1)

    async with stranger(rabbitmq.url) as channel:
        for queue in queues_of(topic, "shop"):
            await channel.queue_delete(queue)

    async def is_made_again() -> bool:
        receipts = await send(transport, topic, *(packet(f"r-{number}", key=key_of(number)) for number in range(8)))
        return receipts == [Confirmed()] * 8

    await until(is_made_again)
    assert await stream.settle([stale]) == [False]
    await see(stream, *(f"r-{number}" for number in range(8)))


async def test_queues_of_a_group_that_nobody_consumes_are_made_again_while_others_get_everything(
    rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message is confirmed, since the other group has it; whoever sends hears nothing of those that are missing."""
    monkeypatch.setattr(ours, "MISSING_S", 0.5)
    topic = new_topic()._replace(groups=("shop", "books"))
    deleted = queues_of(topic, "books")[:3]
    async with open_transport(rabbitmq.url, database_url) as transport, stranger(rabbitmq.url) as channel:
        await transport.provision([topic], verify_only=False)
        await transport.subscribe(topic, "shop")
        with capture_logs() as logs:
            for queue in deleted:
                await channel.queue_delete(queue)
            sent = await send(transport, topic, packet("r-1", key=key_of(0)))
            await until(partial(is_told, logs, "rabbitmq.queue_made_again"))

        assert sent == [Confirmed()]
        (said,) = [one for one in logs if one["event"] == "rabbitmq.queue_made_again"]
        assert (said["log_level"], said["queue"]) == ("warning", deleted)
        assert datetime.now(UTC) - timedelta(minutes=5) < since_in(said["missing"]) < datetime.now(UTC)
        await send(transport, topic, packet("r-2", key=key_of(0)))
        await see(await transport.subscribe(topic, "books"), "r-2")


async def is_told(logs: Sequence[Mapping[str, Any]], event: str, times: int = 1) -> bool:
    return len([one for one in logs if one["event"] == event]) >= times


def since_in(text: str) -> datetime:
    """Since when something is missing."""
    return datetime.fromisoformat(text.rpartition(" ")[2])


async def test_missing_queue_of_events_is_told_with_the_command_that_sends_them_again(
    rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "MISSING_S", 0.5)
    place = await asyncio.to_thread(rabbitmq.virtual_host, f"place-{new_id()[-12:]}")
    topic = EVENT_BATCHES._replace(groups=("books",))
    async with open_transport(place, database_url) as transport, stranger(place) as channel:
        await transport.provision([topic], verify_only=False)
        with capture_logs() as logs:
            await channel.queue_delete(queues_of(topic, "books")[0])
            await until(partial(is_told, logs, "rabbitmq.queue_made_again"))

    (said,) = [one for one in logs if one["event"] == "rabbitmq.queue_made_again"]
    since = said["missing"].rpartition(" ")[2]
    assert said["remedy"].startswith(f"kassa queue replay relay:BROKER:kassa.events.batch --since {since}")


async def test_queue_that_others_made_and_that_nobody_consumes_is_only_missed(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, and again when it is deleted again."""
    monkeypatch.setattr(ours, "MISSING_S", 0.2)
    topic = await ready(transport)
    (deleted, *_) = queues_of(topic, "shop")
    async with open_transport(rabbitmq.url, database_url) as looking, stranger(rabbitmq.url) as channel:
        assert await looking.provision([topic], verify_only=True) == []
        with capture_logs() as logs:
            for times in (1, 2):
                await channel.queue_delete(deleted)
                await until(partial(is_told, logs, "rabbitmq.queue_missing", times))
                # Long enough for some more looks.
                await asyncio.sleep(1.5)
                said = [one for one in logs if one["event"].startswith("rabbitmq.queue_")]
                assert [(one["event"], one["queue"]) for one in said] == [("rabbitmq.queue_missing", [deleted])] * times
                await transport.provision([topic], verify_only=False)
                await until(partial(is_whole, looking))


async def test_events_that_somebody_purged_while_nobody_received_are_told_with_the_command_that_sends_them_again(
    rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "MISSING_S", 0.3)
    place = await asyncio.to_thread(rabbitmq.virtual_host, f"place-{new_id()[-12:]}")
    topic = EVENTS._replace(groups=("books",), lanes=1)
    (queue,) = queues_of(topic, "books")
    async with open_transport(place, database_url) as transport, stranger(place) as channel:
        await transport.provision([topic], verify_only=False)
        await until(partial(is_seen, transport, topic, waiting=0, twice=True))
        sent_at = datetime.now(UTC)
        await send(transport, topic, *(packet(f"r-{number}") for number in range(20)))
        await until(partial(is_seen, transport, topic, waiting=20))
        with capture_logs() as logs:
            await channel.queue_purge(queue)
            await until(partial(is_told, logs, "rabbitmq.packets_vanished"))

    (said,) = [one for one in logs if one["event"] == "rabbitmq.packets_vanished"]
    assert (said["log_level"], said["packets"], said["queue"]) == ("warning", 20, transport.place(topic, "books"))
    command, _, since = said["remedy"].partition(",")[0].rpartition(" ")
    assert command == "kassa queue replay relay:BROKER:kassa.events --since"
    assert sent_at - timedelta(hours=1) < datetime.fromisoformat(since) < sent_at
    assert transport._meters.passage("kassa.events", "books").vanished == 20


async def test_backlog_that_is_received_is_not_told_as_purged_and_what_is_purged_of_it_is(
    rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "MISSING_S", 0.05)
    topic = new_topic()._replace(lanes=1)
    async with open_transport(rabbitmq.url, database_url) as transport, stranger(rabbitmq.url) as channel:
        await transport.provision([topic], verify_only=False)
        for start in range(0, 6000, 500):
            await send(transport, topic, *(packet(f"r-{number}") for number in range(start, start + 500)))
        stream = await transport.subscribe(topic, "shop")
        with capture_logs() as logs:
            for _ in range(20):
                await stream.settle(await take(stream, 100))
                # Time for a look or two, in the middle of what comes.
                await asyncio.sleep(0.05)
            assert not await is_told(logs, "rabbitmq.packets_vanished")
            purged = await channel.queue_purge(queues_of(topic, "shop")[0])
            await until(partial(is_told, logs, "rabbitmq.packets_vanished"))

    (said,) = [one for one in logs if one["event"] == "rabbitmq.packets_vanished"]
    assert isinstance(purged, spec.Queue.PurgeOk) and purged.message_count is not None
    assert purged.message_count - 2 * CREDIT <= said["packets"] <= purged.message_count


async def is_seen(transport: RabbitTransport, topic: Topic, waiting: int, *, twice: bool = False) -> bool:
    seen = transport._levels._seen.get((topic.name, topic.groups[0]))
    if seen is None or (twice and seen.empty_at is None):
        return False
    return [one.waiting for one in seen.looks] == [waiting]


async def test_consumer_that_waits_for_a_lane_of_another_does_not_tell_that_what_he_receives_was_purged(
    rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ counts one consumer, whoever of the two it is."""
    monkeypatch.setattr(ours, "MISSING_S", 0.05)
    topic = new_topic()._replace(lanes=1)
    async with open_transport(rabbitmq.url, database_url) as one, open_transport(rabbitmq.url, database_url) as another:
        await one.provision([topic], verify_only=False)
        await another.provision([topic], verify_only=False)
        for start in range(0, 6000, 500):
            await send(one, topic, *(packet(f"r-{number}") for number in range(start, start + 500)))
        has_it = await one.subscribe(topic, "shop")
        waits = await another.subscribe(topic, "shop")
        waits._adopted = {0}
        waits.changed.set()
        with capture_logs() as logs:
            for number in range(50):
                await has_it.settle(await take(has_it, 100))
                await asyncio.sleep(0.1 if number % 5 == 0 else 0)
            assert waits._lanes

    assert not await is_told(logs, "rabbitmq.packets_vanished")


async def is_whole(transport: RabbitTransport) -> bool:
    return not transport._missing


async def test_lane_that_the_broker_ends_is_told_with_its_reason(
    transport: RabbitTransport, rabbitmq: RabbitMQ
) -> None:
    """Once; what it had in hand comes again, and somebody may wonder why."""
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    deleted, wrong = queues_of(topic, "shop")[1:3]
    channel_ = stream._lanes[2].channel
    assert channel_ is not None

    with capture_logs() as logs:
        channel_.acknowledge(1000, [])
        async with stranger(rabbitmq.url) as channel:
            await channel.queue_delete(deleted)

        await until(partial(is_told, logs, "rabbitmq.lane_ended", 2))
        await stream.close()

    told_ = {one["queue"]: one["reason"] for one in logs if one["event"] == "rabbitmq.lane_ended"}
    assert told_[deleted] == "the broker cancelled its consumer"
    assert "PRECONDITION_FAILED" in told_[wrong]
    assert len(told_) == len([one for one in logs if one["event"] == "rabbitmq.lane_ended"]) == 2


async def test_deleted_exchange_is_made_again_by_who_sends(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str
) -> None:
    """Also where the groups of the topic have changed since, and others made the queues of the new ones."""
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    both = topic._replace(groups=("shop", "books"))
    async with open_transport(rabbitmq.url, database_url) as others:
        await others.provision([both], verify_only=False)
        books = await others.subscribe(both, "books")
        assert await transport.provision([both], verify_only=True) == []
        assert await send(transport, both, packet("r-1")) == [Confirmed()]

        async with stranger(rabbitmq.url) as channel:
            await channel.exchange_delete(topic.name)

        await until(partial(is_sent, transport, both, "r-2"))
        await see(stream, "r-1", "r-2")
        await see(books, "r-1", "r-2")


async def is_sent(transport: RabbitTransport, topic: Topic, name: str) -> bool:
    """If not, it may be sent again."""
    must_arrive = bool(topic.groups)
    (receipt,) = await transport.send(topic, [packet(name)], deadline_s=DEADLINE_S, must_arrive=must_arrive)
    assert not isinstance(receipt, Failed) or receipt.is_retryable
    return receipt == Confirmed()


async def test_nothing_is_sent_while_another_send_binds_the_groups_of_a_deleted_exchange(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is confirmed when only the first group is bound never comes to the second."""
    monkeypatch.setattr(ours, "BINDING_S", 1.0)
    topic = new_topic()._replace(groups=("shop", "books"))
    await transport.provision([topic], verify_only=False)
    streams = [await transport.subscribe(topic, group) for group in topic.groups]
    async with open_transport(rabbitmq.url, database_url) as sender:
        await sender.provision([topic], verify_only=False)
        declare, is_half, may_go_on = sender.declare, asyncio.Event(), asyncio.Event()

        async def in_two_steps(live: amqp.Live, topic: Topic, group: str) -> None:
            if group == "books":
                is_half.set()
                await may_go_on.wait()
            await declare(live, topic, group)

        monkeypatch.setattr(sender, "declare", in_two_steps)
        async with stranger(rabbitmq.url) as channel:
            await channel.exchange_delete(topic.name)
        at_once = [asyncio.create_task(is_sent(sender, topic, name)) for name in ("r-1", "r-2")]
        await is_half.wait()

        assert not await is_sent(sender, topic, "r-3")
        may_go_on.set()
        assert not any(await asyncio.gather(*at_once))
        for name in ("r-1", "r-2", "r-3"):
            await until(partial(is_sent, sender, topic, name))
    for stream in streams:
        await see(stream, "r-1", "r-2", "r-3")


async def test_exchange_whose_groups_were_bound_in_part_gets_nothing_before_all_are(
    transport: RabbitTransport, monkeypatch: pytest.MonkeyPatch, rabbitmq: RabbitMQ
) -> None:
    """Whoever sends next goes on where the last one failed."""
    monkeypatch.setattr(ours, "BINDING_S", 1.0)
    topic = new_topic()._replace(groups=("shop", "books"))
    await transport.provision([topic], verify_only=False)
    declare, failures = transport.declare, [TimeoutError()]

    async def fails_once(live: amqp.Live, topic: Topic, group: str) -> None:
        if group == "books" and failures:
            raise failures.pop()
        await declare(live, topic, group)

    monkeypatch.setattr(transport, "declare", fails_once)
    async with stranger(rabbitmq.url) as channel:
        await channel.exchange_delete(topic.name)
    assert isinstance((await send(transport, topic, packet("r-1")))[0], Failed)
    assert not failures

    await until(partial(is_sent, transport, topic, "r-2"))
    for group in topic.groups:
        assert "r-2" in ids(await take(await transport.subscribe(topic, group), 1))


async def test_exchange_that_somebody_else_made_again_waits_for_its_other_groups(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He may know some of them only."""
    monkeypatch.setattr(ours, "BINDING_S", 1.0)
    topic = await ready(transport)
    assert await send(transport, topic, packet("r-1")) == [Confirmed()]

    async with stranger(rabbitmq.url) as channel:
        await channel.exchange_delete(topic.name)
        (lost,) = await send(transport, topic, packet("r-2"))
        await channel.exchange_declare(topic.name, exchange_type="topic", durable=True)
        for number, queue in enumerate(queues_of(topic, "shop")):
            await channel.queue_bind(queue, topic.name, lane_key(number))

    assert isinstance(lost, Unknown)
    assert not await is_sent(transport, topic, "r-3")
    await until(partial(is_sent, transport, topic, "r-3"))


async def test_channel_that_is_closed_in_the_middle_of_something_ends_no_other(transport: RabbitTransport) -> None:
    """Whoever is cancelled while he closes a channel leaves the connection, which others use, as it was."""
    random = Random(7)
    live = await transport.receiving.live()
    clock = asyncio.get_running_loop().time

    took_s = 0.0
    for number in range(150):
        began = clock()
        asking = asyncio.create_task(amqp.ask(live, lambda channel: channel.queue_declare(exclusive=True)))
        if number % 10 == 0:
            await asking
            took_s = clock() - began
        else:
            await asyncio.sleep(random.random() * took_s)
        asking.cancel()
        await asyncio.wait([asking], timeout=60)
        assert asking.done()

    await amqp.ask(live, lambda channel: channel.exchange_declare("amq.topic", passive=True))
    assert await transport.receiving.live() is live


@pytest.mark.parametrize(
    "known", [pytest.param((), marks=pytest.mark.long), ("books",)], ids=["no group", "another group"]
)
async def test_consumers_that_the_sender_does_not_know_get_all_after_their_exchange_was_deleted(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str, known: tuple[str, ...]
) -> None:
    """Their bindings went with it. Until they are back nothing is confirmed, since the broker would throw it away."""
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    async with open_transport(rabbitmq.url, database_url) as sender:
        theirs = topic._replace(groups=known)
        await sender.provision([theirs], verify_only=False)
        refused: list[str] = []
        names: list[str] = []

        async def is_taken(name: str) -> bool:
            is_confirmed = await is_sent(sender, theirs, name)
            (names if is_confirmed else refused).append(name)
            return is_confirmed

        await until(lambda: is_taken("r-0"))
        for number in range(1, DELETIONS_MAX):
            if refused:
                break
            # On a slow machine the consumers may have their bindings back before anything is sent.
            async with stranger(rabbitmq.url) as channel:
                await channel.exchange_delete(topic.name)
            await until(partial(is_taken, f"r-{number}"))
        await until(lambda: is_taken("last"))

    assert refused
    await see(stream, *names)


async def test_exchange_of_a_single_queue_is_made_again_by_who_receives(
    transport: RabbitTransport, rabbitmq: RabbitMQ
) -> None:
    """Whoever asks need not know how."""
    exchange = new_id()
    topic = Topic(new_topic().name, ("kassa",), "", lanes=1, keyed=False, exchange=exchange, declaration="durable")
    await transport.provision([topic], verify_only=False)
    stream = await transport.subscribe(topic, "kassa")

    async with stranger(rabbitmq.url) as channel:
        await channel.exchange_delete(exchange)

    async def is_asked() -> bool:
        async with stranger(rabbitmq.url) as channel:
            try:
                await channel.basic_publish(b"{}", exchange=exchange, routing_key=topic.name, mandatory=True)
            except aiormq.exceptions.AMQPError:
                return False
        return True

    await until(is_asked, 60)
    assert len(await take(stream, 1)) == 1


async def deleted_exchange(url: str, topic: Topic) -> None:
    async with stranger(url) as channel:
        await channel.exchange_delete(exchange_of(topic))


SINGLE = Topic("", ("kassa",), "", lanes=1, keyed=False, declaration="durable")


@pytest.mark.parametrize("declaration", ["kassa", "durable"])
async def test_deleted_exchange_that_cannot_be_made_again_just_now_is_no_fault_of_the_message(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch, declaration: str
) -> None:
    """The connection to declare over may be away while that to send over is up; the message is sent once it is back."""
    monkeypatch.setattr(ours, "BINDING_S", 0.5)
    topic = new_topic() if declaration == "kassa" else SINGLE._replace(name=new_id(), exchange=new_id())
    await transport.provision([topic], verify_only=False)
    await deleted_exchange(rabbitmq.url, topic)

    async def away() -> amqp.Live:
        raise BrokerUnreachable("away", broker="")

    with monkeypatch.context() as patch:
        patch.setattr(transport.receiving, "live", away)
        assert not await is_sent(transport, topic, "r-1")
        assert not await is_sent(transport, topic, "r-1")

    await until(partial(is_sent, transport, topic, "r-1"))
    await see(await transport.subscribe(topic, topic.groups[0]), "r-1")


async def test_exchange_that_is_deleted_as_soon_as_it_is_made_again_is_no_fault_of_the_message(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a script that somebody runs again and again."""
    topic = SINGLE._replace(name=new_id(), exchange=new_id())
    await transport.provision([topic], verify_only=False)
    await deleted_exchange(rabbitmq.url, topic)
    declare = transport.declare

    async def in_vain(live: amqp.Live, topic: Topic, group: str) -> None:
        await declare(live, topic, group)
        await deleted_exchange(rabbitmq.url, topic)

    with monkeypatch.context() as patch:
        patch.setattr(transport, "declare", in_vain)
        assert not await is_sent(transport, topic, "r-1")

    await until(partial(is_sent, transport, topic, "r-1"))


async def test_queue_of_another_form_is_no_fault_of_the_message_when_its_exchange_is_made_again(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has to delete it, and then all goes on; the first message is told the same as those after it."""
    monkeypatch.setattr(ours, "BINDING_S", 0.5)
    topic = await ready(transport)
    wrong = queues_of(topic, "shop")[3]
    async with stranger(rabbitmq.url) as channel:
        await channel.exchange_delete(topic.name)
        await channel.queue_delete(wrong)
        await channel.queue_declare(wrong)

        assert not await is_sent(transport, topic, "r-1")
        assert not await is_sent(transport, topic, "r-1")

        await channel.queue_delete(wrong)
    await until(partial(is_sent, transport, topic, "r-1"))


async def test_two_sends_that_miss_the_same_exchange_are_both_told_to_come_again(
    transport: RabbitTransport, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second while the first waits for a connection to declare it over."""
    monkeypatch.setattr(ours, "BINDING_S", 0.5)
    topic = await ready(transport)
    await deleted_exchange(rabbitmq.url, topic)
    live, is_waiting, may_go_on = transport.receiving.live, asyncio.Event(), asyncio.Event()

    async def slow() -> amqp.Live:
        is_waiting.set()
        await may_go_on.wait()
        return await live()

    monkeypatch.setattr(transport.receiving, "live", slow)
    first = asyncio.create_task(is_sent(transport, topic, "r-1"))
    await is_waiting.wait()

    try:
        assert not await is_sent(transport, topic, "r-2")
    finally:
        may_go_on.set()
        assert not await first
    for name in ("r-1", "r-2"):
        await until(partial(is_sent, transport, topic, name))


async def test_who_may_not_make_a_deleted_exchange_is_told_so(
    transport: RabbitTransport, rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """His right to was taken away since; once somebody else made it he sends again."""
    monkeypatch.setattr(ours, "BINDING_S", 0.5)
    topic = new_topic()
    name = f"sender_{new_id()[-12:]}"

    async def permit(configure: str) -> None:
        await asyncio.to_thread(
            rabbitmq.evaluate,
            f'rabbit_auth_backend_internal:set_permissions(<<"{name}">>, <<"/">>, <<"{configure}">>, <<".*">>, <<".*">>, '
            '<<"kassa">>)',
        )

    await asyncio.to_thread(
        rabbitmq.evaluate, f'rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"secret">>, <<"kassa">>)'
    )
    await permit(".*")
    async with open_transport(f"amqp://{name}:secret@127.0.0.1:{rabbitmq.port('amqp')}/", database_url) as sender:
        await sender.provision([topic], verify_only=False)
        await permit("^$")
        await deleted_exchange(rabbitmq.url, topic)

        for _ in range(2):
            (refused,) = await send(sender, topic, packet("r-1"))
            assert isinstance(refused, Failed)
            assert not refused.is_retryable

        await transport.provision([topic], verify_only=False)
        await until(partial(is_sent, sender, topic, "r-1"))


async def test_queue_that_others_make_and_have_deleted_is_a_failure_for_good(
    transport: RabbitTransport, rabbitmq: RabbitMQ
) -> None:
    theirs = SINGLE._replace(name=new_id(), declaration="passive")
    async with stranger(rabbitmq.url) as channel:
        await channel.exchange_declare(theirs.name, exchange_type="topic")
        await channel.queue_declare(theirs.name)
        await channel.queue_bind(theirs.name, theirs.name, theirs.name)
        await transport.provision([theirs], verify_only=False)
        assert await is_sent(transport, theirs, "r-1")
        await channel.queue_delete(theirs.name)

        (receipt,) = await send(transport, theirs, packet("r-2"))

    assert isinstance(receipt, Failed) and not receipt.is_retryable


def passive_missing(_: RabbitStream, __: pytest.MonkeyPatch) -> None:
    """Its queue is gone, which is enough."""


def unexpected(stream: RabbitStream, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        raise KeyError("unexpected")

    monkeypatch.setattr(stream, "look_for_orphans", fail)


@pytest.mark.parametrize("trouble", [passive_missing, unexpected])
async def test_exchange_is_bound_again_whatever_is_wrong_with_another_subscription(
    transport: RabbitTransport,
    rabbitmq: RabbitMQ,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[RabbitStream, pytest.MonkeyPatch], None],
) -> None:
    """Also while a queue that others make is missing."""
    monkeypatch.setattr(ours, "ORPHANS_EVERY", 1)
    theirs, topic = SINGLE._replace(name=new_id(), declaration="passive"), await ready(transport)
    async with stranger(rabbitmq.url) as channel:
        await channel.exchange_declare(theirs.name, exchange_type="topic")
        await channel.queue_declare(theirs.name)
        await transport.provision([theirs], verify_only=False)
        trouble(await transport.subscribe(theirs, "kassa"), monkeypatch)
        stream = await transport.subscribe(topic, "shop")
        await channel.queue_delete(theirs.name)

        await channel.exchange_delete(topic.name)
        await channel.exchange_declare(topic.name, exchange_type="topic", durable=True)
        await until(partial(is_routed, channel, topic), 60)

    assert len(await take(stream, 1)) == 1


async def is_routed(channel: AbstractChannel, topic: Topic) -> bool:
    """Whether somebody receives what is sent to a lane of it."""
    try:
        await channel.basic_publish(b"{}", exchange=topic.name, routing_key=lane_key(0), mandatory=True)
    except aiormq.exceptions.PublishError:
        return False
    return True


# A broker that does not take more


@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_blocked_broker_fails_sends_by_their_deadline_and_loses_nothing(
    own_server: RabbitMQ, database_url: str, kind: str
) -> None:
    topic = new_topic()
    raise_alarm, clear_alarm = {
        "memory": (own_server.raise_memory_alarm, own_server.clear_memory_alarm),
        "disk": (own_server.raise_disk_alarm, own_server.clear_disk_alarm),
    }[kind]
    async with open_bench(own_server.url, database_url, topic) as bench, consuming(bench):
        await bench.binder.send(topic.name, [record("r-0")], deadline_s=DEADLINE_S)
        await asyncio.to_thread(raise_alarm)
        try:
            began = asyncio.get_running_loop().time()
            doubtful = await bench.binder.send(topic.name, [record(f"r-{n}") for n in range(1, 100)], deadline_s=1)
            blocked = await bench.binder.send(topic.name, [record(f"r-{n}") for n in range(100, 200)], deadline_s=1)
            took_s = asyncio.get_running_loop().time() - began
            await until(lambda: has_effect(bench, "r-0"))
        finally:
            await asyncio.to_thread(clear_alarm)
        sent_again = await send_surely(bench.binder, topic.name, [record(f"r-{n}") for n in range(1, 200)], DEADLINE_S)

        assert 1.0 <= took_s < 60
        assert all(isinstance(one, Confirmed | Unknown) or one.is_retryable for one in doubtful)
        assert all(isinstance(one, Failed) and one.is_retryable for one in blocked)
        assert sent_again == [Confirmed()] * 199
        await until(lambda: has_all(bench, 200))
        assert sorted(await bench.effects()) == sorted(f"r-{n}" for n in range(200))


async def has_effect(bench: Any, id: str) -> bool:
    return id in await bench.effects()


async def has_all(bench: Bench, count: int) -> bool:
    return await bench.count() >= count


async def test_full_local_queue_fails_what_never_left_us(
    own_server: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that takes everything and confirms nothing: no more than so many are under way at a time."""
    monkeypatch.setattr(amqp, "IN_FLIGHT_MAX", 100)
    async with open_transport(own_server.url, database_url) as transport:
        topic = await ready(transport)
        await send(transport, topic, packet("r-0"))
        own_server.freeze()
        try:
            receipts = await transport.send(
                topic, [packet(f"r-{n}") for n in range(1, 500)], deadline_s=1, must_arrive=True
            )
        finally:
            own_server.thaw()

        kinds = [type(receipt) for receipt in receipts]
        written = kinds.count(Unknown)
        assert 100 <= written < 100 + amqp.BURST
        assert kinds == [Unknown] * written + [Failed] * (499 - written)
        assert await send(transport, topic, packet("r-500")) == [Confirmed()]


async def test_queue_that_confirms_nothing_stops_the_others_no_longer_than_a_deadline(
    transport: RabbitTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quorum queue without its majority: what waits for it is all that may be under way."""
    stuck, topic = await ready(transport), await ready(transport)
    monkeypatch.setattr(amqp, "IN_FLIGHT_MAX", 10)
    hear = amqp._Outlet._on_confirm_frame

    async def hear_of_others(outlet: Any, frame: Any) -> None:
        if outlet._in_flight[frame.delivery_tag].batch.exchange != stuck.name:
            await hear(outlet, frame)

    monkeypatch.setattr(amqp._Outlet, "_on_confirm_frame", hear_of_others)
    waiting = asyncio.create_task(send(transport, stuck, *(packet(f"r-{number}") for number in range(10))))

    async def is_full() -> bool:
        return transport._publisher._outlet is not None and transport._publisher._outlet.is_full()

    await until(is_full)
    first = await transport.send(topic, [packet("r-10")], deadline_s=1, must_arrive=True)
    second = await transport.send(topic, [packet("r-11")], deadline_s=5, must_arrive=True)

    assert isinstance(first[0], Failed) and first[0].is_retryable
    assert second == [Confirmed()]
    assert {type(receipt) for receipt in await waiting} == {Unknown}


async def test_frozen_broker_keeps_nobody_from_closing(own_server: RabbitMQ, database_url: str) -> None:
    """Also while more is to be written than it takes."""
    async with open_transport(own_server.url, database_url) as transport:
        topic = await ready(transport)
        await send(transport, topic, packet("r-0"))
        own_server.freeze()
        try:
            large = [packet(f"r-{n}", body=bytes(5_000_000)) for n in range(10)]
            sending = asyncio.create_task(transport.send(topic, large, deadline_s=200, must_arrive=True))
            # By now the frozen broker's line is full.
            await asyncio.sleep(1)
            async with asyncio.timeout(60):
                await transport.close()
                receipts = await sending
        finally:
            own_server.thaw()

        assert {type(receipt) for receipt in receipts} <= {Unknown, Failed}


async def test_frozen_broker_is_left_by_the_deadline_and_found_again(own_server: RabbitMQ, database_url: str) -> None:
    topic = new_topic()
    async with open_bench(own_server.url, database_url, topic) as bench, consuming(bench):
        load = Load(bench, senders=4, deadline_s=0.5)
        await load.until(50)
        own_server.freeze()
        await asyncio.sleep(2)
        own_server.thaw()
        await load.until(150)
        await load.stop()

        await until(lambda: has_all(bench, len(load.confirmed)), 180)
        assert load.doubts > 0
        assert_once_and_in_order(load.confirmed, await bench.effects())


async def test_connection_that_hears_nothing_is_given_up_and_everything_goes_on(
    own_server: RabbitMQ, database_url: str
) -> None:
    """Half open: no end of the connection is seen, only silence."""
    topic = new_topic()
    async with open_bench(f"{own_server.url}?heartbeat=1", database_url, topic) as bench, consuming(bench):
        await bench.binder.send(topic.name, [record("0-0", key="0")], deadline_s=DEADLINE_S)
        await until(lambda: has_all(bench, 1))
        own_server.freeze()
        try:
            transport = bench.binder.transport  # type: ignore[attr-defined]
            given_up = (await transport.receiving.live()).connection
            await until(lambda: is_over(given_up))
        finally:
            own_server.thaw()

        assert await send_surely(bench.binder, topic.name, [record("0-1", key="0")], DEADLINE_S) == [Confirmed()]
        await until(lambda: has_all(bench, 2))


async def is_over(connection: Any) -> bool:
    return bool(connection.is_closed)


# Connections that end


async def test_connection_cut_in_the_middle_of_a_batch_leaves_doubt_and_no_loss(
    rabbitmq: RabbitMQ, database_url: str
) -> None:
    cutter = Cutter(rabbitmq.url)
    topic = new_topic()
    through = await cutter.start()
    async with open_bench(through, database_url, topic) as bench, consuming(bench):
        for number, cut in enumerate((Cut.BEFORE, Cut.ANSWER_LOST)):
            records = [record(f"{number}-{n}", key=str(n % 7), body=b'"%d %d"' % (number, n)) for n in range(300)]
            cutter.arm(b'"%d 150"' % number, cut)
            receipts = await bench.binder.send(topic.name, records, deadline_s=DEADLINE_S)
            again = await send_surely(bench.binder, topic.name, records, DEADLINE_S)

            assert {type(one) for one in receipts} <= {Confirmed, Unknown, Failed}
            assert any(isinstance(one, Unknown) for one in receipts)
            assert again == [Confirmed()] * 300
        await until(lambda: has_all(bench, 600), 180)
        assert sorted(await bench.effects()) == sorted(f"{i}-{n}" for i in range(2) for n in range(300))
    assert cutter.cuts == 2
    await cutter.stop()


async def test_connection_cut_at_an_acknowledgement_repeats_no_effect(rabbitmq: RabbitMQ, database_url: str) -> None:
    cutter = Cutter(rabbitmq.url)
    topic = new_topic()
    through = await cutter.start()
    async with open_bench(through, database_url, topic) as bench:
        await send_surely(bench.binder, topic.name, [record(f"0-{n}", key="0") for n in range(200)], DEADLINE_S)
        cutter.arm(spec.Basic.Ack.index.to_bytes(4, "big"), Cut.BEFORE)
        async with consuming(bench) as consumer:
            await until(lambda: is_repeated(consumer))
            await until(lambda: has_all(bench, 200))

        assert await bench.effects() == [f"0-{n}" for n in range(200)]
    assert cutter.cuts == 1
    await cutter.stop()


async def is_repeated(consumer: Any) -> bool:
    return bool(consumer.counts.repeated)


# A broker that dies


async def killed(server: RabbitMQ) -> None:
    await asyncio.to_thread(server.kill)


async def stopped(server: RabbitMQ) -> None:
    await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("ends", [killed, pytest.param(stopped, marks=pytest.mark.long)])
async def test_broker_that_ends_under_load_and_comes_back(
    own_server: RabbitMQ, database_url: str, ends: Callable[[RabbitMQ], Any]
) -> None:
    topic = new_topic()
    async with open_bench(own_server.url, database_url, topic) as bench, consuming(bench) as consumer:
        load = Load(bench)
        await load.until(400)
        await ends(own_server)
        before = len(load.confirmed)
        await asyncio.to_thread(own_server.start)
        await load.until(before + 400)
        await load.stop()

        await until(lambda: has_all(bench, len(load.confirmed)), 180)
        effects = await bench.effects()
        assert_once_and_in_order(load.confirmed, effects)
        assert consumer.counts.handled == len(effects)
        await until(lambda: is_empty(bench))


async def is_empty(bench: Any) -> bool:
    try:
        return bool((await bench.binder.depth(bench.topic.name, "shop")).waiting == 0)
    except BrokerUnreachable:
        return False


async def test_broker_that_is_killed_when_its_queues_are_new_keeps_what_it_confirmed(
    own_server: RabbitMQ, database_url: str
) -> None:
    topic = new_topic()._replace(groups=("shop", "books"))
    async with open_bench(own_server.url, database_url, topic) as bench:
        sent = [record(f"r-{number}", key=f"k-{number}") for number in range(80)]
        receipts = await bench.binder.send(topic.name, sent[:40], deadline_s=DEADLINE_S)
        await killed(own_server)
        await asyncio.to_thread(own_server.start)
        receipts += await bench.binder.send(topic.name, sent[40:], deadline_s=DEADLINE_S)

        assert receipts == [Confirmed()] * len(sent)
        for group in topic.groups:
            subscription = await bench.binder.subscribe(topic.name, group)
            assert {one.record.id for one in await collect(subscription, len(sent))} == {one.id for one in sent}


async def test_broker_that_is_away_costs_nothing_but_time(own_server: RabbitMQ, database_url: str) -> None:
    topic = new_topic()
    async with open_bench(own_server.url, database_url, topic) as bench:
        await killed(own_server)
        with pytest.raises(BrokerUnreachable):
            await bench.binder.depth(topic.name, "shop")
        receipts = await bench.binder.send(topic.name, [record("r-1")], deadline_s=0.5)
        with pytest.raises(BrokerUnreachable):
            await bench.binder.subscribe(topic.name, "shop")
        await asyncio.to_thread(own_server.start)

        assert isinstance(receipts[0], Failed) and receipts[0].is_retryable
        assert await bench.binder.send(topic.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]
        subscription = await bench.binder.subscribe(topic.name, "shop")
        (delivery,) = await collect(subscription, 1)
        assert await subscription.settle([(delivery, Ack())]) == [True]


async def test_plain_queue_that_a_restart_took_away_is_there_again(own_server: RabbitMQ, database_url: str) -> None:
    """What programs declare in the plainest way does not survive the broker; the consumer declares it again."""
    topic = new_topic()._replace(declaration="plain", lanes=1, keyed=False)
    async with open_transport(own_server.url, database_url) as transport:
        await transport.provision([topic], verify_only=False)
        stream = await transport.subscribe(topic, "shop")
        await stopped(own_server)
        await asyncio.to_thread(own_server.start)

        async def is_there() -> bool:
            return await send(transport, topic, packet("r-1")) == [Confirmed()]

        await until(is_there)
        assert set(ids(await take(stream, 1))) == {"r-1"}


@pytest.mark.long
async def test_random_kills(own_server: RabbitMQ, database_url: str) -> None:
    random = Random(seed := 20261125)
    print(f"seed {seed}")
    topic = new_topic()
    async with open_bench(own_server.url, database_url, topic) as bench, consuming(bench) as consumer:
        load = Load(bench)
        for _ in range(10):
            await load.until(len(load.confirmed) + random.randint(50, 1500))
            await random.choice((killed, killed, stopped))(own_server)
            await asyncio.sleep(random.random() * 2)
            await asyncio.to_thread(own_server.start)
        await load.until(len(load.confirmed) + 500)
        await load.stop()

        await until(lambda: has_all(bench, len(load.confirmed)), 180)
        effects = await bench.effects()
        print(
            json.dumps(
                {"confirmed": len(load.confirmed), "effects": len(effects), "repeated": consumer.counts.repeated}
            )
        )
        assert_once_and_in_order(load.confirmed, effects)


async def test_packet_of_a_queue_that_does_not_count_and_that_ends_whoever_has_it_is_handed_out_alone_in_the_end(
    rabbitmq: RabbitMQ, database_url: str
) -> None:
    topic = SINGLE._replace(name=new_id())
    async with open_bench(rabbitmq.url, database_url, topic) as bench:
        # The first time nobody suspects it.
        await ended_by_its_first(bench, deaths=1 + CRASHES_MAX)
