"""Who waits for messages in PostgreSQL costs next to nothing while there are none, and looks at once when there is one."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import pytest

from flows.messaging.counting import CountingPool
from flows.messaging.house import HOME, House
from kassa.db.pool import connect
from kassa.ids import new_id
from kassa.messaging import lookout
from kassa.messaging.binder import Resources
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.binders.zeromq import make_binder
from kassa.messaging.lookout import FEW
from kassa.messaging.model import Ack, Confirmed, Delivery, Record, RetryAfter
from kassa.messaging.topology import Topic
from kassa.messaging.wake import POLL_S, Wakeups
from kassa.messaging.work import MessageWork
from kassa.supervisor import end_tasks

IDLE = 300
WATCHED_S = 5.0
WAIT_S = 20.0


@pytest.fixture
def no_question_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is said, or due, wakes anybody: without that the test waits in vain."""
    monkeypatch.setattr(lookout, "POLL_S", 3 * WAIT_S)


def topics(count: int) -> list[Topic]:
    return [Topic(f"letters-{number}", ("office",), "Letters, for the tests.") for number in range(count)]


def letter(id: str, key: str = "", delay_s: float = 0.0) -> Record:
    return Record(id, key, b"{}", {}, delay_s=delay_s, home=HOME)


class Office:
    """A binder of its own, as another process has it, and those who wait there; each says what came."""

    def __init__(self, house: House) -> None:
        self.pool = CountingPool(house.pool)
        self.wakeups = Wakeups(lambda: connect(house.url, application="test wake"))
        self.binder = PostgresBinder(cast(Any, self.pool), self.wakeups)
        self.came: asyncio.Queue[Delivery] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def wait_on(self, some: list[Topic]) -> None:
        """Consumers who are at rest when this returns."""
        await self.binder.provision(some)
        for topic in some:
            self._tasks.append(asyncio.create_task(self._consume(topic)))
        # Each has looked once, and been asked for once: what comes from here on is news.
        await asyncio.sleep(3 * POLL_S)

    async def hear(self) -> None:
        """What other processes say."""
        self._tasks.append(asyncio.create_task(self.wakeups.run()))
        await asyncio.sleep(POLL_S)

    async def first(self) -> Delivery:
        async with asyncio.timeout(WAIT_S):
            return await self.came.get()

    async def close(self) -> None:
        await end_tasks(*self._tasks)

    async def _consume(self, topic: Topic) -> None:
        subscription = await self.binder.subscribe(topic.name, "office")
        while True:
            for delivery in await subscription.receive(10, WAIT_S):
                self.came.put_nowait(delivery)
                await subscription.settle([(delivery, Ack())])


async def test_hundreds_of_idle_zeromq_subscriptions_ask_a_few_times_a_second(house: House) -> None:
    """Each by itself would ask eight times: 12,000 here. They also call again every two seconds meanwhile."""
    pool = CountingPool(house.pool)
    wakeups = Wakeups(lambda: connect(house.url, application="test wake"))
    async with make_binder("zeromq://127.0.0.1:0", Resources(cast(Any, pool), wakeups)) as binder:
        some = topics(IDLE)
        await binder.provision(some)
        subscriptions = [await binder.subscribe(topic.name, "office") for topic in some]
        waiting = [asyncio.create_task(one.receive(10, WAIT_S)) for one in subscriptions]
        # Until all have looked once, which is not what is counted.
        await asyncio.sleep(2.0)
        pool.statements.clear()

        await asyncio.sleep(WATCHED_S)

        assert len(pool.statements) < 10 * WATCHED_S
        receipts = await binder.send(some[7].name, [letter("one")], deadline_s=WAIT_S)
        assert receipts == [Confirmed()]
        assert [one.record.id for one in await waiting[7]] == ["one"]
        await end_tasks(*waiting)


@pytest.mark.usefixtures("no_question_for_all")
@pytest.mark.parametrize("count", [1, FEW, 3 * FEW])
async def test_message_of_this_process_wakes_who_waits_for_it_at_once(house: House, count: int) -> None:
    office = Office(house)
    await office.wait_on(topics(count))

    for number in range(5):
        await office.binder.send("letters-0", [letter(f"{number}")], deadline_s=WAIT_S)

        assert (await office.first()).record.id == f"{number}"
    await office.close()


@pytest.mark.usefixtures("no_question_for_all")
@pytest.mark.parametrize("count", [1, FEW, 3 * FEW])
async def test_message_of_another_process_wakes_who_waits_for_it_at_once(house: House, count: int) -> None:
    office, other = Office(house), Office(house)
    await office.wait_on(topics(count))
    await office.hear()
    await other.hear()

    for number in range(5):
        await other.binder.send("letters-0", [letter(f"{number}")], deadline_s=WAIT_S)

        assert (await office.first()).record.id == f"{number}"
    await office.close()
    await other.close()


@pytest.mark.usefixtures("no_question_for_all")
async def test_message_of_another_process_is_seen_however_much_is_asked_here(house: House) -> None:
    office, other = Office(house), Office(house)
    busy = topics(3 * FEW)[1:]
    await office.wait_on(topics(3 * FEW))
    await office.hear()
    await other.hear()

    async def load(topic: Topic) -> None:
        while True:
            await office.binder.send(topic.name, [letter(new_id())], deadline_s=WAIT_S)

    loading = [asyncio.create_task(load(topic)) for topic in busy[:8]]
    for number in range(5):
        await other.binder.send("letters-0", [letter(f"{number}")], deadline_s=WAIT_S)
        while (await office.first()).record.id != f"{number}":
            continue
    await end_tasks(*loading)
    await office.close()
    await other.close()


@pytest.mark.parametrize("count", [1, 3 * FEW])
async def test_message_that_nobody_speaks_of_is_seen_by_the_question_for_all(house: House, count: int) -> None:
    office, silent = Office(house), Office(house)
    await office.wait_on(topics(count))

    await silent.binder.send("letters-0", [letter("one")], deadline_s=WAIT_S)

    assert (await office.first()).record.id == "one"
    await office.close()


@pytest.mark.usefixtures("no_question_for_all")
@pytest.mark.parametrize("count", [1, 3 * FEW])
async def test_message_with_a_delay_comes_when_it_is_due(house: House, count: int) -> None:
    """And not with the next question for all."""
    office = Office(house)
    await office.wait_on(topics(count))

    for delay_s in (0.05, 0.6):
        await office.binder.send("letters-0", [letter(f"{delay_s}", delay_s=delay_s)], deadline_s=WAIT_S)
        sent_at = time.monotonic()
        await office.first()

        assert time.monotonic() - sent_at > delay_s - 0.05
    await office.close()


@pytest.mark.usefixtures("no_question_for_all")
@pytest.mark.parametrize("end", [Ack(), RetryAfter(0.0, "no", counts=True)])
async def test_settling_frees_a_key_for_who_waits_for_it(house: House, end: Ack | RetryAfter) -> None:
    office = Office(house)
    topic = topics(1)[0]
    await office.binder.provision([topic])
    holder = await office.binder.subscribe(topic.name, "office")
    await office.binder.send(topic.name, [letter("one", key="k")], deadline_s=WAIT_S)
    (held,) = await holder.receive(10, WAIT_S)
    await office.binder.send(topic.name, [letter("two", key="k")], deadline_s=WAIT_S)
    await office.wait_on([topic, *topics(3 * FEW)[1:]])
    assert office.came.empty()

    assert await holder.settle([(held, end)]) == [True]

    assert (await office.first()).record.id == ("two" if isinstance(end, Ack) else "one")
    await office.close()


@pytest.mark.usefixtures("no_question_for_all")
async def test_who_waits_for_a_paused_group_asks_no_more_than_others_and_goes_on_at_once(house: House) -> None:
    office = Office(house)
    topic = topics(1)[0]
    await office.binder.provision([topic])
    await office.binder.pause(topic.name, "office")
    await office.binder.send(topic.name, [letter("one")], deadline_s=WAIT_S)
    await office.wait_on([topic])
    office.pool.statements.clear()

    # What is counted is what one second costs.
    await asyncio.sleep(1.0)
    assert len(office.pool.statements) < 10
    await office.binder.resume(topic.name, "office")

    assert (await office.first()).record.id == "one"
    await office.close()


async def test_all_are_woken_when_the_question_fails(house: House) -> None:
    office, silent = Office(house), Office(house)
    await office.wait_on(topics(3))
    office.pool.refused = "queue, extract(epoch"

    await silent.binder.send("letters-1", [letter("one")], deadline_s=WAIT_S)

    assert (await office.first()).record.id == "one"
    await office.close()


async def test_a_question_without_an_answer_stops_nobody(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a connection that died without a word, which may be found out after many seconds, or never."""

    async def never(work: MessageWork, queues: Sequence[str]) -> dict[str, float]:
        try:
            await asyncio.Event().wait()
        finally:
            # As a driver does that waits for its connection to take the cancellation.
            await asyncio.shield(asyncio.sleep(2.0))
        return {}

    monkeypatch.setattr(MessageWork, "next_dues", never)
    office, silent = Office(house), Office(house)
    await office.wait_on(topics(3))

    for number in range(3):
        await silent.binder.send("letters-1", [letter(f"{number}")], deadline_s=WAIT_S)

        assert (await office.first()).record.id == f"{number}"
    await office.close()


@pytest.mark.usefixtures("no_question_for_all")
async def test_closing_wakes_who_waits(house: House) -> None:
    office = Office(house)
    topic = topics(1)[0]
    await office.binder.provision([topic])
    subscription = await office.binder.subscribe(topic.name, "office")
    waiting = [asyncio.create_task(subscription.receive(10, WAIT_S)) for _ in range(2)]
    await asyncio.sleep(POLL_S)

    await subscription.close(0.0)

    done, _ = await asyncio.wait(waiting, timeout=WAIT_S / 2)
    assert [task.result() for task in done] == [[], []]


async def test_many_consumers_of_one_queue_share_what_comes(house: House) -> None:
    office = Office(house)
    topic = topics(1)[0]
    await office.wait_on([topic] * 10)

    await office.binder.send(topic.name, [letter(f"{number}") for number in range(200)], deadline_s=WAIT_S)
    ids = {(await office.first()).record.id for _ in range(200)}

    assert len(ids) == 200
    await office.close()
