"""RocketMQ for itself: what it alone can do, and what it may do to us. What it shares with the others is in conformance."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from random import Random
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from brokers import rocketmq_client
from brokers.load import under_load
from brokers.rocketmq_house import (
    DELETE_GROUP,
    delete_topic,
    ids,
    new_topic,
    open_bench,
    open_transport,
    packet,
    take,
    tell_broker,
)
from brokers.streams import see
from chaos.brokers.line import Line
from chaos.brokers.posts import with_port
from conformance.journal.cutter import Cut, Cutter
from conformance.messaging.house import Bench, collect, record, until
from kassa.db import embedded
from kassa.errors import BrokerUnreachable, QueueMismatch, QueueNotFound, SettingInvalid
from kassa.ids import new_id
from kassa.messaging.binders import rocketmq as ours
from kassa.messaging.binders import rocketmq_wire as wire
from kassa.messaging.binders.rocketmq import RocketStream, RocketTransport, group_name, message_group, topic_name
from kassa.messaging.model import Ack, Arrival, Confirmed, Failed, Packet, Receipt, Unknown
from kassa.messaging.topology import Topic, lane
from servers import RocketMQ

pytestmark = pytest.mark.needs("rocketmq")

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[RocketMQ]:
    """One that may be killed."""
    with embedded.temporary_directory("kassa-rocketmq-") as directory:
        server = RocketMQ(directory / "rocketmq").start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
async def transport(rocketmq: RocketMQ) -> AsyncIterator[RocketTransport]:
    async with open_transport(rocketmq.url) as opened:
        yield opened


async def ready(transport: RocketTransport, *, keyed: bool = True) -> Topic:
    """A topic that is there."""
    topic = new_topic()._replace(keyed=keyed)
    await transport.provision([topic], verify_only=False)
    return topic


async def send(transport: RocketTransport, topic: Topic, *packets: Packet) -> list[Receipt]:
    return await transport.send(topic, packets, deadline_s=DEADLINE_S, must_arrive=True)


def key_of(number: int) -> str:
    """A key that falls into a lane."""
    return next(f"k{one}" for one in range(1000) if lane(f"k{one}", 8) == number)


# Names and settings


def test_names_are_recognisable_and_no_two_are_the_same() -> None:
    assert topic_name("kassa.events") == "kassa--events"
    assert topic_name("payment_order") == "payment_order"
    assert topic_name("my-orders.urgent") == "my-orders--urgent"
    assert group_name("kassa.events", "shop") == "kassa--events---shop"
    assert group_name("a", "b.c") != group_name("a.b", "c")


@pytest.mark.parametrize("name", ["", "a--b", "a..b", "a.-b", "a-.b", "a.", "-a", "a b", "ü", "a:b", "x" * 128])
def test_name_that_could_be_another_ones_is_refused(name: str) -> None:
    with pytest.raises(SettingInvalid, match="no topic or group of the name"):
        topic_name(name)


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("namesrv=nowhere", "namesrv is HOST:PORT"),
        ("tls=yes", "tls is 0 or 1"),
        ("ca=/x", "are for tls=1"),
        ("colour=red", "nobody knows colour"),
    ],
)
def test_url_that_cannot_be_read_is_refused_without_its_password(query: str, complaint: str) -> None:
    with pytest.raises(SettingInvalid, match=complaint) as refused:
        wire.read_url(f"rocketmq://key:secret@127.0.0.1:8081?{query}")

    assert "secret" not in str(refused.value)


async def test_each_lane_has_a_queue_of_its_own(transport: RocketTransport, rocketmq: RocketMQ) -> None:
    topic = await ready(transport)

    await send(transport, topic, *(packet(f"r-{number}", key=key_of(number)) for number in range(8)))
    await send(
        transport, topic._replace(envelopes=True), *(packet(f"e-{number}", key=str(number)) for number in (3, 5))
    )

    answer = await tell_broker(rocketmq, wire.TOPIC_STATS, {"topic": topic_name(topic.name)})
    ends = {int(queue): int(end) for queue, end in ours._ENDS.findall(answer.body)}
    assert ends == {number: 2 if number in (3, 5) else 1 for number in range(8)}


@pytest.mark.parametrize("lanes", [1, 2, 7, 8, 64])
def test_every_lane_has_a_text_of_its_own(lanes: int) -> None:
    assert len({message_group(number, lanes) for number in range(lanes)}) == lanes


# Topology


async def test_topic_and_group_of_another_form_are_refused_with_what_to_do(
    transport: RocketTransport, rocketmq: RocketMQ
) -> None:
    topic = await ready(transport, keyed=False)

    with pytest.raises(QueueMismatch, match=r"of the type NORMAL and has to be FIFO\. Delete it"):
        await transport.provision([topic._replace(keyed=True)], verify_only=True)

    other = new_topic()
    await asyncio.to_thread(rocketmq.make_group, group_name(other.name, "shop"))
    with pytest.raises(QueueMismatch, match="is not orderly"):
        await transport.provision([other], verify_only=False)


async def test_verifying_says_what_is_missing_and_makes_nothing(transport: RocketTransport) -> None:
    topic = new_topic()

    for _ in range(2):
        assert await transport.provision([topic], verify_only=True) == [(topic.name, "shop")]
        assert await transport.provision([topic._replace(groups=())], verify_only=True) == [(topic.name, "")]
    with pytest.raises(QueueNotFound):
        await transport.subscribe(topic, "shop")


async def test_new_group_gets_what_is_sent_after_it_was_made(transport: RocketTransport) -> None:
    topic = await ready(transport)
    await send(transport, topic, *(packet(f"old-{number}", key=key_of(number % 8)) for number in range(16)))

    await transport.provision([topic._replace(groups=("shop", "books"))], verify_only=False)
    await send(transport, topic, packet("new"))

    assert await transport.depth(topic, "books") == 1
    assert ids(await take(await transport.subscribe(topic, "books"), 1)) == ["new"]


async def test_without_a_name_server_it_is_said_what_is_needed(rocketmq: RocketMQ, transport: RocketTransport) -> None:
    topic = await ready(transport)
    async with open_transport(f"rocketmq://{rocketmq.endpoint}") as blind:
        with pytest.raises(SettingInvalid, match="needs namesrv"):
            await blind.provision([topic], verify_only=True)
        assert await blind.depth(topic, "shop") is None
        assert await send(blind, topic, packet("r-1")) == [Confirmed()]
        assert ids(await take(await blind.subscribe(topic, "shop"), 1)) == ["r-1"]


# What travels


async def test_headers_come_back_as_they_were(transport: RocketTransport) -> None:
    topic = await ready(transport)
    headers = {
        "content-type": "text/plain", "correlation-id": "", "reply-to": "somewhere", "ce-type": "order.made",
        "ce-id": "1-2-3", "kassa.x": "1", "ü": "ö", "with space": "a b", "empty": "",
    }  # fmt: skip

    sent = [
        Packet("r-1", "k", b"\x00\xff", headers),
        packet("r-2", "k", b""),
        packet("r-3", "k", Random(1).randbytes(3_000_000)),
    ]
    assert await send(transport, topic, *sent) == [Confirmed()] * 3

    stream = await transport.subscribe(topic, "shop")
    arrivals: list[Arrival] = []
    while len(arrivals) < 3:
        # The broker gives out no more than some hundred kilobytes, and then nothing of the lane until that is settled.
        some = await take(stream, 1)
        assert await stream.settle(some) == [True] * len(some)
        arrivals += some
    assert [replace(arrival.packet, key="k") for arrival in arrivals] == sent
    assert [arrival.redeliveries for arrival in arrivals] == [0, 0, 0]
    assert all(arrival.sent_at is not None for arrival in arrivals)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(
    "bad",
    [packet("r-2", x="line\nbreak"), packet("r-2", KEYS="x"), packet("r-2", large="x" * 20_000)],
    ids=["control character", "RocketMQ's own name", "large headers"],
)
async def test_what_rocketmq_cannot_say_fails_alone(transport: RocketTransport, keyed: bool, bad: Packet) -> None:
    topic = await ready(transport, keyed=keyed)

    first, second, third = await send(transport, topic, packet("r-1"), bad, packet("r-3"))

    assert first == third == Confirmed()
    assert isinstance(second, Failed) and not second.is_retryable
    assert sorted(ids(await take(await transport.subscribe(topic, "shop"), 2))) == ["r-1", "r-3"]


async def test_packets_without_order_travel_in_batches(transport: RocketTransport) -> None:
    topic = await ready(transport, keyed=False)
    names = [f"r-{number}" for number in range(250)]

    assert await send(transport, topic, *(packet(name) for name in names)) == [Confirmed()] * 250

    stream = await transport.subscribe(topic, "shop")
    arrivals = await take(stream, 250)
    assert sorted(ids(arrivals)) == sorted(names)
    assert await stream.settle(arrivals) == [True] * 250


async def test_plain_programs_send_and_receive(transport: RocketTransport, rocketmq: RocketMQ) -> None:
    """Over the official stubs, as a request over the queue and its answer."""
    topic = await ready(transport, keyed=False)
    replies = f"replies_{new_id()[-12:]}"
    await asyncio.to_thread(rocketmq.make_topic, replies)
    await asyncio.to_thread(rocketmq.make_group, replies)
    asked = {"reply-topic": replies, "correlation-id": "c-1", "CE_type": "order.made", "CE_contenttype": "text/plain"}

    wire_name = topic_name(topic.name)
    id = await rocketmq_client.send(rocketmq.endpoint, wire_name, b"how much?", key="123", properties=asked)
    (arrival,) = await take(await transport.subscribe(topic, "shop"), 1)
    headers = arrival.packet.headers
    answer = packet("a-1", body=b"100", correlation_id=headers["correlation-id"])
    receipts = await transport.reply(headers["reply-to"], [answer], deadline_s=DEADLINE_S)

    assert (arrival.packet.id, arrival.packet.body) == (id, b"how much?")
    assert (headers["ce-type"], headers["content-type"]) == ("order.made", "text/plain")
    assert receipts == [Confirmed()]
    assert await rocketmq_client.receive(rocketmq.endpoint, replies, replies) == b"100"


async def test_reply_to_a_topic_of_ours_goes_to_its_lane_and_to_none_has_failed(transport: RocketTransport) -> None:
    topic = await ready(transport)

    assert await transport.reply(topic.name, [packet("a-1")], deadline_s=DEADLINE_S) == [Confirmed()]
    assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["a-1"]
    for address in ("replies-nobody", "not a name", "TBW102", "%RETRY%shop"):
        (receipt,) = await transport.reply(address, [packet("a-2")], deadline_s=DEADLINE_S)
        assert isinstance(receipt, Failed) and not receipt.is_retryable


async def test_garbage_is_received_and_stops_nobody(rocketmq: RocketMQ, database_url: str) -> None:
    topic = new_topic()._replace(keyed=False)
    name = topic_name(topic.name)
    async with open_bench(rocketmq.url, database_url, topic) as bench:
        subscription = await bench.binder.subscribe(topic.name, "shop")
        for body, properties in [
            (b"\xff\xfe", {}),
            (b"[broken", {"content-type": "application/cloudevents-batch+json"}),
            (b"x", {"kassa-priority": "many", "CE_": "", "kassa-empty": "{", "kassa-empty-body": "1"}),
            (b"deep", {"kassa-empty": "[" * 2000}),
        ]:
            await rocketmq_client.send(rocketmq.endpoint, name, body, properties=properties)
        await rocketmq_client.send(rocketmq.endpoint, name, b"no gzip at all", is_gzip=True)
        await rocketmq_client.send(rocketmq.endpoint, name, zlib.compress(b"squeezed"), is_gzip=True)
        bomb = zlib.compress(bytes(wire.BYTES_MAX))
        await rocketmq_client.send(rocketmq.endpoint, name, bomb, is_gzip=True)
        await bench.binder.send(topic.name, [record("r-1")], deadline_s=DEADLINE_S)

        deliveries = await collect(subscription, 7)

        bodies = {delivery.record.body for delivery in deliveries}
        assert bodies == {b"\xff\xfe", b"x", b"deep", b"no gzip at all", b"squeezed", bomb, b"{}"}
        assert await subscription.settle([(delivery, Ack()) for delivery in deliveries]) == [True] * 7
        (letter,) = await bench.letters.browse(f"{topic.name}:shop")
        assert letter.body == b"[broken"


# Sessions


async def test_started_again_it_gives_the_same_in_order_and_the_broker_counts_nothing(
    transport: RocketTransport,
) -> None:
    topic = await ready(transport)
    await send(transport, topic, *(packet(f"r-{number}", key="k") for number in range(4)))
    stream = await transport.subscribe(topic, "shop")
    stale = await take(stream, 4)
    assert await stream.settle(stale[:1]) == [True]

    await stream.restart()

    assert await stream.settle(stale[1:]) == [False] * 3
    again = await take(stream, 3)
    assert [(arrival.packet.id, arrival.redeliveries) for arrival in again] == [("r-1", 0), ("r-2", 0), ("r-3", 0)]
    assert await stream.settle(again) == [True] * 3
    await until_depth(transport, topic, 0)


async def test_what_is_settled_out_of_order_is_acknowledged_in_order(transport: RocketTransport) -> None:
    topic = await ready(transport)
    await send(transport, topic, *(packet(f"r-{number}", key="k") for number in range(6)))
    stream = await transport.subscribe(topic, "shop")
    arrivals = await take(stream, 6)

    assert await stream.settle([arrivals[1], arrivals[4]]) == [True, True]
    assert await transport.depth(topic, "shop") == 6
    assert await stream.settle([arrivals[1], arrivals[0]]) == [False, True]
    await until_depth(transport, topic, 4)
    await stream.close()

    again = await take(await transport.subscribe(topic, "shop"), 4)
    assert ids(again) == ["r-2", "r-3", "r-4", "r-5"]
    assert all((arrival.redeliveries or 0) >= 1 for arrival in again)


async def test_what_is_held_for_long_stays_ours(transport: RocketTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for anew each second of ten, so that a machine that stands still for some of them loses nothing."""
    monkeypatch.setattr(ours, "INVISIBLE_S", 10.0)
    monkeypatch.setattr(ours, "MARGIN_S", 7.0)
    monkeypatch.setattr(ours, "LOOK_S", 0.2)

    async def hold(keyed: bool) -> None:
        topic = await ready(transport, keyed=keyed)
        await send(transport, topic, *(packet(f"r-{number}", key="k") for number in range(3)))
        holder, other = [await transport.subscribe(topic, "shop") for _ in range(2)]
        arrivals = await take(holder, 3)

        assert await other.receive(10, 12.0) == []

        assert await holder.settle(arrivals) == [True] * 3
        assert await other.receive(10, 1.0) == []
        await until_depth(transport, topic, 0)

    await asyncio.gather(hold(True), hold(False))


async def end_session(holder: RocketStream) -> None:
    """As the proxy does when it is started again."""
    await session_of(holder).end()


async def give_up_connection(holder: RocketStream) -> None:
    """As a sender does on whose connection nothing is answered."""
    holder._transport.link.renew(session_of(holder).channel)


async def cancel_sign_of_life(holder: RocketStream) -> None:
    """As gRPC does with what is being said when a fetcher ends the session."""

    async def cancelled(_: object) -> None:
        raise asyncio.CancelledError

    session_of(holder).telemetry.write = cancelled


def session_of(stream: RocketStream) -> ours._Session:
    assert stream._session_now is not None
    return stream._session_now


@pytest.mark.parametrize(
    "lose",
    [
        end_session,
        pytest.param(give_up_connection, marks=pytest.mark.long),
        pytest.param(cancel_sign_of_life, marks=pytest.mark.long),
    ],
)
async def test_what_is_held_stays_ours_when_the_session_is_lost_and_nobody_asks(
    rocketmq: RocketMQ,
    transport: RocketTransport,
    monkeypatch: pytest.MonkeyPatch,
    lose: Callable[[RocketStream], Awaitable[None]],
) -> None:
    """A handler that takes long asks for nothing."""
    monkeypatch.setattr(ours, "INVISIBLE_S", 10.0)
    monkeypatch.setattr(ours, "MARGIN_S", 4.0)
    monkeypatch.setattr(ours, "LOOK_S", 0.2)
    monkeypatch.setattr(ours, "BEAT_S", 1.0)
    topic = await ready(transport)
    await send(transport, topic, packet("r-0", key="k"))
    async with open_transport(rocketmq.url) as holding:
        holder = await holding.subscribe(topic, "shop")
        arrivals = await take(holder, 1)
        await lose(holder)
        other = await transport.subscribe(topic, "shop")

        assert await other.receive(10, 15.0) == []

        assert await holder.settle(arrivals) == [True]
        await until_depth(transport, topic, 0)


async def test_handle_is_not_used_while_it_is_exchanged_though_another_exchange_failed(
    transport: RocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "MARGIN_S", ours.INVISIBLE_S / 2)
    topic = await ready(transport, keyed=False)
    await send(transport, topic, packet("r-0"), packet("r-1"))
    stream = await transport.subscribe(topic, "shop")
    failing, slow = await take(stream, 2)
    exchanged: list[str] = []

    class Proxy(NamedTuple):
        async def change(self, request: Any, **_: object) -> Any:
            if request.message_id == failing.packet.id:
                raise TimeoutError
            await asyncio.sleep(0.2)
            exchanged.append(request.message_id)
            return wire.make("ChangeInvisibleDurationResponse")

    with pytest.raises(TimeoutError):
        # In the place of RocketMQ's own proxy, which cannot be told to fail one exchange while another one runs.
        await stream._extend(Proxy())  # type: ignore[arg-type]

    assert exchanged == [slow.packet.id]


async def test_what_ran_out_is_not_kept_in_mind(transport: RocketTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "INVISIBLE_S", 2.0)
    monkeypatch.setattr(ours, "MARGIN_S", 1.9)
    topic = await ready(transport, keyed=False)
    await send(transport, topic, *(packet(f"r-{number}") for number in range(3)))
    stream = await transport.subscribe(topic, "shop")

    async with asyncio.timeout(DEADLINE_S):
        while not any(one.held for one in stream._lanes.values()):
            await stream.receive(10, 0.1)

    async def is_forgotten() -> bool:
        return not any(one.held for one in stream._lanes.values())

    await until(is_forgotten)


async def until_depth(transport: RocketTransport, topic: Topic, expected: int) -> None:
    async def is_there() -> bool:
        return await transport.depth(topic, "shop") == expected

    await until(is_there)


async def test_what_a_dead_consumer_held_goes_to_another_and_is_not_its_any_more(
    rocketmq: RocketMQ, transport: RocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "INVISIBLE_S", 4.0)
    monkeypatch.setattr(ours, "MARGIN_S", 3.0)
    topic = await ready(transport)
    await send(transport, topic, packet("r-1", key="k"), packet("r-2", key="k"))
    async with open_transport(rocketmq.url) as dying:
        dead = await dying.subscribe(topic, "shop")
        arrivals = await take(dead, 2)
        for task in (*dead._fetchers.values(), *dead._keepers):
            task.cancel()
        monkeypatch.setattr(ours, "INVISIBLE_S", 30.0)

        again = await take(await transport.subscribe(topic, "shop"), 2)

        assert ids(again) == ["r-1", "r-2"]
        assert dead.held(arrivals[:1]) == [False]
        assert await dead.settle(arrivals) == [False, False]


async def test_consumer_that_left_keeps_nobody_waiting(transport: RocketTransport) -> None:
    """The broker may still answer its last question: that packet comes to the next one a second later."""
    topic = await ready(transport)
    leaving = await transport.subscribe(topic, "shop")
    assert await leaving.receive(10, 0.2) == []
    await leaving.close()
    await send(transport, topic, packet("r-1", key="k"))
    began = asyncio.get_running_loop().time()

    assert ids(await take(await transport.subscribe(topic, "shop"), 1)) == ["r-1"]

    assert asyncio.get_running_loop().time() - began < 20


async def test_consumer_that_leaves_when_its_connection_was_given_up_gives_back_what_it_held(
    rocketmq: RocketMQ, transport: RocketTransport
) -> None:
    topic = await ready(transport)
    await send(transport, topic, packet("r-0", key="k"), packet("r-1", key="k"))
    async with open_transport(rocketmq.url) as leaving:
        holder = await leaving.subscribe(topic, "shop")
        assert ids(await take(holder, 2)) == ["r-0", "r-1"]
        await give_up_connection(holder)
        await holder.close()
        began = asyncio.get_running_loop().time()

        assert ids(await take(await transport.subscribe(topic, "shop"), 2)) == ["r-0", "r-1"]

    assert asyncio.get_running_loop().time() - began < ours.INVISIBLE_S / 2


# Trouble


async def test_consumer_goes_on_after_its_topic_was_deleted(
    rocketmq: RocketMQ, transport: RocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker forgets the topic, and not that the place of its first packet is held."""
    monkeypatch.setattr(ours, "INVISIBLE_S", 3.0)
    monkeypatch.setattr(ours, "MARGIN_S", 1.0)
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    await send(transport, topic, packet("r-0", key="k"))
    (stale,) = await take(stream, 1)

    await delete_topic(rocketmq, topic_name(topic.name))

    async def is_made_again() -> bool:
        receipts = await send(transport, topic, *(packet(f"r-{number}", key=key_of(number)) for number in range(8)))
        return receipts == [Confirmed()] * 8

    await until(is_made_again)
    await see(stream, *(f"r-{number}" for number in range(8)))
    assert await stream.settle([stale]) == [False]


async def test_consumer_goes_on_when_somebody_else_has_given_up_the_connection(transport: RocketTransport) -> None:
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")

    dead = await transport.link.live()
    transport.link.renew(dead)
    await dead.close()
    await send(transport, topic, packet("r-0", key="k"))

    assert ids(await take(stream, 1)) == ["r-0"]


async def test_consumer_goes_on_after_its_group_was_deleted(
    rocketmq: RocketMQ, transport: RocketTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "BEAT_S", 0.5)
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    await send(transport, topic, packet("r-0", key="k"))
    assert await stream.settle(await take(stream, 1)) == [True]

    await tell_broker(rocketmq, DELETE_GROUP, {"groupName": group_name(topic.name, "shop"), "cleanOffset": "true"})
    await send(transport, topic, packet("r-1", key="k"))

    await see(stream, "r-1")


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.ANSWER_LOST, pytest.param(Cut.SILENT, marks=pytest.mark.long)])
async def test_connection_cut_while_sending_leaves_doubt_and_no_loss(
    rocketmq: RocketMQ, database_url: str, cut: Cut
) -> None:
    topic = new_topic()
    cutter = Cutter(rocketmq.url)
    async with open_bench(await cutter.start(), database_url, topic) as bench:

        async def trouble() -> None:
            cutter.arm(b"7-187", cut)

        await under_load(bench, 200, trouble, consumers=1)
    assert cutter.cuts == 1
    await cutter.stop()


async def test_answer_with_packets_that_was_lost_is_asked_for_again(
    rocketmq: RocketMQ, transport: RocketTransport
) -> None:
    """The broker has given them out, and would keep them from everybody for half a minute."""
    topic = await ready(transport)
    await send(transport, topic, *(packet(f"r-{number}", key="k") for number in range(3)))
    cutter = Cutter(rocketmq.url)
    async with open_transport(await cutter.start()) as cut_off:
        stream = await cut_off.subscribe(topic, "shop")
        cutter.arm(group_name(topic.name, "shop").encode(), Cut.ANSWER_LOST)
        began = asyncio.get_running_loop().time()

        arrivals = await take(stream, 3)

        assert ids(arrivals) == ["r-0", "r-1", "r-2"]
        assert asyncio.get_running_loop().time() - began < 20
        assert await stream.settle(arrivals) == [True] * 3
    assert cutter.cuts == 1
    await cutter.stop()


async def test_connection_cut_at_an_acknowledgement_repeats_no_effect(rocketmq: RocketMQ, database_url: str) -> None:
    topic = new_topic()
    cutter = Cutter(rocketmq.url)
    async with open_bench(await cutter.start(), database_url, topic) as bench:

        async def trouble() -> None:
            for times in (1, 2, 3):
                cutter.arm(group_name(topic.name, "shop").encode(), Cut.ANSWER_LOST)
                await until(partial(has_cut, cutter, times))

        await under_load(bench, 300, trouble, consumers=1)
    assert cutter.cuts == 3
    await cutter.stop()


async def has_cut(cutter: Cutter, times: int) -> bool:
    return cutter.cuts >= times


@pytest.mark.parametrize("deadline_s", [1.0, pytest.param(15.0, marks=pytest.mark.long)])
async def test_who_only_sends_leaves_a_line_that_is_open_at_his_end_alone(
    rocketmq: RocketMQ, deadline_s: float
) -> None:
    """As the relay does: there is no receiving that would notice."""
    line = Line(rocketmq.port("grpc"))
    try:
        async with open_transport(with_port(rocketmq.url, await line.start())) as transport:
            topic = await ready(transport)
            assert await send(transport, topic, packet("r-0")) == [Confirmed()]
            line.forget()

            receipts = [
                await transport.send(topic, [packet("r-1")], deadline_s=deadline_s, must_arrive=True)
                for _ in range(round(60 / deadline_s))
            ]

            assert receipts[0] != [Confirmed()] and receipts[-1] == [Confirmed()]
    finally:
        await line.stop()


async def test_frozen_broker_fails_sends_by_their_deadline_and_loses_nothing(own_server: RocketMQ) -> None:
    async with open_transport(own_server.url) as transport:
        topic = await ready(transport)
        stream = await transport.subscribe(topic, "shop")
        assert await send(transport, topic, packet("r-0")) == [Confirmed()]
        own_server.freeze()
        try:
            began = asyncio.get_running_loop().time()
            sent = [packet(f"r-{number}", key=str(number)) for number in range(200)]
            receipts = await transport.send(topic, sent, deadline_s=1.0, must_arrive=True)
            took_s = asyncio.get_running_loop().time() - began
        finally:
            own_server.thaw()

        assert 1.0 <= took_s < 30
        assert {type(receipt) for receipt in receipts} == {Unknown, Failed}
        assert all(receipt.is_retryable for receipt in receipts if isinstance(receipt, Failed))
        assert await send(transport, topic, *sent) == [Confirmed()] * 200
        await see(stream, *(one.id for one in sent))


async def test_broker_killed_under_load_loses_and_repeats_nothing(own_server: RocketMQ, database_url: str) -> None:
    async with open_bench(own_server.url, database_url, new_topic()) as bench:

        async def trouble() -> None:
            await until(lambda: has_effects(bench))
            await asyncio.to_thread(own_server.kill)
            await asyncio.to_thread(own_server.start)

        await under_load(bench, 1000, trouble, end=lambda: is_empty(bench))


async def has_effects(bench: Bench) -> bool:
    return await bench.count() > 100


async def is_empty(bench: Bench) -> bool:
    return (await bench.binder.depth(bench.topic.name, "shop")).waiting == 0


async def test_broker_that_is_not_there_is_said_to_be(own_server: RocketMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CONNECT_S", 0.3)
    with pytest.raises(BrokerUnreachable, match=r"rocketmq://key:\*\*\*@127\.0\.0\.1:9\S* cannot be reached"):
        async with open_transport("rocketmq://key:secret@127.0.0.1:9"):
            pass

    nobody = RocketTransport(wire.read_url("rocketmq://127.0.0.1:9"))
    (receipt,) = await nobody.send(new_topic(), [packet("r-1")], deadline_s=0.3, must_arrive=True)
    await nobody.close()
    assert isinstance(receipt, Failed) and receipt.is_retryable


async def test_connection_given_up_while_a_sender_waits_for_it_fails_what_he_sends() -> None:
    nobody = RocketTransport(wire.read_url("rocketmq://127.0.0.1:9"))
    sending = asyncio.create_task(send(nobody, new_topic(), packet("r-0"), packet("r-1")))
    await asyncio.sleep(0.1)
    assert nobody.link._channel is not None

    nobody.link.renew(nobody.link._channel)

    receipts = await sending
    await nobody.close()
    assert all(isinstance(receipt, Failed) and receipt.is_retryable for receipt in receipts)


async def test_connection_given_up_under_what_was_sent_leaves_doubt(
    rocketmq: RocketMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "POLL_S", 0.1)
    monkeypatch.setattr(ours, "LATE_S", 0.1)
    line = Line(rocketmq.port("grpc"))
    try:
        async with open_transport(with_port(rocketmq.url, await line.start())) as transport:
            topic = await ready(transport)
            line.forget()
            sending = asyncio.create_task(send(transport, topic, packet("r-0")))
            await asyncio.sleep(0.1)

            transport.link.renew(await transport.link.live())

            (receipt,) = await sending
            assert isinstance(receipt, Unknown)
    finally:
        await line.stop()


async def test_connection_given_up_while_it_is_acknowledged_acknowledges_over_a_new_one(
    rocketmq: RocketMQ, transport: RocketTransport
) -> None:
    topic = await ready(transport)
    stream = await transport.subscribe(topic, "shop")
    await send(transport, topic, packet("r-0", key="k"))
    arrivals = await take(stream, 1)
    transport.link.renew(await transport.link.live())
    transport.link._channel = nobody = wire.Channel(wire.read_url("rocketmq://127.0.0.1:9"))

    settling = asyncio.create_task(stream.settle(arrivals))
    await asyncio.sleep(0.1)
    transport.link.renew(nobody)

    assert await settling == [True]


@pytest.mark.long
async def test_rounds_of_kills_stops_and_freezes(own_server: RocketMQ, database_url: str) -> None:
    random = Random(20260)
    async with open_bench(own_server.url, database_url, new_topic()) as bench:

        async def trouble() -> None:
            for _ in range(6):
                await asyncio.sleep(random.uniform(0.5, 4))
                match random.choice(("kill", "stop", "freeze")):
                    case "freeze":
                        own_server.freeze()
                        await asyncio.sleep(random.uniform(0.5, 15))
                        own_server.thaw()
                    case "stop":
                        await asyncio.to_thread(own_server.stop)
                        await asyncio.to_thread(own_server.start)
                    case "kill":
                        await asyncio.to_thread(own_server.kill)
                        await asyncio.to_thread(own_server.start)

        await under_load(bench, 10_000, trouble, end=lambda: is_empty(bench))
