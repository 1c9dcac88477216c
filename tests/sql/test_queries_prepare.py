"""PostgreSQL prepares every named query of every queries.sql against the migrated schema."""

from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest

from kassa.db.pool import connect
from kassa.db.queries import load

ROOT = Path(str(files("kassa")))
PACKAGES = sorted(
    (".".join(("kassa", *path.relative_to(ROOT).parent.parts)), path.name) for path in ROOT.rglob("*queries.sql")
)


async def faults(database_url: str, package: str, file: str) -> list[str]:
    """What the server has against the queries of a file, a sentence each."""
    queries = load(package, file)
    connection = await connect(database_url, application="test")
    found = []
    for name, statement in queries.items():
        try:
            await connection.prepare(statement)
        except asyncpg.PostgresError as error:
            found.append(f"{package}.{name}: {error}")
    await connection.close()
    return found


@pytest.mark.parametrize(("package", "file"), PACKAGES)
async def test_every_named_query_prepares(database_url: str, package: str, file: str) -> None:
    assert await faults(database_url, package, file) == []


@pytest.mark.parametrize(("package", "file"), PACKAGES)
def test_every_named_query_says_what_it_is_for(package: str, file: str) -> None:
    queries = load(package, file)

    assert [name for name in queries if not queries.sentences[name]] == []
