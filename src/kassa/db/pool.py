"""Connections to PostgreSQL, with the session settings that the rest of Kassa relies on.

Nothing here retries: whoever asks knows whether a repeat is safe.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import structlog

from kassa.db.binaries import MAJOR_MIN
from kassa.errors import DatabaseRefused, DatabaseUnreachable

CONNECT_TIMEOUT_S = 10.0
CLOSE_S = 10.0
"""For statements that are under way when everything ends; what was not committed by then has not happened."""

SILENCE_S = 20
"""A server whose machine does not answer for so long is lost. By itself a system waits a quarter of an hour, or for ever."""
_KEEPALIVE = {
    "TCP_KEEPIDLE": SILENCE_S // 2,
    "TCP_KEEPINTVL": SILENCE_S // 4,
    "TCP_KEEPCNT": 2,
    "TCP_USER_TIMEOUT": SILENCE_S * 1000,
}
"""Where a system has no such option, it keeps its own time."""

log = structlog.get_logger("kassa.db.pool")

_REFUSED = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
_UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.PostgresConnectionError,
)


# asyncpg has no types, so its class is Any to mypy.
class _Connection(asyncpg.Connection):  # type: ignore[misc]
    """One that notices when the way to the server is gone without a word (a failover, a firewall that forgot us)."""

    def __init__(self, protocol: Any, transport: asyncio.Transport, *rest: Any) -> None:
        super().__init__(protocol, transport, *rest)
        one = transport.get_extra_info("socket")
        if one is not None and one.family in (socket.AF_INET, socket.AF_INET6):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def connect(
    dsn: str, *, application: str, timeout_s: float = CONNECT_TIMEOUT_S, answer_s: float | None = None
) -> Any:
    """One asyncpg connection.

    application: shown in pg_stat_activity, e.g. "kassa writer 3".
    answer_s: how long each statement may take, then it raises TimeoutError; None: as long as it likes.
    Raises DatabaseRefused when the database is one that Kassa may not use (credentials, version, standby, isolation),
    DatabaseUnreachable when no connection comes about in `timeout_s`.
    """
    with _told(dsn):
        connection = await asyncpg.connect(
            dsn, timeout=timeout_s, command_timeout=answer_s, connection_class=_Connection,
            server_settings=_settings(application),
        )  # fmt: skip
    try:
        await _assert_usable(connection, dsn)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def open_pool(
    dsn: str,
    *,
    application: str,
    size_min: int = 1,
    size_max: int = 8,
    timeout_s: float = CONNECT_TIMEOUT_S,
    prepare: Callable[[Any], Awaitable[None]] | None = None,
) -> Any:
    """An asyncpg pool whose connections are like those of `connect`; close it with `close_pool`.

    prepare: runs once on each new connection, e.g. to set plan options. They stay: no session is reset between two users, as that
    would cost a round trip for every query. So whoever borrows a connection leaves no setting, lock or listener behind; `SET
    LOCAL` goes with its transaction, and a transaction that was left open is rolled back.
    """

    async def first(connection: Any) -> None:
        await _assert_usable(connection, dsn)
        if prepare is not None:
            await prepare(connection)

    with _told(dsn):
        return await asyncpg.create_pool(
            dsn,
            min_size=size_min,
            max_size=size_max,
            timeout=timeout_s,
            connection_class=_Connection,
            server_settings=_settings(application),
            init=first,
            reset=_leave_as_it_is,
        )


async def close_pool(pool: "asyncpg.Pool[Any]") -> None:
    """Lets those who have a connection end, but not for ever: the database may be frozen, or away without a word."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await pool.close()
    except TimeoutError:
        log.warning("pool.cut", within_s=CLOSE_S)
        pool.terminate()


async def _leave_as_it_is(connection: Any) -> None:
    """asyncpg ends an open transaction before this. By itself it would then reset the session too, a second round trip after
    each statement; nobody sets anything, listens or takes session locks on a connection of a pool."""


def without_password(dsn: str) -> str:
    """A database URL that may be shown and logged: scheme, host, port and name, nothing else."""
    parts = urlsplit(dsn)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname or ""
    # A port that is not a number makes `parts.port` raise; such a URL fails later, with a better message.
    port = parts.netloc.rpartition("@")[2].rpartition(":")[2]
    return f"postgresql://{host}{f':{port}' if port.isdigit() else ''}{parts.path}"


def _settings(application: str) -> dict[str, str]:
    return {
        "application_name": application,
        # The journal locks first and reads afterwards; only at READ COMMITTED does a statement see what it waited for.
        "default_transaction_isolation": "read committed",
        "timezone": "UTC",
        # Compiling a plan costs more than any of our statements.
        "jit": "off",
    }


@contextmanager
def _told(dsn: str) -> Iterator[None]:
    """Say in Kassa's own errors why there is no connection."""
    try:
        yield
    except _REFUSED as error:
        raise DatabaseRefused(f"{without_password(dsn)} refuses us ({error}); correct the database URL.") from error
    except _UNREACHABLE as error:
        reason = str(error) or "no answer in time"
        raise DatabaseUnreachable(f"{without_password(dsn)} cannot be reached ({reason}).") from error


async def _assert_usable(connection: Any, dsn: str) -> None:
    """Refuse an old server, a standby, and anything in between that ignores our session settings (some poolers do)."""
    where = without_password(dsn)
    if connection.get_server_version().major < MAJOR_MIN:
        raise DatabaseRefused(f"{where} is older than PostgreSQL {MAJOR_MIN}; upgrade it.")
    isolation, is_standby = await connection.fetchrow(
        "SELECT current_setting('default_transaction_isolation'), pg_is_in_recovery()"
    )
    if isolation != "read committed":
        raise DatabaseRefused(
            f"{where} works at {isolation}, and Kassa needs read committed; connect without a pooler."
        )
    if is_standby:
        raise DatabaseRefused(f"{where} is a standby and takes no writes; give the URL of the primary.")
