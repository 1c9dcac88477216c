"""Measurements for people who have to choose: `kassa bench brokers`."""

import asyncio
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kassa.cli.options import broker_option, run
from kassa.cli.output import json_option, note, show, table

if TYPE_CHECKING:
    from kassa.bench.model import Measured, Report
    from kassa.bench.run import Plan
    from kassa.messaging.broker_names import Named

DEFAULT_BROKERS = ("postgres", "zeromq")
SECONDS, QUICK_SECONDS = 1.2, 0.4
KINDS = ("postgres", "rabbitmq", "kafka", "rocketmq", "zeromq")


@click.group()
def bench() -> None:
    """Measures what you have, to choose by."""


@bench.command()
@broker_option
@click.option(
    "--database-url",
    metavar="URL",
    help="postgresql://… to work in a database of its own there [default: a server of Kassa's own].",
)
@click.option(
    "--out", default="kassa-brokers.html", show_default=True, metavar="FILE", help="The page; its JSON is beside it."
)
@click.option("--quick", is_flag=True, help="Seconds instead of minutes: shows that it works, measures little.")
@click.option(
    "--seconds", type=click.FloatRange(0.1, 60), help=f"How long each measurement takes [default: {SECONDS}]."
)
@click.option(
    "--kill-command",
    multiple=True,
    metavar="NAME=COMMAND",
    help="How this server may be killed with -9, to see what is lost; NAME: rabbitmq …, or its URL.",
)
@click.option(
    "--start-command",
    multiple=True,
    metavar="NAME=COMMAND",
    help="How it is started again; none: something does it by itself.",
)
@click.option("--no-kill", is_flag=True, help="Kill nothing, not even what this command has started itself.")
@click.option(
    "--server-pid",
    multiple=True,
    metavar="NAME=PID",
    help="The server's process on this machine, where it is not found by its port.",
)
@click.option(
    "--about",
    multiple=True,
    metavar="NAME=WORDS",
    help="What the page should say of a server: its version, where it runs.",
)
@click.option(
    "--rate", type=click.FloatRange(min=0.001), default=200.0, show_default=True, help="Need: messages a second."
)
@click.option(
    "--latency-ms",
    type=click.FloatRange(min=0.1),
    default=100.0,
    show_default=True,
    help="Need: 99 of 100 are handled within it.",
)
@click.option(
    "--order/--no-order", default=True, show_default=True, help="Need: messages of one key (one payment) stay in order."
)
@click.option(
    "--retention-days",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Need: the broker itself keeps what was handled.",
)
@click.option("--replay", is_flag=True, help="Need: later consumers read from the beginning, from the broker.")
@click.option("--may-lose", is_flag=True, help="No need: what was confirmed may be lost when the server is killed.")
@click.option("--runs", multiple=True, metavar="KIND,…", help="What you run already: rabbitmq, kafka …")
@json_option
def brokers(
    brokers: tuple[str, ...], database_url: str | None, out: str, quick: bool, seconds: float | None,
    kill_command: tuple[str, ...], start_command: tuple[str, ...], no_kill: bool, server_pid: tuple[str, ...],
    about: tuple[str, ...], rate: float, latency_ms: float, order: bool, retention_days: float, replay: bool, may_lose: bool,
    runs: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Which queue should I choose? Measures brokers through Kassa itself and writes a page with a recommendation.

    Without --broker: PostgreSQL alone, and ZeroMQ. Each gets topics of random names, which are removed afterwards. Ctrl-C keeps
    what was measured. Exit code 1 when nothing could be measured.
    """
    from kassa.bench.model import Needs
    from kassa.bench.run import Plan, write
    from kassa.messaging.broker_names import read_brokers

    named = read_brokers(brokers or DEFAULT_BROKERS)
    if any(one.url.startswith("memory") for one in named):
        raise click.UsageError("memory is no broker: it is inside one process, for tests.")
    needs = Needs(
        rate_per_s=rate, latency_ms=latency_ms, order=order, retention_days=retention_days, replay=replay,
        outlives_kill=not may_lose, runs=_kinds(runs),
    )  # fmt: skip
    pids = {name: [_pid(text)] for name, text in _by_name("--server-pid", server_pid, named).items()}
    plan = Plan(
        named, needs, seconds=seconds or (QUICK_SECONDS if quick else SECONDS), is_quick=quick, kills=not no_kill,
        database_url=database_url, kill=_by_name("--kill-command", kill_command, named),
        start=_by_name("--start-command", start_command, named), pids=pids, about=_by_name("--about", about, named),
    )  # fmt: skip
    report = run(_measured(plan))
    page, document = write(report, Path(out))
    show(report, as_json, lambda: _told(report))
    note(f"The page: {page.absolute()}\nThe same for programs: {document.absolute()}")
    if not any(one.is_measured for one in report.brokers):
        raise click.ClickException("Nothing could be measured.")


async def _measured(plan: "Plan") -> "Report":
    """Ctrl-C ends what goes on; what was measured counts. A second one ends everything at once."""
    from kassa.bench.run import measure
    from kassa.cli.benchview import View

    stop = asyncio.Event()

    def told_to_stop() -> None:
        if stop.is_set():
            loop.remove_signal_handler(signal.SIGINT)
        note("Ends, and removes what it made …")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told_to_stop)
    with View(plan.brokers) as view:
        return await measure(plan, view.tell, stop)


def _by_name(option: str, given: Iterable[str], named: "list[Named]") -> dict[str, str]:
    """NAME=VALUE; NAME may be the broker's URL."""
    urls = {one.url: one.name for one in named} | {one.name: one.name for one in named}
    found: dict[str, str] = {}
    for text in given:
        # A URL has `=` itself: the longest name that fits is meant.
        name = max((one for one in urls if text.startswith(f"{one}=")), key=len, default=None)
        if name is None:
            known = ", ".join(one.name for one in named)
            raise click.UsageError(f"{option} wants NAME=…, where NAME is one of {known}; given: {text!r}.")
        found[urls[name]] = text[len(name) + 1 :]
    return found


def _pid(text: str) -> int:
    if not text.isdigit():
        raise click.UsageError(f"--server-pid wants NAME=PID; {text!r} is no number.")
    return int(text)


def _kinds(given: Iterable[str]) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind for text in given for kind in text.split(",") if kind))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise click.UsageError(f"--runs knows {', '.join(KINDS)}; given: {', '.join(unknown)}.")
    return kinds


# For people


def _told(report: "Report") -> None:
    heads = (
        "broker",
        "through/s",
        "in envelopes",
        "p50",
        "p99",
        "at /s",
        "back after kill",
        "lost",
        "twice",
        "verdict",
    )
    verdicts = {one.name: one.verdict for one in report.recommendation.ranking}
    table(heads, [_row(one, verdicts.get(one.name, "")) for one in report.brokers], right=heads[1:9])
    print(report.recommendation.headline + ".")
    for words in report.recommendation.words:
        print(f"  {words}")
    for one in report.brokers:
        for gap in one.gaps:
            note(f"! {one.name}: {gap.what} was not measured. {gap.why} {gap.fix}")
        for left in one.left_behind:
            note(f"! {one.name}: left behind: {left}")


def _row(one: "Measured", verdict: str) -> tuple[object, ...]:
    from kassa.bench.model import through_per_s
    from kassa.cli.watch import lasting, rate

    enveloped = one.best("envelopes")
    # The largest of the fixed loads, which all brokers have had.
    load = max(
        (each for each in one.latency if not each.is_half_of_most), key=lambda each: each.asked_per_s, default=None
    )
    p99 = None if load is None else load.p99_ms if load.p99_ms is not None else load.max_ms
    fault = one.recovery
    return (
        one.name, rate(one.through_per_s) if one.through_per_s else "–", rate(through_per_s(enveloped)) if enveloped else "–",
        lasting(load.p50_ms / 1000) if load else "–", lasting(p99 / 1000) if p99 is not None else "–",
        rate(load.asked_per_s) if load else "–", lasting(fault.caught_up_s) if fault else "–", fault.lost if fault else "–",
        fault.repeated if fault else "–", verdict,
    )  # fmt: skip
