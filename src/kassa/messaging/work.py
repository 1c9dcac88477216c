"""Work that waits in PostgreSQL: timers, messages, dead letters. Leases live here; effects go through the journal.

A lease only says who should act now. What makes an effect happen once is the `done` of the Change that has it: the
journal refuses the second one as Consumed.
"""

import asyncio
import json
import random
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

import asyncpg
import msgspec
import structlog

from kassa.db.away import AWAY
from kassa.db.queries import array, load
from kassa.ids import Id
from kassa.journal.change import MessageDone, TimerDone
from kassa.messaging.ladder import timer_delay
from kassa.messaging.packing import UNREADABLE
from kassa.observability.meters import Meters

log = structlog.get_logger("kassa.messaging.work")

_SQL = load("kassa.messaging")

LEASE_S = 60.0
"""A worker that dies gives its work back after that. Longer than a timer's work may take; a message that takes longer is kept by
`MessageWork.extend`."""
LAPSES_ALONE, LAPSES_MAX = 3, 8
"""A message that so many leases ran out with is handed out alone (`claim_messages` of db/schema.sql), and then given up: it ends
whoever has it in hand."""
WINDOWS_MAX = 6
"""`claim_messages` looks behind what others hold at most so often, each time four times as far."""
ERROR_CHARACTERS_MAX = 500


class FiredTimer(NamedTuple):
    """A timer that is due and leased to us. A Change that acts on it carries `done`."""

    home: int
    root: Id
    entity: Id
    kind: str
    generation: int
    tries: int
    """How often it failed before."""
    due: datetime

    @property
    def done(self) -> TimerDone:
        """What the Change that acts on it consumes."""
        return TimerDone(self.entity, self.kind, self.generation)


class StuckTimer(NamedTuple):
    """A timer that keeps failing, with its last error."""

    timer: FiredTimer
    last_error: str | None


class TimerWork:
    """Timers that are due, by the database's clock."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", *, lease_s: float = LEASE_S) -> None:
        self._pool = pool
        self._lease = timedelta(seconds=lease_s)

    async def claim_timers(self, kinds: Sequence[str], limit: int) -> list[FiredTimer]:
        """At most `limit` due timers of these kinds, oldest first; nobody else gets them until the lease is over."""
        rows = await self._pool.fetch(_SQL.claim_timers, kinds, limit, self._lease)
        return sorted((_fired(row) for row in rows), key=_due)

    async def retry_timer(self, fired: FiredTimer, delay_s: float | None = None, error: str | None = None) -> None:
        """The work failed: again after `delay_s`, else growing with its tries up to an hour. It never dies."""
        if delay_s is None:
            delay_s = timer_delay(fired.tries, random.random())
        await self._pool.execute(
            _SQL.retry_timer,
            fired.entity,
            fired.kind,
            fired.generation,
            timedelta(seconds=delay_s),
            shortened(error),
        )

    async def postpone_timer(self, fired: FiredTimer, delay_s: float) -> None:
        """It was not its turn: again after `delay_s`, without counting a try."""
        await self._pool.execute(
            _SQL.postpone_timer, fired.entity, fired.kind, fired.generation, timedelta(seconds=delay_s)
        )

    async def postpone_timers(self, fired: Sequence[FiredTimer], delay_s: float) -> None:
        """It was not the turn of any of these: each again after one to two times `delay_s`, without counting a try."""
        await self._pool.execute(
            _SQL.postpone_timers,
            [one.entity for one in fired],
            [one.kind for one in fired],
            [one.generation for one in fired],
            timedelta(seconds=delay_s),
        )

    async def hurry_timer(self, kind: str, entity: Id) -> None:
        """What was postponed is due now; nothing happens while somebody holds it."""
        await self._pool.execute(_SQL.hurry_timer, entity, kind)

    async def is_current(self, fired: FiredTimer) -> bool:
        """Whether the timer was neither set again, cancelled nor acted on since it fired: worth a call before
        sending."""
        current: bool = await self._pool.fetchval(_SQL.timer_is_current, fired.entity, fired.kind, fired.generation)
        return current

    async def next_due(self, kinds: Sequence[str]) -> float | None:
        """Seconds until the next timer of these kinds that nobody holds (≤ 0: now); None when there is none."""
        seconds: float | None = await self._pool.fetchval(_SQL.next_due, kinds)
        return seconds

    async def health(self) -> tuple[int, float]:
        """How many timers keep failing, and for how many seconds the oldest has been due that nobody holds."""
        row = await self._pool.fetchrow(_SQL.timer_health)
        return row["stuck"], row["overdue_s"]

    async def stuck_timers(self, tries_min: int = 5, limit: int = 100) -> list[StuckTimer]:
        """What failed at least `tries_min` times (≥ 5), most tries first, for operators."""
        rows = await self._pool.fetch(_SQL.stuck_timers, tries_min, limit)
        return [StuckTimer(_fired(row), row["last_error"]) for row in rows]


def _fired(row: asyncpg.Record) -> FiredTimer:
    return FiredTimer(
        row["home"],
        Id(row["root"].hex),
        Id(row["entity"].hex),
        row["kind"],
        row["generation"],
        row["tries"],
        row["due"],
    )


def _due(fired: FiredTimer) -> datetime:
    return fired.due


def shortened(error: str | None) -> str | None:
    """An error as it is stored: bounded, without what PostgreSQL's text refuses, a zero byte or half of a character. Handlers put
    somebody else's text into theirs."""
    return None if error is None else _text(error).replace("\0", "")[:ERROR_CHARACTERS_MAX]


def _text(text: str) -> str:
    return text.encode(errors="replace").decode()


class WaitingMessage(NamedTuple):
    """A message as it waits, for operators."""

    id: Id
    home: int
    topic: str
    key: str
    priority: int
    created_at: datetime
    due: datetime
    attempts: int
    leased_until: datetime | None
    first_error: str | None
    last_error: str | None
    headers: dict[str, str]
    body: bytes


class ClaimedMessage(msgspec.Struct, frozen=True, gc=False):
    """A message that is leased to us. A Change that handles it carries `done`."""

    id: Id
    home: int
    key: str
    priority: int
    created_at: datetime
    attempts: int
    lapses: int
    """How many leases ran out with it in hand."""
    lease: int
    """The number under which it was handed out, with all that was claimed at once."""
    headers: dict[str, str]
    body: bytes

    @property
    def done(self) -> MessageDone:
        """What the Change that handles it consumes; its commit is the acknowledgement."""
        return MessageDone(self.id)

    @property
    def alone(self) -> bool:
        """Whether it may be what ended those who had it in hand, so that nothing else is handed out with it."""
        return self.lapses >= LAPSES_ALONE


class Leased(Protocol):
    """Says which message was claimed, and under which lease."""

    @property
    def id(self) -> Id: ...

    @property
    def lease(self) -> int: ...


class OutgoingMessage(NamedTuple):
    """A message that goes into a queue outside of any Change."""

    id: Id
    home: int
    topic: str
    key: str
    priority: int
    delay_s: float
    headers: dict[str, str]
    body: bytes


class Columns(NamedTuple):
    """Messages that go into queues, as the statement takes them: a list of each of their parts."""

    ids: list[str]
    homes: list[str]
    queues: list[str]
    """Each one's place in a list of queues, from 1."""
    priorities: list[str]
    delays_s: list[str]
    keys: list[str]
    headers: list[str]
    bodies: list[bytes]


class ParkedMessage(NamedTuple):
    """A record from a broker that waits in our own queue, or was given up."""

    message: OutgoingMessage
    attempts: int
    reason: str | None
    lapses: int = 0


class Queue(NamedTuple):
    """How a topic is doing."""

    topic: str
    depth: int
    in_flight: int
    delayed: int
    dead: int
    oldest_s: float | None


class DeadLetter(NamedTuple):
    """A message that was given up."""

    id: Id
    home: int
    topic: str
    key: str
    priority: int
    created_at: datetime
    died_at: datetime
    attempts: int
    reason: str
    first_error: str | None
    last_error: str | None
    headers: dict[str, str]
    body: bytes


class _InHand(NamedTuple):
    """What is left of a lease; times are by the monotonic clock."""

    claimed_at: float
    """When we got it."""
    since: float
    """When it began at the latest, or began anew."""
    messages: set[Id]


class MessageWork:
    """Messages that are due, by the database's clock."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", *, lease_s: float = LEASE_S, meters: Meters | None = None
    ) -> None:
        """meters: where what is given up here is counted; all else is counted by whoever settles it."""
        self._pool = pool
        self.lease_s = lease_s
        self._lease = timedelta(seconds=lease_s)
        self._meters = meters or Meters()
        self._in_hand: dict[int, _InHand] = {}
        """What was claimed here and not given back yet, by lease, that which began first before the others."""
        self._over: list[int] = []
        """Leases of which nothing is in hand any more; they end with the next statement."""

    async def claim(self, topic: str, limit: int, *, windows: int = WINDOWS_MAX) -> list[ClaimedMessage]:
        """At most `limit` due messages, urgent ones first. A key's messages come in order and to one holder at a
        time. They are given back here: where everything of a lease is, the lease ends. windows: how often to look further
        behind, where the keys of what was looked at are in somebody's hand."""
        started = time.monotonic()
        rows = await self._pool.fetch(_SQL.claim_messages, topic, limit, self._lease, windows)
        claimed = [_claimed(row) for row in rows]
        if claimed:
            self._forget(started - self._lease.total_seconds())
            self._in_hand[claimed[0].lease] = _InHand(time.monotonic(), started, {message.id for message in claimed})
        if claimed and claimed[0].lapses >= LAPSES_MAX:
            log.error("work.given_up", queue=topic, message=claimed[0].id, lapses=claimed[0].lapses)
            reason = f"whoever had it in hand ended, or held it longer than its lease, {claimed[0].lapses} times"
            buried = await self.bury([(message, reason) for message in claimed])
            name, _, group = topic.partition(":")
            self._meters.passage(name, group).dead += len(buried)
            return await self.claim(topic, limit, windows=windows)
        return claimed

    async def claim_whole(self, topic: str, limit: int) -> list[ClaimedMessage]:
        """Like `claim`; should whoever asks be cancelled meanwhile, what he would have got is given back."""
        claiming = asyncio.create_task(self.claim(topic, limit))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            with suppress(*AWAY):
                await self.give_back(await claiming)
            raise

    async def give_back(self, claimed: Iterable[ClaimedMessage], delay_s: float = 0.0) -> None:
        """Those that are not settled, without counting a try; what the database does not take back now, the lease gives back."""
        if given := [(message, delay_s, None, False) for message in claimed]:
            with suppress(*AWAY):
                await self.retry(given)

    async def release(self, claimed: Sequence[Leased]) -> None:
        """As if these had never been claimed; what the database does not take back, the lease gives back."""
        given = _by_lease(claimed)
        ended = self._ended_by(given)
        with suppress(*AWAY):
            await self._pool.execute(
                _SQL.release_messages,
                [message.id for message in claimed],
                [message.lease for message in claimed],
                ended,
            )
        self._let_go(given, ended)

    async def extend(self, leases: Collection[int], held_max_s: float) -> None:
        """Those of these leases of which a third is over begin anew, if they are ours, not over, and were claimed less than
        `held_max_s` ago. Asks nobody where there are none. To be called often: a lease that somebody settles from at the moment
        is left to the next time. Raises as asyncpg does."""
        now = time.monotonic()
        old = [
            lease
            for lease in leases
            if (held := self._in_hand.get(lease)) is not None
            and held.since < now - self.lease_s / 3
            and held.claimed_at > now - held_max_s
        ]
        if not old:
            return
        for row in await self._pool.fetch(_SQL.extend_leases, old, self._lease):
            if (held := self._in_hand.pop(row["id"], None)) is not None:
                # Behind all that began before.
                self._in_hand[row["id"]] = held._replace(since=now)

    async def lapse(self, leases: Iterable[int]) -> None:
        """As if these had run out just now: the next claim counts that for each message that is still in one."""
        await self._pool.execute(_SQL.end_leases, list(leases))

    async def acknowledge(self, claimed: Sequence[Leased]) -> set[Id]:
        """Done, for effects that are not in this database. What is missing from the answer was not ours any more."""
        given = _by_lease(claimed)
        ended = self._ended_by(given)
        ids = [message.id for message in claimed]
        count, some = await self._pool.fetchrow(
            _SQL.acknowledge_messages, array(ids), array([str(message.lease) for message in claimed]), ended
        )
        self._let_go(given, ended)
        if some is not None:
            return {Id(id.hex) for id in some}
        return set(ids) if count else set()

    async def retry(self, failed: Sequence[tuple[Leased, float, str | None, bool]]) -> set[Id]:
        """(message, seconds, error, whether it counts as a try): again later, and the rest of its key behind it."""
        given = _by_lease(message for message, _, _, _ in failed)
        ended = self._ended_by(given)
        rows = await self._pool.fetch(
            _SQL.retry_messages,
            [message.id for message, _, _, _ in failed],
            [message.lease for message, _, _, _ in failed],
            [timedelta(seconds=delay_s) for _, delay_s, _, _ in failed],
            [shortened(error) for _, _, error, _ in failed],
            [int(counts) for _, _, _, counts in failed],
            ended,
        )
        self._let_go(given, ended)
        return {Id(row["id"].hex) for row in rows}

    async def bury(self, dead: Sequence[tuple[Leased, str]]) -> set[Id]:
        """(message, reason): to the dead letters."""
        given = _by_lease(message for message, _ in dead)
        ended = self._ended_by(given)
        rows = await self._pool.fetch(
            _SQL.bury_messages,
            [message.id for message, _ in dead],
            [message.lease for message, _ in dead],
            [shortened(reason) for _, reason in dead],
            [1] * len(dead),
            ended,
        )
        self._let_go(given, ended)
        return {Id(row["id"].hex) for row in rows}

    async def send(self, topic: str, queues: Sequence[str], columns: Columns) -> list[str]:
        """The queues that a topic's groups have now, in order. If they are these, the messages are in them, and those that were
        there already stay as they are; else nothing was done."""
        now: list[str] = await self._pool.fetchval(
            _SQL.send_messages,
            queues,
            topic,
            array(columns.ids),
            array(columns.homes),
            array(columns.queues),
            array(columns.priorities),
            array(columns.delays_s),
            columns.keys,
            columns.headers,
            columns.bodies,
        )
        return now

    async def park(self, topic: str, parked: Sequence[ParkedMessage]) -> None:
        """Keeps records of a broker until their time has come (`delay_s`); those that are there already stay as they are."""
        await self._pool.execute(
            _SQL.park_messages,
            [one.message.id for one in parked],
            topic,
            [one.message.home for one in parked],
            [one.message.key for one in parked],
            [one.message.priority for one in parked],
            [timedelta(seconds=one.message.delay_s) for one in parked],
            [one.attempts for one in parked],
            [one.lapses for one in parked],
            [shortened(one.reason) for one in parked],
            [written(one.message.headers) for one in parked],
            [one.message.body for one in parked],
        )

    async def bury_records(self, topic: str, dead: Sequence[ParkedMessage]) -> None:
        """Records of a broker that were given up: to the dead letters. One that came twice at once is one."""
        dead = list({one.message.id: one for one in dead}.values())
        await self._pool.execute(
            _SQL.bury_records,
            [one.message.id for one in dead],
            topic,
            [one.message.home for one in dead],
            [one.message.key for one in dead],
            [one.message.priority for one in dead],
            [one.attempts for one in dead],
            [shortened(one.reason) for one in dead],
            [written(one.message.headers) for one in dead],
            [one.message.body for one in dead],
        )

    async def parked_keys(self, topic: str, keys: Sequence[str]) -> set[str]:
        """Which of these keys have something that waits: what comes later in them has to wait behind it."""
        return {row["key"] for row in await self._pool.fetch(_SQL.parked_keys, topic, keys)}

    async def is_empty(self, topic: str) -> bool:
        """Whether no message of the topic is there."""
        is_empty: bool = await self._pool.fetchval(_SQL.no_messages, topic)
        return is_empty

    async def next_due(self, topic: str) -> float | None:
        """Seconds until a message of the topic is due that nobody holds (≤ 0: now); None when there is none."""
        return (await self.next_dues([topic])).get(topic)

    async def next_dues(self, topics: Sequence[str]) -> dict[str, float]:
        """Like `next_due` of each of them; those without anything, and those that are paused, are not there."""
        return dict(await self._pool.fetch(_SQL.next_messages, topics))

    async def queues(self, topic: str | None = None) -> list[Queue]:
        """How every topic is doing, or one."""
        return [Queue(*row) for row in await self._pool.fetch(_SQL.topics, topic)]

    async def peek(self, topic: str, limit: int = 20) -> list[WaitingMessage]:
        """The oldest messages of a topic, without touching them."""
        rows = await self._pool.fetch(_SQL.peek_messages, topic, limit)
        return [WaitingMessage._make((Id(row["id"].hex), *row[1:11], _headers(row), row["body"])) for row in rows]

    async def purge(self, topic: str) -> int:
        """Empties a topic, except for what somebody works on; says how many went."""
        gone: int = await self._pool.fetchval(_SQL.purge_messages, topic)
        return gone

    def _ended_by(self, given: dict[int, set[Id]]) -> list[int]:
        """The leases that end when these are given back: nothing else is in hand of them, nor being given back now.

        Of what somebody else claimed we do not know what is still in hand; it ends by itself.
        """
        ended, self._over = self._over, []
        return ended + [
            lease for lease, ids in given.items() if (held := self._in_hand.get(lease)) and held.messages <= ids
        ]

    def _let_go(self, given: dict[int, set[Id]], ended: Sequence[int]) -> None:
        """They were given back, or taken from us."""
        for lease in ended:
            self._in_hand.pop(lease, None)
        for lease, ids in given.items():
            if (held := self._in_hand.get(lease)) is not None:
                held.messages.difference_update(ids)
                if not held.messages:
                    # Two gave back what was left at the same time, so neither was the last.
                    del self._in_hand[lease]
                    self._over.append(lease)

    def _forget(self, since: float) -> None:
        """Leases that ran out, because what was claimed was never given back."""
        while self._in_hand:
            lease, oldest = next(iter(self._in_hand.items()))
            if max(oldest.claimed_at, oldest.since) >= since:
                break
            del self._in_hand[lease]


def _by_lease(messages: Iterable[Leased]) -> dict[int, set[Id]]:
    found: dict[int, set[Id]] = {}
    for message in messages:
        found.setdefault(message.lease, set()).add(message.id)
    return found


class DeadLetters:
    """What was given up: browse, replay, purge."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def browse(self, topic: str, limit: int = 100, before: DeadLetter | None = None) -> list[DeadLetter]:
        """A page of a topic's dead letters, newest first."""
        at, id = (before.died_at, before.id) if before else (None, "f" * 32)
        rows = await self._pool.fetch(_SQL.dead_letters, topic, at, id, limit)
        return [DeadLetter._make((Id(row["id"].hex), *row[1:11], _headers(row), row["body"])) for row in rows]

    async def replay(
        self,
        topic: str,
        *,
        ids: Sequence[Id] | None = None,
        died_from: datetime | None = None,
        died_to: datetime | None = None,
        per_second: int = 1000,
        limit: int | None = None,
    ) -> int:
        """Puts dead letters back: some, those of a time, or all; oldest first, at most so many a second, and `limit` at all.
        Says how many.

        Each keeps its id, so what was handled already is refused, and a replay changes nothing twice. Those that die
        while it runs are not replayed again by it.
        """
        now: datetime = await self._pool.fetchval(_SQL.database_time)
        until = now if died_to is None else min(died_to, now)
        total = 0
        while True:
            step = max(1, per_second // 10) if limit is None else min(max(1, per_second // 10), limit - total)
            moved: int = await self._pool.fetchval(_SQL.replay_dead_letters, topic, ids, died_from, until, step)
            total += moved
            if moved < step or total == limit:
                return total
            await asyncio.sleep(moved / per_second)

    async def count(
        self, topic: str, *, ids: Sequence[Id] | None = None, died_from: datetime | None = None, died_to: datetime
    ) -> int:
        """How many a replay of these would put back."""
        found: int = await self._pool.fetchval(_SQL.count_dead_letters, topic, ids, died_from, died_to)
        return found

    async def purge(self, topic: str, died_before: datetime) -> int:
        """Forgets what died before a time; says how many."""
        gone: int = await self._pool.fetchval(_SQL.purge_dead_letters, topic, died_before)
        return gone


_encode_headers = msgspec.json.Encoder().encode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def _headers(row: asyncpg.Record) -> dict[str, str]:
    return read_headers(row["headers"])


def written(headers: dict[str, str]) -> str:
    """Headers as a row has them. Those of strangers may have halves of characters, which no database takes, or zero bytes, over
    which one stumbles that looks into them (`kassa_receive`)."""
    try:
        raw = _encode_headers(headers)
    except UnicodeEncodeError:
        pass
    else:
        if b"\\u0000" not in raw:
            return raw.decode()
    shown = {_text(name): _text(value) for name, value in headers.items()}
    return _encode_headers({
        name.replace("\0", "\ufffd"): value.replace("\0", "\ufffd") for name, value in shown.items()
    }).decode()  # fmt: skip


def read_headers(raw: str) -> dict[str, str]:
    """Headers as a row has them. Programs write rows too: what is no text in them is shown as text, so that one row never keeps
    others from being claimed."""
    try:
        return _decode_headers(raw)
    except UNREADABLE:
        pass
    try:
        loose = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(loose, dict):
        return {}
    return {_text(name): _text(value if isinstance(value, str) else repr(value)) for name, value in loose.items()}


def _claimed(row: asyncpg.Record) -> ClaimedMessage:
    lease, id, home, key, priority, created_at, attempts, lapses, headers, body = row
    return ClaimedMessage(
        Id(id.hex), home, key, priority, created_at, attempts, lapses, lease, read_headers(headers), body
    )  # fmt: skip
