"""One PostgreSQL for the whole test run, and a fresh database for each test that asks. Pure tests never start it."""

import asyncio
import os
from collections.abc import Iterator
from itertools import count

import pytest

from kassa.db import embedded
from kassa.db.migrate import migrate

_numbers = count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[embedded.Running]:
    """A server of our own. Without fsync: a killed process loses nothing by that, only a machine without power does."""
    with embedded.temporary_directory("kassa-tests-") as directory:
        server = embedded.start(directory, settings={"fsync": "off", "max_connections": "200"})
        try:
            yield server
        finally:
            embedded.stop(server)


@pytest.fixture(scope="session")
def migrated_template(postgres: embedded.Running) -> str:
    """The name of a database with all migrations, to copy from."""
    embedded.execute(postgres, "CREATE DATABASE migrated;")
    asyncio.run(migrate(database_named(postgres, "migrated")))
    return "migrated"


@pytest.fixture
def database_url(postgres: embedded.Running, migrated_template: str) -> Iterator[str]:
    """A migrated database for one test alone."""
    yield from _database(postgres, migrated_template)


@pytest.fixture
def empty_database_url(postgres: embedded.Running) -> Iterator[str]:
    """A database without any table for one test alone."""
    yield from _database(postgres, "template0")


def database_named(server: embedded.Running, name: str) -> str:
    """The URL of another database of the same server."""
    return server.dsn.rpartition("/")[0] + "/" + name


def _database(server: embedded.Running, template: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    embedded.execute(server, f"CREATE DATABASE {name} TEMPLATE {template};")
    yield database_named(server, name)
    embedded.execute(server, f"DROP DATABASE {name} WITH (FORCE);")
