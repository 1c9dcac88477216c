"""What a merchant does with webhook endpoints: make, change, delete, rotate the secret, look at deliveries, have
them again."""

import base64
import secrets as random_secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

import msgspec

from kassa.clock import Clock
from kassa.errors import (
    Busy,
    EventNotFound,
    IdempotencyKeyReused,
    InvariantBroken,
    KassaError,
    RequestInvalid,
    WebhookEndpointNotFound,
)
from kassa.ids import Id, new_id, read_event_name
from kassa.journal.change import (
    Again,
    Aggregate,
    Change,
    Committed,
    KeyReused,
    Missing,
    OnceKey,
    Refused,
    Reply,
    Rule,
    Verdict,
)
from kassa.journal.journal import Journal
from kassa.merchants.vault import Vault
from kassa.messaging.log import EventLog
from kassa.messaging.model import LogRecord, Place
from kassa.notifications import model
from kassa.notifications.model import PREFIX, Secret
from kassa.notifications.records import WEBHOOK_ENDPOINT, WebhookDelivery, WebhookEndpoint, WebhookReplay
from kassa.notifications.sender import checked_url
from kassa.notifications.store import WebhookStore

ENDPOINTS_MAX = 20
"""Of one merchant."""
FILTERS_MAX = 50
ROTATE_TRIES = 5

_SECRETS = msgspec.json.Decoder(list[Secret])


class Shown(NamedTuple):
    """An endpoint with its secret, for the answer that shows it. is_repeat: the key was used before; nothing new
    happened."""

    endpoint: WebhookEndpoint
    secret: str
    is_repeat: bool


class Webhooks:
    """Composes: read what is needed, let the model decide, commit."""

    def __init__(
        self,
        journal: Journal,
        store: WebhookStore,
        events: EventLog,
        vault: Vault,
        clock: Clock,
        *,
        allow_private: bool,
    ) -> None:
        self._journal = journal
        self._store = store
        self._events = events
        self._vault = vault
        self._clock = clock
        self._allow_private = allow_private

    async def create(
        self, home: int, url: str, events: Sequence[str], description: str = "", *, once: OnceKey | None = None
    ) -> Shown:
        """A new endpoint; its secret is shown here, and again to a repeat under the same key.

        Raises RequestInvalid (url, events), IdempotencyKeyReused.
        """
        filters = checked_filters(events)
        checked_url(url, allow_private=self._allow_private)
        if len(await self._store.endpoints(home, ENDPOINTS_MAX)) >= ENDPOINTS_MAX:
            raise RequestInvalid(f"A merchant may have {ENDPOINTS_MAX} webhook endpoints; delete one first.")
        id, secret = new_id(), new_secret()
        endpoint = WebhookEndpoint(
            home=home, id=id, version=0, sequence=0, state="enabled", created_at=self._clock.now(), url=url,
            events=filters, secrets=self.seal(home, id, [Secret(secret)]), description=description,
        )  # fmt: skip
        change = Change(home=home, once=once, reply=Reply(201, id), new=(endpoint,), root=id, result=endpoint)
        verdict = await self._journal.commit(change)
        if isinstance(verdict, Again) and verdict.reply.resource is not None:
            kept = await self.get(home, verdict.reply.resource)
            return Shown(kept, self.secrets_of(kept)[0].secret, True)
        return Shown(cast(WebhookEndpoint, _result(verdict)), secret, False)

    async def get(self, home: int, id: Id) -> WebhookEndpoint:
        """Raises WebhookEndpointNotFound."""
        endpoint = await self._store.endpoint(home, id)
        if endpoint is None or endpoint.state == "deleted":
            raise WebhookEndpointNotFound(endpoint=f"whe_{id}")
        return endpoint

    async def page(self, home: int, limit: int, before: Id | None = None) -> list[WebhookEndpoint]:
        """A page of a merchant's endpoints, newest first."""
        return await self._store.endpoints(home, limit, before)

    async def patch(
        self,
        home: int,
        id: Id,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        state: str | None = None,
    ) -> WebhookEndpoint:
        """Changes what is given; state: enabled or disabled. Raises RequestInvalid, WebhookEndpointNotFound."""
        changes: dict[str, str] = {}
        if url is not None:
            changes["url"] = checked_url(url, allow_private=self._allow_private)
        if events is not None:
            changes["events"] = checked_filters(events)
        if description is not None:
            changes["description"] = description
        if state is not None:
            if state not in ("enabled", "disabled"):
                fault = "must be enabled or disabled"
                raise RequestInvalid(f"state: {fault}", errors=[{"field": "state", "message": fault}])
            changes["state"] = state

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.patched(aggregate, changes)

        return cast(WebhookEndpoint, _result(await self._decide(home, id, decide)))

    async def delete(self, home: int, id: Id) -> None:
        """Raises WebhookEndpointNotFound, also the second time."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.deleted(aggregate)

        _result(await self._decide(home, id, decide))

    async def rotate_secret(self, home: int, id: Id, *, once: OnceKey | None = None) -> Shown:
        """A fresh secret; for a day both sign. A repeat under the same key shows the one that is current by then.

        Raises WebhookEndpointNotFound, IdempotencyKeyReused.
        """
        for _ in range(ROTATE_TRIES):
            before, fresh = await self.get(home, id), new_secret()
            sealed = self.seal(home, id, model.rotated(self.secrets_of(before), fresh, self._clock.now()))

            def decide(
                aggregate: Aggregate, now: datetime, seen: bytes = before.secrets, sealed: bytes = sealed
            ) -> Change | KassaError:
                return model.with_secrets(aggregate, seen, sealed)

            verdict = await self._decide(home, id, decide, once, Reply(200, id))
            if isinstance(verdict, Again):
                return Shown(before, self.secrets_of(before)[0].secret, True)
            if not (isinstance(verdict, Refused) and isinstance(verdict.error, Busy)):
                return Shown(cast(WebhookEndpoint, _result(verdict)), fresh, False)
        raise Busy(endpoint=f"whe_{id}")

    async def deliveries(
        self, home: int, id: Id, limit: int, *, before: Id | None = None, state: str | None = None
    ) -> list[WebhookDelivery]:
        """A page of an endpoint's deliveries, newest first. `before`: the last one of the page before.

        Raises WebhookEndpointNotFound.
        """
        await self.get(home, id)
        last = None if before is None else await self._store.delivery(home, before)
        return await self._store.deliveries(home, id, limit, before=last, state=state)

    async def redeliver(self, home: int, event: str, *, once: OnceKey | None = None) -> list[WebhookDelivery]:
        """Sends one event again to every enabled endpoint that wants it. Raises EventNotFound, IdempotencyKeyReused.

        A repeat under the same key sends nothing more.
        """
        record = await self._event(home, event)
        made: list[WebhookDelivery] = []
        for endpoint in (await self._store.enabled([home])).get(home, []):
            if not model.wants(endpoint, record.type):
                continue

            def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
                return model.redelivered(aggregate, record, now)

            # One key per endpoint, so that a repeat after a crash in the middle goes on where it stopped.
            part = None if once is None else once._replace(operation=f"{once.operation} whe_{endpoint.id}")
            verdict = await self._decide(home, endpoint.id, decide, part, Reply(202, None))
            if not isinstance(verdict, Again):
                made.append(cast(WebhookDelivery, _result(verdict)))
        return made

    async def replay(
        self, home: int, id: Id, since: datetime, until: datetime, *, once: OnceKey | None = None
    ) -> WebhookReplay:
        """Sends all events of a time again to one endpoint, in the background and in order.

        Raises WebhookEndpointNotFound, RequestInvalid when the time is empty, IdempotencyKeyReused.
        """
        if until <= since:
            fault = "must be later than created_from"
            raise RequestInvalid(f"created_to: {fault}", errors=[{"field": "created_to", "message": fault}])
        replay_id = new_id()

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.replay_begun(aggregate, replay_id, since, until, now)

        verdict = await self._decide(home, id, decide, once, Reply(202, replay_id))
        if isinstance(verdict, Again) and verdict.reply.resource is not None:
            kept = await self._store.replay(home, verdict.reply.resource)
            if kept is None:
                raise InvariantBroken("A replay that was answered is gone.", replay=verdict.reply.resource)
            return kept
        return cast(WebhookReplay, _result(verdict))

    def secrets_of(self, endpoint: WebhookEndpoint) -> list[Secret]:
        """An endpoint's secrets in clear, the current one first."""
        return _SECRETS.decode(self._vault.open(endpoint.home, _purpose(endpoint.id), endpoint.secrets))

    def seal(self, home: int, id: Id, secrets: Sequence[Secret]) -> bytes:
        """Secrets as they are stored."""
        return self._vault.seal(home, _purpose(id), msgspec.json.encode(secrets))

    async def _event(self, home: int, name: str) -> LogRecord:
        place = read_event_name(name)
        record = None
        if place is not None:
            record = await self._events.event(home, Place(*place))
        if record is None:
            raise EventNotFound(event=name)
        return record

    async def _decide(
        self, home: int, id: Id, decide: Any, once: OnceKey | None = None, reply: Reply | None = None
    ) -> Verdict:
        rule = Rule(WEBHOOK_ENDPOINT, id, decide)
        return await self._journal.commit(Change(home=home, once=once, reply=reply, rule=rule))


def new_secret() -> str:
    """A fresh secret, `whsec_` and 32 random bytes in base64. Source: Standard Webhooks, "Signature scheme"."""
    return PREFIX + base64.b64encode(random_secrets.token_bytes(32)).decode()


def checked_filters(events: Sequence[str]) -> str:
    """Event types as they are stored: `*`, `payment.*` or `payment.succeeded`. Raises RequestInvalid."""
    good = [one for one in events if one == "*" or _is_filter(one)]
    if not events or len(good) < len(events) or len(events) > FILTERS_MAX:
        fault = f"must be 1 to {FILTERS_MAX} event types such as payment.succeeded, payment.* or *"
        raise RequestInvalid(f"events: {fault}", errors=[{"field": "events", "message": fault}])
    return " ".join(dict.fromkeys(good))


def _is_filter(text: str) -> bool:
    noun, dot, rest = text.partition(".")
    is_word = noun.replace("_", "a").isalpha() and noun.isascii() and noun.islower()
    return bool(dot) and is_word and (rest == "*" or (rest.replace("_", "a").isalpha() and rest.isascii()))


def _purpose(id: Id) -> str:
    return f"webhook_endpoint:{id}"


def _result(verdict: Verdict) -> Any:
    match verdict:
        case Committed(result):
            return result
        case Refused(error):
            raise error
        case Missing(_, id):
            raise WebhookEndpointNotFound(endpoint=f"whe_{id}")
        case KeyReused():
            raise IdempotencyKeyReused()
        case _:
            raise InvariantBroken("The journal answered what cannot be here.", verdict=type(verdict).__name__)
