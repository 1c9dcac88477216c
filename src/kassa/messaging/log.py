"""The event log and its readers: groups with a cursor per writer, which keep a root's order across writers.

A writer's events become visible in the order of their numbers, so `seq > cursor` loses nothing there. Across writers
a record waits until its root's previous one was read. A record that fails is parked, and its root with it: later
records of the root queue up behind it while everybody else goes on.
"""

import asyncio
import random
import re
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import asyncpg
import msgspec
import structlog

from kassa.clock import rfc3339
from kassa.db.queries import load
from kassa.errors import KassaError, Retry
from kassa.ids import Id, event_name, new_id
from kassa.messaging.ladder import message_delay
from kassa.messaging.model import LogRecord, Place
from kassa.messaging.order import in_waves
from kassa.messaging.pace import LOOK_S, Pace
from kassa.messaging.work import shortened

_SQL = load("kassa.messaging")

log = structlog.get_logger("kassa.messaging.log")

PAGE = 500
"""Events per writer and reading: about a megabyte."""
PAGE_MIN = 10
"""Where a destination does not take a page in time, the next is half as large, down to this: so a slow one, too, gets on."""
SKIM_PAGE = 5000
"""Events per writer that are looked over at a time, for a reader that can tell by the home whether it needs them."""
HOLD_S = 15.0
"""A reader that dies is followed by another after so long; one that is alive renews its hold three times as often."""
STEP_S = 0.02
BUSY_MIN = 20
"""Where a reading finds so many events, the next begins no sooner than so long after: each costs a handful of statements. Below
a thousand events a second nothing waits."""
PARKED_LOOK_S = 0.1
"""While there are new events, parked ones are looked for so often: those that are due have waited for seconds."""
HALT_S = 0.2
HALT_MAX_S = 5.0
"""Pauses while a destination is away; the cursor stays where it is, so nothing needs to be parked."""
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(9999, 1, 1, tzinfo=UTC)


class Unread(NamedTuple):
    """An event that a group has not handled yet."""

    record: LogRecord
    previous: Place | None
    """Its root's previous event."""
    is_parked: bool
    """Whether an earlier one of its root is parked."""


class Skimmed(NamedTuple):
    """The next events of one writer for a group, looked over."""

    end: Place
    events: int
    homes: list[int]


class Halt(Exception):
    """The destination is away: stop here, keep the cursor, try the same again later. Nothing is counted or parked."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


Handler = Callable[[Sequence[LogRecord]], Awaitable[Sequence[str | None]]]
"""Handles records, at most one of each root; says per record why it failed, None where it did not. May be given a
record again after a crash, so its effect must carry an inbox key or a name derived from the event. Raises Halt."""

Concern = Callable[[Sequence[int]], Awaitable[bool]]
"""Whether events of any of these homes concern a group at present."""


# The pure part


def merge(unread: Sequence[Unread], page: int) -> list[Unread]:
    """Records in an order in which each stands behind its root's previous one. `unread` is sorted by place.

    What has to wait for a record that was not read yet (a writer's page was full) is left for the next reading, with
    all that its writer wrote after it. Some writer can always go on: waiting in a circle would need commits before
    each other.
    """
    queues: dict[int, deque[Unread]] = {}
    for one in unread:
        queues.setdefault(one.record.place.writer, deque()).append(one)
    is_full = {writer: len(queue) >= page for writer, queue in queues.items()}
    last = {writer: queue[-1].record.place for writer, queue in queues.items()}

    def was_read(place: Place | None) -> bool:
        if place is None or place.writer not in queues:
            return True
        queue = queues[place.writer]
        if queue:
            return place < queue[0].record.place
        return place <= last[place.writer] or not is_full[place.writer]

    merged: list[Unread] = []
    progress = True
    while progress:
        progress = False
        for queue in queues.values():
            while queue and was_read(queue[0].previous):
                merged.append(queue.popleft())
                progress = True
    return merged


def root_of(record: LogRecord) -> tuple[int, Id]:
    """Whose order the record belongs to."""
    return record.home, record.root


def ends(records: Sequence[Unread]) -> list[Place]:
    """The last place of each writer among records that are in each writer's order."""
    last: dict[int, Place] = {}
    for one in records:
        last[one.record.place.writer] = one.record.place
    return sorted(last.values())


_PREFIX_MAX = 4
_ROOT_PREFIXES = {"payment": "pay_", "refund": "pay_", "topup": "top_", "wallet": "wal_", "webhook_endpoint": "whe_"}


def root_name(record: LogRecord) -> str:
    """The root's public name: as the object itself says it, else by the event's noun."""
    place = record.data.find(b"_" + record.root.encode() + b'"')
    start = record.data.rfind(b'"', max(0, place - _PREFIX_MAX - 1), max(0, place))
    prefix = record.data[start + 1 : place]
    if place > 0 and start >= 0 and prefix.isalpha() and prefix.islower():
        return f"{prefix.decode()}_{record.root}"
    return _ROOT_PREFIXES.get(record.type.partition(".")[0], "") + record.root


class EventItem(msgspec.Struct, frozen=True):
    """An event as the API shows it, webhooks carry it and brokers get it."""

    id: str
    type: str
    root: str
    sequence: int
    timestamp: str
    data: msgspec.Raw


def event_item(record: LogRecord) -> EventItem:
    """The event as everybody outside sees it."""
    return EventItem(
        record.name, record.type, root_name(record), record.sequence, rfc3339(record.at), msgspec.Raw(record.data)
    )


def event_body(record: LogRecord) -> bytes:
    """The event as JSON: the body of its webhook."""
    return msgspec.json.encode(event_item(record))


# Reading for people


class EventLog:
    """Events by home, root, time and name."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def groups(self) -> list[str]:
        """The names of all groups that read the log."""
        return [row["name"] for row in await self._pool.fetch(_SQL.group_names)]

    async def of_home(
        self,
        home: int,
        limit: int,
        *,
        before: LogRecord | None = None,
        since: datetime = EARLIEST,
        until: datetime = LATEST,
        type_: str | None = None,
    ) -> list[LogRecord]:
        """A page of a home's events, newest first. type_: `payment.succeeded`, or `payment.*` for a noun."""
        at, place = (before.at, before.place) if before else (until, Place(0, 0, 0))
        like = None if type_ is None else type_.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        pattern = None if like is None else re.sub(r"\*$", "%", like)
        rows = await self._pool.fetch(_SQL.events_of_home, home, at, *place, since, pattern, limit)
        return [_record(row) for row in rows]

    async def of_time(
        self, home: int, since: datetime, until: datetime, limit: int, *, after: LogRecord | None = None
    ) -> list[LogRecord]:
        """A page of a home's events from `since` (included) to `until` (not included), oldest first."""
        at, place = (after.at, after.place) if after else (since, Place(-1, -1, -1))
        rows = await self._pool.fetch(_SQL.events_of_time, home, at, *place, until, limit)
        return [_record(row) for row in rows]

    async def of_root(self, home: int, root: Id, *, after: int = 0, limit: int = 1000) -> list[LogRecord]:
        """A root's events in their order, from a sequence on."""
        rows = await self._pool.fetch(_SQL.events_of_root, home, root, after, limit)
        return [_record(row) for row in rows]

    async def event(self, home: int, place: Place) -> LogRecord | None:
        """One event; None when there is none or it is another home's."""
        row = await self._pool.fetchrow(_SQL.event_by_place, *place, home)
        return None if row is None else _record(row)


# Reading for groups


class ParkedRecord(NamedTuple):
    """A record that waits in a group, for operators."""

    home: int
    root: Id
    sequence: int
    attempts: int
    due: datetime
    parked_at: datetime
    first_reason: str | None
    reason: str | None
    state: str
    """retry, waiting (behind another one of its root) or dead."""
    event: str
    type: str


class Lag(NamedTuple):
    """How far a group is behind one writer."""

    writer: int
    behind: int
    oldest_s: float | None


class LostGroup(KassaError):
    """Another process reads for this group now."""

    code, retry = "log.lost_group", Retry.LATER


class LogGroup:
    """A group of readers of the event log. One process at a time reads for it."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", name: str, *, hold_s: float = HOLD_S) -> None:
        self.name = name
        self.hold_s = hold_s
        self._pool = pool
        self._holder = new_id()

    async def create(self, *, from_now: bool) -> bool:
        """Makes the group if there is none; it begins with the first event ever, or with the next one."""
        async with self._pool.acquire() as connection, connection.transaction():
            is_new = await connection.fetchval(_SQL.create_group, self.name) is not None
            if is_new and from_now:
                await connection.execute(_SQL.start_group_now, self.name)
        return is_new

    async def heads(self) -> list[Place]:
        """The end of each writer's part of the log, as it is now."""
        return [Place(*row) for row in await self._pool.fetch(_SQL.log_heads)]

    async def skip(self, heads: Sequence[Place]) -> None:
        """The group is not interested in what is before these places."""
        if heads:
            await self._pool.execute(
                _SQL.advance_cursors, self.name, *(list(part) for part in zip(*heads, strict=True))
            )

    async def hold(self) -> bool:
        """Whether this process reads for the group, for the next `hold_s` seconds."""
        return (
            await self._pool.fetchval(_SQL.hold_group, self.name, self._holder, timedelta(seconds=self.hold_s))
            is not None
        )

    async def keep(self) -> None:
        """Holds on for another `hold_s` seconds. Raises LostGroup if somebody has taken it over, though he may be gone again."""
        hold = timedelta(seconds=self.hold_s)
        if await self._pool.fetchval(_SQL.keep_group, self.name, self._holder, hold) is None:
            raise LostGroup(group=self.name)

    async def is_held(self) -> bool:
        """Whether nobody has taken it over."""
        return bool(await self._pool.fetchval(_SQL.is_held_by, self.name, self._holder))

    async def release(self) -> None:
        """Lets another process read at once."""
        await self._pool.execute(_SQL.release_group, self.name, self._holder)

    async def read(self, page: int = PAGE, *, after: Sequence[Place] = ()) -> list[Unread]:
        """What comes next, in an order that keeps each root's. after: where the reader is, of each writer that it has events of
        in hand; elsewhere the cursor says."""
        columns = [[place[part] for place in after] for part in range(3)]
        rows = await self._pool.fetch(_SQL.read_log, self.name, page, *columns)
        return merge([_unread(row) for row in rows], page)

    async def skim(self, page: int = SKIM_PAGE) -> list[Skimmed]:
        """How far the next events go and whose they are, without the events."""
        rows = await self._pool.fetch(_SQL.skim_log, self.name, page)
        return [Skimmed(Place(writer, seq, ord), events, homes) for writer, seq, ord, events, homes in rows]

    async def pass_over(self, skimmed: Sequence[Skimmed]) -> None:
        """Moves the cursors past events that concern nobody. Raises LostGroup."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL synchronous_commit = off")
            await self._fence(connection)
            await self._move_cursors(connection, [one.end for one in skimmed])

    async def advance(
        self, handled: Sequence[Unread], failed: Sequence[tuple[LogRecord, str]], behind: Sequence[LogRecord]
    ) -> None:
        """Moves the cursors past `handled`, and parks of them what failed and what waits behind it, in one commit.

        Raises LostGroup.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            # A cursor that is lost in a crash is an older cursor: what was read is read again, and handlers bear that.
            await connection.execute("SET LOCAL synchronous_commit = off")
            await self._fence(connection)
            first = timedelta(seconds=message_delay(1, random.random()) or 0.0)
            parked = [(record, 1, first, shortened(reason), "retry") for record, reason in failed]
            parked += [(record, 0, timedelta(), None, "waiting") for record in behind]
            if parked:
                await connection.execute(
                    _SQL.park,
                    self.name,
                    [record.home for record, *_ in parked],
                    [record.root for record, *_ in parked],
                    [record.place.writer for record, *_ in parked],
                    [record.place.seq for record, *_ in parked],
                    [record.place.ord for record, *_ in parked],
                    [record.sequence for record, *_ in parked],
                    [attempts for _, attempts, _, _, _ in parked],
                    [delay for _, _, delay, _, _ in parked],
                    [reason for _, _, _, reason, _ in parked],
                    [state for *_, state in parked],
                )
                await self._line_up(connection, {root_of(record) for record, *_ in parked})
            await self._move_cursors(connection, ends(handled))

    async def parked_due(self, limit: int) -> list[tuple[LogRecord, int]]:
        """Parked records whose time has come, with their failed attempts; of each root only the first."""
        rows = await self._pool.fetch(_SQL.parked_due, self.name, limit)
        return [(_record(row), row["attempts"]) for row in rows]

    async def settle_parked(self, record: LogRecord, attempts: int, failure: str | None) -> None:
        """A parked record was tried: it goes, waits for its next try, or is given up. Raises LostGroup."""
        key = (self.name, record.home, record.root, record.sequence)
        async with self._pool.acquire() as connection, connection.transaction():
            await self._fence(connection)
            if failure is None:
                await connection.execute(_SQL.unpark, *key)
                await self._line_up(connection, [root_of(record)])
                return
            delay_s = message_delay(attempts + 1, random.random())
            if delay_s is None:
                log.error("log.dead", group=self.name, event_id=record.name, reason=failure)
                await connection.execute(_SQL.park_dead, *key, shortened(failure))
                await self._line_up(connection, [root_of(record)])
            else:
                await connection.execute(_SQL.park_again, *key, timedelta(seconds=delay_s), shortened(failure))

    async def parked(self, state: str | None = None, limit: int = 100) -> list[ParkedRecord]:
        """What is parked, oldest first."""
        rows = await self._pool.fetch(_SQL.parked_records, self.name, state, limit)
        return [
            ParkedRecord._make(
                (row[0], Id(row["root"].hex), *row[2:9], event_name(row["writer"], row["seq"], row["ord"]), row["type"])
            )
            for row in rows
        ]

    async def replay_dead(
        self, root: Id | None = None, limit: int = 1000, *, places: Sequence[Place] | None = None
    ) -> int:
        """Tries again what was given up, of one root, of some places, or all, each root's in order; says how many."""
        columns = _columns(places)
        async with self._pool.acquire() as connection, connection.transaction():
            # Whoever settles what is before them meanwhile would not see that these wait for it.
            await connection.execute(_SQL.lock_group, self.name)
            rows = await connection.fetch(_SQL.replay_parked, self.name, root, limit, *columns)
            await self._line_up(connection, {(row["home"], Id(row["root"].hex)) for row in rows})
        return len(rows)

    async def count_dead(self, died_to: datetime, *, places: Sequence[Place] | None = None) -> int:
        """How many were given up before a time, of some places, or all."""
        found: int = await self._pool.fetchval(_SQL.count_dead_parked, self.name, died_to, *_columns(places))
        return found

    async def rewind(self, since: datetime) -> int:
        """Reads again what was committed since then; says how many events that are, with those that it had not read yet.

        Whoever reads now loses the batch in his hands and begins there, too. Handlers bear what they had before.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.fetchval(_SQL.take_over_group, self.name, self._holder)
            await connection.execute(_SQL.rewind_cursors, self.name, since)
        # Behind the commit: counting goes through the log, and until then nobody reads for the group.
        unread: int = await self._pool.fetchval(_SQL.count_unread, self.name)
        return unread

    async def lag(self) -> list[Lag]:
        """How far the group is behind each writer."""
        return [Lag(*row) for row in await self._pool.fetch(_SQL.group_lag, self.name)]

    async def _line_up(
        self,
        connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]",
        roots: Collection[tuple[int, Id]],
    ) -> None:
        await connection.execute(_SQL.line_up, self.name, [home for home, _ in roots], [root for _, root in roots])

    async def _move_cursors(
        self, connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]", places: Sequence[Place]
    ) -> None:
        columns = (list(part) for part in zip(*places, strict=True))
        await connection.execute(_SQL.advance_cursors, self.name, *columns)

    async def _fence(self, connection: "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]") -> None:
        if await connection.fetchval(_SQL.fence_group, self.name, self._holder) is None:
            raise LostGroup(group=self.name)


def _columns(places: Sequence[Place] | None) -> Sequence[list[int] | None]:
    """Places as a query has them; None: all."""
    return (None, None, None) if places is None else [[place[part] for place in places] for part in range(3)]


class GroupReader:
    """Reads the log for a group and hands it to a handler, for ever.

    While a page is handled the next one is read, and while that is handled the cursors move past the one before. So pages
    overlap, and what they rest on does not: a page is handled when the one before was handled as a whole, and cursors move
    only past what was handled. As soon as anything is out of the ordinary (a failure, a parked root, a halt) what was read
    ahead is forgotten, and the cursors say again what comes next.
    """

    def __init__(
        self,
        group: LogGroup,
        handler: Handler,
        wait: Callable[[float], Awaitable[object]],
        *,
        page: int = PAGE,
        concern: Concern | None = None,
        pace: Pace | None = None,
    ) -> None:
        """wait: returns when there may be new events, at the latest after so many seconds. concern: without it, all do. pace: of
        a backlog; without it, as fast as it goes."""
        self._group = group
        self._handler = handler
        self._wait = wait
        self._page = self._page_max = page
        self._concern = concern
        self._pace = pace
        self._held_at = float("-inf")
        self._is_behind = False
        """The last reading found a page full."""
        self._found = 0
        self._asked = page
        """Events per writer that the last reading asked for."""
        self._began_at = float("-inf")
        """When the last step began."""
        self._look_at = float("-inf")
        """When to look for parked records, whatever else there is to do."""
        self._in_hand: dict[int, Place] = {}
        """Of each writer the last event that was read, as long as the cursors may be behind it."""
        self._next: asyncio.Task[list[Unread]] | None = None
        """The next page, on its way."""
        self._moving: asyncio.Task[None] | None = None
        """The cursors, on their way past the last page."""

    async def run(self) -> None:
        """Until it is cancelled; then another process may go on at once."""
        pause_s = HALT_S
        try:
            while True:
                if not await self._hold():
                    await self._look_again()
                    await asyncio.sleep(1.0)
                    continue
                started = asyncio.get_running_loop().time()
                left_s = self._began_at + await self._turn_s(started) - started
                if left_s > 0:
                    # In parts, so that the group is held however slow the pace, and who writes is looked at meanwhile.
                    await asyncio.sleep(min(left_s, self._group.hold_s / 3, LOOK_S))
                    continue
                try:
                    worked = await self.step()
                    pause_s = HALT_S
                except LostGroup:
                    self._held_at = float("-inf")
                    continue
                except Halt as halt:
                    log.warning("log.halted", group=self._group.name, reason=halt.reason, pause_s=pause_s)
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, HALT_MAX_S)
                    continue
                if not worked:
                    await self._wait(0.25)
                self._began_at = started
        finally:
            await asyncio.shield(self._leave())

    async def step(self) -> bool:
        """One page, and what is parked and due; whether there was anything. Raises Halt, LostGroup."""
        try:
            worked = await self._step()
        except BaseException as error:
            # Also when it is cancelled: what was read ahead belongs to a page that is not handled now.
            await self._look_again()
            if isinstance(error, Halt):
                # What it took of the page is sent again, so pages that it never takes whole would go on for ever.
                self._page = min(self._page, max(self._page // 2, PAGE_MIN))
            raise
        self._page = min(self._page * 2, self._page_max)
        return worked

    async def _step(self) -> bool:
        now = asyncio.get_running_loop().time()
        if now >= self._look_at and await self._retry_parked(now):
            # The page before had its time.
            self._found = 0
            return True
        if self._concern is not None:
            await self._moved()
            self._in_hand.clear()
        if self._concern is not None and await self._pass_over(self._concern):
            return self._found > 0 or await self._retry_parked(now)
        unread = await self._read()
        self._note(len(unread), self._asked)
        if unread:
            await self._handle(unread)
            return True
        await self._moved()
        self._in_hand.clear()
        return await self._retry_parked(now)

    async def _turn_s(self, now: float) -> float:
        """How long the last page takes at least, before the next one begins. A few events at a time never wait."""
        if self._is_behind:
            return 0.0 if self._pace is None else await self._pace.turn_s(self._found, now)
        if self._pace is not None:
            self._pace.rest()
        # Under load: fewer and larger readings.
        return STEP_S if self._found >= BUSY_MIN else 0.0

    async def _leave(self) -> None:
        await self._look_again()
        await self._group.release()

    # What overlaps

    async def _read(self) -> list[Unread]:
        """The next page; it may be here already."""
        ahead, self._next = self._next, None
        unread = await (self._read_on() if ahead is None else ahead)
        self._in_hand.update((place.writer, place) for place in ends(unread))
        return unread

    async def _read_on(self) -> list[Unread]:
        self._asked = self._page if self._pace is None else self._pace.page(self._page)
        return await self._group.read(self._asked, after=list(self._in_hand.values()))

    def _read_ahead(self) -> None:
        """Only of a backlog: else the next page would be empty, and is read when somebody has written. Not where pages are
        looked over first, as that begins at the cursors."""
        if self._is_behind and self._concern is None:
            self._next = asyncio.create_task(self._read_on(), name=f"read ahead {self._group.name}")

    async def _moved(self) -> None:
        """The cursors are past everything that was handled. Raises LostGroup."""
        moving, self._moving = self._moving, None
        if moving is not None:
            await moving

    async def _look_again(self) -> None:
        """Forgets what was read ahead; cursors that are on their way arrive, or never will."""
        tasks = [task for task in (self._next, self._moving) if task is not None]
        if self._next is not None:
            self._next.cancel()
        self._next = self._moving = None
        self._in_hand.clear()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                log.info("log.read_again", group=self._group.name, reason=type(outcome).__name__)

    async def _pass_over(self, concern: Concern) -> bool:
        """Whether what comes next concerned nobody: then it is behind us, and was never fetched."""
        skimmed = await self._group.skim(SKIM_PAGE)
        if not skimmed:
            self._note(0, SKIM_PAGE)
            return True
        if await concern(sorted({home for one in skimmed for home in one.homes})):
            return False
        await self._group.pass_over(skimmed)
        self._note(max(one.events for one in skimmed), SKIM_PAGE)
        return True

    def _note(self, found: int, page: int) -> None:
        self._found = found
        self._is_behind = found >= page

    async def _hold(self) -> bool:
        now = asyncio.get_running_loop().time()
        if not self._is_time_to_hold(now):
            return True
        if not await self._group.is_held():
            # Somebody else had it meanwhile: what is in hand may not be what comes next any more.
            await self._look_again()
        if not await self._group.hold():
            return False
        self._held_at = now
        return True

    def _is_time_to_hold(self, now: float) -> bool:
        return now - self._held_at >= self._group.hold_s / 3

    async def _keep(self) -> None:
        """In the middle of a page, however long it takes. Raises LostGroup."""
        now = asyncio.get_running_loop().time()
        if self._is_time_to_hold(now):
            await self._group.keep()
            self._held_at = now

    async def _keep_on(self) -> None:
        while True:
            await asyncio.sleep(self._group.hold_s / 3)
            await self._keep()

    async def _answers(self, records: Sequence[LogRecord]) -> Sequence[str | None]:
        """What the handler says; the group is held while it takes its time. Raises Halt, LostGroup."""
        await self._keep()
        keeping = asyncio.create_task(self._keep_on(), name=f"keep {self._group.name}")
        try:
            return await self._handler(records)
        finally:
            # Whether it was lost meanwhile is said by the database before the next wave, and before a cursor moves.
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _handle(self, unread: Sequence[Unread]) -> None:
        self._read_ahead()
        behind = [one.record for one in unread if one.is_parked]
        failed: list[tuple[LogRecord, str]] = []
        stopped: set[tuple[int, Id]] = set()
        done = {record.place for record in behind}
        halt: Halt | None = None
        for wave in in_waves([one.record for one in unread if not one.is_parked], root_of):
            ready = [record for record in wave if (record.home, record.root) not in stopped]
            late = [record for record in wave if (record.home, record.root) in stopped]
            behind += late
            done.update(record.place for record in late)
            try:
                answers = await self._answers(ready) if ready else ()
            except Halt as stop:
                halt = stop
                break
            for record, failure in zip(ready, answers, strict=True):
                done.add(record.place)
                if failure is not None:
                    failed.append((record, failure))
                    stopped.add((record.home, record.root))
        await self._moved()
        if halt is None and not failed and not behind:
            self._moving = asyncio.create_task(self._group.advance(unread, [], []), name=f"move {self._group.name}")
            return
        handled = _handled(unread, done)
        if handled:
            places = {one.record.place for one in handled}
            await self._group.advance(
                handled,
                [(record, reason) for record, reason in failed if record.place in places],
                [record for record in behind if record.place in places],
            )
        # What was read ahead does not know of the roots that were parked here.
        await self._look_again()
        if halt is not None:
            raise halt

    async def _retry_parked(self, now: float) -> bool:
        """Whether anything was due. Looked for when there is nothing else to do, and else now and then."""
        self._look_at = now + PARKED_LOOK_S
        due = await self._group.parked_due(100)
        if due:
            # Nothing of these roots is under way, and they may go on afterwards where the next page does not know it.
            await self._moved()
            await self._look_again()
        for record, attempts in due:
            (failure,) = await self._answers([record])
            await self._group.settle_parked(record, attempts, failure)
        return bool(due)


def _handled(unread: Sequence[Unread], done: set[Place]) -> list[Unread]:
    """What the cursors may move past: in each writer, everything before the first record that is not done, or that stands
    behind one of its root which is read again."""
    stopped: set[int | tuple[int, Id]] = set()
    handled: list[Unread] = []
    for one in unread:
        both: set[int | tuple[int, Id]] = {one.record.place.writer, root_of(one.record)}
        if one.record.place not in done or stopped & both:
            stopped |= both
        else:
            handled.append(one)
    return handled


def _record(row: asyncpg.Record) -> LogRecord:
    return LogRecord(
        Place(row["writer"], row["seq"], row["ord"]), row["home"], Id(row["root"].hex), row["sequence"], row["at"],
        row["type"], row["data"],
    )  # fmt: skip


def _unread(row: asyncpg.Record) -> Unread:
    previous = row["previous_writer"]
    place = None if previous is None else Place(previous, row["previous_seq"], row["previous_ord"])
    return Unread(_record(row), place, row["is_parked"])
