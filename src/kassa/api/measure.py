"""Brings numbers up to date that are not counted as they happen: how long queues are, what is stuck, what is in doubt."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import cast

import asyncpg
import structlog

from kassa.api.http import Handler, Router, Server
from kassa.api.rest import meta
from kassa.app import App
from kassa.db.away import AWAY
from kassa.db.queries import load

CHECK_S = 2.0
"""A database that does not answer in that time counts as away."""
LOOK_MAX_S = 3.0
"""Numbers that take longer are left out of the page: Prometheus waits ten seconds for it, brokers may take two of them."""
BROKER_S = 2.0
COST_MAX = 0.1
"""Of the time at most so much goes into looking: a queue of millions is counted less often, and the page has the last number."""

_SQL = load("kassa.db")

log = structlog.get_logger("kassa.api.measure")


class Measure:
    """Called before each page of /metrics."""

    def __init__(self, app: App, idle_workers: Callable[[], Sequence[str]]) -> None:
        self._app = app
        self._idle_workers = idle_workers
        self._looked_until = float("-inf")

    async def __call__(self) -> None:
        """What cannot be said now is left out: an old number is worse than none."""
        app, metrics = self._app, self._app.metrics
        metrics.journal_waiting(app.journal.queue_length)
        for broker in app.brokers:
            away_s = 0.0 if broker.away_since is None else max(time.monotonic() - broker.away_since, 0.001)
            metrics.broker_seen(broker.name, away_s)
        is_up = await self._is_database_up()
        if not is_up:
            metrics.forget_database()
            self._looked_until = float("-inf")
        elif time.monotonic() >= self._looked_until:
            await self._look()
        metrics.process_seen(
            database_up=is_up, workers_idle=len(self._idle_workers()) + len(app.idle),
            journal_writable=app.journal.is_writable,
        )  # fmt: skip

    async def _is_database_up(self) -> bool:
        try:
            async with asyncio.timeout(CHECK_S):
                await self._app.pool.fetchval("SELECT 1")
        except (*AWAY, asyncpg.PostgresError):
            return False
        return True

    async def _look(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(LOOK_MAX_S):
                await self._look_at_database()
        except (*AWAY, asyncpg.PostgresError) as error:
            log.warning("measure.failed", error=type(error).__name__)
            self._app.metrics.forget_database()
        ended = time.monotonic()
        self._looked_until = ended + (ended - began) * (1 / COST_MAX - 1)

    async def _look_at_database(self) -> None:
        app, metrics = self._app, self._app.metrics
        # Brokers that this process does not use are not connected to for a number; whoever uses them has it.
        queues = await app.queues.all(connect=False, broker_s=BROKER_S)
        metrics.forget_queues()
        for queue in queues:
            metrics.queue_seen(
                queue.topic, queue.group, length=queue.waiting, oldest_age_s=queue.oldest_s or 0.0, dead=queue.dead,
                in_flight=queue.in_flight, retrying=queue.retrying, delayed=queue.delayed, paused=queue.paused,
                is_read=queue.is_read,
            )  # fmt: skip
        for noun, count, oldest_s in await app.payments_store.doubts():
            metrics.doubts_seen(noun, count=count, oldest_s=oldest_s)
        stuck, overdue_s = await app.timers.health()
        metrics.timers_seen(stuck=stuck, overdue_s=overdue_s)
        metrics.transactions_seen(oldest_s=await app.pool.fetchval(_SQL.oldest_transaction))


def numbers_server(app: App, idle_workers: Callable[[], Sequence[str]], host: str, port: int) -> Server:
    """A server of /metrics and /healthz alone, for a process without the API; not yet started."""
    router = Router()
    for route in meta.numbers(app.metrics, Measure(app, idle_workers)):
        router.add(route.method, route.pattern, cast(Handler, route.handler))
    return Server(router, host, port)
