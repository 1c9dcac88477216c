"""The tables of messaging in a service's own database: the same as Kassa's, in a schema of their own."""

import re
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

SCHEMA = "kassa_messaging"
NAMES = (
    "message", "message_lease", "message_lease_number", "claim_messages", "acknowledge_messages", "let_go", "dead_letter", "inbox",
    "subscription", "consumer", "suspect",
)  # fmt: skip
"""What of `db/schema.sql` messaging needs where there is no Kassa."""
LATER = (
    ("message_lease", "messages", "0004_message_leases.sql"),
    ("message", "lapses", "0006_lapsed_leases.sql"),
    ("claim_messages", "windows", "0009_claims_ahead.sql"),
    ("message_lease", "places", "0012_places_of_leases.sql"),
    ("suspect", "handed", "0015_suspects.sql"),
)
"""Columns of tables and arguments of functions that a database may lack which was made by an earlier version, with the migration of
Kassa's that brings each."""
_LOCK = 0x4B61736D  # "Kasm": two processes that start together make the tables once.
_STATEMENT = re.compile(
    r"^ALTER TABLE (?P<altered>\w+).*?;$|"
    r"^CREATE (?:"
    r"(?:(?:UNLOGGED )?TABLE|SEQUENCE) (?P<table>\w+).*?;$|"
    r"(?:UNIQUE )?INDEX \w+ ON (?P<indexed>\w+).*?;$|"
    r"FUNCTION (?P<function>\w+).*?^(?:END\n)?\$\$;$)",
    re.DOTALL | re.MULTILINE,
)


def statements(schema: str | None = None) -> list[str]:
    """The statements that make the tables, from the one schema that there is unless another one is given."""
    if schema is None:
        schema = files("kassa.db").joinpath("schema.sql").read_text(encoding="utf-8")
    return [found[0] for found in _STATEMENT.finditer(schema) if found[found.lastgroup or 0] in NAMES]


def with_schema(url: str) -> str:
    """A database URL whose sessions find these tables, and the service's own behind them."""
    parts = urlsplit(url)
    path = f"search_path={quote(SCHEMA + ',public')}"
    return urlunsplit(parts._replace(query=f"{parts.query}&{path}" if parts.query else path))


async def make_tables(connection: Any) -> bool:
    """Makes what is missing, and may be repeated; whether it made anything. connection: asyncpg's."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        missing = await _missing(connection)
        if not missing:
            return False
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        await connection.execute(f"SET LOCAL search_path = {SCHEMA}")
        for statement in missing:
            await connection.execute(statement)
    return True


async def _missing(connection: Any) -> list[str]:
    """The statements that are still to be done."""
    if not await _has(connection, "message", "id"):
        return statements()
    migrations = files("kassa.db").joinpath("migrations")
    return [
        migrations.joinpath(name).read_text(encoding="utf-8")
        for whole, part, name in LATER
        if not await _has(connection, whole, part)
    ]


async def _has(connection: Any, whole: str, part: str) -> bool:
    has: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass($1) AND attname = $2)"
        " OR EXISTS (SELECT FROM pg_proc WHERE oid = to_regproc($1) AND $2 = ANY(proargnames))",
        f"{SCHEMA}.{whole}", part,
    )  # fmt: skip
    return has
