"""A pool that says what it was asked."""

from typing import Any


class CountingPool:
    """Counts statements, and refuses some."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.statements: list[str] = []
        self.refused: str | None = None
        """A part of the statements that fail from now on."""

    def __getattr__(self, name: str) -> Any:
        def asked(statement: str, *arguments: Any) -> Any:
            self.statements.append(statement)
            if self.refused is not None and self.refused in statement:
                raise ConnectionResetError
            return getattr(self._pool, name)(statement, *arguments)

        return asked
