"""What only the database's journal can be asked: several writers, and connections and servers that die."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime

import asyncpg
import pytest

from conformance.journal.cutter import Cut, Cutter
from conformance.journal.house import HOME, TABLES, committed, funded, paid, payment, refunded, wallet
from conformance.messaging.house import until
from kassa.db.pool import connect
from kassa.errors import Busy, DatabaseFull, DatabaseUnreachable, InvariantBroken, KassaError, OutcomeUnknown
from kassa.journal.change import (
    AccountOpen,
    Again,
    Aggregate,
    Change,
    Committed,
    Consumed,
    MessageDone,
    Money,
    Refused,
    Rule,
    Taken,
    Verdict,
)
from kassa.journal.verify import verify
from kassa.journal.writer import SLOT_LOCK, PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import Limit, single
from kassa.payments.records import PAYMENT, Payment, Wallet

COMMITS_MIN = 100
PATIENCE_S = 60.0
"""Far more than anything takes."""


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2) as opened:
        yield opened


async def _writer(url: str, **options: float) -> PostgresJournal:
    journal = PostgresJournal(lambda: asyncpg.connect(url, timeout=5), TABLES, **options)  # type: ignore[arg-type]
    await journal.start()
    return journal


async def _balances(pool: asyncpg.Pool) -> tuple[int, int]:
    """What all accounts add up to, and the money in wallets."""
    row = await pool.fetchrow(
        "SELECT coalesce(sum(credits_posted - debits_posted), 0) AS total, "
        "coalesce(sum(credits_posted - debits_posted) FILTER (WHERE code = 1), 0) AS wallets FROM account"
    )
    return int(row["total"]), int(row["wallets"])


async def test_two_writers_hold_two_slots(database_url: str) -> None:
    one, two = await _writer(database_url), await _writer(database_url)

    assert one.slots + two.slots == (1, 2)

    await one.stop()
    await two.stop()


async def test_the_same_key_in_two_writers_at_once_has_one_effect(database_url: str, pool: asyncpg.Pool) -> None:
    one, two = await _writer(database_url), await _writer(database_url)
    purse = wallet()
    committed(await one.commit(funded(purse, 100_000)))

    for number in range(20):
        change = [paid(payment(f"o-{number}", 100, purse.id), f"k-{number}") for _ in range(2)]
        verdicts = await asyncio.gather(one.submit(change[0]), two.submit(change[1]))
        assert Counter(type(verdict) for verdict in verdicts) == {Committed: 1, Again: 1}

    assert await _balances(pool) == (0, 100_000 - 2000)
    await one.stop()
    await two.stop()


async def test_the_same_order_number_from_two_writers_is_one_order(database_url: str, pool: asyncpg.Pool) -> None:
    one, two = await _writer(database_url), await _writer(database_url)
    purse = wallet()
    committed(await one.commit(funded(purse, 100_000)))

    for number in range(20):
        verdicts = await asyncio.gather(
            *(writer.submit(paid(payment(f"o-{number}", 100, purse.id), f"{number}-{writer.slots}"))
              for writer in (one, two))
        )  # fmt: skip
        assert Counter(type(verdict) for verdict in verdicts) == {Committed: 1, Taken: 1}

    assert await pool.fetchval("SELECT count(*) FROM payment") == 20
    await one.stop()
    await two.stop()


async def _cross(writers: list[PostgresJournal], pool: asyncpg.Pool, seconds: float, seed: int) -> Counter[str]:
    """Payments and refunds of few wallets and few payments from several writers, for a while, and until many have happened."""
    chance = random.Random(seed)
    purses: list[Wallet] = [wallet(f"u-{number}") for number in range(6)]
    for purse in purses:
        committed(await writers[0].commit(funded(purse, 1_000_000)))
    orders: list[Payment] = []
    for number in range(10):
        order = payment(f"shared-{number}", 10_000, chance.choice(purses).id)
        committed(await writers[0].commit(paid(order)))
        orders.append(order)
    kinds: Counter[str] = Counter()
    end = asyncio.get_running_loop().time() + seconds

    async def caller(writer: PostgresJournal, name: int) -> None:
        number = 0
        while asyncio.get_running_loop().time() < end or kinds["Committed"] <= COMMITS_MIN:
            number += 1
            if chance.random() < 0.5:
                change = paid(payment(f"{name}-{number}", 10, chance.choice(purses).id), f"{name}-{number}")
            else:
                change = refunded(chance.choice(orders), 1)
            verdict = await writer.commit(change)
            kinds[type(verdict).__name__] += 1
            if not isinstance(verdict, Committed | Refused | Money):
                raise AssertionError(verdict)

    await asyncio.gather(*(caller(writer, place * 100 + n) for place, writer in enumerate(writers) for n in range(16)))
    assert (await _balances(pool))[0] == 0
    return kinds


async def test_crossing_writers_never_show_a_deadlock(database_url: str, pool: asyncpg.Pool) -> None:
    writers = [await _writer(database_url), await _writer(database_url)]

    kinds = await _cross(writers, pool, seconds=5, seed=1)

    assert kinds["Committed"] > COMMITS_MIN
    for writer in writers:
        await writer.stop()


@pytest.mark.long
async def test_writers_that_cross_for_a_minute_never_show_a_deadlock(database_url: str, pool: asyncpg.Pool) -> None:
    writers = [await _writer(database_url) for _ in range(3)]

    kinds = await _cross(writers, pool, seconds=60, seed=2)

    print(f"three writers, one minute: {dict(kinds)}")
    assert kinds["Committed"] > 1000
    for writer in writers:
        await writer.stop()


@pytest.mark.parametrize(
    ("statement", "cut"),
    [
        (b"BEGIN", Cut.BEFORE),
        (b"INSERT INTO payment", Cut.BEFORE),
        (b"INSERT INTO payment", Cut.ANSWER_LOST),
        (b"COMMIT\0", Cut.BEFORE),
        (b"COMMIT\0", Cut.ANSWER_LOST),
    ],
)
async def test_a_cut_connection_leads_to_the_truth(
    database_url: str, pool: asyncpg.Pool, statement: bytes, cut: Cut
) -> None:
    """Wherever the connection is cut, each caller is told that it is durable, and it is there once."""
    cutter = Cutter(database_url)
    journal = await _writer(await cutter.start())
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    cutter.arm(statement, cut)

    verdicts = await asyncio.gather(
        *(journal.submit(paid(payment(f"o-{number}", 100, purse.id), f"k-{number}")) for number in range(5))
    )

    assert cutter.cuts == 1
    assert all(isinstance(verdict, Committed) for verdict in verdicts)
    assert await _balances(pool) == (0, 500)
    assert await pool.fetchval("SELECT count(*) FROM payment") == 5
    assert await pool.fetchval("SELECT count(DISTINCT sequence) FROM event WHERE type = 'payment.succeeded'") == 1
    await journal.stop()
    await cutter.stop()


async def _patient(url: str, answer_s: float) -> PostgresJournal:
    """A writer for which a statement may take so long."""
    journal = PostgresJournal(lambda: connect(url, application="test writer", answer_s=answer_s), TABLES)
    await journal.start()
    return journal


@pytest.mark.parametrize("statement", [b"BEGIN", b"INSERT INTO payment", b"COMMIT\0"])
async def test_a_database_that_says_nothing_any_more_is_left_for_a_new_connection(
    database_url: str, pool: asyncpg.Pool, statement: bytes
) -> None:
    """The way to it is gone without a word, or its process is frozen: nobody waits for ever, and each is told the truth."""
    cutter = Cutter(database_url)
    journal = await _patient(await cutter.start(), answer_s=2.0)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    cutter.arm(statement, Cut.SILENT)

    verdicts = await asyncio.gather(
        *(journal.submit(paid(payment(f"o-{number}", 100, purse.id), f"k-{number}")) for number in range(5))
    )

    assert cutter.cuts == 1
    assert all(isinstance(verdict, Committed) for verdict in verdicts)
    assert await _balances(pool) == (0, 500)
    assert await pool.fetchval("SELECT count(*) FROM payment") == 5
    await journal.stop()
    await cutter.stop()


async def until_cut(cutter: Cutter) -> None:
    async def is_cut() -> bool:
        return cutter.cuts > 0

    await until(is_cut)


async def test_stopping_ends_though_the_database_says_nothing_any_more(database_url: str, pool: asyncpg.Pool) -> None:
    cutter = Cutter(database_url)
    journal = await _patient(await cutter.start(), answer_s=2.0)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    cutter.arm(b"COMMIT\0", Cut.SILENT)
    cutter.is_refusing = True
    first = journal.submit(paid(payment("o-1", 100, purse.id)))
    await until_cut(cutter)
    second = journal.submit(paid(payment("o-2", 100, purse.id)))

    await journal.stop()

    with pytest.raises(OutcomeUnknown):
        await first
    with pytest.raises(DatabaseUnreachable):
        await second
    assert await _balances(pool) == (0, 1000)
    await cutter.stop()


async def _commit_once_it_is_back(journal: PostgresJournal, change: Change) -> Verdict:
    """A change that was refused because there is no connection yet is given again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await journal.commit(change)
            except DatabaseUnreachable:
                await asyncio.sleep(0.05)


async def test_what_cannot_be_found_out_is_said_to_be_unknown(database_url: str, pool: asyncpg.Pool) -> None:
    cutter = Cutter(database_url)
    journal = await _writer(await cutter.start(), settle_s=0.5)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    change = paid(payment("o-1", 100, purse.id), "k")
    cutter.arm(b"COMMIT\0", Cut.ANSWER_LOST)
    cutter.is_refusing = True

    with pytest.raises(OutcomeUnknown):
        await journal.commit(change)
    assert not journal.is_writable
    cutter.is_refusing = False
    repeated = await _commit_once_it_is_back(journal, paid(payment("o-1", 100, purse.id), "k"))

    assert isinstance(repeated, Again)
    assert await _balances(pool) == (0, 900)
    await journal.stop()
    await cutter.stop()


async def test_a_database_that_is_gone_is_said_to_be_gone_and_found_again(database_url: str) -> None:
    cutter = Cutter(database_url)
    journal = await _writer(await cutter.start(), settle_s=0.3)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    cutter.is_refusing = True
    cutter.arm(b"BEGIN", Cut.BEFORE)

    with pytest.raises(DatabaseUnreachable):
        await journal.commit(paid(payment("o-1", 100, purse.id)))
    cutter.is_refusing = False

    assert isinstance(await _commit_once_it_is_back(journal, paid(payment("o-1", 100, purse.id))), Committed)
    await journal.stop()
    await cutter.stop()


async def test_a_disk_without_room_is_said_to_be_full_until_there_is_room(
    database_url: str, pool: asyncpg.Pool
) -> None:
    journal = await _writer(database_url)
    await pool.execute(
        "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END $$"
    )
    await pool.execute("CREATE TRIGGER no_room BEFORE INSERT ON wallet EXECUTE FUNCTION no_room()")

    with pytest.raises(DatabaseFull):
        await journal.commit(funded(wallet(), 100))
    was_full = journal.is_full
    await pool.execute("DROP TRIGGER no_room ON wallet")

    assert was_full
    assert await journal.finds_room()
    assert not journal.is_full
    assert isinstance(await journal.commit(funded(wallet(), 100)), Committed)
    await journal.stop()


async def test_a_full_queue_is_refused_honestly(database_url: str, pool: asyncpg.Pool) -> None:
    journal = await _writer(database_url, queue_max=10)
    purse = wallet()
    committed(await journal.commit(funded(purse, 100_000)))
    answers: list[object] = []

    for number in range(30):
        try:
            answers.append(journal.submit(paid(payment(f"o-{number}", 100, purse.id))))
        except Busy as busy:
            answers.append(busy)
    refused = sum(isinstance(answer, KassaError) for answer in answers)
    taken = await asyncio.gather(*(answer for answer in answers if isinstance(answer, asyncio.Future)))

    assert refused == 20
    assert all(isinstance(verdict, Committed) for verdict in taken)
    assert await pool.fetchval("SELECT count(*) FROM payment") == 10
    await journal.stop()


async def test_a_writer_goes_on_where_its_slot_stopped(database_url: str, pool: asyncpg.Pool) -> None:
    for number in range(3):
        journal = await _writer(database_url)
        committed(await journal.commit(funded(wallet(f"u-{number}"), 10)))
        await journal.stop()

    rows = await pool.fetch("SELECT writer, batch, first_seq, last_seq FROM chain ORDER BY batch")

    assert [tuple(row) for row in rows] == [(1, 1, 1, 1), (1, 2, 2, 2), (1, 3, 3, 3)]


async def test_an_account_of_a_refused_batch_is_not_remembered(database_url: str) -> None:
    """Its id was drawn in a transaction that never was; the next change must find that out."""
    journal = await _writer(database_url)
    purse = wallet()
    poisonous = Change(home=HOME, new=(payment("o-1", -1),), transfers=funded(purse, 5).transfers)

    verdict = await journal.commit(poisonous)
    after = await journal.commit(funded(purse, 5))

    assert isinstance(verdict, Money)
    assert isinstance(after, Committed)
    await journal.stop()


async def test_a_listener_that_fails_neither_undoes_nor_repeats_a_commit(database_url: str, pool: asyncpg.Pool) -> None:
    def fail(*_: object) -> None:
        raise ValueError("the listener is broken")

    journal = await _writer(database_url, observe=fail)  # type: ignore[arg-type]
    journal.on_commit(fail)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    gift = single(chart.Posting.TOPUP, chart.receivable(HOME, "CNY"), chart.wallet(HOME, purse.id, "CNY"), 5)

    verdicts = await asyncio.gather(*(journal.submit(Change(home=HOME, transfers=(gift,))) for _ in range(3)))

    assert all(isinstance(verdict, Committed) for verdict in verdicts)
    assert await _balances(pool) == (0, 1015)
    await journal.stop()


async def test_a_rule_that_breaks_fails_alone_and_the_lane_goes_on(database_url: str) -> None:
    """Of any kind of exception: nobody waits for ever."""
    journal = await _writer(database_url)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    order = payment("o-1", 100, purse.id)
    committed(await journal.commit(paid(order)))

    def broken(aggregate: Aggregate, now: datetime) -> Change:
        raise AttributeError("a rule with a fault")

    answers = await asyncio.wait_for(
        asyncio.gather(
            journal.submit(Change(home=HOME, rule=Rule(PAYMENT, order.id, broken))),
            journal.submit(paid(payment("o-2", 100, purse.id))),
            return_exceptions=True,
        ),
        PATIENCE_S,
    )

    assert isinstance(answers[0], InvariantBroken)
    assert isinstance(answers[1], Committed)
    await journal.stop()


async def test_no_free_slot_answers_the_callers_and_the_lane_goes_on(database_url: str, pool: asyncpg.Pool) -> None:
    cutter = Cutter(database_url)
    journal = await _writer(await cutter.start(), settle_s=0.3)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    async with pool.acquire() as other:
        cutter.is_refusing = True
        cutter.arm(b"BEGIN", Cut.BEFORE)
        with pytest.raises(DatabaseUnreachable):
            await journal.commit(paid(payment("o-1", 100, purse.id)))
        await other.execute("SELECT pg_advisory_lock($1::integer, slot) FROM generate_series(2, 63) AS slot", SLOT_LOCK)
        await other.execute("SELECT pg_advisory_lock($1::integer, 1)", SLOT_LOCK)
        cutter.is_refusing = False

        with pytest.raises(DatabaseUnreachable):
            await asyncio.wait_for(journal.commit(paid(payment("o-1", 100, purse.id))), PATIENCE_S)

        await other.execute("SELECT pg_advisory_unlock_all()")
    assert isinstance(await _commit_once_it_is_back(journal, paid(payment("o-1", 100, purse.id))), Committed)
    await journal.stop()
    await cutter.stop()


async def test_a_slot_that_another_took_meanwhile_shows_that_the_batch_never_was(
    database_url: str, pool: asyncpg.Pool
) -> None:
    """COMMIT never arrived; before we are back, another process writes under our slot and has our batch's number."""
    cutter = Cutter(database_url)
    journal = await _writer(await cutter.start())
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    cutter.is_refusing = True
    cutter.arm(b"COMMIT\0", Cut.BEFORE)
    waiting = journal.submit(paid(payment("o-1", 100, purse.id), "k"))
    for _ in range(3000):
        if cutter.cuts:
            break
        await asyncio.sleep(0.02)
    other = await _writer(database_url)
    while other.slots != (1,):
        await other.stop()
        other = await _writer(database_url)
    committed(await other.commit(funded(wallet("u-2"), 10)))
    cutter.is_refusing = False

    assert isinstance(await asyncio.wait_for(waiting, PATIENCE_S), Committed)
    assert journal.slots == (2,)
    assert await pool.fetchval("SELECT count(*) FROM payment") == 1
    await journal.stop()
    await other.stop()
    await cutter.stop()


async def test_a_refused_change_leaves_no_overdraft_behind(database_url: str, pool: asyncpg.Pool) -> None:
    journal = await _writer(database_url)
    purse = wallet()
    committed(await journal.commit(funded(purse, 1000)))
    opening = AccountOpen(chart.payable(HOME, "CNY"), Limit.DEBITS_WITHIN_CREDITS, 500)
    refused = Change(home=HOME, opens=(opening,), done=(MessageDone(purse.id),))

    verdicts = await asyncio.gather(journal.submit(refused), journal.submit(paid(payment("o-1", 100, purse.id))))

    assert isinstance(verdicts[0], Consumed)
    assert isinstance(verdicts[1], Committed)
    assert await pool.fetchval("SELECT overdraft FROM account WHERE code = 2") == 0
    await journal.stop()


# Plain batches: judged by what is known of the accounts


async def _pay(journal: PostgresJournal, purse: Wallet, name: str, amount: int = 100) -> Verdict:
    return await journal.commit(paid(payment(name, amount, purse.id), name))


async def test_what_another_process_did_is_seen_where_it_is_not_known(database_url: str, pool: asyncpg.Pool) -> None:
    one, two = await _writer(database_url), await _writer(database_url)
    purse = wallet()
    committed(await one.commit(funded(purse, 1000)))
    committed(await _pay(one, purse, "o-1"))

    committed(await _pay(two, purse, "o-2"))
    committed(await _pay(one, purse, "o-3"))
    committed(await _pay(two, purse, "o-4"))

    assert await _balances(pool) == (0, 600)
    await _assert_sound(pool)
    await one.stop()
    await two.stop()


async def test_nobody_is_refused_by_what_is_only_known(database_url: str, pool: asyncpg.Pool) -> None:
    one, two = await _writer(database_url), await _writer(database_url)
    purse = wallet()
    committed(await one.commit(funded(purse, 100)))
    committed(await _pay(one, purse, "o-1"))
    source, account = chart.receivable(HOME, "CNY"), chart.wallet(HOME, purse.id, "CNY")
    committed(await two.commit(Change(home=HOME, transfers=(single(chart.Posting.TOPUP, source, account, 500),))))

    committed(await _pay(one, purse, "o-2", 500))
    refused = await _pay(one, purse, "o-3", 1)

    assert isinstance(refused, Money)
    assert await _balances(pool) == (0, 0)
    await one.stop()
    await two.stop()


async def test_a_limit_that_another_process_set_counts(database_url: str) -> None:
    one, two = await _writer(database_url), await _writer(database_url)
    purse = wallet()
    committed(await one.commit(funded(purse, 100)))
    committed(await _pay(one, purse, "o-1", 60))
    account = chart.wallet(HOME, purse.id, "CNY")
    committed(await two.commit(Change(home=HOME, opens=(AccountOpen(account, Limit.CREDITS_WITHIN_DEBITS),))))

    top_up = single(chart.Posting.TOPUP, chart.receivable(HOME, "CNY"), account, 500)
    refused = await one.commit(Change(home=HOME, transfers=(top_up,)))

    assert isinstance(refused, Money)
    await one.stop()
    await two.stop()


async def test_repeats_among_many_in_two_lanes_change_nothing_else(database_url: str, pool: asyncpg.Pool) -> None:
    """Each repeat makes its batch go a second time, under locks, and with it what rests on it in the other lane."""
    journal = await _writer(database_url, lanes=2)
    purses = [wallet(f"u-{number}") for number in range(5)]
    for purse in purses:
        committed(await journal.commit(funded(purse, 10_000)))
    orders = [payment(f"o-{number}", 10, purses[number % 5].id) for number in range(400)]

    async def buy(order: Payment, number: int) -> list[Verdict]:
        first = await journal.commit(paid(order, order.id))
        again = paid(payment(order.order_id, 10, order.wallet), order.id) if number % 7 == 0 else None
        return [first] if again is None else [first, await journal.commit(again)]

    verdicts = await asyncio.gather(*(buy(order, number) for number, order in enumerate(orders)))

    kinds = Counter(type(verdict) for several in verdicts for verdict in several)
    assert kinds == {Committed: 400, Again: 58}
    assert await _balances(pool) == (0, 50_000 - 4000)
    await _assert_sound(pool)
    await journal.stop()


async def test_a_plain_change_that_cannot_be_stored_fails_alone(database_url: str, pool: asyncpg.Pool) -> None:
    journal = await _writer(database_url, lanes=2)
    purse = wallet()
    committed(await journal.commit(funded(purse, 10_000)))
    names = [f"o-{number}" if number != 20 else "no\x00text" for number in range(60)]

    answers = await asyncio.wait_for(
        asyncio.gather(*(journal.submit(paid(payment(name, 100, purse.id))) for name in names), return_exceptions=True),
        PATIENCE_S,
    )

    assert [number for number, answer in enumerate(answers) if not isinstance(answer, Committed)] == [20]
    assert isinstance(answers[20], InvariantBroken)
    assert await _balances(pool) == (0, 10_000 - 5900)
    await _assert_sound(pool)
    await journal.stop()


async def test_two_lanes_of_two_processes_that_cross_keep_every_book(database_url: str, pool: asyncpg.Pool) -> None:
    writers = [await _writer(database_url, lanes=2), await _writer(database_url, lanes=2)]

    kinds = await _cross(writers, pool, seconds=4, seed=3)

    assert kinds["Committed"] > COMMITS_MIN
    await _assert_sound(pool)
    for writer in writers:
        await writer.stop()


async def _assert_sound(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection:
        report = await verify(connection, TABLES)
    assert report.is_sound, report.faults
