"""Reads webhook endpoints, deliveries and replays."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple, cast

import asyncpg

from kassa.db.queries import load
from kassa.ids import Id
from kassa.notifications.records import (
    WEBHOOK_DELIVERY,
    WEBHOOK_ENDPOINT,
    WEBHOOK_REPLAY,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookReplay,
)

_SQL = load("kassa.notifications")
LAST_ID = Id("f" * 32)
LATEST = datetime(9999, 1, 1, tzinfo=UTC)


class Neighbours(NamedTuple):
    """Deliveries of the same object to the same endpoint that are still due."""

    before_s: float | None
    """Seconds until the earlier one is tried next; None: there is none before this."""
    behind: Id | None
    """The one that waits behind this."""


class WebhookStore:
    """Webhooks in PostgreSQL."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def endpoint(self, home: int, id: Id) -> WebhookEndpoint | None:
        """One endpoint of a home, deleted ones too."""
        row = await self._pool.fetchrow(_SQL.endpoint, home, id)
        return None if row is None else cast(WebhookEndpoint, WEBHOOK_ENDPOINT.read(tuple(row)))

    async def endpoints(self, home: int, limit: int, before: Id | None = None) -> list[WebhookEndpoint]:
        """A page of a home's endpoints, newest first."""
        rows = await self._pool.fetch(_SQL.endpoints, home, before or LAST_ID, limit)
        return [cast(WebhookEndpoint, WEBHOOK_ENDPOINT.read(tuple(row))) for row in rows]

    async def enabled(self, homes: Sequence[int]) -> dict[int, list[WebhookEndpoint]]:
        """Who is to be told in these homes."""
        found: dict[int, list[WebhookEndpoint]] = {}
        for row in await self._pool.fetch(_SQL.enabled_endpoints, homes):
            found.setdefault(row["home"], []).append(cast(WebhookEndpoint, WEBHOOK_ENDPOINT.read(tuple(row))))
        return found

    async def is_any_enabled(self, homes: Sequence[int]) -> bool:
        """Whether anybody is to be told in any of these homes."""
        return bool(await self._pool.fetchval(_SQL.is_any_enabled, homes))

    async def delivery(self, home: int, id: Id) -> WebhookDelivery | None:
        """One delivery of a home."""
        row = await self._pool.fetchrow(_SQL.delivery, home, id)
        return None if row is None else cast(WebhookDelivery, WEBHOOK_DELIVERY.read(tuple(row)))

    async def deliveries(
        self, home: int, endpoint: Id, limit: int, *, before: WebhookDelivery | None = None, state: str | None = None
    ) -> list[WebhookDelivery]:
        """A page of an endpoint's deliveries, newest first."""
        at, id = (before.created_at, before.id) if before else (LATEST, LAST_ID)
        rows = await self._pool.fetch(_SQL.deliveries, home, endpoint, at, id, state, limit)
        return [cast(WebhookDelivery, WEBHOOK_DELIVERY.read(tuple(row))) for row in rows]

    async def of_root(self, home: int, root: Id, limit: int = 1000) -> list[WebhookDelivery]:
        """All deliveries of one object's events, for its story."""
        rows = await self._pool.fetch(_SQL.deliveries_of_event, home, root, limit)
        return [cast(WebhookDelivery, WEBHOOK_DELIVERY.read(tuple(row))) for row in rows]

    async def neighbours(self, one: WebhookDelivery) -> Neighbours:
        """What stands before and behind a delivery."""
        (row,) = await self._pool.fetch(
            _SQL.before_and_behind, one.home, one.endpoint, one.event_root, one.replay, one.event_sequence
        )
        before_s = (row["before_s"] or 0.0) if row["before"] else None
        return Neighbours(before_s, None if row["behind"] is None else Id(row["behind"].hex))

    async def replay(self, home: int, id: Id) -> WebhookReplay | None:
        """One replay of a home."""
        row = await self._pool.fetchrow(_SQL.replay, home, id)
        return None if row is None else cast(WebhookReplay, WEBHOOK_REPLAY.read(tuple(row)))
