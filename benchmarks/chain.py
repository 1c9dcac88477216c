"""Claim: from the event log over a broker to effects in the journal, ten thousand a second and more; soon, where load is low.

One process reads the log and sends envelopes, another receives them and posts a transfer for each record: effect, inbox key
and acknowledgement. First a backlog, as fast as it goes: the relay has the pace that it has by default, and nobody writes an event
meanwhile (the effects write none), so nothing holds it up; then a hundred events a second, from commit to handler; then as many
as can be written and handled at a time on this machine, and the latency at the ten thousand a second that are asked for, or at four
fifths of what goes, where that is less (the median of six such loads).
"""

import asyncio
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter, time
from typing import Any

import uvloop

from benchmarks import brokers
from benchmarks.chain_part import GROUP, HOME, percentiles, topic
from benchmarks.report import Result, write
from benchmarks.stage import Stage, value
from kassa.clock import SystemClock
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.journal.change import Change, Event
from kassa.journal.writer import PostgresJournal
from kassa.messaging.binder import Resources
from kassa.messaging.registry import make_binder
from kassa.messaging.wake import Wakeups
from kassa.payments.records import Wallet
from kassa.tables import TABLES

DATABASE = "chain"
BACKLOG, BACKLOG_QUICK = 40_000, 10_000
PHASE_S_MAX = 5
"""Of a phase at a steady pace."""
LOW_RATE = 100
DATA = json.dumps({"id": "wal_ID", "object": "wallet", "state": "open", "note": "x" * 490})
"""Of an event of the usual size; like each, it begins with the name of what it is about."""
TARGETED = ("postgres", "amqp", "kafka")
EFFECTS_TARGET = 10_000
AS_QUICK = 0.95
P50_MAX_MS, P99_MAX_MS = 5.0, 25.0
LOAD, LOAD_P99_MAX_MS = 0.8, 100.0
"""LOAD: of the most that the whole machine does, writing the events included. Beyond it a queue grows, and measures only itself."""
IN_FLIGHT_MAX = 1000
ROUNDS_MAX = 2
LOADS = 3
"""In each round: one stall of a tenth of a second anywhere on the machine is the p99 of five seconds."""
BACKLOG_RUN, LOW_RUN, MOST_RUN, LOAD_RUN = "backlog", "low load", "all that goes", "load"


def born() -> Change:
    """A root of its own with one event."""
    id = new_id()
    wallet = Wallet(
        home=HOME, id=id, version=0, sequence=0, state="open", user=id, currency="CNY", created_at=SystemClock().now()
    )
    return Change(
        home=HOME, new=(wallet,), root=id, events=(Event("wallet.created", DATA.replace("ID", id, 1).encode()),)
    )


async def fill(url: str, count: int) -> None:
    """Events in the log, as fast as the journal takes them."""
    journal = PostgresJournal(lambda: connect(url, application="fill"), TABLES, lanes=2)
    await journal.start()
    for start in range(0, count, 1000):
        await asyncio.gather(*(journal.commit(born()) for _ in range(min(1000, count - start))))
    await journal.stop()


async def produce(url: str, count: int, per_second: float) -> dict[str, float]:
    """Events at a steady pace, or as fast as the journal takes them, if that is slower. When each was known to be committed, by its
    root."""
    committed_at: dict[str, float] = {}

    def committed(id: str, _: object) -> None:
        room.release()
        committed_at[id] = time()

    journal = PostgresJournal(lambda: connect(url, application="produce"), TABLES, lanes=1)
    wakeups = Wakeups(lambda: connect(url, application="produce wake"))
    wakeups.follow(journal)
    telling = asyncio.create_task(wakeups.run())
    await journal.start()
    room = asyncio.Semaphore(IN_FLIGHT_MAX)
    began = perf_counter()
    for number in range(count):
        wait_s = began + number / per_second - perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        await room.acquire()
        change = born()
        journal.submit(change).add_done_callback(partial(committed, str(change.root)))
    for _ in range(IN_FLIGHT_MAX):
        await room.acquire()
    telling.cancel()
    await journal.stop()
    return committed_at


async def provision(url: str, broker: str, name: str) -> None:
    """The topic with its group, before anything is sent."""
    pool = await open_pool(url, application="provision")
    wakeups = Wakeups(lambda: connect(url, application="provision wake"))
    async with make_binder(broker, Resources(pool, wakeups, (topic(name),))) as binder:
        await binder.provision([topic(name)])
    await pool.close()


@contextmanager
def part(kind: str, url: str, broker: str, name: str, *options: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of the chain, ready to begin."""
    command = [
        sys.executable, "-m", "benchmarks.chain_part", kind,
        "--database-url", url, "--broker", broker, "--topic", name, *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{kind} does not start")
            yield process
        finally:
            process.terminate()


def begin(process: "subprocess.Popen[str]", count: int = 0) -> None:
    """Its next phase, with so many events."""
    if process.stdin is not None:
        process.stdin.write(f"{count}\n")
        process.stdin.flush()


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the consumer counted."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise SystemExit("the consumer said nothing")
    counted: dict[str, Any] = json.loads(line)
    return counted


def phase(consumer: "subprocess.Popen[str]", url: str, count: int, per_second: float) -> dict[str, Any]:
    """Events that are written while they are handled; `whole_rate`: from the first commit to the last effect."""
    begin(consumer, count)
    started = perf_counter()
    committed_at = uvloop.run(produce(url, count, per_second))
    counted = answer(consumer)
    whole_s = perf_counter() - started
    if came_at := counted.pop("came_at", None):
        # Told one by one: from the commit, instead of from the event's time, which is before it.
        of_event = {f"{figure}_of_event": counted[figure] for figure in ("p50_ms", "p99_ms")}
        counted |= of_event | percentiles([at - committed_at[key.rpartition("_")[2]] for key, at in came_at.items()])
    return {**counted, "whole_rate": count / whole_s, "per_second": per_second}


def round_of(stage: Stage, scheme: str, broker: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A backlog; a low load; for those with a target also all that goes, and the load that is asked for. One database, one relay,
    one consumer."""
    count = BACKLOG_QUICK if stage.is_quick or scheme not in TARGETED else BACKLOG
    seconds = min(stage.seconds, PHASE_S_MAX)
    url = stage.database(DATABASE)
    name = f"chain-{new_id()[-8:]}"
    asyncio.run(provision(url, broker, name))
    total = count
    # The consumer first: where it is the hub, the relay finds it.
    with part("consumer", url, broker, name) as consumer, part("relay", url, broker, name) as relay:
        uvloop.run(fill(url, count))
        begin(consumer, count)
        begin(relay)
        yield BACKLOG_RUN, answer(consumer)
        low = LOW_RATE * seconds
        yield LOW_RUN, phase(consumer, url, low, LOW_RATE)
        total += low
        if scheme in TARGETED:
            whole = phase(consumer, url, count // 2, math.inf)
            yield MOST_RUN, whole
            rate = min(EFFECTS_TARGET, LOAD * whole["whole_rate"])
            loaded = int(rate * seconds)
            for _ in range(1 if stage.is_quick else LOADS):
                yield LOAD_RUN, phase(consumer, url, loaded, rate)
                total += loaded
            total += count // 2
    if (effects := value(url, f"SELECT count(*) FROM inbox WHERE group_name = '{GROUP}'")) != total:
        raise SystemExit(f"{name}: {effects} effects of {total} events")
    stage.drop(DATABASE)


def run(stage: Stage) -> None:
    """Each broker in turn, with a database of its own for each round; those without a target once."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for scheme in brokers.names():
        with brokers.broker(scheme, stage.folder) as broker:
            if broker is None:
                continue
            for _ in range(min(stage.rounds, ROUNDS_MAX if scheme in TARGETED else 1)):
                for kind, counted in round_of(stage, scheme, broker):
                    figures = f"{counted['rate']:,.0f}/s, p50 {counted['p50_ms']:.1f}, p99 {counted['p99_ms']:.1f} ms"
                    stage.tell(f"  {scheme}, {kind}: {figures}")
                    runs.setdefault(f"{scheme}, {kind}", []).append(counted)
    write("chain", _results(runs), baseline="", runs=runs, folder=stage.results)


def _results(runs: dict[str, list[dict[str, Any]]]) -> list[Result]:
    results = [_result(name, *name.split(", "), runs=some) for name, some in runs.items()]
    drained = {scheme: runs.get(f"{scheme}, {BACKLOG_RUN}") for scheme in ("kafka", "amqp")}
    if all(drained.values()):
        kafka, rabbitmq = (statistics.median(run["rate"] for run in some or ()) for some in drained.values())
        ratio = kafka / rabbitmq
        target = f"≥ {AS_QUICK:g}: not slower, as far as two runs can tell"
        results.append(Result("kafka, backlog, of RabbitMQ's", ratio, "×", None, "", target, ratio >= AS_QUICK))
    return results


def _result(name: str, scheme: str, kind: str, *, runs: list[dict[str, Any]]) -> Result:
    p50, p99, of_event, rate, whole, asked_for, cpu_us = (
        statistics.median(run.get(figure, 0.0) for run in runs)
        for figure in ("p50_ms", "p99_ms", "p50_ms_of_event", "rate", "whole_rate", "per_second", "cpu_us")
    )
    is_asked = scheme in TARGETED
    if kind == BACKLOG_RUN:
        note = f"consumer {cpu_us:.0f} µs of processor each"
        met = rate >= EFFECTS_TARGET if is_asked else None
        return Result(name, rate, "effects/s", None, note, f"≥ {EFFECTS_TARGET:,}" if is_asked else "", met)
    if kind == MOST_RUN:
        return Result(
            name, whole, "effects/s", None, "from the first commit to the last effect, events written beside it"
        )
    if kind == LOAD_RUN:
        least, most = (chosen(run["p99_ms"] for run in runs) for chosen in (min, max))
        note = f"p50 {p50:.1f} ms, at {asked_for:,.0f}/s; p99 of {len(runs)} runs {least:.0f} to {most:.0f}"
        return Result(f"{name}, p99", p99, "ms", None, note, f"< {LOAD_P99_MAX_MS:g} ms", p99 < LOAD_P99_MAX_MS)
    asked = f"p50 < {P50_MAX_MS:g}, p99 < {P99_MAX_MS:g} ms" if is_asked else ""
    met = p50 < P50_MAX_MS and p99 < P99_MAX_MS if is_asked else None
    return Result(
        f"{name} ({LOW_RATE}/s), p99", p99, "ms", None, f"p50 {p50:.1f} ms; {of_event:.1f} with the commit", asked, met
    )
