"""Cursors: what we gave is read again, anything else is refused."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.api.pages import read_event_cursor, read_id_cursor, read_number_cursor, write_cursor
from kassa.errors import RequestInvalid
from kassa.ids import Id, new_id


def test_an_id_comes_back() -> None:
    place = new_id()

    assert read_id_cursor(write_cursor(place)) == place


def test_no_cursor_is_the_beginning() -> None:
    assert read_id_cursor(None) is None
    assert read_number_cursor(None) is None
    assert read_event_cursor(None) is None


@given(st.integers(0, (1 << 63) - 1))
def test_a_number_comes_back(number: int) -> None:
    assert read_number_cursor(write_cursor(number)) == number


def test_an_events_place_comes_back() -> None:
    assert read_event_cursor(write_cursor(1_800_000_000_000_000, 1, 77, 0)) == (1_800_000_000_000_000, 1, 77, 0)


@pytest.mark.parametrize("read", [read_id_cursor, read_number_cursor, read_event_cursor])
@given(text=st.text(max_size=60) | st.binary(max_size=40).map(lambda raw: write_cursor(raw.hex())))
def test_anything_else_is_refused(read: Callable[[str], Id | int | tuple[int, ...] | None], text: str) -> None:
    try:
        assert read(text) is not None
    except RequestInvalid as refusal:
        assert refusal.facts["errors"][0]["field"] == "cursor"
