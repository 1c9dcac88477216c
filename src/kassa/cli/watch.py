"""What `kassa queue watch` draws: one line per queue, with what passed in the last few seconds. Pure but for the drawing."""

from collections import deque
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kassa.messaging.activity import Flow
from kassa.messaging.queues import Queue

HISTORY = 30
WIDE, MIDDLE = 130, 100
"""Columns of the terminal from which on there is room for more."""
BROKER, BARS = "broker", "done/s, last half minute"
NAME_MIN = 20
EDGES, GAP = 2, 2
"""Of the table: columns at its sides, and between two of its columns."""
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
    heads = _heads(width)
    rows = [_cells(line, width) for line in lines]
    room = width - EDGES - sum(
        GAP + max(cell_len(head), *(cell_len(str(row[place])) for row in rows), 0) for place, head in enumerate(heads)
    )  # fmt: skip
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("queue", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="left" if head in (BROKER, BARS) else "right", no_wrap=True)
    for line, row in zip(lines, rows, strict=True):
        table.add_row(_name(line.queue, max(room, NAME_MIN)), *row)
    return Group(_title(lines, at), table, *_notes(lines, sent))


def _heads(width: int) -> list[str]:
    """The columns behind the name."""
    if width >= WIDE:
        return [
            BROKER, "waiting", "growing", "in hand", "delayed", "done/s", "failed/s", "p50", "p99", "oldest", "dead", BARS
        ]  # fmt: skip
    if width >= MIDDLE:
        return [BROKER, "waiting", "growing", "done/s", "p50", "p99", "oldest", "dead"]
    return ["waiting", "done/s", "p50", "p99", "oldest", "dead"]


def _title(lines: Sequence[Line], at: datetime) -> Text:
    waiting = sum(line.queue.waiting for line in lines)
    handled = sum(line.flow.handled for line in lines)
    dead = sum(line.queue.dead for line in lines)
    title = Text.assemble(("Kassa", "bold"), f"  {at:%H:%M:%S} UTC   {waiting:,} waiting   {rate(handled)} done/s   ")
    title.append(f"{dead:,} dead", "bold red" if dead else "green")
    return title


def _cells(line: Line, width: int) -> list[Text]:
    """What stands under `_heads`."""
    queue, flow = line.queue, line.flow
    length = Text(f"{queue.waiting:,}", "bold" if queue.waiting else "dim")
    if queue.elsewhere is None:
        length.append("+?", "yellow")
    is_moving = abs(line.growth) >= 0.5
    color = "red" if line.growth > 0 else "green"
    if width < MIDDLE:
        length.append((" ↑" if line.growth > 0 else " ↓") if is_moving else "  ", color)
    failed = flow.retried + flow.dead
    cells = {
        BROKER: Text(", ".join(queue.brokers)),
        "waiting": length,
        "growing": Text(f"{line.growth:+,.0f}/s" if is_moving else "", color),
        "in hand": number(queue.in_flight),
        "delayed": number(queue.delayed),
        "done/s": Text(rate(flow.handled), "bold cyan" if flow.handled else "dim"),
        "failed/s": Text(rate(failed), "red" if failed else "dim"),
        "p50": Text(lasting(flow.p50_s)),
        "p99": Text(lasting(flow.p99_s)),
        "oldest": Text(lasting(queue.oldest_s)),
        "dead": Text(f"{queue.dead:,}", "bold red") if queue.dead else Text("0", "dim"),
        BARS: Text(bars(line.history).rjust(HISTORY), "cyan"),
    }
    return [cells[head] for head in _heads(width)]


def _name(queue: Queue, room: int) -> Text:
    """What tells names apart stands at both of their ends."""
    mark = "  paused" if queue.paused else ""
    fits = max(room - len(mark), NAME_MIN // 2)
    name = queue.name
    if len(name) > fits:
        name = f"{name[: fits // 2]}…{name[fits // 2 + 1 - fits :]}"
    return Text.assemble((name, "yellow" if queue.paused else ""), (mark, "bold yellow"))


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
