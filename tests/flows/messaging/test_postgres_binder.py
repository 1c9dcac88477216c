"""What the binder without a broker promises beside what all binders do: what it refuses, and whoever goes while it claims."""

import secrets

import pytest

from flows.messaging.house import HOME, House
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.model import Confirmed, Failed, Record
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups

TOPIC = Topic("post", ("office",), "Letters, for the tests.")


@pytest.fixture
async def binder(house: House) -> PostgresBinder:
    binder = PostgresBinder(house.pool, Wakeups(house.pool.acquire))
    await binder.provision([TOPIC])
    return binder


def letter(id: str, key: str = "") -> Record:
    return Record(id, key, b"{}", {}, home=HOME)


async def test_a_key_that_no_index_takes_fails_for_good_and_alone(binder: PostgresBinder) -> None:
    """PostgreSQL compresses what it can: only what is random is too long for it."""
    letters = [letter("one"), letter("two", secrets.token_hex(2000)), letter("three")]

    receipts = await binder.send(TOPIC.name, letters, deadline_s=10.0)

    assert receipts[0] == receipts[2] == Confirmed()
    assert isinstance(receipts[1], Failed) and not receipts[1].is_retryable
    assert "maximum" in receipts[1].reason
