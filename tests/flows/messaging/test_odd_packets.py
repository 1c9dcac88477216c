"""What strangers may legally send, and nobody has use for: it is given up by itself, and what comes behind it is not held up."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from msgspec.structs import replace

from brokers.rabbit_house import open_bench
from conformance.messaging.house import Bench, collect, record
from kassa.errors import BrokerUnreachable
from kassa.ids import new_id
from kassa.journal.change import Change, Event
from kassa.messaging.binders.memory import MemoryStream
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.consumer import Consumer
from kassa.messaging.model import Ack, Arrival, Dead, Delivery, Record, RetryAfter
from kassa.messaging.packing import ENVELOPE_TYPE, NAME_BYTES_MAX
from kassa.messaging.topology import Topic

DEEP = b"[" * 2000 + b"]" * 2000


def new_topic() -> Topic:
    return Topic(f"orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.", lanes=1)


def envelope(*items: bytes) -> Record:
    """As a stranger sends one: a record of its own until it is received."""
    return Record("e-1", "k", b"[" + b",".join(items) + b"]", {"content-type": ENVELOPE_TYPE})


async def letters(bench: Bench) -> list[str]:
    return [one.reason for one in await bench.letters.browse(f"{bench.topic.name}:shop")]


async def test_envelope_that_is_nested_beyond_use_is_one_dead_letter(database_url: str) -> None:
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(
            bench.topic.name, [envelope(b'{"id":"1","data":' + DEEP + b"}"), record("r-1")], deadline_s=9
        )
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")

        (delivery,) = await collect(subscription, 1)

        assert delivery.record.id == "r-1"
        assert await subscription.settle([(delivery, Ack())]) == [True]
        (reason,) = await letters(bench)
        assert "cannot be read" in reason
        await subscription.close(0.0)


@pytest.mark.parametrize(
    "item",
    [
        {"id": "1", "kassapriority": 99_999},
        {"id": "1", "kassapriority": -1},
        {"id": "1", "kassahome": 2**64 - 1},
        {"id": "a\0b"},
        {"id": "1", "kassakey": "a\0b"},
        {"id": "x" * 4000},
        {"id": "1", "kassakey": "".join(chr(0x4E00 + number * 37 % 20_000) for number in range(3000))},
        {"id": ""},
    ],
    ids=["large priority", "small priority", "home", "zero in id", "zero in key", "long id", "long key", "no id"],
)
async def test_values_beyond_what_we_keep_are_kept_as_near_as_may_be(
    database_url: str, item: dict[str, object]
) -> None:
    """Put off, it comes again; given up, it is a dead letter; and its key is free."""
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [envelope(msgspec.json.encode(item))], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")
        (delivery,) = await collect(subscription, 1)
        assert delivery.record.id and len(delivery.record.id.encode()) <= NAME_BYTES_MAX

        assert await subscription.settle([(delivery, RetryAfter(0.0, "later"))]) == [True]
        (again,) = await collect(subscription, 1)
        assert again.record.id == delivery.record.id
        assert await subscription.settle([(again, Dead("never"))]) == [True]

        assert await letters(bench) == ["never"]
        await bench.binder.send(bench.topic.name, [Record("r-1", delivery.record.key, b"", {})], deadline_s=9)
        (after,) = await collect(subscription, 1)
        assert after.record.id == "r-1"
        await subscription.close(0.0)


async def test_half_of_a_character_in_a_header_or_a_reason_stops_nobody(database_url: str) -> None:
    """A handler's error often has something of the message in it."""
    odd = Record("r-1", "k", b"{}", {"\ud800": "a", "x": "b\udfff"})
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [odd], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")
        (delivery,) = await collect(subscription, 1)

        assert await subscription.settle([(delivery, RetryAfter(0.0, "no \ud800"))]) == [True]
        (again,) = await collect(subscription, 1)
        assert again.record.headers == {"?": "a", "x": "b?"}
        assert await subscription.settle([(again, Dead("no \ud800"))]) == [True]

        assert await letters(bench) == ["no ?"]
        await subscription.close(0.0)


async def test_count_of_redeliveries_beyond_reason_costs_no_try(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on alone after it was handed out so often has not failed yet, however often that was."""
    receive = MemoryStream.receive

    async def often(stream: MemoryStream, limit: int, wait_s: float) -> list[Arrival]:
        return [replace(one, redeliveries=2**40) for one in await receive(stream, limit, wait_s)]

    monkeypatch.setattr(MemoryStream, "receive", often)
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [record("r-1")], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")

        (delivery,) = await collect(subscription, 1)

        assert (delivery.record.id, delivery.attempts, delivery.alone) == ("r-1", 0, True)
        await subscription.close(0.0)


@pytest.mark.parametrize("priority", [-1, 10])
async def test_priority_beyond_all_classes_is_the_nearest(database_url: str, priority: int) -> None:
    async with open_bench("postgres", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [record("r-1", "k", priority), record("r-2", "k")], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")

        found = await collect(subscription, 2)

        assert [one.record.id for one in found] == ["r-1", "r-2"]
        await subscription.settle([(one, Ack()) for one in found])
        await subscription.close(0.0)


async def test_change_that_cannot_be_stored_counts_as_a_failure(database_url: str) -> None:
    """It was asked for once a second for ever, and its key waited."""
    async with open_bench("memory", database_url, new_topic()) as bench:

        async def handler(records: Sequence[Record]) -> list[Change]:
            good = bench.effect(records[0])
            return [replace(good, events=(Event("wallet.created\0", b"{}"),))]

        await bench.binder.send(bench.topic.name, [record("r-1")], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")
        await Consumer(subscription, "shop", bench.journal, handler).step(9.0)

        (row,) = await bench.pool.fetch("SELECT attempts, due > clock_timestamp() AS waits FROM message")
        assert row["attempts"] == 1
        await subscription.close(0.0)


async def test_stream_that_stumbles_goes_on(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    receive, faults = MemoryStream.receive, [ValueError("a slip")]

    async def once(stream: MemoryStream, limit: int, wait_s: float) -> list[Arrival]:
        if faults:
            raise faults.pop()
        return await receive(stream, limit, wait_s)

    monkeypatch.setattr(MemoryStream, "receive", once)
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [record("r-1")], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")

        with pytest.raises(BrokerUnreachable, match="a slip"):
            await subscription.receive(1, 9.0)
        (delivery,) = await collect(subscription, 1)

        assert delivery.record.id == "r-1"
        await subscription.close(0.0)


async def test_what_is_due_in_our_own_queue_does_not_wait_for_the_broker(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(stream: MemoryStream, limit: int, wait_s: float) -> list[Arrival]:
        raise BrokerUnreachable("away", topic="", group="")

    async with open_bench("memory", database_url, new_topic()) as bench:
        monkeypatch.setattr(MemoryStream, "receive", away)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")
        with pytest.raises(BrokerUnreachable):
            await subscription.receive(1, 9.0)
        await bench.binder.send(bench.topic.name, [replace(record("r-1"), delay_s=0.5)], deadline_s=9)

        found: list[Delivery] = []
        while not found:
            try:
                found = await subscription.receive(1, 9.0)
            except BrokerUnreachable:
                continue

        assert [one.record.id for one in found] == ["r-1"]
        await subscription.close(0.0)


BROKEN = Record("e-1", "k", b"nothing", {"content-type": ENVELOPE_TYPE})


@pytest.mark.parametrize("error", [BrokerUnreachable("away"), ValueError("what nobody expects"), None])
async def test_a_batch_comes_again_when_burying_one_of_it_is_cut_off(
    database_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """None: by who receives, who has lost patience."""
    bury, cuts = PostgresBinder.bury, [error]

    async def cut_off(self: PostgresBinder, topic: str, group: str, dead: Sequence[tuple[Record, int, str]]) -> None:
        if not cuts:
            await bury(self, topic, group, dead)
        elif (raised := cuts.pop()) is not None:
            raise raised
        else:
            await asyncio.Event().wait()

    monkeypatch.setattr(PostgresBinder, "bury", cut_off)
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [record("r-1"), BROKEN, record("r-2")], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")
        with pytest.raises((BrokerUnreachable, ValueError, TimeoutError)):
            async with asyncio.timeout(2.0):
                await subscription.receive(10, 9.0)

        deliveries = await collect(subscription, 2)

        assert [one.record.id for one in deliveries] == ["r-1", "r-2"]
        assert await subscription.settle([(one, Ack()) for one in deliveries]) == [True, True]
        assert len(await letters(bench)) == 1
        await subscription.close(0.0)


async def test_what_somebody_else_gets_now_is_not_handed_out_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session ended while one of the batch was buried."""
    bury = PostgresBinder.bury
    receive = MemoryStream.receive
    streams: list[MemoryStream] = []
    restarted: list[MemoryStream] = []

    async def noted(self: MemoryStream, limit: int, wait_s: float) -> list[Arrival]:
        streams[:] = [self]
        return await receive(self, limit, wait_s)

    async def slow(self: PostgresBinder, topic: str, group: str, dead: Sequence[tuple[Record, int, str]]) -> None:
        await bury(self, topic, group, dead)
        if not restarted:
            restarted.extend(streams)
            await streams[0].restart()

    monkeypatch.setattr(PostgresBinder, "bury", slow)
    monkeypatch.setattr(MemoryStream, "receive", noted)
    async with open_bench("memory", database_url, new_topic()) as bench:
        await bench.binder.send(bench.topic.name, [record("r-1"), BROKEN, record("r-2")], deadline_s=9)
        subscription = await bench.binder.subscribe(bench.topic.name, "shop")

        deliveries = await collect(subscription, 2)

        assert [one.record.id for one in deliveries] == ["r-1", "r-2"]
        assert await subscription.settle([(one, Ack()) for one in deliveries]) == [True, True]
        await subscription.close(0.0)
