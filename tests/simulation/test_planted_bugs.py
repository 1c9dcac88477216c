"""The simulator is only worth something if it finds bugs: each of these mutations of a rule must be caught.

One rule is swapped at a time, by its name in the module that uses it, and given back after the test.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from kassa.channels.model import Evidence, Failed
from kassa.errors import KassaError, RefundExceedsPaid
from kassa.journal.change import Change
from kassa.journal.judge import Judge
from kassa.journal.table import Root
from kassa.payments import model, postings, refunds
from kassa.payments.draft import Draft, Operation
from kassa.payments.records import Attempt, Payment, Refund
from kassa.simulation import Report, simulate

WITHIN = 400
"""Seeds by which each must be caught; most are in the first ten."""

REFUSED = Failed(Evidence("transport", authentic=False), "LOST", "no answer")

Plant = Callable[[pytest.MonkeyPatch], None]


def refund_bound_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = refunds._refusal

    def wrong(payment: Payment, request: Any, amount: int, left: int, limits: Any) -> KassaError | None:
        refusal = right(payment, request, amount, left, limits)
        return None if isinstance(refusal, RefundExceedsPaid) and amount == left + 1 else refusal

    patch.setattr(refunds, "_refusal", wrong)


def unknown_treated_as_failed(patch: pytest.MonkeyPatch) -> None:
    def wrong(draft: Draft, attempt: Attempt, operation: Operation) -> Change:
        return model._record_failed(draft, attempt, Operation.QUERY, REFUSED)

    patch.setattr(model, "_record_doubt", wrong)


def unknown_refund_released(patch: pytest.MonkeyPatch) -> None:
    right = refunds._wait

    def wrong(draft: Draft, refund: Refund) -> None:
        if refund.state == "sending":
            refunds._fail(draft, refund, "LOST", "no answer")
        else:
            right(draft, refund)

    patch.setattr(refunds, "_wait", wrong)


def late_success_booked_to_the_merchant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postings, "late_success", postings.success)


def duplicate_payment_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refunds, "give_back", lambda *arguments, **named: None)


def remainder_of_the_fee_dropped(patch: pytest.MonkeyPatch) -> None:
    def wrong(*, amount: int, fee: int, taken: int, fee_taken: int, asked: int) -> int:
        return fee * asked // amount

    patch.setattr(refunds, "fee_part", wrong)


def fee_rounded_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postings, "fee_of", lambda amount, ppm: amount * ppm // 1_000_000)


def amount_of_a_callback_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "_misfit", lambda *arguments: None)


def amount_of_a_refund_callback_not_checked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refunds, "_misfit", lambda *arguments: None)


def sequence_used_twice(patch: pytest.MonkeyPatch) -> None:
    right = Judge._tell

    def wrong(judge: Judge, change: Change, seq: int, ord: int) -> None:
        right(judge, change, seq, ord)
        if change.rule is not None:
            key = (change.rule.table, change.rule.id)
            root = judge.read.rows[key]
            assert isinstance(root, Root)
            judge.read.rows[key] = msgspec.structs.replace(root, sequence=root.sequence - 1)

    patch.setattr(Judge, "_tell", wrong)


def hold_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postings, "refund_reserved", lambda *arguments: ())


def key_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = Judge._named_before

    def wrong(judge: Judge, change: Change) -> Any:
        judge.read.once.clear()
        return right(judge, change)

    patch.setattr(Judge, "_named_before", wrong)


def timer_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Draft, "due_attempt", lambda *arguments: None)


def event_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = Draft.tell

    def wrong(self: Draft, what: str) -> None:
        if what != "closed":
            right(self, what)

    patch.setattr(Draft, "tell", wrong)


def closed_without_asking_the_channel(patch: pytest.MonkeyPatch) -> None:
    def wrong(draft: Draft, drive_at: Any) -> None:
        for attempt in draft.open_attempts:
            model._end(draft, attempt)
        model._closed(draft)

    patch.setattr(model, "_begin_closing", wrong)


def another_attempt_while_one_is_in_doubt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "ATTEMPT_IN_DOUBT", frozenset())


def no_time_of_grace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "GRACE", timedelta(0))
    patch.setattr(refunds, "GRACE", timedelta(0))


def overtaken_callback_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(refunds, "_is_fresh", lambda *arguments: True)


def paid_twice_taken_as_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(postings, "duplicate_success", lambda payment: ())


PLANTED: tuple[Plant, ...] = (
    refund_bound_off_by_one, unknown_treated_as_failed, unknown_refund_released, late_success_booked_to_the_merchant,
    duplicate_payment_not_given_back, remainder_of_the_fee_dropped, fee_rounded_down,
    amount_of_a_callback_not_checked, amount_of_a_refund_callback_not_checked, sequence_used_twice, hold_forgotten,
    key_forgotten, timer_forgotten, event_forgotten, closed_without_asking_the_channel,
    another_attempt_while_one_is_in_doubt, no_time_of_grace, overtaken_callback_believed, paid_twice_taken_as_one,
)  # fmt: skip


def _first_broken() -> Report | None:
    return next((report for seed in range(WITHIN) if not (report := simulate(seed)).is_good), None)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    caught = _first_broken()

    assert caught is not None
    assert caught.violations and caught.history
    print(f"{plant.__name__}: seed {caught.seed}, {caught.violations[0]}")
