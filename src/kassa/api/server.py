"""The API of an App: its routes, its document, its server."""

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

import asyncpg
import msgspec

from kassa.api import asyncapi, openapi
from kassa.api.answers import Answers
from kassa.api.http import Limits, Request, Router, Server
from kassa.api.limits import Fairness
from kassa.api.measure import Measure
from kassa.api.rest import balances, callbacks, meta
from kassa.api.rest.events import EventRoutes
from kassa.api.rest.meta import Check
from kassa.api.rest.payments import PaymentRoutes
from kassa.api.rest.queues import QueueRoutes
from kassa.api.rest.refunds import RefundRoutes
from kassa.api.rest.wallets import WalletRoutes
from kassa.api.rest.webhook_endpoints import WebhookRoutes
from kassa.api.route import Guard, Route
from kassa.app import App
from kassa.db.away import AWAY
from kassa.db.migrate import require_current
from kassa.errors import KassaError
from kassa.journal.change import SYSTEM_HOME, Change
from kassa.journal.replies import FirstStatuses
from kassa.messaging.activity import Follower
from kassa.messaging.broker_names import read_brokers
from kassa.supervisor import Supervisor

CHECK_S = 2.0
"""A database that does not answer in that time is not one that can take a payment."""
CLOCK_OFF_MAX_S = 60
"""Providers allow signatures five minutes, so a minute is wrong and not yet harmful."""

LOOK_S = 0.02

RAW: dict[str, Any] = {
    "next_action": {
        "anyOf": [
            {"type": "null"},
            {
                "type": "object",
                "properties": {"type": {"enum": ["qr_code", "redirect", "jsapi", "app"]}},
                "required": ["type"],
                "examples": [{"type": "qr_code", "code_url": "weixin://wxpay/bizpayurl?pr=1"}],
            },
        ]
    },
    "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
    "data": {"type": "object", "description": "The object as it was then"},
}
"""What the fields are that travel as ready-made JSON."""


class Api:
    """The API. Made of an App that has started."""

    def __init__(self, app: App, *, idle_workers: Callable[[], Sequence[str]] = tuple) -> None:
        """idle_workers: the names of loops of this process that should run and do not."""
        self._app = app
        self._idle_workers = idle_workers
        self._follower = Follower(app.pool)
        self._background = Supervisor({"flows": self._follower.run})
        self.routes = self._routes()
        self.document = openapi.document(self.routes, version=version("kassa"), raw=RAW)
        self.messages = asyncapi.document(
            read_brokers(app.settings.brokers),
            version=version("kassa"),
            raw=RAW,
            orders=app.settings.order_queue or "durable",
        )
        fairness = Fairness(
            per_second=app.settings.key_requests_per_s_max, in_flight_max=app.settings.merchant_requests_max
        )
        guard, router = Guard(app.directory, fairness), Router()
        documents = meta.documentation(msgspec.json.encode(self.document), msgspec.json.encode(self.messages))
        for route in (*self.routes, *documents):
            router.add(route.method, route.pattern, guard.handler(route))
        settings = app.settings
        self.server = Server(
            router,
            settings.host,
            settings.port,
            limits=Limits(body_bytes_max=settings.body_bytes_max, connections_max=settings.connections_max),
            observer=self._observe,
        )

    def _routes(self) -> list[Route]:
        app = self._app
        answers = Answers(
            app.journal,
            FirstStatuses(app.pool),
            channel_wait_s=app.settings.channel_wait_s,
            repeat_wait_s=app.settings.idempotency_wait_s,
        )
        return [
            *PaymentRoutes(app.journal, app.payments, app.payments_store, app.timeline, answers, app.clock).routes(),
            *RefundRoutes(app.payments, app.payments_store, answers).routes(),
            *WalletRoutes(app.journal, app.payments, app.payments_store, app.ledger).routes(),
            *EventRoutes(app.events, app.webhooks).routes(),
            *WebhookRoutes(app.webhooks).routes(),
            *balances.routes(app.ledger, app.payments_store),
            *callbacks.routes(app.payments, app.directory),
            *QueueRoutes(app.queues, self._follower.flows).routes(),
            *meta.routes(self.checks, app.metrics, Measure(app, self._idle_workers)),
        ]

    @property
    def url(self) -> str:
        """Where it listens."""
        host = self._app.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server.port}"

    async def start(self) -> None:
        """Listens. Raises OSError when the address is taken."""
        await self.server.start()
        self._background.start()

    async def stop(self) -> None:
        """Takes nothing new, and lets what is running finish."""
        await self.server.stop(self._app.settings.stop_grace_s)
        await self._background.stop()

    async def checks(self) -> list[Check]:
        """What must be so before a payment can be taken."""
        return [
            *await self._check_database(), await self._check_journal(), self._check_workers(), *self._check_brokers()
        ]  # fmt: skip

    async def _check_database(self) -> list[Check]:
        try:
            async with self._app.pool.acquire(timeout=CHECK_S) as connection:
                theirs = await connection.fetchval("SELECT clock_timestamp()", timeout=CHECK_S)
                await require_current(connection)
        except KassaError as error:
            return [Check("database", False, error.detail)]
        except (*AWAY, asyncpg.PostgresError) as error:
            return [Check("database", False, f"It cannot be reached ({type(error).__name__}).")]
        return [
            Check("database", True, "It answers, and its migrations are those of this program."),
            self._check_clock(theirs),
        ]

    def _check_clock(self, theirs: datetime) -> Check:
        """A process whose clock is wrong signs requests that providers refuse, and refuses what they say."""
        off_s = round((self._app.clock.now() - theirs).total_seconds())
        if abs(off_s) > CLOCK_OFF_MAX_S:
            return Check("clock", False, f"The clock here and the database's are {abs(off_s)} seconds apart.")
        return Check("clock", True, "The clock here and the database's agree.")

    async def _check_journal(self) -> Check:
        journal, most = self._app.journal, self._app.settings.journal_queue_max
        if not await journal.finds_room():
            return Check("journal", False, "The database has no room left on its disk.")
        if not journal.is_writable and not await self._journal_recovers():
            return Check("journal", False, "Its last try to reach the database failed.")
        waiting = journal.queue_length
        if waiting >= most:
            return Check("journal", False, f"{waiting} changes wait, and no more are taken.")
        if waiting and not await self._journal_moves():
            return Check("journal", False, f"{waiting} changes wait, and none was written within {CHECK_S:g} s.")
        return Check("journal", True, f"{waiting} changes wait.")

    async def _journal_moves(self) -> bool:
        """Whether a batch is committed, or nothing waits any more, within a while."""
        before, deadline = self._app.metrics.batches, time.monotonic() + CHECK_S
        while self._app.journal.queue_length and self._app.metrics.batches == before:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def _journal_recovers(self) -> bool:
        """A change with nothing in it makes the journal look for the database; without it, it would wait for a request
        that nobody sends to a process which is not ready."""
        try:
            async with asyncio.timeout(CHECK_S):
                await self._app.journal.commit(Change(home=SYSTEM_HOME))
        except (KassaError, TimeoutError):
            return False
        return True

    def _check_workers(self) -> Check:
        idle = [*self._idle_workers(), *self._app.idle]
        if idle:
            return Check("workers", False, f"Not running: {', '.join(idle)}.")
        return Check("workers", True, "All that belong to this process run.")

    def _check_brokers(self) -> list[Check]:
        """As far as the workers of this process know. A broker that is away is told, and holds up no payment."""
        checks: list[Check] = []
        for broker in self._app.brokers:
            if broker.away_since is None:
                checks.append(
                    Check(f"broker {broker.name}", True, "Nothing is wrong as far as is known.", required=False)
                )
            else:
                away_s = round(time.monotonic() - broker.away_since)
                says = f"It has been away for {away_s} s; what is for it waits in the database."
                checks.append(Check(f"broker {broker.name}", False, says, required=False))
        return checks

    def _observe(self, request: Request, status: int, seconds: float) -> None:
        self._app.metrics.http_answered(request.route, request.method, status, seconds)
