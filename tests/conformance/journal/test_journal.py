"""What every journal promises. Each test runs against PostgreSQL and against the memory twin."""

import asyncio
from collections import Counter
from datetime import datetime, timedelta

import msgspec

from conformance.journal.house import HOME, NOW, House, committed, funded, paid, payment, refunded, wallet
from kassa.errors import InvariantBroken, KassaError, RefundExceedsPaid
from kassa.ids import new_id
from kassa.journal.change import (
    AccountOpen,
    Again,
    Aggregate,
    Change,
    Claim,
    Committed,
    Consumed,
    Event,
    InboxDone,
    KeyReused,
    Message,
    MessageDone,
    Missing,
    Money,
    Move,
    OnceKey,
    Refused,
    Reply,
    Rule,
    Stale,
    Taken,
    Timer,
    TimerDone,
)  # fmt: skip
from kassa.ledger import chart
from kassa.ledger.model import (
    AccountMissing,
    HoldKey,
    HoldRefused,
    InsufficientFunds,
    Limit,
    hold,
    release,
    settle,
    single,
)
from kassa.payments.records import PAYMENT, Payment


async def test_all_of_a_change_is_there(house: House) -> None:
    purse = wallet()
    committed(await house.journal.commit(funded(purse, 1000)))
    order = payment("o-1", 100, purse.id)

    verdict = committed(await house.journal.commit(paid(order)))

    assert verdict.result == order.id
    assert (await house.row(order)).state == "succeeded"
    assert (await house.row(order)).sequence == 1
    assert await house.balance(chart.wallet(HOME, purse.id, "CNY")) == (900, 0, 2)
    assert await house.balance(chart.payable(HOME, "CNY")) == (100, 0, 1)
    assert await house.events(order.id) == [(1, "payment.succeeded")]


async def test_nothing_of_a_refused_change_is_there(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 50))
    order = payment("o-1", 100, purse.id)

    verdict = await house.journal.commit(paid(order, "k"))

    assert isinstance(verdict, Money) and isinstance(verdict.refusal, InsufficientFunds)
    assert verdict.refusal.available == 50
    assert await house.row(order) is None
    assert await house.events(order.id) == []
    assert await house.balance(chart.wallet(HOME, purse.id, "CNY")) == (50, 0, 1)
    assert await house.count("once") == 0


async def test_the_order_number_of_a_refused_change_stays_free(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 150))

    refused = await house.journal.commit(paid(payment("o-1", 200, purse.id)))
    taken = await house.journal.commit(paid(payment("o-1", 100, purse.id)))

    assert isinstance(refused, Money)
    assert isinstance(taken, Committed)


async def test_a_wallet_that_does_not_exist_cannot_pay(house: House) -> None:
    verdict = await house.journal.commit(paid(payment("o-1", 100, new_id())))

    assert isinstance(verdict, Money) and isinstance(verdict.refusal, AccountMissing)


async def test_the_same_key_in_one_batch_has_one_effect(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    changes = [paid(payment("o-1", 100, purse.id), "k") for _ in range(5)]

    verdicts = await asyncio.gather(*(house.journal.submit(change) for change in changes))

    assert Counter(type(verdict) for verdict in verdicts) == {Committed: 1, Again: 4}
    first = next(verdict for verdict in verdicts if isinstance(verdict, Committed))
    assert {verdict.reply for verdict in verdicts if isinstance(verdict, Again)} == {Reply(201, first.result)}
    assert await house.balance(chart.wallet(HOME, purse.id, "CNY")) == (900, 0, 2)


async def test_the_same_key_in_two_batches_has_one_effect(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    first = payment("o-1", 100, purse.id)
    committed(await house.journal.commit(paid(first, "k")))

    verdict = await house.journal.commit(paid(payment("o-1", 100, purse.id), "k"))

    assert verdict == Again(Reply(201, first.id))
    assert await house.balance(chart.wallet(HOME, purse.id, "CNY")) == (900, 0, 2)


async def test_another_body_under_the_key_is_refused(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    together = await asyncio.gather(
        house.journal.submit(paid(payment("o-1", 100, purse.id), "k", b"one")),
        house.journal.submit(paid(payment("o-2", 100, purse.id), "k", b"two")),
    )
    later = await house.journal.commit(paid(payment("o-3", 100, purse.id), "k", b"three"))

    assert isinstance(together[0], Committed)
    assert isinstance(together[1], KeyReused)
    assert isinstance(later, KeyReused)


async def test_a_refused_first_answer_is_repeated(house: House) -> None:
    """The caller stores a judged refusal under the key with a change of its own; a repeat gets it as it was."""
    once = OnceKey("api", "k", b"d")
    committed(await house.journal.commit(Change(home=HOME, once=once, reply=Reply(402, None, b'{"code":"x"}'))))

    verdict = await house.journal.commit(Change(home=HOME, once=once, reply=Reply(201, new_id())))

    assert verdict == Again(Reply(402, None, b'{"code":"x"}'))


async def test_keys_of_two_homes_do_not_meet(house: House) -> None:
    once = OnceKey("api", "k", b"d")

    here = await house.journal.commit(Change(home=HOME, once=once, reply=Reply(201, None)))
    there = await house.journal.commit(Change(home=HOME + 1, once=once, reply=Reply(201, None)))

    assert isinstance(here, Committed) and isinstance(there, Committed)


async def test_an_order_number_is_taken_once(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    orders = [payment("o-1", 100, purse.id) for _ in range(3)]

    verdicts = await asyncio.gather(*(house.journal.submit(paid(order, order.id)) for order in orders))

    assert isinstance(verdicts[0], Committed)
    for verdict in verdicts[1:]:
        assert isinstance(verdict, Taken)
        assert verdict.by == orders[0].id
    assert await house.count("payment") == 1
    assert await house.count("once") == 1


async def test_a_hundred_refunds_in_one_batch_get_through_as_far_as_they_fit(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    order = payment("o-1", 1000, purse.id)
    await house.journal.commit(paid(order))

    verdicts = await asyncio.gather(*(house.journal.submit(refunded(order, 15)) for _ in range(100)))

    assert Counter(type(verdict) for verdict in verdicts) == {Committed: 66, Refused: 34}
    assert all(isinstance(v.error, RefundExceedsPaid) for v in verdicts if isinstance(v, Refused))
    assert (await house.row(order)).amount_refunded == 990
    assert await house.balance(chart.payable(HOME, "CNY")) == (10, 0, 67)
    assert [sequence for sequence, _ in await house.events(order.id)] == list(range(1, 68))


async def test_a_hundred_refunds_in_ten_batches_get_through_as_far_as_they_fit(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    order = payment("o-1", 1000, purse.id)
    await house.journal.commit(paid(order))
    kinds: Counter[type] = Counter()

    for _ in range(10):
        verdicts = await asyncio.gather(*(house.journal.submit(refunded(order, 15)) for _ in range(10)))
        kinds.update(type(verdict) for verdict in verdicts)

    assert kinds == {Committed: 66, Refused: 34}
    assert (await house.row(order)).amount_refunded == 990
    assert (await house.row(order)).version == 66


async def test_a_rule_that_the_ledger_refuses_leaves_the_root_as_it_was(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    order = payment("o-1", 100, purse.id)
    await house.journal.commit(paid(order))
    rich = refunded(order, 60)

    verdicts = await asyncio.gather(
        house.journal.submit(rich),
        house.journal.submit(_without_money(order)),
        house.journal.submit(refunded(order, 40)),
    )

    assert isinstance(verdicts[0], Committed)
    assert isinstance(verdicts[1], Money)
    assert isinstance(verdicts[2], Committed)
    assert (await house.row(order)).amount_refunded == 100


def _without_money(order: Payment) -> Change:
    """A refund that asks the ledger for more than the merchant has."""
    rule = refunded(order, 10).rule
    if rule is None:
        raise AssertionError("a refund is decided under the lock")
    inner = rule.decide

    def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
        change = inner(aggregate, now)
        if isinstance(change, KassaError):
            return change
        return msgspec.structs.replace(change, transfers=tuple(t._replace(amount=10**9) for t in change.transfers))

    return Change(home=HOME, rule=Rule(PAYMENT, order.id, decide))


async def test_a_rule_on_a_root_of_another_home_finds_nothing(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    order = payment("o-1", 1000, purse.id)
    await house.journal.commit(paid(order))
    foreign = msgspec.structs.replace(refunded(order, 10), home=HOME + 1)

    verdict = await house.journal.commit(foreign)

    assert isinstance(verdict, Missing)
    assert (await house.row(order)).amount_refunded == 0


async def test_a_stale_move_is_refused(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 1000))
    order = payment("o-1", 1000, purse.id)
    await house.journal.commit(paid(order))
    seen = await house.row(order)
    held = Change(home=HOME, moves=(Move(seen, msgspec.structs.replace(seen, state="held"), "hold"),))

    first = await house.journal.commit(held)
    second = await house.journal.commit(held)

    assert isinstance(first, Committed)
    assert second == Stale("payment", order.id)
    assert (await house.row(order)).version == 1


async def test_a_poisonous_change_fails_alone(house: House) -> None:
    """A change that cannot be stored never takes the ninety-nine others of its batch with it."""
    purse = wallet()
    await house.journal.commit(funded(purse, 10_000))
    changes = [paid(payment(f"o-{number}", 100, purse.id)) for number in range(100)]
    record = payment("poison", 100, purse.id)
    changes[50] = Change(
        home=HOME, new=(record,), root=record.id, events=(Event("payment.succeeded", b"{}"), Event("x", b"{}")),
        moves=(Move(record, msgspec.structs.replace(record, amount=5), "corrupt"),),
    )  # fmt: skip

    answers = await asyncio.gather(*(_answer(house, change) for change in changes))

    assert sum(isinstance(answer, Committed) for answer in answers) == 99
    assert isinstance(answers[50], Stale | InvariantBroken)
    assert await house.balance(chart.wallet(HOME, purse.id, "CNY")) == (100, 0, 100)


async def _answer(house: House, change: Change) -> object:
    try:
        return await house.journal.submit(change)
    except InvariantBroken as error:
        return error


async def test_a_message_is_consumed_once(house: House) -> None:
    letter = Message(new_id(), "topic", "key", b"{}")
    committed(await house.journal.commit(Change(home=HOME, messages=(letter,))))
    assert await house.messages() == [letter.id]
    handled = Change(home=HOME, done=(MessageDone(letter.id),))

    together = await asyncio.gather(house.journal.submit(handled), house.journal.submit(handled))
    later = await house.journal.commit(handled)

    assert [type(verdict) for verdict in together] == [Committed, Consumed]
    assert later == Consumed(MessageDone(letter.id))
    assert await house.messages() == []


async def test_a_broker_record_is_handled_once_per_group(house: House) -> None:
    one, other = InboxDone("shipping", "r-1"), InboxDone("billing", "r-1")

    verdicts = [await house.journal.commit(Change(home=HOME, done=(done,))) for done in (one, one, other)]

    assert [type(verdict) for verdict in verdicts] == [Committed, Consumed, Committed]


async def test_a_timer_that_is_set_twice_is_one_timer(house: House) -> None:
    entity = new_id()
    for minutes in (1, 2):
        due = NOW + timedelta(minutes=minutes)
        committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "query", due),))))

    timers = await house.timers()

    assert [(entity, "query")] == [timer[:2] for timer in timers]


async def test_a_cancelled_timer_is_gone(house: House) -> None:
    entity = new_id()
    committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "query", NOW),))))
    committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "query", None),))))

    assert await house.timers() == []


async def test_a_timer_that_fired_late_and_was_set_again_is_not_acted_on(house: House) -> None:
    entity = new_id()
    committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "query", NOW),))))
    [(_, _, old)] = await house.timers()
    committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "query", NOW),))))
    [(_, _, new)] = await house.timers()

    late = await house.journal.commit(Change(home=HOME, done=(TimerDone(entity, "query", old),)))
    right = await house.journal.commit(Change(home=HOME, done=(TimerDone(entity, "query", new),)))

    assert isinstance(late, Consumed)
    assert isinstance(right, Committed)
    assert await house.timers() == []


async def test_a_timer_may_be_set_again_by_the_change_that_acts_on_it(house: House) -> None:
    entity = new_id()
    committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "query", NOW),))))
    [(_, _, generation)] = await house.timers()

    again = Change(home=HOME, done=(TimerDone(entity, "query", generation),), timers=(Timer(entity, "query", NOW),))
    verdict = await house.journal.commit(again)

    assert isinstance(verdict, Committed)
    [(_, _, later)] = await house.timers()
    assert later != generation


async def test_a_hold_is_settled_or_released_once(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 100))
    key = HoldKey(new_id(), 0)
    account, other = chart.wallet(HOME, purse.id, "CNY"), chart.payable(HOME, "CNY")
    reserved = await house.journal.commit(Change(home=HOME, transfers=(hold(1, account, other, 80, key),)))
    assert isinstance(reserved, Committed)
    assert await house.balance(account) == (100, 80, 2)

    too_much = await house.journal.commit(
        Change(home=HOME, transfers=(hold(1, account, other, 21, HoldKey(key.id, 1)),))
    )
    both = await asyncio.gather(
        house.journal.submit(Change(home=HOME, transfers=(settle(1, key, 30),))),
        house.journal.submit(Change(home=HOME, transfers=(release(1, key),))),
    )

    assert isinstance(too_much, Money)
    assert isinstance(both[0], Committed)
    assert isinstance(both[1], Money) and isinstance(both[1].refusal, HoldRefused)
    assert await house.balance(account) == (70, 0, 3)
    assert await house.balance(other) == (30, 0, 2)


async def test_a_hold_that_expired_cannot_be_settled(house: House) -> None:
    purse = wallet()
    await house.journal.commit(funded(purse, 100))
    key = HoldKey(new_id(), 0)
    account, other = chart.wallet(HOME, purse.id, "CNY"), chart.payable(HOME, "CNY")
    past = NOW - timedelta(days=300)
    committed(await house.journal.commit(Change(home=HOME, transfers=(hold(1, account, other, 80, key, past),))))

    settled = await house.journal.commit(Change(home=HOME, transfers=(settle(1, key),)))
    released = await house.journal.commit(Change(home=HOME, transfers=(release(1, key),)))

    assert isinstance(settled, Money)
    assert isinstance(released, Committed)
    assert await house.balance(account) == (100, 0, 3)


async def test_a_claim_alone_names_what_has_it(house: House) -> None:
    resource = new_id()
    claim = Claim("refund", "r-1", resource)
    committed(await house.journal.commit(Change(home=HOME, claims=(claim,))))

    verdict = await house.journal.commit(Change(home=HOME, claims=(claim._replace(resource=new_id()),)))

    assert isinstance(verdict, Taken) and verdict.by == resource


async def test_a_rule_that_needs_more_after_an_earlier_change_of_its_batch_gets_it(house: House) -> None:
    """Its record, hold and accounts were not looked for, because the rule would have refused before; that is no refusal."""
    purse = wallet()
    committed(await house.journal.commit(funded(purse, 1000)))
    order = payment("o-1", 100, purse.id)
    committed(await house.journal.commit(paid(order)))
    key = HoldKey(order.id, 9)
    reserve = hold(chart.Posting.REFUND, chart.wallet(HOME, purse.id, "CNY"), chart.payable(HOME, "CNY"), 7, key)
    committed(await house.journal.commit(Change(home=HOME, transfers=(reserve,))))

    def first(aggregate: Aggregate, now: datetime) -> Change:
        after = msgspec.structs.replace(aggregate.root, state="closed")
        return Change(home=HOME, moves=(Move(aggregate.root, after, "closed"),))

    def second(aggregate: Aggregate, now: datetime) -> Change | KassaError:
        if getattr(aggregate.root, "state", "") != "closed":
            return RefundExceedsPaid()
        return Change(home=HOME, transfers=(settle(chart.Posting.REFUND, key),))

    done = InboxDone("group", "record-1")
    verdicts = await asyncio.gather(
        house.journal.submit(Change(home=HOME, rule=Rule(PAYMENT, order.id, first))),
        house.journal.submit(Change(home=HOME, rule=Rule(PAYMENT, order.id, second), done=(done,))),
    )

    assert [type(verdict) for verdict in verdicts] == [Committed, Committed]
    assert await house.balance(chart.wallet(HOME, purse.id, "CNY")) == (893, 0, 4)


async def test_a_timer_that_was_set_again_in_the_same_batch_is_not_acted_on(house: House) -> None:
    entity = new_id()
    committed(await house.journal.commit(Change(home=HOME, timers=(Timer(entity, "t", NOW),))))
    [(_, _, generation)] = await house.timers()

    verdicts = await asyncio.gather(
        house.journal.submit(Change(home=HOME, timers=(Timer(entity, "t", NOW + timedelta(hours=1)),))),
        house.journal.submit(Change(home=HOME, done=(TimerDone(entity, "t", generation),))),
    )

    assert [type(verdict) for verdict in verdicts] == [Committed, Consumed]
    assert len(await house.timers()) == 1


async def test_an_overdraft_that_a_change_brings_counts_for_its_own_transfers(house: House) -> None:
    purse = wallet()
    committed(await house.journal.commit(funded(purse, 100)))
    order = payment("o-1", 100, purse.id)
    committed(await house.journal.commit(paid(order)))
    account = chart.payable(HOME, "CNY")
    spend = single(1, account, chart.fee_income(HOME, "CNY"), 130)
    wide, narrow = (AccountOpen(account, Limit.DEBITS_WITHIN_CREDITS, overdraft) for overdraft in (50, 20))

    refused = await house.journal.commit(Change(home=HOME, opens=(narrow,), transfers=(spend,)))
    still = await house.journal.commit(Change(home=HOME, transfers=(spend._replace(amount=101),)))
    taken = await house.journal.commit(Change(home=HOME, opens=(wide,), transfers=(spend,)))
    later = await house.journal.commit(Change(home=HOME, transfers=(spend._replace(amount=20),)))

    assert isinstance(refused, Money) and isinstance(still, Money)
    assert isinstance(taken, Committed) and isinstance(later, Committed)
    assert (await house.balance(account))[0] == -50
