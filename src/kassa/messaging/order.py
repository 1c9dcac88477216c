"""Keeps what belongs together in order while the rest goes side by side. Pure."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_waves(items: Sequence[Item], key_of: Callable[[Item], Hashable | None]) -> list[list[Item]]:
    """Items in waves with at most one of each key, in order, so that a later one is touched only when the earlier is done.

    key_of: None for an item that has no order; all of those are in the first wave.
    """
    rounds: list[list[Item]] = []
    seen: dict[Hashable, int] = {}
    for item in items:
        key = key_of(item)
        number = 0
        if key is not None:
            number = seen.get(key, 0)
            seen[key] = number + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(item)
    return rounds
