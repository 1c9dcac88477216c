"""A transaction that somebody leaves open keeps every row that is deleted after it began, and no VACUUM takes one away: the queue
in PostgreSQL must go on all the same. Counted in pages, which no busy machine changes."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flows.messaging.house import put
from kassa.db.pool import connect, open_pool
from kassa.ids import new_id
from kassa.messaging.work import MessageWork, OutgoingMessage

QUEUE = "post:office"
BATCH, KEYS = 100, 500
WAITING = 500
DONE = 3_000
"""While the snapshot is held. What a claim reads grows with it, and a test has no five minutes."""
SPEED_LEAST = 0.3


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Any]:
    pool = await open_pool(database_url, application="test")
    yield pool
    await pool.close()


async def send(pool: Any, count: int) -> None:
    for _ in range(count // KEYS):
        await put(
            pool, *(OutgoingMessage(new_id(), 1, QUEUE, f"key-{key}", 4, 0.0, {}, b"x" * 200) for key in range(KEYS))
        )


async def receive(work: MessageWork, count: int) -> None:
    for _ in range(count // BATCH):
        claimed = await work.claim(QUEUE, BATCH)
        assert len(await work.acknowledge(claimed)) == BATCH


async def pages_of_a_claim(pool: Any) -> int:
    """How many pages are looked at for one batch, which nobody gets."""
    async with pool.acquire() as connection:
        return await pages_of_a_claim_of(connection)


async def pages_of_a_claim_of(connection: Any, batch: int = BATCH) -> int:
    """The same in a session that keeps its plans."""
    return await pages_of(connection, f"claim_messages('{QUEUE}', {BATCH}, interval '1 minute')", batch)


async def pages_of(connection: Any, call: str, batch: int) -> int:
    """How many pages are looked at for so many messages, which nobody gets."""
    transaction = connection.transaction()
    await transaction.start()
    told = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM {call}")
    await transaction.rollback()
    (plan,) = (one["Plan"] for one in json.loads(told))
    assert plan["Actual Rows"] == batch
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def test_claims_go_on_beside_a_transaction_that_is_left_open(database_url: str, pool: Any) -> None:
    work = MessageWork(pool)
    await send(pool, 2 * WAITING)
    await receive(work, WAITING)
    before = await pages_of_a_claim(pool)
    holder = await connect(database_url, application="left open")
    held = holder.transaction(isolation="repeatable_read")
    await held.start()
    await holder.fetchval("SELECT count(*) FROM message")

    for _ in range(DONE // KEYS):
        await send(pool, KEYS)
        await receive(work, KEYS)
    await pool.execute("VACUUM message")
    beside = await pages_of_a_claim(pool)
    await held.rollback()
    await holder.close()
    await pool.execute("VACUUM message")
    afterwards = await pages_of_a_claim(pool)

    assert before < beside < before / SPEED_LEAST
    assert afterwards < beside
    assert await pool.fetchval("SELECT count(*) FROM message") == WAITING


async def test_claims_read_no_more_of_a_queue_that_was_nearly_empty_when_it_was_looked_at(pool: Any) -> None:
    """Two indexes begin with the queue, and one of them may be smaller than the other for a while. Only one is in order."""
    await send(pool, WAITING)
    await pool.execute("VACUUM ANALYZE message")
    usual = await pages_of_a_claim(pool)
    await send(pool, 5 * DONE)
    await pool.execute(
        "DELETE FROM message WHERE position NOT IN (SELECT position FROM message ORDER BY position DESC LIMIT 5)"
    )
    await pool.execute("VACUUM ANALYZE message")
    await pool.execute("REINDEX INDEX message_key")
    await send(pool, 2 * DONE)

    assert await pages_of_a_claim(pool) < 4 * usual


async def test_claims_planned_for_a_queue_of_one_find_what_is_before_another_in_its_key(pool: Any) -> None:
    """Where there is one message, any index that begins with the queue seems as good as that of its keys: as a rule the other one
    that we have, if it is the smaller of the two. A session keeps that plan when there are many."""
    await send(pool, WAITING)
    await pool.execute("VACUUM ANALYZE message")
    usual = await pages_of_a_claim(pool)
    await send(pool, DONE)
    await pool.execute("DELETE FROM message WHERE position < (SELECT max(position) FROM message)")
    await pool.execute("VACUUM ANALYZE message")
    await pool.execute("CREATE INDEX message_smaller ON message (topic)")
    async with pool.acquire() as connection:
        await pages_of_a_claim_of(connection, 1)
        await send(pool, DONE)

        assert await pages_of_a_claim_of(connection) < 4 * usual


@pytest.mark.parametrize("batch", [1, BATCH])
async def test_a_program_that_receives_by_sql_reads_no_more_of_a_long_queue(pool: Any, batch: int) -> None:
    """Also where its session planned it for a queue of one, with an index that seemed as good as that of the keys."""
    call = "kassa_receive({}, {}, {})".format(*(f"'{part}'" for part in QUEUE.split(":")), batch)
    await send(pool, WAITING)
    async with pool.acquire() as connection:
        usual = await pages_of(connection, call, batch)
    await send(pool, DONE)
    await pool.execute("DELETE FROM message WHERE position < (SELECT max(position) FROM message)")
    await pool.execute("VACUUM ANALYZE message")
    await pool.execute("CREATE INDEX message_smaller ON message (topic)")
    async with pool.acquire() as connection:
        await connection.execute("DISCARD PLANS")
        await pages_of(connection, call, 1)
        await send(pool, 2 * DONE)

        assert await pages_of(connection, call, batch) < 4 * usual


async def test_acknowledgements_planned_for_a_queue_of_one_read_no_more_of_a_long_one(pool: Any) -> None:
    """Where there is one message, reading all seems as good as finding some. A session keeps that plan when there are many."""

    async def pages_of_an_acknowledgement(connection: Any, batch: int) -> int:
        rows = await connection.fetch(f"SELECT id, lease FROM claim_messages('{QUEUE}', {batch}, interval '1 minute')")
        assert len(rows) == batch
        ids = ",".join(f"'{row['id']}'" for row in rows)
        lease = rows[0]["lease"]
        call = f"acknowledge_messages(ARRAY[{ids}]::uuid[], array_fill({lease}::bigint, ARRAY[{batch}]), ARRAY[{lease}]::bigint[])"
        pages = await pages_of(connection, call, 1)
        assert await connection.fetchval(f"SELECT count FROM {call}") == batch
        return pages

    await put(pool, OutgoingMessage(new_id(), 1, QUEUE, "key", 4, 0.0, {}, b""))
    await pool.execute("VACUUM ANALYZE message")
    async with pool.acquire() as connection:
        await pages_of_an_acknowledgement(connection, 1)
        await send(pool, 4 * DONE)

        assert await pages_of_an_acknowledgement(connection, BATCH) < 10 * BATCH
    assert await pool.fetchval("SELECT count(*) FROM message") == 4 * DONE - BATCH
