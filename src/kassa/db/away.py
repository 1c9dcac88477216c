"""How a database that is away shows itself to whoever has a connection or asks the pool for one."""

import asyncpg

AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
)
"""Refused, cut (also in the middle of an answer: asyncpg's InternalClientError), shutting down, starting, full, a standby since a
failover, or late. Any may be gone at the next try."""
