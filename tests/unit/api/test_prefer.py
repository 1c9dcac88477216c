"""What of a Prefer header is understood."""

import pytest

from kassa.api.prefer import NONE, Preference, read_prefer

READ = [
    (None, NONE, None),
    ("", NONE, None),
    ("wait=5", Preference(wait_s=5), "wait=5"),
    ("wait = 5", Preference(wait_s=5), "wait=5"),
    ('wait="5"', Preference(wait_s=5), "wait=5"),
    ("WAIT=5", Preference(wait_s=5), "wait=5"),
    ("wait=100", Preference(wait_s=30), "wait=30"),
    ("wait=0", Preference(wait_s=0), "wait=0"),
    ("wait=5, wait=9", Preference(wait_s=5), "wait=5"),
    ("wait=-1", NONE, None),
    ("wait=soon", NONE, None),
    ("respond-async", Preference(is_async=True), "respond-async"),
    ("respond-async; foo=bar", Preference(is_async=True), "respond-async"),
    ("respond-async, wait=3", Preference(wait_s=3), "wait=3"),
    ("handling=lenient", NONE, None),
    ("handling=lenient, wait=2", Preference(wait_s=2), "wait=2"),
    (",,;;==", NONE, None),
]


@pytest.mark.parametrize(("header", "preference", "applied"), READ)
def test_a_preference_is_read(header: str | None, preference: Preference, applied: str | None) -> None:
    assert read_prefer(header) == preference
    assert read_prefer(header).applied == applied
