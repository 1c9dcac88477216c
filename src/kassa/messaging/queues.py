"""Queues as an operator sees them, whatever is behind them: how they are doing, what died in them, and what to do about it.

Three kinds, one set of commands. `group`: what a group gets of a topic (`payment_order:kassa`), waiting at its brokers and in
our own tables. `outbox`: messages on their way to a broker (`replies:rabbitmq`, a topic of one's own). `log`: a group that
reads the event log with a cursor (`webhooks`, `relay:rabbitmq:kassa.events`); it has no rows of its own but what failed.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

import asyncpg
import msgspec

from kassa.db.queries import load
from kassa.errors import (
    BrokerUnreachable,
    KassaError,
    QueueNotFound,
    QueueNotPausable,
    QueueNotPurgeable,
    RequestInvalid,
)
from kassa.ids import Id, read_event_name, read_id
from kassa.messaging.binder import Elsewhere
from kassa.messaging.binders.postgres import queue_name
from kassa.messaging.broker_names import OURS
from kassa.messaging.brokers import Broker, Brokers
from kassa.messaging.log import LogGroup, event_body
from kassa.messaging.metered import MeteredBinder
from kassa.messaging.model import Place
from kassa.messaging.outbox import INBOX_KEEP
from kassa.messaging.replies import reply_queue
from kassa.messaging.topology import EVENTS, PAYMENT_ORDERS
from kassa.messaging.wake import EVENTS as NEW_EVENTS
from kassa.messaging.wake import MESSAGES, Wakeups
from kassa.messaging.work import DeadLetters, MessageWork

_SQL = load("kassa.messaging")

BROKER_S = 5.0
"""A broker that does not say in that time how much waits there is shown as away."""
PURGE_S = 300.0
HOLDER = Id("0000000000007000800000006f707200")
"""Holds the log groups that are paused; no process has this name."""
AGAIN_MAX = INBOX_KEEP / 2
"""Events older than this are not sent again unasked. Half of the time for which services remember: a repeat may wait as long again
at a broker, for a service that is down."""
_RELAY = "relay:"

Kind = Literal["group", "outbox", "log"]


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """How one queue is doing."""

    name: str
    kind: Kind
    topic: str
    group: str
    brokers: list[str]
    waiting: int
    """Not processed yet: at the brokers, and in our own tables."""
    elsewhere: int | None
    """Of these, messages at brokers, where an envelope is one; None: a broker cannot say, or is away."""
    in_flight: int
    """In somebody's hands, as far as our tables tell; what is in hand from a broker counts as waiting there."""
    delayed: int
    """Not due yet: sent with a delay, or to be tried again."""
    retrying: int
    """Failed before."""
    dead: int
    oldest_s: float | None
    """Age of the oldest one that is due, as far as our tables tell."""
    paused: bool
    is_read: bool | None = None
    """Of a log group: whether a process reads for it now."""
    says: str = ""
    """What keeps us from knowing more."""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """One record that waits."""

    id: str
    key: str
    state: str
    """ready, delayed, in_flight, or of a log group: retry, behind."""
    created_at: datetime
    due: datetime | None
    attempts: int
    reason: str | None
    headers: dict[str, str]
    body: bytes


class Dead(msgspec.Struct, frozen=True, kw_only=True):
    """One record that was given up."""

    id: str
    key: str
    died_at: datetime
    attempts: int
    reason: str
    first_error: str | None
    last_error: str | None
    headers: dict[str, str]
    body: bytes


class Peeked(NamedTuple):
    """The oldest records of a queue, and how many nobody can look at without taking them."""

    records: list[Waiting]
    elsewhere: int | None


class Replayed(NamedTuple):
    """How many were put back, and how many of the same were dead before and still are, because of a limit."""

    replayed: int
    left: int


class Purged(NamedTuple):
    """What was thrown away, and what could not be."""

    gone: int
    left: int


class _Counts(NamedTuple):
    waiting: int = 0
    in_flight: int = 0
    delayed: int = 0
    retrying: int = 0
    oldest_s: float | None = None


class Queues:
    """All queues of an installation."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", brokers: Brokers, wakeups: Wakeups) -> None:
        self._pool = pool
        self._brokers = brokers
        self._wakeups = wakeups
        self._work = MessageWork(pool)
        self._letters = DeadLetters(pool)

    # Looking

    async def all(self, *, connect: bool = True, broker_s: float = BROKER_S) -> list[Queue]:
        """Every queue, by name. connect: whether to open brokers that this process has not opened yet; else what waits there
        is not counted. broker_s: how long a broker may take to say how much waits there."""
        rows = await self._pool.fetch(_SQL.queue_counts)
        counts = {row["topic"]: _Counts._make(tuple(row)[1:]) for row in rows}
        dead = {row["topic"]: row["dead"] for row in await self._pool.fetch(_SQL.dead_counts)}
        groups = {
            (row["topic"], row["group_name"]): row["paused"] for row in await self._pool.fetch(_SQL.subscriptions)
        }
        declared = await self._declared()
        opened = {name: [one for one in some if one.is_open] for name, some in declared.items()}
        is_ours = any(one.named.kind == "postgres" for one in self._brokers)
        names = sorted({*groups, *declared})
        elsewhere = await self._elsewhere(names, declared if connect else opened, broker_s)
        found = [
            _group(
                name, declared.get(name, []), counts, dead, groups.get(name, False), elsewhere.get(name, []), is_ours
            )
            for name in names
        ]
        taken = {one.name for one in found}
        outboxes = {*counts, *dead, *self._outboxes()} - taken
        found += [self._outbox(name, counts, dead) for name in sorted(outboxes)]
        return found + await self._logs()

    async def one(self, name: str) -> Queue:
        """Raises QueueNotFound, which names those that there are."""
        found = await self.all()
        for queue in found:
            if queue.name == name:
                return queue
        known = ", ".join(queue.name for queue in found) or "none yet"
        raise QueueNotFound(f"There is no queue {name}. There are: {known}.", queue=name)

    async def peek(self, name: str, limit: int) -> Peeked:
        """The oldest records, without touching them. What waits at a broker cannot be looked at without being taken."""
        queue = await self.one(name)
        if queue.kind == "log":
            return Peeked(await self._peek_log(name, limit), 0)
        now = await self._pool.fetchval(_SQL.database_time)
        found = await self._work.peek(name, limit)
        records = [
            Waiting(
                id=f"msg_{one.id}", key=one.key,
                state="in_flight" if one.leased_until and one.leased_until > now else "delayed" if one.due > now else "ready",
                created_at=one.created_at, due=one.due, attempts=one.attempts, reason=one.last_error,
                headers=one.headers, body=one.body,
            )
            for one in found
        ]  # fmt: skip
        return Peeked(records, queue.elsewhere)

    async def dead(self, name: str, limit: int) -> list[Dead]:
        """What was given up: newest first, of a log group oldest first. Raises QueueNotFound."""
        queue = await self.one(name)
        if queue.kind == "log":
            return await self._dead_of_log(name, limit)
        return [
            Dead(
                id=f"msg_{one.id}", key=one.key, died_at=one.died_at, attempts=one.attempts, reason=one.reason,
                first_error=one.first_error, last_error=one.last_error, headers=one.headers, body=one.body,
            )
            for one in await self._letters.browse(name, limit)
        ]  # fmt: skip

    # Acting

    async def replay(
        self,
        name: str,
        *,
        ids: Sequence[str] | None = None,
        died_from: datetime | None = None,
        died_to: datetime | None = None,
        per_second: int = 1000,
        limit: int | None = None,
    ) -> Replayed:
        """Puts dead records back: some, those of a time, or all, at most so many a second, and so many at all. What was handled
        already is refused, so a replay changes nothing twice. Raises QueueNotFound, RequestInvalid."""
        queue = await self.one(name)
        # What dies while it runs is not replayed by it, and is not left either.
        now: datetime = await self._pool.fetchval(_SQL.database_time)
        if queue.kind == "log":
            if died_from or died_to:
                raise _invalid("died_from", "a log group is replayed by id or as a whole")
            group, places = LogGroup(self._pool, name), None if ids is None else [_place(id) for id in ids]
            replayed = await _replay_log(group, places, per_second, queue.dead if limit is None else limit)
            self._wakeups.touch(NEW_EVENTS)
            return Replayed(replayed, await group.count_dead(now, places=places) if replayed == limit else 0)
        messages, until = None if ids is None else [_message(id) for id in ids], min(died_to or now, now)
        replayed = await self._letters.replay(
            name, ids=messages, died_from=died_from, died_to=until, per_second=per_second, limit=limit
        )
        self._wakeups.touch(MESSAGES)
        is_at_limit = replayed == limit
        left = await self._letters.count(name, ids=messages, died_from=died_from, died_to=until) if is_at_limit else 0
        return Replayed(replayed, left)

    async def send_again(self, name: str, since: datetime, *, beyond_inboxes: bool = False) -> int:
        """Sends every event since then to a broker again, out of the event log and under the same ids: for what the broker has
        confirmed and somebody has taken from it since. Says how many.

        beyond_inboxes: also what is older than AGAIN_MAX, though a service may handle it twice. Raises QueueNotFound,
        RequestInvalid for what is no relay, and for what is older.
        """
        queue = await self.one(name)
        if queue.kind != "log" or not name.startswith(_RELAY):
            raise _invalid("since", f"{name} is no relay:BROKER:TOPIC, and only events are kept for good")
        if not beyond_inboxes and since < await self._pool.fetchval(_SQL.database_time) - AGAIN_MAX:
            raise _invalid(
                "since",
                f"only the last {AGAIN_MAX.days} days are sent again unasked. Services with kassa.messaging remember what they "
                f"handled for {INBOX_KEEP.days} days, and what is older could have its effect twice in them. If none of those "
                "that get this topic minds, say so: --beyond-inboxes, or beyond_inboxes over HTTP",
            )
        unread = await LogGroup(self._pool, name).rewind(since)
        self._wakeups.touch(NEW_EVENTS)
        return unread

    async def pause(self, name: str) -> None:
        """Nobody gets anything of it until `resume`; what is sent waits. Survives restarts. A reader of the log that is in the
        middle of a batch sends it, and once more after the pause. Raises QueueNotFound, QueueNotPausable."""
        queue = await self._pausable(name)
        if queue.kind == "log":
            await self._pool.execute(_SQL.pause_log_group, name, HOLDER)
        elif await self._pool.fetchval(_SQL.pause_group, queue.topic, queue.group, True) is None:
            # The topic is declared, and no process has made the group yet.
            await self._pool.execute(_SQL.subscribe_group, queue.topic, queue.group)
            await self._pool.execute(_SQL.pause_group, queue.topic, queue.group, True)

    async def resume(self, name: str) -> None:
        """Consumers go on at once, readers of the log within a second. Raises QueueNotFound, QueueNotPausable."""
        queue = await self._pausable(name)
        if queue.kind == "log":
            await self._pool.execute(_SQL.resume_log_group, name, HOLDER)
            self._wakeups.touch(NEW_EVENTS)
        else:
            await self._pool.execute(_SQL.pause_group, queue.topic, queue.group, False)
            self._wakeups.touch(MESSAGES)

    async def purge(self, name: str, *, within_s: float = PURGE_S) -> Purged:
        """Throws away what waits and is in nobody's hands. Raises QueueNotFound, QueueNotPurgeable for a log group: the log
        is kept, and what a group of it does not get is lost to whom it is for; BrokerUnreachable."""
        queue = await self.one(name)
        if queue.kind == "log":
            raise QueueNotPurgeable(
                f"{name} reads the event log, which nobody empties: without its events webhooks and brokers would miss what "
                f"happened to money. `kassa queue pause {name}` stops it; what died in it can be forgotten.",
                queue=name,
            )
        brokers = self._brokers.of_topic(queue.topic) if queue.kind == "group" else []
        # A broker that is away is told before anything is gone.
        binders = [await _elsewhere_of(broker) for broker in brokers]
        gone = await self._work.purge(name)
        for binder in binders:
            if binder is not None:
                gone += await binder.purge_elsewhere(queue.topic, queue.group, within_s)
        try:
            return Purged(gone, (await self.one(name)).waiting)
        except QueueNotFound:
            # It was nowhere but in what is gone now.
            return Purged(gone, 0)

    async def forget_dead(self, name: str) -> int:
        """Throws away what was given up; says how many. Raises QueueNotFound."""
        queue = await self.one(name)
        if queue.kind == "log":
            gone: int = await self._pool.fetchval(_SQL.forget_parked, name)
            return gone
        return await self._letters.purge(name, await self._pool.fetchval(_SQL.database_time))

    # Groups and outboxes

    async def _declared(self) -> dict[tuple[str, str], list[Broker]]:
        """The brokers of each topic and group that the settings name."""
        found: dict[tuple[str, str], list[Broker]] = {}
        for broker in self._brokers:
            for topic in await broker.topology():
                for group in topic.groups:
                    found.setdefault((topic.name, group), []).append(broker)
        return found

    async def _elsewhere(
        self, names: Iterable[tuple[str, str]], brokers: dict[tuple[str, str], list[Broker]], broker_s: float
    ) -> dict[tuple[str, str], list[int | str | None]]:
        """What waits at each broker of each group, or why that is not known. Brokers are asked side by side."""
        found: dict[tuple[str, str], list[int | str | None]] = {name: [] for name in names}

        async def ask(broker: Broker) -> None:
            mine = [name for name in found if broker in brokers.get(name, [])]
            if not mine:
                return
            depths: list[int | str | None]
            try:
                async with asyncio.timeout(broker_s):
                    binder = await _elsewhere_of(broker)
                    depths = [await _depth(binder, *name) for name in mine] if binder else [0] * len(mine)
            except (BrokerUnreachable, TimeoutError) as error:
                depths = [f"{broker.name} does not answer ({_shown(error)})"] * len(mine)
            except KassaError as error:
                # It answers, and refuses: a wrong password, a topology that is not what it should be.
                depths = [f"{broker.name}: {error.detail}"] * len(mine)
            for name, depth in zip(mine, depths, strict=True):
                found[name].append(depth)

        await asyncio.gather(*(ask(broker) for broker in self._brokers))
        return found

    def _outboxes(self) -> Iterator[str]:
        """Those that the settings name: answers to requests, and messages for topics that are not ours."""
        for broker in self._brokers:
            if PAYMENT_ORDERS.name in broker.topics:
                yield reply_queue(broker.name)
            yield from (topic for topic in broker.topics if topic not in OURS)

    def _outbox(self, name: str, counts: dict[str, _Counts], dead: dict[str, int]) -> Queue:
        topic, _, group = name.partition(":")
        brokers = [one.name for one in self._brokers if one.name == group or topic in one.topics]
        mine = counts.get(name, _Counts())
        return Queue(
            name=name, kind="outbox", topic=topic, group=group, brokers=brokers, elsewhere=0, dead=dead.get(name, 0),
            paused=False, **mine._asdict(),
        )  # fmt: skip

    async def _pausable(self, name: str) -> Queue:
        queue = await self.one(name)
        if queue.kind == "outbox":
            raise QueueNotPausable(
                f"{name} is on its way out, and has no group of consumers: stop `kassa worker relay` instead.",
                queue=name,
            )
        return queue

    # Groups of the log

    async def _logs(self) -> list[Queue]:
        found: list[Queue] = []
        for row in await self._pool.fetch(_SQL.log_groups, HOLDER):
            lag = await LogGroup(self._pool, row["name"]).lag()
            ages = [age for age in (row["oldest_s"], *(one.oldest_s for one in lag)) if age is not None]
            broker, topic = _relayed(row["name"])
            found.append(
                Queue(
                    name=row["name"], kind="log", topic=topic, group=row["name"], brokers=broker,
                    waiting=sum(one.behind for one in lag) + row["retrying"] + row["behind"], elsewhere=0, in_flight=0,
                    delayed=row["retrying"] + row["behind"], retrying=row["retrying"], dead=row["dead"],
                    oldest_s=max(ages, default=None), paused=row["paused"], is_read=row["is_read"],
                )
            )  # fmt: skip
        return found

    async def _peek_log(self, name: str, limit: int) -> list[Waiting]:
        group = LogGroup(self._pool, name)
        found = [
            Waiting(
                id=one.event, key=one.root, state="retry" if one.state == "retry" else "behind", created_at=one.parked_at,
                due=one.due if one.state == "retry" else None, attempts=one.attempts, reason=one.reason,
                headers={"ce-type": one.type, "ce-sequence": str(one.sequence)}, body=await self._event(one.event),
            )
            for state in ("retry", "waiting")
            for one in await group.parked(state, limit)
        ][:limit]  # fmt: skip
        unread = await group.read(limit)
        found += [
            Waiting(
                id=one.record.name, key=one.record.root, state="ready", created_at=one.record.at, due=None, attempts=0,
                reason=None, headers={"ce-type": one.record.type, "ce-sequence": str(one.record.sequence)},
                body=event_body(one.record),
            )
            for one in unread[: limit - len(found)]
        ]  # fmt: skip
        return found

    async def _dead_of_log(self, name: str, limit: int) -> list[Dead]:
        return [
            Dead(
                id=one.event, key=one.root, died_at=one.due, attempts=one.attempts, reason=one.reason or "",
                first_error=one.first_reason, last_error=one.reason,
                headers={"ce-type": one.type, "ce-sequence": str(one.sequence)}, body=await self._event(one.event),
            )
            for one in await LogGroup(self._pool, name).parked("dead", limit)
        ]  # fmt: skip

    async def _event(self, name: str) -> bytes:
        place = _place(name)
        row = await self._pool.fetchrow(_SQL.event_data, *place)
        return b"" if row is None else bytes(row["data"])


async def _replay_log(group: LogGroup, places: Sequence[Place] | None, per_second: int, most: int) -> int:
    step = max(1, per_second // 10)
    total = 0
    # No more than were dead when it began: those that die while it runs are not replayed again by it.
    while total < most:
        moved = await group.replay_dead(limit=min(step, most - total), places=places)
        total += moved
        if moved < step:
            break
        await asyncio.sleep(moved / per_second)
    return total


def _group(
    name: tuple[str, str],
    brokers: Sequence[Broker],
    counts: dict[str, _Counts],
    dead: dict[str, int],
    paused: bool,
    depths: Sequence[int | str | None],
    is_ours: bool,
) -> Queue:
    """is_ours: whether PostgreSQL is among the brokers, so that a topic may be used by SQL alone."""
    full = queue_name(*name)
    mine = counts.get(full, _Counts())
    known = sum(depth for depth in depths if isinstance(depth, int))
    says = "; ".join(depth for depth in depths if isinstance(depth, str))
    if not brokers and not is_ours:
        says = f"no broker that the settings name carries {name[0]}"
    return Queue(
        name=full, kind="group", topic=name[0], group=name[1], brokers=[one.name for one in brokers],
        elsewhere=known if all(isinstance(depth, int) for depth in depths) else None,
        dead=dead.get(full, 0), paused=paused, says=says, **mine._replace(waiting=mine.waiting + known)._asdict(),
    )  # fmt: skip


async def _elsewhere_of(broker: Broker) -> Elsewhere | None:
    """The broker's binder, if it keeps records outside of our tables. Raises BrokerUnreachable."""
    binder = await broker.binder()
    inner = binder.inner if isinstance(binder, MeteredBinder) else binder
    return inner if isinstance(inner, Elsewhere) else None


async def _depth(binder: Elsewhere, topic: str, group: str) -> int | None:
    try:
        return await binder.depth_elsewhere(topic, group)
    except QueueNotFound:
        # Nobody has made it there yet, so nothing waits.
        return 0


def _relayed(name: str) -> tuple[list[str], str]:
    """The broker and topic of a relay's group; another one reads events for Kassa itself."""
    if not name.startswith(_RELAY):
        return [], EVENTS.name
    broker, _, topic = name.removeprefix(_RELAY).partition(":")
    return [broker], topic


def _shown(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else getattr(error, "detail", "") or str(error)


def _invalid(field: str, message: str) -> RequestInvalid:
    return RequestInvalid(f"{field}: {message}.", errors=[{"field": field, "message": message}])


def _message(name: str) -> Id:
    inner = read_id("msg_", name)
    if inner is None:
        raise _invalid("ids", f"{name} is no name of a dead letter of this queue; they look like msg_…")
    return inner


def _place(name: str) -> Place:
    place = read_event_name(name)
    if place is None:
        raise _invalid("ids", f"{name} is no name of an event; they look like evt_…")
    return Place(*place)
