"""What a run of the tests counted beside its rows: kills, seeds, payments. Printed at the end of a run."""

from collections import Counter

COUNTED: Counter[str] = Counter()


def count(what: str, number: int = 1) -> None:
    """`what` in the plural, as it is printed."""
    COUNTED[what] += number


def told() -> str | None:
    """`42 kills, 1000 seeds`; None when nothing was counted."""
    return ", ".join(f"{number:,} {what}" for what, number in sorted(COUNTED.items())) or None
