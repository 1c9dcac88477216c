"""What a measurement needs: a binder with topics of its own, records that say where they belong, and their removal."""

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from kassa.errors import BrokerUnreachable, KassaError
from kassa.messaging.binder import Binder, Resources, Subscription
from kassa.messaging.model import Ack, Confirmed, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups

GROUP = "bench"
KEYS = 100
"""Different keys: as many payments under way."""
BODY_BYTES = 300
DEADLINE_S = 30.0
WARM_UP = 50
BODY = b'{"filling":"' + b"x" * (BODY_BYTES - 14) + b'"}'
HEADERS = {"content-type": "application/json"}
SINGLE, ENVELOPES, UNORDERED = "single", "envelopes", "unordered"
WAYS = (SINGLE, ENVELOPES, UNORDERED)
"""How records travel; see model.Throughput."""


class NotTaken(KassaError):
    """The broker did not take what was sent."""

    code = "bench.not_taken"


class Line:
    """A topic of its own with one subscription, which numbers what it sends."""

    def __init__(self, binder: Binder, topic: Topic, subscription: Subscription) -> None:
        self.binder = binder
        self.topic = topic
        self.subscription = subscription
        self.waiting = 0
        """Records that are sent and not received."""
        self._run = 0

    def new_run(self) -> int:
        """Records of another run are told apart by it."""
        self._run += 1
        return self._run

    def record(self, run: int, number: int) -> Record:
        key = str(number % KEYS) if self.topic.keyed else ""
        return Record(f"{self.topic.name}.{run}.{number}", key, BODY, HEADERS)

    async def send(self, records: Sequence[Record]) -> None:
        """Confirmed, all of them. Raises NotTaken with the broker's reason."""
        for receipt in await self.binder.send(self.topic.name, records, deadline_s=DEADLINE_S):
            if not isinstance(receipt, Confirmed):
                raise NotTaken(f"{self.binder.name} did not take a message: {receipt.reason}.")
        self.waiting += len(records)

    async def receive(self, limit: int, wait_s: float) -> list[Record]:
        """Received and acknowledged."""
        deliveries = await self.subscription.receive(limit, wait_s)
        if deliveries:
            await self.subscription.settle([(one, Ack()) for one in deliveries])
            self.waiting -= len(deliveries)
        return [one.record for one in deliveries]

    async def warm_up(self) -> None:
        """Connections, routes and plans are made by the first records."""
        run = self.new_run()
        await self.send([self.record(run, number) for number in range(WARM_UP)])
        await self.drain(DEADLINE_S)

    async def drain(self, within_s: float) -> None:
        """Receives what still waits."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + within_s
        while self.waiting > 0 and clock() < deadline:
            await self.receive(500, 0.5)


def place_of(record: Record) -> tuple[int, int]:
    """The run and the number of a record of a Line."""
    _, run, number = record.id.rsplit(".", 2)
    return int(run), int(number)


class Stage:
    """One broker, connected."""

    def __init__(self, url: str, pool: Any, wakeups: Wakeups) -> None:
        self.name = f"kassa-bench-{secrets.token_hex(4)}"
        """What its topics begin with."""
        self.topics = {way: self._topic(way) for way in (*WAYS, "pace", "kill")}
        self.binder = make_binder(url, Resources(pool, wakeups, tuple(self.topics.values())))
        self.made: list[Topic] = []
        self._subscriptions: list[Subscription] = []

    def _topic(self, way: str) -> Topic:
        return Topic(
            f"{self.name}-{way}", (GROUP,), "Made by kassa bench brokers.", keyed=way != UNORDERED,
            envelopes=way == ENVELOPES,
        )  # fmt: skip

    async def make(self, way: str) -> Topic:
        """A topic at the broker, which goes when the broker is left; may be repeated."""
        topic = self.topics[way]
        if topic not in self.made:
            self.made.append(topic)
            await self.binder.provision([topic])
        return topic

    async def line(self, way: str) -> Line:
        """A topic with its subscription, warmed up."""
        topic = await self.make(way)
        subscription = await self.binder.subscribe(topic.name, GROUP)
        self._subscriptions.append(subscription)
        line = Line(self.binder, topic, subscription)
        await line.warm_up()
        return line

    async def let_go(self, line: Line) -> None:
        """Its subscription ends; the topic stays until the broker is left."""
        self._subscriptions.remove(line.subscription)
        with suppress(BrokerUnreachable):
            await line.subscription.close(1.0)

    async def close(self) -> None:
        for subscription in self._subscriptions:
            with suppress(BrokerUnreachable):
                await subscription.close(0.5)
        await self.binder.close()


def batches(line: Line, run: int, batch: int) -> Iterator[list[Record]]:
    """For ever, each made when it is asked for."""
    first = 0
    while True:
        yield [line.record(run, number) for number in range(first, first + batch)]
        first += batch
