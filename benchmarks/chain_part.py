"""One process of the chain: the relay (event log to broker) or the consumer (broker to effects). For benchmarks/chain.py.

Says `ready`, begins at the first line of its standard input. Each line tells the consumer how many more events of ours are to
be handled; it prints one JSON document when they are. Events of others are handled too and not counted.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import uvloop

from kassa import heap
from kassa.db.pool import connect, open_pool
from kassa.journal.change import Change
from kassa.journal.writer import PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import single
from kassa.messaging.binder import Binder, Resources
from kassa.messaging.consumer import Consumer
from kassa.messaging.log import GroupReader, LogGroup
from kassa.messaging.model import Record
from kassa.messaging.pace import Pace
from kassa.messaging.registry import make_binder
from kassa.messaging.relay import EventRelay
from kassa.messaging.topology import EVENT_BATCHES, Topic
from kassa.messaging.wake import EVENTS, Wakeups
from kassa.settings import Settings
from kassa.tables import TABLES

GROUP = "books"
HOME = 7
LATENCIES_MAX = 100_000
"""Kept of a phase, so that the meter is not what grows."""
ONE_BY_ONE_MAX = 2_000
"""Of a phase with so few events it is told when each came to its handler."""


def topic(name: str) -> Topic:
    """Of one run: envelopes, for consumers that are Kassa's own."""
    return EVENT_BATCHES._replace(name=name, groups=(GROUP,))


async def _line() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


async def relay(database_url: str, broker: str, name: str, backlog_per_s: int) -> None:
    """Everything that is in the log, until it is ended."""
    pool = await open_pool(database_url, application="relay")
    wakeups = Wakeups(lambda: connect(database_url, application="relay wake"))
    telling = asyncio.create_task(wakeups.run())
    async with make_binder(broker, Resources(pool, wakeups, (topic(name),))) as binder:
        group = LogGroup(pool, f"relay:{name}")
        await group.create(from_now=False)
        heap.settle()
        print("ready", flush=True)
        await _line()
        handle, wait = EventRelay(binder, name).handle, wakeups.watch(EVENTS).wait
        await GroupReader(group, handle, wait, pace=Pace(pool, backlog_per_s)).run()
    await telling


class Meter:
    """What came of ours since it was asked last."""

    def __init__(self) -> None:
        self.others = 0
        self.latencies: deque[float] = deque(maxlen=LATENCIES_MAX)
        self.came_at: dict[str, float] = {}
        """The first so many of a phase, by key."""

    def saw(self, records: Sequence[Record]) -> None:
        """From each event's time, which is a little before its commit, to its handler."""
        now = datetime.now(UTC)
        times = [one.headers["ce-time"] for one in records if one.home == HOME]
        self.others += len(records) - len(times)
        self.latencies.extend((now - datetime.fromisoformat(time)).total_seconds() for time in times)
        if len(self.came_at) < ONE_BY_ONE_MAX:
            self.came_at.update((one.key, now.timestamp()) for one in records if one.home == HOME)

    def percentiles(self) -> dict[str, float]:
        """Of everything since they were asked last."""
        found = percentiles(list(self.latencies))
        self.latencies.clear()
        return found


def percentiles(latencies_s: Sequence[float]) -> dict[str, float]:
    """Without the first tenth, in which connections and plans are made and caches fill."""
    later = sorted(latencies_s[len(latencies_s) // 10 :])
    return {"p50_ms": later[len(later) // 2] * 1000, "p99_ms": later[int(len(later) * 0.99)] * 1000}


async def consume(database_url: str, broker: str, name: str) -> None:
    """Effects in the journal, one transfer each."""
    pool = await open_pool(database_url, application="consumer")
    wakeups = Wakeups(lambda: connect(database_url, application="consumer wake"))
    telling = asyncio.create_task(wakeups.run())
    journal = PostgresJournal(lambda: connect(database_url, application="consumer writer"), TABLES, lanes=2)
    wakeups.follow(journal)
    await journal.start()
    meter = Meter()
    source, target = chart.receivable(HOME, "CNY"), chart.payable(HOME, "CNY")

    async def handler(records: Sequence[Record]) -> list[Change]:
        meter.saw(records)
        return [
            Change(home=HOME, transfers=(single(chart.Posting.TOPUP, source, target, 1),)) for _ in records
        ]  # fmt: skip

    async with make_binder(broker, Resources(pool, wakeups, (topic(name),))) as binder:
        consumer = await _consumer(binder, name, journal, handler)
        heap.settle()
        print("ready", flush=True)
        expected = 0
        while line := await _line():
            expected += int(line)
            print(json.dumps(await _phase(consumer, meter, int(line), expected)), flush=True)
    await journal.stop()
    telling.cancel()


async def _phase(consumer: Consumer, meter: Meter, count: int, expected: int) -> dict[str, Any]:
    """Until `expected` are handled at all, `count` of them in this phase. marks: when each tenth was done."""
    cpu_s, started = time.process_time(), 0.0
    meter.came_at.clear()
    marks: list[float] = []
    while (done := consumer.counts.handled - meter.others - (expected - count)) < count:
        while done >= (len(marks) + 1) * count // 10:
            marks.append(time.time())
        if await consumer.step(5.0) and not started:
            # From when the first batch is done, so that what is counted from there on is not one too many.
            started, first = time.time(), consumer.counts.handled - meter.others - (expected - count)
    ended = time.time()
    return {
        "handled": done,
        "repeated": consumer.counts.repeated,
        "rate": (done - first) / (ended - started) if ended > started else 0.0,
        "cpu_us": (time.process_time() - cpu_s) / count * 1e6,
        "started": started,
        "marks": [*marks, *[ended] * (10 - len(marks))],
        **({"came_at": meter.came_at} if count <= ONE_BY_ONE_MAX else {}),
        **meter.percentiles(),
    }


async def _consumer(binder: Binder, name: str, journal: PostgresJournal, handler: object) -> Consumer:
    subscription = await binder.subscribe(name, GROUP)
    return Consumer(subscription, GROUP, journal, handler)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["relay", "consumer"])
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument(
        "--backlog-per-s",
        type=int,
        default=Settings().relay_backlog_per_s,
        help="the relay's pace while somebody writes",
    )
    options = parser.parse_args()
    if options.part == "relay":
        uvloop.run(relay(options.database_url, options.broker, options.topic, options.backlog_per_s))
    else:
        uvloop.run(consume(options.database_url, options.broker, options.topic))


if __name__ == "__main__":
    main()
