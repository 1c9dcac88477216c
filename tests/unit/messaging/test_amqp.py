"""What our connections over AMQP make of a client that mixes up cancellations and lost connections."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiormq import exceptions as refused

from kassa.messaging.binders.amqp import uncancelled


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
