"""What a run of the tests counted beside its rows: kills, seeds, payments, and what it has to tell. Printed at its end."""

from collections import Counter

COUNTED: Counter[str] = Counter()
TOLD: list[str] = []


def count(what: str, number: int = 1) -> None:
    """`what` in the plural, as it is printed."""
    COUNTED[what] += number


def tell(line: str) -> None:
    """A finding that nobody asserts: a ratio, a duration."""
    TOLD.append(line)


def told() -> str | None:
    """`42 kills, 1000 seeds`; None when nothing was counted."""
    return ", ".join(f"{number:,} {what}" for what, number in sorted(COUNTED.items())) or None
