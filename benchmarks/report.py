"""How results are printed and kept: medians, ratios to a baseline of the same run, targets, and what machine it was."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("what", "median", "unit", "ratio", "target", "met", "")


class Result(NamedTuple):
    """One line of a result."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    note: str = ""
    target: str = ""
    met: bool | None = None
    """None: there is no target."""


def write(
    name: str, results: Sequence[Result], *, baseline: str, runs: Mapping[str, Any], folder: Path = RESULTS
) -> None:
    """Keep the result, with every single run, as NAME.json. baseline: what its ratios are to; empty when it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "name": name,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load_after": [round(load, 2) for load in os.getloadavg()],
        "baseline": baseline,
        "results": [result._asdict() for result in results],
        "runs": runs,
    }
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _line("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": _line("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def kept(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """The results that are there, in the order of `names`."""
    files = [folder / f"{name}.json" for name in names]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def show(results: Iterable[Mapping[str, Any]]) -> None:
    """One table of everything."""
    table = Table()
    for column in COLUMNS:
        table.add_column(column)
    for result in results:
        table.add_section()
        against = f", against {result['baseline']}" if result["baseline"] else ""
        table.add_row(f"[bold]{result['name']}[/bold]{against}")
        for line in result["results"]:
            table.add_row(*_cells(line))
    Console(width=150).print(table)


def summarise(results: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """summary.md: every line of every result that is kept, and when and where it was measured."""
    text = ["# What was measured", "", "Made by `make bench`. Every single run is in the JSON file of its name.", ""]
    for result in results:
        where = result["machine"]
        ratios = f" Ratios are to {result['baseline']}." if result["baseline"] else ""
        loads = ", ".join(f"{load:.2f}" for load in result["load_after"])
        text += [
            f"## {result['name']}", "",
            f"{result['at']}; {where['cores']} cores ({where['processor']}), {where['memory']}, {where['system']}, "
            f"Python {where['python']}; load at the end {loads}.{ratios}", "",
            "| " + " | ".join(COLUMNS[:-1]) + " | note |", "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        text += ["| " + " | ".join(_cells(line)) + " |" for line in result["results"]]
        text.append("")
    file = folder / "summary.md"
    file.write_text("\n".join(text))
    return file


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    ratio = f"{line['ratio']:.3g} ×" if line["ratio"] is not None else ""
    met = {None: "", True: "yes", False: "no"}[line["met"]]
    return (line["name"], f"{line['value']:,.1f}", line["unit"], ratio, line["target"], met, line["note"])


def _line(file: str, name: str) -> str:
    """The value of `name : value` in a file of /proc; empty where there is none."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
