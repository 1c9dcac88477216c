"""Dead letters from the command line: those of a time, and no faster than is told."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from flows.cli.house import kassa
from flows.messaging.house import HOME
from kassa.ids import new_id

QUEUE = "shop.mails:mailer"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
BURIED = """
    INSERT INTO dead_letter (id, home, topic, key, priority, created_at, died_at, attempts, reason, headers, body)
    VALUES ($1::text::uuid, $2, $3, '', 4, $4, $4, 1, 'no', '{}', convert_to($5, 'UTF8'))
"""


async def bury(url: str, count: int) -> None:
    """So many, one a minute from noon on."""
    connection = await asyncpg.connect(url)
    for number in range(count):
        await connection.execute(BURIED, new_id(), HOME, QUEUE, NOON + timedelta(minutes=number), str(number))
    await connection.close()


async def rows(url: str, query: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [row[0] for row in await connection.fetch(query)]
    finally:
        await connection.close()


def test_command_replays_what_died_in_a_time_at_the_rate_that_it_is_told(database_url: str, tmp_path: Path) -> None:
    asyncio.run(bury(database_url, 30))
    (tmp_path / "secrets.key").write_bytes(base64.b64encode(bytes(32)))
    (tmp_path / "secrets.key").chmod(0o600)
    place = ["--dir", str(tmp_path), "--database-url", database_url, "--broker", "postgres#shop.mails", "--json"]
    kassa("queue", "subscribe", "shop.mails", "mailer", *place)
    times = ["--from", "2026-01-01T12:10:00Z", "--to", "2026-01-01T12:25:00Z"]

    said = json.loads(kassa("queue", "replay", QUEUE, *times, "--rate", "10", *place).stdout)

    assert said == {"replayed": 15}
    put_back = "SELECT convert_from(body, 'UTF8')::int FROM message ORDER BY due, 1"
    assert asyncio.run(rows(database_url, put_back)) == list(range(10, 25))
    at = asyncio.run(
        rows(database_url, "SELECT replayed_at FROM dead_letter WHERE replayed_at IS NOT NULL ORDER BY died_at")
    )
    # One tenth of a second's lot at a time, so that there is one more in a second at most.
    assert all((later - sooner).total_seconds() >= 1.0 for sooner, later in zip(at, at[11:], strict=False))
