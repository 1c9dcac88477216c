"""The edge cases of docs/reference/edge-cases.md that payments decide about, each with its number in the name."""

from datetime import timedelta

import msgspec
import pytest

from kassa.channels.model import Evidence, Succeeded, Unknown
from kassa.errors import (
    AmountInvalid,
    AttemptInDoubt,
    PaymentNotClosable,
    PaymentNotHeld,
    RefundExceedsPaid,
    RefundNotRefundable,
)
from kassa.ids import Id, new_id
from kassa.journal.change import Claim, Committed, Money, Taken
from kassa.ledger import chart
from kassa.payments import model
from kassa.payments.draft import ATTEMPT_TIMER, EXPIRE_TIMER, LATE_TIMER, REFUND_TIMER, Operation
from unit.payments.house import (
    ABNORMAL,
    CLOSED,
    HOME,
    LOST,
    NOT_FOUND,
    NOT_PAID,
    NOT_SENT,
    QR,
    REFUSED,
    SIGNED,
    World,
    paid,
)


def test_edge_01_success_after_the_close_waits_in_suspense_and_goes_back_by_policy() -> None:
    world = World(late_success="refund")
    payment_id, attempt_id = world.closed()

    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())
    assert world.payment(payment_id).state == "late_succeeded"
    assert world.books == {"receivable": -100, "suspense": 100}
    assert world.timer(payment_id, LATE_TIMER) == timedelta(0)

    world.apply_late_policy(payment_id)
    (refund,) = world.refunds_of(payment_id)
    assert (world.payment(payment_id).state, refund.cause, refund.state) == ("late_refunding", "late", "reserved")
    world.look_at_refund(payment_id, refund.id)
    world.says_of_refund(payment_id, refund.id, Operation.REFUND, paid(channel_id="r-1"))

    assert world.payment(payment_id).state == "late_refunded"
    assert world.payment(payment_id).amount_refunded == 0
    assert world.books == {}
    assert world.events(payment_id) == [
        "payment.processing", "payment.closed", "payment.late_succeeded", "payment.late_refunding", "refund.created",
        "refund.succeeded", "payment.late_refunded",
    ]  # fmt: skip


def test_edge_01_success_after_the_close_is_accepted_by_policy() -> None:
    world = World(late_success="accept")
    payment_id, attempt_id = world.closed()

    world.says(payment_id, attempt_id, Operation.QUERY, paid())
    world.apply_late_policy(payment_id)

    assert world.payment(payment_id).state == "succeeded"
    assert world.books == {"receivable": -100, "payable": 99, "fee": 1}
    assert world.event_data(payment_id, "payment.succeeded")["state"] == "succeeded"


@pytest.mark.parametrize(("decision", "state"), [("accept", "succeeded"), ("refund", "late_refunding")])
def test_edge_01_held_late_money_is_left_by_a_person_only(decision: str, state: str) -> None:
    world = World(late_success="hold")
    payment_id, attempt_id = world.closed()
    world.says(payment_id, attempt_id, Operation.QUERY, paid())

    world.apply_late_policy(payment_id)
    assert world.payment(payment_id).state == "held"
    world.apply_late_policy(payment_id)
    assert world.payment(payment_id).state == "held"
    world.resolve(payment_id, decision)

    assert world.payment(payment_id).state == state
    assert [row.text for row in world.exchanges_of(payment_id) if row.operation == "resolve"] == ["asked by phone"]


def test_edge_01_a_late_refund_that_fails_is_held_and_may_be_tried_again() -> None:
    world = World(late_success="refund")
    payment_id, attempt_id = world.closed()
    world.says(payment_id, attempt_id, Operation.QUERY, paid())
    world.apply_late_policy(payment_id)
    (refund,) = world.refunds_of(payment_id)
    world.look_at_refund(payment_id, refund.id)

    world.says_of_refund(payment_id, refund.id, Operation.REFUND_QUERY, REFUSED)
    assert world.payment(payment_id).state == "held"
    assert world.books == {"receivable": -100, "suspense": 100}
    world.resolve(payment_id, "refund")

    assert world.payment(payment_id).state == "late_refunding"
    assert world.held == 100


def test_edge_02_closed_at_the_channel_first_and_paid_wins() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()

    decided = world.done(world.close(payment_id))
    assert (world.payment(payment_id).state, world.attempt(attempt_id).state) == ("closing", "pending_payer")
    assert decided.act is None
    looked = world.look(payment_id, attempt_id)
    assert looked.act is not None
    assert looked.act.operation is Operation.CLOSE
    told = world.says(payment_id, attempt_id, Operation.CLOSE, Unknown(SIGNED, "ORDER_PAID"))
    assert told.act is not None
    assert told.act.operation is Operation.QUERY
    world.says(payment_id, attempt_id, Operation.QUERY, paid())

    assert world.payment(payment_id).state == "succeeded"
    assert world.payment(payment_id).closed_at is None


def test_edge_02_an_unknown_attempt_keeps_the_payment_closing() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    world.says(payment_id, attempt_id, Operation.CREATE, LOST)

    world.close(payment_id)
    world.says(payment_id, attempt_id, Operation.QUERY, LOST)
    world.says(payment_id, attempt_id, Operation.QUERY, NOT_FOUND)
    assert (world.payment(payment_id).state, world.attempt(attempt_id).state) == ("closing", "unknown")

    world.clock.advance(900 + 600)
    world.says(payment_id, attempt_id, Operation.QUERY, NOT_FOUND)
    assert (world.payment(payment_id).state, world.attempt(attempt_id).state) == ("closed", "closed")


def test_edge_02_what_is_paid_cannot_be_closed() -> None:
    world = World()
    payment_id = world.succeeded()

    assert isinstance(world.close(payment_id), PaymentNotClosable)


def test_edge_03_an_identical_callback_changes_nothing_and_is_taken() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()
    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())
    entries, events = len(world.journal.entries), len(world.journal.events)

    decided = world.says(payment_id, attempt_id, Operation.CALLBACK, paid())

    assert decided.accepted
    assert (len(world.journal.entries), len(world.journal.events)) == (entries, events)


@pytest.mark.parametrize(
    "words", [paid(99), paid(100, "USD"), Succeeded(SIGNED, "t-1"), paid(100, channel_id="t-other")]
)
def test_edge_04_a_callback_that_does_not_fit_after_success_is_quarantined(words: Succeeded) -> None:
    world = World()
    payment_id, attempt_id = world.waiting()
    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())

    decided = world.says(payment_id, attempt_id, Operation.CALLBACK, words)

    assert not decided.accepted
    assert world.books == {"receivable": -100, "payable": 99, "fee": 1}
    assert world.exchanges_of(payment_id)[-1].state == "quarantined"


@pytest.mark.parametrize("operation", [Operation.CALLBACK, Operation.QUERY])
def test_edge_04_a_wrong_amount_never_moves_money(operation: Operation) -> None:
    world = World()
    payment_id, attempt_id = world.waiting()

    decided = world.says(payment_id, attempt_id, operation, paid(1))

    assert not decided.accepted
    assert world.payment(payment_id).state == "processing"
    assert world.attempt(attempt_id).state == "pending_payer"
    assert world.books == {}


def test_edge_04_an_unsigned_success_never_moves_money() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()

    decided = world.says(
        payment_id, attempt_id, Operation.QUERY, Succeeded(Evidence("query", authentic=False), "t-1", 100, "CNY")
    )

    assert not decided.accepted
    assert world.books == {}


def test_edge_05_a_callback_before_our_own_answer_is_stored_finds_the_attempt() -> None:
    world = World()
    payment_id, attempt_id = world.create()

    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())
    world.says(payment_id, attempt_id, Operation.CREATE, QR)

    assert (world.payment(payment_id).state, world.attempt(attempt_id).state) == ("succeeded", "succeeded")


@pytest.mark.parametrize("late_words", [QR, LOST, REFUSED, NOT_SENT, CLOSED, NOT_FOUND])
def test_edge_06_an_older_answer_never_overwrites_a_success(late_words: object) -> None:
    world = World()
    payment_id, attempt_id = world.create()
    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())
    before = world.attempt(attempt_id)

    world.says(payment_id, attempt_id, Operation.CREATE, late_words)  # type: ignore[arg-type]

    assert world.attempt(attempt_id) == before
    assert world.books == {"receivable": -100, "payable": 99, "fee": 1}


def test_edge_07_two_channels_paid_the_second_goes_to_suspense_and_back() -> None:
    world = World()
    payment_id, first = world.waiting()
    second = world.done(world.add_attempt(payment_id)).attempts[-1].id
    world.says(payment_id, second, Operation.CREATE, QR)

    world.says(payment_id, first, Operation.CALLBACK, paid())
    assert world.timer(second, ATTEMPT_TIMER) == timedelta(0)
    world.says(payment_id, second, Operation.CALLBACK, paid(channel_id="t-2"))
    assert world.attempt(second).state == "duplicate_paid"
    assert world.books == {"receivable": -200, "payable": 99, "fee": 1, "suspense": 100}
    (refund,) = world.refunds_of(payment_id)
    assert (refund.cause, refund.attempt) == ("duplicate", second)
    world.look_at_refund(payment_id, refund.id)
    world.says_of_refund(payment_id, refund.id, Operation.REFUND, paid(channel_id="r-1"))

    assert world.books == {"receivable": -100, "payable": 99, "fee": 1}
    assert world.payment(payment_id).amount_refunded == 0
    assert "payment.duplicate_paid" in world.events(payment_id)


def _duplicate_that_cannot_be_given_back() -> tuple[World, Id, Id]:
    world = World()
    payment_id, first = world.waiting()
    second = world.done(world.add_attempt(payment_id)).attempts[-1].id
    world.says(payment_id, second, Operation.CREATE, QR)
    world.says(payment_id, first, Operation.CALLBACK, paid())
    world.says(payment_id, second, Operation.CALLBACK, paid(channel_id="t-2"))
    (refund,) = world.refunds_of(payment_id)
    world.look_at_refund(payment_id, refund.id)
    world.says_of_refund(payment_id, refund.id, Operation.REFUND, REFUSED)
    return world, payment_id, refund.id


def test_edge_07_a_duplicate_that_cannot_be_given_back_waits_for_a_person_who_tries_again() -> None:
    world, payment_id, refund_id = _duplicate_that_cannot_be_given_back()
    assert world.books == {"receivable": -200, "payable": 99, "fee": 1, "suspense": 100}
    assert (world.refund_row(refund_id).state, world.refund_row(refund_id).doubt_since) == ("failed", world.now)
    assert "payment.duplicate_held" in world.events(payment_id)

    world.done(world.resolve(payment_id, "refund"))

    assert world.refund_row(refund_id).doubt_since is None
    again = world.refunds_of(payment_id)[-1]
    assert (again.cause, again.state, again.attempt) == ("duplicate", "reserved", world.refund_row(refund_id).attempt)
    world.look_at_refund(payment_id, again.id)
    world.says_of_refund(payment_id, again.id, Operation.REFUND, paid(channel_id="r-2"))
    assert world.books == {"receivable": -100, "payable": 99, "fee": 1}
    assert isinstance(world.resolve(payment_id, "refund"), PaymentNotHeld)


def test_edge_07_a_duplicate_that_cannot_be_given_back_may_be_accepted_once() -> None:
    world, payment_id, refund_id = _duplicate_that_cannot_be_given_back()

    world.done(world.resolve(payment_id, "accept"))

    assert world.books == {"receivable": -200, "payable": 198, "fee": 2}
    assert world.refund_row(refund_id).doubt_since is None
    assert "payment.duplicate_accepted" in world.events(payment_id)
    assert isinstance(world.resolve(payment_id, "accept"), PaymentNotHeld)


def test_edge_08_refunds_fit_or_are_refused_and_doubt_counts_as_used() -> None:
    world = World()
    payment_id = world.succeeded(100)
    first = world.refund(payment_id, 60)
    world.says_of_refund(payment_id, first, Operation.REFUND, LOST)

    assert world.refund_row(first).state == "unknown"
    assert isinstance(world.ask_refund(payment_id, 41), RefundExceedsPaid)
    second = world.refund(payment_id, 40)
    assert world.refund_row(second).state == "reserved"
    assert isinstance(world.ask_refund(payment_id, 1), RefundExceedsPaid)


def test_edge_08_of_a_hundred_refunds_in_one_batch_those_that_fit_get_through() -> None:
    world = World()
    wallet_id = world.wallet(1000)
    payment_id, verdict = world.pay_from_wallet(wallet_id, 1000)
    assert isinstance(verdict, Committed)

    taken = sum(not isinstance(world.ask_refund(payment_id, 30), Exception) for _ in range(100))

    assert taken == 33
    assert world.payment(payment_id).amount_refunded == 990


def test_edge_09_a_lost_refund_is_sent_again_under_its_own_number_only() -> None:
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 30)
    command = world.refund_row(refund_id).request
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, LOST)

    looked = world.look_at_refund(payment_id, refund_id)
    assert looked.act is not None
    assert looked.act.operation is Operation.REFUND_QUERY
    again = world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, NOT_FOUND)
    assert again.act is not None
    assert again.act.operation is Operation.REFUND
    assert again.act.subject.id == refund_id
    assert again.act.subject.request == command
    # A refusal of the repeat says nothing about the first sending.
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, REFUSED)
    assert world.refund_row(refund_id).state == "unknown"

    world.clock.advance(1000)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, NOT_FOUND)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, REFUSED)
    assert world.refund_row(refund_id).state == "failed"
    assert world.payment(payment_id).amount_refunding == 0


def test_edge_09_a_refusal_is_no_proof_while_the_sending_before_it_may_still_arrive() -> None:
    """Found by the simulator: the second of three sendings was on its way for minutes, and the third one refused."""
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 30)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, LOST)
    world.clock.advance(590)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, NOT_FOUND)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, LOST)
    world.clock.advance(30)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, NOT_FOUND)

    world.says_of_refund(payment_id, refund_id, Operation.REFUND, REFUSED)
    assert world.refund_row(refund_id).state == "unknown"

    world.clock.advance(700)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, NOT_FOUND)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, REFUSED)
    assert world.refund_row(refund_id).state == "failed"


def test_edge_10_a_reversed_refund_can_be_refunded_again_and_a_full_one_ends_at_zero() -> None:
    world = World()
    payment_id = world.succeeded(1000)
    refund_id = world.refund(payment_id, 1000)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, paid(1000))
    assert world.books == {}

    world.says_of_refund(payment_id, refund_id, Operation.CALLBACK, ABNORMAL)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, ABNORMAL)
    assert world.refund_row(refund_id).state == "reversed"
    assert world.payment(payment_id).amount_refunded == 0
    assert world.books == {"receivable": -1000, "payable": 994, "fee": 6}
    world.clock.advance(120)
    again = world.refund(payment_id, 1000)
    world.says_of_refund(payment_id, again, Operation.REFUND, paid(1000))

    assert world.books == {}


def test_edge_10_a_callback_that_was_overtaken_reverses_nothing_until_the_channel_is_asked() -> None:
    """Abnormal, then succeeded at the channel; its callbacks come the other way round. Found by the simulator."""
    world = World()
    payment_id = world.succeeded(1000)
    refund_id = world.refund(payment_id, 1000)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, paid(1000))

    decided = world.says_of_refund(payment_id, refund_id, Operation.CALLBACK, ABNORMAL)

    assert world.refund_row(refund_id).state == "succeeded"
    assert decided.act is not None and decided.act.operation is Operation.REFUND_QUERY
    assert world.timer(refund_id, REFUND_TIMER) is not None
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, LOST)
    assert world.timer(refund_id, REFUND_TIMER) is not None
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, paid(1000))
    assert (world.refund_row(refund_id).state, world.timer(refund_id, REFUND_TIMER)) == ("succeeded", None)
    assert world.books == {}


def test_edge_10_success_that_is_older_than_the_reversal_is_asked_after_first() -> None:
    """Succeeded, then reversed at the channel; we hear of the reversal first. Found by the simulator."""
    world = World()
    payment_id = world.succeeded(1000)
    refund_id = world.refund(payment_id, 1000)
    world.says_of_refund(payment_id, refund_id, Operation.CALLBACK, ABNORMAL)

    decided = world.says_of_refund(payment_id, refund_id, Operation.CALLBACK, paid(1000))

    assert world.refund_row(refund_id).state == "abnormal"
    assert decided.act is not None and decided.act.operation is Operation.REFUND_QUERY
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, ABNORMAL)
    assert world.refund_row(refund_id).state == "abnormal"
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, paid(1000))
    assert world.refund_row(refund_id).state == "succeeded"


def test_edge_10_an_abnormal_refund_keeps_its_reservation_until_a_person_has_acted() -> None:
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 30)

    world.says_of_refund(payment_id, refund_id, Operation.CALLBACK, ABNORMAL)
    assert world.refund_row(refund_id).state == "abnormal"
    assert world.held == 30
    assert world.timer(refund_id, REFUND_TIMER) is not None
    world.says_of_refund(payment_id, refund_id, Operation.REFUND_QUERY, paid(30))

    assert world.refund_row(refund_id).state == "succeeded"
    assert world.held == 0


def test_edge_11_a_closed_trade_never_undoes_a_success() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()
    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())

    world.says(payment_id, attempt_id, Operation.CALLBACK, CLOSED)

    assert world.payment(payment_id).state == "succeeded"
    assert world.attempt(attempt_id).state == "succeeded"


@pytest.mark.parametrize("amount", [0, -1, 9_007_199_254_740_992, 2**63])
def test_edge_12_amounts_out_of_bounds_are_refused(amount: int) -> None:
    world = World()

    with pytest.raises(AmountInvalid):
        world.create(amount=amount)
    with pytest.raises(AmountInvalid):
        world.pay_from_wallet(new_id(), amount)
    assert isinstance(world.ask_refund(world.succeeded(), amount), AmountInvalid | RefundExceedsPaid)


def test_edge_13_a_wallet_holds_one_currency_and_nothing_is_assumed() -> None:
    world = World()
    wallet_id = world.wallet(1000)

    _, verdict = world.pay_from_wallet(wallet_id, 10, currency="JPY")

    assert isinstance(verdict, Money)


@pytest.mark.parametrize("words", [LOST, Unknown(SIGNED, "HTTP 500"), Unknown(SIGNED, "the answer is not readable")])
def test_edge_15_what_cannot_be_read_is_unknown_and_asked_after(words: Unknown) -> None:
    world = World()
    payment_id, attempt_id = world.create()

    world.says(payment_id, attempt_id, Operation.CREATE, words)

    assert world.attempt(attempt_id).state == "unknown"
    assert world.payment(payment_id).state == "processing"
    assert world.timer(attempt_id, ATTEMPT_TIMER) is not None
    assert "payment.unknown" in world.events(payment_id)
    assert isinstance(world.add_attempt(payment_id), AttemptInDoubt)


def test_edge_16_a_payer_who_is_still_typing_is_waited_for_with_longer_pauses() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()
    pauses = []

    for _ in range(5):
        pauses.append(world.timer(attempt_id, ATTEMPT_TIMER))
        world.says(payment_id, attempt_id, Operation.QUERY, NOT_PAID)

    assert pauses == [timedelta(seconds=seconds) for seconds in (5, 10, 30, 60, 300)]
    assert world.attempt(attempt_id).state == "pending_payer"


def test_edge_21_events_of_one_payment_are_counted_without_gaps_and_in_order() -> None:
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 100)
    world.says_of_refund(payment_id, refund_id, Operation.REFUND, paid(100))

    mine = [event for event in world.journal.events if event.root == payment_id]
    assert [event.sequence for event in mine] == [1, 2, 3, 4]
    assert [event.type for event in mine] == [
        "payment.processing", "payment.succeeded", "refund.created", "refund.succeeded"
    ]  # fmt: skip


def test_edge_23_a_worker_that_died_after_sending_asks_before_it_says_anything_again() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    assert world.attempt(attempt_id).state == "sending"
    assert world.timer(attempt_id, ATTEMPT_TIMER) == timedelta(seconds=30)
    request = world.attempt(attempt_id).request

    looked = world.look(payment_id, attempt_id)
    assert looked.act is not None
    assert looked.act.operation is Operation.QUERY
    told = world.says(payment_id, attempt_id, Operation.QUERY, NOT_PAID)

    # It is there and not paid: the identical bytes bring back what the payer needs.
    assert told.act is not None
    assert told.act.operation is Operation.CREATE
    assert told.act.subject.request == request
    assert model.read_charge(world.attempt(attempt_id)).repeat
    world.says(payment_id, attempt_id, Operation.CREATE, QR)
    assert world.attempt(attempt_id).state == "pending_payer"


def test_edge_23_a_refund_that_was_being_sent_is_asked_after_first() -> None:
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 10)
    assert world.refund_row(refund_id).state == "sending"

    looked = world.look_at_refund(payment_id, refund_id)

    assert looked.act is not None
    assert looked.act.operation is Operation.REFUND_QUERY


def test_edge_24_two_workers_that_drive_the_same_attempt_have_one_effect() -> None:
    world = World()
    payment_id, attempt_id = world.create()

    for _ in range(2):
        world.says(payment_id, attempt_id, Operation.QUERY, paid())

    assert world.books == {"receivable": -100, "payable": 99, "fee": 1}
    assert world.events(payment_id).count("payment.succeeded") == 1


def test_edge_29_the_same_order_is_taken_once() -> None:
    world = World()
    world.create(order_id="o-1")
    change = model.channel_payment(
        world.order(order_id="o-1"), world.merchant, new_id(), new_id(), world.now, notify_url="https://x", once=None
    )

    verdict = world.commit(change)

    assert isinstance(verdict, Taken)
    assert isinstance(verdict.claim, Claim)


def test_edge_32_a_reservation_is_settled_or_given_back_and_never_both() -> None:
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 40)

    world.says_of_refund(payment_id, refund_id, Operation.REFUND, REFUSED)
    decided = world.says_of_refund(payment_id, refund_id, Operation.CALLBACK, paid(40))

    assert not decided.accepted
    assert world.refund_row(refund_id).state == "failed"
    assert world.exchanges_of(payment_id)[-1].state == "quarantined"
    assert world.held == 0


def test_edge_34_the_platform_s_accounts_exist_per_merchant_so_none_is_hot() -> None:
    keys = [chart.fee_income(HOME, "CNY"), chart.receivable(HOME, "CNY"), chart.suspense(HOME, "CNY")]

    assert {key.home for key in keys} == {HOME}


def test_edge_35_after_a_restore_everything_that_is_open_is_asked_after_before_anything_is_sent() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    paid_id = world.succeeded()
    refund_id = world.refund(paid_id, 10)
    world.says_of_refund(paid_id, refund_id, Operation.REFUND, LOST)
    for root, entity, kind in [
        (payment_id, payment_id, EXPIRE_TIMER),
        (payment_id, attempt_id, ATTEMPT_TIMER),
        (paid_id, refund_id, REFUND_TIMER),
    ]:
        del world.journal.timers[entity, kind]
        assert world.reads.unarmed() == [(HOME, root)]
        world.done(world.decide(root, lambda aggregate, now: model.rearmed(aggregate, now, jitter=0.5)))

    assert world.reads.unarmed() == []
    first, second = world.look(payment_id, attempt_id), world.look_at_refund(paid_id, refund_id)
    assert first.act is not None
    assert second.act is not None
    assert (first.act.operation, second.act.operation) == (Operation.QUERY, Operation.REFUND_QUERY)


def test_a_refund_is_refused_before_the_payment_has_its_money() -> None:
    world = World()
    payment_id, _ = world.waiting()

    assert isinstance(world.ask_refund(payment_id, 1), RefundNotRefundable)


def test_a_failed_payment_waits_for_another_attempt_until_it_expires() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    world.says(payment_id, attempt_id, Operation.CREATE, REFUSED)
    assert (world.payment(payment_id).state, world.attempt(attempt_id).state) == ("processing", "failed")

    world.clock.advance(900)
    world.expire(payment_id)

    assert world.payment(payment_id).state == "closed"
    told = world.event_data(payment_id, "payment.closed")
    assert told["failure"] == {"code": "PARAM_ERROR", "reason": "no"}


def test_what_was_never_sent_needs_nobody_to_close_it() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    world.says(payment_id, attempt_id, Operation.CREATE, NOT_SENT)
    assert world.attempt(attempt_id).state == "new"

    world.close(payment_id)

    assert (world.payment(payment_id).state, world.attempt(attempt_id).state) == ("closed", "closed")


def test_not_sent_the_second_time_proves_nothing_about_the_first() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    world.says(payment_id, attempt_id, Operation.CREATE, LOST)
    world.says(payment_id, attempt_id, Operation.QUERY, NOT_FOUND)
    assert world.attempt(attempt_id).state == "sending"

    world.says(payment_id, attempt_id, Operation.CREATE, NOT_SENT)

    assert world.attempt(attempt_id).state == "unknown"


def test_an_expired_payment_is_closed_after_its_attempts_are_closed_at_the_channel() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()
    world.expire(payment_id)
    assert world.payment(payment_id).state == "processing"

    world.clock.advance(900)
    world.expire(payment_id)
    assert world.payment(payment_id).state == "closing"
    looked = world.look(payment_id, attempt_id)
    assert looked.act is not None
    assert looked.act.operation is Operation.CLOSE
    world.says(payment_id, attempt_id, Operation.CLOSE, CLOSED)

    assert world.payment(payment_id).state == "closed"
    assert world.payment(payment_id).closed_at == world.now


def test_refunds_of_a_wechat_payment_wait_a_minute_for_each_other() -> None:
    world = World()
    payment_id = world.succeeded()

    refund_ids = [world.refund(payment_id, 10) for _ in range(3)]

    assert [world.refund_row(refund_id).state for refund_id in refund_ids] == ["sending", "reserved", "reserved"]
    assert world.timer(refund_ids[1], REFUND_TIMER) == timedelta(seconds=61)
    assert world.timer(refund_ids[2], REFUND_TIMER) == timedelta(seconds=122)


def test_a_wechat_payment_takes_fifty_refunds_and_no_more() -> None:
    world = World()
    payment_id = world.succeeded()

    for _ in range(50):
        world.refund(payment_id, 1)

    assert isinstance(world.ask_refund(payment_id, 1), RefundNotRefundable)


def test_a_top_up_credits_the_wallet_and_its_refund_takes_from_it() -> None:
    world = World()
    wallet_id = world.wallet(500)
    account = chart.wallet(HOME, wallet_id, "CNY")
    assert world.balance(account) == 500
    topup_id = next(event.root for event in world.journal.events if event.type == "topup.succeeded")

    refund_id = world.refund(topup_id, 200, kind="topup")
    assert world.journal.accounts[account].available == 300
    world.says_of_refund(topup_id, refund_id, Operation.REFUND, paid(200))

    assert world.balance(account) == 300
    assert world.books == {"receivable": -300}


def test_a_wallet_payment_is_final_in_one_change_and_its_refunds_too() -> None:
    world = World()
    wallet_id = world.wallet(1000)

    payment_id, verdict = world.pay_from_wallet(wallet_id, 1000)
    assert isinstance(verdict, Committed)
    answered = msgspec.json.decode(verdict.result)
    assert (answered["state"], answered["fee"], answered["attempts"]) == ("succeeded", 6, [])
    for _ in range(3):
        world.refund(payment_id, 333)
    world.refund(payment_id, 1)

    assert world.books == {"receivable": -1000}
    assert world.balance(chart.wallet(HOME, wallet_id, "CNY")) == 1000


def test_a_refused_wallet_payment_leaves_its_order_number_free() -> None:
    world = World()
    wallet_id = world.wallet(10)

    _, refused = world.pay_from_wallet(wallet_id, 11, order_id="o-1")
    _, taken = world.pay_from_wallet(wallet_id, 10, order_id="o-1")

    assert isinstance(refused, Money)
    assert isinstance(taken, Committed)


def test_a_kept_fee_makes_the_merchant_pay_the_whole_refund() -> None:
    world = World(fee_on_refund="kept", fee_ppm=100_000)
    wallet_id = world.wallet(1000)
    payment_id, _ = world.pay_from_wallet(wallet_id, 500)
    other_id, _ = world.pay_from_wallet(wallet_id, 500)
    assert world.books == {"receivable": -1000, "payable": 900, "fee": 100}

    for _ in range(5):
        world.refund(payment_id, 100)

    assert world.payment(payment_id).amount_refunded == 500
    assert world.books == {"receivable": -1000, "payable": 400, "fee": 100}
    assert world.payment(other_id).amount_refunded == 0
