"""Sends webhooks: from the event log to deliveries, and from due deliveries to the merchants' servers."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

import structlog

from kassa.clock import Clock
from kassa.errors import Busy, DatabaseUnreachable, InvariantBroken, KassaError, OutcomeUnknown
from kassa.ids import Id, read_event_name
from kassa.journal.change import Aggregate, Change, Committed, Consumed, Refused, Rule, Verdict
from kassa.journal.journal import Journal
from kassa.messaging.log import EventLog, Halt, event_body
from kassa.messaging.model import LogRecord, Place
from kassa.messaging.work import FiredTimer, TimerWork
from kassa.notifications import model
from kassa.notifications.model import DEAD_AFTER, DELIVERY_TIMER, REPLAY_PAGE, REPLAY_TIMER, Answer
from kassa.notifications.records import (
    WEBHOOK_DELIVERY,
    WEBHOOK_ENDPOINT,
    WEBHOOK_REPLAY,
    WebhookDelivery,
    WebhookEndpoint,
)
from kassa.notifications.sender import Sender
from kassa.notifications.service import Webhooks
from kassa.notifications.store import Neighbours, WebhookStore
from kassa.workers.timers import Handler, NotYet

PER_ENDPOINT_MAX = 8
"""Deliveries to one endpoint at once, so that one that is slow does not take every place."""
TURN_S = 0.5
"""A delivery that waits behind an earlier one looks again no sooner than this by itself; the earlier one wakes it."""
TURN_MAX_S = 60.0

log = structlog.get_logger("kassa.workers.webhooks")


class Dispatcher:
    """A reader of the event log: makes a delivery for each endpoint that wants an event."""

    def __init__(
        self, journal: Journal, store: WebhookStore, clock: Clock, *, observe: Callable[[float], None] | None = None
    ) -> None:
        """observe: is told of each event that somebody wants how many seconds ago it happened."""
        self._journal = journal
        self._store = store
        self._clock = clock
        self._observe = observe

    async def handle(self, records: Sequence[LogRecord]) -> list[str | None]:
        """The log's Handler. The inbox makes a repeat change nothing. Raises Halt when nothing can be written now."""
        endpoints = await self._store.enabled(sorted({record.home for record in records}))
        now = self._clock.now()
        changes = [model.dispatched(record, endpoints.get(record.home, ()), now) for record in records]
        try:
            # Together: when one fails the others have been heard, too.
            told = await asyncio.gather(*(self._journal.submit(change) for change in changes if change is not None))
        except (Busy, DatabaseUnreachable, OutcomeUnknown) as error:
            raise Halt(error.code) from error
        if self._observe is not None:
            for record, change in zip(records, changes, strict=True):
                if change is not None:
                    self._observe((now - record.at).total_seconds())
        verdicts = iter(told)
        return [None if change is None else _failure(next(verdicts)) for change in changes]


def _failure(verdict: Verdict) -> str | None:
    return None if isinstance(verdict, Committed | Consumed) else type(verdict).__name__


class WebhookWorker:
    """Acts on the timers of deliveries and replays."""

    def __init__(
        self,
        journal: Journal,
        store: WebhookStore,
        events: EventLog,
        webhooks: Webhooks,
        sender: Sender,
        timers: TimerWork,
        clock: Clock,
        *,
        dead_after: timedelta = DEAD_AFTER,
        turn_s: float = TURN_S,
        observe: Callable[[str], None] | None = None,
    ) -> None:
        """turn_s: how soon a delivery that waits for an earlier one looks again by itself.

        observe: is told of each try: taken or failed.
        """
        self._journal = journal
        self._store = store
        self._events = events
        self._webhooks = webhooks
        self._sender = sender
        self._timers = timers
        self._clock = clock
        self._dead_after = dead_after
        self._turn_s = turn_s
        self._observe = observe
        self._in_flight: Counter[Id] = Counter()

    @property
    def handlers(self) -> dict[str, Handler]:
        """What the timer loop calls, by kind."""
        return {DELIVERY_TIMER: self.deliver, REPLAY_TIMER: self.replay}

    async def deliver(self, fired: FiredTimer) -> None:
        """One try of one delivery; while an earlier event of the same object is due, it waits for its turn."""
        delivery = await self._store.delivery(fired.home, fired.entity)
        if delivery is None or delivery.state != "due":
            await self._commit(Change(home=fired.home, done=(fired.done,)))
            return
        endpoint = await self._store.endpoint(fired.home, delivery.endpoint)
        if endpoint is None:
            raise InvariantBroken("A delivery has no endpoint.", delivery=f"whd_{delivery.id}")
        neighbours = await self._store.neighbours(delivery)
        if neighbours.before_s is not None:
            await self._wait_for_turn(fired, delivery, neighbours.before_s)
            return
        if not await self._timers.is_current(fired):
            # The earlier one became final just now and woke this one again: that timer will send it, once.
            return
        if endpoint.state != "enabled":
            reason = f"the endpoint was {endpoint.state}"

            def drop(aggregate: Aggregate, now: datetime) -> Change:
                return model.dropped(aggregate, fired.done, reason, neighbours.behind, now)

            await self._commit(Change(home=fired.home, rule=Rule(WEBHOOK_DELIVERY, delivery.id, drop)))
            await self._wake_behind(delivery, neighbours)
            return
        record = await self._record(fired.home, delivery.event)
        with self._place_at(endpoint.id):
            answer = await self._send(endpoint, record)
        if self._observe is not None:
            self._observe("taken" if answer.error is None else "failed")
        chance = random.random()

        def settle(aggregate: Aggregate, now: datetime) -> Change:
            return model.tried(aggregate, fired.done, answer, neighbours.behind, now, chance)

        settled = await self._commit(Change(home=fired.home, rule=Rule(WEBHOOK_DELIVERY, delivery.id, settle)))
        if settled is not None and settled.state != "due":
            await self._wake_behind(delivery, neighbours)
        await self._note_health(endpoint, answer)

    async def _wait_for_turn(self, fired: FiredTimer, delivery: WebhookDelivery, before_s: float) -> None:
        """Lets go of a delivery whose turn has not come. The earlier one wakes it when it is final."""
        delay_s = max(min(before_s, TURN_MAX_S), self._turn_s) + random.random()
        await self._timers.postpone_timer(fired, delay_s)
        # It may have become final while we still held this one, and then it could not wake it.
        if (await self._store.neighbours(delivery)).before_s is None:
            await self._timers.hurry_timer(DELIVERY_TIMER, delivery.id)

    async def _wake_behind(self, delivery: WebhookDelivery, seen: Neighbours) -> None:
        """A delivery is final: what came behind it while it was on its way goes now.

        What stood there before was woken by the same commit. What comes after this look sees a final delivery.
        """
        if seen.behind is not None:
            return
        behind = (await self._store.neighbours(delivery)).behind
        if behind is not None:
            await self._timers.hurry_timer(DELIVERY_TIMER, behind)

    async def replay(self, fired: FiredTimer) -> None:
        """One page of a replay."""
        replay = await self._store.replay(fired.home, fired.entity)
        endpoint = None if replay is None else await self._store.endpoint(fired.home, replay.endpoint)
        if replay is None or endpoint is None or replay.state != "running":
            await self._commit(Change(home=fired.home, done=(fired.done,)))
            return
        last = await self._record(fired.home, replay.position) if replay.position else None
        page = await self._events.of_time(fired.home, replay.created_from, replay.created_to, REPLAY_PAGE, after=last)

        def go_on(aggregate: Aggregate, now: datetime) -> Change:
            return model.replay_continued(aggregate, fired.done, endpoint, replay, page, now)

        await self._commit(Change(home=fired.home, rule=Rule(WEBHOOK_REPLAY, replay.id, go_on)))

    @contextmanager
    def _place_at(self, endpoint: Id) -> Iterator[None]:
        """One of the places at an endpoint. Raises NotYet when there is none."""
        if self._in_flight[endpoint] >= PER_ENDPOINT_MAX:
            raise NotYet(0.5 + random.random())
        self._in_flight[endpoint] += 1
        try:
            yield
        finally:
            self._in_flight[endpoint] -= 1
            if not self._in_flight[endpoint]:
                del self._in_flight[endpoint]

    async def _send(self, endpoint: WebhookEndpoint, record: LogRecord) -> Answer:
        now = self._clock.now()
        secrets = model.valid_secrets(self._webhooks.secrets_of(endpoint), now)
        return await self._sender.send(endpoint.url, record.name, secrets, now, event_body(record))

    async def _record(self, home: int, name: str) -> LogRecord:
        place = read_event_name(name)
        record = None if place is None else await self._events.event(home, Place(*place))
        if record is None:
            raise InvariantBroken("An event that was dispatched is gone.", event=name)
        return record

    async def _note_health(self, endpoint: WebhookEndpoint, answer: Answer) -> None:
        """Notes the first failure, the recovery, and the end of patience; most tries change nothing here."""
        took = answer.error is None
        if took and endpoint.failing_since is None:
            return

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.health(aggregate, took, now, self._dead_after)

        if not took and endpoint.failing_since and self._clock.now() - endpoint.failing_since < self._dead_after:
            return
        verdict = await self._journal.commit(
            Change(home=endpoint.home, rule=Rule(WEBHOOK_ENDPOINT, endpoint.id, decide))
        )
        if isinstance(verdict, Committed) and verdict.result.state == "paused":
            log.warning("webhook.endpoint_paused", endpoint=f"whe_{endpoint.id}", reason=verdict.result.paused_reason)

    async def _commit(self, change: Change) -> WebhookDelivery | None:
        """The delivery as it stands after; None when it is not about one, or was done before."""
        verdict = await self._journal.commit(change)
        if isinstance(verdict, Refused):
            raise verdict.error
        if not isinstance(verdict, Committed | Consumed):
            raise InvariantBroken("The journal answered what cannot be here.", verdict=type(verdict).__name__)
        result = verdict.result if isinstance(verdict, Committed) else None
        return result if isinstance(result, WebhookDelivery) else None
