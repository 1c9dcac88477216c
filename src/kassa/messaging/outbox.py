"""Messages and inbox keys inside somebody else's transaction: asyncpg, psycopg 3 or SQLAlchemy, async or not.

The statements are the same for all; only how a driver takes its parameters differs. No driver is imported here: a connection
says by its class whose it is. Times are the database's, by whose clock messages are handed out and inbox keys forgotten: those of
the processes that send may disagree, and one that is ahead would send late and out of its key's order.
"""

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from kassa.errors import SettingInvalid
from kassa.ids import new_id
from kassa.messaging.tables import SCHEMA
from kassa.messaging.wake import CHANNEL, COALESCE_S, MESSAGES

PREFIX = "outbox:"
"""Queues in which messages wait for the relay, one per topic."""
INBOX_KEEP = timedelta(days=8)
"""How long a service remembers what it handled, at least: longer than any broker here keeps a record by default."""
DELAY_MAX_S = 10 * 365 * 86400.0
"""As long as queues in PostgreSQL keep anything back; far below where their times end."""
_INSERT = (
    f"INSERT INTO {SCHEMA}.message (id, home, topic, key, priority, due, created_at, headers, body) "
    "VALUES ({0}, 0, {1}, {2}, {3}, clock_timestamp() + make_interval(secs => {4}), clock_timestamp(), {5}, {6})"
)
_WAKES = f"{_INSERT} RETURNING pg_notify('{CHANNEL}', '{MESSAGES}')"
"""PostgreSQL says it when the transaction commits, once however often it was asked for, and never if it rolls back."""
_INBOX = (
    f"INSERT INTO {SCHEMA}.inbox (group_name, record, at) VALUES ({{0}}, {{1}}, clock_timestamp()) "
    "ON CONFLICT DO NOTHING RETURNING record"
)


WAKES_PER_S = 1 / COALESCE_S
"""Commits with a NOTIFY wait for each other, with their flush to the disk: so many a second of a process, and as many at once, are
no burden. Where there are more, one of them is never far."""


class Bell:
    """Which sends wake the relay with their commit: each where little happens, some of them under load."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = WAKES_PER_S
        self._at = clock()

    def rings(self) -> bool:
        """Whether the next one does. Threads may ask side by side: one more or less is no matter."""
        now = self._clock()
        self._left = min(WAKES_PER_S, self._left + (now - self._at) * WAKES_PER_S)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Outgoing(NamedTuple):
    """A message as it is stored. The database adds its times."""

    id: str
    topic: str
    key: str
    priority: int
    delay_s: float
    headers: str
    body: bytes


def outgoing(
    topic: str, body: Any, *, key: str, type: str, headers: Mapping[str, str] | None, priority: int, delay_s: float
) -> Outgoing:
    """A message to `topic`. body: bytes as they are, anything else as JSON."""
    if not 0 <= priority <= 9:
        raise SettingInvalid(f"Priority {priority} is not 0 … 9.", name="priority")
    if not 0 <= delay_s <= DELAY_MAX_S:
        raise SettingInvalid(f"A delay of {delay_s} s is not 0 … {DELAY_MAX_S:.0f} s.", name="delay_s")
    id = new_id()
    sent = {"content-type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
    if type:
        sent |= {"ce-specversion": "1.0", "ce-id": id, "ce-source": "kassa.messaging", "ce-type": type}
    for name, value in (headers or {}).items():
        sent[_text(name)] = _text(value)
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return Outgoing(id, PREFIX + topic, key, priority, float(delay_s), json.dumps(sent), data)


def _text(value: Any) -> str:
    """A header's name or value, which the relay could not send otherwise. Raises SettingInvalid."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise SettingInvalid(
            f"{value!r} in the headers is no text: give names and values as str.", name="headers"
        ) from None
    return str(value)


async def insert(connection: Any, message: Outgoing, *, wakes: bool = False) -> None:
    """Puts a message into the outbox in the connection's transaction. wakes: whether its commit wakes the relay."""
    await _asynchronous(connection)(_WAKES if wakes else _INSERT, message)


def insert_now(connection: Any, message: Outgoing, *, wakes: bool = False) -> None:
    """The same for a connection that is not async."""
    _synchronous(connection)(_WAKES if wakes else _INSERT, message)


async def note(connection: Any, group: str, record: str) -> bool:
    """Notes in the connection's transaction that a group handles a record; False: it has handled it before."""
    return bool(await _asynchronous(connection)(_INBOX, (group, record)))


Run = Callable[[str, Sequence[Any]], Any]


def _asynchronous(connection: Any) -> Callable[[str, Sequence[Any]], Awaitable[int]]:
    """Runs a statement; says how many rows it made. They are not read where the service says what becomes of rows."""
    match _driver(connection):
        case "asyncpg":

            async def run(sql: str, values: Sequence[Any]) -> int:
                numbered = sql.format(*(f"${place + 1}" for place in range(len(values))))
                return len(await connection.fetch(numbered, *values))

        case "psycopg":

            async def run(sql: str, values: Sequence[Any]) -> int:
                cursor = await connection.execute(sql.format(*["%s"] * len(values)), tuple(values))
                made: int = cursor.rowcount
                # In a pipeline nobody knows before he asks for the rows.
                return made if made >= 0 or "RETURNING" not in sql else len(await cursor.fetchall())

        case _:

            async def run(sql: str, values: Sequence[Any]) -> int:
                result = await connection.execute(*_named(sql, values))
                return len(result.all()) if result.returns_rows else 0

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
