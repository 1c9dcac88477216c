"""What an event's root is called outside."""

from datetime import UTC, datetime

import pytest

from kassa.ids import Id
from kassa.messaging.log import root_name
from kassa.messaging.model import LogRecord, Place

ROOT = Id("0123456789abcdef0123456789abcdef")


@pytest.mark.parametrize(
    ("type", "data", "name"),
    [
        ("payment.succeeded", f'{{"id": "pay_{ROOT}"}}', f"pay_{ROOT}"),
        ("refund.succeeded", f'{{"id": "rfd_1", "payment": "pay_{ROOT}"}}', f"pay_{ROOT}"),
        ("refund.succeeded", f'{{"id": "rfd_1", "payment": "top_{ROOT}"}}', f"top_{ROOT}"),
        ("topup.succeeded", "{}", f"top_{ROOT}"),
        ("payment.closed", f'_{ROOT}"', f"pay_{ROOT}"),
        ("payment.closed", f'{{"note": "a long note_{ROOT}"}}', f"pay_{ROOT}"),
        ("something.else", "{}", ROOT),
    ],
)
def test_root_is_called_as_its_object_says(type: str, data: str, name: str) -> None:
    record = LogRecord(Place(1, 1, 1), 7, ROOT, 1, datetime(2026, 3, 1, tzinfo=UTC), type, data.encode())

    assert root_name(record) == name
