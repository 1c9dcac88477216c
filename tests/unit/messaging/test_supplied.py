"""What a consumer fetches ahead, as far as that is arithmetic."""

import asyncio

from kassa.messaging.binders.memory import MemoryTransport
from kassa.messaging.model import Arrival, Packet
from kassa.messaging.supplied import AHEAD_BYTES, CRASHES_MAX, CREDIT, CREDIT_FIRST, _Ahead
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


async def test_first_of_a_lane_that_nobody_counts_is_looked_at_and_what_follows_is_worn_if_that_came_too_often() -> (
    None
):
    one = await ahead()
    counted, worn = (Arrival(Packet("", "", b"", {}), times, None, None, 1) for times in (0, CRASHES_MAX))
    first = Arrival(Packet("", "", b"", {}), None, None, None, 2)
    of_another_lane = Arrival(Packet("", "", b"", {}), None, None, None, 3)

    assert not one.is_first(counted) and [one.is_worn(each) for each in (counted, worn)] == [False, True]
    assert [one.is_first(each) for each in (first, first, of_another_lane)] == [True, False, True]
    assert not one.is_worn(first)
    one.wear(2, packets=2)
    assert [one.is_worn(each) for each in (first, of_another_lane, first, first)] == [True, False, True, False]
