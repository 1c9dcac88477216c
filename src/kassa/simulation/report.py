"""What a simulation comes to, and how it is told."""

from collections.abc import Mapping
from typing import NamedTuple


class Report(NamedTuple):
    """One run. Equal for equal seeds and steps, on every machine."""

    seed: int
    steps: int
    violations: tuple[str, ...]
    """Promises that were broken, the first one first; empty when all is well."""
    counts: Mapping[str, int]
    """What happened how often."""
    shown: tuple[str, ...]
    """What is not final and waits for a person."""
    history: tuple[str, ...]
    """The last things that happened before a promise was broken, the latest last."""
    digest: str
    """The head of the journal's chain: equal when every byte that was written is equal."""

    @property
    def is_good(self) -> bool:
        return not self.violations


def told(report: Report) -> str:
    """One run for a person's eyes."""
    counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(report.counts.items()))
    if report.is_good:
        return f"seed {report.seed}: good. {counts}"
    lines = [
        f"seed {report.seed}: BROKEN after {report.counts.get('commits', 0)} commits. {counts}",
        *(f"  {text}" for text in report.violations[:5]),
        "  the last things that happened:",
        *(f"    {line}" for line in report.history),
        f"  see it again: kassa simulate --seed {report.seed} --steps {report.steps}",
    ]
    return "\n".join(lines)
