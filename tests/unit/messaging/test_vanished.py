"""Who looks twice at a queue knows what nobody can have received."""

from datetime import UTC, datetime, timedelta

import pytest

from kassa.messaging.vanished import NOBODY, SPARE, Levels, Look, Vanished

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
OURS, ANOTHER = "our consumer", "another of ours"


def told(*looks: Look) -> list[Vanished | None]:
    """What is said behind each look at a queue, a minute apart."""
    levels = Levels()
    return [levels.see("shop", [look], NOON + timedelta(minutes=number)) for number, look in enumerate(looks)]


def test_what_went_while_nobody_received_is_told_behind_the_second_look_that_says_so() -> None:
    purged = Look(40, NOBODY)

    assert told(Look(100, NOBODY), purged, purged, purged) == [None, None, Vanished(60, None, is_sure=False), None]


def test_it_was_sent_hardly_before_the_first_of_two_looks_that_found_nothing() -> None:
    empty, full = Look(0, NOBODY), Look(100, NOBODY)

    assert told(empty, empty, full, empty, empty)[-1] == Vanished(100, NOON - SPARE, is_sure=False)
    assert told(full, empty, full, empty, empty)[-1] == Vanished(100, None, is_sure=False)


def test_broker_that_says_once_that_nothing_waits_is_not_believed() -> None:
    full = Look(100, NOBODY)

    assert told(full, Look(0, NOBODY), full, full) == [None] * 4


@pytest.mark.parametrize("reader", [OURS, NOBODY])
def test_what_is_sent_meanwhile_is_no_loss(reader: str) -> None:
    assert told(Look(10, reader), Look(500, reader), Look(500, reader)) == [None] * 3


def test_what_our_only_consumer_received_or_may_have_on_its_way_is_no_loss() -> None:
    first = Look(1000, OURS, came_before=0, came_after=20, window=50)
    received = Look(350, OURS, came_before=580, came_after=600, window=50)

    assert told(first, received, received) == [None] * 3
    assert told(first, received._replace(waiting=340), received._replace(waiting=340))[-1] == Vanished(
        10, None, is_sure=True
    )


@pytest.mark.parametrize(
    ("before", "after"), [(None, None), (None, NOBODY), (NOBODY, OURS), (OURS, ANOTHER), (OURS, None)]
)
def test_where_others_may_have_received_it_nothing_is_told(before: str | None, after: str | None) -> None:
    assert told(Look(1000, before), Look(0, after), Look(0, None)) == [None] * 3


def test_queues_of_a_group_are_told_of_together() -> None:
    levels = Levels()
    full, less = [Look(5, NOBODY), Look(7, NOBODY)], [Look(9, NOBODY), Look(0, NOBODY)]

    assert [levels.see("shop", looks, NOON) for looks in (full, less, less)][-1] == Vanished(7, None, is_sure=False)


def test_queues_that_were_made_again_are_compared_with_nothing() -> None:
    levels = Levels()
    levels.see("shop", [Look(5, NOBODY)], NOON)
    levels.forget("shop")

    assert [levels.see("shop", [Look(0, NOBODY)], NOON) for _ in range(3)] == [None] * 3
