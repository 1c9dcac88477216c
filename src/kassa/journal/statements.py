"""The journal's SQL, made from the tables' descriptions. Every hot statement takes arrays; a batch of one is the same path.

Rows are looked up `FROM unnest(sorted keys) CROSS JOIN LATERAL (SELECT … WHERE key = …)`: that form locks in key order, and
no planner ever turned it into a walk over the table (docs/decisions/0003).
"""

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

from kassa.journal.table import Table

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"

CLAIM_NAMES = """
WITH kept AS (
    INSERT INTO once (home, operation, key, digest, status, resource, problem, at)
    SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bytea[], $5::smallint[], $6::uuid[], $7::bytea[],
                         $8::timestamptz[])
    ON CONFLICT DO NOTHING RETURNING 1
), claimed AS (
    INSERT INTO claim (home, kind, name, resource)
    SELECT * FROM unnest($9::bigint[], $10::text[], $11::text[], $12::uuid[])
    ON CONFLICT DO NOTHING RETURNING 1
)
SELECT (SELECT count(*) FROM kept) AS kept, (SELECT count(*) FROM claimed) AS claimed"""
"""Takes idempotency keys and names, in sorted order, and says how many were new."""

ONCE_BEFORE = """
SELECT o.home, o.operation, o.key, o.digest, o.status, o.resource, o.problem
  FROM unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, operation, key)
 CROSS JOIN LATERAL (SELECT * FROM once WHERE home = k.home AND operation = k.operation AND key = k.key
                        AND xmin <> pg_current_xact_id()::xid) AS o"""
"""Which of these keys were there before this transaction, and what they hold."""

CLAIMED_BEFORE = """
SELECT c.home, c.kind, c.name, c.resource
  FROM unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, kind, name)
 CROSS JOIN LATERAL (SELECT * FROM claim WHERE home = k.home AND kind = k.kind AND name = k.name
                        AND xmin <> pg_current_xact_id()::xid) AS c"""
"""Which of these names were taken before this transaction, and by what."""

RELEASE_ONCE = """
DELETE FROM once USING unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, operation, key)
 WHERE once.home = k.home AND once.operation = k.operation AND once.key = k.key"""
"""Gives back the keys of refused changes."""

RELEASE_CLAIMS = """
DELETE FROM claim USING unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, kind, name)
 WHERE claim.home = k.home AND claim.kind = k.kind AND claim.name = k.name"""
"""Gives back the names of refused changes."""

ACCOUNT_IDS = """
SELECT a.id, a.home, a.code, a.owner, a.currency
  FROM unnest($1::bigint[], $2::smallint[], $3::text[], $4::text[]) AS k (home, code, owner, currency)
 CROSS JOIN LATERAL (SELECT * FROM account WHERE home = k.home AND code = k.code AND owner = k.owner
                        AND currency = k.currency) AS a"""
"""The ids of accounts by their keys."""

OPEN_ACCOUNTS = """
INSERT INTO account (home, code, owner, currency, limit_side, overdraft)
SELECT * FROM unnest($1::bigint[], $2::smallint[], $3::text[], $4::text[], $5::smallint[], $6::bigint[])
ON CONFLICT DO NOTHING"""
"""Creates accounts that are missing, in sorted order."""

LOCK_ACCOUNTS = """
SELECT a.id, a.limit_side, a.overdraft, a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending, a.version
  FROM unnest($1::text::bigint[]) AS k (id)
 CROSS JOIN LATERAL (SELECT * FROM account WHERE id = k.id FOR NO KEY UPDATE) AS a"""
"""Locks and reads accounts in order of id."""

LOCK_HOLDS = """
SELECT h.id, h.part, h.amount, h.expires_at, h.state,
       d.id AS debit_id, d.home AS debit_home, d.code AS debit_code, d.owner AS debit_owner, d.currency AS debit_currency,
       c.id AS credit_id, c.home AS credit_home, c.code AS credit_code, c.owner AS credit_owner,
       c.currency AS credit_currency
  FROM unnest($1::uuid[], $2::smallint[]) AS k (id, part)
 CROSS JOIN LATERAL (SELECT * FROM hold WHERE id = k.id AND part = k.part FOR NO KEY UPDATE) AS h
  JOIN LATERAL (SELECT * FROM account WHERE id = h.debit) AS d ON true
  JOIN LATERAL (SELECT * FROM account WHERE id = h.credit) AS c ON true"""
"""Locks and reads holds in order of their keys, with the names of their accounts."""

LOCK_MESSAGES = """
SELECT m.id FROM unnest($1::uuid[]) AS k (id)
 CROSS JOIN LATERAL (SELECT id FROM message WHERE id = k.id FOR UPDATE) AS m"""
"""Locks messages that are to be consumed; what is gone does not come back."""

LOCK_TIMERS = """
SELECT t.entity, t.kind, t.generation FROM unnest($1::uuid[], $2::text[]) AS k (entity, kind)
 CROSS JOIN LATERAL (SELECT * FROM timer WHERE entity = k.entity AND kind = k.kind FOR UPDATE) AS t"""
"""Locks timers that are to be acted on."""

TAKE_INBOX = """
INSERT INTO inbox (group_name, record, at)
SELECT g, r, $3 FROM unnest($1::text[], $2::text[]) AS k (g, r)
ON CONFLICT DO NOTHING RETURNING group_name, record"""
"""Notes records of a broker as handled; only those that were not yet come back."""

RELEASE_INBOX = """
DELETE FROM inbox USING unnest($1::text[], $2::text[]) AS k (g, r) WHERE group_name = k.g AND record = k.r"""
"""Forgets inbox records of refused changes."""

HEAD = "SELECT batch, last_seq, digest FROM chain WHERE writer = $1 ORDER BY batch DESC LIMIT 1"
"""The last batch of a writer's chain."""


def _quoted(names: Sequence[str], prefix: str = "") -> str:
    return ", ".join(f'{prefix}"{name}"' for name in names)


@cache
def lock_roots(table: Table) -> str:
    """Locks and reads roots in order of (home, id)."""
    return (
        f"SELECT {_quoted(table.columns, 'r.')} FROM unnest($1::bigint[], $2::uuid[]) AS k (home, id) "
        f"CROSS JOIN LATERAL (SELECT * FROM {table.name} WHERE home = k.home AND id = k.id FOR NO KEY UPDATE) AS r"
    )


@cache
def children_of(table: Table) -> str:
    """Reads all children of roots that are locked, in no order.

    Asked for them in order of id, the planner walks a home's whole primary key for each root of a table that is young.
    """
    return (
        f"SELECT {_quoted(table.columns, 'r.')} FROM unnest($1::bigint[], $2::uuid[]) AS k (home, id) "
        f"CROSS JOIN LATERAL (SELECT * FROM {table.name} WHERE home = k.home AND root = k.id) AS r"
    )


@cache
def children_by_id(table: Table) -> str:
    """Reads single children of roots that are locked."""
    return (
        f"SELECT {_quoted(table.columns, 'r.')} FROM unnest($1::bigint[], $2::uuid[]) AS k (home, id) "
        f"CROSS JOIN LATERAL (SELECT * FROM {table.name} WHERE home = k.home AND id = k.id) AS r"
    )


_WHOLE_NUMBERS = frozenset(("bigint", "smallint"))


def numbers(column: Iterable[int | None]) -> str:
    """Whole numbers as PostgreSQL writes an array: the driver's own array encoder costs five times as much per number."""
    return "{" + repr(list(column))[1:-1].replace("None", "NULL") + "}"


class Statement:
    """One statement with a part per table that the batch writes; the parts run in one round trip."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.values: list[Any] = []

    def _arrays(self, types: Sequence[str]) -> str:
        start = len(self.values) + 1
        return ", ".join(
            f"${start + i}::text::{type}[]" if type in _WHOLE_NUMBERS else f"${start + i}::{type}[]"
            for i, type in enumerate(types)
        )

    def _add(self, sql: str, types: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._parts.append(f"w{len(self._parts)} AS ({sql})")
        self.values += [
            numbers(column) if type in _WHOLE_NUMBERS else column
            for type, column in zip(types, zip(*rows, strict=True), strict=True)
        ]

    def insert(
        self, table: str, columns: Sequence[str], types: Sequence[str], rows: Sequence[Sequence[Any]],
        same: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Insert rows, given in column order. Columns of `same` have one value in all rows and travel once.

        A column that is null in all rows is left out: half of a payment's columns, and each costs time on both sides.
        """
        if not rows:
            return
        names: list[str] = []
        selected: list[str] = []
        arrays: list[str] = []
        first = len(self.values)
        for name, type, column in zip(columns, types, zip(*rows, strict=True), strict=True):
            if column.count(None) == len(column):
                continue
            names.append(name)
            number = len(self.values) + 1
            if name in same:
                selected.append(f"${number}::{type}")
                self.values.append(column[0])
            elif type in _WHOLE_NUMBERS:
                arrays.append(f"${number}::text::{type}[]")
                selected.append(f"u.c{number - first}")
                self.values.append(numbers(column))
            else:
                arrays.append(f"${number}::{type}[]")
                selected.append(f"u.c{number - first}")
                self.values.append(column)
        aliases = ", ".join(choice[2:] for choice in selected if choice.startswith("u."))
        self._parts.append(
            f"w{len(self._parts)} AS (INSERT INTO {table} ({_quoted(names)}) "
            f"SELECT {', '.join(selected)} FROM unnest({', '.join(arrays)}) AS u ({aliases}))"
        )

    def upsert(
        self, table: str, columns: Sequence[str], types: Sequence[str], key: str, update: str,
        rows: Sequence[Sequence[Any]],
    ) -> None:  # fmt: skip
        """Insert rows or update those with the same key."""
        if rows:
            sql = (
                f"INSERT INTO {table} ({_quoted(columns)}) SELECT * FROM unnest({self._arrays(types)}) "
                f"ON CONFLICT ({key}) DO UPDATE SET {update}"
            )
            self._add(sql, types, rows)

    def update(
        self, table: str, keys: Sequence[str], columns: Sequence[str], types: Sequence[str],
        rows: Sequence[Sequence[Any]],
    ) -> None:  # fmt: skip
        """Update rows by key; `columns` and `rows` begin with the keys."""
        if rows:
            names = ", ".join(f'"{name}"' for name in columns)
            sets = ", ".join(f'"{name}" = u."{name}"' for name in columns[len(keys) :])
            where = " AND ".join(f't."{name}" = u."{name}"' for name in keys)
            sql = f"UPDATE {table} AS t SET {sets} FROM unnest({self._arrays(types)}) AS u ({names}) WHERE {where}"
            self._add(sql, types, rows)

    def delete(self, table: str, keys: Sequence[str], types: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Delete rows by key."""
        if rows:
            names = ", ".join(f'"{name}"' for name in keys)
            where = " AND ".join(f't."{name}" = u."{name}"' for name in keys)
            sql = f"DELETE FROM {table} AS t USING unnest({self._arrays(types)}) AS u ({names}) WHERE {where}"
            self._add(sql, types, rows)

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def sql(self) -> str:
        return "WITH " + ",\n".join(self._parts) + "\nSELECT 1"


TRANSFER_COLUMNS = (
    "debit", "debit_version", "debit_balance", "credit", "credit_version", "credit_balance", "amount", "hold_amount",
    "seq", "at", "root", "hold", "hold_part", "writer", "ord", "kind", "code",
)  # fmt: skip
TRANSFER_TYPES = (
    "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint", "bigint",
    "bigint", "timestamptz", "uuid", "uuid", "smallint", "smallint", "smallint", "smallint", "smallint",
)  # fmt: skip
MOVE_COLUMNS = (
    "home", "root", "id", "version", "at", "seq", "writer", "ord", "table_number", "event", "from_state", "to_state",
    "before", "after",
)  # fmt: skip
MOVE_TYPES = (
    "bigint", "uuid", "uuid", "bigint", "timestamptz", "bigint", "smallint", "smallint", "smallint", "text", "text",
    "text", "text", "text",
)  # fmt: skip
EVENT_COLUMNS = ("writer", "seq", "ord", "home", "root", "sequence", "at", "type", "data")
EVENT_TYPES = ("smallint", "bigint", "smallint", "bigint", "uuid", "bigint", "timestamptz", "text", "bytea")
ACCOUNT_COLUMNS = ("id", "debits_posted", "credits_posted", "debits_pending", "credits_pending", "version")
LIMIT_COLUMNS = ("id", "limit_side", "overdraft")
MESSAGE_COLUMNS = ("id", "home", "topic", "key", "priority", "due", "created_at", "headers", "body")
MESSAGE_TYPES = ("uuid", "bigint", "text", "text", "smallint", "timestamptz", "timestamptz", "text", "bytea")
TIMER_COLUMNS = ("entity", "kind", "home", "root", "due", "generation")
TIMER_TYPES = ("uuid", "text", "bigint", "uuid", "timestamptz", "bigint")
CHAIN_COLUMNS = ("writer", "batch", "first_seq", "last_seq", "at", "digests", "previous", "digest")
CHAIN_TYPES = ("smallint", "bigint", "bigint", "bigint", "timestamptz", "text", "bytea", "bytea")
HOLD_COLUMNS = ("id", "part", "debit", "credit", "amount", "expires_at", "state")
HOLD_TYPES = ("uuid", "smallint", "bigint", "bigint", "bigint", "timestamptz", "text")
