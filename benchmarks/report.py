"""How a benchmark's result is printed and kept: medians, ratios to a baseline of the same run, and what machine it was."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


class Result(NamedTuple):
    """One line of a result."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    note: str = ""


def write(name: str, results: Sequence[Result], *, baseline: str, runs: Mapping[str, Any]) -> None:
    """Print the table and keep it, with every single run, as results/NAME.json."""
    table = Table(title=f"{name}: ratios to {baseline}")
    for column in ("what", "median", "unit", "ratio", ""):
        table.add_column(column)
    for result in results:
        ratio = f"{result.ratio:.2f} ×" if result.ratio is not None else ""
        table.add_row(result.name, f"{result.value:,.1f}", result.unit, ratio, result.note)
    Console(width=132).print(table)
    RESULTS.mkdir(exist_ok=True)
    kept = {
        "name": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "load_before": os.getloadavg(),
        "baseline": baseline,
        "results": [result._asdict() for result in results],
        "runs": runs,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n")
