"""Which dead letters there are to forget."""

from datetime import UTC, datetime, timedelta

from flows.messaging.house import HOME, House, put
from kassa.ids import new_id
from kassa.messaging.work import DeadLetters, MessageWork, OutgoingMessage

QUEUE = "shop.mails:mailer"


async def test_forgetting_counts_only_what_was_not_replayed(house: House) -> None:
    """What was replayed is no dead letter any more to anybody who counts them, though its row is kept."""
    work, letters = MessageWork(house.pool), DeadLetters(house.pool)
    await put(house.pool, *(OutgoingMessage(new_id(), HOME, QUEUE, "", 4, 0.0, {}, b"") for _ in range(3)))
    claimed = await work.claim(QUEUE, 10)
    await work.bury([(message, "no") for message in claimed])
    assert await letters.replay(QUEUE, ids=[claimed[0].id]) == 1

    assert await letters.purge(QUEUE, datetime.now(UTC) + timedelta(minutes=1)) == 2

    assert await letters.browse(QUEUE) == []
    assert await letters.replay(QUEUE) == 0
