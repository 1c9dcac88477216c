"""A binder whose records are counted where they really pass: at the port, once per batch, alike for every broker.

Relays, consumers, the queue door and the library all go through it, so none of them counts for itself.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from kassa.messaging.binder import Binder, Subscription
from kassa.messaging.model import (
    Ack,
    Confirmed,
    Dead,
    Delivery,
    Depth,
    Failed,
    Receipt,
    Record,
    RetryAfter,
    Settlement,
    Unknown,
)
from kassa.messaging.topology import Topic
from kassa.observability.meters import Meters, Passage, Sending

REPLIES = "replies"
"""Answers go to addresses that others name, which are without number: counted together under this topic."""


class MeteredBinder:
    """A binder, counted."""

    def __init__(self, inner: Binder, meters: Meters) -> None:
        self.inner = inner
        self.name = inner.name
        self.traits = inner.traits
        self._meters = meters

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool = False) -> list[str]:
        return await self.inner.provision(topics, verify_only=verify_only)

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        receipts = await self.inner.send(topic, records, deadline_s=deadline_s)
        _count_receipts(self._meters.sending(topic), receipts)
        return receipts

    async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        receipts = await self.inner.reply(address, records, deadline_s=deadline_s)
        _count_receipts(self._meters.sending(REPLIES), receipts)
        return receipts

    async def subscribe(self, topic: str, group: str) -> Subscription:
        subscription = await self.inner.subscribe(topic, group)
        return MeteredSubscription(subscription, self._meters.passage(topic, group))

    async def pause(self, topic: str, group: str) -> None:
        await self.inner.pause(topic, group)

    async def resume(self, topic: str, group: str) -> None:
        await self.inner.resume(topic, group)

    async def depth(self, topic: str, group: str) -> Depth:
        return await self.inner.depth(topic, group)


class MeteredSubscription:
    """A subscription, counted."""

    def __init__(self, inner: Subscription, passage: Passage) -> None:
        self._inner = inner
        self._passage = passage

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        deliveries = await self._inner.receive(limit, wait_s)
        self._passage.received += len(deliveries)
        return deliveries

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        answers = await self._inner.settle(settled)
        _count_ends(self._passage, settled, answers)
        return answers

    async def close(self, drain_s: float) -> None:
        await self._inner.close(drain_s)


def _count_receipts(sending: Sending, receipts: Sequence[Receipt]) -> None:
    kinds = Counter(map(type, receipts))
    sending.confirmed += kinds[Confirmed]
    sending.failed += kinds[Failed]
    sending.unknown += kinds[Unknown]


def _count_ends(passage: Passage, settled: Sequence[tuple[Delivery, Settlement]], answers: Sequence[bool]) -> None:
    """What was not settled comes again, and is counted then. Where the effect's own commit settles, that has been done before."""
    if all(answers) and all([isinstance(end, Ack) for _, end in settled]):
        passage.took_since([delivery.sent_at for delivery, _ in settled], datetime.now(UTC))
        return
    handled: list[datetime | None] = []
    for (delivery, end), is_settled in zip(settled, answers, strict=True):
        if not is_settled and not (delivery.done and isinstance(end, Ack)):
            continue
        match end:
            case Ack():
                handled.append(delivery.sent_at)
            case RetryAfter(counts=True):
                passage.retried += 1
            case RetryAfter():
                passage.put_off += 1
            case Dead():
                passage.dead += 1
    if handled:
        passage.took_since(handled, datetime.now(UTC))
