"""ZeroMQ when something goes wrong: the hub killed, a connection cut, a peer that vanishes, keys that are not known."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq
import zmq.asyncio

from brokers.load import under_load
from chaos.brokers.line import Line
from conformance.journal.cutter import Cut, Cutter
from conformance.messaging.house import Bench, collect, record
from kassa.db.pool import connect, open_pool
from kassa.errors import BrokerUnreachable, SettingInvalid
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Binder, Resources
from kassa.messaging.binders.zeromq import (
    ANSWER_S,
    ANSWERS_MAX,
    BATCH_BYTES,
    BEAT_S,
    CALL_S,
    CALLS_MAX,
    RESEND_S,
    SILENCE_S,
    SUBSCRIPTIONS_MAX,
    Hub,
    ZeroMQBinder,
    _Call,
    _Session,
    make_binder,
    make_keys,
    read_url,
)
from kassa.messaging.model import Ack, Confirmed, Unknown
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import DeadLetters
from kassa.supervisor import end_tasks
from kassa.tables import TABLES
from servers.server import free_ports

DEADLINE_S = 60.0
SHORT_LEASE_S = 4
TOPIC = Topic("orders", ("shop",), "Orders, for the tests.")


class HubProcess:
    """A hub to be killed and started again on the same port."""

    def __init__(self, database_url: str) -> None:
        self._database_url = database_url
        self._address = "zeromq://127.0.0.1:0?role=hub&lease_s=2"
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "brokers.zeromq_hub", self._database_url, self._address],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        assert self.url.startswith("zeromq://")
        self._address = f"{self.url}?role=hub&lease_s=2"

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()


@contextmanager
def hub_process(database_url: str) -> Iterator[HubProcess]:
    hub = HubProcess(database_url)
    hub.start()
    try:
        yield hub
    finally:
        hub.kill()


@pytest.fixture
async def parts(database_url: str) -> AsyncIterator[tuple[Any, Wakeups]]:
    pool = await open_pool(database_url, application="test")
    yield pool, Wakeups(lambda: connect(database_url, application="test wake"))
    await pool.close()


@asynccontextmanager
async def bench_at(url: str, database_url: str, parts: tuple[Any, Wakeups]) -> AsyncIterator[Bench]:
    pool, wakeups = parts
    journal = PostgresJournal(lambda: connect(database_url, application="test writer"), TABLES)
    await journal.start()
    async with make_binder(url, Resources(pool, wakeups, (TOPIC,))) as binder:
        await binder.provision([TOPIC])
        yield Bench(binder, TOPIC, pool, journal, wakeups, DeadLetters(pool))
    await journal.stop()


def tcp(binder: Binder) -> str:
    """Where a ZeroMQ socket reaches the hub that this binder is."""
    assert isinstance(binder, ZeroMQBinder)
    return binder.url.replace("zeromq", "tcp")


async def test_hub_that_is_killed_again_and_again_loses_and_repeats_nothing(
    database_url: str, parts: tuple[Any, Wakeups]
) -> None:
    with hub_process(database_url) as hub:
        async with bench_at(f"{hub.url}?role=peer", database_url, parts) as bench:

            async def trouble() -> None:
                for _ in range(3):
                    await asyncio.sleep(0.5)
                    hub.kill()
                    await asyncio.sleep(0.3)
                    await asyncio.to_thread(hub.start)

            await under_load(bench, 2000, trouble)


@pytest.mark.parametrize("method", [b"send", b"receive", b"settle"])
@pytest.mark.parametrize("cut", Cut)
async def test_connection_cut_in_the_middle_of_a_call_changes_nothing(
    database_url: str, parts: tuple[Any, Wakeups], method: bytes, cut: Cut
) -> None:
    with hub_process(database_url) as hub:
        cutter = Cutter(hub.url)
        url = await cutter.start()
        async with bench_at(f"{url}?role=peer", database_url, parts) as bench:

            async def trouble() -> None:
                cutter.arm(method, cut)

            await under_load(bench, 200, trouble, consumers=1)
        assert cutter.cuts == 1
        await cutter.stop()


async def test_send_without_a_hub_is_unknown_by_its_deadline(database_url: str, parts: tuple[Any, Wakeups]) -> None:
    with hub_process(database_url) as hub:
        async with bench_at(f"{hub.url}?role=peer", database_url, parts) as bench:
            hub.kill()
            began = time.monotonic()

            (receipt,) = await bench.binder.send(TOPIC.name, [record("r-1")], deadline_s=1.0)

            assert isinstance(receipt, Unknown)
            assert time.monotonic() - began < 30
            hub.start()
            assert await bench.binder.send(TOPIC.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]


@asynccontextmanager
async def hub_that_answers_once() -> AsyncIterator[str]:
    """The first call, with which a peer opens; then it hears everything and says nothing."""
    (port,) = free_ports(1)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as hub:
        hub.bind(f"tcp://127.0.0.1:{port}")

        async def listen() -> None:
            identity, *_ = await hub.recv_multipart()
            await hub.send_multipart([identity, b"\x94\x01\xc0\xa0\xa0"])
            while True:
                await hub.recv_multipart()

        listening = asyncio.create_task(listen())
        yield f"zeromq://127.0.0.1:{port}?role=peer"
        await end_tasks(listening)


async def test_many_sends_to_a_hub_that_says_nothing_end_by_their_deadline_together(parts: tuple[Any, Wakeups]) -> None:
    """What waits for a place among the calls waits within its deadline."""
    async with hub_that_answers_once() as url, make_binder(url, Resources(*parts)) as peer:
        began = time.monotonic()

        sends = [peer.send(TOPIC.name, [record(f"r-{number}")], deadline_s=3.0) for number in range(4 * CALLS_MAX)]
        receipts = [receipt for (receipt,) in await asyncio.gather(*sends)]

        assert all(isinstance(receipt, Unknown) for receipt in receipts)
        assert time.monotonic() - began < 6


async def test_ping_of_a_dead_hub_waits_behind_no_other_call(parts: tuple[Any, Wakeups]) -> None:
    """With it the peer notices that there is none any more, and one of them takes over."""
    async with hub_that_answers_once() as url, make_binder(url, Resources(*parts)) as peer:
        assert isinstance(peer, ZeroMQBinder)
        sends = [
            asyncio.create_task(peer.send(TOPIC.name, [record(f"r-{number}")], deadline_s=DEADLINE_S))
            for number in range(2 * CALLS_MAX)
        ]
        await asyncio.sleep(0.1)
        began = time.monotonic()

        with pytest.raises(BrokerUnreachable):
            await peer.call("ping", None, 1.0)

        assert time.monotonic() - began < DEADLINE_S / 2
        await end_tasks(*sends)


class Ear:
    """Hears what a hub answers."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []

    async def send(self, parts: list[bytes]) -> None:
        self.answers.append(b"".join(parts[1:]))


def call(method: str, number: int, oldest: int = 0) -> _Call:
    return _Call("peer", number, oldest, method, msgspec.Raw(b"\xc0"))


def hub_without_memory() -> Hub:
    """For calls that need none."""
    nothing: Any = None
    return Hub(nothing, lease_s=1.0)


@pytest.mark.parametrize(
    ("method", "is_answered"),
    [("ping", True), ("bye", True), ("receive", True), ("send", False), ("settle", False)],
)
async def test_hub_hears_a_ping_while_all_places_of_its_peer_are_taken(method: str, is_answered: bool) -> None:
    hub, ear = hub_without_memory(), Ear()
    await hub._answer(cast(Any, ear), b"peer", call("ping", 1))
    hub._sessions["peer"].running.update(range(100, 100 + CALLS_MAX))

    await hub._answer(cast(Any, ear), b"peer", call(method, 2))

    assert len(ear.answers) == 1 + is_answered


@pytest.mark.parametrize(("method", "is_answered"), [("ping", True), ("receive", False), ("send", True)])
async def test_hub_lets_one_peer_receive_only_so_often_at_once(method: str, is_answered: bool) -> None:
    hub, ear = hub_without_memory(), Ear()
    await hub._answer(cast(Any, ear), b"peer", call("ping", 1))
    hub._sessions["peer"].receiving.update(range(100, 100 + SUBSCRIPTIONS_MAX))

    await hub._answer(cast(Any, ear), b"peer", call(method, 2))

    assert len(ear.answers) == 1 + is_answered


def test_answers_of_a_peer_that_never_lets_go_of_any_are_forgotten() -> None:
    session = _Session()

    for number in range(10 * ANSWERS_MAX):
        session.keep(number, b"", now=float(number))

    assert list(session.answers) == list(range(9 * ANSWERS_MAX, 10 * ANSWERS_MAX))


def test_answer_that_a_busy_peer_may_still_ask_for_is_kept() -> None:
    """It was lost with a connection, and many others got through before the peer makes its call again."""
    session = _Session()

    for number in range(10 * ANSWERS_MAX):
        session.keep(number, b"", now=ANSWER_S * number / (10 * ANSWERS_MAX))

    assert len(session.answers) == 10 * ANSWERS_MAX


async def test_nothing_piles_up_for_a_hub_that_is_away(parts: tuple[Any, Wakeups]) -> None:
    """However often a call was repeated meanwhile: the next hub has its own call to answer, and shall not be late for it."""
    (port,) = free_ports(1)
    peer = ZeroMQBinder(read_url(f"zeromq://127.0.0.1:{port}?role=peer"), Resources(*parts))
    opening = asyncio.create_task(peer.open())
    await asyncio.sleep(CALL_S - RESEND_S)
    context = zmq.asyncio.Context()
    hub = context.socket(zmq.ROUTER)
    hub.bind(f"tcp://127.0.0.1:{port}")
    frames: list[list[bytes]] = []

    async def listen() -> None:
        while True:
            frames.append(await hub.recv_multipart())

    listening = asyncio.create_task(listen())
    with pytest.raises(BrokerUnreachable):
        await opening
    await end_tasks(listening)
    await peer.close()
    context.destroy(linger=0)

    assert len(frames) <= 2


NOT_UTF_8 = b"\xa1\xff"
DEEP = b"\x91" * 50_000 + b"\xc0"


@pytest.mark.parametrize("part", [b"", NOT_UTF_8, b"\xa1a" + DEEP], ids=["broken off", "not UTF-8", "too deep"])
async def test_hub_answers_after_a_call_that_nobody_can_read(
    database_url: str, parts: tuple[Any, Wakeups], part: bytes
) -> None:
    async with bench_at("zeromq://127.0.0.1:0", database_url, parts) as bench:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.connect(tcp(bench.binder))
            await stranger.send(b"\x95\xa1a\x01\x01" + part)
            await stranger.send(b"\x95\xa1a\x01\x01\xa4ping\xc0")
            async with asyncio.timeout(DEADLINE_S):
                await stranger.recv()

        assert await bench.binder.send(TOPIC.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]


@pytest.mark.parametrize("part", [b"", b"\xc0" + NOT_UTF_8, DEEP], ids=["broken off", "not UTF-8", "too deep"])
async def test_peer_hears_the_hub_after_an_answer_that_nobody_can_read(parts: tuple[Any, Wakeups], part: bytes) -> None:
    (port,) = free_ports(1)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as hub:
        hub.bind(f"tcp://127.0.0.1:{port}")

        async def answer() -> None:
            while True:
                identity, _ = await hub.recv_multipart()
                await hub.send_multipart([identity, b"\x94\x01" + part])
                await hub.send_multipart([identity, b"\x94\x01\xc0\xa0\xa0"])

        answering = asyncio.create_task(answer())
        peer = ZeroMQBinder(read_url(f"zeromq://127.0.0.1:{port}?role=peer"), Resources(*parts))
        await peer.open()
        await end_tasks(answering)
        await peer.close()


async def test_record_that_is_longer_on_its_way_than_silence_may_last_arrives(
    database_url: str, parts: tuple[Any, Wakeups]
) -> None:
    """What has come of it shows that the other side lives."""
    body = random.randbytes(6_000_000)
    with hub_process(database_url) as hub:
        line = Line(urlsplit(hub.url).port or 0)
        port = await line.start()
        async with bench_at(f"zeromq://127.0.0.1:{port}?role=peer", database_url, parts) as bench:
            line.bytes_per_s = 1_000_000.0
            receipts = await bench.binder.send(TOPIC.name, [record("r-1", body=body)], deadline_s=DEADLINE_S)
            line.bytes_per_s = None

            assert receipts == [Confirmed()]
            (delivery,) = await collect(await bench.binder.subscribe(TOPIC.name, "shop"), 1)
            assert delivery.record.body == body
        await line.stop()


async def send_too_much(bench: Bench) -> None:
    """Three records, each of which fills an answer."""
    long = [record(f"r-{number}", key=f"k{number}", body=bytes(BATCH_BYTES // 2 + 1)) for number in range(3)]
    assert await bench.binder.send(TOPIC.name, long, deadline_s=DEADLINE_S) == [Confirmed()] * 3


async def test_what_does_not_fit_into_an_answer_comes_with_the_next_or_goes_to_another(
    database_url: str, parts: tuple[Any, Wakeups]
) -> None:
    async with bench_at("zeromq://127.0.0.1:0", database_url, parts) as bench:
        await send_too_much(bench)
        one = await bench.binder.subscribe(TOPIC.name, "shop")
        two = await bench.binder.subscribe(TOPIC.name, "shop")

        first = await one.receive(10, DEADLINE_S)
        second = await one.receive(10, DEADLINE_S)
        settled = [await one.settle([(delivery, Ack())]) for delivery in (*first, *second)]
        await one.close(0.0)
        (third,) = await collect(two, 1)

        assert (len(first), len(second), settled) == (1, 1, [[True], [True]])
        assert {delivery.record.id for delivery in (*first, *second, third)} == {"r-0", "r-1", "r-2"}


async def test_what_did_not_fit_and_waited_for_half_of_its_lease_is_claimed_anew(
    database_url: str, parts: tuple[Any, Wakeups]
) -> None:
    """A slow handler comes late for the rest. With what is left of the lease, another consumer would soon have it too."""
    async with bench_at(f"zeromq://127.0.0.1:0?lease_s={SHORT_LEASE_S}", database_url, parts) as bench:
        await send_too_much(bench)
        subscription = await bench.binder.subscribe(TOPIC.name, "shop")
        (first,) = await subscription.receive(10, DEADLINE_S)

        # The hub judges by time alone; more than half of the lease, and far less than all of it.
        await asyncio.sleep(0.55 * SHORT_LEASE_S)
        (second,) = await subscription.receive(10, DEADLINE_S)

        assert second.epoch != first.epoch
        assert second.record.id != first.record.id
        assert second.attempts == 0
        assert await subscription.settle([(first, Ack()), (second, Ack())]) == [True, True]


async def test_what_a_vanished_peer_had_goes_to_another(database_url: str, parts: tuple[Any, Wakeups]) -> None:
    with hub_process(database_url) as hub:
        async with bench_at(f"{hub.url}?role=peer", database_url, parts) as bench:
            vanishing = ZeroMQBinder(read_url(f"{hub.url}?role=peer"), Resources(*parts))
            await vanishing.open()
            await bench.binder.send(TOPIC.name, [record("r-1", key="k")], deadline_s=DEADLINE_S)
            await collect(await vanishing.subscribe(TOPIC.name, "shop"), 1)
            # It says nothing any more, and takes its leave from nobody.
            for task in vanishing._tasks:
                task.cancel()
            assert vanishing._context is not None
            vanishing._context.destroy(linger=0)

            (delivery,) = await collect(await bench.binder.subscribe(TOPIC.name, "shop"), 1)

            assert delivery.record.id == "r-1"


async def test_handler_that_takes_longer_than_silence_keeps_its_records(
    database_url: str, parts: tuple[Any, Wakeups]
) -> None:
    async with bench_at("zeromq://127.0.0.1:0", database_url, parts) as bench:
        await bench.binder.send(TOPIC.name, [record("r-1", key="k")], deadline_s=DEADLINE_S)
        one = await bench.binder.subscribe(TOPIC.name, "shop")
        two = await bench.binder.subscribe(TOPIC.name, "shop")
        (delivery,) = await collect(one, 1)

        assert await two.receive(10, SILENCE_S * 1.4) == []
        assert await one.settle([(delivery, Ack())]) == [True]


async def test_hub_that_stood_still_takes_nobody_for_silent(database_url: str, parts: tuple[Any, Wakeups]) -> None:
    """While its process did not run it heard nobody: that says nothing about the others."""
    async with bench_at("zeromq://127.0.0.1:0", database_url, parts) as bench:
        await bench.binder.send(TOPIC.name, [record("r-1", key="k")], deadline_s=DEADLINE_S)
        one = await bench.binder.subscribe(TOPIC.name, "shop")
        two = await bench.binder.subscribe(TOPIC.name, "shop")
        (delivery,) = await collect(one, 1)

        # Blocks the loop, hub and peers, as a process that stands still does.
        time.sleep(SILENCE_S + 2)  # noqa: ASYNC251

        assert await two.receive(10, 1.0) == []
        assert await one.settle([(delivery, Ack())]) == [True]


def query(**files: Path) -> str:
    return "&".join(f"{name}={file}" for name, file in files.items())


async def test_only_peers_whose_keys_are_known_are_heard(
    database_url: str, parts: tuple[Any, Wakeups], tmp_path: Path
) -> None:
    hub_public, hub_secret = make_keys(tmp_path / "hub", "hub")
    friend_public, friend_secret = make_keys(tmp_path / "friend", "friend")
    _, stranger_secret = make_keys(tmp_path / "stranger", "stranger")
    peers = tmp_path / "peers"
    peers.mkdir()
    for public in (hub_public, friend_public):
        (peers / public.name).write_bytes(public.read_bytes())
    assert hub_secret.stat().st_mode & 0o077 == 0

    address = f"zeromq://127.0.0.1:0?role=hub&{query(secret=hub_secret, peers=peers)}"
    async with bench_at(address, database_url, parts) as bench:
        url = bench.binder.url  # type: ignore[attr-defined]
        friend = f"{url}?role=peer&{query(secret=friend_secret, server=hub_public)}"
        async with make_binder(friend, Resources(*parts)) as binder:
            assert await binder.send(TOPIC.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]

        async def is_not_heard(wrong: str) -> None:
            refused = make_binder(wrong, Resources(*parts))
            with pytest.raises(BrokerUnreachable):
                await refused.open()
            await refused.close()

        stranger = f"{url}?role=peer&{query(secret=stranger_secret, server=hub_public)}"
        await asyncio.gather(is_not_heard(stranger), is_not_heard(f"{url}?role=peer"))


@pytest.mark.parametrize("is_encrypted", [False, True])
async def test_next_process_is_the_hub_once_the_first_has_ended(
    parts: tuple[Any, Wakeups], tmp_path: Path, is_encrypted: bool
) -> None:
    public, secret = make_keys(tmp_path, "hub")
    keys = query(secret=secret, peers=tmp_path, server=public) if is_encrypted else ""
    url = f"zeromq://127.0.0.1:{free_ports(1)[0]}?{keys}"
    first, second = (make_binder(url, Resources(*parts)) for _ in range(2))
    async with first, second:
        await second.provision([TOPIC])
        subscription = await second.subscribe(TOPIC.name, "shop")

        await first.close()

        assert await second.send(TOPIC.name, [record("r-1", key="k")], deadline_s=DEADLINE_S) == [Confirmed()]
        (delivery,) = await collect(subscription, 1)
        assert await subscription.settle([(delivery, Ack())]) == [True]


async def test_hub_that_ends_gives_back_what_it_had_not_handed_out_and_leaves_peers_what_they_hold(
    parts: tuple[Any, Wakeups],
) -> None:
    """A peer goes on with its work, and settles it at the next hub: nobody else shall have it meanwhile."""
    url = f"zeromq://127.0.0.1:{free_ports(1)[0]}?lease_s=120"
    first, second = (make_binder(url, Resources(*parts)) for _ in range(2))
    async with first, second:
        await second.provision([TOPIC])
        long = [record(f"r-{number}", key=f"k{number}", body=bytes(BATCH_BYTES // 2 + 1)) for number in range(3)]
        assert await second.send(TOPIC.name, long, deadline_s=DEADLINE_S) == [Confirmed()] * 3
        one = await second.subscribe(TOPIC.name, "shop")
        two = await second.subscribe(TOPIC.name, "shop")
        (held,) = await one.receive(10, DEADLINE_S)

        await first.close()

        assert await second.send(TOPIC.name, [record("r-3")], deadline_s=DEADLINE_S) == [Confirmed()]
        others = await collect(two, 3)
        assert {delivery.record.id for delivery in (held, *others)} == {"r-0", "r-1", "r-2", "r-3"}
        assert await two.receive(10, 0.0) == []
        assert await one.settle([(held, Ack())]) == [True]


async def test_process_with_another_key_leaves_the_port_to_the_hub(parts: tuple[Any, Wakeups], tmp_path: Path) -> None:
    """Nobody would believe that it is the hub."""
    public, hub_secret = make_keys(tmp_path, "hub")
    _, shop_secret = make_keys(tmp_path, "shop")
    url = f"zeromq://127.0.0.1:{free_ports(1)[0]}"
    first, second, third = (
        make_binder(f"{url}?{query(secret=secret, peers=tmp_path, server=public)}", Resources(*parts))
        for secret in (hub_secret, shop_secret, hub_secret)
    )
    async with first, second:
        await second.provision([TOPIC])

        await first.close()

        (receipt,) = await second.send(TOPIC.name, [record("r-1")], deadline_s=CALL_S + 3 * BEAT_S)
        assert isinstance(receipt, Unknown)
        async with third:
            assert await second.send(TOPIC.name, [record("r-1")], deadline_s=DEADLINE_S) == [Confirmed()]


async def test_hub_that_cannot_begin_leaves_nothing_open(parts: tuple[Any, Wakeups], tmp_path: Path) -> None:
    """Its context would wait for a socket that is left open, for ever."""
    _, secret = make_keys(tmp_path / "hub", "hub")
    hub = make_binder(f"zeromq://127.0.0.1:0?role=hub&{query(secret=secret)}", Resources(*parts))

    with pytest.raises(SettingInvalid, match="peers"):
        await hub.open()

    await hub.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("zeromq://10.1.2.3:5599", "CURVE"),
        ("zeromq://127.0.0.1:5599?colour=red", "role=hub"),
        ("zeromq://127.0.0.1:5599?role=king", "role=hub"),
        ("zeromq://127.0.0.1:5599?lease_s=0", "lease_s"),
    ],
)
def test_address_that_cannot_be_meant_is_refused_with_what_to_do(url: str, says: str) -> None:
    with pytest.raises(SettingInvalid, match=says):
        read_url(url)
