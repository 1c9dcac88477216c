"""From PostgreSQL to a broker: events to their topic, and messages whose receiver is elsewhere.

What was sent and not confirmed is sent again under the same id; receivers have an inbox. A broker that is away stops
the relay where it stands: the log and the queues are the memory, the broker is transport.
"""

import asyncio
import random
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from kassa.clock import rfc3339
from kassa.db.away import AWAY
from kassa.messaging.binder import Binder
from kassa.messaging.ladder import message_delay
from kassa.messaging.log import Halt, root_name
from kassa.messaging.model import Confirmed, Failed, LogRecord, Receipt, Record, Unknown
from kassa.messaging.order import in_waves
from kassa.messaging.wake import MESSAGES, POLL_S, Wakeups
from kassa.messaging.work import ClaimedMessage, MessageWork
from kassa.observability.meters import Meters

log = structlog.get_logger("kassa.messaging.relay")

DEADLINE_S = 10.0
RESENDS_MAX = 3
"""Tries at once for what is not known to have arrived; then the relay stops for a moment."""
BATCH = 100
PAUSE_S = 1.0
AGAIN_S = (0.025, 0.05, 0.1)
"""After work the relay looks again after these pauses: under load not every commit wakes it (outbox.Bell)."""
SOURCE = "kassa"


def event_record(record: LogRecord) -> Record:
    """An event as others get it: a CloudEvent in binary mode, keyed by its root.

    Source: CloudEvents 1.0.2, "Binary content mode"; `sequence` is its Sequence extension.
    """
    headers = {
        "content-type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": record.name,
        "ce-source": SOURCE,
        "ce-type": record.type,
        "ce-subject": root_name(record),
        "ce-time": rfc3339(record.at),
        "ce-sequence": str(record.sequence),
    }
    return Record(id=record.name, key=record.root, body=record.data, headers=headers, home=record.home)


class EventRelay:
    """A reader of the event log that sends to a topic."""

    def __init__(self, binder: Binder, topic: str, *, deadline_s: float = DEADLINE_S) -> None:
        self._binder = binder
        self._topic = topic
        self._deadline_s = deadline_s

    async def handle(self, records: Sequence[LogRecord]) -> list[str | None]:
        """The log's Handler: at most one record of each root, so what is sent again overtakes nothing. Raises Halt."""
        limit = self._binder.traits.batch_max
        answers: list[str | None] = []
        for start in range(0, len(records), limit):
            batch = [event_record(record) for record in records[start : start + limit]]
            receipts = await send_surely(self._binder, self._topic, batch, self._deadline_s)
            for receipt in receipts:
                match receipt:
                    case Confirmed():
                        answers.append(None)
                    case Failed(reason, is_retryable=False):
                        answers.append(reason)
                    case Failed(reason) | Unknown(reason):
                        raise Halt(f"{self._topic}: {reason}")
        return answers


async def send_surely(binder: Binder, topic: str, records: Sequence[Record], deadline_s: float) -> list[Receipt]:
    """Sends, and sends again what is not known to have arrived, under the same id; bounded."""
    receipts = await binder.send(topic, records, deadline_s=deadline_s)
    for _ in range(RESENDS_MAX - 1):
        doubtful = [place for place, receipt in enumerate(receipts) if isinstance(receipt, Unknown)]
        if not doubtful:
            break
        again = await binder.send(topic, [records[place] for place in doubtful], deadline_s=deadline_s)
        for place, receipt in zip(doubtful, again, strict=True):
            receipts[place] = receipt
    return receipts


class MessageRelay:
    """Takes messages from a queue in PostgreSQL to a topic of a broker, for ever."""

    def __init__(
        self,
        work: MessageWork,
        binder: Binder,
        queue: str,
        topic: str,
        wakeups: Wakeups,
        *,
        meters: Meters | None = None,
    ) -> None:
        """meters: where what leaves is counted, by the queue's name."""
        name, _, group = queue.partition(":")
        self._passage = (meters or Meters()).passage(name, group)
        self._work = work
        self._binder = binder
        self._queue = queue
        self._topic = topic
        self._watch = wakeups.watch(MESSAGES)

    async def run(self) -> None:
        """Until it is cancelled."""
        pauses_s = iter(AGAIN_S)
        while True:
            if await self.step():
                pauses_s = iter(AGAIN_S)
            else:
                await self._watch.wait(next(pauses_s, POLL_S))

    async def step(self) -> int:
        """One batch; says how many messages it had."""
        limit = min(BATCH, self._binder.traits.batch_max)
        claimed = await self._work.claim_whole(self._queue, limit)
        if not claimed:
            return 0
        # The other half is for a send that is under way: past the lease somebody else has them.
        until = asyncio.get_running_loop().time() + self._work.lease_s / 2
        try:
            await self._send_all(claimed, until)
        except AWAY:
            await self._work.give_back(claimed, PAUSE_S)
            raise
        except asyncio.CancelledError:
            await self._work.give_back(claimed)
            raise
        return len(claimed)

    async def _send_all(self, claimed: Sequence[ClaimedMessage], until: float) -> None:
        """until: by the loop's clock; what is not sent by then is given back."""
        stopped: set[str] = set()
        waves = in_waves(claimed, _key)
        for place, wave in enumerate(waves):
            if asyncio.get_running_loop().time() > until:
                await self._work.give_back([message for late in waves[place:] for message in late])
                return
            ready = [message for message in wave if message.key not in stopped]
            behind = [message for message in wave if message.key in stopped]
            if behind:
                await self._work.retry([(message, PAUSE_S, None, False) for message in behind])
            if ready:
                stopped |= await self._send(ready)

    async def _send(self, ready: Sequence[ClaimedMessage]) -> set[str]:
        """Sends messages of different keys; says the keys that have to wait."""
        receipts = await send_surely(self._binder, self._topic, [_record(one) for one in ready], DEADLINE_S)
        sent = [one for one, receipt in zip(ready, receipts, strict=True) if isinstance(receipt, Confirmed)]
        if sent:
            await self._work.acknowledge(sent)
            self._passage.took_since([message.created_at for message in sent], datetime.now(UTC))
        return await self._settle_failed(ready, receipts)

    async def _settle_failed(self, claimed: Sequence[ClaimedMessage], receipts: Sequence[Receipt]) -> set[str]:
        dead: list[tuple[ClaimedMessage, str]] = []
        later: list[tuple[ClaimedMessage, float, str | None, bool]] = []
        for message, receipt in zip(claimed, receipts, strict=True):
            match receipt:
                case Failed(reason, is_retryable=False):
                    delay_s = message_delay(message.attempts + 1, random.random())
                    if delay_s is None:
                        dead.append((message, reason))
                    else:
                        later.append((message, delay_s, reason, True))
                case Failed(reason) | Unknown(reason):
                    later.append((message, PAUSE_S, reason, False))
                case Confirmed():
                    continue
        self._passage.dead += len(dead)
        self._passage.retried += len(later)
        if dead:
            await self._work.bury(dead)
        if later:
            log.warning("relay.put_off", queue=self._queue, messages=len(later), reason=later[0][2])
            await self._work.retry(later)
        return {message.key for message, _, _, _ in later if message.key}


def _key(message: ClaimedMessage) -> str | None:
    return message.key or None


def _record(message: ClaimedMessage) -> Record:
    return Record(message.id, message.key, message.body, message.headers, message.priority, 0.0, message.home)
