"""A circuit breaker per destination: while one is away its records wait, instead of filling the dead letters. Pure."""

import time
from collections.abc import Callable
from typing import NamedTuple

FAILURES_MAX = 5
"""In a row; then the destination counts as away."""
OPEN_S = 5.0
OPEN_MAX_S = 60.0


class Circuit(NamedTuple):
    """What is known of one destination."""

    failures: int = 0
    open_until: float = 0.0
    openings: int = 0


class Breaker:
    """Destinations and whether they may be tried. Times are seconds of one monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: the one whose times the other calls are given; an event loop's is this one."""
        self._circuits: dict[str, Circuit] = {}
        self._clock = clock

    def wait_s(self, destination: str, now: float) -> float:
        """How long to leave a destination alone; 0: try it. After the pause one try decides."""
        circuit = self._circuits.get(destination)
        return 0.0 if circuit is None else max(0.0, circuit.open_until - now)

    def open_count(self) -> int:
        """How many destinations are left alone at the moment."""
        return sum(circuit.open_until > self._clock() for circuit in self._circuits.values())

    def succeeded(self, destination: str) -> None:
        """It is there."""
        self._circuits.pop(destination, None)

    def failed(self, destination: str, now: float) -> None:
        """It did not answer; after some in a row, and then after each, it is left alone for a growing while."""
        circuit = self._circuits.get(destination, Circuit())
        failures = circuit.failures + 1
        if failures < FAILURES_MAX:
            self._circuits[destination] = Circuit(failures)
            return
        pause_s = min(OPEN_S * 2.0 ** min(circuit.openings, 8), OPEN_MAX_S)
        self._circuits[destination] = Circuit(failures, now + pause_s, circuit.openings + 1)
