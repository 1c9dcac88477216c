"""What a handler takes longer for than a lease lasts stays its own, while it lives and up to a bound."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, cast

from conformance.messaging.house import tries_of, until
from flows.messaging.counting import CountingPool
from flows.messaging.house import HOME, House
from flows.messaging.test_leases import QUEUE, ids, sent
from kassa.messaging.binders.postgres import HELD_MAX_S, PostgresBinder, PostgresSubscription
from kassa.messaging.model import Ack, Confirmed, Delivery, Record
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import MessageWork

TOPIC = Topic("post", ("office",), "Letters, for the tests.")
LEASE_S = 2.0
"""Of which a busy machine is not late by two thirds."""
PATIENCE_S = 60.0


@asynccontextmanager
async def subscribed(
    house: House, pool: Any = None, *, lease_s: float = 60.0, held_max_s: float = HELD_MAX_S
) -> AsyncIterator[PostgresSubscription]:
    """A consumer as another process has it."""
    binder = PostgresBinder(pool or house.pool, Wakeups(house.pool.acquire), lease_s=lease_s, held_max_s=held_max_s)
    await binder.provision([TOPIC])
    subscription = await binder.subscribe(TOPIC.name, "office")
    try:
        yield subscription
    finally:
        await subscription.close(0.0)
        await binder.close()


async def post(house: House, *keys: str) -> None:
    binder = PostgresBinder(house.pool, Wakeups(house.pool.acquire))
    await binder.provision([TOPIC])
    letters = [Record(f"{number}", key, b"{}", {}, home=HOME) for number, key in enumerate(keys)]
    assert await binder.send(TOPIC.name, letters, deadline_s=10.0) == [Confirmed()] * len(keys)


async def next_of(subscription: PostgresSubscription) -> Delivery:
    """The next one, which is the only one."""
    async with asyncio.timeout(PATIENCE_S):
        while not (found := await subscription.receive(10, 1.0)):
            pass
    (delivery,) = found
    return delivery


async def lapses(house: House) -> list[int]:
    return [row["lapses"] for row in await house.pool.fetch("SELECT lapses FROM message ORDER BY position")]


async def test_a_message_is_tried_by_one_at_a_time_however_long_that_takes(house: House) -> None:
    """And its tries are counted, not the time."""
    await post(house, "k")
    async with subscribed(house, lease_s=LEASE_S) as one, subscribed(house, lease_s=LEASE_S) as two:
        assert await tries_of((one, two), 2.5 * LEASE_S, partial(lapses, house)) == [0, 1]

    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0


async def test_what_is_not_reached_yet_stays_in_hand_with_what_is_handled(house: House) -> None:
    """A key's messages are handled one after the other, and settled one by one."""
    await post(house, "k", "k", "k", "k")
    async with subscribed(house, lease_s=LEASE_S) as one, subscribed(house, lease_s=LEASE_S) as two:
        letters = await one.receive(10, 1.0)
        for letter in letters:
            assert await two.receive(10, 0.75 * LEASE_S) == []
            assert await one.settle([(letter, Ack())]) == [True]

    assert [letter.record.id for letter in letters] == ["0", "1", "2", "3"]
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0


HOLDER = f"""
import asyncio, sys
from kassa.db.pool import connect, open_pool
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.wake import Wakeups

async def hold(url):
    pool = await open_pool(url, application="holder")
    binder = PostgresBinder(pool, Wakeups(lambda: connect(url, application="holder wake")), lease_s={LEASE_S})
    subscription = await binder.subscribe("post", "office")
    print(len(await subscription.receive(10, {PATIENCE_S})), flush=True)
    await asyncio.Event().wait()

asyncio.run(hold(sys.argv[1]))
"""


async def test_who_is_killed_loses_what_he_has_when_its_lease_is_over(house: House) -> None:
    await post(house, "k")
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, house.url, stdout=asyncio.subprocess.PIPE
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"1\n"
        async with subscribed(house) as other:
            assert await other.receive(10, 2.5 * LEASE_S) == []

            holder.kill()

            async with asyncio.timeout(10 * LEASE_S):
                delivery = await next_of(other)
            assert delivery.attempts == 0
            assert await lapses(house) == [1]
    finally:
        with suppress(ProcessLookupError):
            holder.kill()
        await holder.wait()


async def test_a_handler_that_hangs_for_ever_keeps_its_message_up_to_a_bound(house: House) -> None:
    await post(house, "k")
    async with subscribed(house, lease_s=LEASE_S, held_max_s=2 * LEASE_S) as hung, subscribed(house) as other:
        await next_of(hung)
        clock = asyncio.get_running_loop().time
        began = clock()

        async with asyncio.timeout(10 * LEASE_S):
            delivery = await next_of(other)

        assert clock() - began > 2 * LEASE_S
        assert await lapses(house) == [1]
        assert await other.settle([(delivery, Ack())]) == [True]


async def test_handlers_that_are_quick_extend_nothing(house: House) -> None:
    """And who has nothing in hand does not even look."""
    pool = CountingPool(house.pool)
    async with subscribed(house, cast(Any, pool), lease_s=LEASE_S) as subscription:
        clock = asyncio.get_running_loop().time
        began, handled = clock(), 0
        while clock() - began < 1.5 * LEASE_S:
            await post(house, "k")
            handled += await subscription.settle([(await next_of(subscription), Ack())]) == [True]
        await asyncio.sleep(LEASE_S)

        assert handled > 1
        assert not [one for one in pool.statements if "FOR NO KEY UPDATE" in one]
        assert subscription._keeping is None


async def until_of(house: House, lease: int) -> Any:
    return await house.pool.fetchval("SELECT leased_until FROM message_lease WHERE id = $1", lease)


async def test_a_lease_begins_anew_once_a_third_of_it_is_over(house: House) -> None:
    work = MessageWork(house.pool, lease_s=60.0)
    await sent(house.pool, "a")
    (claimed,) = await work.claim(QUEUE, 1)
    before = await until_of(house, claimed.lease)

    await work.extend({claimed.lease}, 60.0)
    assert await until_of(house, claimed.lease) == before
    work.lease_s = 0.0
    await work.extend({claimed.lease}, 60.0)

    assert await until_of(house, claimed.lease) > before


async def test_a_lease_that_is_over_or_another_ones_is_not_extended(house: House) -> None:
    late, other = MessageWork(house.pool, lease_s=0.01), MessageWork(house.pool)
    await sent(house.pool, "a", "b")
    (mine,), (theirs,) = await late.claim(QUEUE, 1), await other.claim(QUEUE, 1)
    before = [await until_of(house, one.lease) for one in (mine, theirs)]
    await asyncio.sleep(0.05)

    await late.extend({mine.lease, theirs.lease}, 60.0)

    assert [await until_of(house, one.lease) for one in (mine, theirs)] == before
    assert ids(await other.claim(QUEUE, 1)) == [mine.id]


async def test_extending_waits_for_nobody_who_settles(house: House) -> None:
    """Two who each hold a row that the other one waits for would wait until the database ends one of them."""
    work = MessageWork(house.pool, lease_s=60.0)
    await sent(house.pool, "a", "b")
    one, two = (*await work.claim(QUEUE, 1), *await work.claim(QUEUE, 1))
    before = [await until_of(house, each.lease) for each in (one, two)]
    work.lease_s = 0.0
    async with house.pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM message_lease WHERE id = $1 FOR SHARE", one.lease)
        async with asyncio.timeout(PATIENCE_S):
            await work.extend({one.lease, two.lease}, 60.0)

    after = [await until_of(house, each.lease) for each in (one, two)]
    assert after[0] == before[0] and after[1] > before[1]


async def is_claiming(subscription: PostgresSubscription) -> bool:
    return bool(subscription._claims)


async def test_who_was_cancelled_while_he_closed_keeps_nothing_any_more(house: House) -> None:
    """Also if a claim was under way, for which closing waits first."""
    await post(house, "k")
    async with subscribed(house, lease_s=LEASE_S) as subscription:
        await next_of(subscription)
        async with house.pool.acquire() as connection, connection.transaction():
            await connection.execute("LOCK TABLE message IN ACCESS EXCLUSIVE MODE")
            receiving = asyncio.create_task(subscription.receive(10, 0.0))
            await until(partial(is_claiming, subscription))
            closing = asyncio.create_task(subscription.close(PATIENCE_S))
            # Until it waits.
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            await asyncio.sleep(0)
            assert subscription._keeping is None
        assert await receiving == []
