"""A PostgreSQL that takes nothing into some tables for a while, as one does whose disk is full."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

FULL, READ_ONLY, BROKEN = "53100", "25006", "P0001"
"""SQLSTATE of a full disk, of a server that takes no writes (after a failover), and of an error that nobody foresees."""


@asynccontextmanager
async def refusing(pool: Any, code: str, *tables: str) -> AsyncIterator[None]:
    """For the block's time each INSERT into these tables fails with `code`, the first one after two seconds, in which more can
    come. `refusals` says how many were."""
    await pool.execute("CREATE SEQUENCE refusal")
    await pool.execute(
        # A sequence keeps what it counted when the statement is rolled back. The first refusal takes a while, so that whoever waits
        # for it has other things ended in his hands by then, as at a database that is slow to notice.
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF nextval('refusal') = 1 THEN PERFORM pg_sleep(2); END IF; "
        f"RAISE 'no' USING ERRCODE = '{code}'; END $$"
    )
    for table in tables:
        await pool.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} EXECUTE FUNCTION refuse()")
    try:
        yield
    finally:
        for table in tables:
            await pool.execute(f"DROP TRIGGER refuse ON {table}")


async def refusals(pool: Any) -> int:
    """How many statements were refused."""
    count: int = await pool.fetchval("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM refusal")
    return count


def consumers() -> int:
    """Streams of brokers that this process takes from."""
    return sum(task.get_name() == "stream" for task in asyncio.all_tasks())
