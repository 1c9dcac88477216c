"""Claim: a backlog of any length drains at a constant rate, with flat memory, and payments over the API do not notice.

Events are written while nobody relays them; then relay and consumer go through them beside a running API, which takes wallet
payments at a steady pace before, meanwhile and afterwards. All of it shares the cores of one machine, so the relay has the pace
that it has by default while somebody writes (`relay_backlog_per_s`; docs/decisions/overlapping-pages.md). On RabbitMQ it is
measured once more without it: then an API that waits for a processor is slower while they are all busy.
"""

import asyncio
import json
import statistics
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import uvloop

from benchmarks import brokers, wallet_payments
from benchmarks.chain import answer, begin, fill, part, provision
from benchmarks.processes import pss_bytes
from benchmarks.report import Result, write
from benchmarks.sender import raw_request
from benchmarks.stage import Stage, kassa_api
from kassa.ids import new_id

DATABASE = "backlog"
EVENTS, EVENTS_QUICK, EVENTS_FULL = 200_000, 20_000, 1_000_000
SCHEMES = ("postgres", "amqp", "kafka")
MERCHANTS = 20
PER_SECOND = 50
"""Payments over the API: enough to tell, and not what the machine is busy with."""
ALONE_S, ALONE_QUICK_S = 10.0, 2.0
"""Payments by themselves, before the drain and after it: the disk has not written the backlog before it, and the machine is not
the same from minute to minute."""
CONNECTIONS = 32
SLOWER_MAX = 1.2
"""Payments beside a drain, at the median, in what they take without one."""
GROWTH_MAX = 1.2
STEADY_MIN = 0.8
"""The last third of the drain against the first."""
SAMPLE_S = 0.5


class Payers:
    """Wallet payments at a steady pace; each latency counts from when the payment was due, whatever was in its way."""

    def __init__(self, url: str, targets: Path, run: str) -> None:
        parts = urlsplit(url)
        self._place = (str(parts.hostname), parts.port or 80)
        self._targets = [line.split() for line in targets.read_text().splitlines()]
        self._run = run
        self._idle: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._sent = 0

    async def open(self) -> None:
        for _ in range(CONNECTIONS):
            self._idle.put_nowait(await asyncio.open_connection(*self._place))

    async def pay(self, until: "asyncio.Future[Any]") -> list[float]:
        """Latencies in seconds of what was paid until then."""
        began, number = perf_counter(), 0
        paying: list[asyncio.Task[float]] = []
        while not until.done():
            due = began + number / PER_SECOND
            await asyncio.sleep(max(0.0, due - perf_counter()))
            paying.append(asyncio.create_task(self._pay(due)))
            number += 1
        return await asyncio.gather(*paying)

    async def _pay(self, due: float) -> float:
        self._sent += 1
        name = f"{self._run}-{self._sent}"
        reader, writer = await self._idle.get()
        writer.write(self._request(name))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        latency = perf_counter() - due
        if not head.startswith(b"HTTP/1.1 201"):
            raise SystemExit(f"a payment was not taken: {head!r} {body!r}")
        self._idle.put_nowait((reader, writer))
        return latency

    def _request(self, name: str) -> bytes:
        key, wallet = self._targets[self._sent % len(self._targets)]
        body = {
            "order_id": name, "amount": 100, "currency": "CNY", "channel": "wallet", "method": "wallet",
            "payer": {"wallet": wallet},
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": name, "Content-Type": "application/json"}
        return raw_request("/v1/payments", headers, json.dumps(body).encode())


async def watched(
    payers: Payers, alone_s: float, relay: "subprocess.Popen[str]", consumer: "subprocess.Popen[str]", count: int
) -> dict[str, Any]:
    """Payments beside the drain, and by themselves before and after it; the memory of relay and consumer while it lasts."""
    await payers.open()
    # A second to warm up, which counts for nothing.
    await payers.pay(asyncio.ensure_future(asyncio.sleep(1.0)))
    before = await payers.pay(asyncio.ensure_future(asyncio.sleep(alone_s)))
    begin(consumer, count)
    begin(relay)
    drained = asyncio.ensure_future(asyncio.to_thread(answer, consumer))
    watching = asyncio.create_task(_sizes(drained, relay.pid, consumer.pid))
    beside = await payers.pay(drained)
    after = await payers.pay(asyncio.ensure_future(asyncio.sleep(alone_s)))
    payments = {"before": before, "beside": beside, "after": after, "alone": before + after}
    spreads = {when: _spread(latencies) for when, latencies in payments.items()}
    return {"drain": await drained, "sizes": await watching, **spreads}


async def _sizes(until: "asyncio.Future[Any]", *pids: int) -> list[list[int]]:
    """Bytes of each process, now and then."""
    sizes = []
    while not until.done():
        sizes.append([pss_bytes(pid) for pid in pids])
        await asyncio.wait([until], timeout=SAMPLE_S)
    return sizes


def _spread(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    return {
        "count": len(ordered),
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[len(ordered) * 99 // 100] * 1000,
    }


def drained(stage: Stage, scheme: str, broker: str, count: int, *, is_paced: bool) -> dict[str, Any]:
    """One backlog from beginning to end."""
    options = () if is_paced else ("--backlog-per-s", "0")
    settings = stage.settings(stage.database(DATABASE))
    url, name = settings.database_url or "", f"backlog-{new_id()[-8:]}"
    targets = asyncio.run(wallet_payments.prepare(settings, stage.folder, MERCHANTS))
    asyncio.run(provision(url, broker, name))
    uvloop.run(fill(url, count))
    with (
        kassa_api(settings) as api,
        part("consumer", url, broker, name) as consumer,
        part("relay", url, broker, name, *options) as relay,
    ):
        payers = Payers(api.url, targets, name)
        seen = uvloop.run(watched(payers, ALONE_QUICK_S if stage.is_quick else ALONE_S, relay, consumer, count))
    stage.drop(DATABASE)
    seen["is_paced"] = is_paced
    return seen


def run(stage: Stage) -> None:
    """Each broker in turn; RabbitMQ also without a pace. `--full`: every broker, and a million events."""
    count = EVENTS_FULL if stage.is_full else EVENTS_QUICK if stage.is_quick else EVENTS
    runs: dict[str, dict[str, Any]] = {}
    for scheme in brokers.names() if stage.is_full else SCHEMES:
        with brokers.broker(scheme, stage.folder) as broker:
            if broker is None:
                continue
            for is_paced in (True, False) if scheme == "amqp" else (True,):
                name = f"{scheme}, {count:,}" + ("" if is_paced else ", no limit")
                runs[name] = drained(stage, scheme, broker, count, is_paced=is_paced)
                for result in _results(name, runs[name], count):
                    stage.tell(f"  {result.name}: {result.value:,.2f} {result.unit} ({result.note})")
    results = [result for name, seen in runs.items() for result in _results(name, seen, count)]
    write("backlog", results, baseline="", runs=runs, folder=stage.results)


def _results(name: str, seen: dict[str, Any], count: int) -> Iterator[Result]:
    tenths = _tenths(seen["drain"], count)
    steady = statistics.mean(tenths[-3:]) / statistics.mean(tenths[:3])
    note = "per tenth " + " ".join(f"{rate / 1000:.1f}k" for rate in tenths)
    yield Result(f"{name}: drain", seen["drain"]["rate"], "events/s", None, note)
    asked = f"≥ {STEADY_MIN:g} ×"
    yield Result(f"{name}: last third", steady, "× the first", None, "", asked, steady >= STEADY_MIN)
    for place, who in enumerate(("relay", "consumer")):
        growth, note = _growth([sizes[place] for sizes in seen["sizes"]])
        asked = f"≤ {GROWTH_MAX:g} ×"
        yield Result(f"{name}: memory of the {who}", growth, "× its start", None, note, asked, growth <= GROWTH_MAX)
    alone, beside = seen["alone"], seen["beside"]
    p50, p99 = (
        ", ".join(f"{seen[when][what]:.1f}" for when in ("before", "beside", "after")) for what in ("p50_ms", "p99_ms")
    )
    note = f"p50 {p50} ms before, beside and after; p99 {p99} ms"
    slower = beside["p50_ms"] / alone["p50_ms"]
    if seen["is_paced"]:
        asked = f"≤ {SLOWER_MAX:g} ×"
        yield Result(f"{name}: payments, median", slower, "× as long", None, note, asked, slower <= SLOWER_MAX)
    else:
        yield Result(f"{name}: payments, median", slower, "× as long", None, note)
    yield Result(f"{name}: payments, p99", beside["p99_ms"] / alone["p99_ms"], "× as long")


def _tenths(drain: dict[str, Any], count: int) -> list[float]:
    """Events per second in each tenth; a batch that ends more than one counts for all of them."""
    marks = [drain["started"], *drain["marks"]]
    return [count / 10 / max(end - start, 0.001) for start, end in pairwise(marks)]


def _growth(sizes: list[int]) -> tuple[float, str]:
    """The largest of middle and end against what it was when a tenth was done, and was warm."""
    start, middle, end = (sizes[min(len(sizes) - 1, int(len(sizes) * part))] for part in (0.1, 0.5, 1.0))
    note = f"{start / 1e6:.0f}, {middle / 1e6:.0f}, {end / 1e6:.0f} MB at start, middle, end"
    return max(middle, end) / start, note
