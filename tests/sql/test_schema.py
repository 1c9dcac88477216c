"""schema.sql equals the migrations, and the comparison sees what it should."""

import pytest

from kassa.db.schema_check import compare, difference


async def test_schema_sql_equals_the_migrations(empty_database_url: str) -> None:
    assert await difference(empty_database_url) == []


async def test_a_page_that_lacks_everything_is_seen(empty_database_url: str) -> None:
    found = await difference(empty_database_url, page="CREATE TABLE only_here (id int);")

    assert "relation only_here: only schema.sql has it" in "\n".join(found)
    assert any("only the migrations make it" in each for each in found)


@pytest.mark.parametrize(
    ("page", "migrations", "sentence"),
    [
        (
            {"column a.b": "int"},
            {"column a.b": "bigint"},
            "column a.b: schema.sql says (int), the migrations say (bigint)",
        ),
        ({"index i": "x"}, {}, "index i: only schema.sql has it (x)"),
        ({}, {"index i": "x"}, "index i: only the migrations make it (x)"),
    ],
)
def test_each_kind_of_difference_is_named(page: dict[str, str], migrations: dict[str, str], sentence: str) -> None:
    assert compare(page, migrations) == [sentence]
