"""Webhook endpoints, deliveries and replays as the API shows them. Pure."""

import msgspec

from kassa.clock import rfc3339
from kassa.notifications.records import WebhookDelivery, WebhookEndpoint, WebhookReplay


class EndpointObject(msgspec.Struct, frozen=True, omit_defaults=False):
    """`webhook_endpoint` of the API."""

    id: str
    object: str
    url: str
    events: list[str]
    description: str
    state: str
    created_at: str
    failing_since: str | None
    paused_reason: str | None
    secret: str | msgspec.UnsetType = msgspec.UNSET
    """Only in the answers that make it."""


class DeliveryObject(msgspec.Struct, frozen=True):
    """`webhook_delivery` of the API."""

    id: str
    object: str
    endpoint: str
    event: str
    type: str
    state: str
    replay: int
    tries: int
    created_at: str
    next_at: str | None
    last_at: str | None
    last_status: int | None
    last_error: str | None
    last_duration_ms: int | None


class ReplayObject(msgspec.Struct, frozen=True):
    """`webhook_replay` of the API."""

    id: str
    object: str
    endpoint: str
    state: str
    created_from: str
    created_to: str
    created_at: str
    deliveries: int


def endpoint_object(endpoint: WebhookEndpoint, secret: str | None = None) -> EndpointObject:
    """An endpoint; with its secret where it may be seen."""
    return EndpointObject(
        id=f"whe_{endpoint.id}", object="webhook_endpoint", url=endpoint.url, events=endpoint.events.split(),
        description=endpoint.description, state=endpoint.state, created_at=rfc3339(endpoint.created_at),
        failing_since=rfc3339(endpoint.failing_since) if endpoint.failing_since else None,
        paused_reason=endpoint.paused_reason, secret=msgspec.UNSET if secret is None else secret,
    )  # fmt: skip


def delivery_object(delivery: WebhookDelivery) -> DeliveryObject:
    """A delivery with its last answer."""
    return DeliveryObject(
        id=f"whd_{delivery.id}", object="webhook_delivery", endpoint=f"whe_{delivery.endpoint}", event=delivery.event,
        type=delivery.event_type, state=delivery.state, replay=delivery.replay, tries=delivery.tries,
        created_at=rfc3339(delivery.created_at),
        next_at=rfc3339(delivery.next_at) if delivery.next_at else None,
        last_at=rfc3339(delivery.last_at) if delivery.last_at else None,
        last_status=delivery.last_status, last_error=delivery.last_error, last_duration_ms=delivery.last_duration_ms,
    )  # fmt: skip


def replay_object(replay: WebhookReplay) -> ReplayObject:
    """A replay and how far it has come."""
    return ReplayObject(
        id=f"whr_{replay.id}", object="webhook_replay", endpoint=f"whe_{replay.endpoint}", state=replay.state,
        created_from=rfc3339(replay.created_from), created_to=rfc3339(replay.created_to),
        created_at=rfc3339(replay.created_at), deliveries=replay.deliveries,
    )  # fmt: skip
