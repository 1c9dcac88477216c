"""Somebody's bookkeeping in a process of its own: one row per event that it gets, in one commit with what says so.

    python -m chaos.brokers.books BROKER_URL DATABASE_URL GROUP

The table has no key: an event that is handled twice is there twice. On `postgres` it is a program that has SQL alone, and its
table is in Kassa's database; else it is made with `kassa.messaging` and has a database of its own.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import asyncpg

from kassa.db.away import AWAY
from kassa.errors import BrokerUnreachable
from kassa.messaging import Message, Messaging, Reject
from kassa.messaging.tables import with_schema

TABLE = """
CREATE TABLE IF NOT EXISTS effect
    (place bigserial, event text NOT NULL, root text NOT NULL, sequence integer NOT NULL, type text NOT NULL)
"""
EFFECT = "INSERT INTO effect (event, root, sequence, type) VALUES ($1, $2, $3, $4)"
SEEN = "CREATE TABLE IF NOT EXISTS seen (event text PRIMARY KEY)"
NOTE = "INSERT INTO seen VALUES ($1) ON CONFLICT DO NOTHING RETURNING event"
"""What `kassa.messaging` does for its users: an event that comes again is known."""
KNOWN = {"ce-id", "ce-subject", "ce-sequence", "ce-type"}
READY = "working: books"


def effect(headers: Mapping[str, str]) -> tuple[str, str, int, str]:
    """The row of an event. Raises Reject for what is none."""
    if not headers.keys() >= KNOWN or not headers["ce-sequence"].isdecimal():
        raise Reject("not an event of Kassa")
    return headers["ce-id"], headers["ce-subject"], int(headers["ce-sequence"]), headers["ce-type"]


async def keep(broker: str, database_url: str, group: str) -> None:
    """With `kassa.messaging`; a broker that is not there yet is asked again."""
    messaging = Messaging(broker, database_url, name=group)

    @messaging.consumer("kassa.events", group=group)
    async def note(message: Message, connection: Any) -> None:
        await connection.execute(EFFECT, *effect(message.headers))

    while True:
        with suppress(BrokerUnreachable):
            async with messaging:
                print(READY, flush=True)
                await messaging.run()
        await asyncio.sleep(0.2)


async def keep_by_sql(database_url: str, group: str) -> None:
    """With SQL alone; a database that is away is asked again."""
    is_told = False
    while True:
        try:
            connection = await asyncpg.connect(database_url)
            await connection.execute("SELECT kassa_listen('kassa.events', $1)", group)
            if not is_told:
                print(READY, flush=True)
                is_told = True
            while True:
                await _take(connection, group)
        except (*AWAY, OSError):
            await asyncio.sleep(0.2)


async def _take(connection: Any, group: str) -> None:
    async with connection.transaction():
        rows = await connection.fetch("SELECT headers FROM kassa_receive('kassa.events', $1, 100)", group)
        for row in rows:
            try:
                found = effect(json.loads(row["headers"]))
            except Reject:
                continue
            if await connection.fetchval(NOTE, found[0]) is not None:
                await connection.execute(EFFECT, *found)
    if not rows:
        await asyncio.sleep(0.05)


async def main(broker: str, database_url: str, group: str) -> None:
    connection = await asyncpg.connect(database_url if broker == "postgres" else with_schema(database_url))
    await connection.execute(TABLE.replace("effect", "public.effect", 1))
    await connection.execute(SEEN.replace("seen", "public.seen", 1))
    await connection.close()
    if broker == "postgres":
        await keep_by_sql(database_url, group)
    else:
        await keep(broker, database_url, group)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
