"""Kafka for itself: what it alone can do, and what it may do to us. What it shares with the others is in conformance."""

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import compress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

# Its types do not tell that this module has what it takes from the client's core.
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]
from structlog.testing import capture_logs

from brokers.kafka_house import (
    DEADLINE_S,
    HOST,
    WAIT_S,
    OwnKafka,
    delete,
    ids,
    insist,
    new_topic,
    open_bench,
    open_transport,
    own_kafka,
    packet,
    publish,
    read,
    take,
    until_heard,
)
from brokers.load import under_load
from brokers.streams import ended_by_its_first, see
from conformance.journal.cutter import Cut, Cutter
from conformance.messaging.house import Bench, collect, until
from flows.api.support import running
from kassa.errors import BrokerUnreachable, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.ids import Id
from kassa.messaging.binder import Binder
from kassa.messaging.binders import kafka
from kassa.messaging.binders.kafka import SESSION_S, KafkaStream, KafkaTransport, group_id, read_url
from kassa.messaging.model import Ack, Arrival, Confirmed, Failed, LogRecord, Packet, Place, Unknown
from kassa.messaging.packing import single
from kassa.messaging.relay import event_record
from kassa.messaging.supplied import CRASHES_MAX
from kassa.messaging.topology import EVENTS, Topic, lane
from servers import Kafka

pytestmark = pytest.mark.needs("kafka")

CUTS = 5


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnKafka]:
    """One that may be killed."""
    with own_kafka() as server:
        yield server


@pytest.fixture
async def transport(kafka: Kafka) -> AsyncIterator[KafkaTransport]:
    async with open_transport(kafka.url) as opened:
        yield opened


async def send(transport: KafkaTransport, topic: Topic, *packets: Packet) -> None:
    receipts = await transport.send(topic, packets, deadline_s=WAIT_S, must_arrive=True)
    assert receipts == [Confirmed()] * len(packets)


async def provision(transport: KafkaTransport, topic: Topic) -> Topic:
    await transport.provision([topic], verify_only=False)
    return topic


# What the URL may say


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("kafka://", "a host is missing"),
        ("kafka://user:geheim@h:1?sasl=MD5", "sasl is one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
        ("kafka://user:geheim@h:1?replication=0", "replication is a positive number"),
        ("kafka://user:geheim@h:1?verify=none", r"verify is for TLS: begin with kafka\+ssl://, or add tls=1"),
        ("kafka://user:geheim@h:1?ca=ca.pem&key=k", "ca, key is for TLS"),
        ("kafka://h:1?sasl=PLAIN", "sasl is for a user: kafka://USER:PASSWORD@HOST:PORT"),
        ("kafka+ssl://user:geheim@h:1?colour=red", "nobody knows colour here"),
    ],
)
def test_url_that_cannot_be_read_is_refused_without_its_password(url: str, complaint: str) -> None:
    with pytest.raises(SettingInvalid, match=complaint) as refused:
        read_url(url)

    assert "geheim" not in str(refused.value)


def test_url_becomes_the_clients_settings() -> None:
    settings = read_url("kafka+ssl://user:p%40ss@a:1,b:2?ca=ca.pem&verify=chain&sasl=SCRAM-SHA-512&replication=3")

    assert settings.client["bootstrap.servers"] == "a:1,b:2"
    assert settings.client["security.protocol"] == "SASL_SSL"
    assert settings.client["sasl.mechanism"] == "SCRAM-SHA-512"
    assert settings.client["sasl.password"] == "p@ss"
    assert settings.client["ssl.ca.location"] == "ca.pem"
    assert settings.client["ssl.endpoint.identification.algorithm"] == "none"
    assert (settings.replication, settings.min_isr) == (3, None)


# Topics and groups


async def test_topic_with_other_partitions_is_refused_with_what_to_do(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic(lanes=3))

    with pytest.raises(QueueMismatch, match="has 3 partitions, and is declared with 8 lanes"):
        await transport.provision([topic._replace(lanes=8)], verify_only=False)
    with pytest.raises(QueueMismatch):
        await transport.provision([topic._replace(lanes=8)], verify_only=True)
    assert await transport.provision([topic._replace(lanes=8, keyed=False)], verify_only=False) == []


async def test_topic_of_a_name_that_kafka_has_not_is_refused(transport: KafkaTransport) -> None:
    topic = Topic("orders of today", ("shop",), "")

    with pytest.raises(SettingInvalid, match="letters, digits"):
        await transport.provision([topic], verify_only=False)
    (receipt,) = await transport.send(topic, [packet("r-1")], deadline_s=DEADLINE_S, must_arrive=True)
    assert isinstance(receipt, Failed) and not receipt.is_retryable


async def test_verifying_says_what_is_missing_and_makes_nothing(transport: KafkaTransport) -> None:
    topic = new_topic(("shop", "books"))

    expected = [(topic.name, "shop"), (topic.name, "books")]
    assert await transport.provision([topic], verify_only=True) == expected
    assert await transport.provision([topic], verify_only=True) == expected
    assert await transport.provision([topic], verify_only=False) == expected
    assert await transport.provision([topic], verify_only=True) == []


async def test_new_group_gets_what_is_sent_after_it_was_made(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    await send(transport, topic, *(packet(f"old-{number}") for number in range(20)))
    books = topic._replace(groups=("shop", "books"))

    assert await transport.provision([books], verify_only=False) == [(topic.name, "books")]
    await send(transport, topic, packet("new"))

    assert ids(await take(await transport.subscribe(topic, "books"), 1)) == ["new"]
    assert await transport.depth(topic, "books") == 1
    assert await transport.depth(topic, "shop") == 21


class _Crossed(KafkaTransport):
    """Somebody sends to a topic as soon as it is there, before its groups are."""

    async def _create(self, topic: Topic) -> Any:
        seen = await super()._create(topic)
        await send(self, topic, packet("early"))
        return seen


async def test_first_groups_of_a_new_topic_get_what_came_while_they_were_made(kafka: Kafka) -> None:
    transport = _Crossed(read_url(kafka.url))
    await transport.open()
    try:
        topic = await provision(transport, new_topic())
        assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["early"]
    finally:
        await transport.close()


async def test_group_that_kafka_forgot_gets_everything_that_is_there(transport: KafkaTransport, kafka: Kafka) -> None:
    topic = await provision(transport, new_topic())
    await send(transport, topic, packet("r-1"))
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for future in admin.delete_consumer_groups([f"{topic.name}:shop"]).values():
        await asyncio.wrap_future(future)

    assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["r-1"]


async def test_topic_that_is_not_there_has_no_consumers_and_no_depth(transport: KafkaTransport) -> None:
    with pytest.raises(QueueNotFound):
        await transport.subscribe(new_topic(), "shop")
    with pytest.raises(QueueNotFound):
        await transport.depth(new_topic(), "shop")


# On the wire


async def test_key_decides_the_lane_and_envelopes_name_theirs(transport: KafkaTransport, kafka: Kafka) -> None:
    topic = await provision(transport, new_topic())
    envelopes = await provision(transport, new_topic(envelopes=True))
    await send(transport, topic, *(packet(f"r-{key}", key) for key in ("a", "b", "ü")))
    await send(transport, topic, *(packet(f"none-{number}") for number in range(8)))
    await send(transport, envelopes, packet("r-1", "5"))

    messages = {
        dict(message.headers())["kassa-id"].decode(): message for message in read(kafka.bootstrap, topic.name, 11)
    }
    for key in ("a", "b", "ü"):
        assert messages[f"r-{key}"].partition() == lane(key, 8)
        assert messages[f"r-{key}"].key() == key.encode()
    assert {messages[f"none-{number}"].partition() for number in range(8)} == set(range(8))
    assert messages["none-0"].key() is None
    (envelope,) = read(kafka.bootstrap, envelopes.name, 1)
    assert envelope.partition() == 5


async def test_event_is_a_cloud_event_for_everybody(transport: KafkaTransport, kafka: Kafka) -> None:
    """Read by the package of the CloudEvents project, unchanged."""
    topic = await provision(transport, EVENTS._replace(name=new_topic().name))
    at = datetime(2026, 11, 25, 9, 0, tzinfo=UTC)
    event = LogRecord(Place(1, 2, 3), 7, Id("0199" + "0" * 28), 4, at, "payment.succeeded", b'{"amount":100}')
    await send(transport, topic, single(event_record(event)))

    (message,) = read(kafka.bootstrap, topic.name, 1)
    read_event = from_kafka_event(KafkaMessage(dict(message.headers()), message.key(), message.value()))

    assert read_event.get_type() == "payment.succeeded"
    assert read_event.get_id() == event.name
    assert read_event.get_time() == at
    assert read_event.get_datacontenttype() == "application/json"
    assert read_event.get_data() == {"amount": 100}
    assert str(read_event.get_extension("sequence")) == "4"


async def test_headers_come_back_as_they_were_sent(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    headers = {
        "content-type": "application/json", "correlation-id": "c-1", "reply-to": "answers", "ce-id": "e-1",
        "ce-type": "x.y", "traceparent": "00-1", "x": "ü", "empty": "",
    }  # fmt: skip
    sent = packet("r-1", "k", b"\x00\xff", headers)
    await send(transport, topic, sent)

    (arrival,) = await take(await transport.subscribe(topic, "shop"), 1)

    assert arrival.packet == sent
    assert arrival.redeliveries is None
    assert arrival.sent_at is not None and abs(arrival.sent_at.timestamp() - time.time()) < 60


async def test_zero_byte_does_not_cut_a_header_off(transport: KafkaTransport) -> None:
    """The client would send only what is before it, of a text."""
    topic = await provision(transport, new_topic(lanes=1))
    await send(transport, topic, packet("r-1", "k", b"{}", {"x": "before\0behind"}))

    (arrival,) = await take(await transport.subscribe(topic, "shop"), 1)

    assert arrival.packet.headers["x"] == "before\0behind"


async def test_plain_programs_ask_and_are_answered(transport: KafkaTransport, kafka: Kafka) -> None:
    orders = await provision(transport, new_topic(lanes=1, keyed=False))
    answers = await provision(transport, new_topic((), lanes=3))
    body = b'{"order_id": "1"}'
    headers = {"reply-topic": answers.name, "correlation-id": "c-1"}
    publish(kafka.bootstrap, orders.name, {"value": body, "headers": headers})

    (arrival,) = await take(await transport.subscribe(orders, "shop"), 1)
    assert arrival.packet == Packet("", "", body, {"reply-to": answers.name, "correlation-id": "c-1"})
    answer = Packet("a-1", "", b'{"id": "pay_1"}', {"correlation-id": "c-1", "content-type": "application/json"})
    (receipt,) = await transport.reply(arrival.packet.headers["reply-to"], [answer], deadline_s=DEADLINE_S)

    assert receipt == Confirmed()
    (message,) = read(kafka.bootstrap, answers.name, 1)
    assert message.value() == answer.body
    assert dict(message.headers())["correlation-id"] == b"c-1"
    (lost,) = await transport.reply("no-such-topic", [answer], deadline_s=DEADLINE_S)
    assert isinstance(lost, Failed) and not lost.is_retryable


async def test_garbage_is_received_and_stops_nobody(kafka: Kafka, database_url: str) -> None:
    topic = new_topic(lanes=1)
    async with open_bench(kafka.url, database_url, topic) as bench:
        publish(
            kafka.bootstrap, topic.name,
            {"value": None},
            {"value": b"\x00\x01", "key": b"\xff\x00", "headers": [("x\0", b"\xff\x00"), ("y", None)]},
            {"value": b"[{", "headers": {"content-type": "application/cloudevents-batch+json"}},
            {"value": b"long ago", "timestamp": -(2**62)},
            {"value": b"nameless", "headers": [("kassa-id", "r-0"), (no_text(), b"v"), ("x", "v")]},
            {"value": b"fine", "headers": {"kassa-id": "r-1"}},
        )  # fmt: skip
        subscription = await bench.binder.subscribe(topic.name, "shop")

        deliveries = await collect(subscription, 5)

        bodies = [delivery.record.body for delivery in deliveries]
        assert bodies == [b"", b"\x00\x01", b"long ago", b"nameless", b"fine"]
        assert (deliveries[1].record.key, deliveries[1].record.headers) == ("\ufffd\ufffd", {"x": "\ufffd\0", "y": ""})
        assert await subscription.settle([(delivery, Ack()) for delivery in deliveries]) == [True] * 5
        (letter,) = await bench.letters.browse(f"{topic.name}:shop")
        assert "cannot be read" in letter.reason
        await until_depth(bench.binder, topic, 0)


# Settling


async def test_header_whose_name_is_no_text_stops_nobody_however_often_others_came(
    transport: KafkaTransport, kafka: Kafka
) -> None:
    """From code that has run often, Python does not see the client's error where it happens."""
    topic = await provision(transport, new_topic(lanes=1))
    fine = [{"value": b"fine", "headers": {"x": "v"}}] * 500
    nameless = {"value": b"nameless", "key": b"k", "headers": [(no_text(), b"v"), ("x", "v")]}
    publish(kafka.bootstrap, topic.name, nameless, *fine, nameless, nameless, *fine)

    with capture_logs() as logs:
        stream = await transport.subscribe(topic, "shop")
        arrivals = await take(stream, 1003)

    read_fine, read_nameless = [Packet("", "", b"fine", {"x": "v"})] * 500, Packet("", "k", b"nameless", {})
    packets = [arrival.packet for arrival in arrivals]
    assert packets == [read_nameless, *read_fine, read_nameless, read_nameless, *read_fine]
    assert [one["offset"] for one in logs if one["event"] == "kafka.headers_unreadable"] == [0, 501, 502]
    assert await stream.settle(arrivals) == [True] * 1003
    await until_depth(transport, topic, 0)


def no_text() -> str:
    """A header's name that leaves this process as bytes that are no UTF-8. The client takes texts alone, and asks Python for their
    bytes, which Python keeps beside a text that is not ASCII."""
    name = "".join(["\xe9", "\xe9"])
    kept = ctypes.pythonapi.PyUnicode_AsUTF8
    kept.argtypes, kept.restype = [ctypes.py_object], ctypes.c_void_p
    ctypes.memmove(kept(name), b"\xff\xfe\xff\xfe", 4)
    return name


async def until_depth(asked: KafkaTransport | Binder, topic: Topic, expected: int) -> None:
    """Offsets are committed in the background."""

    async def is_there() -> bool:
        if isinstance(asked, KafkaTransport):
            return await asked.depth(topic, "shop") == expected
        return (await asked.depth(topic.name, "shop")).waiting == expected

    await until(is_there)


async def test_offset_is_committed_up_to_the_first_that_is_not_settled(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic(lanes=1))
    await send(transport, topic, *(packet(f"r-{number}", "k") for number in range(5)))
    stream = await transport.subscribe(topic, "shop")
    arrivals = await take(stream, 5)

    assert await stream.settle([arrivals[1], arrivals[3]]) == [True, True]
    assert await transport.depth(topic, "shop") == 5
    assert await stream.settle([arrivals[0]]) == [True]
    await until_depth(transport, topic, 3)

    await stream.close()
    assert await stream.settle([arrivals[2]]) == [False]
    assert ids(await take(await transport.subscribe(topic, "shop"), 3)) == ["r-2", "r-3", "r-4"]


async def test_restarted_stream_brings_again_what_was_not_settled_in_order(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic(lanes=1))
    await send(transport, topic, *(packet(f"r-{number}", "k") for number in range(300)))
    stream = await transport.subscribe(topic, "shop")
    old = await take(stream, 200)
    await stream.settle(old[:50])

    await stream.restart()

    assert not any(stream.held(old))
    assert await stream.settle(old[50:60]) == [False] * 10
    again = await take(stream, 250)
    assert ids(again) == [f"r-{number}" for number in range(50, 300)]
    assert again[0].epoch > old[0].epoch
    assert await stream.settle(again) == [True] * 250
    await until_depth(transport, topic, 0)


async def test_closing_waits_for_the_commit_of_what_was_settled_a_moment_before(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    await send(transport, topic, *(packet(f"r-{number}", str(number)) for number in range(100)))
    stream = await transport.subscribe(topic, "shop")
    arrivals = await take(stream, 100)

    assert await stream.settle(arrivals) == [True] * 100
    await stream.close()

    assert await transport.depth(topic, "shop") == 0


async def test_commit_that_the_broker_did_not_take_is_made_again(own_server: OwnKafka) -> None:
    """Nobody settles anything after it."""
    topic = new_topic()
    async with open_transport(own_server.url) as everybody, open_transport(own_server.safe_url) as transport:
        await provision(everybody, topic)
        await send(everybody, topic, packet("r-1"))
        allow(own_server, topic, "READ", "DESCRIBE")
        stream = await transport.subscribe(topic, "shop")
        arrivals = await take(stream, 1)
        forbid(own_server, topic, "READ")

        assert await stream.settle(arrivals) == [True]
        # Time for several commits, each of which is refused.
        await asyncio.sleep(1.0)
        assert await everybody.depth(topic, "shop") == 1
        allow(own_server, topic, "READ")

        await until_depth(everybody, topic, 0)
        assert stream.held(arrivals[:1]) == [True]


async def test_consumer_that_nobody_asks_keeps_its_place_and_a_bounded_lot(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic(lanes=1))
    for start in range(0, 5000, 1000):
        await send(transport, topic, *(packet(f"r-{start + number}", "k") for number in range(1000)))
    stream = await transport.subscribe(topic, "shop")
    first = await take(stream, 10)
    began = time.monotonic()
    # Longer than the group waits for a consumer that is dead.
    await asyncio.sleep(SESSION_S + 1.0)

    assert all(stream.held(first))
    assert len(stream._buffer) <= 10 + (time.monotonic() - began) / 0.5 + 1
    rest = await take(stream, 4990)
    assert ids([*first, *rest]) == [f"r-{number}" for number in range(5000)]


async def test_subscription_that_is_cancelled_keeps_no_lanes(transport: KafkaTransport) -> None:
    """Nobody has its stream, so nobody would ever close it."""
    topic = await provision(transport, new_topic())
    await send(transport, topic, *(packet(f"r-{number}", str(number)) for number in range(100)))

    async def is_running() -> bool:
        return any(thread.name == f"kafka {topic.name}" for thread in threading.enumerate())

    subscribing = asyncio.create_task(transport.subscribe(topic, "shop"))
    await until(is_running)
    subscribing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await subscribing

    arrivals = await take(await transport.subscribe(topic, "shop"), 100)
    assert sorted(ids(arrivals)) == sorted(f"r-{number}" for number in range(100))
    assert {lane(arrival.packet.key, topic.lanes) for arrival in arrivals} == set(range(topic.lanes))


async def test_lane_that_moves_takes_open_packets_along_and_refuses_late_settlements(transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    await send(transport, topic, *(packet(f"{number % 16}-{number}", str(number % 16)) for number in range(160)))
    one = await transport.subscribe(topic, "shop")
    old = await take(one, 160)
    await one.settle(old[:20])

    two = await transport.subscribe(topic, "shop")
    moved: list[Arrival] = []

    async def has_moved() -> bool:
        moved.extend(await two.receive(100, 0.1))
        return not all(one.held(old)) and len(moved) == len(lost())

    def lost() -> list[Arrival]:
        return [arrival for arrival, is_held in zip(old[20:], one.held(old[20:]), strict=True) if not is_held]

    await until(has_moved)

    assert sorted(ids(moved)) == sorted(ids(lost()))
    assert 0 < len({lane(arrival.packet.key, 8) for arrival in lost()}) <= 4
    assert await one.settle(lost()) == [False] * len(lost())
    assert await two.settle(moved) == [True] * len(moved)
    kept = list(compress(old, one.held(old)))
    assert await one.settle(kept) == [True] * len(kept)
    await until_depth(transport, topic, 0)
    await two.close()


def peer_process(url: str, topic: Topic) -> "subprocess.Popen[str]":
    """A consumer of the group in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "brokers.kafka_peer", url, topic.name, "shop", str(topic.lanes)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip


async def test_killed_consumers_lanes_go_to_the_other_within_seconds(kafka: Kafka, transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    peer = peer_process(kafka.url, topic)
    try:
        await send(transport, topic, packet("first"))
        assert peer.stdout is not None
        assert (await asyncio.to_thread(peer.stdout.readline)).strip() == "first"
        mine = await transport.subscribe(topic, "shop")
        arrivals: list[Arrival] = []
        async with asyncio.timeout(WAIT_S):
            while len(mine._held) < 4:
                arrivals += await mine.receive(1, 0.1)
        await send(transport, topic, *(packet(f"{number % 20}-{number}", str(number % 20)) for number in range(200)))
        began = time.monotonic()
    finally:
        peer.kill()
        peer.communicate()

    arrivals += await take(mine, 201 - len(arrivals))

    # Kafka's own choice would be 45 seconds.
    assert time.monotonic() - began < SESSION_S + 30
    assert sorted(ids(arrivals)) == sorted(["first", *(f"{number % 20}-{number}" for number in range(200))])
    for key in range(20):
        numbers = [int(id.split("-")[1]) for id in ids(arrivals) if id.startswith(f"{key}-")]
        assert numbers == sorted(numbers)


async def test_groups_of_the_new_protocol_work_too(kafka: Kafka) -> None:
    async with open_transport(f"{kafka.url}?protocol=consumer") as transport:
        topic = await provision(transport, new_topic())
        await send(transport, topic, *(packet(f"r-{number}") for number in range(100)))
        one = await transport.subscribe(topic, "shop")
        arrivals = await take(one, 100)
        assert await one.settle(arrivals) == [True] * 100
        await one.close()
        await send(transport, topic, packet("last"))
        two = await transport.subscribe(topic, "shop")
        assert ids(await take(two, 1)) == ["last"]


async def test_static_member_has_its_lanes_again_after_a_restart(kafka: Kafka) -> None:
    async with open_transport(f"{kafka.url}?instance=till-1") as transport:
        topic = await provision(transport, new_topic())
        await send(transport, topic, packet("r-1"))
        assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["r-1"]
    async with open_transport(f"{kafka.url}?instance=till-1") as transport:
        assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["r-1"]


# When something goes wrong


async def hear(stream: KafkaStream, *wanted: str) -> None:
    """Until all of these came, whatever else does."""
    left = set(wanted)
    async with asyncio.timeout(WAIT_S):
        while left:
            try:
                left.difference_update(ids(await stream.receive(100, 1.0)))
            except BrokerUnreachable:
                await asyncio.sleep(0.1)


async def test_topic_deleted_under_a_consumer_and_made_again(kafka: Kafka, transport: KafkaTransport) -> None:
    """By hand: who sends and receives here had only found it there."""
    topic = new_topic()
    async with open_transport(kafka.url) as by_hand:
        await provision(by_hand, topic)
        await send(transport, topic, *(packet(f"old-{number}") for number in range(40)))
        stream = await transport.subscribe(topic, "shop")
        await take(stream, 40)
        await delete(kafka, topic)

        async def is_refused() -> bool:
            (receipt,) = await transport.send(topic, [packet("gone")], deadline_s=DEADLINE_S, must_arrive=True)
            return isinstance(receipt, Failed) and not receipt.is_retryable

        await until(is_refused)
        # There is nothing that could come again, and nobody waits for it.
        await stream.restart()
        await provision(by_hand, topic)
        await send(transport, topic, *(packet(f"new-{number}") for number in range(40)))

        await hear(stream, *(f"new-{number}" for number in range(40)))


async def test_topic_that_was_deleted_is_made_again_by_who_sends(kafka: Kafka, transport: KafkaTransport) -> None:
    """Time and again, and its consumer goes on: nobody provisions."""
    topic = await provision(transport, new_topic(lanes=3))
    stream = await transport.subscribe(topic, "shop")
    for turn in range(3):
        packets = [packet(f"{turn}-{number}", str(number)) for number in range(40)]
        await insist(transport, topic, *packets)
        await hear(stream, *(one.id for one in packets))
        await delete(kafka, topic)
    await insist(transport, topic, packet("last"))
    await hear(stream, "last")

    assert await transport.provision([topic], verify_only=True) == []


async def test_topic_that_was_deleted_is_made_again_by_who_receives(kafka: Kafka, transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    stream = await transport.subscribe(topic, "shop")
    await delete(kafka, topic)
    async with open_transport(kafka.url) as stranger:

        async def is_there() -> bool:
            return await stranger.provision([topic], verify_only=True) == []

        await until(is_there)
        await send(stranger, topic, packet("r-1"))

    await hear(stream, "r-1")


async def test_topic_is_made_again_once_however_many_send(kafka: Kafka, transport: KafkaTransport) -> None:
    topic = await provision(transport, new_topic())
    await delete(kafka, topic)

    with capture_logs() as logs:
        await asyncio.gather(*(insist(transport, topic, packet(f"r-{number}")) for number in range(20)))

    assert [one["event"] for one in logs].count("kafka.topic_made_again") == 1
    assert len(await take(await transport.subscribe(topic, "shop"), 20)) == 20


async def test_topic_that_is_made_again_has_the_settings_that_it_had(kafka: Kafka) -> None:
    """Its partitions too, where it is not declared with as many; and a week's retention would forget what a month's kept."""
    topic = new_topic(lanes=8, keyed=False)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    made = NewTopic(topic.name, 3, 1, config={"retention.ms": "2592000000"})
    await asyncio.wrap_future(admin.create_topics([made])[topic.name])
    async with open_transport(kafka.url) as transport:
        await provision(transport, topic)
        await delete(kafka, topic)
        await insist(transport, topic, packet("r-1"))

        assert len(admin.list_topics(topic.name, timeout=10).topics[topic.name].partitions) == 3
        asked = ConfigResource(ResourceType.TOPIC, topic.name)
        settings = await asyncio.wrap_future(admin.describe_configs([asked])[asked])
        assert settings["retention.ms"].value == "2592000000"


async def test_group_that_was_away_gets_what_came_after_its_topic_was_made_again(
    kafka: Kafka, transport: KafkaTransport
) -> None:
    """Whoever made it again does not know the group, and Kafka has forgotten it: it must not begin at the end."""
    topic = new_topic(())
    books = topic._replace(groups=("books",))
    async with open_transport(kafka.url) as receiver:
        await provision(receiver, books)
    await provision(transport, topic)
    await delete(kafka, topic)
    await insist(transport, topic, packet("r-1"))

    async with open_transport(kafka.url) as receiver:
        await provision(receiver, books)
        assert ids(await take(await receiver.subscribe(books, "books"), 1)) == ["r-1"]


async def test_group_whose_place_is_one_of_a_deleted_topic_begins_anew(kafka: Kafka, transport: KafkaTransport) -> None:
    """Kafka throws such places away late, or never, when a consumer that did not know yet told it where it was."""
    topic = new_topic()
    await provision(transport, topic._replace(groups=()))
    await send(transport, topic, *(packet(f"r-{number}") for number in range(3)))
    stale = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": group_id(topic.name, "shop")})
    await asyncio.to_thread(
        stale.commit, offsets=[TopicPartition(topic.name, 0, 3, "another topic")], asynchronous=False
    )
    await asyncio.to_thread(stale.close)

    assert await transport.provision([topic], verify_only=True) == [(topic.name, "shop")]
    await provision(transport, topic)

    assert await transport.depth(topic, "shop") == 3
    assert len(await take(await transport.subscribe(topic, "shop"), 3)) == 3


async def test_topic_that_may_not_be_made_again_is_a_failure_for_now(own_server: OwnKafka) -> None:
    """Said once; it is made as soon as somebody gives the right back."""
    topic = new_topic()
    allow(own_server, topic, "CREATE", "READ", "WRITE", "DESCRIBE")
    async with open_transport(own_server.safe_url) as transport:
        await provision(transport, topic)
        await send(transport, topic, packet("before"))
        forbid(own_server, topic, "CREATE")
        await delete(own_server, topic)

        refused: list[Failed] = []
        with capture_logs() as logs:

            async def is_refused() -> bool:
                (receipt,) = await transport.send(topic, [packet("r-1")], deadline_s=DEADLINE_S, must_arrive=True)
                if isinstance(receipt, Failed) and "was deleted" in receipt.reason:
                    assert receipt.is_retryable and "uthoriz" in receipt.reason
                    refused.append(receipt)
                return len(refused) == 3

            await until(is_refused)
        assert [one["log_level"] for one in logs if one["event"] == "kafka.not_made_again"] == ["warning"]

        allow(own_server, topic, "CREATE")
        await insist(transport, topic, packet("after"))
        assert "after" in ids(await take(await transport.subscribe(topic, "shop"), 1))


async def test_broker_without_the_topic_of_events_is_said_to_be_away(own_server: OwnKafka, database_url: str) -> None:
    """Where Kassa may not make topics, somebody has to: it answers, and takes nothing."""
    async with open_transport(own_server.url) as by_hand:
        await provision(by_hand, EVENTS)
        brokers = (f"{own_server.url}#{EVENTS.name}",)
        async with running(database_url, brokers=brokers, broker_topology="verify") as house:
            (broker,) = house.app.brokers
            shop = await house.shop()
            wallet = await shop.wallet(1000)

            async def pay_until(is_away: bool) -> None:
                async with asyncio.timeout(WAIT_S):
                    while (broker.away_since is not None) != is_away:
                        assert (await shop.pay(wallet, 1)).status_code == 201
                        await asyncio.sleep(0.2)

            assert (await shop.pay(wallet, 1)).status_code == 201
            assert await asyncio.to_thread(read, own_server.bootstrap, EVENTS.name, 1)
            await delete(own_server, EVENTS)
            await pay_until(is_away=True)

            assert f"missing: {EVENTS.name}" in broker.reason
            assert await house.app.pool.fetchval("SELECT count(*) FROM parked") == 0
            await provision(by_hand, EVENTS)
            await pay_until(is_away=False)


async def test_consumer_goes_on_after_nobody_answered_when_its_lanes_came(
    transport: KafkaTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks in a callback of the client, which makes of an exception there one that ends the thread."""
    topic = await provision(transport, new_topic())
    await send(transport, topic, packet("r-1"))
    ask, unanswered = KafkaStream._beginnings, [KafkaException(KafkaError(KafkaError._TIMED_OUT))]

    def beginnings(stream: KafkaStream, consumer: Any, partitions: Any) -> Any:
        if unanswered:
            raise unanswered.pop()
        return ask(stream, consumer, partitions)

    monkeypatch.setattr(KafkaStream, "_beginnings", beginnings)
    stream = await transport.subscribe(topic, "shop")
    found: list[str] = []
    async with asyncio.timeout(WAIT_S):
        while not found:
            try:
                found = ids(await stream.receive(10, 1.0))
            except BrokerUnreachable:
                await asyncio.sleep(0.1)

    assert found == ["r-1"] and not unanswered


async def test_frozen_broker_fails_sends_by_their_deadline_and_loses_nothing(own_server: OwnKafka) -> None:
    async with open_transport(f"{own_server.url}?local_queue=100") as transport:
        topic = await provision(transport, new_topic())
        await send(transport, topic, packet("before"))
        await asyncio.to_thread(own_server.freeze)
        began = time.monotonic()
        try:
            packets = [packet(f"r-{number}", str(number)) for number in range(150)]
            receipts = await transport.send(topic, packets, deadline_s=2.0, must_arrive=True)
            took_s = time.monotonic() - began
        finally:
            await asyncio.to_thread(own_server.thaw)

        assert 1.9 < took_s < 30
        assert all(isinstance(receipt, Unknown) for receipt in receipts[:100])
        assert receipts[100:] == [Failed("too much waits for Kafka in this process", is_retryable=True)] * 50
        again = [packet(f"again-{number}", str(number)) for number in range(50)]

        async def is_taken() -> bool:
            answers = await transport.send(topic, again, deadline_s=2.0, must_arrive=True)
            return answers == [Confirmed()] * 50

        await until(is_taken)
        stream = await transport.subscribe(topic, "shop")
        await see(stream, "before", *(f"again-{number}" for number in range(50)))


async def test_producer_that_confirms_nothing_is_replaced(
    own_server: OwnKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lost its place without a word would send nothing until this process ends."""
    monkeypatch.setattr(kafka, "STUCK_S", 0.5)
    with capture_logs() as logs:
        async with open_transport(own_server.url) as transport:
            topic = await provision(transport, new_topic())
            await send(transport, topic, packet("before"))

            async def is_replaced() -> bool:
                await transport.send(topic, [packet("lost")], deadline_s=1.0, must_arrive=True)
                return any(one["event"] == "kafka.producer_replaced" for one in logs)

            await asyncio.to_thread(own_server.freeze)
            try:
                await until(is_replaced)
            finally:
                await asyncio.to_thread(own_server.thaw)

            async def is_taken() -> bool:
                return await transport.send(topic, [packet("after")], deadline_s=1.0, must_arrive=True) == [Confirmed()]

            await until(is_taken)


async def test_what_a_stopped_broker_did_not_get_by_the_deadline_never_comes(own_server: OwnKafka) -> None:
    async with open_transport(own_server.url) as transport:
        topic = await provision(transport, new_topic())
        await send(transport, topic, packet("before"))
        await asyncio.to_thread(own_server.stop)
        try:
            (receipt,) = await transport.send(topic, [packet("late")], deadline_s=1.0, must_arrive=True)
            assert isinstance(receipt, Unknown)
            # The producer looks for what is too old once a second.
            await asyncio.sleep(1.5)
        finally:
            await asyncio.to_thread(own_server.start)
        await send(transport, topic, packet("after"))

        stream = await transport.subscribe(topic, "shop")
        assert sorted(ids(await take(stream, 2))) == ["after", "before"]
        assert await stream.receive(10, 0.5) == []


async def test_broker_that_is_away_is_said_to_be(own_server: OwnKafka) -> None:
    async with open_transport(own_server.url) as transport:
        topic = await provision(transport, new_topic())
        await asyncio.to_thread(own_server.kill)
        try:
            (receipt,) = await transport.send(new_topic(), [packet("r-1")], deadline_s=1.0, must_arrive=True)
            assert isinstance(receipt, Failed) and receipt.is_retryable
        finally:
            await asyncio.to_thread(own_server.start)
        assert await transport.depth(topic, "shop") == 0
    with pytest.raises(BrokerUnreachable, match=r"kafka://127\.0\.0\.1:9 "):
        async with open_transport("kafka://127.0.0.1:9"):
            raise AssertionError("nobody listens there")


@pytest.mark.parametrize("end", ["kill", pytest.param("stop", marks=pytest.mark.long)])
async def test_broker_ends_under_load_and_every_effect_happens_once(
    own_server: OwnKafka, database_url: str, end: str
) -> None:
    async with open_bench(own_server.url, database_url, new_topic()) as bench:
        await under_load(bench, 1500, lambda: _end_and_start(bench, own_server, end))


async def _end_and_start(bench: Bench, server: OwnKafka, end: str) -> None:
    await until(lambda: _has_effects(bench, 300))
    await asyncio.to_thread(server.kill if end == "kill" else server.stop)
    await asyncio.to_thread(server.start)


async def _has_effects(bench: Bench, wanted: int) -> bool:
    return await bench.count() >= wanted


@pytest.mark.long
async def test_rounds_of_kills_stops_and_freezes(own_server: OwnKafka, database_url: str) -> None:
    seed = Random().randrange(1_000_000)
    print(f"seed {seed}")
    random = Random(seed)
    total = 10_000

    async def trouble() -> None:
        for _ in range(8):
            # A quick machine may have handled them all before the last round.
            wanted = min(total, await bench.count() + random.randint(100, 400))
            await until(partial(_has_effects, bench, wanted))
            end = random.choice(["kill", "stop", "freeze"])
            await asyncio.to_thread(getattr(own_server, end))
            await asyncio.sleep(random.uniform(0.0, 3.0))
            await asyncio.to_thread(own_server.thaw if end == "freeze" else own_server.start)

    async with open_bench(own_server.url, database_url, new_topic()) as bench:
        await under_load(bench, total, trouble, consumers=3)


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.ANSWER_LOST])
async def test_connection_cut_in_the_middle_of_a_batch(own_server: OwnKafka, database_url: str, cut: Cut) -> None:
    """Before the broker has the batch, and after it has it and before we know."""
    cutter = Cutter(f"kafka://{HOST}:{own_server.port('line')}")
    await cutter.start(own_server.port("proxy"))
    topic = new_topic()
    try:
        async with open_bench(own_server.line_url, database_url, topic) as bench:

            async def trouble() -> None:
                for cuts in range(CUTS):
                    # A batch of records carries their headers.
                    cutter.arm(b"kassa-id", cut)
                    await until(partial(_is_cut, cutter, cuts))

            await under_load(bench, 1200, trouble)
            assert cutter.cuts == CUTS
    finally:
        await cutter.stop()


async def _is_cut(cutter: Cutter, before: int) -> bool:
    return cutter.cuts > before


# TLS, passwords and rights


@pytest.mark.parametrize("sasl", ["PLAIN", "SCRAM-SHA-512"])
async def test_password_over_tls_opens_the_door(own_server: OwnKafka, sasl: str) -> None:
    topic = new_topic()
    async with open_transport(own_server.url) as everybody:
        await provision(everybody, topic)
    allow(own_server, topic, "READ", "WRITE", "DESCRIBE")
    async with open_transport(f"{own_server.safe_url}&sasl={sasl}") as transport:
        await send(transport, topic, packet("r-1"))
        assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["r-1"]


async def test_wrong_password_is_refused_at_once_and_not_shown(own_server: OwnKafka) -> None:
    began = time.monotonic()
    with pytest.raises(SettingInvalid, match="refuses us") as refused:
        async with open_transport(own_server.safe_url.replace(own_server.password, "wrong-one")):
            raise AssertionError("it opened")

    assert time.monotonic() - began < 60
    assert "wrong-one" not in str(refused.value)


async def test_server_of_another_authority_is_refused(own_server: OwnKafka) -> None:
    url = own_server.safe_url.partition("?")[0]
    with pytest.raises(SettingInvalid, match="certificate"):
        async with open_transport(url):
            raise AssertionError("it opened")
    async with open_transport(f"{url}?verify=none") as transport:
        assert await transport.provision([], verify_only=True) == []


async def test_verifying_needs_no_right_but_to_look(own_server: OwnKafka) -> None:
    topic = new_topic()
    async with open_transport(own_server.url) as everybody:
        await provision(everybody, topic)
    allow(own_server, topic, "DESCRIBE")

    async with open_transport(own_server.safe_url) as transport:
        assert await transport.provision([topic], verify_only=True) == []
        books = topic._replace(groups=("shop", "books"))
        assert await transport.provision([books], verify_only=True) == [(topic.name, "books")]
        (receipt,) = await transport.send(topic, [packet("r-1")], deadline_s=DEADLINE_S, must_arrive=True)
        assert isinstance(receipt, Failed) and receipt.is_retryable
        with pytest.raises(SettingInvalid, match="uthoriz"):
            await transport.provision([new_topic()], verify_only=False)


def allow(server: OwnKafka, topic: Topic, *operations: str) -> None:
    """Gives the user of the TLS door these rights on a topic, and on the groups of its name."""
    from confluent_kafka.admin import (  # type: ignore[attr-defined]
        AclBinding,
        AclOperation,
        AclPermissionType,
        ResourcePatternType,
        ResourceType,
    )

    admin = AdminClient({"bootstrap.servers": server.bootstrap})
    bindings = [
        AclBinding(
            kind, topic.name, ResourcePatternType.PREFIXED, f"User:{server.username}", "*", AclOperation[operation],
            AclPermissionType.ALLOW,
        )
        for kind in (ResourceType.TOPIC, ResourceType.GROUP)
        for operation in operations
        if kind == ResourceType.TOPIC or operation != "WRITE"
    ]  # fmt: skip
    for binding, future in admin.create_acls(bindings).items():
        future.result()
        until_heard(admin, binding, is_given=True)


def forbid(server: OwnKafka, topic: Topic, operation: str) -> None:
    """Takes a right on the topic, not on its groups, from the user of the TLS door."""
    from confluent_kafka.admin import (  # type: ignore[attr-defined]
        AclBindingFilter,
        AclOperation,
        AclPermissionType,
        ResourcePatternType,
        ResourceType,
    )

    admin = AdminClient({"bootstrap.servers": server.bootstrap})
    one = AclBindingFilter(
        ResourceType.TOPIC, topic.name, ResourcePatternType.PREFIXED, f"User:{server.username}", "*",
        AclOperation[operation], AclPermissionType.ALLOW,
    )  # fmt: skip
    for future in admin.delete_acls([one]).values():
        for binding in future.result():
            until_heard(admin, binding, is_given=False)


async def test_packets_that_somebody_deleted_before_the_group_had_them_are_told_and_counted(
    transport: KafkaTransport, kafka: Kafka
) -> None:
    """Also to a consumer that was away meanwhile, and though nothing is left."""
    topic = await provision(transport, new_topic(lanes=1))
    stream = await transport.subscribe(topic, "shop")
    await send(transport, topic, packet("r-0"))
    await stream.settle(await take(stream, 1))
    await stream.close()
    await send(transport, topic, *(packet(f"r-{number}") for number in range(1, 31)))
    end = TopicPartition(topic.name, 0, -1)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    await asyncio.to_thread(lambda: admin.delete_records([end])[end].result(WAIT_S))

    with capture_logs() as logs:
        stream = await transport.subscribe(topic, "shop")
        assert await stream.receive(1, 0.1) == []
        await until(partial(is_told, logs))
    await send(transport, topic, packet("r-31"))

    assert ids(await take(stream, 1)) == ["r-31"]
    assert [(one["log_level"], one["packets"], one["group"]) for one in said(logs)] == [("warning", 30, "shop")]
    assert transport.meters.passage(topic.name, "shop").vanished == 30


async def test_log_that_was_cut_back_is_read_and_committed_again(transport: KafkaTransport) -> None:
    """A server that lost the end of its disk gives offsets out again, below those that were settled."""
    topic = await provision(transport, new_topic(lanes=1))
    await send(transport, topic, *(packet(f"r-{number}") for number in range(3)))
    stream = await transport.subscribe(topic, "shop")
    await stream.settle(await take(stream, 3))
    # As if 1000 of them had been there.
    (held,) = stream._held.values()
    held.upto = held.next = 1000

    await send(transport, topic, packet("r-3"))
    with pytest.raises(BrokerUnreachable, match="cut back"):
        await take(stream, 1)
    again = await take(stream, 1)

    assert again[0].epoch != held.epoch
    await stream.settle(again)
    (fresh,) = stream._held.values()
    assert fresh.upto < 1000 and not fresh.settled


def said(logs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [one for one in logs if one["event"] == "kafka.packets_vanished"]


async def is_told(logs: Sequence[Mapping[str, Any]]) -> bool:
    return bool(said(logs))


async def test_packet_that_ends_whoever_has_it_is_handed_out_alone_in_the_end(kafka: Kafka, database_url: str) -> None:
    """Kafka does not count. One that is handled meanwhile is no suspect any more."""
    async with open_bench(kafka.url, database_url, new_topic(lanes=1)) as bench:
        await ended_by_its_first(bench, deaths=CRASHES_MAX)
