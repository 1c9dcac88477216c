"""The journal's SQL, made from the tables' descriptions. Every hot statement takes arrays; a batch of one is the same path.

Rows are looked up `FROM unnest(sorted keys) CROSS JOIN LATERAL (SELECT … WHERE key = … FOR UPDATE or LIMIT 1)`: that form locks in
key order, and no planner can turn it into a walk over the table (docs/decisions/0003). It would where it can: of a table that was
empty when it last looked, as queues often are, it believes that it has one row, and reads all of it first.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from kassa.errors import InvariantBroken
from kassa.ids import Id
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
                        AND xmin <> pg_current_xact_id()::xid LIMIT 1) AS o"""
"""Which of these keys were there before this transaction, and what they hold."""

CLAIMED_BEFORE = """
SELECT c.home, c.kind, c.name, c.resource
  FROM unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, kind, name)
 CROSS JOIN LATERAL (SELECT * FROM claim WHERE home = k.home AND kind = k.kind AND name = k.name
                        AND xmin <> pg_current_xact_id()::xid LIMIT 1) AS c"""
"""Which of these names were taken before this transaction, and by what."""

RELEASE_ONCE = """
DELETE FROM once
 WHERE ctid = ANY(ARRAY(
       SELECT o.ctid FROM unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, operation, key)
        CROSS JOIN LATERAL (SELECT ctid FROM once WHERE home = k.home AND operation = k.operation AND key = k.key LIMIT 1) AS o))"""
"""Gives back the keys of refused changes, which this transaction took."""

RELEASE_CLAIMS = """
DELETE FROM claim
 WHERE ctid = ANY(ARRAY(
       SELECT c.ctid FROM unnest($1::bigint[], $2::text[], $3::text[]) AS k (home, kind, name)
        CROSS JOIN LATERAL (SELECT ctid FROM claim WHERE home = k.home AND kind = k.kind AND name = k.name LIMIT 1) AS c))"""
"""Gives back the names of refused changes, which this transaction took."""

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

READ_ACCOUNTS = """
SELECT a.home, a.code, a.owner, a.currency,
       a.id, a.limit_side, a.overdraft, a.debits_posted, a.credits_posted, a.debits_pending, a.credits_pending, a.version
  FROM unnest($1::bigint[], $2::smallint[], $3::text[], $4::text[]) AS k (home, code, owner, currency)
 CROSS JOIN LATERAL (SELECT * FROM account WHERE home = k.home AND code = k.code AND owner = k.owner
                        AND currency = k.currency) AS a"""
"""Reads accounts by their keys, without locks."""

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
DELETE FROM inbox
 WHERE ctid = ANY(ARRAY(
       SELECT i.ctid FROM unnest($1::text[], $2::text[]) AS k (g, r)
        CROSS JOIN LATERAL (SELECT ctid FROM inbox WHERE group_name = k.g AND record = k.r LIMIT 1) AS i))"""
"""Forgets inbox records of refused changes, which this transaction noted."""

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
    text = repr(list(column))[1:-1]
    return "{" + (text.replace("None", "NULL") if "N" in text else text) + "}"


def ids(column: Sequence[Id | None]) -> str:
    """Ids as PostgreSQL writes an array. Raises InvariantBroken for what is not an id: it could shift the rows."""
    present = [id for id in column if id is not None]
    digits = "".join(present)
    if len(digits) != 32 * len(present) or (digits and not digits.isalnum()):
        raise InvariantBroken("An id is not 32 digits.")
    return "{" + ",".join(present if len(present) == len(column) else [id or "NULL" for id in column]) + "}"


def _array(type: str, column: Sequence[Any]) -> Any:
    """A column as the parameter of `_array_parameter`."""
    if type in _WHOLE_NUMBERS:
        return numbers(column)
    return ids(column) if type == "uuid" else column


def _array_parameter(number: int, type: str) -> str:
    as_text = "::text" if type in _WHOLE_NUMBERS or type == "uuid" else ""
    return f"${number}{as_text}::{type}[]"


class Shapes:
    """Which columns have had several values in one batch: these travel as arrays, all others as one value for all rows.

    A column that varied once is an array for ever, so that there are few texts of statements, each prepared once. It
    halves what has to be encoded and read for a payment: its currency, its states and counters, and what is null.
    """

    def __init__(self) -> None:
        self._varying: dict[str, int] = {}

    def of(self, part: str, columns: Sequence[Sequence[Any]]) -> int:
        """Bit i is set where column i of this part travels as an array."""
        varying = self._varying.get(part, 0)
        count = len(columns[0])
        if count > 1:
            for place, column in enumerate(columns):
                if not varying >> place & 1 and column.count(column[0]) != count:
                    varying |= 1 << place
            # At least one array says how many rows there are.
            varying = varying or 1
            self._varying[part] = varying
        return varying


@cache
def _rows(types: tuple[str, ...], varying: int, first: int) -> tuple[str, str]:
    """(the select list, the FROM clause) of rows whose values are parameters from number `first` on."""
    selected, arrays, aliases = [], [], []
    for place, type in enumerate(types):
        if varying >> place & 1:
            arrays.append(_array_parameter(first + place, type))
            aliases.append(f"c{place}")
            selected.append(f"u.c{place}")
        else:
            selected.append(f"${first + place}::{type}")
    source = f" FROM unnest({', '.join(arrays)}) AS u ({', '.join(aliases)})" if arrays else ""
    return ", ".join(selected), source


@cache
def _insert(table: str, columns: tuple[str, ...], types: tuple[str, ...], varying: int, first: int) -> str:
    selected, source = _rows(types, varying, first)
    return f"INSERT INTO {table} ({_quoted(columns)}) SELECT {selected}{source}"


@cache
def _move_accounts(varying: int, first: int) -> str:
    """Adds to accounts whatever they hold, and says where the sum is not what was expected.

    A condition on what they hold would be asked of the row as it was when the statement began, even if it has waited for
    another batch's row since.
    """
    selected, source = _rows(MOVED_TYPES, varying, first)
    is_as_expected = " AND ".join(f"t.{name} = n.{name}" for name in MOVED_COLUMNS[1:8])
    return (
        "UPDATE account AS t SET debits_posted = t.debits_posted + n.debited, "
        "credits_posted = t.credits_posted + n.credited, version = t.version + n.steps "
        f"FROM (SELECT {selected}{source}) AS n ({', '.join(MOVED_COLUMNS)}) "
        f"WHERE t.id = n.id RETURNING {is_as_expected} AS is_as_expected"
    )


class Statement:
    """One statement with a part per table that the batch writes; the parts run in one round trip."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._parts: list[str] = []
        self._conditions: list[str] = []
        self._condition = ""
        self.values: list[Any] = []

    def insert(
        self, table: str, columns: tuple[str, ...], types: tuple[str, ...], rows: Sequence[Sequence[Any]]
    ) -> None:  # fmt: skip
        """Insert rows, given in column order."""
        if rows:
            self._part(_insert(table, columns, types, *self._take(table, types, rows)) + self._condition)

    def claim(
        self, table: str, columns: tuple[str, ...], types: tuple[str, ...], rows: Sequence[Sequence[Any]]
    ) -> None:  # fmt: skip
        """Insert rows, in the order of their keys, that must all be new for the statement to write anything."""
        if rows:
            sql = _insert(table, columns, types, *self._take(table, types, rows))
            self._expect(len(rows), self._part(sql + " ON CONFLICT DO NOTHING RETURNING 1"))

    def move_accounts(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add to accounts, in the order of their ids, and write nothing unless all are then as expected. rows:
        MOVED_COLUMNS."""
        if rows:
            sql = _move_accounts(*self._take("moved account", MOVED_TYPES, rows))
            self._expect(len(rows), self._part(sql) + " WHERE is_as_expected")

    def only_if_fitting(self) -> None:
        """What follows is written only if all that was claimed and moved before is as expected."""
        self._parts.append(f"fits AS MATERIALIZED (SELECT {' AND '.join(self._conditions) or 'true'} AS fits)")
        self._condition = " WHERE (SELECT fits FROM fits)"

    def _take(self, part: str, types: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[int, int]:
        """Takes the rows' values; returns their shape and the number of their first parameter."""
        columns = list(zip(*rows, strict=True))
        varying = self._shapes.of(part, columns)
        first = len(self.values) + 1
        for place, column in enumerate(columns):
            self.values.append(_array(types[place], column) if varying >> place & 1 else column[0])
        return varying, first

    def _part(self, sql: str) -> str:
        name = f"w{len(self._parts)}"
        self._parts.append(f"{name} AS ({sql})")
        return name

    def _expect(self, count: int, name: str) -> None:
        self.values.append(count)
        self._conditions.append(f"(SELECT count(*) FROM {name}) = ${len(self.values)}::bigint")

    def _arrays(self, types: Sequence[str]) -> str:
        start = len(self.values) + 1
        return ", ".join(_array_parameter(start + i, type) for i, type in enumerate(types))

    def _add(self, sql: str, types: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._part(sql)
        self.values += [_array(type, column) for type, column in zip(types, zip(*rows, strict=True), strict=True)]

    def upsert(
        self, table: str, columns: Sequence[str], types: Sequence[str], key: str, update: str,
        rows: Sequence[Sequence[Any]],
    ) -> None:  # fmt: skip
        """Insert rows or update those with the same key."""
        if rows:
            sql = (
                f"INSERT INTO {table} ({_quoted(columns)}) SELECT * FROM unnest({self._arrays(types)})"
                f"{self._condition or ' WHERE true'} ON CONFLICT ({key}) DO UPDATE SET {update}"
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
        """Delete rows by key, found by its first part. IS TRUE keeps the rest a filter: as a join, the planner may begin with the
        table."""
        if rows:
            names = ", ".join(f'"{name}"' for name in keys)
            sql = f'DELETE FROM {table} WHERE "{keys[0]}" = ANY({self._arrays(types[:1])})'
            if len(keys) > 1:
                sql += f" AND (({names}) IN (SELECT * FROM unnest({self._arrays(types)}))) IS TRUE"
            self._add(sql, types, rows)

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def sql(self) -> str:
        """Its text. It returns one row: whether all was as expected."""
        return "WITH " + ",\n".join(self._parts) + ("\nSELECT fits FROM fits" if self._condition else "\nSELECT true")


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
ONCE_COLUMNS = ("home", "operation", "key", "digest", "status", "resource", "problem", "at")
ONCE_TYPES = ("bigint", "text", "text", "bytea", "smallint", "uuid", "bytea", "timestamptz")
CLAIM_COLUMNS = ("home", "kind", "name", "resource")
CLAIM_TYPES = ("bigint", "text", "text", "uuid")
MOVED_COLUMNS = (
    "id", "limit_side", "overdraft", "debits_posted", "credits_posted", "debits_pending", "credits_pending", "version",
    "debited", "credited", "steps",
)  # fmt: skip
"""All of an account that a judgement rests on, as it is expected to stand, and what is added to get there."""
MOVED_TYPES = ("bigint", "smallint", *("bigint",) * 9)
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
