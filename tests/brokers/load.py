"""Load on a broker, and what must be true of it afterwards: every confirmed record has its effect once, each key in order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from conformance.messaging.house import Bench, record, until
from kassa.journal.change import Change
from kassa.messaging.consumer import Consumer
from kassa.messaging.model import Confirmed, Record
from kassa.messaging.relay import send_surely

KEYS = 20


def name(number: int) -> str:
    """Of the record `number`; its key is the part before the dash."""
    return f"{number % KEYS}-{number}"


async def send_all(bench: Bench, total: int, *, batch: int = 20, deadline_s: float = 3.0) -> None:
    """Sends records until each is confirmed, one of each key at a time, as the relays do: no order is lost by a repeat."""
    for start in range(0, total, batch):
        waiting = [record(name(number), key=str(number % KEYS)) for number in range(start, min(start + batch, total))]
        while waiting:
            receipts = await send_surely(bench.binder, bench.topic.name, waiting, deadline_s)
            waiting = [
                one for one, receipt in zip(waiting, receipts, strict=True) if not isinstance(receipt, Confirmed)
            ]
            if waiting:
                await asyncio.sleep(0.1)


async def under_load(
    bench: Bench,
    total: int,
    trouble: Callable[[], Awaitable[None]],
    *,
    consumers: int = 2,
    end: Callable[[], Awaitable[bool]] | None = None,
) -> None:
    """Sends and handles `total` records while `trouble` happens, and checks the effects. end: what must become true while the
    consumers still work: effects are there before the broker knows of it. Raises TimeoutError after minutes."""

    async def handler(records: Sequence[Record]) -> list[Change]:
        return [bench.effect(one) for one in records]

    working = [
        asyncio.create_task(
            Consumer(await bench.binder.subscribe(bench.topic.name, "shop"), "shop", bench.journal, handler).run()
        )
        for _ in range(consumers)
    ]
    sending = asyncio.create_task(send_all(bench, total))
    await trouble()
    await sending

    async def is_complete() -> bool:
        return await bench.count() >= total

    try:
        await until(is_complete, 300)
        if end is not None:
            await until(end)
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    check(await bench.effects(), total)


def check(effects: Sequence[str], total: int) -> None:
    """Every record once, each key in order."""
    assert sorted(effects) == sorted(name(number) for number in range(total))
    for key in range(KEYS):
        numbers = [int(one.split("-")[1]) for one in effects if one.split("-")[0] == str(key)]
        assert numbers == sorted(numbers)
