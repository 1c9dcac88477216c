"""What of a message is text, and what is made of the rest."""

import pytest

from kassa.messaging.work import ERROR_CHARACTERS_MAX, read_headers, shortened, written


@pytest.mark.parametrize(
    ("raw", "headers"),
    [
        ('{"a": "b"}', {"a": "b"}),
        ("{}", {}),
        ('{"tries": 1, "a": "b"}', {"tries": "1", "a": "b"}),
        ('{"none": null, "yes": true, "list": [1]}', {"none": "None", "yes": "True", "list": "[1]"}),
        ('{"a": "\\ud800", "\\ud800": "b"}', {"a": "?", "?": "b"}),
        ('["x"]', {}),
        ("7", {}),
        ("null", {}),
        ("no JSON", {}),
        ("", {}),
        ("[" * 100_000, {}),
    ],
)
def test_headers_that_are_no_text_are_shown_as_text(raw: str, headers: dict[str, str]) -> None:
    assert read_headers(raw) == headers


@pytest.mark.parametrize(
    ("error", "stored"),
    [
        (None, None),
        ("no", "no"),
        ("half \ud800 of it", "half ? of it"),
        ("zero\0byte", "zerobyte"),
        ("\U0001f4b0" * 1000, "\U0001f4b0" * ERROR_CHARACTERS_MAX),
    ],
)
def test_an_error_is_stored_without_what_postgresql_refuses(error: str | None, stored: str | None) -> None:
    assert shortened(error) == stored


@pytest.mark.parametrize(
    ("said", "kept"),
    [("plain", "plain"), ("a\0b", "a\ufffdb"), ("half \ud800 of it", "half ? of it"), ("\\u0000", "\\u0000")],
)
def test_headers_are_stored_without_what_postgresql_refuses(said: str, kept: str) -> None:
    assert read_headers(written({f"x-{said}": said})) == {f"x-{kept}": kept}
