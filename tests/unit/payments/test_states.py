"""The tables of legal moves: every event in every state, legal or refused."""

import itertools

import pytest

from kassa.errors import IllegalTransition
from kassa.payments.states import (
    ATTEMPT_EDGES,
    ATTEMPT_OPEN,
    PAYMENT_EDGES,
    PAYMENT_OPEN,
    REFUND_EDGES,
    REFUND_OPEN,
    AttemptEvent,
    AttemptState,
    PaymentEvent,
    PaymentState,
    RefundEvent,
    RefundState,
    attempt_after,
    payment_after,
    refund_after,
)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(PaymentState, PaymentEvent)))
def test_a_payment_moves_as_its_table_says_and_not_otherwise(state: PaymentState, event: PaymentEvent) -> None:
    if (state, event) in PAYMENT_EDGES:
        assert payment_after(state.value, event) == PAYMENT_EDGES[state, event].value
    else:
        with pytest.raises(IllegalTransition):
            payment_after(state.value, event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(AttemptState, AttemptEvent)))
def test_an_attempt_moves_as_its_table_says_and_not_otherwise(state: AttemptState, event: AttemptEvent) -> None:
    if (state, event) in ATTEMPT_EDGES:
        assert attempt_after(state.value, event) == ATTEMPT_EDGES[state, event].value
    else:
        with pytest.raises(IllegalTransition):
            attempt_after(state.value, event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RefundState, RefundEvent)))
def test_a_refund_moves_as_its_table_says_and_not_otherwise(state: RefundState, event: RefundEvent) -> None:
    if (state, event) in REFUND_EDGES:
        assert refund_after(state.value, event) == REFUND_EDGES[state, event].value
    else:
        with pytest.raises(IllegalTransition):
            refund_after(state.value, event)


def test_a_paid_attempt_is_never_left() -> None:
    """Refunds and reports of a closed trade must not undo that money came."""
    paid = {AttemptState.SUCCEEDED, AttemptState.DUPLICATE_PAID}

    assert [edge for edge in ATTEMPT_EDGES if edge[0] in paid] == []


def test_every_attempt_that_may_be_paid_can_be_paid_or_found_to_be_a_second_payment() -> None:
    for state in ATTEMPT_OPEN | {AttemptState.FAILED, AttemptState.CLOSED}:
        assert ATTEMPT_EDGES[state, AttemptEvent.PAID] is AttemptState.SUCCEEDED
        assert ATTEMPT_EDGES[state, AttemptEvent.PAID_AGAIN] is AttemptState.DUPLICATE_PAID


def test_unknown_never_becomes_failed_by_silence() -> None:
    silent = {AttemptEvent.LOST, AttemptEvent.ASKED, AttemptEvent.NOT_SENT, AttemptEvent.SEND}

    for (state, event), following in ATTEMPT_EDGES.items():
        if event in silent:
            assert following in ATTEMPT_OPEN, (state, event)


def test_a_refund_in_doubt_keeps_its_money_reserved() -> None:
    silent = {RefundEvent.LOST, RefundEvent.ASKED, RefundEvent.NOT_SENT, RefundEvent.SEND, RefundEvent.ACCEPTED}

    for (state, event), following in REFUND_EDGES.items():
        if event in silent:
            assert following in REFUND_OPEN, (state, event)


def test_every_state_is_reached_and_every_open_one_is_left() -> None:
    assert set(PAYMENT_EDGES.values()) | {PaymentState.CREATED} == set(PaymentState)
    assert set(ATTEMPT_EDGES.values()) == set(AttemptState)
    assert set(REFUND_EDGES.values()) == set(RefundState)
    assert {state for state, _ in PAYMENT_EDGES} >= PAYMENT_OPEN
    assert {state for state, _ in ATTEMPT_EDGES} >= ATTEMPT_OPEN
    assert {state for state, _ in REFUND_EDGES} >= REFUND_OPEN
