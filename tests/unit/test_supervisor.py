"""Loops that crash come back, with pauses; the database's absence is no crash."""

import asyncio
from contextlib import suppress

import pytest

from kassa import supervisor as module
from kassa.errors import BrokerUnreachable, DatabaseUnreachable
from kassa.supervisor import Supervisor, end_tasks


async def test_a_loop_that_crashes_is_counted_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    starts: list[int] = []
    steady = asyncio.Event()

    async def loop() -> None:
        starts.append(len(starts))
        if len(starts) < 3:
            raise ZeroDivisionError("once more")
        steady.set()
        await asyncio.Event().wait()

    running = Supervisor({"one": loop})
    running.start()
    await asyncio.wait_for(steady.wait(), 60)

    assert (len(starts), running.crashes, running.idle) == (3, 2, [])
    assert running.workers[0].last_error == "ZeroDivisionError: once more"
    await running.stop()
    assert [worker.name for worker in running.idle] == ["one"]


async def test_a_database_that_is_away_is_waited_for_and_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    steady = asyncio.Event()
    failures = [ConnectionRefusedError("gone"), DatabaseUnreachable()]

    async def loop() -> None:
        if failures:
            raise failures.pop()
        steady.set()
        await asyncio.Event().wait()

    running = Supervisor({"one": loop})
    running.start()
    await asyncio.wait_for(steady.wait(), 60)

    assert running.crashes == 0
    await running.stop()


async def test_a_loop_that_ends_by_itself_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    starts: list[int] = []
    thrice = asyncio.Event()

    async def loop() -> None:
        starts.append(len(starts))
        if len(starts) == 3:
            thrice.set()

    running = Supervisor({"one": loop})
    running.start()
    await asyncio.wait_for(thrice.wait(), 60)

    assert running.crashes >= 2
    await running.stop()


async def test_a_cancellation_that_was_not_meant_for_the_loop_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may cancel what the loop waits for, as when a connection dies."""
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    starts: list[int] = []
    steady = asyncio.Event()

    async def loop() -> None:
        starts.append(len(starts))
        if len(starts) == 1:
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            answer.cancel()
            await answer
        steady.set()
        await asyncio.Event().wait()

    running = Supervisor({"one": loop})
    running.start()
    await asyncio.wait_for(steady.wait(), 60)

    assert (len(starts), running.crashes, running.idle) == (2, 1, [])
    await running.stop()


async def test_task_that_takes_its_cancellation_for_something_else_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    deaf = asyncio.create_task(_deaf(times=2))
    plain = asyncio.create_task(asyncio.Event().wait())
    await asyncio.sleep(0)

    await end_tasks(deaf, plain)

    assert deaf.cancelled() and plain.cancelled()


async def test_loop_that_turns_its_cancellation_into_an_error_is_not_started_again() -> None:
    starts = 0

    async def loop() -> None:
        nonlocal starts
        starts += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise BrokerUnreachable("The connection was lost.", broker="here") from None

    beside = Supervisor({"loop": loop})
    beside.start()
    await asyncio.sleep(0)
    await beside.stop()

    assert starts == 1


async def _deaf(times: int) -> None:
    for _ in range(times):
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()
