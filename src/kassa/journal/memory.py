"""The journal without a database: the same judge over dictionaries. For rules, simulations and users' own tests.

It is the twin of `writer.py`: one conformance suite runs against both.
"""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec

from kassa.clock import Clock, SystemClock
from kassa.errors import KassaError
from kassa.ids import Id
from kassa.journal.change import Change, Done, InboxDone, Message, MessageDone, Timer, TimerDone, Verdict
from kassa.journal.journal import Written
from kassa.journal.judge import (
    EMPTY_DIGEST,
    ClaimId,
    Deferred,
    Judge,
    Needs,
    OnceId,
    OnceRow,
    Pending,
    Read,
    RowKey,
    as_json,
    assemble,
    batch_digests,
    chain_digest,
    follow,
)
from kassa.journal.table import Child, Record, Table, Tables
from kassa.ledger.chart import LIMITS
from kassa.ledger.model import Account, AccountKey, Hold, HoldKey

WRITER = 1
DEFERRALS_MAX = 100
"""A change that was deferred so often would be deferred for ever."""


class StoredTimer(msgspec.Struct):
    """A timer that is set."""

    home: int
    entity: Id
    kind: str
    root: Id
    due: datetime
    generation: int
    tries: int = 0


class StoredEvent(msgspec.Struct, frozen=True):
    """An event as the log has it."""

    writer: int
    seq: int
    ord: int
    home: int
    root: Id
    sequence: int
    at: datetime
    type: str
    data: bytes


class MemoryJournal:
    """Keeps everything in dictionaries; `commit` judges at once."""

    def __init__(self, tables: Tables, clock: Clock | None = None) -> None:
        self.tables = tables
        self.clock = clock or SystemClock()
        self.rows: dict[RowKey, Record] = {}
        self.accounts: dict[AccountKey, Account] = {}
        self.holds: dict[HoldKey, Hold] = {}
        self.once: dict[OnceId, OnceRow] = {}
        self.claims: dict[ClaimId, Id] = {}
        self.events: list[StoredEvent] = []
        self.entries: list[tuple[object, ...]] = []
        self.moves: list[tuple[object, ...]] = []
        self.messages: dict[Id, tuple[int, Message]] = {}
        self.timers: dict[tuple[Id, str], StoredTimer] = {}
        self.inbox: set[InboxDone] = set()
        self.chain: list[tuple[int, int, int, int, str, bytes, bytes]] = []
        self._children: dict[tuple[Table, Id], list[Id]] = {}
        self._seq = 1
        self._generation = 0
        self._listeners: list[Callable[[Written], None]] = []

    def on_commit(self, listener: Callable[[Written], None]) -> None:
        self._listeners.append(listener)

    def submit(self, change: Change) -> "asyncio.Future[Verdict]":
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        future.set_result(self.commit_now([change])[0])
        return future

    def hand_in(self, change: Change, told: Callable[[Verdict | KassaError], None]) -> None:
        told(self.commit_now([change])[0])

    async def commit(self, change: Change) -> Verdict:
        return self.commit_now([change])[0]

    def commit_now(self, changes: Sequence[Change]) -> list[Verdict]:
        """Commit several changes as one batch (and more, where some have to wait for others)."""
        verdicts: dict[int, Verdict] = {}
        waiting = [Pending(change) for change in changes]
        place = {id(pending): number for number, pending in enumerate(waiting)}
        for _ in range(DEFERRALS_MAX):
            if not waiting:
                break
            waiting = self._batch(waiting, place, verdicts)
        return [verdicts[number] for number in range(len(changes))]

    def children(self, table: Table, root: Id) -> list[Record]:
        """All children of a root in one table, oldest first."""
        return [self.rows[table, id] for id in self._children.get((table, root), [])]

    def all_of(self, table: Table) -> list[Record]:
        """All rows of a table, oldest first."""
        return [record for (of, _), record in self.rows.items() if of is table]

    def _batch(self, waiting: list[Pending], place: dict[int, int], verdicts: dict[int, Verdict]) -> list[Pending]:
        assembly = assemble(waiting)
        now = self.clock.now()
        judge = Judge(self.tables, self._read([pending.change for pending in assembly.batch]), now, WRITER, self._seq)
        again: list[Pending] = []
        for number, pending in enumerate(assembly.batch):
            verdict = judge.judge(pending)
            for one, answer in [
                (pending, verdict),
                *(
                    (follower, follow(pending.change, verdict, follower.change))
                    for follower in assembly.followers.get(number, [])
                ),
            ]:
                if isinstance(answer, Deferred):
                    again.append(one)
                else:
                    verdicts[place[id(one)]] = answer
        self._write(judge, now)
        return sorted(again + assembly.later, key=lambda pending: place[id(pending)])

    def _read(self, changes: Sequence[Change]) -> Read:
        """Everything: the judge works on the stored dictionaries themselves, and undoes what it refuses."""
        read = Read()
        read.rows = self.rows
        read.children = self._children
        read.accounts = _Accounts(self.accounts)
        read.holds = self.holds
        read.once = dict(self.once)
        read.taken = dict(self.claims)
        needs = Needs()
        for change in changes:
            needs.add_money(change)
        for opening in needs.opens.values():
            if opening.key not in self.accounts:
                number = len(self.accounts) + 1
                self.accounts[opening.key] = Account(opening.key, number, int(opening.limit))
        read.present = _Present(self)
        return read

    def _write(self, judge: Judge, now: datetime) -> None:
        writes = judge.writes
        for home, once, reply in writes.once:
            self.once[home, once.operation, once.key] = OnceRow(once.digest, reply)
        for home, claim in writes.claims:
            self.claims[home, claim.kind, claim.name] = claim.resource
        new_events = [StoredEvent(*row) for row in writes.events]
        self.events += new_events
        self.entries += writes.entries
        self.moves += writes.moves
        for home, message in writes.messages:
            self.messages[message.id] = (home, message)
        for done in writes.consumed:
            if isinstance(done, MessageDone):
                self.messages.pop(done.id, None)
            elif isinstance(done, InboxDone):
                self.inbox.add(done)
        for (entity, kind), (home, timer) in writes.timers.items():
            self._set_timer(entity, kind, home, timer)
        if judge.seq > judge.first_seq:
            self._chain(judge)
        due = sum(timer is not None for _, timer in writes.timers.values())
        for listener in self._listeners:
            listener(Written(len(new_events), len(writes.messages), due))

    def _set_timer(self, entity: Id, kind: str, home: int, timer: Timer | None) -> None:
        if timer is None or timer.due is None:
            self.timers.pop((entity, kind), None)
            return
        self._generation += 1
        self.timers[entity, kind] = StoredTimer(home, entity, kind, timer.root or entity, timer.due, self._generation)

    def _chain(self, judge: Judge) -> None:
        previous = self.chain[-1][6] if self.chain else EMPTY_DIGEST
        batch, first, last = len(self.chain) + 1, judge.first_seq, judge.seq - 1
        digests = as_json([sorted(batch_digests(judge.writes).items())])
        self.chain.append(
            (WRITER, batch, first, last, digests, previous, chain_digest(previous, WRITER, batch, first, last, digests))
        )
        self._seq = judge.seq


class _Accounts(dict[AccountKey, Account]):
    """The stored accounts; those of the chart come into being when they are first asked for."""

    def __init__(self, stored: dict[AccountKey, Account]) -> None:
        super().__init__()
        self._stored = stored

    def get(self, key: AccountKey, default: object = None) -> Account | None:  # type: ignore[override]
        account = self._stored.get(key)
        if account is None and key.code in LIMITS:
            account = Account(key, len(self._stored) + 1, int(LIMITS[key.code]))  # type: ignore[index]
            self._stored[key] = account
        return account

    def __getitem__(self, key: AccountKey) -> Account:
        return self._stored[key]

    def __contains__(self, key: object) -> bool:
        return key in self._stored or (isinstance(key, AccountKey) and key.code in LIMITS)


class _Present(set[Done]):
    """Whether something that is to be consumed is there, asked of the journal itself."""

    def __init__(self, journal: MemoryJournal) -> None:
        super().__init__()
        self._journal = journal
        self._gone: set[Done] = set()

    def __contains__(self, done: object) -> bool:
        if done in self._gone:
            return False
        if isinstance(done, MessageDone):
            return done.id in self._journal.messages
        if isinstance(done, TimerDone):
            timer = self._journal.timers.get((done.entity, done.kind))
            return timer is not None and timer.generation == done.generation
        return isinstance(done, InboxDone) and done not in self._journal.inbox

    def discard(self, done: object) -> None:
        if isinstance(done, MessageDone | TimerDone | InboxDone):
            self._gone.add(done)


def children_of(journal: MemoryJournal, table: Table, root: Id) -> list[Child]:
    """All children of a root in one table, as children."""
    return [record for record in journal.children(table, root) if isinstance(record, Child)]
