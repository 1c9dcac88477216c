"""What our connections over AMQP make of a client that mixes up cancellations and lost connections, and of strangers' headers."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiormq import exceptions as refused
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from kassa.messaging.binders.amqp import PIECE, Deliveries, Parcel, _Reader, packet_of, uncancelled


async def goes_on() -> str:
    """As `asyncio.wait_for` of Python 3.11 does when its answer comes at the moment of the cancellation."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return "answer"
    return ""


async def raises_something_else() -> None:
    """As aiormq does when the connection is lost at that moment."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise refused.ConnectionClosed(0, "lost") from None


@pytest.mark.parametrize("call", [goes_on, raises_something_else])
async def test_a_cancellation_that_a_call_takes_for_its_own_is_not_lost(call: Callable[[], Awaitable[object]]) -> None:
    task = asyncio.ensure_future(uncancelled(call()))
    await asyncio.sleep(0)

    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("call", [goes_on, raises_something_else])
async def test_a_limit_of_time_stays_one(call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await uncancelled(call())


@pytest.mark.parametrize("told", [asyncio.CancelledError, Exception])
async def test_a_lost_connection_is_told_as_one(told: type[BaseException]) -> None:
    """What aiormq raises where nobody cancelled anything."""

    async def is_lost() -> None:
        raise told

    with pytest.raises(refused.ConnectionClosed):
        await uncancelled(is_lost())


async def test_who_is_cancelled_already_may_still_wait_for_an_answer() -> None:
    """While he tidies up."""

    async def answers() -> str:
        await asyncio.sleep(0)
        return "answer"

    async def tidies_up() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            heard.append(await uncancelled(answers()))
        return ""

    heard: list[str] = []
    task = asyncio.create_task(tidies_up())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled() and heard == ["answer"]


@pytest.mark.parametrize(
    ("is_redelivered", "header", "redeliveries"),
    [
        (False, 2**40, 0),
        (False, 99, 0),
        (False, -1, 0),
        (True, 3, 3),
        (True, 0, 0),
        (True, -1, 0),
        (True, 2**40, 1000),
        (True, "3", None),
        (True, None, None),
    ],
)
def test_count_of_redeliveries_is_believed_when_a_broker_may_have_written_it(
    is_redelivered: bool, header: int | str | None, redeliveries: int | None
) -> None:
    """Anybody can send the header; beyond 32 bits it cannot even be stored."""
    properties = spec.Basic.Properties(headers={"x-delivery-count": header})

    assert packet_of(Parcel(1, is_redelivered, properties, b""))[1] == redeliveries


@pytest.mark.parametrize("sizes", [[1], [6, 1, 0, 3], [7, PIECE * 2 + 1, 1]])
async def test_bytes_come_in_the_order_and_the_numbers_that_are_asked_for(sizes: list[int]) -> None:
    sent = bytes(number % 251 for number in range(sum(sizes)))
    stream = asyncio.StreamReader()
    reader = _Reader(stream)
    asking = asyncio.create_task(_read(reader, sizes))
    for start in range(0, len(sent), 1000):
        stream.feed_data(sent[start : start + 1000])
        await asyncio.sleep(0)
    stream.feed_eof()

    found = await asking

    assert [len(one) for one in found] == sizes
    assert b"".join(found) == sent
    assert reader.at_eof()


async def _read(reader: _Reader, sizes: list[int]) -> list[bytes]:
    return [await reader.readexactly(size) for size in sizes]


async def test_a_connection_that_ends_within_a_frame_says_what_came_of_it() -> None:
    stream = asyncio.StreamReader()
    reader = _Reader(stream)
    stream.feed_data(b"abcd")
    stream.feed_eof()

    assert await reader.readexactly(1) == b"a"
    assert not reader.at_eof()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await reader.readexactly(7)
    assert (caught.value.partial, caught.value.expected) == (b"bcd", 7)


async def test_messages_come_whole_and_every_other_frame_goes_its_way() -> None:
    came: list[Parcel] = []
    frames = Deliveries(came.append)
    properties = spec.Basic.Properties(message_id="r-1")
    announced = spec.Basic.Deliver(consumer_tag="c", delivery_tag=7, redelivered=True, exchange="e", routing_key="k")
    others = [spec.Basic.ConsumeOk(consumer_tag="c"), ContentBody(b"of nothing")]

    for frame in (
        others[0],
        announced, ContentHeader(body_size=5, properties=properties), ContentBody(b"abc"), ContentBody(b"de"),
        announced, ContentHeader(body_size=0, properties=properties),
        others[1],
    ):  # fmt: skip
        await frames.put((0, frame))

    assert came == [Parcel(7, True, properties, b"abcde"), Parcel(7, True, properties, b"")]
    assert [frames.get_nowait()[1] for _ in others] == others
    assert frames.empty()
