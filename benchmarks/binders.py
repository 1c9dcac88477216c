"""Claim: a binder of Kassa costs little more than the client that it stands on, and much less than FastStream.

For each broker, on the same real server in the same run, round after round in turn:

- *publish*: records of 600 bytes with a key and the headers of a CloudEvent, each confirmed as durably as the broker can
  (RabbitMQ: quorum queues, confirms, mandatory; Kafka: idempotent, all replicas; RocketMQ: synchronous flush; ZeroMQ and
  PostgreSQL: committed), four batches of a hundred under way;
- *consume*: all of them received and acknowledged after use, by the hundred where the client can.

Everybody uses the same number of queues (partitions), so that records of a key keep their order, and hands out the record's id,
key, headers and bytes; each run checks that every record came. The clock of *consume* begins with the first record, because how
long a group takes to find itself is another question. Client CPU is of this whole process, all its threads, by the clock that
runs: other work on the machine spoils it less than the rates. Python's
garbage collector is set as in Kassa's processes, for all alike.

Who takes part, per broker: the *raw client* as somebody who knows it would use it; FastStream, where it has the broker; Kassa by
`make_binder`, with all that this means (parked keys are looked for in PostgreSQL, passages are counted). *Single* is one message
per record for all of them. *Envelopes* is CloudEvents batch mode, with batches of five hundred: there the raw client sends the
same envelopes and packs and unpacks them too, and is compared with nothing else. What each raw client promises less is said in
its file in `contenders/`: PostgreSQL's and ZeroMQ's most, also with the leases that Kassa is held against. Without them they are
quicker, and stand beside.
"""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import uvloop

from benchmarks import brokers
from benchmarks.contenders import kafka, kassa, postgres, rabbitmq, rocketmq, zeromq
from benchmarks.contenders.shape import BATCH, Contender, records
from benchmarks.report import Result, write
from benchmarks.stage import Stage
from kassa.ids import new_id

DATABASE = "binders"
KASSA, RAW, FASTSTREAM = "Kassa", "raw client", "FastStream"
ONE_TRANSACTION, NO_LEASES = "raw client, one transaction", "raw client, no leases"
"""Compared, and no target: queues that are quicker and that nobody would put money through."""
LEAST = {RAW: 0.8, FASTSTREAM: 1.5}
"""Kassa's rate in theirs."""
POSTGRES_LEAST = 30_000
"""Records a second, at a hundred at a time."""
COUNTS = {"amqp": 6000, "kafka": 40_000, "rocketmq": 800, "zeromq": 10_000, "postgres": 20_000}
"""Records of a run: about a second's."""
WARM = BATCH
"""Sent before the clock runs: a producer has to find its number and its topic first."""
QUICK_PART = 10
ROUNDS = 5
"""Each is a second: of three one may be another program's."""
ENVELOPES_TIMES = 3
"""So many more records travel in envelopes, which are quicker."""
BROKERS = {"amqp": "RabbitMQ", "kafka": "Kafka", "rocketmq": "RocketMQ", "zeromq": "ZeroMQ", "postgres": "PostgreSQL"}


class Where(NamedTuple):
    """Of one run."""

    broker: str
    database_url: str
    name: str
    """Of its topic, which nobody has used before."""


Opened = Callable[[Where], AbstractAsyncContextManager[Contender]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender's half of one run."""

    rate: float
    """Records per second."""
    cpu_us: float
    """Processor time of this process for each record."""


SINGLE: dict[str, dict[str, Opened]] = {
    "amqp": {
        RAW: lambda at: rabbitmq.by_aiormq(at.broker, at.name, envelopes=False),
        FASTSTREAM: lambda at: rabbitmq.by_faststream(at.broker, at.name),
    },
    "kafka": {
        RAW: lambda at: kafka.by_confluent(at.broker, at.name, envelopes=False),
        FASTSTREAM: lambda at: kafka.by_faststream(at.broker, at.name),
    },
    "rocketmq": {RAW: lambda at: rocketmq.by_stubs(at.broker, at.database_url, at.name)},
    "zeromq": {
        RAW: lambda at: zeromq.by_pyzmq(at.database_url, at.name, leases=True),
        NO_LEASES: lambda at: zeromq.by_pyzmq(at.database_url, at.name, leases=False),
    },
    "postgres": {
        RAW: lambda at: postgres.by_asyncpg(at.database_url, at.name, leases=True),
        ONE_TRANSACTION: lambda at: postgres.by_asyncpg(at.database_url, at.name, leases=False),
    },
}
"""Who takes part beside Kassa."""
ENVELOPES: dict[str, dict[str, Opened]] = {
    "amqp": {RAW: lambda at: rabbitmq.by_aiormq(at.broker, at.name, envelopes=True)},
    "kafka": {RAW: lambda at: kafka.by_confluent(at.broker, at.name, envelopes=True)},
}
"""Brokers where envelopes are a message of their own; the other clients send batches anyway."""


def _kassa(at: Where, *, envelopes: bool) -> AbstractAsyncContextManager[Contender]:
    return kassa.binder(at.broker, at.database_url, kassa.topic(at.name, envelopes=envelopes))


SHAPES: dict[str, dict[str, dict[str, Opened]]] = {
    "single": {scheme: {**others, KASSA: lambda at: _kassa(at, envelopes=False)} for scheme, others in SINGLE.items()},
    "envelopes": {
        scheme: {**others, KASSA: lambda at: _kassa(at, envelopes=True)} for scheme, others in ENVELOPES.items()
    },
}


async def measured(opened: Opened, at: Where, count: int) -> tuple[Measured, Measured]:
    """(publish, consume) of so many records. Raises Failure."""
    warm, sent = records(WARM), records(count)
    async with opened(at) as contender:
        await contender.publish(warm)
        publish = _Clock(count)
        await contender.publish(sent)
        published = publish.read()
        consume = _Clock(WARM + count)
        found = await contender.consume(WARM + count, consume.restart)
        consumed = consume.read()
    if set(found) != {one.id for one in warm + sent}:
        raise SystemExit(f"{at.name}: {len(found)} records came, {len(set(found))} different ones, of {WARM + count}")
    return published, consumed


class _Clock:
    def __init__(self, count: int) -> None:
        self._count = count
        gc.collect()
        # The records that were made for the run are nobody's cost.
        gc.freeze()
        self.restart()

    def restart(self) -> None:
        self._began, self._cpu_s = time.perf_counter(), time.process_time()

    def read(self) -> Measured:
        seconds, cpu_s = time.perf_counter() - self._began, time.process_time() - self._cpu_s
        return Measured(self._count / seconds, cpu_s / self._count * 1e6)


Runs = dict[tuple[str, str, str, str], list[Measured]]
"""By (scheme, shape, publish or consume, who)."""


def run(stage: Stage) -> None:
    """Each broker in turn, in it each round, in it each contender."""
    runs: Runs = {}
    for scheme in COUNTS:
        with brokers.broker(scheme, stage.folder) as broker:
            if broker is None:
                continue
            url = stage.database(DATABASE)
            uvloop.run(_rounds(stage, runs, scheme, broker, url))
            stage.drop(DATABASE)
    kept = {", ".join(key): [asdict(one) for one in some] for key, some in runs.items()}
    write("binders", _results(runs), baseline="", runs=kept, folder=stage.results)


async def _rounds(stage: Stage, runs: Runs, scheme: str, broker: str, database_url: str) -> None:
    for number in range(1 if stage.is_quick else ROUNDS):
        for shape, schemes in SHAPES.items():
            count = COUNTS[scheme] // (QUICK_PART if stage.is_quick else 1)
            count *= ENVELOPES_TIMES if shape == "envelopes" else 1
            # Who comes first in one round comes last in the next.
            for who, opened in list(schemes.get(scheme, {}).items())[:: -1 if number % 2 else 1]:
                at = Where(broker, database_url, f"binders-{new_id()[-12:]}")
                pair = await measured(opened, at, count)
                for half, one in zip(("publish", "consume"), pair, strict=True):
                    runs.setdefault((scheme, shape, half, who), []).append(one)
                publish, consume = (f"{one.rate:,.0f}/s {one.cpu_us:.1f} µs" for one in pair)
                stage.tell(f"  {scheme} {shape}, {who}: publish {publish}, consume {consume}")


def _results(runs: Runs) -> list[Result]:
    """A contender's ratio is Kassa's rate in his."""
    results = []
    for (scheme, shape, half, who), some in runs.items():
        rate = statistics.median(one.rate for one in some)
        cpu_us = statistics.median(one.cpu_us for one in some)
        name = f"{BROKERS[scheme]}, {half}, {shape}: {who}"
        note = f"{cpu_us:.1f} µs of client CPU each"
        if who == KASSA:
            is_asked = scheme == "postgres"
            target, met = (f"≥ {POSTGRES_LEAST:,}", rate >= POSTGRES_LEAST) if is_asked else ("", None)
            results.append(Result(name, rate, "records/s", None, note, target, met))
            continue
        ours = runs[scheme, shape, half, KASSA]
        # Of each round by itself: the machine is not the same in the next one.
        ratio = statistics.median(mine.rate / other.rate for mine, other in zip(ours, some, strict=True))
        if (least := LEAST.get(who)) is None:
            results.append(Result(name, rate, "records/s", ratio, note))
        else:
            results.append(Result(name, rate, "records/s", ratio, note, f"Kassa ≥ {least:g} × this", ratio >= least))
    return results
