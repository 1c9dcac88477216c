"""What a consumer fetches ahead, as far as that is arithmetic."""

import asyncio
from datetime import UTC, datetime, timedelta

from kassa.messaging.binders.memory import MemoryTransport
from kassa.messaging.model import Arrival, Packet
from kassa.messaging.supplied import AHEAD_BYTES, CREDIT, CREDIT_FIRST, _Ahead
from kassa.messaging.topology import Topic


async def ahead() -> _Ahead:
    transport = MemoryTransport()
    topic = Topic("orders", ("shop",), "")
    await transport.provision([topic], verify_only=False)
    return _Ahead(await transport.subscribe(topic, "shop"))


def arrivals(count: int, size: int) -> list[Arrival]:
    return [Arrival(Packet(str(number), "", bytes(size), {}), 0, None, None, 1) for number in range(count)]


async def test_small_packets_are_soon_asked_for_by_the_batch() -> None:
    one = await ahead()
    asked = [one.credit]
    while one.credit < CREDIT:
        one.arrivals.clear()
        one.bring(arrivals(one.credit, 600), CREDIT, asyncio.get_running_loop().time())
        asked.append(one.credit)

    assert asked == [CREDIT_FIRST, 40, 80, CREDIT]


async def test_envelopes_are_bounded_by_their_bytes() -> None:
    one = await ahead()
    one.credit = CREDIT

    one.bring(arrivals(20, 64 * 1024), CREDIT, 0.0)
    assert one.credit == AHEAD_BYTES // (64 * 1024)
    assert not one.has_room.is_set()
    one.bring(arrivals(1, 2 * AHEAD_BYTES), CREDIT, 0.0)
    assert one.credit == 1


async def test_suspects_are_the_first_of_a_lane_that_nobody_counts_and_that_were_sent_before_it_came() -> None:
    now = datetime.now(UTC)
    one = await ahead()

    def suspects(redeliveries: int | None, sent_at: datetime | None, epoch: int, times: int) -> int:
        arrival = Arrival(Packet("", "", b"", {}), redeliveries, sent_at, None, epoch)
        return sum([one.is_suspect(arrival, 3) for _ in range(times)])

    assert suspects(0, None, epoch=1, times=5) == 0
    assert suspects(None, None, epoch=1, times=5) == 3
    assert suspects(None, now - timedelta(hours=1), epoch=2, times=2) == 2
    assert suspects(None, now + timedelta(minutes=1), epoch=2, times=1) == 0
    # Whatever its sender's clock says, it is behind one that came later.
    assert suspects(None, now - timedelta(hours=1), epoch=2, times=1) == 0
