"""`python -m kassa.simulation`: one seed, a range of seeds, or one after the other for ever."""

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count

from kassa.simulation.report import Report, told
from kassa.simulation.world import STEPS, simulate

CHUNK = 50
"""Seeds that one process takes at a time: about a second's work."""


def main(argv: Sequence[str]) -> int:
    """Runs what is asked, prints what happened, and says 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="kassa.simulation", description="Whole lives of payments from a seed.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seed", type=int, help="this seed alone")
    what.add_argument("--seeds", type=_range, metavar="A..B", help="seeds from A to B, B included")
    what.add_argument("--forever", action="store_true", help="one after the other until a promise is broken")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many things happen in each (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    asked = parser.parse_args(argv)
    if asked.forever:
        first = int.from_bytes(os.urandom(4), "big")
        return _run(count(first), asked.steps, asked.jobs)
    return _run(asked.seeds or range(asked.seed or 0, (asked.seed or 0) + 1), asked.steps, asked.jobs)


def simulate_all(seeds: Iterable[int], steps: int = STEPS, *, jobs: int = 1) -> Iterator[Report]:
    """The report of every seed, in their order."""
    if jobs == 1:
        yield from (simulate(seed, steps) for seed in seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        chunk: list[int] = []
        for seed in seeds:
            chunk.append(seed)
            if len(chunk) == CHUNK * jobs:
                yield from pool.map(partial(simulate, steps=steps), chunk, chunksize=CHUNK)
                chunk = []
        yield from pool.map(partial(simulate, steps=steps), chunk, chunksize=CHUNK)


def _run(seeds: Iterable[int], steps: int, jobs: int) -> int:
    total: Counter[str] = Counter()
    done = 0
    try:
        for report in simulate_all(seeds, steps, jobs=jobs):
            done += 1
            total.update(report.counts)
            if not report.is_good:
                print(told(report))
                return 1
            if done % 1000 == 0:
                print(f"{done} seeds are good, the last one was {report.seed}", flush=True)
    except KeyboardInterrupt:
        # For ever ends when somebody has seen enough.
        print()
    print(f"{done} seeds are good.")
    for name, number in sorted(total.items()):
        print(f"  {number:>10}  {name}")
    return 0


def _range(text: str) -> range:
    first, dots, last = text.partition("..")
    if not dots or not first.isdigit() or not last.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a range like 0..999")
    return range(int(first), int(last) + 1)
