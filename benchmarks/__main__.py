"""`make bench`: every benchmark in turn on one PostgreSQL of its own; one table at the end, results kept.

python -m benchmarks [NAME…] [--quick] [--full]
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    backlog,
    binders,
    callbacks,
    chain,
    channel_payments,
    growth,
    idle,
    journal_transfers,
    report,
    wallet_payments,
)
from benchmarks.stage import Stage, opened
from kassa import heap

BENCHMARKS: dict[str, Callable[[Stage], None]] = {
    "wallet_payments": wallet_payments.run,
    "journal_transfers": journal_transfers.run,
    "callbacks": callbacks.run,
    "channel_payments": channel_payments.run,
    "chain": chain.run,
    "backlog": backlog.run,
    "binders": binders.run,
    "growth": growth.run,
    "idle": idle.run,
}
QUICK = Path(".cache") / "benchmarks"
"""A quick run shows that everything works and measures nothing, so it leaves the results alone."""
LOAD_MAX = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all unless told")
    parser.add_argument("--quick", action="store_true", help=f"one short round of each, kept in {QUICK}")
    parser.add_argument(
        "--full", action="store_true", help="growth up to a million payments, backlogs of a million events"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    # Ended from outside, it stops what it started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    results = QUICK if options.quick else report.RESULTS
    if os.getloadavg()[0] > LOAD_MAX:
        print(f"The load is {os.getloadavg()[0]:.2f}: other work on this machine spoils the figures.", file=sys.stderr)
    # As Kassa's processes do: this one writes events, and every contender of the binders runs in it.
    heap.settle()
    with opened(results, is_quick=options.quick, is_full=options.full) as stage:
        stage.tell(f"PostgreSQL {stage.running.binaries.version}, {stage.rounds} rounds")
        for name, benchmark in BENCHMARKS.items():
            if not options.names or name in options.names:
                started = time.monotonic()
                stage.tell(f"{name} …")
                benchmark(stage)
                stage.tell(f"{name}: done in {time.monotonic() - started:.0f} s")
    kept = report.kept(results, BENCHMARKS)
    report.show(kept)
    print(f"Kept in {report.summarise(kept, results)}")


if __name__ == "__main__":
    main()
