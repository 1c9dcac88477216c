"""The journal in PostgreSQL: a few connections, one batch at a time on each, whatever is waiting goes into the next commit.

A batch goes one of two ways. *Under locks*: names, roots, holds, accounts, what is consumed; then the judge; then one
statement writes it all. *Plain*, for changes that only add (wallet payments): the judge first, by what is known of the
accounts; then one statement that writes everything if the names are new and the accounts are as they were known, and nothing
otherwise, and then the batch goes the first way (docs/decisions/0006). The order of locks is the same in both and in every
writer, so that two writers cannot deadlock.

When the connection dies nobody is told anything until the truth is known: the chain row of the batch is there, or it is not
(docs/decisions/0004).
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import asyncpg
import msgspec
import structlog

from kassa.clock import Clock, SystemClock
from kassa.errors import Busy, DatabaseFull, DatabaseUnreachable, InvariantBroken, KassaError, OutcomeUnknown
from kassa.ids import Id
from kassa.journal import statements as sql
from kassa.journal.change import Change, Committed, Done, InboxDone, MessageDone, Reply, TimerDone, Verdict
from kassa.journal.journal import Written
from kassa.journal.judge import (
    EMPTY_DIGEST,
    Assembly,
    Deferred,
    Judge,
    Needs,
    OnceRow,
    Pending,
    Read,
    as_json,
    assemble,
    batch_digests,
    chain_digest,
    follow,
    is_plain,
    plain_accounts,
)
from kassa.journal.known import KnownAccounts
from kassa.journal.table import Child, Table, Tables
from kassa.ledger.chart import LIMITS
from kassa.ledger.model import Account, AccountKey, Hold, HoldKey

BATCH_MAX = 512
"""Changes per commit: about 10 ms of work at most, so that latency stays small under load."""
QUEUE_MAX = 20_000
"""Waiting changes: two seconds of work; past that an honest 503 is better than a time-out."""
AWAY_S = 1.0
"""How long callers wait while the database is known to be away: nothing of theirs was sent, so they may be told soon."""
SETTLE_S = 8.0
"""How long callers wait for the truth about a commit in the middle of which the connection died."""
ANSWER_S = 15.0
"""How long a statement may take (`connect` sees to it), longer than one waits for locks. Who does not answer by then is frozen or
out of reach without a word, and the connection counts as lost."""
END_TRIES_MAX = 200
"""Looks for the end of a server process that was told to end, 20 ms apart: four seconds."""
CAUTION_MAX = 63
"""Batches that go under locks after others in a row were judged in vain: bounds what repeated requests can cost."""
SLOTS = range(1, 64)
"""Writer slots. Each is held by a session advisory lock, so a slot has one living writer."""
SLOT_LOCK = 0x4B41  # "KA"

_CONNECTION_LOST = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.OperatorInterventionError)
_AGAIN = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.LockNotAvailableError)
_NO_ROOM = (asyncpg.InsufficientResourcesError,)
_TRY_ROOM = (
    "BEGIN; CREATE TEMPORARY TABLE kassa_room ON COMMIT DROP AS SELECT repeat('room', 450) FROM generate_series(1, 1000); "
    "ROLLBACK"
)
"""Takes two megabytes of the disk and gives them back; rows of 1.8 kB are not compressed."""

_SETTLE = "SELECT pg_logical_emit_message(true, 'kassa', 'settled')"
"""A commit of no content. Where commits wait for a standby, what was committed before is there too when this one is."""
_END_BACKEND = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2"

log = structlog.get_logger("kassa.journal")


class _Waiting(Pending):
    """A change with its caller."""

    __slots__ = ("deferrals", "needs_locks", "told")

    def __init__(self, change: Change, told: Callable[[Verdict | KassaError], None]) -> None:
        super().__init__(change)
        self.told = told
        self.deferrals = 0
        self.needs_locks = not is_plain(change)

    def tell(self, answer: Verdict | KassaError) -> None:
        """What became of it: once. A caller's fault is the caller's own; the others of the batch must hear their answers."""
        told, self.told = self.told, _nobody
        try:
            told(answer)
        except Exception:
            log.exception("journal.caller_failed")


def _nobody(answer: Verdict | KassaError) -> None:
    """Has been told already."""


def _tell_future(future: "asyncio.Future[Verdict]", answer: Verdict | KassaError) -> None:
    if future.done():
        return
    if isinstance(answer, KassaError):
        future.set_exception(answer)
    else:
        future.set_result(answer)


class _InDoubt(Exception):
    """COMMIT was sent and not answered."""

    def __init__(self, answers: "list[tuple[_Waiting, Verdict]]", later: "list[_Waiting]", written: Written) -> None:
        self.answers = answers
        self.later = later
        self.written = written


class _NameWent(Exception):
    """A key that was in our way has been pruned meanwhile, so that nothing stands for our request: all from the start."""


class _Backend(NamedTuple):
    """A server process, told apart from a later one with the same number."""

    pid: int
    started_at: datetime


class _Outdated(Exception):
    """A plain batch was judged by what is not so: a name is taken, or an account stands otherwise. Nothing was written."""


class PostgresJournal:
    """The one door, in PostgreSQL: one queue, and a few lanes that each write batches. `start` before use; `stop` drains.

    A second lane judges in Python while the first one's batch is in the database; more than two give nothing on two cores.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        tables: Tables,
        *,
        clock: Clock | None = None,
        lanes: int = 1,
        batch_max: int = BATCH_MAX,
        queue_max: int = QUEUE_MAX,
        settle_s: float = SETTLE_S,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        """connect: a coroutine function that opens an asyncpg connection; observe(batch size, seconds) after each commit."""
        self.tables = tables
        self.clock = clock or SystemClock()
        self.batch_max = batch_max
        self.queue_max = queue_max
        self.settle_s = settle_s
        self.queue: deque[_Waiting] = deque()
        self.arrived = asyncio.Event()
        self.is_stopping = False
        self.is_full = False
        """Whether a write found no room on the database's disk, and nobody has seen since that there is some."""
        self.accounts = KnownAccounts()
        self.shapes = sql.Shapes()
        self.turn = asyncio.Lock()
        """Held from the judgement of a plain batch to the end of its statement, since the next one rests on it; and while
        a batch under locks gets its accounts."""
        self.lockers = 0
        """Batches that have accounts under locks, or wait for them."""
        self.unlocked = asyncio.Event()
        """Nobody has: what is known of accounts will be true when a plain batch gets its turn."""
        self.unlocked.set()
        self.caution = 0
        """How many batches go under locks after the next one that was judged in vain."""
        self.cautious_batches = 0
        """How many batches still go under locks."""
        self.connect = connect
        self.observe = observe
        self._lanes = [_Lane(self) for _ in range(lanes)]
        self._listeners: list[Callable[[Written], None]] = []

    @property
    def queue_length(self) -> int:
        """Changes that wait or are being written."""
        return len(self.queue) + sum(lane.in_flight for lane in self._lanes)

    @property
    def is_writable(self) -> bool:
        """Whether the last try to reach the database succeeded."""
        return all(lane.is_writable for lane in self._lanes)

    async def finds_room(self) -> bool:
        """Whether there is room on the database's disk again. Only looks when there was none: small writes may fit into
        what the tables have already, so the first that succeeds proves nothing about the next."""
        if not self.is_full:
            return True
        try:
            connection = await self.connect()
            try:
                await connection.execute(_TRY_ROOM)
            finally:
                connection.terminate()
        except (*_CONNECTION_LOST, asyncpg.PostgresError, asyncpg.InternalClientError, KassaError):
            return False
        self.is_full = False
        return True

    @property
    def slots(self) -> tuple[int, ...]:
        """The writer slots that the lanes hold."""
        return tuple(lane.slot for lane in self._lanes)

    @asynccontextmanager
    async def plain_turn(self) -> AsyncIterator[None]:
        """The turn, when nobody has accounts under locks: what is known of them is then as it will be."""
        while True:
            while self.lockers:
                await self.unlocked.wait()
            async with self.turn:
                if not self.lockers:
                    yield
                    return

    def lock(self) -> None:
        """A batch is going to lock accounts."""
        self.lockers += 1
        self.unlocked.clear()

    def unlock(self) -> None:
        """It has ended."""
        self.lockers -= 1
        if not self.lockers:
            self.unlocked.set()

    def on_commit(self, listener: Callable[[Written], None]) -> None:
        self._listeners.append(listener)

    def tell(self, written: Written) -> None:
        """Wake those who wait for what a batch wrote. It is durable already, so no listener's fault may undo or repeat it."""
        for listener in self._listeners:
            try:
                listener(written)
            except Exception:
                log.exception("journal.listener_failed")

    def watched(self, changes: int, seconds: float) -> None:
        """Tell the observer of a batch that is durable; its faults are its own."""
        if self.observe is not None:
            try:
                self.observe(changes, seconds)
            except Exception:
                log.exception("journal.observer_failed")

    async def start(self) -> None:
        """Open the connections and take writer slots. Raises DatabaseUnreachable."""
        for lane in self._lanes:
            try:
                await lane.start()
            except _CONNECTION_LOST as error:
                raise DatabaseUnreachable(f"The journal cannot reach the database: {error}") from error

    async def stop(self) -> None:
        """Write what waits, then let go of the slots. What cannot be written, since the database is away, is refused."""
        self.is_stopping = True
        self.arrived.set()
        for lane in self._lanes:
            await lane.stop()

    def submit(self, change: Change) -> "asyncio.Future[Verdict]":
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.hand_in(change, partial(_tell_future, future))
        return future

    def hand_in(self, change: Change, told: Callable[[Verdict | KassaError], None]) -> None:
        if len(self.queue) >= self.queue_max or self.is_stopping:
            raise Busy(waiting=len(self.queue))
        self.queue.append(_Waiting(change, told))
        self.arrived.set()

    async def commit(self, change: Change) -> Verdict:
        return await asyncio.shield(self.submit(change))


class _Lane:
    """One connection, one writer slot, one batch at a time."""

    def __init__(self, journal: PostgresJournal) -> None:
        self.journal = journal
        self.slot = 0
        self.in_flight = 0
        self.is_writable = False
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None
        self._backend: _Backend | None = None
        self._batch = 0
        self._seq = 1
        self._head = EMPTY_DIGEST
        self._next_head = EMPTY_DIGEST
        self._generation = 0
        self._is_locking = False
        self._found_accounts: dict[AccountKey, int] = {}
        """Of the present batch: remembered when it is committed, since a new account may never come into being."""

    async def start(self) -> None:
        await self._open()
        self._task = asyncio.create_task(self._run(), name="journal")

    async def stop(self) -> None:
        if self._task is not None:
            await self._task
        if self._connection is not None and not self._connection.is_closed():
            await self._connection.close(timeout=5)

    # The loop

    async def _run(self) -> None:
        while True:
            queue = self.journal.queue
            if not queue:
                if self.journal.is_stopping:
                    return
                self.journal.arrived.clear()
                await self.journal.arrived.wait()
                continue
            taken = self._take()
            if self.journal.is_stopping and not self.is_writable:
                self._fail(taken, DatabaseUnreachable())
                continue
            self.in_flight = len(taken)
            try:
                await self._commit_all(taken)
            except BaseException as error:
                # The journal's outermost loop. Nobody may wait for ever, and the lane goes on with a fresh connection.
                self._drop_connection()
                self._fail(taken, OutcomeUnknown())
                if not isinstance(error, Exception):
                    raise
                log.exception("journal.batch_failed", changes=len(taken))
            finally:
                self.in_flight = 0

    def _take(self) -> list[_Waiting]:
        """The next batch: what waits and goes the same way as the first."""
        queue = self.journal.queue
        needs_locks = queue[0].needs_locks
        taken: list[_Waiting] = []
        others: list[_Waiting] = []
        for _ in range(min(len(queue), self.journal.batch_max)):
            waiting = queue.popleft()
            (taken if waiting.needs_locks is needs_locks else others).append(waiting)
        queue.extendleft(reversed(others))
        return taken

    async def _commit_all(self, taken: list[_Waiting]) -> None:
        """One batch, whatever happens to it: each caller gets the truth, once."""
        wait_s = self.journal.settle_s if self.is_writable else min(AWAY_S, self.journal.settle_s)
        deadline = time.monotonic() + wait_s
        while True:
            if self._connection is None or self._connection.is_closed():
                try:
                    await self._reopen(deadline)
                except DatabaseUnreachable as error:
                    self._fail(taken, error)
                    return
            try:
                started = time.perf_counter()
                later = await (self._write_plain(taken) if self._is_plain(taken) else self._write_under_locks(taken))
                self.journal.queue.extendleft(reversed(later))
                if answered := len(taken) - len(later):
                    # What only goes to the next batch is no progress: readiness looks at what is counted here.
                    self.journal.watched(answered, time.perf_counter() - started)
                return
            except _InDoubt as doubt:
                # It may have taken all the time to notice that nobody answers.
                if await self._find_truth(doubt, max(deadline, time.monotonic() + self.journal.settle_s / 2)):
                    return
            except (*_AGAIN, _NameWent):
                await self._roll_back()
            except _Outdated:
                await self._roll_back()
                self._be_cautious(taken)
            except _NO_ROOM as error:
                await self._roll_back()
                self.is_writable = False
                self.journal.is_full |= isinstance(error, asyncpg.DiskFullError)
                log.error("journal.no_room", error=str(error))
                self._fail(taken, DatabaseFull() if self.journal.is_full else DatabaseUnreachable())
                return
            except _CONNECTION_LOST as error:
                if isinstance(error, asyncpg.InterfaceError) and await self._roll_back():
                    # The connection is there; what we gave it is wrong.
                    await self._bisect(taken, error)
                    return
                log.warning("journal.connection_lost", error=repr(error), waiting=len(taken))
                self._drop_connection()
            except Exception as error:
                # Whatever a change did wrong (a rule that raises, a value that no column takes), COMMIT was not sent:
                # only that change may fail. Where the connection is gone as well, nothing is proven against the change.
                if await self._roll_back():
                    await self._bisect(taken, error)
                    return
                log.warning("journal.connection_lost", error=repr(error), waiting=len(taken))
            if time.monotonic() > deadline:
                self._fail(taken, DatabaseUnreachable())
                return

    async def _bisect(self, taken: list[_Waiting], error: Exception) -> None:
        """A poisonous change fails alone: the halves are written apart until it stands alone."""
        for waiting in taken:
            # Under locks a batch stays as it is; a plain one would take along what has come meanwhile, and never get smaller.
            waiting.needs_locks = True
        if len(taken) > 1:
            middle = len(taken) // 2
            await self._commit_all(taken[:middle])
            await self._commit_all(taken[middle:])
            return
        log.error("journal.poison", error=repr(error))
        refusal = error if isinstance(error, KassaError) else InvariantBroken(f"The change cannot be stored: {error}")
        self._fail(taken, refusal)

    def _fail(self, taken: Sequence[_Waiting], error: KassaError) -> None:
        for waiting in taken:
            waiting.tell(error)

    def _is_plain(self, taken: Sequence[_Waiting]) -> bool:
        if taken[0].needs_locks:
            return False
        if self.journal.cautious_batches:
            self.journal.cautious_batches -= 1
            return False
        return True

    def _be_cautious(self, taken: Sequence[_Waiting]) -> None:
        for waiting in taken:
            waiting.needs_locks = True
        self.journal.caution = min(2 * self.journal.caution + 1, CAUTION_MAX)
        self.journal.cautious_batches = self.journal.caution

    # One batch, plain

    async def _write_plain(self, taken: list[_Waiting]) -> list[_Waiting]:
        """Judge by what is known, and commit if it is so; returns what has to go under locks or into the next batch.

        Raises _Outdated, and _InDoubt once COMMIT was sent.
        """
        journal, connection = self.journal, self._connection
        await connection.execute(sql.BEGIN)
        read = Read()
        try:
            async with journal.plain_turn():
                self._top_up(taken)
                read.accounts = await self._known_accounts(taken)
                before = {account.id: _posted(account) for account in read.accounts.values()}
                judge = Judge(journal.tables, read, journal.clock.now(), self.slot, self._seq)
                answers, later = self._judge_plain(judge, assemble(taken))
                if judge.seq == judge.first_seq:
                    await self._roll_back()
                    return later
                statement = self._plain_statement(judge, before)
                row = await connection.fetchrow(statement.sql, *statement.values)
            if not row[0]:
                raise _Outdated
            written = await self._commit(judge, answers, later)
        except BaseException as error:
            journal.accounts.doubt(read.accounts.values())
            if isinstance(error, asyncpg.UniqueViolationError):
                raise _Outdated from error
            raise
        journal.caution = 0
        self._settled(judge)
        self._answer(answers)
        journal.tell(written)
        return later

    def _top_up(self, taken: list[_Waiting]) -> None:
        """What has come meanwhile and goes the same way comes along: fewer and larger batches."""
        queue = self.journal.queue
        while queue and not queue[0].needs_locks and len(taken) < self.journal.batch_max:
            taken.append(queue.popleft())
        self.in_flight = len(taken)

    async def _known_accounts(self, taken: Sequence[_Waiting]) -> dict[AccountKey, Account]:
        """The accounts of plain changes; those that are not known are read, without locks. Some may not exist."""
        keys = plain_accounts([waiting.change for waiting in taken])
        found, missing = self.journal.accounts.some(keys)
        if missing:
            rows = await self._connection.fetch(sql.READ_ACCOUNTS, *_columns(missing, 4))
            self.journal.accounts.learn(Account(AccountKey(*row[:4]), *row[4:]) for row in rows)
            found, _ = self.journal.accounts.some(keys)
        return found

    def _judge_plain(self, judge: Judge, assembly: Assembly) -> tuple[list[tuple[_Waiting, Verdict]], list[_Waiting]]:
        """Only what is accepted is written and so put to the proof. A refusal is not, so it is judged again under locks."""
        answers: list[tuple[_Waiting, Verdict]] = []
        later: list[_Waiting] = []
        for number, pending in enumerate(assembly.batch):
            verdict = judge.judge(pending)
            followers = assembly.followers.get(number, ())
            if type(verdict) is Committed:
                self._sort(pending, verdict, answers, later)
                for follower in followers:
                    self._sort(follower, follow(pending.change, verdict, follower.change), answers, later)
                continue
            for waiting in (pending, *followers):
                waiting.needs_locks = True
                later.append(waiting)
        later += [pending for pending in assembly.later if isinstance(pending, _Waiting)]
        return answers, later

    def _plain_statement(self, judge: Judge, before: dict[int, tuple[int, int, int]]) -> sql.Statement:
        writes = judge.writes
        statement = sql.Statement(self.journal.shapes)
        once = sorted(
            (home, *key, reply.status, reply.resource, reply.problem, judge.now) for home, key, reply in writes.once
        )
        statement.claim("once", sql.ONCE_COLUMNS, sql.ONCE_TYPES, once)
        statement.claim(
            "claim", sql.CLAIM_COLUMNS, sql.CLAIM_TYPES, sorted((home, *claim) for home, claim in writes.claims)
        )
        statement.move_accounts([_moved(account, *before[id]) for id, account in sorted(judge.touched.items())])
        statement.only_if_fitting()
        self._insert_rows(statement, judge)
        self._write_work(statement, judge)
        self._write_chain(statement, judge)
        return statement

    # One batch, under locks

    async def _write_under_locks(self, taken: list[_Waiting]) -> list[_Waiting]:
        try:
            return await self._write_batch(taken)
        finally:
            if self._is_locking:
                self._is_locking = False
                self.journal.unlock()

    async def _write_batch(self, taken: list[_Waiting]) -> list[_Waiting]:
        """Judge and commit; returns what has to wait for the next batch. Raises _InDoubt once COMMIT was sent."""
        connection = self._connection
        assembly = assemble(taken)
        now = self.journal.clock.now()
        self._found_accounts = {}
        await connection.execute(sql.BEGIN)
        read = Read()
        changes = [pending.change for pending in assembly.batch]
        await self._claim_names(read, changes, now)
        await self._read_rows(read, changes)
        await self._read_money(read, assembly, now)

        judge = Judge(self.journal.tables, read, now, self.slot, self._seq)
        answers, later = self._judge(judge, assembly)
        self.is_writable = True
        if judge.seq == judge.first_seq:
            await self._roll_back()
            self._answer(answers)
            return later
        await self._write(judge)
        written = await self._commit(judge, answers, later)
        self._settled(judge)
        self.journal.accounts.settle(judge.touched.values())
        self._answer(answers)
        self.journal.tell(written)
        return later

    async def _commit(self, judge: Judge, answers: list[tuple[_Waiting, Verdict]], later: list[_Waiting]) -> Written:
        due = sum(timer is not None for _, timer in judge.writes.timers.values())
        written = Written(len(judge.writes.events), len(judge.writes.messages), due)
        try:
            status = await self._connection.execute("COMMIT")
        except (*_CONNECTION_LOST, asyncpg.InternalClientError) as error:
            raise _InDoubt(answers, later, written) from error
        if status != "COMMIT":
            raise InvariantBroken("The database rolled back what was to be committed.", status=status)
        return written

    def _judge(self, judge: Judge, assembly: Assembly) -> tuple[list[tuple[_Waiting, Verdict]], list[_Waiting]]:
        answers: list[tuple[_Waiting, Verdict]] = []
        later: list[_Waiting] = []
        for number, pending in enumerate(assembly.batch):
            verdict = judge.judge(pending)
            self._sort(pending, verdict, answers, later)
            for follower in assembly.followers.get(number, ()):
                self._sort(follower, follow(pending.change, verdict, follower.change), answers, later)
        later += [pending for pending in assembly.later if isinstance(pending, _Waiting)]
        return answers, later

    def _sort(
        self, pending: Pending, verdict: Verdict | Deferred,
        answers: list[tuple[_Waiting, Verdict]], later: list[_Waiting],
    ) -> None:  # fmt: skip
        if not isinstance(pending, _Waiting):
            raise InvariantBroken("The writer's changes have callers.")
        if not isinstance(verdict, Deferred):
            answers.append((pending, verdict))
            return
        pending.deferrals += 1
        if pending.deferrals > BATCH_MAX:
            raise InvariantBroken("A change was deferred for ever.")
        later.append(pending)

    def _answer(self, answers: Sequence[tuple[_Waiting, Verdict]]) -> None:
        for waiting, verdict in answers:
            waiting.tell(verdict)

    def _settled(self, judge: Judge) -> None:
        self._seq = judge.seq
        self._batch += 1
        self._head = self._next_head

    # Reading under locks

    async def _claim_names(self, read: Read, changes: Sequence[Change], now: datetime) -> None:
        once: list[tuple[Any, ...]] = []
        claims: list[tuple[Any, ...]] = []
        for change in changes:
            if change.once is not None:
                operation, key, digest = change.once
                status, resource, problem = change.reply or Reply(200, None)
                once.append((change.home, operation, key, digest, status, resource, problem, now))
            for kind, name, resource_id in change.claims:
                claims.append((change.home, kind, name, resource_id))
        if not once and not claims:
            return
        once.sort(key=_first_three)
        claims.sort()
        row = await self._connection.fetchrow(sql.CLAIM_NAMES, *_columns(once, 8), *_columns(claims, 4))
        kept, claimed = row["kept"], row["claimed"]
        if kept < len(once):
            for found in await self._connection.fetch(sql.ONCE_BEFORE, *_columns([key[:3] for key in once], 3)):
                resource = found["resource"]
                reply = Reply(found["status"], Id(resource.hex) if resource else None, found["problem"])
                read.once[found["home"], found["operation"], found["key"]] = OnceRow(found["digest"], reply)
            if kept + len(read.once) < len(once):
                raise _NameWent
        if claimed < len(claims):
            for found in await self._connection.fetch(sql.CLAIMED_BEFORE, *_columns([key[:3] for key in claims], 3)):
                read.taken[found["home"], found["kind"], found["name"]] = Id(found["resource"].hex)
            if claimed + len(read.taken) < len({name[:3] for name in claims}):
                raise _NameWent

    async def _read_rows(self, read: Read, changes: Sequence[Change]) -> None:
        needs = Needs()
        for change in changes:
            if change.rule is not None or change.moves:
                needs.add_rows(change, self.journal.tables)
        for table in sorted(needs.roots, key=_number):
            await self._read_table(read, sql.lock_roots(table), table, needs.roots[table])
        for table in sorted(needs.children_of, key=_number):
            wanted = needs.children_of[table]
            for _, root in wanted:
                read.children[table, root] = []
            await self._read_table(read, sql.children_of(table), table, wanted)
            for _, root in wanted:
                read.children[table, root].sort()
        for table in sorted(needs.children_by_id, key=_number):
            await self._read_table(read, sql.children_by_id(table), table, needs.children_by_id[table])

    async def _read_table(self, read: Read, query: str, table: Table, keys: set[tuple[int, Id]]) -> None:
        ordered = sorted(keys)
        for row in await self._connection.fetch(query, [key[0] for key in ordered], [key[1] for key in ordered]):
            record = table.read(row)
            known = (table, record.id) in read.rows
            read.rows[table, record.id] = record
            if isinstance(record, Child) and not known and (table, record.root) in read.children:
                read.children[table, record.root].append(record.id)

    async def _read_money(self, read: Read, assembly: Assembly, now: datetime) -> None:
        """Holds, accounts and what is consumed, for the changes as their rules decide them now."""
        needs = read.asked = Needs()
        for pending in assembly.batch:
            if not self._is_named_before(read, pending.change):
                decided = pending.decided(read, now)
                if isinstance(decided, Change):
                    needs.add_money(decided)
        if needs.holds or needs.accounts:
            self._is_locking = True
            self.journal.lock()
            async with self.journal.turn:
                if needs.holds:
                    await self._lock_holds(read, needs)
                await self._lock_accounts(read, needs)
        if needs.done:
            await self._lock_done(read, needs.done, now)

    def _is_named_before(self, read: Read, change: Change) -> bool:
        """Whether the judge will refuse it for its names alone; then nothing may be opened for it."""
        once = change.once
        return (once is not None and (change.home, once.operation, once.key) in read.once) or any(
            (change.home, claim.kind, claim.name) in read.taken for claim in change.claims
        )

    async def _lock_holds(self, read: Read, needs: Needs) -> None:
        ordered = sorted(needs.holds)
        rows = await self._connection.fetch(sql.LOCK_HOLDS, [key.id for key in ordered], [key.part for key in ordered])
        for row in rows:
            debit = AccountKey(row["debit_home"], row["debit_code"], row["debit_owner"], row["debit_currency"])
            credit = AccountKey(row["credit_home"], row["credit_code"], row["credit_owner"], row["credit_currency"])
            key = HoldKey(Id(row["id"].hex), row["part"])
            read.holds[key] = Hold(key, debit, credit, row["amount"], row["expires_at"], row["state"])
            self._found_accounts[debit] = row["debit_id"]
            self._found_accounts[credit] = row["credit_id"]
            needs.accounts.update((debit, credit))

    async def _lock_accounts(self, read: Read, needs: Needs) -> None:
        ids: dict[int, AccountKey] = {}
        missing: list[AccountKey] = []
        known = self.journal.accounts
        for key in needs.accounts:
            id = self._found_accounts.get(key) or known.id_of(key)
            if id is None:
                missing.append(key)
            else:
                ids[id] = key
        if missing:
            await self._find_accounts(missing, needs)
            ids.update((self._found_accounts[key], key) for key in missing if key in self._found_accounts)
        rows = await self._connection.fetch(sql.LOCK_ACCOUNTS, sql.numbers(sorted(ids)))
        accounts = read.accounts
        for id, limit, overdraft, debits, credits, debits_pending, credits_pending, version in rows:
            key = ids[id]
            accounts[key] = Account(
                key, id, limit, overdraft, debits, credits, debits_pending, credits_pending, version
            )

    async def _find_accounts(self, missing: list[AccountKey], needs: Needs) -> None:
        missing.sort()
        await self._look_up(missing)
        rows = []
        absent = [key for key in missing if key not in self._found_accounts]
        for key in absent:
            opening = needs.opens.get(key)
            if opening is not None:
                # The overdraft comes with the change, when it is accepted; the account stays if it is refused.
                rows.append((*key, int(opening.limit), 0))
            elif key.code in LIMITS:
                rows.append((*key, int(LIMITS[key.code]), 0))  # type: ignore[index]
        if rows:
            await self._connection.execute(sql.OPEN_ACCOUNTS, *_columns(rows, 6))
            await self._look_up(absent)

    async def _look_up(self, keys: Sequence[AccountKey]) -> None:
        for row in await self._connection.fetch(sql.ACCOUNT_IDS, *_columns(keys, 4)):
            key = AccountKey(row["home"], row["code"], row["owner"], row["currency"])
            self._found_accounts[key] = row["id"]

    async def _lock_done(self, read: Read, wanted: set[Done], now: datetime) -> None:
        messages = sorted(done.id for done in wanted if isinstance(done, MessageDone))
        timers = sorted((done.entity, done.kind) for done in wanted if isinstance(done, TimerDone))
        inbox = sorted((done.group, done.record) for done in wanted if isinstance(done, InboxDone))
        if messages:
            rows = await self._connection.fetch(sql.LOCK_MESSAGES, messages)
            read.present.update(MessageDone(Id(row["id"].hex)) for row in rows)
        if timers:
            rows = await self._connection.fetch(sql.LOCK_TIMERS, *_columns(timers, 2))
            read.present.update(TimerDone(Id(row["entity"].hex), row["kind"], row["generation"]) for row in rows)
        if inbox:
            rows = await self._connection.fetch(sql.TAKE_INBOX, *_columns(inbox, 2), now)
            read.present.update(InboxDone(row["group_name"], row["record"]) for row in rows)

    # Writing

    async def _write(self, judge: Judge) -> None:
        """Everything that was accepted, in one statement."""
        await self._release(judge)
        statement = sql.Statement(self.journal.shapes)
        self._insert_rows(statement, judge)
        self._update_rows(statement, judge)
        touched = judge.touched
        statement.update(
            "account", ("id",), sql.ACCOUNT_COLUMNS, ("bigint",) * 6,
            [
                (id, account.debits_posted, account.credits_posted, account.debits_pending, account.credits_pending,
                 account.version)
                for id, account in sorted(touched.items())
            ],
        )  # fmt: skip
        await self._set_limits(judge)
        self._write_holds(statement, judge)
        statement.insert("move", sql.MOVE_COLUMNS, sql.MOVE_TYPES, judge.writes.moves)
        self._write_work(statement, judge)
        self._write_chain(statement, judge)
        await self._connection.fetch(statement.sql, *statement.values)

    def _insert_rows(self, statement: sql.Statement, judge: Judge) -> None:
        """What is written once: new rows, transfers, events."""
        writes, rows = judge.writes, judge.read.rows
        for table, born in writes.born.items():
            values = [(*table.values(rows[table, record.id]), self.slot, seq, ord) for record, seq, ord in born]
            statement.insert(table.name, table.stored_columns, table.stored_types, values)
        statement.insert("transfer", sql.TRANSFER_COLUMNS, sql.TRANSFER_TYPES, writes.entries)
        statement.insert("event", sql.EVENT_COLUMNS, sql.EVENT_TYPES, writes.events)

    async def _release(self, judge: Judge) -> None:
        writes = judge.writes
        if writes.released_once:
            await self._connection.execute(sql.RELEASE_ONCE, *_columns(writes.released_once, 3))
        if writes.released_claims:
            await self._connection.execute(sql.RELEASE_CLAIMS, *_columns(writes.released_claims, 3))
        taken = {done for done in writes.consumed if isinstance(done, InboxDone)}
        unused = [done for done in judge.read.present if isinstance(done, InboxDone) and done not in taken]
        if unused:
            await self._connection.execute(sql.RELEASE_INBOX, *_columns(unused, 2))

    def _update_rows(self, statement: sql.Statement, judge: Judge) -> None:
        newborn = {(table, record.id) for table, born in judge.writes.born.items() for record, _, _ in born}
        by_table: dict[Table, list[tuple[Any, ...]]] = {}
        for table, id in judge.writes.dirty:
            if (table, id) not in newborn:
                record = judge.read.rows[table, id]
                values = table.values(record)
                counted = (values[2], values[3]) if table.is_root else (values[2],)
                by_table.setdefault(table, []).append((values[0], id, *counted, *table.mutable_values(record)))
        for table, rows in by_table.items():
            counters = ("version", "sequence") if table.is_root else ("version",)
            columns = ("home", "id", *counters, *(table.columns[i] for i in table.mutable_at))
            types = (
                "bigint", "uuid", *("bigint" for _ in counters), *(table.column_types[i] for i in table.mutable_at),
            )  # fmt: skip
            statement.update(table.name, ("home", "id"), columns, types, sorted(rows, key=_first_two))

    async def _set_limits(self, judge: Judge) -> None:
        rows = [
            (judge.read.accounts[opening.key].id, int(opening.limit), opening.overdraft)
            for opening in judge.writes.limits
        ]
        if rows:
            statement = sql.Statement(self.journal.shapes)
            statement.update("account", ("id",), sql.LIMIT_COLUMNS, ("bigint", "smallint", "bigint"), rows)
            await self._connection.fetch(statement.sql, *statement.values)

    def _write_holds(self, statement: sql.Statement, judge: Judge) -> None:
        accounts, holds = judge.read.accounts, judge.read.holds
        new = [holds[key] for key in judge.writes.new_holds]
        statement.insert(
            "hold", sql.HOLD_COLUMNS, sql.HOLD_TYPES,
            [
                (hold.key.id, hold.key.part, accounts[hold.debit].id, accounts[hold.credit].id, hold.amount,
                 hold.expires_at, hold.state)
                for hold in new
            ],
        )  # fmt: skip
        touched = sorted(judge.writes.touched_holds)
        statement.update(
            "hold", ("id", "part"), ("id", "part", "state"), ("uuid", "smallint", "text"),
            [(key.id, key.part, holds[key].state) for key in touched],
        )  # fmt: skip

    def _write_work(self, statement: sql.Statement, judge: Judge) -> None:
        """Messages, timers, and what was consumed."""
        writes, now = judge.writes, judge.now
        statement.insert(
            "message", sql.MESSAGE_COLUMNS, sql.MESSAGE_TYPES,
            [
                (message.id, home, message.topic, message.key, message.priority, message.due or now, now,
                 msgspec.json.encode(dict(message.headers)).decode(), message.body)
                for home, message in writes.messages
            ],
        )  # fmt: skip
        statement.delete(
            "message", ("id",), ("uuid",), [(done.id,) for done in writes.consumed if isinstance(done, MessageDone)]
        )
        gone, due = [], []
        for (entity, kind), (home, timer) in sorted(writes.timers.items()):
            if timer is None:
                gone.append((entity, kind))
            else:
                # Counted on from the time at which the connection was opened, so no setting looks like an earlier one.
                self._generation += 1
                due.append((entity, kind, home, timer.root or entity, timer.due, self._generation))
        statement.delete("timer", ("entity", "kind"), ("uuid", "text"), gone)
        statement.upsert(
            "timer", sql.TIMER_COLUMNS, sql.TIMER_TYPES, "entity, kind",
            "root = EXCLUDED.root, due = EXCLUDED.due, generation = EXCLUDED.generation, tries = 0, leased_until = NULL, "
            "last_error = NULL",
            due,
        )  # fmt: skip

    def _write_chain(self, statement: sql.Statement, judge: Judge) -> None:
        batch, first, last = self._batch + 1, judge.first_seq, judge.seq - 1
        digests = as_json([sorted(batch_digests(judge.writes).items())])
        self._next_head = chain_digest(self._head, self.slot, batch, first, last, digests)
        row = (self.slot, batch, first, last, judge.now, digests, self._head, self._next_head)
        statement.insert("chain", sql.CHAIN_COLUMNS, sql.CHAIN_TYPES, [row])

    # The connection and the truth

    async def _open(self) -> None:
        connection = await self.journal.connect()
        try:
            await connection.execute(
                # The plans of this connection are pinned to index look-ups; PL and planner guesses have cost minutes before.
                "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off; "
                "SET enable_mergejoin = off; SET jit = off; SET lock_timeout = '10s'; "
                "SET idle_in_transaction_session_timeout = '30s'"
            )
            isolation = await connection.fetchval("SHOW transaction_isolation")
            if isolation != "read committed":
                raise InvariantBroken("The journal is right only at READ COMMITTED.", isolation=isolation)
            row = await connection.fetchrow(
                "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"
            )
            slot = await self._take_slot(connection)
            head = await connection.fetchrow(sql.HEAD, slot)
        except BaseException:
            connection.terminate()
            raise
        self._connection, self.slot = connection, slot
        self._backend = _Backend(row["pid"], row["backend_start"])
        self._batch = head["batch"] if head else 0
        self._seq = head["last_seq"] + 1 if head else 1
        self._head = self._next_head = head["digest"] if head else EMPTY_DIGEST
        self._generation = time.time_ns()
        self.journal.accounts.forget()
        self.is_writable = True

    async def _take_slot(self, connection: Any) -> int:
        preferred = [self.slot] if self.slot else []
        for slot in (*preferred, *SLOTS):
            if await connection.fetchval("SELECT pg_try_advisory_lock($1::integer, $2::integer)", SLOT_LOCK, slot):
                return int(slot)
        raise DatabaseUnreachable("All writer slots are taken: 63 processes write to this database already.")

    def _drop_connection(self) -> None:
        self.is_writable = False
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _roll_back(self) -> bool:
        """Whether the connection still works; else it is dropped, which rolls back too."""
        if self._connection is None:
            return False
        try:
            await self._connection.execute("ROLLBACK")
        except (*_CONNECTION_LOST, asyncpg.PostgresError, asyncpg.InternalClientError):
            self._drop_connection()
            return False
        return True

    async def _reopen(self, deadline: float) -> None:
        """A new connection, once the old server process is surely gone, so that it cannot commit behind our back.

        Raises DatabaseUnreachable when there is none at the deadline.
        """
        pause_s = 0.05
        while True:
            try:
                await self._open_after(self._backend)
                return
            except (*_CONNECTION_LOST, asyncpg.PostgresError, asyncpg.InternalClientError, KassaError) as error:
                if time.monotonic() > deadline:
                    raise DatabaseUnreachable(f"The journal cannot reach the database: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    async def _open_after(self, old: _Backend | None) -> None:
        connection = await self.journal.connect()
        try:
            for _ in range(END_TRIES_MAX if old is not None else 0):
                if not await connection.fetchval(_END_BACKEND, *(old or ())):
                    break
                await asyncio.sleep(0.02)
            else:
                if old is not None:
                    raise DatabaseUnreachable("The server process of the lost connection does not end.")
        finally:
            connection.terminate()
        await self._open()

    async def _find_truth(self, doubt: _InDoubt, deadline: float) -> bool:
        """Whether the batch whose COMMIT was not answered is there; if so its callers are answered.

        False: it is surely not there, and may be written again. What cannot be found out in time is said to be unknown.
        """
        slot, batch, digest = self.slot, self._batch + 1, self._next_head
        self._drop_connection()
        callers = [waiting for waiting, _ in doubt.answers]
        log.warning("journal.in_doubt", writer=slot, batch=batch, changes=len(callers))
        try:
            await self._reopen(deadline)
            stored = await self._connection.fetchval(
                "SELECT digest FROM chain WHERE writer = $1 AND batch = $2", slot, batch
            )
            if stored == digest:
                await self._connection.execute(_SETTLE)
        except (*_CONNECTION_LOST, asyncpg.PostgresError, KassaError):
            self._drop_connection()
            self._fail(callers, OutcomeUnknown())
            self.journal.queue.extendleft(reversed(doubt.later))
            return True
        if stored != digest:
            # None, or the batch of another process that took our slot while we had no connection: ours never was.
            return False
        self._answer(doubt.answers)
        self.journal.queue.extendleft(reversed(doubt.later))
        self.journal.tell(doubt.written)
        return True


def _posted(account: Account) -> tuple[int, int, int]:
    return account.debits_posted, account.credits_posted, account.version


def _moved(account: Account, debits: int, credits: int, version: int) -> tuple[int, ...]:
    """MOVED_COLUMNS of an account that stood so before."""
    return (
        account.id, account.limit, account.overdraft, account.debits_posted, account.credits_posted,
        account.debits_pending, account.credits_pending, account.version,
        account.debits_posted - debits, account.credits_posted - credits, account.version - version,
    )  # fmt: skip


def _columns(rows: Sequence[Sequence[Any]], width: int) -> list[Sequence[Any]]:
    """Rows as columns; `width` empty columns where there are no rows."""
    return list(zip(*rows, strict=True)) if rows else [()] * width


def _first_three(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(row[:3])


def _first_two(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(row[:2])


def _number(table: Table) -> int:
    return table.number
