"""What a body may be, and how a refusal names the field."""

from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.api.decode import BodyDecoder, read_query
from kassa.api.http import Request
from kassa.api.rest.fields import Amount, Metadata, Payer
from kassa.errors import MediaTypeUnsupported, RequestInvalid


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    amount: Amount
    description: str = ""
    metadata: Metadata = {}
    payer: Payer | None = None


class Query(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    limit: int = 20
    at: datetime | None = None
    state: str | None = None


decode = BodyDecoder(Body)

REFUSED = [
    (b"", "", "cannot be read"),
    (b"{", "", "cannot be read"),
    (b"[]", "", "got array"),
    (b"null", "", "got null"),
    (b"\xff\xfe", "", "cannot be read"),
    (b'\xef\xbb\xbf{"amount":1}', "", "cannot be read"),
    (b'{"amount":1} x', "", "cannot be read"),
    (b"{}", "amount", "is required"),
    (b'{"amount":1.0}', "amount", "got float"),
    (b'{"amount":1e2}', "amount", "got float"),
    (b'{"amount":0.1}', "amount", "got float"),
    (b'{"amount":true}', "amount", "got bool"),
    (b'{"amount":"1"}', "amount", "got str"),
    (b'{"amount":null}', "amount", "got null"),
    (b'{"amount":0}', "amount", ">= 1"),
    (b'{"amount":-1}', "amount", ">= 1"),
    (b'{"amount":9007199254740992}', "amount", "<= 9007199254740991"),
    (b'{"amount":1' + b"0" * 400 + b"}", "amount", "<= 9007199254740991"),
    (b'{"amount":1' + b"0" * 6000 + b"}", "amount", "out of range"),
    (b'{"amount":1e400}', "amount", "out of range"),
    (b'{"amount":1,"amount":2}', "amount", "is given twice"),
    (b'{"amount":1,"metadata":{"a":"1","a":"2"}}', "a", "is given twice"),
    (b'{"amount":1,"am\\u006funt":2}', "amount", "is given twice"),
    (b'{"amount":1,"colour":"red"}', "colour", "is not a field"),
    (b'{"amount":1,"payer":{"colour":"red"}}', "payer.colour", "is not a field"),
    (b'{"amount":1,"payer":{"wallet":"w"}}', "payer.wallet", "regex"),
    (b'{"amount":1,"metadata":{"a":1}}', "metadata[...]", "got int"),
    (b'{"amount":1,"metadata":{"a":{"b":"c"}}}', "metadata[...]", "got object"),
    (b'{"amount":1,"metadata":{"' + b"k" * 41 + b'":"1"}}', "metadata", "length <= 40"),
    (b'{"amount":1,"description":"a\\u0000b"}', "description", "NUL"),
    (b'{"amount":1,"metadata":{"k":"\\u0000"}}', "metadata.k", "NUL"),
    (b'{"amount":1,"metadata":{"\\u0000":"v"}}', "metadata", "NUL"),
    (b'{"amount":1,"description":"\\ud800"}', "", "cannot be read"),
    (b'{"amount":1,"description":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "description", "got array"),
    (b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "x", "is not a field"),
]


@pytest.mark.parametrize(("raw", "field", "message"), REFUSED)
def test_a_body_that_is_wrong_is_refused_by_the_name_of_the_field(raw: bytes, field: str, message: str) -> None:
    with pytest.raises(RequestInvalid) as refusal:
        decode.read(raw)

    (fault,) = refusal.value.facts["errors"]
    assert fault["field"] == field
    assert message in fault["message"]


def test_more_than_fifty_metadata_entries_are_refused() -> None:
    many = msgspec.json.encode({"amount": 1, "metadata": {str(number): "" for number in range(51)}})

    with pytest.raises(RequestInvalid) as refusal:
        decode.read(many)

    assert refusal.value.facts["errors"][0]["field"] == "metadata"


def test_the_same_name_in_two_objects_is_no_repeat() -> None:
    body = decode.read(b'{"amount":1,"metadata":{"amount":"1"},"payer":{"ip":"::1"}}')

    assert (body.amount, body.metadata) == (1, {"amount": "1"})


def test_a_backslash_before_u0000_is_only_text() -> None:
    body = decode.read(b'{"amount":1,"description":"\\\\u0000"}')

    assert body.description == "\\u0000"


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
).map(lambda value: msgspec.json.encode(value)))  # fmt: skip
def test_whatever_comes_is_read_or_refused(raw: bytes) -> None:
    try:
        assert 1 <= decode.read(raw).amount <= 9_007_199_254_740_991
    except RequestInvalid as refusal:
        assert refusal.facts["errors"]


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_taken(kind: str) -> None:
    assert decode(Request("POST", "/", headers={"content-type": kind}, body=b'{"amount":1}')).amount == 1


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_media_type_is_refused(kind: str) -> None:
    with pytest.raises(MediaTypeUnsupported):
        decode(Request("POST", "/", headers={"content-type": kind}, body=b'{"amount":1}'))


def test_a_query_is_read_as_what_its_type_wants() -> None:
    read = read_query(Request("GET", "/", "limit=5&state=closed"), Query)

    assert (read.limit, read.state) == (5, "closed")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=x", "limit"), ("limit=1.5", "limit"), ("limit=null", "limit"), ("limit=1&limit=2", "limit"),
        ("at=null", "at"), ("at=12", "at"), ("at=2026-01-01", "at"), ("colour=red", "colour"), ("state=%00", "state"),
    ],
)  # fmt: skip
def test_a_query_that_is_wrong_is_refused_by_the_name_of_the_field(query: str, field: str) -> None:
    with pytest.raises(RequestInvalid) as refusal:
        read_query(Request("GET", "/", query), Query)

    errors: list[dict[str, Any]] = refusal.value.facts["errors"]
    assert errors[0]["field"] == field
