"""Migrations: numbered SQL files, each applied once, in order, in a transaction of its own.

migrations/0001_first.sql, 0002_….sql     without gaps; none is changed once it was released (but see REWORDED)
"""

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Any

from kassa.db.pool import connect
from kassa.errors import DatabaseRefused, DatabaseUnreachable, InvariantBroken

_LOCK = 5_279_105_011
"""The advisory lock under which migrations run; any number will do that nothing else in the database uses."""
_LOCK_TIMEOUT_S = 900
"""Another process may be in the middle of a long migration."""
REWORDED = {
    # PostgreSQL 15 refused its words.
    4: "afdffb987ef02e876e8653ea4fb6876e022a1c852579e277b2a826e8bc0de24e",
    # Its function was planned worse; migration 12 replaces it.
    9: "612791bbafa8ea37d1d00e8690d76f4dc4830afce3fd0ae4664a605906020b4d",
}
"""Of migrations that were put in other words: the digest of the file that had the former ones. The database that it made is the
same, or is by a later migration."""
_FILE = re.compile(r"^(\d{4})_([a-z0-9_]+)\.sql$")

_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migration (
    number integer PRIMARY KEY,
    name text NOT NULL,
    sha256 text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. `digest` is the SHA-256 of its bytes, in hexadecimal."""

    number: int
    name: str
    sql: str
    digest: str


Progress = Callable[[Migration], None]


def read_migrations(sources: Iterable[tuple[str, bytes]] | None = None) -> tuple[Migration, ...]:
    """All migrations in order. sources: (file name, content), for tests; else the files of this program.

    Raises InvariantBroken when the numbers are not 1, 2, 3 ….
    """
    if sources is None:
        folder = files("kassa.db").joinpath("migrations")
        sources = [(entry.name, entry.read_bytes()) for entry in folder.iterdir() if entry.name.endswith(".sql")]
    found = []
    for name, content in sorted(sources):
        match = _FILE.match(name)
        if match is None:
            raise InvariantBroken(f"{name} is no name for a migration; it should look like 0001_first.sql")
        found.append(Migration(int(match[1]), match[2], content.decode(), sha256(content).hexdigest()))
    numbers = [migration.number for migration in found]
    if numbers != list(range(1, len(found) + 1)):
        raise InvariantBroken(f"migrations must be numbered 1, 2, 3 …, each once; found {numbers}")
    return tuple(found)


async def migrate(
    dsn: str,
    *,
    progress: Progress | None = None,
    migrations: tuple[Migration, ...] | None = None,
) -> tuple[Migration, ...]:
    """Bring the database up to this program; what was applied. May be repeated, and run by several processes at once.

    progress: called with each migration before it is applied.
    Raises DatabaseRefused when the database is newer, or was made by files other than these.
    """
    known = read_migrations() if migrations is None else migrations
    connection = await connect(dsn, application="kassa migrate")
    try:
        await _lock(connection)
        await connection.execute(_TABLE)
        missing = await pending(connection, migrations=known)
        for migration in missing:
            if progress is not None:
                progress(migration)
            await _apply(connection, migration)
        return missing
    finally:
        # The lock goes with the session.
        await connection.close()


async def pending(connection: Any, *, migrations: tuple[Migration, ...] | None = None) -> tuple[Migration, ...]:
    """The migrations that this database still lacks. Raises DatabaseRefused as `migrate` does; changes nothing."""
    known = read_migrations() if migrations is None else migrations
    if await connection.fetchval("SELECT to_regclass('schema_migration')") is None:
        return known
    rows = await connection.fetch("SELECT number, name, sha256 FROM schema_migration ORDER BY number")
    if len(rows) > len(known):
        newest = rows[-1]
        raise DatabaseRefused(
            f"The database is at migration {newest['number']} ({newest['name']}), and this program knows only "
            f"{len(known)}: a newer Kassa used it. Install that version again, or restore a backup from before it."
        )
    for row, migration in zip(rows, known, strict=False):
        digests = (migration.digest, REWORDED.get(migration.number))
        if (row["number"], row["name"]) != (migration.number, migration.name) or row["sha256"] not in digests:
            raise DatabaseRefused(
                f"The database has migration {row['number']} ({row['name']}) in another form than this program's "
                f"{migration.number} ({migration.name}). Use the program that made it, or another database."
            )
    return known[len(rows) :]


async def require_current(connection: Any) -> None:
    """Refuse a database that lacks migrations, for programs that do not apply them themselves."""
    missing = await pending(connection)
    if missing:
        raise DatabaseRefused(f"The database lacks {len(missing)} migration(s): run `kassa migrate` first.")


async def _lock(connection: Any) -> None:
    """Wait for our turn by asking again: a session that waits inside pg_advisory_lock would hold up index builds."""
    for _ in range(_LOCK_TIMEOUT_S * 10):
        if await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK):
            return
        await asyncio.sleep(0.1)
    raise DatabaseUnreachable(f"Another process has been migrating this database for {_LOCK_TIMEOUT_S} s; look at it.")


async def _apply(connection: Any, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(migration.sql)
        await connection.execute(
            "INSERT INTO schema_migration (number, name, sha256) VALUES ($1, $2, $3)",
            migration.number,
            migration.name,
            migration.digest,
        )
