"""Tamper evidence: is what stands in the database what was committed, all of it and nothing else?

Four questions, each answered from the rows themselves: does every writer's chain hold together and cover its rows; do the
balances follow from the transfers; do the current rows follow from their moves; are sequences without gaps. The writers'
heads are tied together in anchors signed by a key outside the database: up to the last anchor, even a person with all
rights on the database cannot change the past unseen.

Not covered, because it is not history: whom an account is for and its limits (account.home, code, owner, limit_side,
overdraft), idempotency keys and claimed names, timers, messages and inbox rows, and a root's counter of events.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import asyncpg
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kassa.journal import statements as sql
from kassa.journal.judge import EMPTY_DIGEST, as_json, chain_digest, rows_digest
from kassa.journal.table import Table, Tables, plain

FAULTS_MAX = 100
"""Faults that are told one by one; past that only their number grows."""


PREFETCH = 2000
"""Rows fetched at a time."""
BATCH_ROWS_MAX = 524_288
"""Rows of one table that a batch can have: 4 096 changes, of which the largest, a page of a replay, has some hundred rows. A
chain row that claims more was not written by the journal."""


@dataclass
class Report:
    """What a verification found. `faults` are sentences, the first hundred; `fault_count` counts all."""

    batches: int = 0
    rows: int = 0
    transfers: int = 0
    accounts: int = 0
    anchored_at: datetime | None = None
    """Proven up to this anchor; None: there is no anchor yet, so only consistency was proven."""
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0

    @property
    def is_sound(self) -> bool:
        return self.fault_count == 0

    def fault(self, sentence: str) -> None:
        self.fault_count += 1
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(sentence)


async def verify(connection: asyncpg.Connection, tables: Tables, anchor_key: Ed25519PublicKey | None = None) -> Report:
    """Check everything in one snapshot. Reads the whole database once, row by row; writes nothing."""
    report = Report()
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        writers = [row["writer"] for row in await connection.fetch(_writers(tables))]
        for writer in writers:
            await _verify_chain(connection, tables, writer, report)
        await _verify_balances(connection, report)
        for table in tables.all:
            await _verify_moves(connection, table, report)
        async for row in connection.cursor(_EVENT_GAPS, prefetch=PREFETCH):
            report.fault(f"The events of {row['root'].hex} have a gap: {row['events']} events up to {row['last']}.")
        await _verify_anchors(connection, report, anchor_key)
    return report


def _writers(tables: Tables) -> str:
    """Whoever any row says that it wrote it, so that no row is passed over because its writer has no chain."""
    names = ("chain", "event", "move", "transfer", *(table.name for table in tables.all))
    return " UNION ".join(f"SELECT DISTINCT writer FROM {name}" for name in names) + " ORDER BY writer"


_CHAIN = """
SELECT batch, first_seq, last_seq, digests, previous, digest FROM chain WHERE writer = $1 ORDER BY batch"""

_EVENT_GAPS = """
SELECT root, count(*) AS events, max(sequence) AS last FROM event GROUP BY home, root HAVING max(sequence) <> count(*)"""

_WRONG_ACCOUNTS = """
WITH side AS (
    SELECT debit AS id, amount AS debited, 0::bigint AS credited, 1 AS steps,
           CASE kind WHEN 2 THEN hold_amount ELSE -hold_amount END AS debit_held, 0::bigint AS credit_held, kind
      FROM transfer
     UNION ALL
    SELECT credit, 0, amount, 1, 0, CASE kind WHEN 2 THEN hold_amount ELSE -hold_amount END, kind FROM transfer
), replayed AS (
    SELECT id, sum(debited) FILTER (WHERE kind IN (1, 3)) AS debits, sum(credited) FILTER (WHERE kind IN (1, 3)) AS credits,
           sum(debit_held) AS debits_held, sum(credit_held) AS credits_held, sum(steps) AS steps
      FROM side GROUP BY id
)
SELECT id FROM account LEFT JOIN replayed USING (id)
 WHERE (debits_posted, credits_posted, debits_pending, credits_pending, version)
       <> (coalesce(debits, 0), coalesce(credits, 0), coalesce(debits_held, 0), coalesce(credits_held, 0), coalesce(steps, 0))"""

_WRONG_HOLDS = """
WITH open AS (
    SELECT debit AS id, amount AS debits, 0::bigint AS credits FROM hold WHERE state = 'open'
     UNION ALL
    SELECT credit, 0, amount FROM hold WHERE state = 'open'
), held AS (
    SELECT id, sum(debits) AS debits, sum(credits) AS credits FROM open GROUP BY id
)
SELECT id FROM account LEFT JOIN held USING (id)
 WHERE (debits_pending, credits_pending) <> (coalesce(debits, 0), coalesce(credits, 0))"""

_WRONG_STATEMENTS = """
WITH side AS (
    SELECT debit AS id, debit_version AS version, debit_balance AS balance,
           CASE WHEN kind IN (1, 3) THEN -amount ELSE 0 END AS change FROM transfer
     UNION ALL
    SELECT credit, credit_version, credit_balance, CASE WHEN kind IN (1, 3) THEN amount ELSE 0 END FROM transfer
), stepped AS (
    SELECT id, version, balance, change, row_number() OVER w AS place, sum(change) OVER w AS expected
      FROM side WINDOW w AS (PARTITION BY id ORDER BY version)
)
SELECT id, min(version) AS version FROM stepped WHERE version <> place OR balance <> expected GROUP BY id"""


async def _verify_chain(connection: asyncpg.Connection, tables: Tables, writer: int, report: Report) -> None:
    """Walk a writer's batches in order, and beside them the rows of every table that it wrote."""
    streams = {
        name: _Rows(connection.cursor(query, writer, prefetch=PREFETCH)) for name, query in _streams(tables).items()
    }
    previous, expected_seq, expected_batch = EMPTY_DIGEST, 1, 1
    async for row in connection.cursor(_CHAIN, writer, prefetch=PREFETCH):
        batch, first, last = row["batch"], row["first_seq"], row["last_seq"]
        report.batches += 1
        if batch != expected_batch or first != expected_seq:
            report.fault(f"Writer {writer}: batch {expected_batch} (change {expected_seq}) is missing before {batch}.")
        if row["previous"] != previous:
            report.fault(f"Writer {writer}: batch {batch} does not follow the batch before it.")
        if row["digest"] != chain_digest(row["previous"], writer, batch, first, last, row["digests"]):
            report.fault(f"Writer {writer}: the chain row of batch {batch} was changed.")
        found = {}
        for name, stream in streams.items():
            if strays := await stream.pass_over(before=first):
                report.fault(f"Writer {writer}: {strays} rows of {name} before batch {batch} belong to no batch.")
            rows = await stream.up_to(last)
            report.rows += len(rows)
            if rows:
                found[name] = rows_digest(rows)
        stored = dict(msgspec.json.decode(row["digests"], type=tuple[list[tuple[str, str]]])[0])
        for name in sorted(found.keys() | stored.keys()):
            if found.get(name) != stored.get(name):
                report.fault(f"Writer {writer}: rows of {name} in batch {batch} (changes {first} to {last}) differ.")
        previous, expected_seq, expected_batch = row["digest"], last + 1, batch + 1
    for name, stream in streams.items():
        if rest := await stream.pass_over(before=None):
            report.fault(f"Writer {writer}: {rest} rows of {name} belong to no batch.")


class _Rows:
    """A table's rows of one writer in order, taken batch by batch. The last two values of a row are seq and ord.

    Keeps the rows of one batch at most, whatever was taken out of the chain.
    """

    def __init__(self, rows: AsyncIterator[Any]) -> None:
        self._rows = aiter(rows)
        self._next: tuple[Any, ...] | None = None
        self._is_over = False

    async def up_to(self, seq: int) -> list[tuple[Any, ...]]:
        """The rows up to a change, as they were hashed. Past BATCH_ROWS_MAX the rest is left to `pass_over`."""
        taken: list[tuple[Any, ...]] = []
        while len(taken) < BATCH_ROWS_MAX:
            row = await self._peek()
            if row is None or row[0] > seq:
                break
            taken.append(_hashed(row))
            self._next = None
        return taken

    async def pass_over(self, *, before: int | None) -> int:
        """How many rows there are before a change (None: to the end). Keeps none of them."""
        passed = 0
        while (row := await self._peek()) is not None and (before is None or row[0] < before):
            passed += 1
            self._next = None
        return passed

    async def _peek(self) -> tuple[Any, ...] | None:
        if self._next is None and not self._is_over:
            try:
                self._next = tuple(await anext(self._rows))
            except StopAsyncIteration:
                self._is_over = True
        return self._next


def _hashed(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tuple that was hashed when the row was written. `row` is seq, a marker, then the values."""
    _, kind, *values = row
    if kind == "plain":
        return tuple(plain(value) for value in values)
    fixed = int(kind)
    *columns, first, seq, ord = (plain(value) for value in values)
    facts = first if first is not None else as_json(columns[fixed:])
    return (*columns[:fixed], facts, seq, ord)


def _streams(tables: Tables) -> dict[str, str]:
    """For each table the query that gives its rows of one writer in the order in which they were hashed."""
    streams = {
        "transfer": _plain_stream("transfer", sql.TRANSFER_COLUMNS),
        "move": _plain_stream("move", sql.MOVE_COLUMNS),
        "event": _plain_stream("event", sql.EVENT_COLUMNS),
    }
    for table in tables.all:
        columns = [table.columns[i] for i in (*table.fixed_at, *table.mutable_at)]
        names = ", ".join(f't."{name}"' for name in columns)
        root = "id" if table.is_root else "root"
        streams[table.name] = (
            f"SELECT t.seq, '{len(table.fixed_at)}' AS kind, {names}, m.before, t.seq, t.ord FROM {table.name} AS t "
            f"LEFT JOIN move AS m ON m.home = t.home AND m.root = t.{root} AND m.id = t.id AND m.version = 1 "
            "WHERE t.writer = $1 ORDER BY t.seq, t.ord"
        )
    return streams


def _plain_stream(table: str, columns: Sequence[str]) -> str:
    names = ", ".join(f'"{name}"' for name in columns)
    return f"SELECT seq, 'plain' AS kind, {names} FROM {table} WHERE writer = $1 ORDER BY seq, ord"


async def _verify_balances(connection: asyncpg.Connection, report: Report) -> None:
    report.accounts = await connection.fetchval("SELECT count(*) FROM account")
    report.transfers = await connection.fetchval("SELECT count(*) FROM transfer")
    async for row in connection.cursor(_WRONG_ACCOUNTS, prefetch=PREFETCH):
        report.fault(f"The balances of account {row['id']} do not follow from its transfers.")
    async for row in connection.cursor(_WRONG_STATEMENTS, prefetch=PREFETCH):
        report.fault(f"The statement of account {row['id']} has a gap or a wrong balance from {row['version']} on.")
    async for row in connection.cursor(_WRONG_HOLDS, prefetch=PREFETCH):
        report.fault(f"What is held on account {row['id']} does not follow from the open holds.")
    total = await connection.fetchval("SELECT coalesce(sum(credits_posted - debits_posted), 0) FROM account")
    if total != 0:
        report.fault(f"The books do not balance: credits less debits are {total}.")


async def _verify_moves(connection: asyncpg.Connection, table: Table, report: Report) -> None:
    """A row that moved stands as its last move left it."""
    columns = ", ".join(f't."{table.columns[i]}"' for i in table.mutable_at)
    root = "id" if table.is_root else "root"
    query = (
        f"SELECT t.id, m.after, {columns} FROM {table.name} AS t "
        f"LEFT JOIN move AS m ON m.home = t.home AND m.root = t.{root} AND m.id = t.id AND m.version = t.version "
        "WHERE t.version > 0"
    )
    async for row in connection.cursor(query, prefetch=PREFETCH):
        id, after, *values = row
        if after is None or after != as_json([plain(value) for value in values]):
            report.fault(f"The {table.name} {id.hex} is not as its last move left it.")
    turned_back = (
        f"SELECT t.id FROM {table.name} AS t JOIN move AS m "
        f"ON m.home = t.home AND m.root = t.{root} AND m.id = t.id AND m.version = t.version + 1"
    )
    async for row in connection.cursor(turned_back, prefetch=PREFETCH):
        report.fault(f"The {table.name} {row['id'].hex} stands before its last move.")
    gaps = (
        "SELECT id, count(*) AS moves, max(version) AS last FROM move WHERE table_number = $1 "
        "GROUP BY home, root, id HAVING count(*) <> max(version)"
    )
    async for row in connection.cursor(gaps, table.number, prefetch=PREFETCH):
        report.fault(f"Moves of {table.name} {row['id'].hex} are missing: {row['moves']} up to {row['last']}.")


# Anchors


async def write_anchor(connection: asyncpg.Connection, key: Ed25519PrivateKey, now: datetime) -> int:
    """Tie the writers' heads together and sign them; returns the anchor's number."""
    async with connection.transaction():
        await connection.execute("LOCK TABLE anchor IN SHARE ROW EXCLUSIVE MODE")
        heads = await _heads(connection)
        number: int = 1 + await connection.fetchval("SELECT coalesce(max(number), 0) FROM anchor")
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        await connection.execute(
            "INSERT INTO anchor (number, at, heads, key_id, signature) VALUES ($1, $2, $3, $4, $5)",
            number, now, heads, public.hex()[:16], key.sign(_anchored(number, now, heads)),
        )  # fmt: skip
    return number


async def _heads(connection: asyncpg.Connection) -> str:
    rows = await connection.fetch(
        "SELECT DISTINCT ON (writer) writer, batch, digest FROM chain ORDER BY writer, batch DESC"
    )
    return msgspec.json.encode([(row["writer"], row["batch"], row["digest"].hex()) for row in rows]).decode()


def _anchored(number: int, at: datetime, heads: str) -> bytes:
    return f"kassa-anchor:{number}:{at.isoformat()}:{heads}".encode()


async def _verify_anchors(connection: asyncpg.Connection, report: Report, key: Ed25519PublicKey | None) -> None:
    expected = 1
    anchors = "SELECT number, at, heads, signature FROM anchor ORDER BY number"
    async for row in connection.cursor(anchors, prefetch=PREFETCH):
        if row["number"] != expected:
            report.fault(f"Anchor {expected} is missing.")
        expected = row["number"] + 1
        if key is not None:
            try:
                key.verify(row["signature"], _anchored(row["number"], row["at"], row["heads"]))
            except InvalidSignature:
                report.fault(f"Anchor {row['number']} is not signed by the anchor key.")
                continue
        for writer, batch, digest in msgspec.json.decode(row["heads"], type=list[tuple[int, int, str]]):
            stored = await connection.fetchval(
                "SELECT digest FROM chain WHERE writer = $1 AND batch = $2", writer, batch
            )
            if stored is None or stored.hex() != digest:
                report.fault(f"Writer {writer}: batch {batch} is not the one that anchor {row['number']} holds.")
        if key is not None:
            report.anchored_at = row["at"]
