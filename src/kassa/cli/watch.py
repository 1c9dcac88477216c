"""What `kassa queue watch` draws: one line per queue, with what passed in the last few seconds. Pure but for the drawing."""

from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kassa.messaging.activity import Flow
from kassa.messaging.queues import Queue

HISTORY = 30
WIDE, MIDDLE = 130, 100
"""Columns of the terminal from which on there is room for more."""
_BARS = "▁▂▃▄▅▆▇█"


class Line(NamedTuple):
    """A queue, how it moves, and its last throughputs, oldest first."""

    queue: Queue
    flow: Flow
    growth: float
    """Records a second that it becomes longer."""
    history: Sequence[float]


class Picture:
    """What was seen so far, as far as the picture shows it."""

    def __init__(self) -> None:
        self._lengths: dict[str, deque[tuple[float, int]]] = {}
        self._rates: dict[str, deque[float]] = {}

    def lines(self, queues: Sequence[Queue], flows: dict[tuple[str, str], Flow], now_s: float) -> list[Line]:
        """One more look. now_s: by any clock that never goes back."""
        lines: list[Line] = []
        for queue in queues:
            flow = flows.get((queue.topic, queue.group), Flow())
            lengths = self._lengths.setdefault(queue.name, deque(maxlen=6))
            lengths.append((now_s, queue.waiting))
            rates = self._rates.setdefault(queue.name, deque(maxlen=HISTORY))
            rates.append(flow.handled)
            lines.append(Line(queue, flow, _growth(lengths), tuple(rates)))
        return lines


def _growth(lengths: Sequence[tuple[float, int]]) -> float:
    (since, before), (until, after) = lengths[0], lengths[-1]
    return (after - before) / (until - since) if until > since else 0.0


def document(lines: Sequence[Line], at: datetime) -> dict[str, Any]:
    """The same for programs."""
    return {
        "at": at,
        "data": [
            {
                "name": line.queue.name, "kind": line.queue.kind, "topic": line.queue.topic, "group": line.queue.group,
                "brokers": line.queue.brokers, "length": line.queue.waiting, "growth_per_s": round(line.growth, 3),
                "handled_per_s": round(line.flow.handled, 3), "received_per_s": round(line.flow.received, 3),
                "retried_per_s": round(line.flow.retried, 3), "given_up_per_s": round(line.flow.dead, 3),
                "p50_s": line.flow.p50_s, "p99_s": line.flow.p99_s, "oldest_s": line.queue.oldest_s,
                "dead": line.queue.dead, "paused": line.queue.paused, "says": line.queue.says,
            }
            for line in lines
        ],
    }  # fmt: skip


def picture(lines: Sequence[Line], at: datetime, width: int, sent: dict[str, float]) -> RenderableType:
    """One frame. sent: records a second by topic, as brokers confirm them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True, padding=(0, 1))
    table.add_column("queue", no_wrap=True, overflow="ellipsis", ratio=1, min_width=16)
    if width >= MIDDLE:
        table.add_column("broker", no_wrap=True)
    heads = ["waiting", "growing", "done/s", "p50", "p99", "oldest", "dead"]
    if width >= WIDE:
        heads[2:2] = ["in hand", "delayed"]
        heads.insert(heads.index("p50"), "failed/s")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    if width >= WIDE:
        table.add_column("done/s, last half minute", no_wrap=True, width=HISTORY)
    for line in lines:
        table.add_row(*_cells(line, width))
    return Group(_title(lines, at), table, *_notes(lines, sent))


def _title(lines: Sequence[Line], at: datetime) -> Text:
    waiting = sum(line.queue.waiting for line in lines)
    handled = sum(line.flow.handled for line in lines)
    dead = sum(line.queue.dead for line in lines)
    title = Text.assemble(("Kassa", "bold"), f"  {at:%H:%M:%S} UTC   {waiting:,} waiting   {rate(handled)} done/s   ")
    title.append(f"{dead:,} dead", "bold red" if dead else "green")
    return title


def _cells(line: Line, width: int) -> list[Text | str]:
    queue, flow = line.queue, line.flow
    name = Text(queue.name, "yellow" if queue.paused else "")
    if queue.paused:
        name.append("  paused", "bold yellow")
    length = Text(f"{queue.waiting:,}", "bold" if queue.waiting else "dim")
    if queue.elsewhere is None:
        length.append("+?", "yellow")
    growing = Text(f"{line.growth:+,.0f}/s" if abs(line.growth) >= 0.5 else "", "red" if line.growth > 0 else "green")
    done = Text(rate(flow.handled), "bold cyan" if flow.handled else "dim")
    failed = flow.retried + flow.dead
    cells: list[Text | str] = [name]
    if width >= MIDDLE:
        cells.append(", ".join(queue.brokers))
    cells += [length, growing]
    if width >= WIDE:
        cells += [number(queue.in_flight), number(queue.delayed)]
    cells.append(done)
    if width >= WIDE:
        cells.append(Text(rate(failed), "red" if failed else "dim"))
    cells += [lasting(flow.p50_s), lasting(flow.p99_s), lasting(queue.oldest_s)]
    cells.append(Text(f"{queue.dead:,}", "bold red") if queue.dead else Text("0", "dim"))
    if width >= WIDE:
        cells.append(Text(bars(line.history), "cyan"))
    return cells


def _notes(lines: Sequence[Line], sent: dict[str, float]) -> list[Text]:
    notes: list[Text] = []
    moving = [f"{topic} {rate(per_s)}/s" for topic, per_s in sorted(sent.items()) if per_s]
    if moving:
        notes.append(Text("sent to brokers: " + ", ".join(moving), "dim"))
    said = dict.fromkeys(line.queue.says for line in lines if line.queue.says)
    notes += [Text(f"! {sentence}", "yellow") for sentence in said]
    return notes


def number(count: int) -> Text:
    """A count that is quiet where it is 0."""
    return Text(f"{count:,}", "" if count else "dim")


def rate(per_s: float) -> str:
    """Records a second, as exact as anybody reads."""
    return f"{per_s:,.0f}" if per_s >= 10 or per_s == 0 else f"{per_s:.1f}"


def lasting(seconds: float | None) -> str:
    """A time from microseconds to days in five characters or so."""
    if seconds is None:
        return "–"
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def bars(history: Sequence[float]) -> str:
    """A line of bars, the highest of them at the highest rate that it shows."""
    top = max(history, default=0.0)
    if top <= 0:
        return _BARS[0] * len(history)
    return "".join(_BARS[min(int(one / top * len(_BARS)), len(_BARS) - 1)] for one in history)
