"""How refusals look on the wire."""

from collections.abc import Iterator

import pytest

from kassa import errors
from kassa.api.problem import problem, retry_after_s
from kassa.errors import DatabaseUnreachable, KassaError, TooMany


def all_errors(kind: type[KassaError] = errors.KassaError) -> Iterator[type[KassaError]]:
    """The whole tree."""
    yield kind
    for inner in kind.__subclasses__():
        yield from all_errors(inner)


@pytest.mark.parametrize("kind", [kind for kind in all_errors() if kind.status == 503 and kind.code[:6] != "client"])
def test_a_503_has_one_of_the_two_codes_that_clients_rely_on(kind: type[KassaError]) -> None:
    told = problem(kind())

    assert told["code"] in ("system.busy", "system.unknown")
    assert told["type"] == f"urn:kassa:problem:{told['code']}"
    assert told["retryable"] and retry_after_s(kind()) == 1
    # The outcome speaks of the key: an earlier request under it may have gone through.
    assert told["outcome"] == "unknown"


def test_a_database_that_is_away_is_named_and_its_address_is_not() -> None:
    told = problem(DatabaseUnreachable("connect to 10.0.0.7 failed", host="10.0.0.7"), "req_1")

    assert told["detail"] == "The database cannot be reached."
    assert told["title"].startswith("It is not known whether")
    assert "10.0.0.7" not in str(told)


def test_too_many_says_how_long_to_wait() -> None:
    assert (problem(TooMany())["status"], problem(TooMany())["code"]) == (429, "system.too_many")
    assert (problem(TooMany())["outcome"], problem(TooMany())["retryable"]) == ("unknown", True)
    assert (retry_after_s(TooMany()), retry_after_s(TooMany(retry_after_s=7))) == (1, 7)
