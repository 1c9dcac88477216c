"""Claim: from the event log over a broker to effects in the journal, ten thousand a second and more; soon, where load is low.

One process reads the log and sends envelopes, another receives them and posts a transfer for each record: effect, inbox key
and acknowledgement. First a backlog as fast as it goes; then a hundred events a second, from commit to handler.
"""

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from benchmarks import brokers
from benchmarks.chain_part import GROUP, HOME, topic
from benchmarks.report import Result, write
from benchmarks.stage import Stage, value
from kassa.clock import SystemClock
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.journal.change import Change, Event
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources, make_binder
from kassa.messaging.wake import Wakeups
from kassa.payments.records import Wallet
from kassa.tables import TABLES

DATABASE = "chain"
BACKLOG, BACKLOG_QUICK = 40_000, 4000
LOW_RATE = 100
DATA = json.dumps({"id": "pay_", "object": "payment", "amount": 100, "note": "x" * 500}).encode()
"""An event of the usual size."""
EFFECTS_TARGET = {"postgres": 10_000, "amqp": 10_000, "kafka": 10_000}
P50_MAX_MS, P99_MAX_MS = 5.0, 25.0
LOW_TARGET = ("postgres", "amqp", "kafka")


def born() -> Change:
    """A root of its own with one event."""
    id = new_id()
    wallet = Wallet(
        home=HOME, id=id, version=0, sequence=0, state="open", user=id, currency="CNY", created_at=SystemClock().now()
    )
    return Change(home=HOME, new=(wallet,), root=id, events=(Event("wallet.created", DATA),))


async def fill(url: str, count: int) -> None:
    """Events in the log, as fast as the journal takes them."""
    journal = PostgresJournal(lambda: connect(url, application="fill"), TABLES, lanes=2)
    await journal.start()
    for start in range(0, count, 1000):
        await asyncio.gather(*(journal.commit(born()) for _ in range(min(1000, count - start))))
    await journal.stop()


async def trickle(url: str, count: int, per_second: int) -> None:
    """Events at a steady pace, each committed by itself."""
    journal = PostgresJournal(lambda: connect(url, application="trickle"), TABLES, lanes=1)
    wakeups = Wakeups(lambda: connect(url, application="trickle wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    await journal.start()
    began = perf_counter()
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / per_second - perf_counter()))
        await journal.commit(born())
    telling.cancel()
    await journal.stop()


async def provision(url: str, broker: str, name: str) -> None:
    """The topic with its group, before anything is sent."""
    pool = await open_pool(url, application="provision")
    wakeups = Wakeups(lambda: connect(url, application="provision wake"))
    async with make_binder(broker, Resources(pool, wakeups, (topic(name),))) as binder:
        await binder.provision([topic(name)])
    await pool.close()


@contextmanager
def part(kind: str, url: str, broker: str, name: str, expected: int = 0) -> Iterator["subprocess.Popen[str]"]:
    """A process of the chain, ready to begin."""
    command = [
        sys.executable, "-m", "benchmarks.chain_part", kind,
        "--database-url", url, "--broker", broker, "--topic", name, "--expected", str(expected),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{kind} does not start")
            yield process
        finally:
            process.terminate()


def begin(process: "subprocess.Popen[str]") -> None:
    if process.stdin is not None:
        process.stdin.write("go\n")
        process.stdin.flush()


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the consumer counted."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise SystemExit("the consumer said nothing")
    counted: dict[str, Any] = json.loads(line)
    return counted


def drained(url: str, broker: str, name: str, count: int) -> dict[str, Any]:
    """A backlog of `count` events, from the log to effects."""
    asyncio.run(provision(url, broker, name))
    # The consumer first: where it is the hub, the relay finds it.
    with part("consumer", url, broker, name, count) as consumer, part("relay", url, broker, name) as relay:
        begin(consumer)
        begin(relay)
        counted = answer(consumer)
    if counted["handled"] != count or value(url, f"SELECT count(*) FROM inbox WHERE group_name = '{GROUP}'") != count:
        raise SystemExit(f"{name}: {counted}")
    counted["rate"] = count / counted["seconds"]
    return counted


def trickled(url: str, broker: str, name: str, seconds: int) -> dict[str, Any]:
    """A low load, from commit to handler."""
    count = LOW_RATE * seconds
    asyncio.run(provision(url, broker, name))
    with part("consumer", url, broker, name, count) as consumer, part("relay", url, broker, name) as relay:
        begin(consumer)
        begin(relay)
        asyncio.run(trickle(url, count, LOW_RATE))
        return answer(consumer)


def run(stage: Stage) -> None:
    """Each broker in turn, with a database of its own for each round."""
    runs: dict[str, list[dict[str, Any]]] = {}
    count = BACKLOG_QUICK if stage.is_quick else BACKLOG
    for scheme in brokers.names():
        with brokers.broker(scheme, stage.folder) as broker:
            if broker is None:
                continue
            for _ in range(stage.rounds):
                for kind in ("backlog", "low load"):
                    url = stage.database(DATABASE)
                    name = f"chain-{new_id()[-8:]}"
                    if kind == "backlog":
                        asyncio.run(fill(url, count))
                        counted = drained(url, broker, name, count)
                        stage.tell(f"  {scheme}: {counted['rate']:,.0f} effects/s")
                    else:
                        counted = trickled(url, broker, name, stage.seconds)
                        stage.tell(f"  {scheme}: p50 {counted['p50_ms']:.1f} ms, p99 {counted['p99_ms']:.1f} ms")
                    runs.setdefault(f"{scheme}, {kind}", []).append(counted)
                    stage.drop(DATABASE)
    write("chain", _results(runs), baseline="", runs=runs, folder=stage.results)


def _results(runs: dict[str, list[dict[str, Any]]]) -> list[Result]:
    results = []
    for name, some in runs.items():
        scheme, _, kind = name.partition(", ")
        p50 = statistics.median(run["p50_ms"] for run in some)
        p99 = statistics.median(run["p99_ms"] for run in some)
        if kind == "backlog":
            rate = statistics.median(run["rate"] for run in some)
            target = EFFECTS_TARGET.get(scheme)
            asked = f"≥ {target:,}" if target else ""
            note = f"consumer {statistics.median(run['cpu_us'] for run in some):.0f} µs of processor each"
            results.append(Result(name, rate, "effects/s", None, note, asked, None if not target else rate >= target))
        else:
            is_asked = scheme in LOW_TARGET
            met = p50 < P50_MAX_MS and p99 < P99_MAX_MS if is_asked else None
            asked = f"p50 < {P50_MAX_MS:g}, p99 < {P99_MAX_MS:g} ms" if is_asked else ""
            results.append(Result(f"{name} ({LOW_RATE}/s), p99", p99, "ms", None, f"p50 {p50:.1f} ms", asked, met))
    return results
