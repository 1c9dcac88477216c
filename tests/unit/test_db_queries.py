"""Named SQL is read from files, and a wrong name or file is refused with words that help."""

import copy

import pytest

from kassa.db.queries import array, parse
from kassa.errors import InvariantBroken

TEXT = """
-- What this file is about.

-- name: move_attempt
-- Move an attempt,
-- if nobody moved it.
UPDATE attempt
SET state = $1 -- the new one
WHERE id = $2;

-- Readings.

-- name: read_attempt
SELECT 1
"""


def test_a_query_is_found_by_attribute_and_by_key_without_its_comments() -> None:
    queries = parse(TEXT, origin="test")

    assert queries.move_attempt == "UPDATE attempt\nSET state = $1 -- the new one\nWHERE id = $2"
    assert queries["read_attempt"] == "SELECT 1"
    assert queries.sentences == {"move_attempt": "Move an attempt, if nobody moved it.", "read_attempt": ""}
    assert list(queries) == ["move_attempt", "read_attempt"]
    assert copy.copy(queries).read_attempt == "SELECT 1"


def test_an_unknown_name_says_what_is_close_to_it() -> None:
    queries = parse(TEXT, origin="payments/queries.sql")

    with pytest.raises(
        AttributeError, match=r"payments/queries.sql has no query named move_atempt; did you mean move_att"
    ):
        _ = queries.move_atempt
    with pytest.raises(KeyError, match="has no query named drop"):
        _ = queries["drop"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-- name: a\nSELECT 1;\n-- name: a\nSELECT 2;", "two queries are named a"),
        ("-- name: a-b\nSELECT 1;", "cannot name a query"),
        ("-- name: items\nSELECT 1;", "cannot name a query"),
        ("-- name: a\n-- Only words.\n-- name: b\nSELECT 1;", "the query a is empty"),
    ],
)
def test_a_file_that_is_not_well_formed_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvariantBroken, match=reason):
        parse(text, origin="test")


def test_an_array_of_numbers_is_as_postgresql_reads_it() -> None:
    assert array(["1", "-2.5", "0a"]) == "{1,-2.5,0a}"
    assert array([]) == "{}"
