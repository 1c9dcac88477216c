"""What is written, counted in the log, and the pace of a reader that has a backlog meanwhile."""

import asyncio
from collections.abc import Sequence
from datetime import datetime

from flows.messaging.house import HOME, House
from kassa.journal.change import Aggregate, Change, Event, Rule
from kassa.messaging.log import GroupReader, LogGroup
from kassa.messaging.model import LogRecord
from kassa.messaging.pace import Pace
from kassa.payments.records import WALLET

NOT_A_PAUSE_S = 0.06
"""Of a handler: two of its pages take longer than a burst lasts."""


async def test_backlog_goes_as_it_comes_until_somebody_is_seen_writing(house: House) -> None:
    root = await house.root()
    pace = Pace(house.pool, 100)

    assert await pace.turn_s(50, 0.0) == 0.0
    await house.happen(house.one, root)
    assert await pace.turn_s(50, 0.05) == 0.0
    assert await pace.turn_s(50, 0.1) == 0.5
    assert pace.page(500) == 100


async def test_nobody_writes_when_two_looks_found_nothing(house: House) -> None:
    root = await house.root()
    pace = Pace(house.pool, 100)
    await pace.turn_s(50, 0.0)
    await house.happen(house.one, root)

    assert [await pace.turn_s(50, now) for now in (0.1, 0.6, 1.0)] == [0.5, 0.5, 0.5]
    assert await pace.turn_s(50, 1.1) == 0.0
    assert pace.page(500) == 500

    await house.happen(house.one, root)
    assert await pace.turn_s(50, 1.6) == 0.5


async def test_what_was_written_before_is_not_writing(house: House) -> None:
    for _ in range(20):
        await house.root()
    pace = Pace(house.pool, 1)

    assert [await pace.turn_s(50, now) for now in (0.0, 0.5, 1.0, 1.5)] == [0.0] * 4


async def test_twice_of_what_all_write_is_drained_where_that_is_more(house: House) -> None:
    """Events, not changes; of a writer that is new, too."""
    root = await house.root(house.one)
    pace = Pace(house.pool, 100)
    await pace.turn_s(50, 0.0)

    def decide(aggregate: Aggregate, now: datetime) -> Change:
        return Change(home=HOME, events=tuple(Event("wallet.paid", b"{}") for _ in range(15)))

    await house.one.commit(Change(home=HOME, rule=Rule(WALLET, root, decide)))
    for _ in range(5):
        await house.root(house.two)

    # 20 events in the tenth of a second.
    assert await pace.turn_s(50, 0.1) == 50 / 400


async def test_changes_without_events_are_nobody_who_writes(house: House) -> None:
    """What the effects of a drain mostly are."""
    root = await house.root()
    pace = Pace(house.pool, 100)
    await pace.turn_s(50, 0.0)
    before = await house.pool.fetchval("SELECT max(last_seq) FROM chain")

    await house.one.commit(Change(home=HOME, root=root))

    assert await house.pool.fetchval("SELECT max(last_seq) FROM chain") > before
    assert await pace.turn_s(50, 0.5) == 0.0


async def test_backlog_after_a_rest_is_another_one(house: House) -> None:
    root = await house.root()
    pace = Pace(house.pool, 100)
    await pace.turn_s(50, 0.0)
    await house.happen(house.one, root)
    assert await pace.turn_s(50, 0.1) == 0.5

    pace.rest()

    assert pace.page(500) == 500
    assert await pace.turn_s(50, 0.2) == 0.0
    assert await pace.turn_s(50, 0.7) == 0.0


class Drain:
    """A reader that goes through what waits, twenty at a time."""

    def __init__(self, house: House, backlog_per_s: int, *, hold_s: float = 15.0) -> None:
        self.group = LogGroup(house.pool, "test", hold_s=hold_s)
        self.handled = 0
        self.is_written_beside = False
        """Whether one more event is written at each page."""
        self._house = house
        self._pace = Pace(house.pool, backlog_per_s)
        self._paged = asyncio.Event()

    async def begin(self, events: int) -> "asyncio.Task[None]":
        """Begins it, with so many events that wait."""
        await asyncio.gather(*(self._house.root(self._house.one) for _ in range(events)))
        await self.group.create(from_now=False)
        reader = GroupReader(self.group, self._handle, asyncio.sleep, page=20, pace=self._pace)
        return asyncio.create_task(reader.run())

    async def until(self, events: int) -> None:
        """So many are handled, however long a slow machine takes."""
        async with asyncio.timeout(60.0):
            while self.handled < events:
                self._paged.clear()
                await self._paged.wait()

    async def _handle(self, records: Sequence[LogRecord]) -> list[str | None]:
        if self.is_written_beside:
            await self._house.root(self._house.two)
        await asyncio.sleep(NOT_A_PAUSE_S)
        self.handled += len(records)
        self._paged.set()
        return [None] * len(records)


async def ended(reading: "asyncio.Task[None]") -> None:
    """It was cancelled, and is over."""
    reading.cancel()
    await asyncio.wait([reading])


async def test_backlog_is_drained_at_its_pace_while_somebody_writes(house: House) -> None:
    drain, clock = Drain(house, 40), asyncio.get_running_loop().time
    drain.is_written_beside = True
    reading = await drain.begin(120)
    began = clock()

    await drain.until(120)
    took_s = clock() - began
    await ended(reading)

    # The first three pages take as long as a burst; with each of the other three come half a second's events.
    assert took_s >= 3 * 20 / 40


async def test_backlog_is_drained_at_once_when_nobody_writes(house: House) -> None:
    drain = Drain(house, 1)
    reading = await drain.begin(120)

    # At the pace it would be two minutes.
    await drain.until(120)
    await ended(reading)


async def test_pace_ends_with_who_wrote(house: House) -> None:
    drain = Drain(house, 1)
    drain.is_written_beside = True
    reading = await drain.begin(120)
    await drain.until(60)

    drain.is_written_beside = False

    # Nobody waits for the end of a page's turn, which was twenty seconds.
    await drain.until(120)
    await ended(reading)


async def test_slow_pace_does_not_lose_the_group(house: House) -> None:
    """The time between two of its pages is longer than a group is held without a word."""
    drain = Drain(house, 10, hold_s=0.6)

    async def write() -> None:
        while True:
            await house.root(house.two)
            await asyncio.sleep(0.1)

    writing = asyncio.create_task(write())
    reading = await drain.begin(300)
    await drain.until(20)

    for _ in range(12):
        await asyncio.sleep(0.25)
        assert not await LogGroup(house.pool, "test").hold()
    await ended(reading)
    await ended(writing)

    assert 20 < drain.handled < 300
