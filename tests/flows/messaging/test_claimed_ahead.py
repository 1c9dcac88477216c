"""A consumer that keeps up has its next batch claimed while it handles the last one. Nobody else loses by that."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from flows.messaging.counting import CountingPool
from flows.messaging.house import HOME, House
from flows.service.conftest import until
from kassa.messaging.binders.postgres import AHEAD_MIN, AHEAD_S, PostgresBinder, PostgresSubscription
from kassa.messaging.model import Ack, Confirmed, Delivery, Record, RetryAfter
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import LAPSES_ALONE, WINDOWS_MAX, ClaimedMessage, MessageWork

TOPIC = Topic("post", ("office",), "Letters, for the tests.")
QUEUE = "post:office"
BATCH = 2 * AHEAD_MIN
WAIT_S = 5.0


class Office:
    """One consumer, and what it asks the database."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.pool = CountingPool(house.pool)
        self.binder = PostgresBinder(cast(Any, self.pool), Wakeups(house.pool.acquire))
        self.subscription: PostgresSubscription

    @property
    def claims(self) -> int:
        """How often it claimed, since it was last set to nothing."""
        return sum("claim_messages(" in statement for statement in self.pool.statements)

    async def send(self, count: int, *, keys: int | None = None) -> None:
        letters = [Record(f"{n:06d}", f"key-{n % (keys or count)}", b"{}", {}, home=HOME) for n in range(count)]
        assert await self.binder.send(TOPIC.name, letters, deadline_s=10.0) == [Confirmed()] * count

    async def receive(self, limit: int = BATCH, wait_s: float = WAIT_S) -> list[Delivery]:
        return await self.subscription.receive(limit, wait_s)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        assert all(await self.subscription.settle([(one, Ack()) for one in deliveries]))

    async def begin(self) -> list[Delivery]:
        """Two batches in hand: with the second one the consumer has shown that it is quick."""
        first, second = await self.receive(), await self.receive()
        assert len(first) == len(second) == BATCH
        return first + second

    async def in_hand(self) -> int:
        """How many messages are leased to anybody."""
        found: int = await self.house.pool.fetchval(
            "SELECT COALESCE(sum(cardinality(messages)), 0) FROM message_lease WHERE topic = $1", QUEUE
        )
        return found

    async def until_in_hand(self, count: int) -> None:
        async def is_so() -> bool:
            return await self.in_hand() == count

        await until(is_so)


@pytest.fixture
async def office(house: House) -> AsyncIterator[Office]:
    office = Office(house)
    await office.binder.provision([TOPIC])
    office.subscription = await office.binder.subscribe(TOPIC.name, "office")
    yield office
    await office.subscription.close(0.0)
    await office.binder.close()


def numbers(deliveries: Sequence[Delivery]) -> list[int]:
    return [int(one.record.id) for one in deliveries]


async def test_next_batch_is_claimed_while_the_last_one_is_handled(office: Office) -> None:
    await office.send(4 * BATCH)
    handled = await office.begin()
    await office.until_in_hand(3 * BATCH)
    office.pool.statements.clear()

    third = await office.receive()

    assert numbers(third) == list(range(2 * BATCH, 3 * BATCH))
    await office.settle(handled + third)
    await office.until_in_hand(BATCH)
    assert office.claims == 1, "of the fourth batch, which nobody has asked for yet"
    await office.settle(await office.receive())
    assert await office.house.pool.fetchval("SELECT count(*) FROM message") == 0


async def test_a_slow_handler_keeps_nothing_from_others(office: Office) -> None:
    """What was ahead comes to them as if it had never been claimed, and nothing is claimed ahead again until he is quick."""
    await office.send(4 * BATCH)
    handled = await office.begin()
    await office.until_in_hand(3 * BATCH)

    await office.until_in_hand(2 * BATCH)

    others = MessageWork(office.house.pool)
    claimed = await others.claim(QUEUE, BATCH)
    assert [int(message.headers["kassa-record"]) for message in claimed] == list(range(2 * BATCH, 3 * BATCH))
    assert {(message.attempts, message.lapses) for message in claimed} == {(0, 0)}
    assert not await office.house.pool.fetchval("SELECT bool_or(returned) FROM message")
    await office.settle(handled)
    fourth = await office.receive()
    assert numbers(fourth) == list(range(3 * BATCH, 4 * BATCH))
    assert await office.in_hand() == 2 * BATCH
    await others.acknowledge(claimed)
    await office.settle(fourth)


async def test_what_is_ahead_is_free_at_once_when_the_consumer_closes(office: Office) -> None:
    await office.send(3 * BATCH)
    await office.settle(await office.begin())
    await office.until_in_hand(BATCH)

    await office.subscription.close(0.0)

    assert await office.in_hand() == 0
    assert len(await MessageWork(office.house.pool).claim(QUEUE, BATCH)) == BATCH


async def test_a_pause_holds_for_what_was_ahead(office: Office) -> None:
    await office.send(3 * BATCH)
    await office.settle(await office.begin())
    await office.until_in_hand(BATCH)

    await office.binder.pause(TOPIC.name, "office")
    await asyncio.sleep(AHEAD_S)

    assert await office.receive(wait_s=0.2) == []
    assert await office.in_hand() == 0
    await office.binder.resume(TOPIC.name, "office")
    assert len(await office.receive()) == BATCH


async def test_who_asks_for_less_gets_the_first_and_the_rest_is_free(office: Office) -> None:
    await office.send(3 * BATCH)
    handled = await office.begin()
    await office.until_in_hand(3 * BATCH)

    few = await office.receive(10)

    assert numbers(few) == list(range(2 * BATCH, 2 * BATCH + 10))
    await office.until_in_hand(2 * BATCH + 10)
    await office.settle(handled + few)
    assert numbers(await office.receive()) == list(range(2 * BATCH + 10, 3 * BATCH))


async def test_who_is_cancelled_leaves_what_is_ahead_to_anybody(office: Office) -> None:
    await office.send(3 * BATCH)
    await office.begin()

    asked = asyncio.create_task(office.receive())
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait([asked])

    await office.until_in_hand(2 * BATCH)
    assert numbers(await office.receive()) == list(range(2 * BATCH, 3 * BATCH))


async def test_who_is_cancelled_when_the_next_claim_was_just_begun_leaves_both_batches_to_anybody(
    office: Office,
) -> None:
    await office.send(4 * BATCH)
    handled = await office.receive()
    receiving = asyncio.create_task(office.receive())
    for _ in range(1_000_000):
        if office.subscription._ahead is not None:
            break
        await asyncio.sleep(0)
    assert not receiving.done()

    receiving.cancel()

    with pytest.raises(asyncio.CancelledError):
        await receiving
    await office.until_in_hand(BATCH)
    assert numbers(await office.receive()) == list(range(BATCH, 2 * BATCH))
    await office.settle(handled)


async def test_who_waits_for_a_claim_that_is_slow_gets_it(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overloaded database is not asked twice."""
    await office.send(3 * BATCH)
    claim = MessageWork.claim

    async def late(work: MessageWork, topic: str, limit: int, *, windows: int = WINDOWS_MAX) -> list[ClaimedMessage]:
        claimed = await claim(work, topic, limit, windows=windows)
        # Longer than what is ahead may wait: it would have gone back by then.
        await asyncio.sleep(2 * AHEAD_S)
        return claimed

    first = await office.receive()
    monkeypatch.setattr(MessageWork, "claim", late)
    second = await office.receive()
    office.pool.statements.clear()
    third = await office.receive()

    assert numbers(third) == list(range(2 * BATCH, 3 * BATCH))
    assert office.claims <= 2, "of this one and of the next"
    await office.settle(first + second + third)


async def test_few_more_keys_than_a_batch_has_make_no_tiny_batches(office: Office) -> None:
    """What can be ahead is the few keys that are not in hand: it comes, and is not tried again for a while."""
    await office.send(20 * BATCH, keys=BATCH + 5)
    sizes: list[int] = []
    while sum(sizes) < 20 * BATCH:
        deliveries = await office.receive()
        sizes.append(len(deliveries))
        await asyncio.sleep(0.005)
        await office.settle(deliveries)

    assert len(sizes) <= 20 + 6, "after 1, 3, 7 and 15 batches"


async def test_a_claim_ahead_that_fails_is_told_once(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    await office.send(3 * BATCH)
    await office.settle(await office.receive())

    async def fail(work: MessageWork, topic: str, limit: int, *, windows: int) -> list[ClaimedMessage]:
        raise ZeroDivisionError

    second = await office.receive()
    await office.until_in_hand(2 * BATCH)
    with monkeypatch.context() as broken:
        # A third batch is ahead; the fourth one is what fails.
        broken.setattr(MessageWork, "claim", fail)
        third = await office.receive()
        with pytest.raises(ZeroDivisionError):
            await office.receive()
    await office.settle(second + third)
    assert await office.receive(wait_s=0.1) == []


async def test_a_key_in_hand_is_not_claimed_ahead_and_the_look_for_it_is_not_repeated(office: Office) -> None:
    """Of few keys nothing can be ahead: then a queue is not looked through in vain for each batch."""
    await office.send(20 * BATCH, keys=BATCH // 2)
    office.pool.statements.clear()
    found: list[int] = []
    for _ in range(20):
        deliveries = await office.receive()
        assert len(deliveries) == BATCH
        found += numbers(deliveries)
        await office.settle(deliveries)

    assert sorted(found) == list(range(20 * BATCH))
    for key in range(BATCH // 2):
        of_key = [number for number in found if number % (BATCH // 2) == key]
        assert of_key == sorted(of_key)
    assert office.claims <= 30, "after 1, 3 and 7 batches, or more often where a batch was settled before the look came"


async def test_keys_stay_in_order_when_some_fail(office: Office) -> None:
    """Each batch has every other key of the one before it, and each third letter fails once."""
    keys, count = 3 * BATCH // 2, 12 * BATCH
    await office.send(count, keys=keys)
    done: dict[str, list[int]] = {}
    failed: set[int] = set()
    async with asyncio.timeout(60.0):
        while sum(map(len, done.values())) < count:
            deliveries = await office.receive()
            ends: list[tuple[Delivery, Ack | RetryAfter]] = []
            stopped: set[str] = set()
            for one in deliveries:
                number, key = int(one.record.id), one.record.key
                if key in stopped:
                    ends.append((one, RetryAfter(0.01, None, counts=False)))
                elif number % 3 == 0 and number not in failed:
                    failed.add(number)
                    stopped.add(key)
                    ends.append((one, RetryAfter(0.01, "not now")))
                else:
                    done.setdefault(key, []).append(number)
                    ends.append((one, Ack()))
            assert all(await office.subscription.settle(ends))

    assert len(failed) == count // 3
    assert all(numbers == sorted(numbers) for numbers in done.values())
    assert len(set().union(*done.values())) == count


async def test_what_may_end_its_consumer_is_not_ahead_of_anything(office: Office) -> None:
    """Who ends with it in hand had nothing else in hand that would count against."""
    await office.send(3 * BATCH)
    await office.house.pool.execute(
        "UPDATE message SET lapses = $1 WHERE headers LIKE $2", LAPSES_ALONE, f'%"{2 * BATCH:06d}"%'
    )
    handled = await office.begin()
    await office.settle(handled)
    await asyncio.sleep(AHEAD_S / 4)
    assert await office.in_hand() == 0

    (alone,) = await office.receive()

    assert alone.alone and numbers([alone]) == [2 * BATCH]
    assert await office.in_hand() == 1
