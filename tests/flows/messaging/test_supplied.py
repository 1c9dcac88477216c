"""A broker and our own tables as one: what a batch in parts, a look and a cancelled consumer must not do."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
from msgspec.structs import replace

from brokers.rabbit_house import open_bench
from conformance.messaging.house import collect, record
from flows.messaging.house import House
from kassa.ids import new_id
from kassa.messaging.binder import Resources
from kassa.messaging.binders.memory import MemoryTransport
from kassa.messaging.model import Confirmed, Delivery, Packet, Receipt, Unknown
from kassa.messaging.supplied import SuppliedBinder, SuppliedSubscription
from kassa.messaging.topology import Topic, travelling
from kassa.messaging.wake import Wakeups

TOPIC = Topic("letters", ("office",), "Letters, for the tests.", lanes=1, classes=True)
DEADLINE_S = 2.0


class Silent(MemoryTransport):
    """Whose broker confirms nothing of some classes."""

    def __init__(self, *classes: str) -> None:
        super().__init__()
        self._silent = [f"{TOPIC.name}{one}" for one in classes]

    async def send(
        self, topic: Topic, packets: Sequence[Packet], *, deadline_s: float, must_arrive: bool
    ) -> list[Receipt]:
        if topic.name not in self._silent:
            return await super().send(topic, packets, deadline_s=deadline_s, must_arrive=must_arrive)
        await asyncio.sleep(deadline_s)
        return [Unknown("no answer")] * len(packets)


def supplied(house: House, transport: MemoryTransport) -> SuppliedBinder:
    return SuppliedBinder(transport, Resources(house.pool, Wakeups(house.pool.acquire), (TOPIC,)))


@pytest.mark.parametrize(
    ("silent", "known"),
    [(("", ".urgent", ".low"), {"delayed"}), ((".urgent",), {"normal", "low", "delayed"})],
    ids=["all classes", "one class"],
)
async def test_a_batch_in_parts_takes_no_longer_than_its_deadline(
    house: House, silent: tuple[str, ...], known: set[str]
) -> None:
    """And what one part waits for costs no other its time."""
    binder = supplied(house, Silent(*silent))
    await binder.provision([TOPIC])
    clock = asyncio.get_running_loop().time
    records = [record("urgent", priority=9), record("normal"), record("low", priority=0), record("delayed", delay_s=9)]
    began = clock()

    receipts = await binder.send(TOPIC.name, records, deadline_s=DEADLINE_S)

    assert clock() - began < 1.9 * DEADLINE_S
    assert [one.id for one, receipt in zip(records, receipts, strict=True) if receipt == Confirmed()] == [
        one.id for one in records if one.id in known
    ]


async def test_looking_tells_of_classes_that_are_missing_and_writes_nothing_then(house: House) -> None:
    transport = MemoryTransport()
    binder = supplied(house, transport)
    await transport.provision([TOPIC._replace(classes=False)], verify_only=False)

    missing = await binder.provision([TOPIC], verify_only=True)

    assert missing == ["missing: letters.urgent:office", "missing: letters.low:office"]
    assert await house.pool.fetchval("SELECT count(*) FROM subscription") == 0
    await transport.provision(travelling(TOPIC), verify_only=False)
    assert await binder.provision([TOPIC], verify_only=True) == []
    await (await binder.subscribe(TOPIC.name, "office")).close(0.0)


async def test_what_is_due_is_anybodys_when_who_receives_it_is_cancelled(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While he waits for what the broker has. A lease lasts a minute, and its end would be counted."""
    is_waiting = asyncio.Event()

    async def wait(self: SuppliedSubscription, limit: int) -> list[Delivery]:
        is_waiting.set()
        return await asyncio.Future[list[Delivery]]()

    topic = Topic(f"orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.", lanes=1)
    async with open_bench("memory", database_url, topic) as bench:
        await bench.binder.send(topic.name, [replace(record("r-1"), delay_s=0.2)], deadline_s=9)
        await asyncio.sleep(0.3)
        one, two = [await bench.binder.subscribe(topic.name, "shop") for _ in range(2)]
        with monkeypatch.context() as slow:
            slow.setattr(SuppliedSubscription, "_from_broker", wait)
            receiving = asyncio.create_task(one.receive(10, 9.0))
            await is_waiting.wait()
            assert await bench.pool.fetchval("SELECT count(*) FROM message_lease") == 1
            receiving.cancel()
            with suppress(asyncio.CancelledError):
                await receiving

        async with asyncio.timeout(30.0):
            (delivery,) = await collect(two, 1)

        assert (delivery.record.id, delivery.attempts) == ("r-1", 0)
        row: Any = await bench.pool.fetchrow("SELECT lapses, returned FROM message")
        assert (row["lapses"], row["returned"]) == (0, False)
        await one.close(0.0)
        await two.close(0.0)
