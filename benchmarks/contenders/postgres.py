"""PostgreSQL by asyncpg: a table as a queue. Sent again a record is there once; taken in one statement with SKIP LOCKED.

It promises less than Kassa's: the order of a key holds for one consumer only, nothing is retried or given up, and a consumer
keeps its transaction open while it handles a batch, where Kassa's has a lease.
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
    headers text NOT NULL, body bytea NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), UNIQUE (queue, record)
)
"""
PUT = """
INSERT INTO raw_queue (queue, record, key, headers, body)
SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[])
ON CONFLICT DO NOTHING
"""
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

    def __init__(self, pool: Any, name: str) -> None:
        self._pool = pool
        self._queue = f"{name}:{GROUP}"

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, lambda batch: put(self._pool, self._queue, batch))

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        found: list[str] = []
        async with self._pool.acquire() as connection:
            while len(found) < count:
                async with connection.transaction():
                    rows = await connection.fetch(TAKE, self._queue, BATCH)
                    if not rows:
                        raise Failure(f"asyncpg: {len(found)} of {count} came")
                    if not found:
                        began()
                    taken = [Record(row[0], row[1], row[3], _decode(row[2])) for row in rows]
                    found += [one.id for one in taken]
        return found


@asynccontextmanager
async def by_asyncpg(url: str, name: str) -> AsyncIterator[Asyncpg]:
    async with asyncpg.create_pool(url, min_size=1, max_size=SENDERS) as pool:
        await pool.execute(TABLE)
        yield Asyncpg(pool, name)
