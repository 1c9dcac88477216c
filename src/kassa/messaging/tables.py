"""The tables of messaging in a service's own database: the same as Kassa's, in a schema of their own."""

import re
from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

SCHEMA = "kassa_messaging"
NAMES = ("message", "dead_letter", "inbox", "subscription", "consumer")
"""Tables of `db/schema.sql` that messaging needs where there is no Kassa."""
_LOCK = 0x4B61736D  # "Kasm": two processes that start together make the tables once.
_STATEMENT = re.compile(
    r"^CREATE (?:(?:UNLOGGED )?TABLE (\w+)|(?:UNIQUE )?INDEX \w+ ON (\w+)).*?;$", re.DOTALL | re.MULTILINE
)


def statements() -> list[str]:
    """The statements that make the tables, from the one schema that there is."""
    schema = files("kassa.db").joinpath("schema.sql").read_text(encoding="utf-8")
    return [found[0] for found in _STATEMENT.finditer(schema) if (found[1] or found[2]) in NAMES]


def with_schema(url: str) -> str:
    """A database URL whose sessions find these tables, and the service's own behind them."""
    parts = urlsplit(url)
    path = f"search_path={quote(SCHEMA + ',public')}"
    return urlunsplit(parts._replace(query=f"{parts.query}&{path}" if parts.query else path))


async def make_tables(connection: Any) -> bool:
    """Makes what is missing, and may be repeated; whether it made anything. connection: asyncpg's."""
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{SCHEMA}.message"):
            return False
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        await connection.execute(f"SET LOCAL search_path = {SCHEMA}")
        for statement in statements():
            await connection.execute(statement)
    return True
