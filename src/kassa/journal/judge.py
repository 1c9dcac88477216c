"""The judge: what a batch of changes means, given what was read under locks. Pure; both journals use it.

The journal reads (`Read`), the judge decides change by change in order of arrival, and what it accepted stands in `Writes`.
A refused change leaves nothing behind. A change that needs something that was not read is deferred to the next batch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import msgspec

from kassa.errors import InvariantBroken, KassaError
from kassa.ids import Id
from kassa.journal.change import (
    AccountOpen,
    Again,
    Aggregate,
    Change,
    Claim,
    Committed,
    Consumed,
    Done,
    KeyReused,
    Message,
    Missing,
    Money,
    Move,
    OnceKey,
    Refused,
    Reply,
    Rule,
    Stale,
    Taken,
    Timer,
    TimerDone,
    Verdict,
)
from kassa.journal.table import Child, Record, Root, Table, Tables
from kassa.ledger.model import Account, AccountKey, Entry, Hold, HoldKey, Kind, post

_V = TypeVar("_V")
RowKey = tuple[Table, Id]
OnceId = tuple[int, str, str]
ClaimId = tuple[int, str, str]


class OnceRow(NamedTuple):
    """What is stored under an idempotency key."""

    digest: bytes
    reply: Reply


class Deferred(NamedTuple):
    """Not judged: it needs something that this batch did not read."""


class Read:
    """What a batch read under its locks, kept current while it is judged."""

    __slots__ = ("accounts", "asked", "children", "fresh", "holds", "once", "present", "rows", "taken")

    def __init__(self) -> None:
        self.asked: Needs | None = None
        """The money and work that was looked for, so that what was not found can be told from what nobody looked for;
        None: everything there is."""
        self.rows: dict[RowKey, Record] = {}
        self.children: dict[tuple[Table, Id], list[Id]] = {}
        """All children of a root in one table, where a rule asked for all."""
        self.accounts: dict[AccountKey, Account] = {}
        self.holds: dict[HoldKey, Hold] = {}
        self.present: set[Done] = set()
        """Of what is to be consumed: what is there and locked."""
        self.once: dict[OnceId, OnceRow] = {}
        """Keys that were used before this batch, or by an earlier change of it."""
        self.taken: dict[ClaimId, Id] = {}
        self.fresh: set[Id] = set()
        """Roots that were born in this batch."""

    def add_child(self, table: Table, record: Child) -> None:
        """A child that was read."""
        self.rows[table, record.id] = record

    def aggregate(self, rule: Rule) -> Aggregate | None:
        """The rule's root with the children it asked for; None when there is no such root."""
        root = self.rows.get((rule.table, rule.id))
        if root is None:
            return None
        if not rule.children:
            return Aggregate(root, ())
        found: list[Record] = []
        for table in rule.children:
            ids = rule.ids or self.children.get((table, rule.id), ())
            found += [row for id in ids if (row := self.rows.get((table, id))) is not None and row.root_id == rule.id]
        return Aggregate(root, tuple(found))


class Needs:
    """What a batch has to read: gathered from its changes before anything is locked."""

    __slots__ = ("accounts", "children_by_id", "children_of", "done", "holds", "opens", "roots")

    def __init__(self) -> None:
        self.roots: dict[Table, set[tuple[int, Id]]] = defaultdict(set)
        self.children_of: dict[Table, set[tuple[int, Id]]] = defaultdict(set)
        self.children_by_id: dict[Table, set[tuple[int, Id]]] = defaultdict(set)
        self.accounts: set[AccountKey] = set()
        self.opens: dict[AccountKey, AccountOpen] = {}
        self.holds: set[HoldKey] = set()
        self.done: set[Done] = set()

    def add_rows(self, change: Change, tables: Tables) -> None:
        """The roots to lock and the children to read."""
        rule = change.rule
        if rule is not None:
            self.roots[rule.table].add((change.home, rule.id))
            for table in rule.children:
                if rule.ids:
                    self.children_by_id[table].update((change.home, id) for id in rule.ids)
                else:
                    self.children_of[table].add((change.home, rule.id))
        for move in change.moves:
            table = tables.of(move.before)
            self.roots[table.parent or table].add((change.home, move.before.root_id))
            if table.parent is not None:
                self.children_by_id[table].add((change.home, move.before.id))

    def add_money(self, change: Change) -> None:
        """Accounts, holds and what is consumed."""
        for _, _, debit, credit, _, hold, _ in change.transfers:
            if debit is not None:
                self.accounts.add(debit)
            if credit is not None:
                self.accounts.add(credit)
            if hold is not None:
                self.holds.add(hold)
        for opening in change.opens:
            self.opens[opening.key] = opening
            self.accounts.add(opening.key)
        if change.done:
            self.done.update(change.done)


def is_plain(change: Change) -> bool:
    """Whether a change only adds: all that its judgement rests on are names that must be new, and accounts."""
    if change.rule is not None or change.moves or change.done or change.opens:
        return False
    if any(timer.due is None for timer in change.timers):
        return False
    return all(transfer.kind == Kind.SINGLE for transfer in change.transfers)


def plain_accounts(changes: Iterable[Change]) -> set[AccountKey]:
    """The accounts that plain changes touch."""
    keys = set()
    for change in changes:
        for _, _, debit, credit, _, _, _ in change.transfers:
            if debit is not None and credit is not None:
                keys.add(debit)
                keys.add(credit)
    return keys


class Pending:
    """A change on its way, with what the sketch of its rule gave."""

    __slots__ = ("change", "seen", "sketch")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.seen: Aggregate | None = None
        self.sketch: Change | KassaError | None = None

    def decided(self, read: Read, now: datetime) -> Change | KassaError | None:
        """The change with its rule decided on the root as it stands; None when there is no root.

        Rules are pure, so an aggregate that has not moved since the sketch gives the sketch again.
        """
        rule = self.change.rule
        if rule is None:
            return self.change
        aggregate = read.aggregate(rule)
        if aggregate is None or aggregate.root.home != self.change.home:
            return None
        if self.sketch is None or not _same(aggregate, self.seen):
            decided = rule.decide(aggregate, now)
            self.sketch = decided if isinstance(decided, KassaError) else _merge(self.change, decided, rule)
            self.seen = aggregate
        return self.sketch


def _same(now: Aggregate, then: Aggregate | None) -> bool:
    return (
        then is not None
        and now.root is then.root
        and len(now.children) == len(then.children)
        and all(a is b for a, b in zip(now.children, then.children, strict=True))
    )


def _merge(outer: Change, inner: Change, rule: Rule) -> Change:
    return Change(
        home=outer.home,
        once=outer.once,
        claims=outer.claims,
        opens=outer.opens + inner.opens,
        new=outer.new + inner.new,
        moves=outer.moves + inner.moves,
        transfers=outer.transfers + inner.transfers,
        root=rule.id,
        events=outer.events + inner.events,
        messages=outer.messages + inner.messages,
        timers=outer.timers + inner.timers,
        done=outer.done + inner.done,
        reply=outer.reply,
        rule=rule,
        result=inner.result,
    )


class Assembly(NamedTuple):
    """The changes that can be judged side by side, and those that cannot."""

    batch: list[Pending]
    followers: dict[int, list[Pending]]
    """By the place of the first: later changes with the same idempotency key share its effect."""
    later: list[Pending]
    """Changes that claim a name which an earlier one of the batch claims: they go into the next batch."""


def assemble(waiting: Sequence[Pending]) -> Assembly:
    """Sort out who in a batch shares a key or wants the same name, so that each name is claimed by one change."""
    batch: list[Pending] = []
    followers: dict[int, list[Pending]] = {}
    later: list[Pending] = []
    once_at: dict[OnceId, int] = {}
    claimed: set[ClaimId] = set()
    for pending in waiting:
        change = pending.change
        once = change.once
        once_id = (change.home, once.operation, once.key) if once is not None else None
        if once_id is not None and once_id in once_at:
            followers.setdefault(once_at[once_id], []).append(pending)
            continue
        if change.claims:
            claims = [(change.home, claim.kind, claim.name) for claim in change.claims]
            if not claimed.isdisjoint(claims):
                later.append(pending)
                continue
            claimed.update(claims)
        if once_id is not None:
            once_at[once_id] = len(batch)
        batch.append(pending)
    return Assembly(batch, followers, later)


def follow(first: Change, verdict: Verdict | Deferred, follower: Change) -> Verdict | Deferred:
    """What a change gets that came in the same batch under the same key as `first`."""
    if first.once is None or follower.once is None:
        raise InvariantBroken("A follower shares a key.")
    if isinstance(verdict, Committed | Again):
        if first.once.digest != follower.once.digest:
            return KeyReused(follower.once)
        return Again(first.reply or Reply(200, None)) if isinstance(verdict, Committed) else verdict
    if isinstance(verdict, Deferred) or first.once.digest != follower.once.digest:
        return Deferred()
    return verdict


class Writes:
    """What the accepted changes of a batch write, as rows in column order."""

    __slots__ = (
        "born", "claims", "consumed", "dirty", "entries", "events", "limits", "messages", "moves", "new_holds",
        "once", "released_claims", "released_once", "timers", "touched_holds",
    )  # fmt: skip

    def __init__(self) -> None:
        self.born: dict[Table, list[tuple[Record, int, int]]] = defaultdict(list)
        """Record as it was born, seq, ord."""
        self.dirty: dict[RowKey, None] = {}
        self.moves: list[tuple[Any, ...]] = []
        self.entries: list[tuple[Any, ...]] = []
        self.events: list[tuple[Any, ...]] = []
        self.messages: list[tuple[int, Message]] = []
        self.timers: dict[tuple[Id, str], tuple[int, Timer | None]] = {}
        """(entity, kind) to (home, timer); None: it goes."""
        self.consumed: list[Done] = []
        self.new_holds: dict[HoldKey, None] = {}
        self.touched_holds: dict[HoldKey, None] = {}
        self.limits: list[AccountOpen] = []
        self.once: list[tuple[int, OnceKey, Reply]] = []
        self.claims: list[tuple[int, Claim]] = []
        self.released_once: list[OnceId] = []
        self.released_claims: list[ClaimId] = []


class Judge:
    """Judges one batch."""

    def __init__(self, tables: Tables, read: Read, now: datetime, writer: int, seq: int) -> None:
        self.tables = tables
        self.read = read
        self.now = now
        self.writer = writer
        self.first_seq = seq
        self.seq = seq
        self.writes = Writes()
        self.touched: dict[int, Account] = {}

    def judge(self, pending: Pending) -> Verdict | Deferred:
        """One change: all of it, or nothing."""
        outer = pending.change
        refusal = self._named_before(outer)
        if refusal is not None:
            return refusal
        if outer.rule is not None and outer.rule.id in self.read.fresh:
            return self._give_back(outer, Deferred())
        change = pending.decided(self.read, self.now)
        if change is None:
            rule = outer.rule
            if rule is None:
                raise InvariantBroken("A change without a rule was not decided.")
            return self._give_back(outer, Missing(rule.table.name, rule.id))
        if isinstance(change, KassaError):
            return self._give_back(outer, Refused(change))
        unfit = self._consumable(change) or self._stale(change) or self._unread(change)
        if unfit is not None:
            return self._give_back(outer, unfit)
        before = self._open(change.opens) if change.opens else ()
        entries: list[Entry] = []
        if change.transfers:
            posted = post(self.read.accounts, self.read.holds, change.transfers, self.now)
            if not isinstance(posted, list):
                for account, limit, overdraft in before:
                    account.limit, account.overdraft = limit, overdraft
                return self._give_back(outer, Money(posted))
            entries = posted
        if before:
            self.writes.limits += change.opens
        return self._accept(change, entries)

    # Refusals, in the documented order: key, claims, root, rule, what is consumed, versions, money.

    def _named_before(self, change: Change) -> Verdict | None:
        home, once = change.home, change.once
        if once is not None:
            stored = self.read.once.get((home, once.operation, once.key))
            if stored is not None:
                return Again(stored.reply) if stored.digest == once.digest else KeyReused(once)
        for claim in change.claims:
            by = self.read.taken.get((home, claim.kind, claim.name))
            if by is not None:
                if once is not None:
                    self.writes.released_once.append((home, once.operation, once.key))
                self.writes.released_claims += [
                    (home, other.kind, other.name)
                    for other in change.claims
                    if (home, other.kind, other.name) not in self.read.taken
                ]
                return Taken(claim, by)
        return None

    def _give_back(self, change: Change, verdict: _V) -> _V:
        """What was claimed for a change that is refused is free again."""
        if change.once is not None:
            self.writes.released_once.append((change.home, change.once.operation, change.once.key))
        for claim in change.claims:
            self.writes.released_claims.append((change.home, claim.kind, claim.name))
        return verdict

    def _consumable(self, change: Change) -> Consumed | Deferred | None:
        asked = self.read.asked
        for done in change.done:
            if asked is not None and done not in asked.done:
                return Deferred()
            if done not in self.read.present:
                return Consumed(done)
            if isinstance(done, TimerDone) and (done.entity, done.kind) in self.writes.timers:
                # An earlier change of this batch has set the timer again.
                return Consumed(done)
        return None

    def _stale(self, change: Change) -> Stale | None:
        for before, after, _ in change.moves:
            table = self.tables.of(before)
            current = self.read.rows.get((table, before.id))
            if current is None or current.version != before.version or current.home != change.home:
                return Stale(table.name, before.id)
            if table.fixed_values(before) != table.fixed_values(after):
                raise InvariantBroken("A move changes what never changes.", table=table.name, id=before.id)
        return None

    def _unread(self, change: Change) -> Deferred | None:
        """Whether the ledger would need an account or a hold that this batch did not lock."""
        accounts, holds, asked = self.read.accounts, self.read.holds, self.read.asked
        if asked is None:
            return None
        for kind, _, debit, credit, _, hold, _ in change.transfers:
            if hold is not None and hold not in holds and hold not in asked.holds:
                return Deferred()
            if kind == Kind.SETTLE or kind == Kind.RELEASE:
                known = holds.get(hold) if hold is not None else None
                if known is not None and (known.debit not in accounts or known.credit not in accounts):
                    return Deferred()
                continue
            for key in (debit, credit):
                if key is not None and key not in accounts and key not in asked.accounts:
                    return Deferred()
        return None

    def _accept(self, change: Change, entries: list[Entry]) -> Committed:
        seq, writes, read, now = self.seq, self.writes, self.read, self.now
        self.seq += 1
        ord = 0
        root_id = change.root
        for record in change.new:
            table = self.tables.of(record)
            if isinstance(record, Root):
                if root_id == record.id and change.events and record.sequence != len(change.events):
                    record = msgspec.structs.replace(record, sequence=len(change.events))
                read.fresh.add(record.id)
            elif isinstance(record, Child):
                read.children.setdefault((table, record.root), []).append(record.id)
            read.rows[table, record.id] = record
            writes.born[table].append((record, seq, ord))
            ord += 1
        for move in change.moves:
            self._move(change, move, seq, ord)
            ord += 1
        for entry in entries:
            self._enter(entry, root_id, seq, ord)
            ord += 1
        if change.events:
            self._tell(change, seq, ord)
        for message in change.messages:
            writes.messages.append((change.home, message))
        for done in change.done:
            read.present.discard(done)
            if isinstance(done, TimerDone):
                writes.timers[done.entity, done.kind] = (change.home, None)
            else:
                writes.consumed.append(done)
        for timer in change.timers:
            writes.timers[timer.entity, timer.kind] = (change.home, timer if timer.due is not None else None)
        if change.once is not None:
            reply = change.reply or Reply(200, None)
            writes.once.append((change.home, change.once, reply))
            read.once[change.home, change.once.operation, change.once.key] = OnceRow(change.once.digest, reply)
        for claim in change.claims:
            writes.claims.append((change.home, claim))
            read.taken[change.home, claim.kind, claim.name] = claim.resource
        return Committed(change.result, now, self.writer, seq)

    def _move(self, change: Change, move: Move, seq: int, ord: int) -> None:
        table = self.tables.of(move.before)
        key = (table, move.before.id)
        current = self.read.rows[key]
        changes: dict[str, Any] = {"version": current.version + 1}
        if isinstance(current, Root):
            changes["sequence"] = current.sequence
        after = msgspec.structs.replace(move.after, **changes)
        self.read.rows[key] = after
        self.writes.dirty[key] = None
        self.writes.moves.append((
            change.home, current.root_id, current.id, after.version, self.now, seq, self.writer, ord, table.number,
            move.event, current.state, after.state,  # type: ignore[attr-defined]
            as_json(table.mutable_values(current)) if current.version == 0 else None,
            as_json(table.mutable_values(after)),
        ))  # fmt: skip

    def _enter(self, entry: Entry, root: Id | None, seq: int, ord: int) -> None:
        debit, credit = entry.debit, entry.credit
        self.touched[debit.id] = debit
        self.touched[credit.id] = credit
        hold = entry.hold
        if hold is not None:
            if entry.kind == Kind.HOLD:
                self.writes.new_holds[hold] = None
            elif hold not in self.writes.new_holds:
                self.writes.touched_holds[hold] = None
        self.writes.entries.append((
            debit.id, entry.debit_version, entry.debit_balance, credit.id, entry.credit_version, entry.credit_balance,
            entry.amount, entry.hold_amount, seq, self.now, root,
            hold.id if hold is not None else None, hold.part if hold is not None else None,
            self.writer, ord, int(entry.kind), int(entry.code),
        ))  # fmt: skip

    def _tell(self, change: Change, seq: int, ord: int) -> None:
        root_id = change.root
        if root_id is None:
            raise InvariantBroken("Events need a root.", types=[event.type for event in change.events])
        sequence = 0
        if change.rule is not None:
            key = (change.rule.table, root_id)
            root = self.read.rows[key]
            if not isinstance(root, Root):
                raise InvariantBroken("The rule's table is not a root.", table=change.rule.table.name)
            sequence = root.sequence
            self.read.rows[key] = msgspec.structs.replace(root, sequence=sequence + len(change.events))
            self.writes.dirty[key] = None
        elif root_id not in self.read.fresh:
            raise InvariantBroken("Events of an existing root need a rule.", root=root_id)
        for number, event in enumerate(change.events):
            self.writes.events.append((
                self.writer, seq, ord + number, change.home, root_id, sequence + number + 1, self.now, event.type, event.data,
            ))  # fmt: skip

    def _open(self, opens: Sequence[AccountOpen]) -> list[tuple[Account, int, int]]:
        """Sets the limits under which this change's own transfers are judged; gives back what they were, where they differ."""
        before = []
        for opening in opens:
            account = self.read.accounts[opening.key]
            if (account.limit, account.overdraft) != (opening.limit, opening.overdraft):
                before.append((account, account.limit, account.overdraft))
                account.limit, account.overdraft = int(opening.limit), opening.overdraft
        return before


_json = msgspec.json.Encoder()


def as_json(values: Sequence[Any]) -> str:
    """A row's changing columns as JSON text: the form that is stored and hashed."""
    return _json.encode(values).decode()


# The chain


EMPTY_DIGEST = bytes(32)
_pack = msgspec.msgpack.Encoder()


def rows_digest(rows: Sequence[tuple[Any, ...]]) -> str:
    """SHA-256 (hex) of rows in (seq, ord) order, each a tuple of the stored values."""
    return hashlib.sha256(_pack.encode(rows)).hexdigest()


def batch_digests(writes: Writes) -> dict[str, str]:
    """One digest per table of what a batch wrote once for all."""
    digests: dict[str, str] = {}
    for table, born in writes.born.items():
        digests[table.name] = rows_digest([(*creation_facts(table, record), seq, ord) for record, seq, ord in born])
    if writes.entries:
        digests["transfer"] = rows_digest(writes.entries)
    if writes.moves:
        digests["move"] = rows_digest(writes.moves)
    if writes.events:
        digests["event"] = rows_digest(writes.events)
    return digests


def creation_facts(table: Table, record: Record) -> tuple[Any, ...]:
    """What was true of a row when it was born: its fixed columns, and the first values of those that change."""
    fixed, mutable = table.parts(record)
    return (*fixed, as_json(mutable))


def chain_digest(previous: bytes, writer: int, batch: int, first_seq: int, last_seq: int, digests: str) -> bytes:
    """The digest of one chain row; it covers the row before it, so that no batch can be changed, added or taken out."""
    return hashlib.sha256(previous + f"{writer}:{batch}:{first_seq}:{last_seq}:{digests}".encode()).digest()
