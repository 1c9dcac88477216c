"""Houses of real processes, ended whatever happens."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.house import House
from kassa.db import embedded


@pytest.fixture
def house(tmp_path: Path, database_url: str) -> Iterator[House]:
    """A running Kassa on a database of its own."""
    house = House(tmp_path / "kassa", database_url)
    try:
        house.start()
        yield house
    finally:
        house.stop()


@pytest.fixture
def whole_house() -> Iterator[House]:
    """`kassa up` with nothing given: its PostgreSQL is its own, and it looks after it."""
    with embedded.temporary_directory("kassa-chaos-") as directory:
        house = House(directory, None)
        try:
            house.start()
            yield house
        finally:
            house.stop()
