"""One process of the chain: the relay (event log to broker) or the consumer (broker to effects). For benchmarks/chain.py.

Says `ready`, begins at the first line of its standard input. The consumer ends when it has handled what was expected, and
prints one JSON document.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime

import uvloop

from kassa.db.pool import connect, open_pool
from kassa.journal.change import Change
from kassa.journal.writer import PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import single
from kassa.messaging.binder import Binder, Resources, make_binder
from kassa.messaging.consumer import Consumer
from kassa.messaging.log import GroupReader, LogGroup
from kassa.messaging.model import Record
from kassa.messaging.relay import EventRelay
from kassa.messaging.topology import EVENT_BATCHES, Topic
from kassa.messaging.wake import EVENTS, Wakeups
from kassa.tables import TABLES

GROUP = "books"
HOME = 7


def topic(name: str) -> Topic:
    """Of one run: envelopes, for consumers that are Kassa's own."""
    return EVENT_BATCHES._replace(name=name, groups=(GROUP,))


async def _begun() -> None:
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


async def relay(database_url: str, broker: str, name: str) -> None:
    """Everything that is in the log, until it is ended."""
    pool = await open_pool(database_url, application="relay")
    wakeups = Wakeups(lambda: connect(database_url, application="relay wake"))
    telling = asyncio.create_task(wakeups.run())
    async with make_binder(broker, Resources(pool, wakeups, (topic(name),))) as binder:
        group = LogGroup(pool, f"relay:{name}")
        await group.create(from_now=False)
        await _begun()
        await GroupReader(group, EventRelay(binder, name).handle, wakeups.watch(EVENTS).wait).run()
    await telling


async def consume(database_url: str, broker: str, name: str, expected: int) -> None:
    """Effects in the journal, one transfer each; latencies from the event's commit to its handler."""
    pool = await open_pool(database_url, application="consumer")
    wakeups = Wakeups(lambda: connect(database_url, application="consumer wake"))
    telling = asyncio.create_task(wakeups.run())
    journal = PostgresJournal(lambda: connect(database_url, application="consumer writer"), TABLES, lanes=2)
    wakeups.follow(journal)
    await journal.start()
    latencies: list[float] = []
    source, target = chart.receivable(HOME, "CNY"), chart.payable(HOME, "CNY")

    async def handler(records: Sequence[Record]) -> list[Change]:
        now = datetime.now(UTC)
        latencies.extend((now - datetime.fromisoformat(one.headers["ce-time"])).total_seconds() for one in records)
        return [
            Change(home=HOME, transfers=(single(chart.Posting.TOPUP, source, target, 1),)) for _ in records
        ]  # fmt: skip

    async with make_binder(broker, Resources(pool, wakeups, (topic(name),))) as binder:
        consumer = await _consumer(binder, name, journal, handler)
        await _begun()
        cpu_s, started = time.process_time(), 0.0
        while consumer.counts.handled < expected:
            if await consumer.step(5.0) and not started:
                started = time.perf_counter()
        seconds = time.perf_counter() - started
        latencies.sort()
        print(
            json.dumps({
                "handled": consumer.counts.handled,
                "repeated": consumer.counts.repeated,
                "seconds": seconds,
                "cpu_us": (time.process_time() - cpu_s) / expected * 1e6,
                "p50_ms": latencies[len(latencies) // 2] * 1000,
                "p99_ms": latencies[int(len(latencies) * 0.99)] * 1000,
            }),
            flush=True,
        )  # fmt: skip
    await journal.stop()
    telling.cancel()


async def _consumer(binder: Binder, name: str, journal: PostgresJournal, handler: object) -> Consumer:
    subscription = await binder.subscribe(name, GROUP)
    return Consumer(subscription, GROUP, journal, handler)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["relay", "consumer"])
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--expected", type=int, default=0)
    options = parser.parse_args()
    if options.part == "relay":
        uvloop.run(relay(options.database_url, options.broker, options.topic))
    else:
        uvloop.run(consume(options.database_url, options.broker, options.topic, options.expected))


if __name__ == "__main__":
    main()
