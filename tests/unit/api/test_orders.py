"""Requests of the queue, as far as they are bytes."""

import pytest

from kassa.api.queue import read_order
from kassa.errors import RequestInvalid

DEEP = b"[" * 2000 + b"]" * 2000


@pytest.mark.parametrize(
    "body", [b'{"x":' + DEEP + b"}", b'{"order_id":' + DEEP + b"}", DEEP, b'{"action":' + DEEP + b"}"]
)
def test_body_that_is_nested_beyond_use_is_refused(body: bytes) -> None:
    with pytest.raises(RequestInvalid):
        read_order(body)
