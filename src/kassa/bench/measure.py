"""How fast a broker is through Kassa's own binder: throughput by batch size, latency by load. Times are this process's own."""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from kassa.bench.model import Latency, Throughput
from kassa.bench.stage import Line, batches, place_of
from kassa.messaging.model import Ack

HANDLED_AT_ONCE = 100
"""What a consumer of Kassa asks for at once."""
SENT_AT_ONCE = 500
TELLS_P99, TELLS_P999 = 100, 1000
"""So many samples at least: else a percentile is only the largest of them under another name."""
UNREAD = 4
"""One part in so many of what waits stays for the next measurement."""
GRACE_S = 3.0
"""What was sent at a steady load has to be handled by then."""
ON_TIME = 0.95
"""Of the load that was asked."""


class Passed(NamedTuple):
    """What went through in a time."""

    records: int
    took_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.records / self.took_s if self.took_s > 0 else 0.0

    @property
    def cpu_us(self) -> float:
        """For each record."""
        return self.cpu_s / self.records * 1e6 if self.records else 0.0


async def throughput(line: Line, way: str, batch: int, seconds: float) -> Throughput:
    """Sends for so long, then receives what waits for at most so long. Raises NotTaken, BrokerUnreachable."""
    sent = await _send(line, batch, seconds)
    received = await _receive(line, batch, seconds)
    return Throughput(
        way=way, batch=batch, send_per_s=sent.per_s, receive_per_s=received.per_s, send_cpu_us=sent.cpu_us,
        receive_cpu_us=received.cpu_us, sent=sent.records, received=received.records,
    )  # fmt: skip


async def _send(line: Line, batch: int, seconds: float) -> Passed:
    began, cpu = time.perf_counter(), time.process_time()
    count = 0
    for records in batches(line, line.new_run(), batch):
        await line.send(records)
        count += len(records)
        if time.perf_counter() - began >= seconds:
            break
    return Passed(count, time.perf_counter() - began, time.process_time() - cpu)


async def _receive(line: Line, batch: int, seconds: float) -> Passed:
    # Clients fetch ahead: what was here before the clock ran may not count, so as much has to be here when it ends.
    left = line.waiting // UNREAD
    began, cpu = time.perf_counter(), time.process_time()
    count = 0
    while line.waiting > left and time.perf_counter() - began < seconds:
        count += len(await line.receive(min(batch, line.waiting), 1.0))
    return Passed(count, time.perf_counter() - began, time.process_time() - cpu)


async def latency(line: Line, per_s: float, seconds: float, *, is_half_of_most: bool) -> Latency:
    """A steady load. The clock of a record runs from when it was due, also when the sender is held up by the one before it.

    Raises NotTaken, BrokerUnreachable."""
    load = _Load(line, per_s, max(1, round(per_s * seconds)))
    cpu = time.process_time()
    receiving = asyncio.create_task(load.receive(seconds + GRACE_S))
    try:
        await load.send(seconds + GRACE_S)
        await receiving
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
    used_s = time.process_time() - cpu
    await line.drain(GRACE_S)
    return load.told(used_s, is_half_of_most)


class _Load:
    """One steady load, while it lasts."""

    def __init__(self, line: Line, per_s: float, total: int) -> None:
        self._line = line
        self._per_s = per_s
        self._total = total
        self._run = line.new_run()
        self._clock = time.perf_counter  # the loop's own has only whole milliseconds
        self._began = self._clock()
        self._due_at: list[float] = []
        self._took_s: list[float] = []
        self._sent_by = self._began

    async def send(self, within_s: float) -> None:
        """Everything that is due goes out together, one batch under way."""
        woken_at = self._began
        while len(self._due_at) < self._total and self._clock() - self._began < within_s:
            first = len(self._due_at)
            due = min(self._total, int((self._clock() - self._began) * self._per_s) + 1, first + SENT_AT_ONCE)
            if due > first:
                # A timer that rings late is no fault of the broker; a send that takes long is.
                self._due_at += [max(self._began + one / self._per_s, woken_at) for one in range(first, due)]
                await self._line.send([self._line.record(self._run, one) for one in range(first, due)])
                self._sent_by = self._clock()
                woken_at = self._began
            else:
                await asyncio.sleep(self._began + first / self._per_s - self._clock())
                woken_at = self._clock()

    async def receive(self, within_s: float) -> None:
        """A handler that does nothing, until it has had everything."""
        deadline = self._began + within_s
        while len(self._took_s) < self._total and (left_s := deadline - self._clock()) > 0:
            deliveries = await self._line.subscription.receive(HANDLED_AT_ONCE, min(left_s, 0.5))
            now = self._clock()
            if not deliveries:
                continue
            self._line.waiting -= len(deliveries)
            places = [place_of(one.record) for one in deliveries]
            self._took_s += [now - self._due_at[number] for run, number in places if run == self._run]
            await self._line.subscription.settle([(one, Ack()) for one in deliveries])

    def told(self, cpu_s: float, is_half_of_most: bool) -> Latency:
        took_ms = sorted(one * 1000 for one in self._took_s) or [0.0]
        count = len(self._took_s)
        sending_s = max(self._sent_by - self._began, (self._total - 1) / self._per_s, 1e-9)
        reached = len(self._due_at) / max(sending_s, self._total / self._per_s)
        return Latency(
            asked_per_s=self._per_s, is_half_of_most=is_half_of_most, reached_per_s=reached, samples=count,
            p50_ms=percentile(took_ms, 50), max_ms=took_ms[-1],
            p99_ms=percentile(took_ms, 99) if count >= TELLS_P99 else None,
            p999_ms=percentile(took_ms, 99.9) if count >= TELLS_P999 else None,
            keeps_up=count == self._total and reached >= ON_TIME * self._per_s,
            cpu_us=cpu_s / count * 1e6 if count else 0.0,
        )  # fmt: skip


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that so many percent do not exceed; nearest rank."""
    place = min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100) - 1))
    return ordered[int(place)]
