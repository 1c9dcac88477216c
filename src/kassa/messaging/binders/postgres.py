"""The binder that needs no broker: queues are rows in PostgreSQL, one queue per topic and group.

A record is copied into the queue of each group of its topic, in one commit. Everything is native here: delays,
priorities, attempts, dead letters, pausing, depth; and the commit of the effect is the acknowledgement.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable, Container, Coroutine, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import asyncpg
import structlog
from msgspec.structs import replace

from kassa.db.away import AWAY
from kassa.db.queries import load
from kassa.errors import BrokerUnreachable, InvariantBroken, QueueNotFound, SettingInvalid
from kassa.ids import Id, time_digits
from kassa.messaging.binder import Resources
from kassa.messaging.lookout import Lookout
from kassa.messaging.model import (
    PRIORITY_MAX,
    Ack,
    Confirmed,
    Dead,
    Delivery,
    Depth,
    Failed,
    Receipt,
    Record,
    RetryAfter,
    Settlement,
    Traits,
    Unknown,
)
from kassa.messaging.topology import Topic
from kassa.messaging.wake import MESSAGES, POLL_S, Wakeups, Watch
from kassa.messaging.work import (
    ClaimedMessage,
    Columns,
    Leased,
    MessageWork,
    OutgoingMessage,
    ParkedMessage,
    written,
)
from kassa.observability.meters import Meters

T = TypeVar("T")

_SQL = load("kassa.messaging")

log = structlog.get_logger("kassa.messaging.postgres")

HELD_MAX_S = 1800.0
"""What is in hand longer than this is extended no more, so that a handler that hangs for ever does not keep its key for ever.
RabbitMQ lets a consumer have a message as long (`consumer_timeout`)."""
LOOKS = 6
"""How often in a lease it is looked which ones have to begin anew: what a third is over of has three looks more until its end."""
CLAIM_S = 5.0
"""A claim that is under way when a consumer closes takes milliseconds, unless the database is away."""
AHEAD_S, AHEAD_MIN = POLL_S, 50
"""What is claimed while the last batch is handled goes back after so long: a slow handler keeps it from nobody, nor anybody from
what is more urgent, and a pause holds by then. Who is killed leaves both under their leases. Smaller batches are not worth it."""
AHEAD_SKIPPED_MAX = 63
"""Where that was in vain it is left alone for a while, for twice as many batches each time."""
TOPICS_KEPT_MAX = 1000
"""Whose queues are remembered, where addresses for answers are topics and come and go."""
RECORD_HEADER = "kassa-record"
"""The record's own id, which may be anything; the row's is derived from it and the queue."""
TRAITS = Traits(
    durable=True, ordered=True, delay_max_s=10 * 365 * 86400.0, priorities=10, dead_letters=True, counts_attempts=True,
    acknowledges_in_change=True, deduplicates=True, batch_max=1000, bytes_max=64 * 1024 * 1024, reports_depth=True,
    request_reply=True,
)  # fmt: skip

_CONFIRMED = Confirmed()

_REFUSED = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    ValueError,
    OverflowError,
)
"""What is wrong with a record, and not with the database: also a key that is too long for an index."""


def make_binder(url: str, resources: Resources) -> "PostgresBinder":
    """The registry's way in. The database is Kassa's own, so `url` says nothing more."""
    return PostgresBinder(resources.pool, resources.wakeups, topics=resources.topics, meters=resources.meters)


def queue_name(topic: str, group: str) -> str:
    """The queue of a group: what `kassa queue` and the dead letters show."""
    return f"{topic}:{group}"


def ahead_s(lease_s: float) -> float:
    """How long before it is handed out a message may have been claimed."""
    return min(AHEAD_S, lease_s / 4)


def message_ids(queue: str, records: Iterable[str]) -> list[Id]:
    """The rows of records in a queue: the same each time, so that a record which is sent again is there once."""
    of_queue = hashlib.sha256(f"{queue}\0".encode())
    return [_id(of_queue, record) for record in records]


class Parked(NamedTuple):
    """A record of a broker that waits in our own queue."""

    record: Record
    delay_s: float = 0.0
    attempts: int = 0
    """Failed ones."""
    reason: str | None = None
    lapses: int = 0
    """How many had it in hand and ended."""


class PostgresBinder:
    """Queues in PostgreSQL."""

    name = "postgres"
    traits = TRAITS

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        wakeups: Wakeups,
        *,
        lease_s: float = 60.0,
        held_max_s: float = HELD_MAX_S,
        topics: Sequence[Topic] = (),
        meters: Meters | None = None,
    ) -> None:
        """lease_s: after how long what somebody had who ended comes again. held_max_s: how long who lives keeps what he has,
        and up to a lease more. topics: those without groups are for whoever is interested, so that nobody is may be. meters:
        where what is given up for its lapses is counted; all else is counted at the port."""
        self._pool = pool
        self._open = {topic.name for topic in topics if not topic.groups}
        self._wakeups = wakeups
        self._queues: dict[str, list[str]] = {}
        """Of each topic that was sent to, as they were then."""
        self._held_max_s = held_max_s
        self._work = MessageWork(pool, lease_s=lease_s, meters=meters)
        self._lookout = Lookout(self._work, wakeups)

    async def open(self) -> None:
        """Nothing to connect: the pool does that."""

    async def close(self) -> None:
        """The pool is not ours."""
        await self._lookout.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def provision(self, topics: Sequence[Topic], *, verify_only: bool = False) -> list[str]:
        """One row per topic and group."""
        said: list[str] = []
        for topic in topics:
            there = set(await self._groups(topic.name))
            for group in topic.groups:
                if group in there:
                    continue
                if verify_only:
                    said.append(f"missing: {queue_name(topic.name, group)}")
                elif await self._subscribe_group(topic.name, group):
                    said.append(f"created: {queue_name(topic.name, group)}")
        return said

    async def _subscribe_group(self, topic: str, group: str) -> bool:
        """Whether it is new. Raises SettingInvalid."""
        try:
            return await self._pool.fetchval(_SQL.subscribe_group, topic, group) is not None
        except asyncpg.InsufficientPrivilegeError as error:
            raise SettingInvalid(f"PostgreSQL: {error}. Provision with a role that may, or only verify.") from None

    async def send(self, topic: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """One commit for the batch; if one record cannot be stored, each by itself."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self._send(topic, records)
        except AWAY as error:
            # The commit may have happened before the connection went.
            return [Unknown(type(error).__name__)] * len(records)

    async def reply(self, address: str, records: Sequence[Record], *, deadline_s: float) -> list[Receipt]:
        """An address is a topic here."""
        return await self.send(address, records, deadline_s=deadline_s)

    async def subscribe(
        self, topic: str, group: str, *, is_in_hand: Callable[[int], bool] | None = None
    ) -> "PostgresSubscription":
        """A consumer of the group's queue. is_in_hand: as of `PostgresSubscription`."""
        await self._require(topic, group)
        return PostgresSubscription(
            self._work, self._lookout, queue_name(topic, group), held_max_s=self._held_max_s, is_in_hand=is_in_hand
        )

    async def pause(self, topic: str, group: str) -> None:
        """Kept in the database, so it holds for every process and over restarts."""
        await self._set_paused(topic, group, True)

    async def resume(self, topic: str, group: str) -> None:
        """Consumers go on at once."""
        await self._set_paused(topic, group, False)
        self._lookout.wake(queue_name(topic, group))
        self._wakeups.touch(MESSAGES)

    async def depth(self, topic: str, group: str) -> Depth:
        """Counted, so not for every second on a long queue."""
        await self._require(topic, group)
        for queue in await self._work.queues(queue_name(topic, group)):
            return Depth(queue.depth, queue.in_flight, queue.delayed, queue.dead, queue.oldest_s)
        return Depth(0, 0, 0, 0, None)

    async def lapse(self, leases: Iterable[int]) -> None:
        """Who had these ended with what was in hand: to be handed out again at once, and counted. Raises as asyncpg does."""
        await self._work.lapse(leases)
        self._wakeups.touch(MESSAGES)

    # What `supplied.py` keeps here for other brokers

    async def park(self, topic: str, group: str, parked: Sequence[Parked]) -> None:
        """Kept in the group's queue until their time has come.

        Raises BrokerUnreachable when the database is away: nothing was kept, or nobody knows.
        """
        queue = queue_name(topic, group)
        rows = [
            ParkedMessage(_row(queue, replace(one.record, delay_s=one.delay_s)), one.attempts, one.reason, one.lapses)
            for one in parked
        ]
        try:
            await self._work.park(queue, rows)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        self._lookout.wake(queue)
        self._wakeups.touch(MESSAGES)

    async def bury(self, topic: str, group: str, dead: Sequence[tuple[Record, int, str]]) -> None:
        """(record, attempts, reason): to the dead letters of the group's queue. Raises BrokerUnreachable."""
        queue = queue_name(topic, group)
        rows = [ParkedMessage(_row(queue, record), attempts, reason) for record, attempts, reason in dead]
        try:
            await self._work.bury_records(queue, rows)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error

    async def parked_keys(self, topic: str, group: str, keys: Sequence[str]) -> set[str]:
        """Which of these keys have something that waits in the group's queue. Raises BrokerUnreachable."""
        try:
            return await self._work.parked_keys(queue_name(topic, group), keys)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error

    async def is_empty(self, topic: str, group: str) -> bool:
        """Whether nothing at all waits in the group's queue, nor is in hand from there. Raises BrokerUnreachable."""
        try:
            return await self._work.is_empty(queue_name(topic, group))
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error

    async def suspect(self, topic: str, group: str, names: Sequence[str]) -> list[int]:
        """Packets of these names are handed out to somebody; how often each was before, without being cleared. Raises
        BrokerUnreachable."""
        ids = message_ids(queue_name(topic, group), names)
        try:
            rows = await self._pool.fetch(_SQL.suspect, list(set(ids)))
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        before = {Id(row["id"].hex): row["before"] for row in rows}
        return [before[id] for id in ids]

    async def clear(self, topic: str, group: str, names: Sequence[str]) -> None:
        """Whoever had these has lived. Raises BrokerUnreachable."""
        try:
            await self._pool.execute(_SQL.clear_suspects, message_ids(queue_name(topic, group), names))
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error

    async def is_paused(self, topic: str, group: str) -> bool:
        """Whether the group gets nothing for now. Raises BrokerUnreachable, QueueNotFound."""
        try:
            paused: bool | None = await self._pool.fetchval(_SQL.group_paused, topic, group)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        if paused is None:
            raise QueueNotFound(topic=topic, group=group)
        return paused

    async def next_due_s(self, topic: str, group: str) -> float | None:
        """Seconds until something in the group's queue is due (≤ 0: now); None when nothing waits."""
        try:
            return await self._work.next_due(queue_name(topic, group))
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error

    async def _send(self, topic: str, records: Sequence[Record]) -> list[Receipt]:
        try:
            queues = await self._insert(topic, records)
        except _REFUSED as error:
            if len(records) <= 1:
                return [Failed(str(error), is_retryable=False)] * len(records)
            middle = len(records) // 2
            return await self._send(topic, records[:middle]) + await self._send(topic, records[middle:])
        if queues:
            for queue in queues:
                self._lookout.wake(queue)
            self._wakeups.touch(MESSAGES, len(records))
        elif topic not in self._open:
            return [Failed(f"nobody receives {topic}", is_retryable=False)] * len(records)
        return [_CONFIRMED] * len(records)

    async def _insert(self, topic: str, records: Sequence[Record]) -> list[str]:
        """The queues that have them now. Which queues a topic has is remembered, and the statement that inserts looks whether that
        is still so: a group that is new gets what is sent from then on, and nobody has to ask first."""
        while True:
            # Until no group comes or goes meanwhile; the sender's deadline ends it.
            believed = self._queues.get(topic, [])
            queues = await self._work.send(topic, believed, _columns(believed, records))
            if queues == believed:
                return queues
            if len(self._queues) >= TOPICS_KEPT_MAX:
                self._queues.clear()
            self._queues[topic] = queues

    async def _groups(self, topic: str) -> list[str]:
        return [row["group_name"] for row in await self._pool.fetch(_SQL.groups_of_topic, topic)]

    async def _require(self, topic: str, group: str) -> None:
        try:
            if group in await self._groups(topic):
                return
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        raise QueueNotFound(topic=topic, group=group)

    async def _set_paused(self, topic: str, group: str, is_paused: bool) -> None:
        if await self._pool.fetchval(_SQL.pause_group, topic, group, is_paused) is None:
            raise QueueNotFound(topic=topic, group=group)


class _Ahead(NamedTuple):
    """The batch after the one that is being handled."""

    claiming: "asyncio.Task[list[ClaimedMessage]]"
    limit: int
    """As many as it was claimed for."""
    until: asyncio.TimerHandle
    """When it goes back, if nobody has come for it."""


class PostgresSubscription:
    """Claims messages of one queue under a lease, which is what an epoch is here.

    A consumer that waits, and gets full batches and handles them quickly, has the next one claimed meanwhile: handler and database
    work side by side. Nothing is handed out that was claimed long before.

    What was handed out stays the consumer's while this process lives, however long its handlers take, up to a bound.
    """

    def __init__(
        self,
        work: MessageWork,
        lookout: Lookout,
        queue: str,
        *,
        held_max_s: float = HELD_MAX_S,
        is_in_hand: Callable[[int], bool] | None = None,
    ) -> None:
        """held_max_s: a lease that was claimed longer ago is extended no more. is_in_hand: whether whoever was handed something
        under a lease is known to have it; None: he is in this process, and has."""
        self._work = work
        self._held_max_s = held_max_s
        self._is_in_hand = is_in_hand
        self._lookout = lookout
        self._queue = queue
        self._waits: set[Watch] = set()
        self._is_closed = False
        self._held: dict[Id, ClaimedMessage] = {}
        self._drained = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        """Extends what is held; only while something is, or was a moment ago."""
        self._claims: set[asyncio.Task[Any]] = set()
        """Claims under way, and what gives back those that nobody waits for any more."""
        self._ahead: _Ahead | None = None
        self._given_at = -math.inf
        """When the last batch was handed out."""
        self._skipped, self._to_skip = 0, 0
        """How many batches nothing was claimed ahead for after it was in vain, and for how many more."""

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        return [_delivery(message) for message in await self.claim(limit, wait_s)]

    async def claim(self, limit: int, wait_s: float) -> list[ClaimedMessage]:
        """Looks, unless it waits and is known to be in vain, and waits until a look is worth it. Raises BrokerUnreachable."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        is_quick = clock() - self._given_at < AHEAD_S
        watch = Watch()
        self._waits.add(watch)
        try:
            claimed = await self._take_ahead(limit)
            while not claimed and not self._is_closed:
                if wait_s <= 0 or self._lookout.begin(self._queue):
                    claimed = await self._look(limit)
                left_s = deadline - clock()
                if claimed or left_s <= 0:
                    break
                await self._lookout.wait(self._queue, watch, left_s)
        except AWAY as error:
            raise BrokerUnreachable(broker="postgres") from error
        finally:
            self._waits.discard(watch)
        if claimed:
            self._given_at = clock()
            if wait_s > 0 and is_quick and len(claimed) == limit >= AHEAD_MIN:
                await self._look_ahead(limit, claimed)
        return claimed

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        """One statement per kind of end. A lost connection leaves the leases to run out."""
        acked: list[ClaimedMessage] = []
        failed: list[tuple[ClaimedMessage, float, str | None, bool]] = []
        dead: list[tuple[ClaimedMessage, str]] = []
        messages = [_message(delivery) for delivery, _ in settled]
        for message, (_, end) in zip(messages, settled, strict=True):
            match end:
                case Ack():
                    acked.append(message)
                case RetryAfter(delay_s, reason, counts):
                    failed.append((message, delay_s, reason, counts))
                case Dead(reason):
                    dead.append((message, reason))
        done = await self.end(acked, failed, dead)
        return [message.id in done for message in messages]

    async def end(
        self,
        acked: Sequence[Leased],
        failed: Sequence[tuple[Leased, float, str | None, bool]],
        dead: Sequence[tuple[Leased, str]],
    ) -> set[Id]:
        """As `settle`, of whatever says which message it is; those that were ours."""
        for one in chain(acked, (message for message, *_ in failed), (message for message, _ in dead)):
            self._held.pop(one.id, None)
        done: set[Id] = set()
        try:
            # The dead go first: what waited behind them is free when the retries are counted.
            done |= await self._work.bury(dead) if dead else set()
            done |= await self._work.retry(failed) if failed else set()
            done |= await self._work.acknowledge(acked) if acked else set()
        except AWAY:
            pass
        self._lookout.settled(self._queue, is_given_back=bool(failed))
        if not self._held:
            self._drained.set()
        return done

    async def close(self, drain_s: float) -> None:
        """Gives back what is still held when the time is over; what the database does not take back, its lease does."""
        self._is_closed = True
        for watch in self._waits:
            watch.set()
        self._leave_ahead()
        try:
            if self._claims:
                await asyncio.wait(self._claims, timeout=CLAIM_S)
            if self._held:
                self._drained.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(drain_s):
                        await self._drained.wait()
        finally:
            # Also when it is cancelled: nobody would end it any more.
            if self._keeping is not None:
                self._keeping.cancel()
        if self._held:
            await self._work.give_back(self._held.values())
            self._held.clear()
            self._lookout.wake(self._queue)
        self._lookout.forget(self._queue)

    async def release(self, claimed: Sequence[Leased]) -> None:
        """These were handed to nobody: as if they had never been claimed."""
        for one in claimed:
            self._held.pop(one.id, None)
        if claimed:
            await self._work.release(claimed)
            self._lookout.wake(self._queue)
        if not self._held:
            self._drained.set()

    def forgo(self, deliveries: Sequence[Delivery]) -> None:
        """Whoever should get these was cancelled: they are released in the background."""
        self._follow(self.release([_message(delivery) for delivery in deliveries]))

    def let_go(self, *, but: Container[Id]) -> None:
        """All but these are settled somewhere else, under the lease that they have: `close` does not give them back."""
        self._held = {id: message for id, message in self._held.items() if id in but}

    async def _look(self, limit: int) -> list[ClaimedMessage]:
        """Goes on when who asks is cancelled: the answer would be lost, and what was claimed would wait for its lease."""
        claiming = self._follow(self._claim_to_the_end(limit))
        try:
            claimed = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            self._follow(self._forgo(claiming))
            raise
        except BaseException:
            # Raised again. Nobody knows what is there, so whoever waits for this queue looks for himself.
            self._lookout.wake(self._queue)
            raise
        if claimed:
            self._lookout.found(self._queue)
        return claimed

    async def _claim_to_the_end(self, limit: int) -> list[ClaimedMessage]:
        claimed = await self._work.claim(self._queue, limit)
        if claimed and self._is_closed:
            await self.release(claimed)
            return []
        self._hold(claimed)
        return claimed

    def _hold(self, claimed: Sequence[ClaimedMessage]) -> None:
        self._held.update((message.id, message) for message in claimed)
        if claimed and self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(), name="extend leases")

    async def _keep(self) -> None:
        try:
            while self._held:
                await asyncio.sleep(self._work.lease_s / LOOKS)
                await self._extend()
        finally:
            self._keeping = None

    async def _extend(self) -> None:
        leases = {message.lease for message in self._held.values()}
        if self._is_in_hand is not None:
            leases = set(filter(self._is_in_hand, leases))
        try:
            await self._work.extend(leases, self._held_max_s)
        except AWAY as error:
            log.info("postgres.not_extended", queue=self._queue, reason=type(error).__name__)
        except Exception:
            # The outermost loop: without it nothing would be extended any more.
            log.exception("postgres.not_extended", queue=self._queue)

    async def _forgo(self, claiming: asyncio.Task[list[ClaimedMessage]]) -> None:
        try:
            with suppress(*AWAY):
                await self.release([message for message in await claiming if message.id in self._held])
        finally:
            self._lookout.wake(self._queue)

    async def _look_ahead(self, limit: int, claimed: Sequence[ClaimedMessage]) -> None:
        """Its statement is on the way when this returns; else it would be when whoever gets `claimed` waits for something."""
        if self._ahead is not None or self._is_closed:
            return
        if self._to_skip:
            self._to_skip -= 1
            return
        until = asyncio.get_running_loop().call_later(ahead_s(self._work.lease_s), self._leave_ahead)
        self._ahead = _Ahead(self._follow(self._claim_ahead(limit)), limit, until)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._follow(self.release(claimed))
            self._leave_ahead()
            raise

    async def _claim_ahead(self, limit: int) -> list[ClaimedMessage]:
        """Nothing if the database is away: whoever looks next says so."""
        try:
            claimed = await self._work.claim(self._queue, limit, windows=1)
        except AWAY:
            return []
        if claimed and claimed[0].alone:
            # It may end whoever has it in hand, and it would count for what he has besides.
            await self.release(claimed)
            return []
        return claimed

    async def _take_ahead(self, limit: int) -> list[ClaimedMessage]:
        """Nothing if nothing was claimed ahead, or too long ago. Who has come in time gets it, however long the claim takes."""
        ahead = self._ahead
        if ahead is None:
            return []
        if not ahead.until.cancelled() and asyncio.get_running_loop().time() >= ahead.until.when():
            self._leave_ahead()
            return []
        ahead.until.cancel()
        try:
            claimed = await asyncio.shield(ahead.claiming)
        except BaseException:
            # Raised again. Also to who is cancelled: nobody would come for it.
            if self._ahead is ahead:
                self._leave_ahead()
            raise
        if self._ahead is not ahead:
            return []
        if not claimed:
            self._leave_ahead()
            return []
        self._end_ahead(is_in_vain=min(limit, len(claimed)) < ahead.limit)
        self._hold(claimed[:limit])
        self._lookout.found(self._queue)
        if len(claimed) > limit:
            self._follow(self.release(claimed[limit:]))
        return claimed[:limit]

    def _leave_ahead(self) -> None:
        """What was claimed ahead goes back, and whoever comes next looks for himself."""
        if self._ahead is not None:
            self._follow(self._put_back(self._ahead.claiming))
            self._ahead.until.cancel()
            self._end_ahead(is_in_vain=True)
            self._lookout.wake(self._queue)

    def _end_ahead(self, *, is_in_vain: bool) -> None:
        """is_in_vain: it was no full batch, so that the next look would have got more."""
        self._ahead = None
        self._skipped = min(AHEAD_SKIPPED_MAX, 2 * self._skipped + 1) if is_in_vain else 0
        self._to_skip = self._skipped

    async def _put_back(self, claiming: asyncio.Task[list[ClaimedMessage]]) -> None:
        try:
            claimed = await claiming
        except Exception:
            # Whatever it is: whoever looks next is told.
            return
        await self.release(claimed)

    def _follow(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._claims.add(task)
        task.add_done_callback(self._claims.discard)
        return task


def _id(of_queue: "hashlib._Hash", record: str) -> Id:
    hash = of_queue.copy()
    hash.update(record.encode())
    digits = hash.hexdigest()
    # Where the record's id says when it was made, so does the row's: new rows then lie side by side in the index.
    return Id(f"{time_digits(record) or digits[:12]}8{digits[13:16]}8{digits[17:32]}")


def _columns(queues: Sequence[str], records: Sequence[Record]) -> Columns:
    """Each record in each queue. By columns, without a row of each: a send takes a quarter less processor time so."""
    times = len(queues)
    return Columns(
        [id for queue in queues for id in message_ids(queue, [one.id for one in records])],
        [str(one.home) for one in records] * times,
        [str(place) for place in range(1, times + 1) for _ in records],
        [str(_priority(one)) for one in records] * times,
        [repr(one.delay_s) for one in records] * times,
        [one.key for one in records] * times,
        [written({**one.headers, RECORD_HEADER: one.id}) for one in records] * times,
        [one.body for one in records] * times,
    )


def _row(queue: str, record: Record) -> OutgoingMessage:
    id = message_ids(queue, [record.id])[0]
    headers = {**record.headers, RECORD_HEADER: record.id}
    return OutgoingMessage(
        id, record.home, queue, record.key, _priority(record), record.delay_s, headers, record.body
    )  # fmt: skip


def _priority(record: Record) -> int:
    """One beyond these would be claimed by nobody, and hold up its key for ever."""
    return min(max(record.priority, 0), PRIORITY_MAX)


def as_record(message: ClaimedMessage) -> Record:
    """What was sent. To be asked once of a message: its headers go with the record."""
    id = message.headers.pop(RECORD_HEADER, message.id)
    return Record(id, message.key, message.body, message.headers, message.priority, 0.0, message.home)


def _delivery(message: ClaimedMessage) -> Delivery:
    record = as_record(message)
    return Delivery(
        record, message.attempts, message.created_at, message, message.lease, (message.done,), message.alone
    )


def _message(delivery: Delivery) -> ClaimedMessage:
    if not isinstance(delivery.token, ClaimedMessage):
        raise InvariantBroken("A delivery of another binder was settled here.", record=delivery.record.id)
    return delivery.token
