"""The page: one file that needs no network, readable on a phone, in light and dark. It shows what is in the report, and no more."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from kassa.bench import charts
from kassa.bench.model import Choice, Latency, Measured, Needs, Recovery, Report, through_per_s
from kassa.bench.needs import NOT, PARTLY, RECOMMENDED, UNMEASURED, called

WAYS = {"single": "one by one", "envelopes": "in envelopes", "unordered": "without order"}
TIMELINE_S = 30.0
"""What comes later in a fault is in the figures below the chart."""


def rendered(report: Report) -> str:
    """The whole page."""
    seen = [one for one in report.brokers if one.is_measured]
    folder = files("kassa.bench")
    return Template((folder / "page.html").read_text("utf-8")).substitute(
        style=(folder / "page.css").read_text("utf-8"),
        headline=escape(report.recommendation.headline),
        words="".join(f"<p>{escape(words)}</p>" for words in report.recommendation.words),
        day=report.at[:10],
        machine_short=escape(f"{report.machine['cores']} cores with {_gigabytes(int(report.machine['memory_bytes']))}"),
        chips="".join(f"<li>{escape(chip)}</li>" for chip in _chips(report.needs)),
        notices=_notices(report),
        ranking="".join(_card(one, report.brokers) for one in report.recommendation.ranking),
        throughput=_throughput(seen),
        latency=_latency(seen, report.needs),
        recovery=_recoveries(seen),
        cost=_cost(seen),
        tables=_tables(seen),
        how=_how(report),
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(report)),
        limits="".join(f"<li>{escape(limit)}</li>" for limit in report.limits),
        gaps=_gaps(report.brokers),
    )


# The top


def _chips(needs: Needs) -> list[str]:
    chips = [f"{needs.rate_per_s:,g} messages a second", f"p99 within {needs.latency_ms:g} ms"]
    chips.append("in order per key" if needs.order else "no order needed")
    chips += [f"kept for {needs.retention_days:g} days"] if needs.retention_days else []
    chips += ["replay from the broker"] if needs.replay else []
    chips.append("nothing lost by a kill" if needs.outlives_kill else "may lose messages")
    return chips + [f"runs {kind} already" for kind in needs.runs]


def _notices(report: Report) -> str:
    said = []
    if not report.is_complete:
        said.append("The run was interrupted: what had been measured by then is here.")
    if report.is_quick:
        said.append("A quick run: it shows that everything works. Take its figures for an order of magnitude.")
    if report.load_before and report.load_before[0] > 0.5:
        said.append(
            f"The machine was not idle: load {report.load_before[0]:.2f} before the run. Other work spoils figures of this kind."
        )
    return "".join(f'<p class="notice">{escape(words)}</p>' for words in said)


def _card(choice: Choice, brokers: Sequence[Measured]) -> str:
    broker = next((one for one in brokers if one.name == choice.name), None)
    is_good = choice.verdict not in (NOT, UNMEASURED)
    kind = {RECOMMENDED: "good", NOT: "bad", PARTLY: "open", UNMEASURED: "open"}.get(choice.verdict, "")
    items = [f"<li>{escape(words)}</li>" for words in choice.reasons]
    mark = "against" if choice.verdict == NOT else "open"
    items += [f'<li class="{mark}">{escape(words)}</li>' for words in choice.against]
    color = f"k-{broker.kind if broker else choice.name}"
    title = called(broker) if broker else choice.name
    return (
        f'<article class="card{" first" if is_good and kind == "good" else ""}"><header><h3><span class="swatch {color}"></span>'
        f'{escape(title)}</h3><span class="badge {kind}">{escape(choice.verdict)}</span></header>'
        f"<ul>{''.join(items)}</ul></article>"
    )


# Charts


def _section(title: str, under: str, inside: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="under">{escape(under)}</p>{inside}</section>'


def _figure(title: str, drawing: str, caption: str = "", *, kind: str = "") -> str:
    """kind: `across`, beside its caption where there is room."""
    if not drawing:
        return ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{f"card {kind}".strip()}"><h3>{escape(title)}</h3>{drawing}{below}</figure>'


def _color(one: Measured) -> str:
    return f"k-{one.kind}"


def _throughput(seen: Sequence[Measured]) -> str:
    sizes = sorted({each.batch for one in seen for each in one.throughput if each.way == "single"})
    if not sizes:
        return ""
    words = [f"{size:,}" for size in sizes]

    def series(sending: bool) -> list[charts.Series]:
        return [
            charts.Series(_brief(one), _color(one), [_at(one, size, sending) for size in sizes], "-" in one.name)
            for one in seen
        ]

    rows = [
        (called(one), [
            charts.Bar(WAYS[way], _color(one) + ("" if way == "single" else " pale"), through_per_s(best),
                       f"{through_per_s(best):,.0f}", f"{WAYS[way]}, batches of {best.batch}")
            for way in WAYS if (best := one.best(way)) is not None
        ])
        for one in seen
    ]  # fmt: skip
    figures = [
        _figure("Sent and confirmed, messages a second", charts.lines(
            words, series(True), "Messages sent and confirmed a second, by batch size", below="messages in a batch")),
        _figure("Received and acknowledged, messages a second", charts.lines(
            words, series(False), "Messages received and acknowledged a second, by batch size", below="messages in a batch")),
        _figure("Through one process, sent and received at once", charts.bars(rows, "Messages through one process, a second"),
                "At the best batch size. One by one: a message of the broker for each, readable by anybody. In envelopes: many "
                "in one, between Kassa's own processes. Without order: no key; then brokers may go side by side.", kind="across"),
    ]  # fmt: skip
    return _section(
        "How much goes through", "The size of a batch decides a lot. Logarithmic scales: each line up is ten times as much.",
        f'<div class="charts">{"".join(figures)}</div>',
    )  # fmt: skip


def _at(one: Measured, size: int, sending: bool) -> float | None:
    found = next((each for each in one.throughput if each.way == "single" and each.batch == size), None)
    return None if found is None else (found.send_per_s if sending else found.receive_per_s) or None


_KEY = (
    '<ul class="key"><li><svg viewBox="0 0 34 14"><circle class="dot" cx="17" cy="7" r="5"/></svg>half are quicker (p50)</li>'
    '<li><svg viewBox="0 0 34 14"><circle class="ring" cx="17" cy="7" r="5"/></svg>99 of 100 are quicker (p99)</li>'
    '<li><svg viewBox="0 0 34 14"><line class="tick" x1="17" x2="17" y1="1" y2="13"/></svg>'
    "999 of 1,000 are quicker (p99.9); the longest of all where there were too few to tell</li>"
    '<li><svg viewBox="0 0 34 14"><line class="need" x1="17" x2="17" y1="0" y2="14"/></svg>what you need for p99</li></ul>'
)


def _latency(seen: Sequence[Measured], needs: Needs) -> str:
    every = [each for one in seen for each in one.latency if each.samples]
    if not every:
        return ""
    low = min(max(each.p50_ms, 0.05) for each in every)
    high = max(_end(each) for each in every)
    loads = sorted({each.asked_per_s for each in every if not each.is_half_of_most})
    groups = [
        (_load_title(load, needs), [(one, each) for one in seen for each in one.latency if _is(each, load)])
        for load in loads
    ]  # fmt: skip
    groups.append(
        ("At half of its most", [(one, each) for one in seen for each in one.latency if each.is_half_of_most])
    )
    figures = [_spread_figure(title, group, needs, low, high) for title, group in groups if group]
    return _section(
        "How long a message takes", "From when it should have been sent to when a handler has it, at a steady load.",
        f'{_KEY}<div class="charts">{"".join(figures)}</div>',
    )  # fmt: skip


def _spread_figure(
    title: str, group: Sequence[tuple[Measured, Latency]], needs: Needs, low: float, high: float
) -> str:  # fmt: skip
    rows = [_spread(one, each) for one, each in group if each.samples]
    drawing = charts.spreads(rows, f"Latency {title.lower()}", needed_ms=needs.latency_ms, low=low, high=high)
    is_own = any(each.is_half_of_most for _, each in group)
    return _figure(title, drawing, _caption(group), kind="across" if is_own else "")


def _load_title(load: float, needs: Needs) -> str:
    return f"At {load:,g} a second" + (", as you need" if load == needs.rate_per_s else "")


def _is(each: Latency, load: float) -> bool:
    return not each.is_half_of_most and each.asked_per_s == load


def _end(each: Latency) -> float:
    return max(each.p999_ms or each.p99_ms or each.max_ms, 0.05)


def _spread(one: Measured, each: Latency) -> charts.Spread:
    about = (
        f"{called(one)} at {each.asked_per_s:,.0f} a second: p50 {_ms(each.p50_ms)}, p99 {_ms(each.p99_ms)}, p99.9 "
        f"{_ms(each.p999_ms)}, longest {_ms(each.max_ms)} of {each.samples:,} messages"
    )
    return charts.Spread(_brief(one), _color(one), each.p50_ms, each.p99_ms, each.p999_ms, each.max_ms, about)


def _brief(one: Measured) -> str:
    """Where there is little room."""
    return called(one).replace(" alone", "")


def _caption(group: Sequence[tuple[Measured, Latency]]) -> str:
    said = []
    if any(each.is_half_of_most for _, each in group):
        said.append(
            "Messages a second: " + ", ".join(f"{_brief(one)} {each.asked_per_s:,.0f}" for one, each in group) + "."
        )
    behind = [_brief(one) for one, each in group if not each.keeps_up]
    if behind:
        said.append(f"Did not keep up: {', '.join(behind)}.")
    return " ".join(said)


def _recoveries(seen: Sequence[Measured]) -> str:
    faults = [(one, one.recovery) for one in seen if one.recovery is not None]
    if not faults:
        return ""
    longest = max((fault.timeline[-1].at_s for _, fault in faults if fault.timeline), default=1.0)
    width = min(TIMELINE_S, max(longest, 1.0))
    figures = [_figure(called(one), _fault_drawing(one, fault, width), _fate(fault)) for one, fault in faults]
    load = faults[0][1].load_per_s
    return _section(
        "What a kill -9 does",
        f"{load:,.0f} messages a second; the server is killed, left dead for "
        f"{faults[0][1].pause_s:g} s, and started. Coloured: handled a second; "
        "thin line: confirmed to the sender; shaded: until everything that had waited was handled.",
        f'<div class="charts">{"".join(figures)}</div>',
    )  # fmt: skip


def _fault_drawing(one: Measured, fault: Recovery, width_s: float) -> str:
    points = [(at.at_s, at.confirmed_per_s, at.handled_per_s) for at in fault.timeline]
    curve = charts.Curve(_color(one), points, fault.started_s, fault.caught_up_s, fault.load_per_s, width_s)
    return charts.timeline(curve, f"{called(one)} around a kill -9")


def _fate(fault: Recovery) -> str:
    fate = f"Of {fault.confirmed:,} confirmed messages {fault.lost:,} lost, {fault.repeated:,} handed out twice"
    order = f", {fault.out_of_order:,} out of order" if fault.out_of_order else ", each key in order"
    if fault.unconfirmed_why:
        order += f", and {fault.sent - fault.confirmed:,} were never confirmed ({fault.unconfirmed_why})"
    return f"{fate}{order}. {_back(fault)} Killed: {fault.what}."


def _back(fault: Recovery) -> str:
    started = f"of which {fault.started_s:.1f} s until its start command had ended."
    if fault.caught_up_s is not None:
        return f"All normal after {fault.caught_up_s:.1f} s, {started}"
    if fault.sending_s is None and fault.handling_s is None:
        return "It did not come back."
    if fault.sending_s is None:
        return "It came back, but confirmed nothing that was sent after the kill."
    if fault.handling_s is None:
        return "It came back, but handed out nothing that was sent after the kill."
    again_s = max(fault.sending_s, fault.handling_s)
    return f"It worked again after {again_s:.1f} s, {started} {fault.lost:,} never came."


def _all_normal(fault: Recovery) -> str:
    """In the table."""
    return f"{fault.lost:,} never came" if fault.lost else _s(fault.caught_up_s)


def _cost(seen: Sequence[Measured]) -> str:
    used: list[tuple[str, list[charts.Bar]]] = []
    sizes: list[tuple[str, list[charts.Bar]]] = []
    for one in seen:
        best = one.best("single")
        if best is not None:
            used.append((called(one), [
                charts.Bar("sending", _color(one), best.send_cpu_us, f"{best.send_cpu_us:.0f} µs"),
                charts.Bar("receiving", f"{_color(one)} pale", best.receive_cpu_us, f"{best.receive_cpu_us:.0f} µs"),
            ]))  # fmt: skip
        if one.memory is not None:
            rows = [
                charts.Bar(
                    "our process", _color(one), one.memory.client / 2**20, f"{one.memory.client / 2**20:.0f} MiB"
                )
            ]
            if one.memory.server is not None:
                size = one.memory.server / 2**20
                rows.append(charts.Bar("the server", f"{_color(one)} pale", size, f"{size:,.0f} MiB"))
            sizes.append((called(one), rows))
    figures = _figure(
        "Processor time of the client, for each message", charts.bars(used, "Processor time for each message"),
        "One by one, at the best batch size. The server's own work comes on top.",
    ) + _figure(
        "Memory", charts.bars(sizes, "Memory"),
        "At its largest after any measurement; shared pages are counted in parts. The server: what listens on its port, with "
        "its children; the PostgreSQL that is Kassa's memory comes on top of the others.",
    )  # fmt: skip
    return _section("What it costs", "On this machine, while it was measured.", f'<div class="charts">{figures}</div>')


# Tables


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body, before = "", ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body += f"<tr><td{' class=again' if first == before else ''}>{escape(first)}</td>{cells}</tr>"
        before = first
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _tables(seen: Sequence[Measured]) -> str:
    throughput = _table(
        ("broker", "messages", "batch", "sent/s", "received/s", "CPU sending", "CPU receiving"),
        (
            (called(one), WAYS[each.way], f"{each.batch:,}", f"{each.send_per_s:,.0f}", f"{each.receive_per_s:,.0f}",
             f"{each.send_cpu_us:.1f} µs", f"{each.receive_cpu_us:.1f} µs")
            for one in seen for each in one.throughput
        ),
    )  # fmt: skip
    latency = _table(
        ("broker", "load", "reached", "samples", "p50", "p99", "p99.9", "longest", "keeps up", "CPU"),
        (
            (called(one), f"{each.asked_per_s:,.0f}/s" + (" (half)" if each.is_half_of_most else ""),
             f"{each.reached_per_s:,.0f}/s", f"{each.samples:,}", _ms(each.p50_ms), _ms(each.p99_ms), _ms(each.p999_ms),
             _ms(each.max_ms), "yes" if each.keeps_up else "no", f"{each.cpu_us:.0f} µs")
            for one in seen for each in one.latency
        ),
    )  # fmt: skip
    faults = _table(
        ("broker", "started", "sends again", "handles again", "all normal", "confirmed", "lost", "twice", "out of order"),
        (
            (called(one), _s(fault.started_s), _s(fault.sending_s), _s(fault.handling_s), _all_normal(fault),
             f"{fault.confirmed:,}", f"{fault.lost:,}", f"{fault.repeated:,}", f"{fault.out_of_order:,}")
            for one in seen if (fault := one.recovery) is not None
        ),
    )  # fmt: skip
    traits = _table(
        ("broker", *_TRAITS.values()),
        ((called(one), *("yes" if one.traits.get(name) else "no" for name in _TRAITS)) for one in seen),
    )
    return (
        f"<h3>Throughput</h3>{throughput}<h3>Latency</h3>{latency}<h3>kill -9</h3>{faults}"
        "<h3>What each does by itself</h3>"
        f'<p class="under">What a broker lacks Kassa supplies from PostgreSQL, so that all behave alike.</p>{traits}'
    )


_TRAITS = {
    "durable": "survives its death", "ordered": "order per key", "delay_max_s": "delays", "dead_letters": "dead letters",
    "counts_attempts": "counts attempts", "deduplicates": "takes a repeat once", "reports_depth": "tells its length",
}  # fmt: skip


# The small print


def _how(report: Report) -> str:
    words = [
        f"Through Kassa's own binders, one broker after the other, each in a fresh process: messages of {report.body_bytes} bytes "
        f"with {100} different keys, in topics of random names. Each measurement took {report.seconds:g} s, the whole run "
        f"{report.took_s:.0f} s.",
        "Throughput: one sender with one batch under way, each batch confirmed; then one receiver that acknowledges each batch. "
        "What goes «through one process» is what is left when it does both: 1 / (1/sent + 1/received).",
        "Latency: messages become due at a steady rate; what is due goes out together. The clock of each starts when it was due, "
        "also when the sender was held up by the one before it.",
        "kill -9: every message is sent until it is confirmed, one of each key at a time, and every hand-over is "
        "noted. Lost is what was confirmed and never handed out; handed out twice is what a Kassa consumer's inbox refuses.",
    ]
    return "".join(f"<p>{escape(one)}</p>" for one in words)


def _facts(report: Report) -> list[tuple[str, str]]:
    where = report.machine
    facts = [
        ("When", f"{report.at.replace('T', ' ')[:16]} UTC"),
        ("Machine", f"{where['cores']} cores ({where['processor']}), {_gigabytes(int(where['memory_bytes']))} memory"),
        ("System", f"{where['system']}, Python {where['python']}"),
        ("Load before", ", ".join(f"{one:.2f}" for one in report.load_before)),
        ("Kassa's memory", report.database),
    ]
    for one in report.brokers:
        words = [one.about or "says nothing of itself", f"at {one.url}", f"client {one.client}" if one.client else ""]
        took = f"took {one.took_s:.0f} s" if one.took_s else ""
        facts.append((called(one), "; ".join(word for word in (*words, took) if word)))
    return facts


def _gaps(brokers: Sequence[Measured]) -> str:
    items = [
        f"<li><strong>{escape(called(one))}, {escape(gap.what)}:</strong> {escape(gap.why)} To have it: {escape(gap.fix)}</li>"
        for one in brokers
        for gap in one.gaps
    ]
    items += [
        f"<li><strong>{escape(called(one))}:</strong> left behind: {escape(left)}</li>"
        for one in brokers
        for left in one.left_behind
    ]
    if not items:
        return ""
    return f'<section><h2>What is missing</h2><ul class="limits">{"".join(items)}</ul></section>'


def _ms(value: float | None) -> str:
    if value is None:
        return "too few"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _s(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"
