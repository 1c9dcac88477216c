"""The merchant's events: facts, for ever."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
from msgspec import Meta

from kassa.api.decode import BodyDecoder, read_query
from kassa.api.http import Request, Response
from kassa.api.idempotency import optional_once
from kassa.api.pages import read_event_cursor, write_cursor
from kassa.api.rest.fields import Listed, Nothing, Page
from kassa.api.route import Answer, Route
from kassa.errors import EventNotFound
from kassa.ids import Id
from kassa.merchants.model import Caller, Scope
from kassa.messaging.log import EARLIEST, LATEST, EventItem, EventLog, event_item
from kassa.messaging.model import LogRecord, Place
from kassa.notifications.render import DeliveryObject, delivery_object
from kassa.notifications.service import Webhooks

_encode = msgspec.json.Encoder().encode
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class EventFilters(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A list of events that can be narrowed."""

    type: Annotated[str, Meta(max_length=64, pattern=r"^[a-z_]+\.([a-z_]+|\*)$", examples=["payment.*"])] | None = None
    created_from: Annotated[datetime, Meta(tz=True, description="Not older")] | None = None
    created_to: Annotated[datetime, Meta(tz=True, description="Older than this")] | None = None


class Deliveries(msgspec.Struct, frozen=True):
    """What is sent again, one per endpoint that wants it."""

    data: list[DeliveryObject]


class EventRoutes:
    """The handlers."""

    def __init__(self, events: EventLog, webhooks: Webhooks) -> None:
        self._events = events
        self._webhooks = webhooks
        self._nothing = BodyDecoder(Nothing)

    async def page(self, request: Request, caller: Caller) -> Response:
        """A page of events, newest first."""
        query = read_query(request, EventFilters)
        home = caller.merchant.home
        found = await self._events.of_home(
            home,
            query.limit,
            before=_read_place(query.cursor, home),
            since=query.created_from or EARLIEST,
            until=query.created_to or LATEST,
            type_=query.type,
        )
        following = _write_place(found[-1]) if len(found) == query.limit else None
        return Response(200, _encode(Listed([event_item(record) for record in found], following)))

    async def redeliver(self, request: Request, caller: Caller) -> Response:
        """Sends one event again to every endpoint that wants it."""
        body = self._nothing.optional(request)
        once = optional_once(request, body)
        made = await self._webhooks.redeliver(caller.merchant.home, request.params["id"], once=once)
        return Response(202, _encode(Deliveries([delivery_object(delivery) for delivery in made])))

    def routes(self) -> list[Route]:
        """All routes of the noun."""
        return [
            Route("GET", "/v1/events", "What happened, newest first.", self.page,
                  {200: Answer(Listed[EventItem], "A page")}, Scope.READ | Scope.WEBHOOKS, query=EventFilters),
            Route("POST", "/v1/events/{id}/redeliver", "Send one event again to every endpoint that wants it.",
                  self.redeliver, {202: Answer(Deliveries, "What is sent again")}, Scope.WEBHOOKS, body=Nothing,
                  is_keyed=True, problems=(EventNotFound,), example={}),
        ]  # fmt: skip


def _write_place(record: LogRecord) -> str:
    return write_cursor((record.at - _EPOCH) // _MICROSECOND, *record.place)


def _read_place(cursor: str | None, home: int) -> LogRecord | None:
    """The event after which the page begins, as far as the log needs to know it."""
    place = read_event_cursor(cursor)
    if place is None:
        return None
    micros, writer, seq, ord = place
    return LogRecord(Place(writer, seq, ord), home, Id(""), 0, _EPOCH + micros * _MICROSECOND, "", b"")
