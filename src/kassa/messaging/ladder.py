"""How long to wait before trying again. Pure; randomness is passed in.

A message or record climbs a ladder that ends: a few tries at once (a deadlock, a restart), then 5 s, 30 s, 5 min,
30 min, then the dead letters. A timer's ladder has no end: what is due stays due.
"""

IMMEDIATE_TRIES = 3
"""Tries that follow at once; more would only repeat what cannot work now."""
DELAYS_S = (5.0, 30.0, 300.0, 1800.0)
TRIES_MAX = 1 + IMMEDIATE_TRIES + len(DELAYS_S)
"""First try, immediate ones, delayed ones; after this many a message is dead."""
TIMER_FIRST_S = 2.0
TIMER_CAP_S = 3600.0
"""An hour: what has failed for a day is on the stuck list, and a person may want to see the repair work soon."""


def message_delay(attempts: int, chance: float) -> float | None:
    """Seconds until the next try after `attempts` failed ones; None: no more, it is dead.

    chance: 0 … 1, so that what failed together does not come back together (± 20 %).
    """
    if attempts <= IMMEDIATE_TRIES:
        return 0.0
    step = attempts - IMMEDIATE_TRIES - 1
    if step >= len(DELAYS_S):
        return None
    return DELAYS_S[step] * (0.8 + 0.4 * chance)


def timer_delay(tries: int, chance: float) -> float:
    """Seconds until the next try of a timer that failed `tries` times before: doubling, capped, jittered (± 20 %)."""
    # The exponent is bounded too: a timer may fail for months.
    return min(TIMER_FIRST_S * 2.0 ** min(tries, 16), TIMER_CAP_S) * (0.8 + 0.4 * chance)
