"""Migrations are applied once, in order, and a database that is not ours to use is refused."""

import asyncio

import pytest

from kassa.db.migrate import REWORDED, Migration, migrate, pending, read_migrations, require_current
from kassa.db.pool import connect
from kassa.errors import DatabaseRefused, InvariantBroken


def three() -> tuple[Migration, ...]:
    return read_migrations(
        [
            ("0002_more.sql", b"ALTER TABLE thing ADD COLUMN size bigint;"),
            ("0001_first.sql", b"CREATE TABLE thing (id int); INSERT INTO thing VALUES (1); SELECT pg_sleep(0.2);"),
            ("0003_rest.sql", b"CREATE INDEX thing_size ON thing (size);"),
        ]
    )


async def test_each_migration_is_applied_once_and_in_order(empty_database_url: str) -> None:
    seen: list[int] = []

    applied = await migrate(empty_database_url, migrations=three(), progress=lambda each: seen.append(each.number))
    again = await migrate(empty_database_url, migrations=three())

    assert seen == [1, 2, 3]
    assert [each.name for each in applied] == ["first", "more", "rest"]
    assert again == ()


async def test_two_processes_that_start_together_apply_each_migration_once(empty_database_url: str) -> None:
    done = await asyncio.gather(*(migrate(empty_database_url, migrations=three()) for _ in range(4)))

    assert sorted(len(each) for each in done) == [0, 0, 0, 3]
    connection = await connect(empty_database_url, application="test")
    assert await connection.fetchval("SELECT count(*) FROM thing") == 1
    await connection.close()


async def test_a_migration_that_fails_leaves_nothing_of_itself(empty_database_url: str) -> None:
    broken = read_migrations([("0001_first.sql", b"CREATE TABLE thing (id int); SELECT 1 / 0;")])

    with pytest.raises(Exception, match="division by zero"):
        await migrate(empty_database_url, migrations=broken)

    assert len(await migrate(empty_database_url, migrations=three())) == 3


async def test_a_database_newer_than_the_program_is_refused(empty_database_url: str) -> None:
    await migrate(empty_database_url, migrations=three())

    with pytest.raises(DatabaseRefused, match=r"at migration 3 \(rest\).*knows only 2.*restore a backup"):
        await migrate(empty_database_url, migrations=three()[:2])


async def test_a_migration_that_was_changed_after_it_was_applied_is_refused(empty_database_url: str) -> None:
    await migrate(empty_database_url, migrations=three()[:1])

    with pytest.raises(DatabaseRefused, match=r"migration 1 \(first\) in another form"):
        await migrate(empty_database_url, migrations=read_migrations([("0001_first.sql", b"SELECT 1;")]))


async def test_a_migration_that_was_put_in_other_words_is_known_by_its_former_ones(database_url: str) -> None:
    connection = await connect(database_url, application="test")
    for number, digest in REWORDED.items():
        await connection.execute("UPDATE schema_migration SET sha256 = $2 WHERE number = $1", number, digest)

    assert await pending(connection) == ()

    await connection.execute("UPDATE schema_migration SET sha256 = 'another' WHERE number = $1", min(REWORDED))
    with pytest.raises(DatabaseRefused, match="in another form"):
        await pending(connection)
    await connection.close()


async def test_what_is_pending_is_told_and_required(empty_database_url: str, database_url: str) -> None:
    empty = await connect(empty_database_url, application="test")
    migrated = await connect(database_url, application="test")

    assert await pending(empty) == read_migrations()
    assert await pending(migrated) == ()
    await require_current(migrated)
    with pytest.raises(DatabaseRefused, match="kassa migrate"):
        await require_current(empty)

    await empty.close()
    await migrated.close()


@pytest.mark.parametrize(
    "names",
    [["0002_first.sql"], ["0001_first.sql", "0001_other.sql"], ["0001_first.sql", "0003_rest.sql"], ["first.sql"]],
)
def test_numbers_with_gaps_or_twins_are_refused(names: list[str]) -> None:
    with pytest.raises(InvariantBroken):
        read_migrations([(name, b"") for name in names])
