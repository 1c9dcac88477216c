"""What may be decided about webhook endpoints and deliveries. Pure: rows in, a Change or a refusal out.

Order is kept per object: a later event of the same root waits, at one endpoint, until the earlier one is delivered
or given up (docs: a merchant never sees `payment.succeeded` before `payment.processing`).
"""

import base64
import hashlib
import hmac
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from kassa.errors import Busy, KassaError, WebhookEndpointNotFound
from kassa.ids import Id
from kassa.journal.change import Aggregate, Change, Event, InboxDone, Move, Timer, TimerDone
from kassa.messaging.model import LogRecord
from kassa.notifications.records import WebhookDelivery, WebhookEndpoint, WebhookReplay
from kassa.notifications.render import endpoint_object

DISPATCH_GROUP = "webhooks"
"""Reader of the event log, and inbox of what was dispatched."""
DELIVERY_TIMER, REPLAY_TIMER = "webhook", "webhook_replay"

TRIES_AT_S = (0, 5, 60, 300, 900, 3600, 10800, 21600, 43200, 86400)
"""Seconds after the first try. INTERFACES §2; the last one a day later."""
OVERLAP = timedelta(hours=24)
"""How long a secret that was rotated away still signs."""
SECRETS_MAX = 4
"""Signatures in one header; rotating more often within a day drops the oldest."""
DEAD_AFTER = timedelta(days=5)
"""An endpoint that took nothing for so long is paused."""
REPLAY_PAGE = 100
PREFIX = "whsec_"


class Secret(msgspec.Struct, frozen=True, gc=False):
    """What deliveries are signed with. until: None for the current one."""

    secret: str
    until: datetime | None = None


class Answer(NamedTuple):
    """What became of one try."""

    status: int | None
    """None: no HTTP answer came."""
    error: str | None
    """None: taken."""
    duration_ms: int


# Secrets and signatures


def valid_secrets(secrets: Sequence[Secret], now: datetime) -> list[Secret]:
    """Those that sign now, the current one first."""
    return [secret for secret in secrets if secret.until is None or secret.until > now]


def rotated(secrets: Sequence[Secret], fresh: str, now: datetime) -> list[Secret]:
    """A fresh secret in front; the one before it signs for a day more."""
    kept = [Secret(old.secret, old.until or now + OVERLAP) for old in valid_secrets(secrets, now)]
    return [Secret(fresh), *kept][:SECRETS_MAX]


def signature(secrets: Sequence[Secret], event: str, at: datetime, body: bytes) -> str:
    """The value of `webhook-signature`, one part per secret. Source: Standard Webhooks, "Signature scheme", v1."""
    signed = b"%s.%d.%s" % (event.encode(), int(at.timestamp()), body)
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(_key(secret.secret), signed, "sha256")).decode() for secret in secrets
    )


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(PREFIX))


# Endpoints


def wants(endpoint: WebhookEndpoint, event_type: str) -> bool:
    """Whether the endpoint's filter takes events of this type."""
    for pattern in endpoint.events.split():
        if pattern in ("*", event_type):
            return True
        if pattern.endswith(".*") and event_type.startswith(pattern[:-1]):
            return True
    return False


def patched(aggregate: Aggregate, changes: dict[str, str]) -> Change | KassaError:
    """Other url, events, description or state. Enabled again, an endpoint starts with a clean slate."""
    before = _living(aggregate)
    if isinstance(before, KassaError):
        return before
    after = msgspec.structs.replace(before, **changes)
    if changes.get("state") == "enabled":
        after = msgspec.structs.replace(after, failing_since=None, paused_reason=None)
    return _moved(before, after, "changed")


def deleted(aggregate: Aggregate) -> Change | KassaError:
    """Gone; what was due for it is dropped when its time comes."""
    before = _living(aggregate)
    if isinstance(before, KassaError):
        return before
    return _moved(before, msgspec.structs.replace(before, state="deleted", secrets=b""), "deleted")


def with_secrets(aggregate: Aggregate, seen: bytes, sealed: bytes) -> Change | KassaError:
    """Other secrets, if they are still those that the caller saw; Busy otherwise."""
    before = _living(aggregate)
    if isinstance(before, KassaError):
        return before
    if before.secrets != seen:
        return Busy(endpoint=f"whe_{before.id}")
    return _moved(before, msgspec.structs.replace(before, secrets=sealed), "secret_rotated")


def health(aggregate: Aggregate, took: bool, now: datetime, dead_after: timedelta) -> Change | KassaError:
    """What a try says about the endpoint: alive again, failing from now on, or dead for too long and so paused."""
    before = _living(aggregate)
    if isinstance(before, KassaError):
        return before
    if before.state != "enabled":
        return Change(home=before.home, result=before)
    if took:
        return _moved(before, msgspec.structs.replace(before, failing_since=None), "alive")
    if before.failing_since is None:
        return _moved(before, msgspec.structs.replace(before, failing_since=now), "failing")
    if now - before.failing_since < dead_after:
        return Change(home=before.home, result=before)
    reason = f"took nothing since {before.failing_since.isoformat(timespec='seconds')}"
    after = msgspec.structs.replace(before, state="paused", paused_reason=reason)
    return Change(
        home=before.home,
        root=before.id,
        moves=(Move(before, after, "paused"),),
        events=(Event("webhook_endpoint.paused", msgspec.json.encode(endpoint_object(after))),),
        result=after,
    )


def _living(aggregate: Aggregate) -> WebhookEndpoint | KassaError:
    root = aggregate.root
    if not isinstance(root, WebhookEndpoint):
        raise TypeError(f"an endpoint is needed here, not {type(root).__name__}")
    return WebhookEndpointNotFound(endpoint=f"whe_{root.id}") if root.state == "deleted" else root


def _moved(before: WebhookEndpoint, after: WebhookEndpoint, event: str) -> Change:
    if after == before:
        return Change(home=before.home, result=before)
    return Change(home=before.home, root=before.id, moves=(Move(before, after, event),), result=after)


# Deliveries


def delivery_id(endpoint: Id, event: str, replay: int) -> Id:
    """The same for the same event, endpoint and replay, so that a dispatch which is repeated makes nothing twice."""
    digits = hashlib.sha256(f"{endpoint}:{event}:{replay}".encode()).hexdigest()
    # RFC 9562, section 5.8: version 8 is ours to fill; two bits say that it follows that document.
    return Id(f"{digits[:12]}8{digits[13:16]}8{digits[17:32]}")


def delivery(endpoint: WebhookEndpoint, record: LogRecord, replay: int, now: datetime) -> WebhookDelivery:
    """One event for one endpoint, due at once."""
    return WebhookDelivery(
        home=record.home, id=delivery_id(endpoint.id, record.name, replay), version=0, sequence=0, state="due",
        endpoint=endpoint.id, event=record.name, event_type=record.type, event_root=record.root,
        event_sequence=record.sequence, replay=replay, created_at=now, next_at=now,
    )  # fmt: skip


def dispatched(record: LogRecord, endpoints: Sequence[WebhookEndpoint], now: datetime) -> Change | None:
    """An event's deliveries to all that want it, once; None when nobody does.

    An endpoint is told what happened since it exists.
    """
    takers = [one for one in endpoints if one.created_at <= record.at and wants(one, record.type)]
    if not takers:
        return None
    new = tuple(delivery(endpoint, record, 0, now) for endpoint in takers)
    return Change(
        home=record.home,
        new=new,
        timers=tuple(Timer(one.id, DELIVERY_TIMER, now) for one in new),
        done=(InboxDone(DISPATCH_GROUP, record.name),),
    )


def next_try(tries: int, chance: float) -> float | None:
    """Seconds until the next try after `tries` failed ones, ± 10 %; None: no more."""
    if tries >= len(TRIES_AT_S):
        return None
    return (TRIES_AT_S[tries] - TRIES_AT_S[tries - 1]) * (0.9 + 0.2 * chance)


def tried(
    aggregate: Aggregate, done: TimerDone, answer: Answer, follower: Id | None, now: datetime, chance: float
) -> Change:
    """What a try means: delivered, again later, or given up. `follower`: what waits behind it, woken when it is
    final."""
    before = _delivery(aggregate)
    if before.state != "due":
        return Change(home=before.home, done=(done,), result=before)
    tries = before.tries + 1
    told = msgspec.structs.replace(
        before, tries=tries, last_at=now, last_status=answer.status, last_error=answer.error,
        last_duration_ms=answer.duration_ms, next_at=None,
    )  # fmt: skip
    wait_s = next_try(tries, chance)
    if answer.error is not None and wait_s is not None:
        due = now + timedelta(seconds=wait_s)
        after = msgspec.structs.replace(told, next_at=due)
        timers: tuple[Timer, ...] = (Timer(before.id, DELIVERY_TIMER, due),)
        event = "failed"
    else:
        after = msgspec.structs.replace(told, state="delivered" if answer.error is None else "exhausted")
        timers = () if follower is None else (Timer(follower, DELIVERY_TIMER, now),)
        event = after.state
    return Change(
        home=before.home, root=before.id, moves=(Move(before, after, event),), done=(done,), timers=timers, result=after
    )


def dropped(aggregate: Aggregate, done: TimerDone, reason: str, follower: Id | None, now: datetime) -> Change:
    """Not sent, because its endpoint takes nothing now. A replay of that time brings it back."""
    before = _delivery(aggregate)
    if before.state != "due":
        return Change(home=before.home, done=(done,), result=before)
    after = msgspec.structs.replace(before, state="dropped", last_error=reason, next_at=None)
    timers = () if follower is None else (Timer(follower, DELIVERY_TIMER, now),)
    return Change(
        home=before.home, root=before.id, moves=(Move(before, after, "dropped"),), done=(done,), timers=timers,
        result=after,
    )  # fmt: skip


def _delivery(aggregate: Aggregate) -> WebhookDelivery:
    if not isinstance(aggregate.root, WebhookDelivery):
        raise TypeError(f"a delivery is needed here, not {type(aggregate.root).__name__}")
    return aggregate.root


# Again


def redelivered(aggregate: Aggregate, record: LogRecord, now: datetime) -> Change | KassaError:
    """One event once more for one endpoint."""
    before = _living(aggregate)
    if isinstance(before, KassaError):
        return before
    number = before.replays + 1
    after = msgspec.structs.replace(before, replays=number)
    new = delivery(before, record, number, now)
    return Change(
        home=before.home, root=before.id, new=(new,), moves=(Move(before, after, "redelivery"),),
        timers=(Timer(new.id, DELIVERY_TIMER, now),), result=new,
    )  # fmt: skip


def replay_begun(
    aggregate: Aggregate, replay_id: Id, since: datetime, until: datetime, now: datetime
) -> Change | KassaError:
    """All events of a time once more for one endpoint, page by page."""
    before = _living(aggregate)
    if isinstance(before, KassaError):
        return before
    number = before.replays + 1
    after = msgspec.structs.replace(before, replays=number)
    replay = WebhookReplay(
        home=before.home, id=replay_id, version=0, sequence=0, state="running", endpoint=before.id, replay=number,
        created_from=since, created_to=min(until, now), created_at=now,
    )  # fmt: skip
    return Change(
        home=before.home, root=before.id, new=(replay,), moves=(Move(before, after, "replay"),),
        timers=(Timer(replay_id, REPLAY_TIMER, now),), result=replay,
    )  # fmt: skip


def replay_continued(
    aggregate: Aggregate, done: TimerDone, endpoint: WebhookEndpoint, seen: WebhookReplay, page: Sequence[LogRecord],
    now: datetime,
) -> Change:  # fmt: skip
    """One page of a replay: its deliveries, and how far it has come. A page that is shorter than asked for is the
    last."""
    before = aggregate.root
    if not isinstance(before, WebhookReplay):
        raise TypeError(f"a replay is needed here, not {type(before).__name__}")
    if before.state != "running" or before.position != seen.position:
        return Change(home=before.home, done=(done,), result=before)
    new = tuple(delivery(endpoint, one, before.replay, now) for one in page if wants(endpoint, one.type))
    is_last = len(page) < REPLAY_PAGE or endpoint.state != "enabled"
    after = msgspec.structs.replace(
        before, position=page[-1].name if page else before.position, deliveries=before.deliveries + len(new),
        state="done" if is_last else "running",
    )  # fmt: skip
    again = () if is_last else (Timer(before.id, REPLAY_TIMER, now),)
    return Change(
        home=before.home, root=before.id, new=new, moves=(Move(before, after, "page"),), done=(done,),
        timers=(*(Timer(one.id, DELIVERY_TIMER, now) for one in new), *again), result=after,
    )  # fmt: skip
