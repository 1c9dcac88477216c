"""What is counted of what consumers end."""

from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from kassa.ids import Id, new_id
from kassa.journal.change import MessageDone
from kassa.messaging.metered import MeteredSubscription
from kassa.messaging.model import Ack, Dead, Delivery, Record, RetryAfter, Settlement
from kassa.observability.meters import Passage

ENDS: list[Settlement] = [Ack(), RetryAfter(5.0, "no"), RetryAfter(0.0, None, counts=False), Dead("no")]


class Stream:
    """A subscription that settles everything or nothing."""

    def __init__(self, settles: bool) -> None:
        self._settles = settles

    async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
        return []

    async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
        return [self._settles] * len(settled)

    async def close(self, drain_s: float) -> None:
        pass


def delivery(*done: MessageDone) -> Delivery:
    return Delivery(Record(new_id(), "", b"", {}), 0, datetime.now(UTC), None, 1, done)


@pytest.mark.parametrize(
    ("settles", "done", "counted"),
    [
        (True, (), (1, 1, 1, 1)),
        (False, (), (0, 0, 0, 0)),
        # The commit of its effect has settled it before: there was nothing left to settle.
        (False, (MessageDone(Id(new_id())),), (1, 0, 0, 0)),
        (True, (MessageDone(Id(new_id())),), (1, 1, 1, 1)),
    ],
)
async def test_only_what_was_settled_is_counted(
    settles: bool, done: tuple[MessageDone, ...], counted: tuple[int, ...]
) -> None:
    passage = Passage()
    subscription = MeteredSubscription(Stream(settles), passage)

    answers = await subscription.settle([(delivery(*done), end) for end in ENDS])

    assert answers == [settles] * len(ENDS)
    assert (passage.handled, passage.retried, passage.put_off, passage.dead) == counted
    assert sum(passage.buckets) == passage.handled


async def test_of_a_batch_only_those_are_counted_that_were_settled() -> None:
    class Half(Stream):
        async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
            return [number % 2 == 0 for number in range(len(settled))]

    passage = Passage()

    await MeteredSubscription(Half(True), passage).settle([(delivery(), end) for end in (Ack(), Dead("no"), Ack())])

    assert (passage.handled, passage.dead) == (2, 0)
