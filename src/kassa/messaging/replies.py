"""Answers to requests that came over a queue: each is a message of the commit that it tells of, sent until it has arrived.

Where the commit knows the whole answer, the message holds it. Where a channel has to be asked first, the message is an
answer that is *owed*: whoever asks the channel replaces it, and if he dies it falls due and says how things stand then.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

import structlog

from kassa.db.away import AWAY
from kassa.errors import BrokerUnreachable, InvariantBroken
from kassa.ids import Id, new_id
from kassa.journal.change import Message
from kassa.messaging.binder import Binder
from kassa.messaging.metered import REPLIES
from kassa.messaging.model import Confirmed, Failed, Receipt, Record, Unknown
from kassa.messaging.wake import MESSAGES, Wakeups
from kassa.messaging.work import ClaimedMessage, MessageWork
from kassa.observability.meters import Meters
from kassa.supervisor import end_tasks

log = structlog.get_logger("kassa.messaging.replies")

REPLY_TO, CORRELATION = "reply-to", "correlation-id"
STATUS = "kassa-status"
"""The status that the REST API answers with, for who wants to tell an object from a problem without looking inside."""
JSON = "application/json"
_OWED = "kassa-owed"
"""Of an answer that is owed: the noun and id of what it tells of."""

ADDRESS_MAX = 255
"""Characters of a queue's name in AMQP; topics are shorter everywhere."""
BATCH = 100
DEADLINE_S = 10.0
SOON_S = 1.0
"""Longer than a broker takes that is well. An address that takes longer is sent to beside the next answers."""
SLOW_MAX = 100
"""Where so many addresses at once take long, it is the broker, and there is no use in more."""
PAUSE_S, PAUSE_MAX_S = 1.0, 15.0
"""The longer ones are for an address that took long and confirmed nothing: it is tried more and more seldom."""
NOT_YET_S = 0.5
DELAY_MAX_S = 300.0
GIVEN_UP_S = 3600.0
"""A client that restarts makes its queue again within seconds; one that has not for an hour does not wait any more."""


class Address(NamedTuple):
    """Where an answer goes."""

    broker: str
    reply_to: str
    correlation_id: str | None


def reply_queue(broker: str) -> str:
    """The queue in PostgreSQL of the answers that go over a broker."""
    return f"{REPLIES}:{broker}"


def reply(address: Address, status: int, body: bytes) -> Message:
    """An answer that is known."""
    return Message(new_id(), reply_queue(address.broker), "", body, _headers(address, status))


def owed(address: Address, status: int, noun: str, resource: Id, due: datetime) -> Message:
    """An answer that whoever is alive then gives when it is due, if nobody has before."""
    headers = _headers(address, status) | {_OWED: f"{noun} {resource}"}
    return Message(new_id(), reply_queue(address.broker), "", b"", headers, due=due)


def _headers(address: Address, status: int) -> dict[str, str]:
    headers = {REPLY_TO: address.reply_to, "content-type": JSON, STATUS: str(status)}
    return headers if address.correlation_id is None else headers | {CORRELATION: address.correlation_id}


def reply_delay(attempts: int) -> float | None:
    """Seconds until the next try after `attempts` failed ones, an hour in all; None: nobody waits there any more."""
    waited_s = sum(_delay(number) for number in range(1, attempts))
    return None if waited_s >= GIVEN_UP_S else _delay(attempts)


def _delay(attempts: int) -> float:
    return min(2.0 ** min(attempts - 1, 16), DELAY_MAX_S)


Look = Callable[[int, str, Id], Awaitable[bytes | None]]
"""Reads a thing by home, noun and id, as it stands; None: its channel has not answered yet."""


class Way(Protocol):
    """The broker that answers go over."""

    name: str

    async def binder(self) -> Binder:
        """Raises BrokerUnreachable."""
        ...

    def is_away(self, reason: str) -> None:
        """It did not answer."""
        ...


class ReplyRelay:
    """Sends the answers that go over one broker, for ever. One that cannot be sent holds up nothing else."""

    def __init__(
        self, work: MessageWork, broker: Way, look: Look, wakeups: Wakeups, *, meters: Meters | None = None
    ) -> None:
        """meters: where what leaves is counted."""
        self._passage = (meters or Meters()).passage(REPLIES, broker.name)
        self._work = work
        self._broker = broker
        self._queue = reply_queue(broker.name)
        self._look = look
        self._watch = wakeups.watch(MESSAGES)
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._pauses_s: dict[str, float] = {}
        """Of the addresses that took long and confirmed nothing the last time, and that nobody waits for."""

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                if not await self.step():
                    await self._watch.wait()
        except asyncio.CancelledError:
            await end_tasks(*self._sending.values())
            raise

    async def step(self) -> int:
        """One batch; says how many answers it had. What takes long may still be under way."""
        if len(self._sending) >= SLOW_MAX:
            await asyncio.wait(self._sending.values(), return_when=asyncio.FIRST_COMPLETED)
        claimed = await self._work.claim_whole(self._queue, BATCH)
        by_address: dict[str, list[ClaimedMessage]] = {}
        for message in claimed:
            by_address.setdefault(message.headers.get(REPLY_TO, ""), []).append(message)
        behind: list[tuple[ClaimedMessage, float, str | None, bool]] = []
        for address in self._sending.keys() & by_address.keys():
            pause_s = self._pauses_s.get(address, PAUSE_S)
            behind += [(message, pause_s, None, False) for message in by_address.pop(address)]
        started = {address: self._start(address, messages) for address, messages in by_address.items()}
        if behind:
            await self._work.retry(behind)
            self._passage.put_off += len(behind)
        if soon := [task for address, task in started.items() if address not in self._pauses_s]:
            await asyncio.wait(soon, timeout=SOON_S)
        return len(claimed)

    def _start(self, address: str, messages: Sequence[ClaimedMessage]) -> asyncio.Task[None]:
        task = self._sending[address] = asyncio.create_task(self._try(address, messages), name="reply")
        task.add_done_callback(lambda _: self._sending.pop(address))
        return task

    async def _try(self, address: str, messages: Sequence[ClaimedMessage]) -> None:
        try:
            await self._send(address, messages)
        except asyncio.CancelledError:
            # Those that are not settled are sent again by somebody else, under the same ids.
            await self._work.give_back(messages)
            raise
        except Exception as error:
            # The outermost loop of an address: whatever it raises belongs to it. Its answers come again soon.
            log.warning("replies.failed", broker=self._broker.name, replies=len(messages), error=repr(error))
            await self._work.give_back(messages, PAUSE_S)

    async def _send(self, address: str, messages: Sequence[ClaimedMessage]) -> None:
        ready: list[tuple[ClaimedMessage, Record]] = []
        not_yet: list[tuple[ClaimedMessage, float, str | None, bool]] = []
        for message in messages:
            try:
                body = await self._body(message)
            except AWAY:
                raise
            except Exception as error:
                # Whatever looking it up stumbles over is this answer's, and holds up none of the others.
                log.warning("replies.not_looked_up", broker=self._broker.name, message=message.id, error=repr(error))
                delay_s = reply_delay(message.attempts + 1)
                if delay_s is None:
                    self._passage.dead += 1
                    await self._work.bury([(message, repr(error))])
                else:
                    not_yet.append((message, delay_s, repr(error), True))
                continue
            if body is None:
                not_yet.append((message, NOT_YET_S, None, False))
            else:
                ready.append((message, _record(message, body)))
        if not_yet:
            await self._work.retry(not_yet)
        if ready:
            receipts = await self._receipts(address, [record for _, record in ready])
            await self._settle([message for message, _ in ready], receipts, self._pauses_s.get(address, PAUSE_S))

    async def _body(self, message: ClaimedMessage) -> bytes | None:
        if _OWED not in message.headers:
            return message.body
        noun, _, resource = message.headers[_OWED].partition(" ")
        return await self._look(message.home, noun, Id(resource))

    async def _receipts(self, address: str, records: Sequence[Record]) -> list[Receipt]:
        try:
            binder = await self._broker.binder()
        except BrokerUnreachable as error:
            self._broker.is_away(str(error))
            return [Failed(str(error), is_retryable=True)] * len(records)
        clock = asyncio.get_running_loop().time
        started = clock()
        receipts = await binder.reply(address, records, deadline_s=DEADLINE_S)
        if clock() - started >= SOON_S and all(map(_is_open, receipts)):
            self._pauses_s[address] = min(2 * self._pauses_s.get(address, PAUSE_S / 2), PAUSE_MAX_S)
        else:
            self._pauses_s.pop(address, None)
        return receipts

    async def _settle(self, messages: Sequence[ClaimedMessage], receipts: Sequence[Receipt], pause_s: float) -> None:
        sent: list[ClaimedMessage] = []
        later: list[tuple[ClaimedMessage, float, str | None, bool]] = []
        dead: list[tuple[ClaimedMessage, str]] = []
        for message, receipt in zip(messages, receipts, strict=True):
            match receipt:
                case Confirmed():
                    sent.append(message)
                case Failed(reason, is_retryable=False):
                    delay_s = reply_delay(message.attempts + 1)
                    if delay_s is None:
                        dead.append((message, f"nobody is at {message.headers.get(REPLY_TO)}: {reason}"))
                    else:
                        later.append((message, delay_s, reason, True))
                case Failed(reason) | Unknown(reason):
                    later.append((message, pause_s, reason, False))
        if sent:
            await self._work.acknowledge(sent)
            self._passage.took_since([message.created_at for message in sent], datetime.now(UTC))
        if later:
            await self._work.retry(later)
            self._passage.retried += len(later)
        self._passage.dead += len(dead)
        if dead:
            log.error("replies.given_up", broker=self._broker.name, replies=len(dead), reason=dead[0][1])
            await self._work.bury(dead)


def _is_open(receipt: Receipt) -> bool:
    return isinstance(receipt, Unknown) or (isinstance(receipt, Failed) and receipt.is_retryable)


def _record(message: ClaimedMessage, body: bytes) -> Record:
    names = (CORRELATION, "content-type", STATUS)
    headers = {name: message.headers[name] for name in names if name in message.headers}
    return Record(message.id, "", body, headers, home=message.home)


def read_address(broker: str, record: Record) -> Address | None:
    """Where the answer to a request goes; None: nobody waits for it. Raises InvariantBroken for what can be no address."""
    reply_to = record.headers.get(REPLY_TO) or record.headers.get("reply-topic") or ""
    if not reply_to:
        return None
    if len(reply_to) > ADDRESS_MAX:
        raise InvariantBroken("The reply address is longer than any queue's name.")
    return Address(broker, reply_to, record.headers.get(CORRELATION))
