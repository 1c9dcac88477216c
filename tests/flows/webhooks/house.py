"""A shop with a real HTTP server, and everything that tells it things, on a real database."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
from aiohttp import web

from kassa.clock import SystemClock
from kassa.ids import Id, new_id
from kassa.journal.change import Aggregate, Change, Committed, Event, Rule
from kassa.journal.writer import PostgresJournal
from kassa.messaging.log import EventLog, LogGroup
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import TimerWork
from kassa.notifications.model import DISPATCH_GROUP
from kassa.notifications.sender import Sender
from kassa.notifications.service import Webhooks
from kassa.notifications.store import WebhookStore
from kassa.payments.records import WALLET, Wallet
from kassa.workers.events import read_for_ever
from kassa.workers.timers import TimerLoop
from kassa.workers.webhooks import Dispatcher, WebhookWorker

HOME = 7


async def until(claim: Callable[[], Awaitable[bool]], timeout_s: float = 60.0) -> None:
    """Returns once the claim is true."""
    async with asyncio.timeout(timeout_s):
        is_true = False
        while not is_true:
            await asyncio.sleep(0.01)
            is_true = await claim()


@dataclass
class Taken:
    """One request that the shop got."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        """The event in it."""
        read: dict[str, Any] = msgspec.json.decode(self.body)
        return read


@dataclass
class Shop:
    """A receiver of webhooks. `answer` decides what each request gets."""

    url: str = ""
    taken: list[Taken] = field(default_factory=list)
    answer: Callable[[Taken], Awaitable[web.StreamResponse]] | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Every request comes here."""
        taken = Taken({name.lower(): value for name, value in request.headers.items()}, await request.read())
        self.taken.append(taken)
        return web.Response(status=204) if self.answer is None else await self.answer(taken)

    async def wait(self, count: int, timeout_s: float = 60.0) -> list[Taken]:
        """Returns once `count` requests came."""

        async def came() -> bool:
            return len(self.taken) >= count

        await until(came, timeout_s)
        return self.taken


@dataclass
class Kassa:
    """The parts that webhooks need."""

    url: str
    pool: Any
    journal: PostgresJournal
    store: WebhookStore
    events: EventLog
    webhooks: Webhooks
    wakeups: Wakeups
    sender: Sender

    @asynccontextmanager
    async def running(self, *, dead_after: timedelta = timedelta(days=5), turn_s: float = 0.5) -> AsyncIterator[None]:
        """With the workers at work."""
        clock = SystemClock()
        work = TimerWork(self.pool)
        worker = WebhookWorker(
            self.journal, self.store, self.events, self.webhooks, self.sender, work, clock, dead_after=dead_after,
            turn_s=turn_s,
        )  # fmt: skip
        timers = TimerLoop(work, self.wakeups, worker.handlers)
        dispatcher = Dispatcher(self.journal, self.store, clock)
        loops = [
            asyncio.create_task(read_for_ever(LogGroup(self.pool, DISPATCH_GROUP), dispatcher.handle, self.wakeups)),
            asyncio.create_task(timers.run()),
            asyncio.create_task(self.wakeups.run()),
        ]
        try:
            yield
        finally:
            for loop in loops:
                loop.cancel()
            for loop in loops:
                with suppress(asyncio.CancelledError):
                    await loop

    async def open_wallet(self, home: int = HOME) -> Id:
        """A wallet, with its first event."""
        id = new_id()
        wallet = Wallet(
            home=home, id=id, version=0, sequence=0, state="open", user=f"u-{id}", currency="CNY",
            created_at=SystemClock().now(),
        )  # fmt: skip
        change = Change(home=home, new=(wallet,), root=id, events=(_event("wallet.created", id, 1),))
        assert isinstance(await self.journal.commit(change), Committed)
        return id

    async def happen(self, wallet: Id, type_: str, number: int, home: int = HOME) -> None:
        """One more event of a wallet."""

        def decide(aggregate: Aggregate, now: Any) -> Change:
            return Change(home=home, events=(_event(type_, wallet, number),))

        verdict = await self.journal.commit(Change(home=home, rule=Rule(WALLET, wallet, decide)))
        assert isinstance(verdict, Committed)

    async def soon(self, id: Id, kind: str = "webhook") -> None:
        """Moves a timer to now, as if the time had passed."""
        await self.pool.execute("UPDATE timer SET due = clock_timestamp() WHERE entity = $1 AND kind = $2", id, kind)
        self.wakeups.touch("timers")


def _event(type_: str, wallet: Id, number: int) -> Event:
    data = {"id": f"wal_{wallet}", "object": "wallet", "number": number}
    return Event(type_, msgspec.json.encode(data))
