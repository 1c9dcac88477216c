"""Where the merchant wants to be told: endpoints, their deliveries, and having them again."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kassa.api.decode import BodyDecoder, read_query
from kassa.api.http import Request, Response
from kassa.api.idempotency import REPLAYED, optional_once
from kassa.api.pages import read_id_cursor, write_cursor
from kassa.api.rest.fields import Listed, Nothing, Page, State, Url
from kassa.api.route import Answer, Route
from kassa.errors import WebhookEndpointNotFound
from kassa.ids import Id, read_id
from kassa.merchants.model import Caller, Scope
from kassa.notifications.render import (
    DeliveryObject,
    EndpointObject,
    ReplayObject,
    delivery_object,
    endpoint_object,
    replay_object,
)
from kassa.notifications.service import FILTERS_MAX, Webhooks

_encode = msgspec.json.Encoder().encode

EventTypes = Annotated[
    list[Annotated[str, Meta(max_length=64, pattern=r"^(\*|[a-z_]+\.([a-z_]+|\*))$", examples=["payment.*"])]],
    Meta(min_length=1, max_length=FILTERS_MAX),
]
Text = Annotated[str, Meta(max_length=200)]


class CreateEndpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new endpoint. Its secret is in the answer, once."""

    url: Url
    events: EventTypes
    description: Text = ""


class PatchEndpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to change; the rest stays."""

    url: Url | UnsetType = UNSET
    events: EventTypes | UnsetType = UNSET
    description: Text | UnsetType = UNSET
    state: Literal["enabled", "disabled"] | UnsetType = UNSET


class ReplayRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The time whose events are sent again."""

    created_from: Annotated[datetime, Meta(tz=True)]
    created_to: Annotated[datetime, Meta(tz=True)]


class EndpointPage(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which page."""


class DeliveryFilters(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A list of deliveries that can be narrowed."""

    state: State | None = None


class WebhookRoutes:
    """The handlers."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks
        self._create = BodyDecoder(CreateEndpoint)
        self._patch = BodyDecoder(PatchEndpoint)
        self._replay = BodyDecoder(ReplayRange)
        self._nothing = BodyDecoder(Nothing)

    async def create(self, request: Request, caller: Caller) -> Response:
        """A new endpoint."""
        body = self._create(request)
        shown = await self._webhooks.create(
            caller.merchant.home, body.url, body.events, body.description, once=optional_once(request, body)
        )
        answer = _encode(endpoint_object(shown.endpoint, shown.secret))
        return Response(201, answer, REPLAYED if shown.is_repeat else ())

    async def page(self, request: Request, caller: Caller) -> Response:
        """A page of endpoints, newest first."""
        query = read_query(request, EndpointPage)
        found = await self._webhooks.page(caller.merchant.home, query.limit, read_id_cursor(query.cursor))
        following = write_cursor(found[-1].id) if len(found) == query.limit else None
        return Response(200, _encode(Listed([endpoint_object(endpoint) for endpoint in found], following)))

    async def get(self, request: Request, caller: Caller) -> Response:
        """One endpoint."""
        return Response(200, _encode(endpoint_object(await self._webhooks.get(caller.merchant.home, _name(request)))))

    async def patch(self, request: Request, caller: Caller) -> Response:
        """Changes what is given."""
        body = self._patch(request)
        endpoint = await self._webhooks.patch(
            caller.merchant.home,
            _name(request),
            url=None if body.url is UNSET else body.url,
            events=None if body.events is UNSET else body.events,
            description=None if body.description is UNSET else body.description,
            state=None if body.state is UNSET else body.state,
        )
        return Response(200, _encode(endpoint_object(endpoint)))

    async def delete(self, request: Request, caller: Caller) -> Response:
        """Nothing more is sent there."""
        await self._webhooks.delete(caller.merchant.home, _name(request))
        return Response(204)

    async def rotate(self, request: Request, caller: Caller) -> Response:
        """A fresh secret; the old one signs as well for a day."""
        body = self._nothing.optional(request)
        shown = await self._webhooks.rotate_secret(
            caller.merchant.home, _name(request), once=optional_once(request, body)
        )
        answer = _encode(endpoint_object(shown.endpoint, shown.secret))
        return Response(200, answer, REPLAYED if shown.is_repeat else ())

    async def deliveries(self, request: Request, caller: Caller) -> Response:
        """A page of an endpoint's deliveries, newest first."""
        query = read_query(request, DeliveryFilters)
        found = await self._webhooks.deliveries(
            caller.merchant.home,
            _name(request),
            query.limit,
            before=read_id_cursor(query.cursor),
            state=query.state,
        )
        following = write_cursor(found[-1].id) if len(found) == query.limit else None
        return Response(200, _encode(Listed([delivery_object(delivery) for delivery in found], following)))

    async def replay(self, request: Request, caller: Caller) -> Response:
        """Sends all events of a time again."""
        body = self._replay(request)
        replay = await self._webhooks.replay(
            caller.merchant.home,
            _name(request),
            body.created_from,
            body.created_to,
            once=optional_once(request, body),
        )
        return Response(202, _encode(replay_object(replay)))

    def routes(self) -> list[Route]:
        """All routes of the noun."""
        path, missing = "/v1/webhook_endpoints", (WebhookEndpointNotFound,)
        reading = Scope.READ | Scope.WEBHOOKS
        example = {"url": "https://shop.example/hooks", "events": ["payment.*", "refund.*"]}
        return [
            Route("POST", path, "Be told of events.", self.create,
                  {201: Answer(EndpointObject, "Made; the secret is shown here, once")}, Scope.WEBHOOKS,
                  # A repeat whose endpoint was deleted since finds nothing to show.
                  body=CreateEndpoint, is_keyed=True, problems=missing, example=example),
            Route("GET", path, "The endpoints, newest first.", self.page,
                  {200: Answer(Listed[EndpointObject], "A page")}, reading, query=EndpointPage),
            Route("GET", path + "/{id}", "One endpoint.", self.get, {200: Answer(EndpointObject, "The endpoint")},
                  reading, problems=missing),
            Route("PATCH", path + "/{id}", "Change an endpoint.", self.patch,
                  {200: Answer(EndpointObject, "As it is now")}, Scope.WEBHOOKS, body=PatchEndpoint,
                  problems=missing, example={"state": "disabled"}),
            Route("DELETE", path + "/{id}", "Be told no more.", self.delete, {204: Answer(None, "Gone")},
                  Scope.WEBHOOKS, problems=missing),
            Route("GET", path + "/{id}/deliveries", "What was sent there, newest first.", self.deliveries,
                  {200: Answer(Listed[DeliveryObject], "A page")}, reading, query=DeliveryFilters, problems=missing),
            Route("POST", path + "/{id}/rotate_secret", "A fresh secret; both sign for a day.", self.rotate,
                  {200: Answer(EndpointObject, "With the fresh secret, shown once")}, Scope.WEBHOOKS, body=Nothing,
                  is_keyed=True, problems=missing, example={}),
            Route("POST", path + "/{id}/replay", "Send all events of a time again.", self.replay,
                  {202: Answer(ReplayObject, "It goes on in the background")}, Scope.WEBHOOKS, body=ReplayRange,
                  is_keyed=True, problems=missing,
                  example={"created_from": "2026-01-01T00:00:00Z", "created_to": "2026-01-02T00:00:00Z"}),
        ]  # fmt: skip


def _name(request: Request) -> Id:
    inner = read_id("whe_", request.params["id"])
    if inner is None:
        raise WebhookEndpointNotFound
    return inner
