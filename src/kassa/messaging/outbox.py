"""Messages and inbox keys inside somebody else's transaction: asyncpg, psycopg 3 or SQLAlchemy, async or not.

The statements are the same for all; only how a driver takes its parameters differs. No driver is imported here: a connection
says by its class whose it is.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from kassa.errors import SettingInvalid
from kassa.ids import new_id
from kassa.messaging.tables import SCHEMA

PREFIX = "outbox:"
"""Queues in which messages wait for the relay, one per topic."""
_INSERT = (
    f"INSERT INTO {SCHEMA}.message (id, home, topic, key, priority, due, created_at, headers, body) "
    "VALUES ({0}, 0, {1}, {2}, {3}, {4}, {5}, {6}, {7})"
)
_INBOX = (
    f"INSERT INTO {SCHEMA}.inbox (group_name, record, at) VALUES ({{0}}, {{1}}, {{2}}) ON CONFLICT DO NOTHING "
    "RETURNING record"
)


class Outgoing(NamedTuple):
    """A message as it is stored."""

    id: str
    topic: str
    key: str
    priority: int
    due: datetime
    created_at: datetime
    headers: str
    body: bytes


def outgoing(
    topic: str, body: Any, *, key: str, type: str, headers: Mapping[str, str] | None, priority: int, delay_s: float
) -> Outgoing:
    """A message to `topic`. body: bytes as they are, anything else as JSON."""
    if not 0 <= priority <= 9:
        raise SettingInvalid(f"Priority {priority} is not 0 … 9.", name="priority")
    now = datetime.now(UTC)
    id = new_id()
    sent = {"content-type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
    if type:
        sent |= {"ce-specversion": "1.0", "ce-id": id, "ce-source": "kassa.messaging", "ce-type": type}
    sent |= headers or {}
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    due = now + timedelta(seconds=delay_s)
    return Outgoing(id, PREFIX + topic, key, priority, due, now, json.dumps(sent), data)


async def insert(connection: Any, message: Outgoing) -> None:
    """Puts a message into the outbox in the connection's transaction."""
    await _asynchronous(connection)(_INSERT, message)


def insert_now(connection: Any, message: Outgoing) -> None:
    """The same for a connection that is not async."""
    _synchronous(connection)(_INSERT, message)


async def note(connection: Any, group: str, record: str) -> bool:
    """Notes in the connection's transaction that a group handles a record; False: it has handled it before."""
    return bool(await _asynchronous(connection)(_INBOX, (group, record, datetime.now(UTC))))


Run = Callable[[str, Sequence[Any]], Any]


def _asynchronous(connection: Any) -> Callable[[str, Sequence[Any]], Awaitable[Sequence[Any]]]:
    match _driver(connection):
        case "asyncpg":

            async def run(sql: str, values: Sequence[Any]) -> Sequence[Any]:
                numbered = sql.format(*(f"${place + 1}" for place in range(len(values))))
                rows: Sequence[Any] = await connection.fetch(numbered, *values)
                return rows

        case "psycopg":

            async def run(sql: str, values: Sequence[Any]) -> Sequence[Any]:
                cursor = await connection.execute(sql.format(*["%s"] * len(values)), tuple(values))
                return await cursor.fetchall() if cursor.description else ()

        case _:

            async def run(sql: str, values: Sequence[Any]) -> Sequence[Any]:
                result = await connection.execute(*_named(sql, values))
                return result.all() if result.returns_rows else ()

    return run


def _synchronous(connection: Any) -> Run:
    match _driver(connection):
        case "psycopg":
            return lambda sql, values: connection.execute(sql.format(*["%s"] * len(values)), tuple(values))
        case "sqlalchemy":
            return lambda sql, values: connection.execute(*_named(sql, values))
        case other:
            raise SettingInvalid(f"A connection of {other} is async: `await messaging.send(…)`.", name="connection")


def _named(sql: str, values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    from sqlalchemy import text

    names = [f"v{place}" for place in range(len(values))]
    return text(sql.format(*(f":{name}" for name in names))), dict(zip(names, values, strict=True))


def _driver(connection: Any) -> str:
    """asyncpg, psycopg or sqlalchemy. Raises SettingInvalid."""
    for base in type(connection).__mro__:
        package = base.__module__.partition(".")[0]
        if package in ("asyncpg", "psycopg", "sqlalchemy"):
            return package
    raise SettingInvalid(
        f"{type(connection).__name__} is no connection that Kassa knows: asyncpg, psycopg 3 or SQLAlchemy.",
        name="connection",
    )
