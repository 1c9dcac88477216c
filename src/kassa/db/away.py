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
)
"""Refused, cut (also in the middle of an answer), shutting down, starting, full, or late. Any may be gone at the next try."""
