"""`kassa simulate`: whole lives of payments from a seed, with faults; every promise checked after every commit."""

import secrets
import signal
import threading
import time
from typing import TYPE_CHECKING

import click

from kassa.cli.output import json_option, show

if TYPE_CHECKING:
    from kassa.simulation import Report


@click.command()
@click.option("--seed", type=click.IntRange(0), help="One world again; without it, a random one.")
@click.option(
    "--steps", type=click.IntRange(1, 10_000), default=40, show_default=True, help="Things that happen in a world."
)
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="So many worlds, from the seed on.")
@click.option("--forever", is_flag=True, help="World after world, until one breaks a promise or Ctrl-C.")
@json_option
def simulate(seed: int | None, steps: int, count: int, forever: bool, as_json: bool) -> None:
    """Lives through worlds on a virtual clock; the same seed is the same world. Exit code 1 when a promise was broken."""
    first = secrets.randbelow(1 << 32) if seed is None else seed
    reports, good = _live(first, steps, None if forever else count, as_json)
    broken = reports[-1] if reports and not reports[-1].is_good else None
    document = {
        "ok": broken is None,
        "worlds": good + (broken is not None),
        "first_seed": first,
        "steps": steps,
        "last": None if not reports else reports[-1]._asdict(),
    }
    show(document, as_json, lambda: None)
    if broken is not None:
        raise click.ClickException(f"Seed {broken.seed} breaks a promise.")


def _live(first: int, steps: int, count: int | None, is_quiet: bool) -> "tuple[list[Report], int]":
    """The last report, and how many worlds were good; stops at the first that is not."""
    from kassa.simulation import simulate as live
    from kassa.simulation.report import told

    last: list[Report] = []
    good, began = 0, time.monotonic()
    told_to_stop = _stop_between_worlds()
    while (count is None or good < count) and not told_to_stop.is_set():
        last = [live(first + good, steps)]
        if not is_quiet and (count == 1 or not last[0].is_good):
            print(told(last[0]), flush=True)
        if not last[0].is_good:
            break
        good += 1
        if not is_quiet and good % 100 == 0:
            print(f"{good} worlds, all good, {good / (time.monotonic() - began):.0f} a second", flush=True)
    if not is_quiet and count != 1:
        print(
            f"{good} worlds from seed {first}, all good."
            if not last or last[0].is_good
            else f"{good} were good before."
        )
    return last, good


def _stop_between_worlds() -> threading.Event:
    """Set by Ctrl-C, which is how `--forever` ends: the present world is finished, and what was found so far counts."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    return told
