"""The rows of webhook endpoints, deliveries and replays. Shapes only."""

from datetime import datetime

from kassa.ids import Id
from kassa.journal.table import Root, Table


class WebhookEndpoint(Root, frozen=True, gc=False):
    """Where a merchant wants to be told. States: enabled, disabled (by the merchant), paused (dead for too long),
    deleted."""

    created_at: datetime
    # From here on: what moves.
    url: str
    events: str
    """Space-separated event types; `*` stands for all, `payment.*` for a noun."""
    secrets: bytes
    """JSON list of {secret, until}, encrypted; several while a secret rotates."""
    description: str
    replays: int = 0
    """How many redeliveries and replays there were; each has a number."""
    failing_since: datetime | None = None
    paused_reason: str | None = None


class WebhookDelivery(Root, frozen=True, gc=False):
    """One event for one endpoint. States: due, delivered, exhausted, dropped (the endpoint was not enabled when it
    was due)."""

    endpoint: Id
    event: str
    """The event's id, `evt_…`."""
    event_type: str
    event_root: Id
    event_sequence: int
    replay: int
    """0 for the first delivery of the event to the endpoint, then the endpoint's number of the redelivery or replay."""
    created_at: datetime
    # From here on: what moves.
    tries: int = 0
    next_at: datetime | None = None
    last_at: datetime | None = None
    last_status: int | None = None
    last_error: str | None = None
    last_duration_ms: int | None = None


class WebhookReplay(Root, frozen=True, gc=False):
    """All events of a time, again, for one endpoint. States: running, done."""

    endpoint: Id
    replay: int
    created_from: datetime
    created_to: datetime
    created_at: datetime
    # From here on: what moves.
    position: str = ""
    """The last event that has its delivery, `evt_…`."""
    deliveries: int = 0


WEBHOOK_ENDPOINT = Table(
    20, "webhook_endpoint", WebhookEndpoint,
    mutable=("url", "events", "secrets", "description", "replays", "failing_since", "paused_reason"),
)  # fmt: skip
WEBHOOK_DELIVERY = Table(
    21, "webhook_delivery", WebhookDelivery,
    mutable=("tries", "next_at", "last_at", "last_status", "last_error", "last_duration_ms"),
)  # fmt: skip
WEBHOOK_REPLAY = Table(22, "webhook_replay", WebhookReplay, mutable=("position", "deliveries"))
