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
"""Refused, cut, shutting down, starting, full, cut in the middle of an answer, or no answer in time. Any of them may be gone at the next try."""
