"""Who has which message in hand: a lease per batch, and what ends it."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import asyncpg
import pytest

from flows.messaging.house import HOME, House, put
from flows.service.conftest import until
from kassa.db.pool import connect
from kassa.ids import Id, new_id
from kassa.messaging.binders.postgres import PostgresBinder
from kassa.messaging.relay import MessageRelay
from kassa.messaging.topology import Topic
from kassa.messaging.wake import Wakeups
from kassa.messaging.work import (
    LAPSES_ALONE,
    LAPSES_MAX,
    ClaimedMessage,
    DeadLetters,
    Leased,
    MessageWork,
    OutgoingMessage,
)
from kassa.observability.meters import Meters

QUEUE = "post:office"


async def sent(pool: Any, *keys: str) -> list[Id]:
    """Messages of these keys, in this order."""
    messages = [OutgoingMessage(new_id(), HOME, QUEUE, key, 4, 0.0, {}, key.encode()) for key in keys]
    await put(pool, *messages)
    return [message.id for message in messages]


def ids(claimed: list[ClaimedMessage]) -> list[Id]:
    return [message.id for message in claimed]


async def test_a_key_is_free_when_its_message_is_settled_though_the_batch_goes_on(house: House) -> None:
    work = MessageWork(house.pool)
    await sent(house.pool, "a", "b")
    first = await work.claim(QUEUE, 10)
    (second,) = await sent(house.pool, "a")
    assert await work.claim(QUEUE, 10) == []

    assert await work.acknowledge(first[:1]) == {first[0].id}

    assert ids(await work.claim(QUEUE, 10)) == [second]
    assert await work.acknowledge(first[1:]) == {first[1].id}


async def test_what_is_given_back_comes_at_once_though_the_batch_goes_on(house: House) -> None:
    work = MessageWork(house.pool)
    await sent(house.pool, "a", "b")
    first = await work.claim(QUEUE, 10)

    await work.retry([(first[0], 0.0, "not now", True)])
    again = await work.claim(QUEUE, 10)

    assert ids(again) == [first[0].id]
    assert again[0].attempts == 1
    assert await work.acknowledge([first[0]]) == set(), "it was given back under that lease"
    assert await work.acknowledge([again[0], first[1]]) == {again[0].id, first[1].id}


async def test_a_lease_ends_with_the_last_of_its_batch(house: House) -> None:
    work = MessageWork(house.pool)
    await sent(house.pool, "a", "b", "c", "")
    one, two, three, four = await work.claim(QUEUE, 10)

    await work.acknowledge([one])
    await work.bury([(two, "no")])
    await work.retry([(three, 60.0, None, False)])
    assert await house.pool.fetchval("SELECT count(*) FROM message_lease") == 1
    await work.acknowledge([four])

    assert await house.pool.fetchval("SELECT count(*) FROM message_lease") == 0


async def test_who_settles_for_another_ends_nothing_of_what_is_still_in_hand(house: House) -> None:
    """A hub that took over, or another process, gets the settlements of what it did not claim itself."""
    work, other, third = MessageWork(house.pool), MessageWork(house.pool), MessageWork(house.pool)
    await sent(house.pool, "a", "b", "c", "d", "e")
    one, two, three, four, five = await work.claim(QUEUE, 10)

    assert await other.acknowledge([one]) == {one.id}
    assert await other.bury([(two, "no")]) == {two.id}
    assert await other.retry([(three, 60.0, None, False)]) == {three.id}

    assert await third.claim(QUEUE, 10) == []
    assert await other.acknowledge([four]) == {four.id}
    assert await work.acknowledge([five]) == {five.id}


async def test_those_who_settle_a_batch_at_the_same_time_all_may(house: House) -> None:
    work = MessageWork(house.pool)
    for _ in range(20):
        await sent(house.pool, *(f"key-{number}" for number in range(6)))
        claimed = await work.claim(QUEUE, 10)

        done = await asyncio.gather(*(work.acknowledge([message]) for message in claimed))

        assert set().union(*done) == set(ids(claimed))
    await sent(house.pool, "last")
    await work.acknowledge(await work.claim(QUEUE, 10))
    assert await house.pool.fetchval("SELECT count(*) FROM message_lease") == 0


async def test_a_late_holder_settles_until_somebody_else_has_it(house: House) -> None:
    late, other = MessageWork(house.pool, lease_s=0.01), MessageWork(house.pool)
    await sent(house.pool, "a", "b")
    claimed = await late.claim(QUEUE, 10)
    await asyncio.sleep(0.05)
    assert await late.acknowledge(claimed[:1]) == {claimed[0].id}

    assert ids(await other.claim(QUEUE, 10)) == [claimed[1].id]

    assert await late.acknowledge(claimed[1:]) == set()
    assert await late.retry([(claimed[1], 0.0, None, True)]) == set()
    assert await late.bury([(claimed[1], "no")]) == set()
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 1


async def test_a_crash_of_the_database_forgets_who_had_what_and_not_the_messages(house: House) -> None:
    before, after = MessageWork(house.pool), MessageWork(house.pool)
    await sent(house.pool, "a")
    claimed = await before.claim(QUEUE, 10)
    await house.pool.execute("TRUNCATE message_lease")

    again = await after.claim(QUEUE, 10)

    assert ids(again) == ids(claimed)
    assert await before.acknowledge(claimed) == set()
    assert await after.acknowledge(again) == {again[0].id}


async def test_many_at_once_never_have_the_same_key_and_leave_nothing(house: House) -> None:
    keys = [f"key-{number % 13}" for number in range(400)] + [""] * 100
    expected = dict(zip(await sent(house.pool, *keys), keys, strict=True))
    in_hand: set[str] = set()
    seen: dict[str, list[Id]] = {}

    async def consumer() -> None:
        work = MessageWork(house.pool)
        while sum(map(len, seen.values())) < len(expected):
            claimed = await work.claim(QUEUE, 7)
            theirs = {message.key for message in claimed} - {""}
            assert not theirs & in_hand
            in_hand.update(theirs)
            for message in claimed:
                seen.setdefault(message.key, []).append(message.id)
            await asyncio.sleep(0)
            # Free as soon as the commit is there, so not afterwards.
            in_hand.difference_update(theirs)
            assert len(await work.acknowledge(claimed)) == len(claimed)

    await asyncio.gather(*(consumer() for _ in range(6)))

    for key, came in seen.items():
        if key:
            assert came == [id for id, its in expected.items() if its == key]
    assert sorted(id for came in seen.values() for id in came) == sorted(expected)
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0
    assert await house.pool.fetchval("SELECT count(*) FROM message_lease") == 0


async def test_who_comes_while_another_chooses_gets_what_is_behind(house: House) -> None:
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, *(f"key-{number}" for number in range(40)))
    async with house.pool.acquire() as connection, connection.transaction():
        chosen = [
            Id(row["id"].hex)
            for limit in (1, 20)
            for row in await connection.fetch(
                "SELECT id FROM claim_messages($1, $2, interval '1 minute')", QUEUE, limit
            )
        ]
        assert chosen == sent_ids[:21]

        assert ids(await work.claim(QUEUE, 1)) == [sent_ids[21]]
        more = ids(await work.claim(QUEUE, 16))
        assert more and more == sent_ids[22 : 22 + len(more)]

    assert ids(await work.claim(QUEUE, 16)) == sent_ids[22 + len(more) :][:16]


@pytest.mark.parametrize("limit", [1, 10])
async def test_behind_a_message_that_a_program_has_only_other_keys_are_handed_out(house: House, limit: int) -> None:
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, "k", "k", "o", "k")
    async with house.pool.acquire() as connection, connection.transaction():
        assert len(await connection.fetch("SELECT * FROM kassa_receive('post', 'office', 1)")) == 1
        claimed = await work.claim(QUEUE, limit)
        assert ids(claimed) == [sent_ids[2]]
        assert await work.claim(QUEUE, limit) == []

    assert ids(await work.claim(QUEUE, 10)) == [sent_ids[1], sent_ids[3]]


async def test_a_claim_finds_what_is_behind_more_than_it_wants_that_a_program_has(house: House) -> None:
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, *[""] * 60)
    async with house.pool.acquire() as connection, connection.transaction():
        assert len(await connection.fetch("SELECT * FROM kassa_receive('post', 'office', 32)")) == 32

        assert ids(await work.claim(QUEUE, 10)) == sent_ids[32:42]


async def test_who_wants_one_leaves_the_next_one_to_others(house: House) -> None:
    sent_ids = await sent(house.pool, *(f"key-{number}" for number in range(10)))
    async with house.pool.acquire() as connection, connection.transaction():
        rows = await connection.fetch("SELECT id FROM claim_messages($1, 1, interval '1 minute')", QUEUE)
        assert [Id(row["id"].hex) for row in rows] == sent_ids[:1]

        assert ids(await MessageWork(house.pool).claim(QUEUE, 10)) == sent_ids[1:]


async def test_who_wants_nothing_gets_nothing(house: House) -> None:
    await sent(house.pool, "k", "")
    work = MessageWork(house.pool)

    assert await work.claim(QUEUE, 0) == await work.claim(QUEUE, -1) == []
    assert await house.pool.fetch("SELECT * FROM kassa_receive('post', 'office', 0)") == []
    assert len(await house.pool.fetch("SELECT * FROM kassa_receive('post', 'office', NULL)")) == 2


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_program_whose_snapshot_is_old_is_told_so(house: House, isolation: Any) -> None:
    await sent(house.pool, "k")
    async with house.pool.acquire() as connection:
        with pytest.raises(asyncpg.InvalidTransactionStateError, match="needs READ COMMITTED") as told:
            async with connection.transaction(isolation=isolation):
                await connection.fetch("SELECT * FROM kassa_receive('post', 'office', 1)")
    assert "BEGIN ISOLATION LEVEL READ COMMITTED" in str(told.value.hint)
    assert len(await MessageWork(house.pool).claim(QUEUE, 1)) == 1


async def test_a_program_does_not_keep_a_worker_from_settling_what_comes_later_in_its_key(house: House) -> None:
    work = MessageWork(house.pool)
    early, late = await sent(house.pool, "k", "k")
    await house.pool.execute("UPDATE message SET due = due + interval '1 hour' WHERE id = $1", early)
    claimed = await work.claim(QUEUE, 1)
    assert ids(claimed) == [late]
    await house.pool.execute("UPDATE message SET due = created_at WHERE id = $1", early)
    async with house.pool.acquire() as connection, connection.transaction():
        assert len(await connection.fetch("SELECT * FROM kassa_receive('post', 'office', 2)")) == 1

        async with asyncio.timeout(30.0):
            assert await work.acknowledge(claimed) == {late}


async def test_a_message_is_acknowledged_though_somebody_moves_it_meanwhile(house: House) -> None:
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, "a", "b", "c")
    claimed = await work.claim(QUEUE, 3)
    async with house.pool.acquire() as connection:
        moving = connection.transaction()
        await moving.start()
        await connection.execute("UPDATE message SET headers = headers WHERE id = $1", sent_ids[1])
        acknowledging = asyncio.create_task(work.acknowledge(claimed))
        await until(partial(house.pool.fetchval, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
        await moving.commit()

    assert await acknowledging == set(sent_ids)
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0


async def test_a_consumer_that_does_not_read_what_it_claimed_holds_up_nobody(house: House) -> None:
    """The server sends rows before it commits: who is stopped then keeps what he claimed, and nothing else."""
    work = MessageWork(house.pool)
    body = b"x" * 1_000_000
    await put(house.pool, *(OutgoingMessage(new_id(), HOME, QUEUE, f"key-{n}", 4, 0.0, {}, body) for n in range(20)))
    (last,) = await sent(house.pool, "last")
    stopped = await connect(house.url, application="stopped")
    claim = await stopped.prepare("SELECT id, body FROM claim_messages($1, 20, interval '1 minute')")
    stopped._transport.pause_reading()
    claiming = asyncio.create_task(claim.fetch(QUEUE))

    await until(
        partial(
            house.pool.fetchval,
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'stopped' AND wait_event = 'ClientWrite'",
        )
    )
    async with asyncio.timeout(30.0):
        assert ids(await work.claim(QUEUE, 1)) == [last]

    stopped._transport.resume_reading()
    assert len(await claiming) == 20
    await stopped.close()


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "in parts"])
async def test_messages_are_acknowledged_wherever_they_are_by_then(house: House, is_whole: bool) -> None:
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, *(f"key-{number}" for number in range(8)))
    claimed = await work.claim(QUEUE, 8)
    await house.pool.execute("UPDATE message SET headers = headers WHERE id = $1", sent_ids[1])
    await house.pool.execute("UPDATE message SET headers = headers WHERE id = $1", sent_ids[5])

    done: set[Id] = set()
    for part in [claimed] if is_whole else [claimed[:3], claimed[3:]]:
        done |= await work.acknowledge(part)

    assert done == set(sent_ids)
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0
    assert await house.pool.fetchval("SELECT count(*) FROM message_lease") == 0


async def test_messages_of_a_lease_that_does_not_say_where_they_are_are_acknowledged(house: House) -> None:
    """One of an earlier version, or that a part was given back of."""
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, *(f"key-{number}" for number in range(8)))
    claimed = await work.claim(QUEUE, 4)
    await house.pool.execute("UPDATE message_lease SET places = NULL")
    assert await work.acknowledge(claimed) == set(sent_ids[:4])

    claimed = await work.claim(QUEUE, 4)
    await work.release(claimed[:1])
    assert await work.acknowledge(claimed) == set(sent_ids[5:])
    assert ids(await work.claim(QUEUE, 4)) == [sent_ids[4]]


async def test_another_message_in_the_place_of_one_that_went_is_not_acknowledged_with_it(house: House) -> None:
    work = MessageWork(house.pool)
    await sent(house.pool, "one")
    claimed = await work.claim(QUEUE, 1)
    place = await house.pool.fetchval("DELETE FROM message RETURNING ctid")
    await house.pool.execute("VACUUM message")
    (other,) = await sent(house.pool, "another")
    assert await house.pool.fetchval("SELECT ctid FROM message") == place

    assert await work.acknowledge(claimed) == set()
    assert ids(await work.claim(QUEUE, 1)) == [other]


async def test_a_program_that_receives_by_sql_and_a_worker_do_not_get_the_same(house: House) -> None:
    work = MessageWork(house.pool)
    sent_ids = await sent(house.pool, "", "", "")
    taken = await work.claim(QUEUE, 1)
    async with house.pool.acquire() as connection, connection.transaction():
        assert len(await connection.fetch("SELECT * FROM kassa_receive('post', 'office', 1)")) == 1
        rest = await work.claim(QUEUE, 10)
        assert ids(taken) + ids(rest) == [sent_ids[0], sent_ids[2]]

    assert await work.acknowledge(taken) == {sent_ids[0]}
    assert await work.acknowledge(rest) == {sent_ids[2]}
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0


async def test_programs_that_receive_by_sql_side_by_side_keep_each_keys_order(house: House) -> None:
    await sent(house.pool, "k", "k", "o")

    async def received(connection: Any, at_most: int) -> list[str]:
        rows = await connection.fetch("SELECT body FROM kassa_receive('post', 'office', $1)", at_most)
        return [row["body"] for row in rows]

    async with house.pool.acquire() as one, house.pool.acquire() as two:
        begun = one.transaction()
        await begun.start()
        assert await received(one, 1) == ["k"]
        async with two.transaction():
            assert await received(two, 1) == ["o"], "the next of the key waits until the first is committed"
        assert await received(two, 9) == []
        await begun.rollback()
        assert await received(two, 1) == ["k"]
        assert await received(two, 9) == ["k"]
    assert await house.pool.fetchval("SELECT count(*) FROM message") == 0


async def test_a_program_that_receives_by_sql_gets_what_is_urgent_first(house: House) -> None:
    urgent = [(4, "k"), (4, "o"), (9, "k"), (9, "p"), (0, "")]
    await put(
        house.pool,
        *(
            OutgoingMessage(new_id(), HOME, QUEUE, key, priority, 0.0, {}, f"{key}{number}".encode())
            for number, (priority, key) in enumerate(urgent)
        ),
    )

    rows = [await house.pool.fetch("SELECT body FROM kassa_receive('post', 'office', $1)", n) for n in (1, 1, 2, 9)]

    assert [[row["body"] for row in some] for some in rows] == [["p3"], ["k0"], ["o1", "k2"], ["4"]]


async def test_a_program_that_receives_by_sql_gets_what_is_behind_all_that_another_has(house: House) -> None:
    sent_ids = await sent(house.pool, *(f"key-{number % 70}" for number in range(140)))
    async with house.pool.acquire() as one, one.transaction():
        assert len(await one.fetch("SELECT body FROM kassa_receive('post', 'office', 60)")) == 60
        rows = await house.pool.fetch("SELECT body FROM kassa_receive('post', 'office', 20)")
        # Ten keys are nobody's, each with two messages.
        assert [row["body"] for row in rows] == [f"key-{number}" for number in (*range(60, 70), *range(60, 70))]
        assert await house.pool.fetch("SELECT body FROM kassa_receive('post', 'office', 20)") == []
    assert await house.pool.fetchval("SELECT count(*) FROM message") == len(sent_ids) - 80


async def test_a_program_that_receives_by_sql_gets_nothing_behind_what_a_worker_has_of_the_key(house: House) -> None:
    work = MessageWork(house.pool)
    await sent(house.pool, "k", "k")
    (taken,) = await work.claim(QUEUE, 1)

    receive = "SELECT body FROM kassa_receive('post', 'office', 9)"
    assert await house.pool.fetch(receive) == []
    await work.retry([(taken, 60.0, "not now", True)])
    assert await house.pool.fetch(receive) == []
    await house.pool.execute("UPDATE message SET due = clock_timestamp()")
    assert len(await house.pool.fetch(receive)) == 2


async def test_a_paused_group_gives_nothing_to_a_program_that_receives_by_sql(house: House) -> None:
    await sent(house.pool, "k")
    await house.pool.execute("SELECT kassa_listen('post', 'office')")
    await house.pool.execute("UPDATE subscription SET paused = true")
    receive = "SELECT body FROM kassa_receive('post', 'office', 9)"
    assert await house.pool.fetch(receive) == []

    await house.pool.execute("UPDATE subscription SET paused = false")

    assert len(await house.pool.fetch(receive)) == 1


class CutWork(MessageWork):
    """Whose connection is lost with the first acknowledgement."""

    is_cut = False

    async def acknowledge(self, claimed: Sequence[Leased]) -> set[Id]:
        if not self.is_cut:
            self.is_cut = True
            raise ConnectionResetError
        return await super().acknowledge(claimed)


async def test_a_relay_that_loses_its_database_for_a_moment_gives_back_the_batch(house: House) -> None:
    work, wakeups = CutWork(house.pool), Wakeups(house.pool.acquire)
    binder = PostgresBinder(house.pool, wakeups)
    await binder.provision([Topic("away", ("office",), "Letters, for the tests.")])
    relay = MessageRelay(work, binder, QUEUE, "away", wakeups)
    sent_ids = await sent(house.pool, "a", "a", "b")

    with pytest.raises(ConnectionResetError):
        await relay.step()

    assert await house.pool.fetchval("SELECT count(*) FROM message_lease") == 0
    await house.pool.execute("UPDATE message SET due = clock_timestamp() WHERE topic = $1", QUEUE)
    assert await relay.step() == 3
    deliveries = await (await binder.subscribe("away", "office")).receive(10, 10.0)
    assert [one.record.id for one in deliveries] == sent_ids, "once each, though the first were sent again"


async def test_what_is_claimed_for_somebody_who_was_cancelled_meanwhile_is_given_back(house: House) -> None:
    work = MessageWork(house.pool)
    await sent(house.pool, "a", "b")
    async with house.pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE message_lease IN ACCESS EXCLUSIVE MODE")
        claiming = asyncio.create_task(work.claim_whole(QUEUE, 10))
        await until(partial(connection.fetchval, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))
        claiming.cancel()
        await asyncio.sleep(0.1)

    with pytest.raises(asyncio.CancelledError):
        await claiming

    again = await MessageWork(house.pool).claim(QUEUE, 10)
    assert [(message.key, message.attempts) for message in again] == [("a", 0), ("b", 0)]


@pytest.mark.parametrize("headers", ['{"tries": 1}', '["x"]', '{"a": "\\ud800"}', "null", "no JSON", ""])
async def test_a_row_whose_headers_are_no_text_keeps_no_other_from_being_claimed(house: House, headers: str) -> None:
    """Programs write rows too."""
    work = MessageWork(house.pool)
    await sent(house.pool, "a", "odd", "b")
    await house.pool.execute("UPDATE message SET headers = $1 WHERE key = 'odd'", headers)

    claimed = await work.claim(QUEUE, 10)

    assert [message.key for message in claimed] == ["a", "odd", "b"]
    assert [one.key for one in await work.peek(QUEUE)] == ["a", "odd", "b"]
    assert await work.bury([(claimed[1], "odd")]) == {claimed[1].id}
    assert [letter.key for letter in await DeadLetters(house.pool).browse(QUEUE)] == ["odd"]


async def test_a_message_that_ends_whoever_has_it_goes_alone_and_is_given_up(house: House) -> None:
    work = MessageWork(house.pool, lease_s=0.05)

    async def claimed() -> list[Id]:
        """And whoever has them ends: nothing is settled or given back."""
        found = ids(await MessageWork(house.pool, lease_s=0.05).claim(QUEUE, 10))
        await asyncio.sleep(0.06)
        return found

    killer, other, same_key = await sent(house.pool, "k", "o", "k")
    for _ in range(LAPSES_ALONE):
        assert await claimed() == [killer, same_key, other]

    assert await claimed() == [killer]
    lone = await MessageWork(house.pool).claim(QUEUE, 10)
    assert ids(lone) == [killer]
    beside = await work.claim(QUEUE, 10)
    assert ids(beside) == [other], (
        "what is behind it in its key waits, and what once was in hand with it goes alone too"
    )
    await work.acknowledge(beside)
    await MessageWork(house.pool).give_back(lone)
    for _ in range(LAPSES_MAX - LAPSES_ALONE - 1):
        assert await claimed() == [killer]

    assert ids(await work.claim(QUEUE, 10)) == [same_key], "its key goes on"
    (dead,) = await DeadLetters(house.pool).browse(QUEUE)
    assert (dead.id, dead.reason) == (killer, "whoever had it in hand ended, or held it longer than its lease, 8 times")
    await DeadLetters(house.pool).replay(QUEUE)
    assert await house.pool.fetchval("SELECT lapses FROM message WHERE id = $1", killer) == 0


async def test_what_is_given_up_for_its_lapses_is_counted_once(house: House) -> None:
    """By whoever claimed it then, and in the words of whoever settles what comes from that queue."""
    meters = Meters()
    workers = [MessageWork(house.pool, meters=meters) for _ in range(3)]
    killers = await sent(house.pool, "k", "o")
    await house.pool.execute("UPDATE message SET lapses = $1", LAPSES_MAX)

    claimed = await asyncio.gather(*(work.claim(QUEUE, 10) for work in workers))

    assert claimed == [[], [], []]
    assert {letter.id for letter in await DeadLetters(house.pool).browse(QUEUE)} == set(killers)
    topic, group = QUEUE.split(":")
    assert {name: passage.dead for name, passage in meters.passages.items()} == {(topic, group): len(killers)}


async def test_what_was_once_in_hand_with_others_that_ended_is_handed_out_with_them_again(house: House) -> None:
    work = MessageWork(house.pool, lease_s=0.05)
    sent_ids = await sent(house.pool, "a", "b", "c")
    await work.claim(QUEUE, 10)
    await asyncio.sleep(0.06)

    assert ids(await work.claim(QUEUE, 10)) == sent_ids
    (peeked, *_) = await work.peek(QUEUE)
    assert peeked.last_error == "whoever had it in hand ended, or held it longer than its lease"
