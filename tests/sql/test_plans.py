"""The journal finds single rows by a whole key in tables that no ANALYZE has seen: the planner guesses there, and a guess
that reads all rows of a home makes each of the first thousands of payments slower than the one before."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest

from kassa.db.pool import connect
from kassa.db.queries import load
from kassa.journal import statements as sql
from kassa.journal.table import Table
from kassa.tables import TABLES

PLANNER = (
    "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off; "
    "SET enable_mergejoin = off"
)
"""As the journal's connections have it."""
CHILDREN = [
    table for table in TABLES.all if table.parent is not None and table.name in ("attempt", "refund", "exchange")
]


@pytest.mark.parametrize("table", CHILDREN, ids=lambda table: table.name)
async def test_children_are_found_by_their_root(database_url: str, table: Table) -> None:
    connection = await connect(database_url, application="test")

    plan = await _plan(connection, sql.children_of(table), 2)
    await connection.close()

    assert f"Index Scan using {table.name}_root" in plan
    assert "Filter" not in plan


@pytest.mark.parametrize("table", TABLES.all, ids=lambda table: table.name)
async def test_rows_are_updated_by_their_primary_key(database_url: str, table: Table) -> None:
    connection = await connect(database_url, application="test")
    statement = sql.Statement(sql.Shapes())
    columns, types = ("home", "id", "version"), ("bigint", "uuid", "bigint")
    statement.update(table.name, ("home", "id"), columns, types, [(1, "0" * 32, 1), (2, "1" * 32, 2)])

    plan = await _plan(connection, statement.sql, len(statement.values))
    await connection.close()

    assert f"Index Scan using {table.name}_pkey" in plan
    assert "Filter" not in plan


@pytest.mark.parametrize("table", [table for table in TABLES.all if table.is_root], ids=lambda table: table.name)
async def test_roots_are_locked_by_their_primary_key(database_url: str, table: Table) -> None:
    connection = await connect(database_url, application="test")

    plan = await _plan(connection, sql.lock_roots(table), 2)
    await connection.close()

    assert f"Index Scan using {table.name}_pkey" in plan
    assert "Filter" not in plan


async def _plan(connection: "asyncpg.Connection[asyncpg.Record]", query: str, values: int) -> str:
    await connection.execute(f"{PLANNER}; PREPARE asked AS {query}")
    rows = await connection.fetch(f"EXPLAIN EXECUTE asked ({', '.join(['NULL'] * values)})")
    return "\n".join(row[0] for row in rows)


async def test_reading_the_log_looks_at_no_more_events_than_it_gives(database_url: str) -> None:
    """However many there are, and before any ANALYZE."""
    connection = await connect(database_url, application="test")
    await connection.execute("INSERT INTO chain VALUES (0, 1, 1, 20000, now(), '', '', '')")
    await connection.execute(
        "INSERT INTO event (writer, seq, ord, home, root, sequence, at, type, data)"
        " SELECT 0, number, 0, 1, gen_random_uuid(), 1, now(), 'payment.created', '{}' FROM generate_series(1, 20000) AS number"
    )

    await connection.execute(f"PREPARE asked AS {load('kassa.messaging').read_log}")
    rows = await connection.fetch("EXPLAIN EXECUTE asked ('group', 500, '{}', '{}', '{}')")
    await connection.close()

    plan = "\n".join(row[0] for row in rows)
    assert "Index Scan using event_root" in plan
    assert "Seq Scan on event" not in plan


@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@pytest.mark.parametrize("is_analyzed", [False, True])
async def test_counting_what_is_written_looks_at_nothing_older(database_url: str, is_analyzed: bool, mode: str) -> None:
    """The log is never scanned for the few events at its end, whatever the planner knows of it."""
    connection = await connect(database_url, application="test")
    await connection.execute("INSERT INTO chain VALUES (0, 1, 1, 20000, now(), '', '', '')")
    await connection.execute(
        "INSERT INTO event (writer, seq, ord, home, root, sequence, at, type, data)"
        " SELECT 0, number, 0, 1, gen_random_uuid(), 1, now(), 'payment.created', '{}' FROM generate_series(1, 20000) AS number"
    )
    if is_analyzed:
        await connection.execute("ANALYZE")

    await connection.execute(f"SET plan_cache_mode = {mode}; PREPARE asked AS {load('kassa.messaging').count_written}")
    rows = await connection.fetch("EXPLAIN (ANALYZE, TIMING off) EXECUTE asked ('{0}', '{19990}', '{20000}', 10000)")
    await connection.close()

    plan = "\n".join(row[0] for row in rows)
    assert re.search(r"Index (Only )?Scan (using|on) event_pkey .*actual rows=10(\.00)? loops=1", plan)
    assert "Seq Scan on event" not in plan


QUEUES = {
    "message": "message_pkey",
    "timer": "timer_pkey",
    "once": "once_pkey",
    "claim": "claim_pkey",
    "inbox": "inbox_pkey",
}


@pytest.fixture
async def refilled(database_url: str) -> AsyncIterator[Any]:
    """Queues that were almost empty when the planner last looked, and have filled since: it believes that each has one row."""
    connection = await connect(database_url, application="test")
    fill = (
        "INSERT INTO message (id, home, topic, key, priority, due, created_at, headers, body)"
        " SELECT gen_random_uuid(), 1, 'post:office', 'k' || n % 7, 4, now(), now(), '{}', '' FROM generate_series(1, 5000) AS n;"
        "INSERT INTO timer (entity, kind, home, root, due, generation)"
        " SELECT gen_random_uuid(), 'x', 1, gen_random_uuid(), now(), 1 FROM generate_series(1, 5000);"
        "INSERT INTO once (home, operation, key, digest, at)"
        " SELECT 1, 'x', gen_random_uuid(), '', now() FROM generate_series(1, 5000);"
        "INSERT INTO claim (home, kind, name, resource)"
        " SELECT 1, 'x', gen_random_uuid(), gen_random_uuid() FROM generate_series(1, 5000);"
        "INSERT INTO inbox (group_name, record, at) SELECT 'g', gen_random_uuid(), now() FROM generate_series(1, 5000);"
    )
    await connection.execute(fill)
    for table in QUEUES:
        await connection.execute(f"DELETE FROM {table} WHERE ctid <> (SELECT max(ctid) FROM {table})")
        await connection.execute(f"VACUUM ANALYZE {table}")
    await connection.execute(fill)
    yield connection
    await connection.close()


def _of_journal() -> dict[str, str]:
    statement = sql.Statement(sql.Shapes())
    statement.delete("message", ("id",), ("uuid",), [("0" * 32,)])
    statement.delete("timer", ("entity", "kind"), ("uuid", "text"), [("0" * 32, "x")])
    names = (
        "ONCE_BEFORE",
        "CLAIMED_BEFORE",
        "RELEASE_ONCE",
        "RELEASE_CLAIMS",
        "RELEASE_INBOX",
        "LOCK_MESSAGES",
        "LOCK_TIMERS",
    )
    return {"delete": statement.sql} | {name: getattr(sql, name) for name in names}


MESSAGING = ("retry_messages", "bury_messages", "postpone_timers", "parked_keys")


@pytest.mark.parametrize("name", [*_of_journal(), *MESSAGING])
async def test_queues_that_looked_empty_are_not_read_whole(refilled: Any, name: str) -> None:
    """A join that began with a queue of 20,000 compared each of its rows with each of a batch, for seconds."""
    journal = _of_journal()
    if name in journal:
        await refilled.execute(PLANNER)
    query = journal.get(name) or getattr(load("kassa.messaging"), name)

    await refilled.execute(f"PREPARE asked AS {query}")
    values = await refilled.fetchval(
        "SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'asked'"
    )
    await refilled.execute("SET plan_cache_mode = force_generic_plan")
    plan = json.loads(await refilled.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE asked ({', '.join(['NULL'] * values)})"))

    walked = [
        node for node in _nodes(plan[0]["Plan"])
        if node.get("Relation Name") in QUEUES
        and node["Node Type"] != "ModifyTable"
        and not ({"Index Cond", "TID Cond"} & node.keys())
    ]  # fmt: skip
    assert walked == []


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
