"""Timers that are due, by the database's clock."""

import asyncio
from datetime import timedelta

from flows.messaging.house import HOME, House
from kassa.clock import SystemClock
from kassa.ids import Id, new_id
from kassa.journal.change import Change, Committed, Consumed, Timer
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import FiredTimer, TimerWork
from kassa.workers.timers import NotYet, TimerLoop


async def set_timer(house: House, kind: str, seconds: float = -0.01, entity: Id | None = None) -> Id:
    """A timer that is due in so many seconds."""
    entity = entity or new_id()
    due = SystemClock().now() + timedelta(seconds=seconds)
    assert isinstance(await house.one.commit(Change(home=HOME, timers=(Timer(entity, kind, due),))), Committed)
    return entity


async def test_due_timers_come_oldest_first_and_to_one_claimer(house: House) -> None:
    work = TimerWork(house.pool)
    second = await set_timer(house, "a", -1)
    first = await set_timer(house, "b", -2)
    await set_timer(house, "a", 60)
    await set_timer(house, "other", -3)

    claims = await asyncio.gather(*(work.claim_timers(["a", "b"], 10) for _ in range(4)))

    fired = sorted((one for claim in claims for one in claim), key=lambda one: one.due)
    assert [one.entity for one in fired] == [first, second]
    assert (fired[0].home, fired[0].root, fired[0].tries) == (HOME, first, 0)
    assert await work.claim_timers(["a", "b"], 10) == []


async def test_timer_is_acted_on_once(house: House) -> None:
    work = TimerWork(house.pool, lease_s=0.05)
    await set_timer(house, "a")
    (one,) = await work.claim_timers(["a"], 10)
    await asyncio.sleep(0.1)
    (two,) = await work.claim_timers(["a"], 10)

    verdicts = [await house.one.commit(Change(home=HOME, done=(one.done,))) for one in (one, two)]

    assert isinstance(verdicts[0], Committed)
    assert isinstance(verdicts[1], Consumed)


async def test_timer_that_was_set_again_refuses_whoever_acts_on_the_old_one(house: House) -> None:
    work = TimerWork(house.pool)
    entity = await set_timer(house, "a")
    (old,) = await work.claim_timers(["a"], 10)
    await set_timer(house, "a", entity=entity)

    assert not await work.is_current(old)
    assert isinstance(await house.two.commit(Change(home=HOME, done=(old.done,))), Consumed)
    await work.retry_timer(old, 60.0, "late")
    (new,) = await work.claim_timers(["a"], 10)
    assert await work.is_current(new)


async def test_timer_that_fails_is_tried_again_and_listed_as_stuck_but_never_dies(house: House) -> None:
    work = TimerWork(house.pool)
    entity = await set_timer(house, "a")
    for tries in range(30):
        await house.pool.execute("UPDATE timer SET due = clock_timestamp()")
        (fired,) = await work.claim_timers(["a"], 10)
        assert fired.tries == tries
        await work.retry_timer(fired, error="broken\0")

    (stuck,) = await work.stuck_timers()
    assert (stuck.timer.entity, stuck.timer.tries, stuck.last_error) == (entity, 30, "broken")
    due_s = await work.next_due(["a"])
    assert due_s is not None and 2800 < due_s < 4400


async def test_loop_acts_at_the_due_time_puts_off_and_goes_on_after_a_crash(house: House) -> None:
    wakeups = Wakeups(asyncio.sleep)  # type: ignore[arg-type]
    wakeups.follow(house.one)
    acted: list[tuple[str, float]] = []
    seen: dict[Id, int] = {}

    async def act(fired: FiredTimer) -> None:
        seen[fired.entity] = seen.get(fired.entity, 0) + 1
        if seen[fired.entity] == 1 and fired.kind == "not_yet":
            raise NotYet(0.2)
        if seen[fired.entity] == 1 and fired.kind == "crash":
            raise ZeroDivisionError
        await house.one.commit(Change(home=HOME, done=(fired.done,)))
        acted.append((fired.kind, asyncio.get_running_loop().time() - began))

    work = TimerWork(house.pool)
    loop = asyncio.create_task(TimerLoop(work, wakeups, {"plain": act, "not_yet": act, "crash": act}).run())
    await asyncio.sleep(0.1)
    began = asyncio.get_running_loop().time()
    await set_timer(house, "plain", 0.3)
    await set_timer(house, "not_yet")
    await set_timer(house, "crash")
    async with asyncio.timeout(120):
        while len(acted) < 3:
            await asyncio.sleep(0.1)
            # What crashed waits some seconds; the test does not.
            await house.pool.execute("UPDATE timer SET due = clock_timestamp() WHERE tries > 0")
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)

    at = dict(acted)
    assert at["not_yet"] > 0.15
    assert at["plain"] >= 0.3
    assert "crash" in at
    assert await house.pool.fetchval("SELECT count(*) FROM timer") == 0


async def test_postponed_timers_come_again_later_and_count_no_try(house: House) -> None:
    work = TimerWork(house.pool)
    entities = {await set_timer(house, "a") for _ in range(3)}
    replaced = await set_timer(house, "a")
    fired = await work.claim_timers(["a"], 10)
    await set_timer(house, "a", 86_400, replaced)

    await work.postpone_timers(fired, 600.0)
    due_s = await work.next_due(["a"])
    await house.pool.execute("UPDATE timer SET due = due - interval '1200 seconds'")

    assert due_s is not None and 0 < due_s <= 1200
    again = await work.claim_timers(["a"], 10)
    assert {one.entity for one in again} == entities
    assert {one.tries for one in again} == {0}


async def test_a_hurried_timer_is_due_now_unless_somebody_holds_it(house: House) -> None:
    work = TimerWork(house.pool)
    waiting, held = await set_timer(house, "a", 3600), await set_timer(house, "a")
    (fired,) = await work.claim_timers(["a"], 10)

    await work.hurry_timer("a", waiting)
    await work.hurry_timer("a", held)

    assert fired.entity == held
    assert [one.entity for one in await work.claim_timers(["a"], 10)] == [waiting]
