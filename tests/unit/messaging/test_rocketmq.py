"""RocketMQ without its server: what strangers may send us, and what gRPC may do to us."""

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from kassa.errors import BrokerUnreachable
from kassa.messaging.binders import rocketmq as ours
from kassa.messaging.binders import rocketmq_wire as wire
from kassa.messaging.binders.rocketmq import RocketStream, RocketTransport
from kassa.messaging.model import Arrival, Failed, Packet, Record
from kassa.messaging.packing import single, unpack
from kassa.messaging.topology import Topic
from kassa.supervisor import end_tasks

TOPIC = Topic("shop.orders", ("shop",), "Orders, for the tests.")


class Conversation:
    """Telemetry: a greeting is answered, and then nothing is said."""

    def __init__(self) -> None:
        self._is_greeted = False

    async def write(self, _: object) -> None:
        return

    async def read(self) -> Any:
        if self._is_greeted:
            await asyncio.Event().wait()
        self._is_greeted = True
        return wire.make("TelemetryCommand", status=wire.make("Status", code=wire.OK))

    def cancel(self) -> None:
        return


class Proxy:
    """In the place of RocketMQ's own, which cannot be told to say such things, nor gRPC to fail so: an answer for each question."""

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)
        self.meanwhile: Callable[[], None] = lambda: None
        """Happens before a handle is exchanged."""
        self.asked: list[str] = []
        """Brokers."""
        self.changed: list[str] = []
        """Handles that were exchanged."""

    def telemetry(self, **_: object) -> Conversation:
        return Conversation()

    async def heartbeat(self, _: object, **__: object) -> Any:
        return wire.make("HeartbeatResponse", status=wire.make("Status", code=wire.OK))

    async def receive(self, request: Any, **_: object) -> AsyncIterator[Any]:
        self.asked.append(request.message_queue.broker.name)
        if not self._answers:
            await asyncio.sleep(ours.POLL_S)
            return
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = received("r-late")
        yield answer

    async def change(self, request: Any, **_: object) -> Any:
        self.changed.append(request.receipt_handle)
        self.meanwhile()
        return wire.make(
            "ChangeInvisibleDurationResponse", status=wire.make("Status", code=wire.OK), receipt_handle="new"
        )


class Line(ours.Link):
    """One that is always there."""

    def __init__(self, transport: RocketTransport, proxy: object) -> None:
        super().__init__(transport.server)
        self._proxy = proxy

    async def live(self, within_s: float = ours.CONNECT_S) -> Any:
        return self._proxy


def stream_at(proxy: object) -> RocketStream:
    return RocketStream(transport_at(proxy), TOPIC, "shop")


def transport_at(proxy: object, name_server: str = "") -> RocketTransport:
    transport = RocketTransport(wire.read_url(f"rocketmq://127.0.0.1:9?namesrv={name_server}"))
    transport.link = Line(transport, proxy)
    return transport


def received(id: str) -> Any:
    system = wire.make("SystemProperties", message_id=id, receipt_handle=id)
    return wire.make("ReceiveMessageResponse", message=wire.make("Message", system_properties=system))


# Properties


@pytest.mark.parametrize("names", [r'["\ud800"]', '[["x-empty"]]', '{"x-empty": 1}', "[", "[" * 100_000])
def test_names_of_empty_headers_that_are_no_text_are_passed_over(names: str) -> None:
    message = wire.make("Message", user_properties={ours.EMPTY_HEADERS: names})

    assert ours.packet_of(message).headers == {}


def test_event_without_a_key_comes_without_one() -> None:
    """The message group is its lane then."""
    event = Record("e-1", "", b"{}", {"ce-id": "e-1", "ce-source": "kassa.messaging", "ce-type": "shop.done"})

    (came,) = unpack(ours.packet_of(ours.message_of(single(event), "shop", "lane-4-3")), lambda: "none")

    assert (came.id, came.key) == ("e-1", "")


def test_name_that_is_no_text_costs_the_others_nothing() -> None:
    message = wire.make("Message", user_properties={ours.EMPTY_HEADERS: r'["\ud83d\ude00", "\ud800", "x-empty"]'})

    assert ours.packet_of(message).headers == {"😀": "", "x-empty": ""}


# Bodies


@pytest.mark.parametrize("wbits", [zlib.MAX_WBITS, zlib.MAX_WBITS + 16], ids=["zlib", "gzip"])
@pytest.mark.parametrize("length", [0, 1, ours.TRAITS.bytes_max])
def test_compressed_body_is_opened(wbits: int, length: int) -> None:
    assert ours.packet_of(compressed(squeezed(length, wbits))).body == bytes(length)


@pytest.mark.parametrize("length", [ours.TRAITS.bytes_max + 1, wire.BYTES_MAX, wire.BYTES_MAX + 1])
def test_compressed_body_that_is_longer_than_any_other_stays_as_it_came(length: int) -> None:
    """A stranger's few kilobytes cost no more memory than a packet may, and nothing is handed out without its end."""
    body = squeezed(length)

    assert ours.packet_of(compressed(body)).body == body


@pytest.mark.parametrize("body", [b"", b"no gzip at all", zlib.compress(bytes(1000))[:-1]])
def test_compressed_body_that_cannot_be_opened_to_its_end_stays_as_it_came(body: bytes) -> None:
    assert ours.packet_of(compressed(body)).body == body


def squeezed(length: int, wbits: int = zlib.MAX_WBITS) -> bytes:
    return zlib.compress(bytes(length), wbits=wbits)


def compressed(body: bytes) -> Any:
    return wire.make("Message", body=body, system_properties=wire.make("SystemProperties", body_encoding=wire.GZIP))


# Replies


@pytest.mark.parametrize(
    ("code", "is_retryable"),
    [
        (wire.TOPIC_NOT_FOUND, False),
        (wire.ILLEGAL_TOPIC, False),
        (wire.WRONG_TYPE, False),
        (wire.UNAUTHORIZED, True),
        (wire.FORBIDDEN, False),
        (wire.TOO_MANY, True),
        (40_800, True),
        (50_000, True),
        (50_400, True),
    ],
)
async def test_reply_is_given_up_only_where_no_topic_will_take_it(code: int, is_retryable: bool) -> None:
    class Refusing:
        async def query_route(self, _: object, **__: object) -> Any:
            return wire.make("QueryRouteResponse", status=wire.make("Status", code=code, message="no"))

    (receipt,) = await transport_at(Refusing()).reply("replies", [Packet("a-1", "", b"{}", {})], deadline_s=5)

    assert isinstance(receipt, Failed) and str(code) in receipt.reason
    assert receipt.is_retryable is is_retryable


async def test_reply_to_a_topic_of_other_messages_is_given_up() -> None:
    class Delaying:
        async def query_route(self, _: object, **__: object) -> Any:
            queue = wire.make("MessageQueue", accept_message_types=[3])
            status = wire.make("Status", code=wire.OK)
            return wire.make("QueryRouteResponse", status=status, message_queues=[queue])

    (receipt,) = await transport_at(Delaying()).reply("replies", [Packet("a-1", "", b"{}", {})], deadline_s=5)

    assert isinstance(receipt, Failed) and not receipt.is_retryable


class Rights:
    """A proxy that refuses some topics, all of them or only what is sent there, in the way that RocketMQ does."""

    def __init__(self, code: int, *refused: str, types: Sequence[int] = (wire.NORMAL,), at_sending: bool) -> None:
        self._no = wire.make("Status", code=code, message="no permission")
        self._refused = refused
        self._types = types
        self._at_sending = at_sending

    async def query_route(self, request: Any, **_: object) -> Any:
        if request.topic.name in self._refused and not self._at_sending:
            return wire.make("QueryRouteResponse", status=self._no)
        queue = wire.make("MessageQueue", accept_message_types=self._types)
        return wire.make("QueryRouteResponse", status=wire.make("Status", code=wire.OK), message_queues=[queue])

    async def send(self, request: Any, **_: object) -> Any:
        if request.messages[0].topic.name in self._refused:
            return wire.make("SendMessageResponse", status=self._no)
        return wire.make("SendMessageResponse", status=wire.make("Status", code=wire.OK))


TWO = [Packet("a-1", "k", b"{}", {}), Packet("a-2", "k", b"{}", {})]
"""One behind the other where there is an order."""


@pytest.mark.parametrize("at_sending", [True, False])
@pytest.mark.parametrize("types", [[wire.NORMAL], [wire.FIFO]])
@pytest.mark.parametrize("code", [wire.UNAUTHORIZED, wire.FORBIDDEN])
async def test_reply_to_a_topic_that_we_may_not_use_is_given_up(code: int, types: list[int], at_sending: bool) -> None:
    """RocketMQ 5.5 says UNAUTHORIZED of a missing right too."""
    proxy = Rights(code, "theirs", types=types, at_sending=at_sending)

    receipts = await transport_at(proxy).reply("theirs", TWO, deadline_s=5)

    for receipt in receipts:
        assert isinstance(receipt, Failed) and str(code) in receipt.reason
        assert not receipt.is_retryable


async def test_reply_waits_while_the_proxy_does_not_know_our_key() -> None:
    class Forgetful(Rights):
        """It forgets the key between the first question and what is sent."""

        async def send(self, request: Any, **_: object) -> Any:
            self._at_sending = False
            return await super().send(request)

    proxy = Forgetful(wire.UNAUTHORIZED, "theirs", ours.ANY_TOPIC, at_sending=True)

    receipts = await transport_at(proxy).reply("theirs", TWO, deadline_s=5)

    assert [isinstance(receipt, Failed) and receipt.is_retryable for receipt in receipts] == [True, True]


@pytest.mark.parametrize("code", [wire.UNAUTHORIZED, wire.FORBIDDEN])
async def test_topic_of_ours_is_tried_until_somebody_gives_us_the_right(code: int) -> None:
    transport = transport_at(Rights(code, ours.topic_name(TOPIC.name), at_sending=True))

    receipts = await transport.send(TOPIC, TWO, deadline_s=5, must_arrive=True)

    assert [isinstance(receipt, Failed) and receipt.is_retryable for receipt in receipts] == [True, True]


# Receiving


NO_TOPIC = wire.make("ReceiveMessageResponse", status=wire.make("Status", code=wire.TOPIC_NOT_FOUND))


@pytest.mark.parametrize(
    ("trouble", "at_making"),
    [
        (None, None),
        (asyncio.CancelledError(), None),
        (asyncio.InvalidStateError(), None),
        (KeyError("x"), None),
        (NO_TOPIC, KeyError("x")),
        (NO_TOPIC, asyncio.CancelledError()),
    ],
)
async def test_consumer_goes_on_whatever_becomes_of_a_question(
    monkeypatch: pytest.MonkeyPatch, trouble: object, at_making: BaseException | None
) -> None:
    """None is what grpc.aio makes of a part that protobuf refuses; a renewed connection cancels what is under way on it."""
    monkeypatch.setattr(ours, "RETRY_S", 0.01)
    stream = stream_at(Proxy(trouble, trouble, received("r-0")))

    async def make_again(*_: object) -> None:
        if at_making is not None:
            raise at_making

    monkeypatch.setattr(stream._transport, "make_again", make_again)
    stream._ask_these(["broker-a"])

    found: list[Arrival] = []
    complaints = 0
    async with asyncio.timeout(10):
        while not found:
            try:
                found = await stream.receive(10, 5.0)
            except BrokerUnreachable:
                complaints += 1
                await asyncio.sleep(0.001)

    assert [arrival.packet.id for arrival in found] == ["r-0"]
    assert complaints
    await end_tasks(*stream._fetchers.values())


async def test_time_of_a_packet_runs_since_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lay on its way, while the broker counted."""
    monkeypatch.setattr(ours, "INVISIBLE_S", 0.2 + ours.MARGIN_S)
    stream = stream_at(Proxy(0.3))
    stream._asked.set()
    stream._ask_these(["broker-a"])

    async with asyncio.timeout(10):
        await stream._news.wait()

    assert any(one.held for one in stream._lanes.values())
    assert await stream.receive(10, 0) == []
    await end_tasks(*stream._fetchers.values())


async def taken_in(*ids: str) -> tuple[RocketStream, list[ours._Held]]:
    """Packets of one lane, not handed out yet."""
    stream = stream_at(Proxy())
    stream._take_in("broker-a", [received(id).message for id in ids], asyncio.get_running_loop().time())
    return stream, stream._all_held()


async def test_behind_one_that_ran_out_nothing_is_handed_out() -> None:
    """It comes again, and what is behind it must not be before it. The keeper may wait for the proxy just then."""
    stream, (first, _) = await taken_in("r-0", "r-1")

    give_up(first)

    assert await stream.receive(10, 0) == []


async def test_behind_one_that_ran_out_nothing_is_held_nor_settled_nor_extended() -> None:
    stream, (first, second) = await taken_in("r-0", "r-1")
    arrivals = await stream.receive(10, 0)
    assert stream.held(arrivals) == [True, True]

    give_up(first)
    second.expires_at = asyncio.get_running_loop().time() + 1

    assert await stream.settle(arrivals[1:]) == [False]
    assert stream.held(arrivals[1:2]) == [False]
    assert stream._all_held() == []


async def test_behind_one_that_ran_out_after_it_was_settled_all_is_held() -> None:
    """It is in its inbox, and only its acknowledgement waits for the one before it."""
    stream, (_, second, _) = await taken_in("r-0", "r-1", "r-2")
    arrivals = await stream.receive(10, 0)
    assert await stream.settle(arrivals[1:2]) == [True]

    give_up(second)

    assert stream.held(arrivals) == [True, False, True]


# Keeping


async def holding(proxy: Proxy) -> tuple[RocketStream, Arrival, ours._Held]:
    """Somebody who holds a packet that is to be extended."""
    stream = stream_at(proxy)
    began = asyncio.get_running_loop().time() - ours.INVISIBLE_S / 2
    stream._take_in("broker-a", [received("r-0").message], began)
    (arrival,) = await stream.receive(1, 0)
    (held,) = stream._all_held()
    return stream, arrival, held


def give_up(held: ours._Held) -> None:
    """As time does."""
    held.expires_at = asyncio.get_running_loop().time()


async def extend(stream: RocketStream, proxy: Any) -> None:
    """With the stand-in where a channel is wanted."""
    await stream._extend(proxy)


async def test_what_is_held_is_extended_in_time() -> None:
    proxy = Proxy()
    stream, arrival, held = await holding(proxy)
    before = held.expires_at

    await extend(stream, proxy)

    assert stream.held([arrival]) == [True]
    assert held.expires_at > before and held.handle == "new"


async def test_late_answer_revives_nothing_that_was_given_up() -> None:
    """Nobody would settle it, and it would be extended for ever."""
    proxy = Proxy()
    stream, arrival, held = await holding(proxy)
    proxy.meanwhile = partial(give_up, held)

    await extend(stream, proxy)

    assert stream.held([arrival]) == [False]
    await extend(stream, proxy)
    assert proxy.changed == ["r-0"]


async def test_what_was_given_up_while_others_used_the_handles_is_not_extended() -> None:
    proxy = Proxy()
    stream, _, held = await holding(proxy)

    async with stream._handles:
        extending = asyncio.create_task(extend(stream, proxy))
        await asyncio.sleep(0)
        give_up(held)
    await extending

    assert proxy.changed == []


async def test_brokers_that_come_later_are_asked_and_those_that_left_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LOOK_S", 0.01)
    monkeypatch.setattr(ours, "BEAT_S", 0.05)
    monkeypatch.setattr(ours, "LAST_ANSWER_S", 0.1)
    monkeypatch.setattr(ours, "POLL_S", 0.01)
    stream = stream_at(proxy := Proxy())
    refused = ours._Refused(wire.TOPIC_NOT_FOUND, "no route")
    routes: list[tuple[str, ...] | Exception] = [("broker-a",), refused, (), ("broker-b",)]

    async def brokers_of(*_: object) -> tuple[str, ...]:
        route = routes.pop(0) if len(routes) > 1 else routes[0]
        if isinstance(route, Exception):
            raise route
        return route

    monkeypatch.setattr(stream._transport, "brokers_of", brokers_of)
    await stream.start()
    first = stream._fetchers["broker-a"]

    async with asyncio.timeout(10):
        while "broker-b" not in proxy.asked or not first.done():
            assert await stream.receive(1, 0.05) == []

    proxy.asked.clear()
    assert await stream.receive(1, 0.1) == []
    assert set(proxy.asked) == {"broker-b"}
    await stream.close()


# Closing


async def test_who_is_cancelled_while_he_closes_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "LAST_ANSWER_S", 0.1)
    stream = stream_at(Proxy())
    stream._ask_these(["broker-a"])
    stream._keepers = [asyncio.create_task(stream._keep())]
    assert await stream.receive(1, 0.01) == []
    closing = asyncio.create_task(stream.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing

    await asyncio.gather(stream.close(), stream.close())

    assert all(task.done() for task in (*stream._fetchers.values(), *stream._keepers))
    with pytest.raises(BrokerUnreachable, match="was closed"):
        await stream.receive(1, 0)


# Name server and brokers


@pytest.mark.parametrize("frame", [b"", b"\0\0", b"\0\0\0\2{}", b"\0\0\0\2[]", b"\0\0\0\4nope", b"\0\0\0\1\xff"])
async def test_answer_that_nobody_can_read_is_no_rocketmq(frame: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(struct.pack(">I", len(frame)) + frame)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        place = wire.Address("127.0.0.1", server.sockets[0].getsockname()[1])

        with pytest.raises(BrokerUnreachable, match="is no RocketMQ"):
            await wire.ask(wire.read_url("rocketmq://127.0.0.1:9"), place, wire.CLUSTER)


@pytest.mark.parametrize("place", [wire.Address("x" * 100, 9), wire.Address("127.0.0.1", 70_000)])
async def test_place_where_nobody_can_go_cannot_be_reached(place: wire.Address) -> None:
    with pytest.raises(BrokerUnreachable, match="cannot be reached"):
        await wire.ask(wire.read_url("rocketmq://127.0.0.1:9"), place, wire.CLUSTER)


CLUSTER_BODY = b'{"brokerAddrTable":{"a":{"brokerAddrs":{0:"127.0.0.1:%d"}}}}'
"""In it a name server names itself as a broker."""


@asynccontextmanager
async def server_that_says(bodies: dict[int, bytes]) -> AsyncIterator[str]:
    """A name server, and a broker in one, with a body for each question."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        frame = await reader.readexactly(length)
        head_length = struct.unpack(">I", frame[:4])[0]
        body = bodies[json.loads(frame[4 : 4 + head_length])["code"]].replace(b"%d", str(port).encode())
        head = json.dumps({"code": wire.SUCCESS}).encode()
        writer.write(struct.pack(">II", 4 + len(head) + len(body), len(head)) + head + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"127.0.0.1:{port}"


GARBAGE = [b"{", b"\xff", b"[]", b'"x"', b"7", b"null", b"[" * 100_000]
"""What no answer looks like."""
BAD_CLUSTERS = [
    b'{"brokerAddrTable":[]}',
    b'{"brokerAddrTable":{"a":{}}}',
    b'{"brokerAddrTable":{"a":[]}}',
    b'{"brokerAddrTable":{"a":{"brokerAddrs":7}}}',
    b'{"brokerAddrTable":{"a":{"brokerAddrs":{"0":7}}}}',
    b'{"brokerAddrTable":{"a":{"brokerAddrs":{"0":"127.0.0.1:x"}}}}',
    b'{"brokerAddrTable":{"a":{"brokerAddrs":{"0":"127.0.0.1"}}}}',
]
BAD_TOPICS = [b'{"attributes":7}']
BAD_GROUPS = [b'{"subscriptionGroupTable":7}', b'{"subscriptionGroupTable":{"g":7}}']
BAD_OFFSETS = [b"", b'"brokerOffset":%s,"consumerOffset":0' % (b"9" * 5000)]


async def ask_types(transport: RocketTransport) -> object:
    return await transport._types_at_brokers("shop--orders")


async def ask_groups(transport: RocketTransport) -> object:
    return await transport._groups()


async def ask_depth(transport: RocketTransport) -> object:
    return await transport.depth(TOPIC, "shop")


@pytest.mark.parametrize(
    ("ask", "code", "body"),
    [
        *((ask_types, wire.CLUSTER, body) for body in (*GARBAGE, *BAD_CLUSTERS)),
        *((ask_types, wire.TOPIC_CONFIG, body) for body in (*GARBAGE, *BAD_TOPICS)),
        *((ask_groups, wire.ALL_GROUPS, body) for body in (*GARBAGE, *BAD_GROUPS)),
        *((ask_depth, wire.CONSUME_STATS, body) for body in (*GARBAGE, *BAD_OFFSETS)),
    ],
)
async def test_answer_whose_body_nobody_can_read_is_none(
    ask: Callable[[RocketTransport], Awaitable[object]], code: int, body: bytes
) -> None:
    async with server_that_says({wire.CLUSTER: CLUSTER_BODY} | {code: body}) as place:
        with pytest.raises(BrokerUnreachable, match=rf"{place}|no broker"):
            await ask(transport_at(Proxy(), place))


async def test_name_server_that_talks_rubbish_fails_what_is_sent() -> None:
    """It is asked when the proxy does not know the topic."""

    class Unknowing:
        async def send(self, _: object, **__: object) -> Any:
            return wire.make("SendMessageResponse", status=wire.make("Status", code=wire.TOPIC_NOT_FOUND))

    async with server_that_says({wire.CLUSTER: b"[]"}) as place:
        sent = [Packet("r-0", "k", b"{}", {})]

        (receipt,) = await transport_at(Unknowing(), place).send(TOPIC, sent, deadline_s=5, must_arrive=True)

    assert isinstance(receipt, Failed) and receipt.is_retryable
    assert place in receipt.reason


@pytest.mark.parametrize(("is_fifo", "left"), [(True, []), (False, [2])])
def test_what_is_behind_one_that_ran_out_waits_for_it_only_where_there_is_an_order(
    is_fifo: bool, left: list[int]
) -> None:
    """It would be held and extended for ever, and its queue stand still."""
    lane = ours._Lane(1, is_fifo=is_fifo)
    for serial, expires_at in ((1, 10.0), (2, 30.0)):
        lane.held[serial] = ours._Held(lane, serial, wire.make("Message"), expires_at)

    lane.drop_expired(9.0)
    assert (lane.is_over, list(lane.held)) == (False, [1, 2])
    lane.drop_expired(10.0)

    assert ([] if lane.is_over else list(lane.held)) == left
    assert lane.is_over is is_fifo
