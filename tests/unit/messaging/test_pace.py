"""How fast a backlog is drained, by what is written meanwhile."""

import math
from typing import Any

import pytest

from kassa.messaging.pace import COUNTED_MAX, NOBODY, Pace, Writing, after_look, allowed_per_s


@pytest.mark.parametrize(
    ("backlog_per_s", "writing", "allowed"),
    [
        (5000, NOBODY, math.inf),
        (5000, Writing(100.0, 0), 5000),
        (5000, Writing(2500.0, 0), 5000),
        (5000, Writing(2600.0, 0), 5200),
        (5000, Writing(20_000.0, 0), 40_000),
        (5000, Writing(math.inf, 0), math.inf),
        (5000, Writing(0.0, 1), 5000),
        (5000, Writing(0.0, 2), math.inf),
        (1, Writing(0.0, 1), 1),
        (0, Writing(100.0, 0), math.inf),
        (0, NOBODY, math.inf),
    ],
)
def test_backlog_has_its_pace_while_somebody_writes(backlog_per_s: int, writing: Writing, allowed: float) -> None:
    assert allowed_per_s(backlog_per_s, writing) == allowed


@pytest.mark.parametrize(
    ("known", "counted", "took_s", "then"),
    [
        (NOBODY, [], 0.5, Writing(0.0, 3)),
        (NOBODY, [0, 0], 0.5, Writing(0.0, 3)),
        (NOBODY, [1, 0], 0.5, Writing(2.0, 0)),
        (NOBODY, [200, 300], 0.1, Writing(5000.0, 0)),
        (Writing(2.0, 0), [0, 0], 0.5, Writing(0.0, 1)),
        (Writing(0.0, 1), [0, 0], 0.5, Writing(0.0, 2)),
        (Writing(0.0, 1), [5, 0], 0.5, Writing(10.0, 0)),
        (Writing(2.0, 0), [COUNTED_MAX - 1, 0], 1.0, Writing(COUNTED_MAX - 1, 0)),
        (Writing(2.0, 0), [COUNTED_MAX, 0], 60.0, Writing(math.inf, 0)),
    ],
)
def test_who_writes_is_known_by_what_was_counted(
    known: Writing, counted: list[int], took_s: float, then: Writing
) -> None:
    assert after_look(known, counted, took_s) == then


@pytest.mark.parametrize("written_per_s", [1, 400, 4000, 100_000])
@pytest.mark.parametrize("backlog_per_s", [1, 5000])
def test_backlog_comes_to_its_end_however_much_is_written(backlog_per_s: int, written_per_s: int) -> None:
    """Also where it is looked at every other half second only that anything is written."""
    backlog, writing = 10.0 * written_per_s, NOBODY
    for look in range(60):
        written = written_per_s if look % 2 else 0
        writing = after_look(writing, [written], 0.5)
        backlog += written - min(allowed_per_s(backlog_per_s, writing), 1e6) * 0.5

    assert backlog <= 0


async def test_without_a_limit_nobody_is_asked() -> None:
    nowhere: Any = None
    pace = Pace(nowhere, 0)

    assert [await pace.turn_s(500, now) for now in (0.0, 1.0, 2.0)] == [0.0, 0.0, 0.0]
    assert pace.page(500) == 500
