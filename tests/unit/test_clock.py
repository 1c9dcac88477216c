"""Time is passed in, and written in one way."""

import contextlib
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.clock import FrozenClock, SystemClock, parse_rfc3339, rfc3339
from kassa.errors import RequestInvalid

times = st.datetimes(timezones=st.just(UTC))


@given(times)
def test_a_time_reads_back_to_the_millisecond(at: datetime) -> None:
    assert parse_rfc3339(rfc3339(at)) == at.replace(microsecond=at.microsecond // 1000 * 1000)


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (datetime(2026, 8, 1, 12, tzinfo=UTC), "2026-08-01T12:00:00.000Z"),
        (datetime(2026, 8, 1, 12, 0, 0, 999_999, UTC), "2026-08-01T12:00:00.999Z"),
        (datetime(2026, 8, 1, 12, tzinfo=timezone(timedelta(hours=8))), "2026-08-01T04:00:00.000Z"),
    ],
)
def test_a_time_is_written_in_utc_and_cut_to_milliseconds(at: datetime, text: str) -> None:
    assert rfc3339(at) == text


def test_a_time_without_a_zone_is_never_written() -> None:
    with pytest.raises(ValueError, match="zone"):
        rfc3339(datetime(2026, 8, 1))


@pytest.mark.parametrize("text", ["2026-08-01T20:00:00+08:00", "2026-08-01t12:00:00z", "2026-08-01 12:00:00.000000Z"])
def test_offsets_and_small_letters_are_read(text: str) -> None:
    assert parse_rfc3339(text) == datetime(2026, 8, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-08-01",
        "2026-08-01T12:00:00",
        "20260801T120000Z",
        "2026-W31-6T12:00:00Z",
        "2026-13-01T12:00:00Z",
        "2026-08-01T12:00Z00000000",
        "0001-01-01T00:00:00+23:00",
        "2026-08-01T12:00:00٣Z",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(RequestInvalid):
        parse_rfc3339(text)


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    with contextlib.suppress(RequestInvalid):
        assert parse_rfc3339(text).tzinfo is UTC


def test_a_frozen_clock_moves_only_when_told() -> None:
    clock = FrozenClock()
    first = clock.now()

    assert clock.now() == first
    assert clock.advance(90) == first + timedelta(seconds=90) == clock.now()


def test_the_system_clock_knows_its_zone() -> None:
    assert SystemClock().now().tzinfo is UTC
