"""How `kassa bench brokers` shows what it does: a live table on a terminal, a line for each step elsewhere."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kassa.bench.model import through_per_s
from kassa.bench.part import Said
from kassa.cli.watch import bars, lasting, rate
from kassa.messaging.broker_names import Named


class _Seen:
    """What the table shows of one broker."""

    def __init__(self) -> None:
        self.step = ""
        self.began: float | None = None
        self.is_done = False
        self.rates: list[float] = []
        self.p99 = ""
        self.killed = ""
        self.trouble = ""


class View:
    """On standard error, so that standard output is the result's alone."""

    def __init__(self, brokers: Sequence[Named]) -> None:
        self._seen = {one.name: _Seen() for one in brokers}
        self._console = Console(stderr=True, highlight=False)
        self._stack = ExitStack()
        self._live: Live | None = None
        self._last = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = self._stack.enter_context(
                Live(get_renderable=self._table, console=self._console, refresh_per_second=4, transient=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tell(self, name: str, said: Said) -> None:
        """One thing that a part said."""
        seen = self._seen[name]
        if seen.began is None:
            seen.began = time.monotonic()
        if self._last and self._last != name:
            self._seen[self._last].is_done = True
        self._last = name
        if said.step:
            seen.step = said.step
            if self._live is None:
                print(f"{name}: {said.step}", file=sys.stderr, flush=True)
        if said.throughput:
            seen.rates.append(through_per_s(said.throughput))
        if said.latency:
            worst = said.latency.max_ms if said.latency.p99_ms is None else said.latency.p99_ms
            seen.p99 = f"{lasting(worst / 1000)} at {rate(said.latency.asked_per_s)}/s"
        if said.recovery:
            seen.killed = f"{lasting(said.recovery.caught_up_s)}, lost {said.recovery.lost}"
        if said.gap:
            seen.trouble = said.gap.why

    def _table(self) -> Table:
        drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
        for head in ("", "broker", "now", "through/s", "", "p99", "back after kill"):
            drawn.add_column(head, no_wrap=True)
        for name, seen in self._seen.items():
            mark = (
                Text("✓", "green")
                if seen.is_done
                else Spinner("dots", style="cyan")
                if seen.began
                else Text("·", "dim")
            )
            trouble = Text(seen.trouble, "yellow", overflow="ellipsis") if seen.trouble and not seen.rates else None
            now = trouble or Text("" if seen.is_done else seen.step, "dim")
            most = f"{max(seen.rates):,.0f}" if seen.rates else ""
            drawn.add_row(
                mark, name, now, Text(most, "bold cyan"), Text(bars(seen.rates), "cyan"), seen.p99, seen.killed
            )
        return drawn
