"""From a broker to an effect: each record's effect, its inbox key and its acknowledgement are one Change.

Records of different keys are handled side by side, those of one key one after the other. A record that fails waits, and
its key with it; a batch that a handler cannot handle is split until the poisonous record stands alone.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec
import structlog

from kassa.errors import BrokerUnreachable, InvariantBroken, KassaError, Retry
from kassa.journal.change import Again, Change, Committed, Consumed, InboxDone, Refused, Stale, Verdict
from kassa.journal.journal import Journal
from kassa.messaging.binder import Subscription
from kassa.messaging.breaker import Breaker
from kassa.messaging.ladder import message_delay
from kassa.messaging.model import Ack, Dead, Delivery, Record, RetryAfter, Settlement
from kassa.messaging.order import in_waves
from kassa.observability.meters import Meters

log = structlog.get_logger("kassa.messaging.consumer")

BATCH = 500
"""Records in hand at once: what one commit of the journal carries well. Fewer where fewer wait; nobody waits for a full one."""
WAIT_S = 5.0
PAUSE_S = 1.0
"""While the broker or the journal is away."""

Handler = Callable[[Sequence[Record]], Awaitable[Sequence[Change]]]
"""Decides what records mean: one Change each, in order; an empty Change for one that means nothing. It is given
records of different keys. May be asked about a record again, so it has no effect of its own. Raises KassaError or
ValueError when it cannot; `Unavailable` when what it needs is away."""


class Unavailable(Exception):
    """What the handler needs is away: nothing is wrong with the record."""

    def __init__(self, destination: str, reason: str) -> None:
        self.destination = destination
        super().__init__(reason)


class Counts(NamedTuple):
    """What a consumer did since it began."""

    handled: int = 0
    repeated: int = 0


class Consumer:
    """One consumer of a group. Several, in any number of processes, share the group's records."""

    def __init__(
        self,
        subscription: Subscription,
        group: str,
        journal: Journal,
        handler: Handler,
        *,
        destination: Callable[[Record], str] = lambda record: "",
        batch: int = BATCH,
        meters: Meters | None = None,
    ) -> None:
        """destination: whom a record's handling needs, for the circuit breaker; '' where it is only this database. meters:
        where open circuit breakers are counted; records are counted by their binder."""
        self._subscription = subscription
        self._group = group
        self._journal = journal
        self._handler = handler
        self._destination = destination
        self._batch = batch
        self._breaker = Breaker()
        if meters is not None:
            meters.watch_breaker(group, self._breaker)
        self.counts = Counts()

    async def run(self) -> None:
        """For ever; what is in hand when it is cancelled comes again elsewhere."""
        while True:
            try:
                await self.step(WAIT_S)
            except BrokerUnreachable as error:
                log.warning("consumer.broker_unreachable", group=self._group, error=str(error))
                await asyncio.sleep(PAUSE_S)

    async def step(self, wait_s: float) -> int:
        """One batch; says how many records it had. Raises BrokerUnreachable."""
        deliveries = await self._subscription.receive(self._batch, wait_s)
        if deliveries:
            await self._subscription.settle(await self._handle_all(deliveries))
        return len(deliveries)

    async def _handle_all(self, deliveries: Sequence[Delivery]) -> list[tuple[Delivery, Settlement]]:
        ends: list[tuple[Delivery, Settlement]] = []
        stopped: dict[str, RetryAfter] = {}
        for wave in in_waves(deliveries, _key):
            ready = [delivery for delivery in wave if delivery.record.key not in stopped]
            ends += [(delivery, stopped[delivery.record.key]) for delivery in wave if delivery.record.key in stopped]
            for delivery, end in zip(ready, await self._handle(ready), strict=True):
                ends.append((delivery, end))
                if isinstance(end, RetryAfter) and delivery.record.key:
                    # What comes behind it in its key waits as long, and was not tried.
                    stopped[delivery.record.key] = RetryAfter(end.delay_s, None, counts=False)
        return ends

    async def _handle(self, wave: Sequence[Delivery]) -> list[Settlement]:
        """Records of different keys: decided together, committed side by side, each answered for itself."""
        ends: dict[int, Settlement] = {}
        waiting: dict[int, asyncio.Future[Verdict]] = {}
        for place, change in enumerate(await self._decide(wave)):
            if isinstance(change, Change):
                try:
                    waiting[place] = self._journal.submit(self._with_done(wave[place], change))
                except KassaError as error:
                    ends[place] = _not_stored(wave[place], error)
            else:
                ends[place] = change
        for place, future in waiting.items():
            ends[place] = await self._answer(wave[place], future)
        return [ends[place] for place in range(len(wave))]

    async def _decide(self, wave: Sequence[Delivery]) -> list[Change | Settlement]:
        """A Change or an end for each; what the handler cannot take together it is given in halves. A destination that is away by
        then is not tried again: one try tells for all that wait for it."""
        now = asyncio.get_running_loop().time()
        waits = [self._breaker.wait_s(self._destination(delivery.record), now) for delivery in wave]
        if any(waits):
            ready = [delivery for delivery, wait_s in zip(wave, waits, strict=True) if not wait_s]
            decided = iter(await self._decide(ready) if ready else ())
            return [
                RetryAfter(wait_s, "its destination is away", counts=False) if wait_s else next(decided)
                for wait_s in waits
            ]
        try:
            changes = await self._handler([delivery.record for delivery in wave])
        except Unavailable as away:
            if len(wave) == 1:
                self._breaker.failed(away.destination, asyncio.get_running_loop().time())
                return [RetryAfter(PAUSE_S, str(away), counts=False)]
        except Exception as error:
            # The outermost loop of a record: whatever its handler raises belongs to the record, and must not stop
            # the rest.
            if len(wave) == 1:
                log.warning("consumer.failed", group=self._group, record=wave[0].record.id, error=repr(error))
                is_final = isinstance(error, KassaError) and error.retry is Retry.NEVER
                return [_failed(wave[0], f"{type(error).__name__}: {error}", is_final=is_final)]
        else:
            if len(changes) == len(wave):
                for delivery in wave:
                    self._breaker.succeeded(self._destination(delivery.record))
                return list(changes)
            raise InvariantBroken("A handler answered for another number of records.", group=self._group)
        half = len(wave) // 2
        return await self._decide(wave[:half]) + await self._decide(wave[half:])

    def _with_done(self, delivery: Delivery, change: Change) -> Change:
        done = (InboxDone(self._group, delivery.record.id), *delivery.done)
        return msgspec.structs.replace(change, done=change.done + done)

    async def _answer(self, delivery: Delivery, future: "asyncio.Future[Verdict]") -> Settlement:
        try:
            verdict = await asyncio.shield(future)
        except KassaError as error:
            return _not_stored(delivery, error)
        match verdict:
            case Committed():
                self.counts = self.counts._replace(handled=self.counts.handled + 1)
                return Ack()
            case Consumed() | Again():
                self.counts = self.counts._replace(repeated=self.counts.repeated + 1)
                return Ack()
            case Refused(refusal):
                return _failed(delivery, str(refusal), is_final=refusal.retry is Retry.NEVER)
            case Stale():
                return _failed(delivery, "stale", is_final=False)
            case _:
                return _failed(delivery, repr(verdict), is_final=True)


def _key(delivery: Delivery) -> str | None:
    return delivery.record.key or None


def _not_stored(delivery: Delivery, error: KassaError) -> Settlement:
    """The journal could not write, or does not know whether it did: nothing is wrong with the record. Unless it could never be
    stored: it is tried some more times, and given up."""
    if error.retry is Retry.NEVER:
        return _failed(delivery, str(error), is_final=False)
    return RetryAfter(PAUSE_S, str(error), counts=False)


def _failed(delivery: Delivery, reason: str, *, is_final: bool) -> Settlement:
    delay_s = None if is_final else message_delay(delivery.attempts + 1, random.random())
    return Dead(reason) if delay_s is None else RetryAfter(delay_s, reason)
