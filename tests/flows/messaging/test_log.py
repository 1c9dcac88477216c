"""Groups that read the event log: nothing lost, each root in its order, failures parked."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import pytest

from flows.messaging.house import HOME, House
from kassa.db.pool import connect
from kassa.ids import Id
from kassa.messaging.brokers import Brokers
from kassa.messaging.log import EARLIEST, EventLog, GroupReader, Halt, LogGroup, LostGroup, Unread, event_item
from kassa.messaging.model import LogRecord, Place
from kassa.messaging.queues import HOLDER, Queues
from kassa.messaging.topology import PAYMENT_ORDERS
from kassa.messaging.wake import EVENTS, Wakeups


class Seen:
    """A handler that remembers, and fails as told."""

    def __init__(self) -> None:
        self.records: list[LogRecord] = []
        self.fails: dict[tuple[Id, int], int] = {}
        self.is_away = False
        self.most = 10_000
        """More at once takes too long."""

    async def handle(self, records: Sequence[LogRecord]) -> list[str | None]:
        """The log's Handler."""
        if self.is_away:
            raise Halt("away")
        if len(records) > self.most:
            raise Halt("not in time")
        answers: list[str | None] = []
        for record in records:
            left = self.fails.get((record.root, record.sequence), 0)
            self.fails[record.root, record.sequence] = left - 1
            if left > 0:
                answers.append("no")
            else:
                self.records.append(record)
                answers.append(None)
        return answers

    def order(self) -> dict[Id, list[int]]:
        """The sequences of each root, in the order in which they were handled."""
        found: dict[Id, list[int]] = defaultdict(list)
        for record in self.records:
            found[record.root].append(record.sequence)
        return dict(found)


async def reader(house: House, seen: Seen, page: int = 500, *, from_now: bool = False) -> GroupReader:
    """A reader that holds its group."""
    group = LogGroup(house.pool, "test")
    await group.create(from_now=from_now)
    assert await group.hold()
    return GroupReader(group, seen.handle, asyncio.sleep, page=page)


async def read_all(reader: GroupReader) -> None:
    """Reads until there is nothing more."""
    while await reader.step():
        pass


@pytest.mark.parametrize("page", [1, 3, 500])
async def test_roots_keep_their_order_across_two_writers(house: House, page: int) -> None:
    random.seed(page)
    roots = [await house.root(random.choice([house.one, house.two])) for _ in range(5)]
    for _ in range(60):
        await house.happen(random.choice([house.one, house.two]), random.choice(roots))
    seen = Seen()

    await read_all(await reader(house, seen, page))

    assert len(seen.records) == 65
    for root, sequences in seen.order().items():
        assert root in roots
        assert sequences == list(range(1, len(sequences) + 1))


async def test_nothing_is_lost_while_two_writers_write(house: House) -> None:
    roots = [await house.root() for _ in range(8)]
    seen = Seen()
    log = await reader(house, seen, page=7)

    async def write(journal_number: int) -> None:
        for number in range(100):
            await house.happen((house.one, house.two)[journal_number], roots[number % 8])

    writing = [asyncio.create_task(write(0)), asyncio.create_task(write(1))]
    while not all(task.done() for task in writing):
        await log.step()
    await read_all(log)

    assert len(seen.records) == 208
    assert all(sequences == list(range(1, len(sequences) + 1)) for sequences in seen.order().values())


async def test_group_goes_on_where_it_stopped(house: House) -> None:
    seen = Seen()
    root = await house.root()
    await read_all(await reader(house, seen))
    await house.happen(house.two, root)

    group = LogGroup(house.pool, "test")
    await house.pool.execute("UPDATE log_group SET held_until = NULL")
    assert await group.hold()
    await read_all(GroupReader(group, seen.handle, asyncio.sleep))

    assert seen.order() == {root: [1, 2]}


async def test_group_may_begin_now(house: House) -> None:
    root = await house.root()
    await house.happen(house.two, root)
    seen = Seen()
    log = await reader(house, seen, from_now=True)
    await house.happen(house.two, root)

    await read_all(log)

    assert seen.order() == {root: [3]}


async def test_group_reads_again_what_was_committed_since_a_time_and_nothing_older(house: House) -> None:
    root = await house.root(house.one)
    since = await house.pool.fetchval("SELECT clock_timestamp()")
    for journal in (house.two, house.one, house.two):
        await house.happen(journal, root)
    seen = Seen()
    log = await reader(house, seen)
    await read_all(log)
    seen.records.clear()

    again = await LogGroup(house.pool, "test").rewind(since)
    with pytest.raises(LostGroup):
        # What it has in its hands when the group goes back is not counted as read.
        await read_all(log)
    await house.pool.execute("UPDATE log_group SET held_until = NULL")
    group = LogGroup(house.pool, "test")
    assert await group.hold()
    seen.records.clear()
    await read_all(GroupReader(group, seen.handle, asyncio.sleep))

    assert again == 3
    assert seen.order() == {root: [2, 3, 4]}
    assert await LogGroup(house.pool, "test").rewind(since + timedelta(hours=1)) == 0


async def test_group_that_is_paused_goes_back_and_stays_paused(house: House) -> None:
    await house.root()
    await read_all(await reader(house, Seen()))
    await house.pool.execute("UPDATE log_group SET holder = $1, held_until = 'infinity'", HOLDER)

    assert await LogGroup(house.pool, "test").rewind(EARLIEST) == 1
    assert not await LogGroup(house.pool, "test").hold()


@pytest.mark.parametrize("is_concerned", [False, True])
async def test_what_concerns_nobody_is_passed_over_unread(house: House, is_concerned: bool) -> None:
    root = await house.root()
    for journal in (house.one, house.two, house.one):
        await house.happen(journal, root)
    seen, asked = Seen(), []
    group = LogGroup(house.pool, "test")
    await group.create(from_now=False)
    assert await group.hold()

    async def concerns(homes: Sequence[int]) -> bool:
        asked.append(list(homes))
        return is_concerned

    await read_all(GroupReader(group, seen.handle, asyncio.sleep, page=3, concern=concerns))

    assert {tuple(homes) for homes in asked} == {(HOME,)}
    assert seen.order() == ({root: [1, 2, 3, 4]} if is_concerned else {})
    assert all(lag.behind == 0 for lag in await group.lag())


async def let_go(house: House) -> None:
    """As if the time had passed for which the group is held."""
    await house.pool.execute("UPDATE log_group SET held_until = clock_timestamp()")


async def test_one_process_at_a_time_reads_and_the_other_cannot_move_the_cursor(house: House) -> None:
    await house.root()
    first, second = LogGroup(house.pool, "test"), LogGroup(house.pool, "test")
    await first.create(from_now=False)

    assert await first.hold()
    assert not await second.hold()
    unread = await first.read()
    await let_go(house)
    assert await second.hold()
    with pytest.raises(LostGroup):
        await first.advance(unread, [], [])


@pytest.mark.parametrize(("events", "wave_s"), [(20, 0.15), (1, 3.0)], ids=["many waves", "a long wave"])
async def test_page_that_takes_longer_than_a_hold_is_read_by_one_of_two(
    house: House, events: int, wave_s: float
) -> None:
    """Else they take the group from each other for ever, and send the same."""
    root = await house.root()
    for _ in range(events - 1):
        await house.happen(house.one, root)
    sent: list[int] = []

    async def handle(records: Sequence[LogRecord]) -> list[str | None]:
        await asyncio.sleep(wave_s)
        sent.extend(record.sequence for record in records)
        return [None] * len(records)

    groups = [LogGroup(house.pool, "test", hold_s=1.5) for _ in range(2)]
    await groups[0].create(from_now=False)
    running = [asyncio.create_task(GroupReader(group, handle, asyncio.sleep).run()) for group in groups]
    async with asyncio.timeout(120):
        while any(lag.behind for lag in await groups[0].lag()) and len(sent) < 5 * events:  # noqa: ASYNC110 - a cursor tells nobody
            await asyncio.sleep(0.05)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)

    # A machine that stands still for a second may cost a few, not all of them again and again.
    assert sorted(set(sent)) == list(range(1, events + 1))
    assert len(sent) < 3 * events
    assert all(lag.behind == 0 for lag in await groups[0].lag())


@pytest.mark.parametrize("page", [1, 2, 3, 500])
async def test_failed_record_parks_its_root_only_and_is_retried_in_order(house: House, page: int) -> None:
    """With small pages the failure is in the middle of pages that overlap."""
    bad, good = await house.root(), await house.root()
    for _ in range(3):
        await house.happen(house.one, bad)
        await house.happen(house.two, good)
    seen = Seen()
    seen.fails[bad, 2] = 4
    log = await reader(house, seen, page)

    await read_all(log)
    assert seen.order() == {bad: [1], good: [1, 2, 3, 4]}
    parked = await LogGroup(house.pool, "test").parked()
    assert [(one.sequence, one.state) for one in parked] == [(2, "retry"), (3, "waiting"), (4, "waiting")]
    await house.happen(house.two, bad)
    await read_all(log)
    await house.pool.execute("UPDATE parked SET due = clock_timestamp()")
    await read_all(log)

    assert seen.order() == {bad: [1, 2, 3, 4, 5], good: [1, 2, 3, 4]}
    assert await LogGroup(house.pool, "test").parked() == []


async def test_record_that_is_given_up_lets_its_root_go_on_and_can_be_replayed(house: House) -> None:
    root = await house.root()
    await house.happen(house.one, root)
    seen = Seen()
    seen.fails[root, 1] = 8
    log = await reader(house, seen)

    for _ in range(9):
        await read_all(log)
        await house.pool.execute("UPDATE parked SET due = clock_timestamp()")
    assert seen.order() == {root: [2]}
    group = LogGroup(house.pool, "test")
    (dead,) = await group.parked("dead")
    assert (dead.sequence, dead.attempts, dead.first_reason) == (1, 8, "no")
    assert await group.replay_dead() == 1
    await read_all(log)

    assert seen.order() == {root: [2, 1]}
    assert await group.parked() == []


async def all_due(house: House, log: GroupReader) -> None:
    """Reads until nothing is parked any more that can be tried, or nothing comes of it."""
    for _ in range(20):
        await house.pool.execute("UPDATE parked SET due = clock_timestamp()")
        await read_all(log)
        if not await house.pool.fetchval("SELECT count(*) FROM parked WHERE state <> 'dead'"):
            return


async def due_in(house: House, sequence: int, days: int) -> None:
    """When a parked record may be tried."""
    await house.pool.execute(
        "UPDATE parked SET due = clock_timestamp() + make_interval(days => $2) WHERE sequence = $1", sequence, days
    )


async def parked_states(house: House) -> list[tuple[int, str]]:
    """What is parked, by its sequence."""
    return sorted((one.sequence, one.state) for one in await LogGroup(house.pool, "test").parked())


async def rewound(house: House, seen: Seen) -> GroupReader:
    """A reader of a group that an operator let begin again."""
    group = LogGroup(house.pool, "test")
    await group.rewind(EARLIEST)
    await let_go(house)
    assert await group.hold()
    return GroupReader(group, seen.handle, asyncio.sleep)


async def test_group_that_goes_back_before_a_parked_record_leaves_nothing_behind(house: House) -> None:
    root = await house.root()
    for _ in range(5):
        await house.happen(house.one, root)
    seen = Seen()
    seen.fails[root, 5] = 4
    await read_all(await reader(house, seen))
    assert seen.order() == {root: [1, 2, 3, 4]}
    await due_in(house, 5, days=1)
    seen.records.clear()

    log = await rewound(house, seen)
    await read_all(log)
    await house.happen(house.two, root)
    await all_due(house, log)

    assert await parked_states(house) == []
    assert seen.order() == {root: [1, 2, 3, 4, 5, 6, 7]}


async def test_record_that_was_given_up_is_tried_again_when_its_group_goes_back(house: House) -> None:
    root = await house.root()
    for _ in range(2):
        await house.happen(house.one, root)
    seen = Seen()
    seen.fails[root, 2] = 8
    await all_due(house, await reader(house, seen))
    assert seen.order() == {root: [1, 3]}
    seen.records.clear()
    seen.fails[root, 2] = 6

    log = await rewound(house, seen)
    await read_all(log)
    assert await parked_states(house) == [(2, "retry"), (3, "waiting")]
    await all_due(house, log)

    assert seen.order() == {root: [1, 2, 3]}
    assert await parked_states(house) == []


async def test_replayed_record_goes_before_those_of_its_root_that_failed_after_it(house: House) -> None:
    root = await house.root()
    for _ in range(3):
        await house.happen(house.one, root)
    seen = Seen()
    seen.fails = {(root, 2): 8, (root, 3): 6}
    log = await reader(house, seen)
    group = LogGroup(house.pool, "test")
    await read_all(log)
    while (2, "dead") not in await parked_states(house):
        await due_in(house, 2, days=0)
        await log.step()
    await read_all(log)
    assert await parked_states(house) == [(2, "dead"), (3, "retry"), (4, "waiting")]

    assert await group.replay_dead() == 1
    await due_in(house, 3, days=-1)
    await read_all(log)
    await all_due(house, log)

    assert seen.order() == {root: [1, 2, 3, 4]}
    assert await parked_states(house) == []


async def test_records_of_one_root_are_replayed_one_after_the_other(house: House) -> None:
    root = await house.root()
    for _ in range(3):
        await house.happen(house.one, root)
    seen = Seen()
    seen.fails = {(root, sequence): 8 for sequence in (1, 2, 3)}
    log = await reader(house, seen)
    await all_due(house, log)
    group = LogGroup(house.pool, "test")
    assert await parked_states(house) == [(1, "dead"), (2, "dead"), (3, "dead")]
    seen.records.clear()
    seen.fails = {(root, 1): 6}

    assert await group.replay_dead() == 3
    await read_all(log)
    assert seen.records == []
    assert await parked_states(house) == [(1, "retry"), (2, "waiting"), (3, "waiting")]
    await all_due(house, log)

    assert seen.order() == {root: [1, 2, 3]}
    assert await parked_states(house) == []


async def test_record_that_waits_for_nothing_is_seen_and_goes_on_with_its_root(house: House) -> None:
    """As an earlier version could leave it."""
    root = await house.root()
    seen = Seen()
    seen.fails[root, 1] = 6
    log = await reader(house, seen)
    await read_all(log)
    await house.pool.execute("UPDATE parked SET state = 'waiting', parked_at = parked_at - interval '1 hour'")

    wakeups = Wakeups(lambda: connect(house.url, application="test wake"))
    queue = await Queues(house.pool, Brokers([], house.pool, wakeups, PAYMENT_ORDERS), wakeups).one("test")
    assert (queue.delayed, queue.retrying) == (1, 0)
    assert queue.oldest_s is not None and queue.oldest_s >= 3600
    await house.happen(house.one, root)
    await read_all(log)
    await all_due(house, log)

    assert seen.order() == {root: [1, 2]}


async def test_what_failed_in_a_page_that_halted_is_still_before_those_of_its_root(house: House) -> None:
    """The failed one stands behind one that was not sent, in another writer's events than the next of its root."""
    other, root = await house.root(house.one), await house.root(house.one)
    for _ in range(2):
        await house.happen(house.one, other)
    await house.happen(house.one, root)
    await house.happen(house.two, root)
    group = LogGroup(house.pool, "test")
    await group.create(from_now=False)
    assert await group.hold()

    async def handle(records: Sequence[LogRecord]) -> list[str | None]:
        if any(record.root == other and record.sequence == 3 for record in records):
            raise Halt("away")
        return ["no" if record.root == root and record.sequence == 2 else None for record in records]

    with pytest.raises(Halt):
        await read_all(GroupReader(group, handle, asyncio.sleep))
    seen = Seen()
    log = GroupReader(group, seen.handle, asyncio.sleep)
    await read_all(log)
    await all_due(house, log)

    assert seen.order()[root][-2:] == [2, 3]
    assert await parked_states(house) == []


async def test_destination_that_takes_few_at_a_time_gets_fewer_and_then_all(house: House) -> None:
    roots = [await house.root(house.one) for _ in range(40)]
    for root in roots:
        await house.happen(house.one, root)
    seen = Seen()
    seen.most = 12
    log = await reader(house, seen)

    for _ in range(40):
        with suppress(Halt):
            await log.step()

    assert seen.order().keys() == set(roots)
    assert all(order == sorted(set(order)) for order in seen.order().values())


async def test_destination_that_is_away_stops_the_reader_and_parks_nothing(house: House) -> None:
    root = await house.root()
    seen = Seen()
    seen.is_away = True
    log = await reader(house, seen)

    with pytest.raises(Halt):
        await log.step()
    assert await LogGroup(house.pool, "test").parked() == []
    (lag,) = [lag for lag in await LogGroup(house.pool, "test").lag() if lag.behind]
    assert lag.behind == 1
    seen.is_away = False
    await read_all(log)

    assert seen.order() == {root: [1]}


# Pages that overlap


class Counted(LogGroup):
    """A group that counts its readings."""

    def __init__(self, house: House) -> None:
        super().__init__(house.pool, "test")
        self.reads = 0
        self.has_read = asyncio.Condition()

    async def read(self, page: int = 500, *, after: Sequence[Place] = ()) -> list[Unread]:
        unread = await super().read(page, after=after)
        async with self.has_read:
            self.reads += 1
            self.has_read.notify_all()
        return unread


async def test_next_page_is_read_while_this_one_is_handled(house: House) -> None:
    root = await house.root()
    for _ in range(5):
        await house.happen(house.one, root)
    group = Counted(house)
    await group.create(from_now=False)
    assert await group.hold()
    handled: list[int] = []

    async def handle(records: Sequence[LogRecord]) -> list[str | None]:
        (record,) = records
        async with asyncio.timeout(30), group.has_read:
            await group.has_read.wait_for(lambda: group.reads > record.sequence)
        handled.append(record.sequence)
        return [None]

    await read_all(GroupReader(group, handle, asyncio.sleep, page=1))

    assert handled == [1, 2, 3, 4, 5, 6]
    assert all(lag.behind == 0 for lag in await group.lag())


async def test_crash_between_confirm_and_cursor_repeats_and_loses_nothing(house: House) -> None:
    roots = [await house.root() for _ in range(4)]
    for number in range(40):
        await house.happen((house.one, house.two)[number % 2], roots[number % 4])
    seen = Seen()
    group = LogGroup(house.pool, "test")
    await group.create(from_now=False)
    assert await group.hold()
    first = GroupReader(group, seen.handle, asyncio.sleep, page=3)
    for _ in range(3):
        await first.step()
    # As if it had died: another one has the group from here on, and no cursor of the first moves any more.
    await let_go(house)
    second = LogGroup(house.pool, "test")
    assert await second.hold()
    with pytest.raises(LostGroup):
        while await first.step():
            pass
    confirmed = len(seen.records)
    await read_all(GroupReader(second, seen.handle, asyncio.sleep, page=3))

    assert confirmed < len(seen.records)
    places = [record.place for record in seen.records]
    assert len(set(places)) == 44
    for sequences in seen.order().values():
        # In order, then once more from where the cursor was, without a gap.
        again = next((at for at in range(1, len(sequences)) if sequences[at] != sequences[at - 1] + 1), len(sequences))
        assert sequences[:again] == list(range(1, again + 1))
        assert sequences[again:] == list(range(sequences[again], 12)) if again < len(sequences) else again == 11


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_fails_in_whichever_page_each_root_keeps_its_order(house: House, seed: int) -> None:
    chance = random.Random(seed)
    roots = [await house.root(chance.choice([house.one, house.two])) for _ in range(5)]
    for _ in range(60):
        await house.happen(chance.choice([house.one, house.two]), chance.choice(roots))
    seen = Seen()
    seen.fails = {(chance.choice(roots), chance.randint(1, 12)): chance.randint(1, 2) for _ in range(4)}
    log = await reader(house, seen, page=chance.randint(1, 8))
    left = 200
    while left and await log.step():
        left -= 1
        seen.is_away = chance.random() < 0.2
        if seen.is_away:
            with suppress(Halt):
                await log.step()
            seen.is_away = False
        if chance.random() < 0.3:
            await house.pool.execute("UPDATE parked SET due = clock_timestamp()")
    for _ in range(30):
        await house.pool.execute("UPDATE parked SET due = clock_timestamp()")
        await read_all(log)

    assert left, f"seed {seed} does not end"
    assert await LogGroup(house.pool, "test").parked() == []
    assert len({record.place for record in seen.records}) == 65
    for root, sequences in seen.order().items():
        assert list(dict.fromkeys(sequences)) == list(range(1, max(sequences) + 1)), f"seed {seed}, root {root}"


async def test_commit_wakes_readers_of_another_process_at_once(house: House) -> None:
    here, there = (Wakeups(lambda: connect(house.url, application="test wake")) for _ in range(2))
    here.follow(house.one)
    running = [asyncio.create_task(one.run()) for one in (here, there)]
    watch = there.watch(EVENTS)
    await asyncio.sleep(0.2)
    await watch.wait(0.01)
    began = asyncio.get_running_loop().time()
    await house.root()
    await watch.wait(300)

    assert asyncio.get_running_loop().time() - began < 60
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_events_are_listed_newest_first_page_by_page(house: House) -> None:
    root = await house.root()
    for _ in range(5):
        await house.happen(house.one, root)
    await house.happen(house.one, root, "refund.created")
    log = EventLog(house.pool)

    first = await log.of_home(HOME, 4)
    rest = await log.of_home(HOME, 4, before=first[-1])

    assert [record.sequence for record in first + rest] == [7, 6, 5, 4, 3, 2, 1]
    assert [record.sequence for record in await log.of_root(HOME, root, after=5)] == [6, 7]
    assert [record.sequence for record in await log.of_home(HOME, 10, type_="refund.*")] == [7]
    assert [record.sequence for record in await log.of_home(HOME, 10, type_="wallet.created")] == [1]
    assert await log.of_home(8, 10) == []
    assert await log.event(HOME, first[0].place) == first[0]
    assert await log.event(8, first[0].place) is None
    assert event_item(first[0]).root == f"wal_{root}"
