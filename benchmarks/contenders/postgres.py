"""PostgreSQL by asyncpg: a table as a queue. Sent again a record is there once; taken in one statement with SKIP LOCKED.

Twice: with a lease, as most such queues have it (pgmq's shape: what is taken is hidden for a while, its tries are counted, and it
is deleted once it was handled, so that a batch is received and then acknowledged, as with a broker); and in one transaction that
stays open while a batch is handled, which is quickest, and holds up vacuum and a connection for each consumer. Both promise less
than Kassa's: the order of a key holds for one consumer only, and nothing is retried later or given up. Neither waits for the disk
where nothing is lost by it: a lease or a deletion that a crash forgets is done again.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec

from benchmarks.contenders.shape import BATCH, GROUP, SENDERS, Failure, in_batches
from kassa.messaging.model import Record

TABLE = """
CREATE TABLE IF NOT EXISTS raw_queue (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, queue text NOT NULL, record text NOT NULL, key text NOT NULL,
    headers text NOT NULL, body bytea NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0, due timestamptz NOT NULL DEFAULT now(), UNIQUE (queue, record)
);
CREATE INDEX IF NOT EXISTS raw_queue_next ON raw_queue (queue, seq)
"""
"""Without the index a queue of several would be sorted as a whole for each batch."""
PUT = """
INSERT INTO raw_queue (queue, record, key, headers, body)
SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[])
ON CONFLICT DO NOTHING
"""
LEASE = """
UPDATE raw_queue SET due = clock_timestamp() + interval '60 s', attempts = attempts + 1 WHERE seq = ANY(ARRAY(
    SELECT seq FROM raw_queue WHERE queue = $1 AND due <= clock_timestamp() ORDER BY seq LIMIT $2 FOR UPDATE SKIP LOCKED
)) RETURNING record, key, headers, body, seq
"""
DONE = "DELETE FROM raw_queue WHERE seq = ANY($1::bigint[])"
TAKE = """
DELETE FROM raw_queue WHERE seq = ANY(ARRAY(
    SELECT seq FROM raw_queue WHERE queue = $1 ORDER BY seq LIMIT $2 FOR UPDATE SKIP LOCKED
)) RETURNING record, key, headers, body
"""
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, str]).decode


async def put(connection: Any, queue: str, records: Sequence[Record]) -> None:
    """One statement, one commit."""
    await connection.execute(
        PUT, queue, [one.id for one in records], [one.key for one in records],
        [_encode(one.headers).decode() for one in records], [one.body for one in records],
    )  # fmt: skip


class Asyncpg:
    """The table."""

    def __init__(self, pool: Any, name: str, *, leases: bool) -> None:
        self._pool = pool
        self._queue = f"{name}:{GROUP}"
        self._receive = self._with_lease if leases else self._within_transaction

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, lambda batch: put(self._pool, self._queue, batch))

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        found: list[str] = []
        async with self._pool.acquire() as connection:
            await connection.execute("SET synchronous_commit = off")
            while len(found) < count:
                taken = await self._receive(connection)
                if not taken:
                    raise Failure(f"asyncpg: {len(found)} of {count} came")
                if not found:
                    began()
                found += [one.id for one in taken]
            await connection.execute("RESET synchronous_commit")
        return found

    async def _with_lease(self, connection: Any) -> list[Record]:
        rows = await connection.fetch(LEASE, self._queue, BATCH)
        taken = _records(rows)
        await connection.execute(DONE, [row[4] for row in rows])
        return taken

    async def _within_transaction(self, connection: Any) -> list[Record]:
        async with connection.transaction():
            return _records(await connection.fetch(TAKE, self._queue, BATCH))


def _records(rows: Sequence[Any]) -> list[Record]:
    return [Record(row[0], row[1], row[3], _decode(row[2])) for row in rows]


@asynccontextmanager
async def by_asyncpg(url: str, name: str, *, leases: bool) -> AsyncIterator[Asyncpg]:
    async with asyncpg.create_pool(url, min_size=1, max_size=SENDERS) as pool:
        await pool.execute(TABLE)
        yield Asyncpg(pool, name, leases=leases)
