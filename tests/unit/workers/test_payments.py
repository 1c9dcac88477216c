"""Which timers of payments are acted on: a slow channel or merchant has its share, and no more."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

from kassa.ids import Id, new_id
from kassa.messaging.work import FiredTimer
from kassa.workers.payments import PER_ACCOUNT_MAX, PER_CHANNEL_MAX, PaymentWorker

NOW = datetime(2026, 8, 1, tzinfo=UTC)


class Timers:
    """Timers that are all due, in the order in which they were set."""

    def __init__(self) -> None:
        self.due: list[FiredTimer] = []
        self.postponed: list[FiredTimer] = []

    def set(self, home: int, kind: str = "attempt", count: int = 1) -> list[Id]:
        made = [FiredTimer(home, new_id(), new_id(), kind, 1, 0, NOW) for _ in range(count)]
        self.due += made
        return [one.entity for one in made]

    async def claim_timers(self, kinds: Sequence[str], limit: int) -> list[FiredTimer]:
        taken, self.due = self.due[:limit], self.due[limit:]
        return taken

    async def retry_timer(self, fired: FiredTimer, delay_s: float | None = None, error: str | None = None) -> None:
        raise AssertionError(error)

    async def postpone_timers(self, fired: Sequence[FiredTimer], delay_s: float) -> None:
        self.postponed += fired


class Provider:
    """Channels by attempt; those that are slow never answer."""

    def __init__(self, *slow: str) -> None:
        self.slow = slow
        self.channels: dict[Id, str] = {}
        self.asked: list[tuple[int, Id]] = []
        self.answered: list[Id] = []

    async def fire(self, kind: str, home: int, root: Id, entity: Id) -> None:
        self.asked.append((home, entity))
        if self.channels.get(entity) in self.slow:
            await asyncio.Future()
        self.answered.append(entity)

    async def rearm(self, home: int, payment_id: Id) -> None:
        raise AssertionError(payment_id)

    async def channels_of(self, subjects: Sequence[tuple[int, Id]]) -> dict[Id, str]:
        return {entity: self.channels[entity] for _, entity in subjects if entity in self.channels}

    async def wait(self, timeout_s: float = 0.0) -> None:
        await asyncio.sleep(0)


async def at_work(timers: Timers, provider: Provider) -> asyncio.Task[None]:
    """The worker, once it has looked at everything that was due."""
    worker = asyncio.create_task(PaymentWorker(timers, provider, provider, provider).run())
    for _ in range(50):
        await asyncio.sleep(0)
    assert not timers.due
    return worker


async def stopped(worker: "asyncio.Task[None]") -> None:
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def test_a_channel_that_hangs_does_not_hold_up_another_one() -> None:
    timers, provider = Timers(), Provider("wechat")
    for home in range(1, 100):
        provider.channels |= dict.fromkeys(timers.set(home, count=5), "wechat")
    others = timers.set(1, count=3)
    provider.channels |= dict.fromkeys(others, "alipay")

    worker = await at_work(timers, provider)

    assert set(provider.answered) == set(others)
    assert len(provider.asked) == PER_CHANNEL_MAX + len(others)
    await stopped(worker)


async def test_a_merchant_whose_calls_hang_does_not_hold_up_another_one_of_the_channel() -> None:
    timers, provider = Timers(), Provider("slow")
    provider.channels |= dict.fromkeys(timers.set(1, count=500), "slow")
    late = timers.set(2, count=1)
    provider.channels |= dict.fromkeys(late, "slow")

    worker = await at_work(timers, provider)

    assert sum(home == 1 for home, _ in provider.asked) == PER_ACCOUNT_MAX
    assert (2, late[0]) in provider.asked
    assert len(timers.postponed) == 500 - PER_ACCOUNT_MAX
    await stopped(worker)


async def test_what_asks_no_channel_is_never_held_up() -> None:
    timers, provider = Timers(), Provider("wechat")
    provider.channels |= dict.fromkeys(timers.set(1, count=200), "wechat")
    expiring = timers.set(1, kind="payment_expire", count=200)

    worker = await at_work(timers, provider)

    assert set(provider.answered) == set(expiring)
    await stopped(worker)


async def test_a_place_that_came_free_is_given_to_the_next() -> None:
    timers, provider = Timers(), Provider()
    first = timers.set(1, count=PER_ACCOUNT_MAX)
    provider.channels |= dict.fromkeys(first, "wechat")
    worker = await at_work(timers, provider)
    second = timers.set(1, count=PER_ACCOUNT_MAX)
    provider.channels |= dict.fromkeys(second, "wechat")
    for _ in range(50):
        await asyncio.sleep(0)

    assert provider.answered == first + second
    assert not timers.postponed
    await stopped(worker)
