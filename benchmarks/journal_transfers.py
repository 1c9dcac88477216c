"""Claim: the journal makes at least four times as many transfers durable as pgbench makes simple updates, on one server.

512 changes in flight, one transfer each, 10 000 accounts; against `pgbench -N` (simple-update, 64 clients, prepared) on the
same server in the same run, interleaved. Run: python -m benchmarks.journal_transfers --database-url URL --pg-bin DIR
"""

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
from pathlib import Path
from time import perf_counter

import asyncpg
import uvloop

from benchmarks.report import Result, write
from kassa.db.migrate import migrate
from kassa.ids import new_id
from kassa.journal.change import AccountOpen, Change, Committed
from kassa.journal.writer import PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import AccountKey, Limit, single
from kassa.tables import TABLES

IN_FLIGHT = 512
ACCOUNTS = 10_000
SECONDS = 6
ROUNDS = 3


async def transfers_per_second(url: str, *, hot: bool) -> float:
    """Transfers that became durable per second; `hot`: all credit one account."""
    journal = PostgresJournal(lambda: asyncpg.connect(url), TABLES)
    await journal.start()
    wallets = await _wallets(journal)
    merchants = [chart.payable(home, "CNY") for home in range(1, 2 if hot else 501)]
    chance = random.Random(1)
    count = 0
    end = perf_counter() + SECONDS

    async def caller() -> None:
        nonlocal count
        while perf_counter() < end:
            transfer = single(chart.Posting.PAYMENT, chance.choice(wallets), chance.choice(merchants), 1)
            verdict = await journal.submit(Change(home=1, transfers=(transfer,)))
            if not isinstance(verdict, Committed):
                raise SystemExit(f"a transfer was refused: {verdict}")
            count += 1

    started = perf_counter()
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    rate = count / (perf_counter() - started)
    await journal.stop()
    return rate


async def _wallets(journal: PostgresJournal) -> list[AccountKey]:
    keys = [chart.wallet(1, new_id(), "CNY") for _ in range(ACCOUNTS)]
    source = chart.receivable(1, "CNY")
    for start in range(0, ACCOUNTS, 100):
        some = keys[start : start + 100]
        opens = tuple(AccountOpen(key, Limit.DEBITS_WITHIN_CREDITS) for key in some)
        fund = tuple(single(chart.Posting.TOPUP, source, key, 10**9) for key in some)
        await journal.commit(Change(home=1, opens=opens, transfers=fund))
    return keys


def pgbench(url: str, pg_bin: Path) -> float:
    """Simple updates per second, 64 clients, prepared statements."""
    command = [str(pg_bin / "pgbench"), "-N", "-M", "prepared", "-c", "64", "-j", "2", "-T", str(SECONDS), "-n", url]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    found = re.search(r"tps = ([0-9.]+)", output)
    if found is None:
        raise SystemExit(f"pgbench said nothing of tps: {output}")
    return float(found.group(1))


def main() -> None:
    """Three interleaved rounds; prints and keeps the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--pg-bin", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(migrate(options.database_url))
    subprocess.run(
        [str(options.pg_bin / "pgbench"), "-i", "-q", "-s", "20", options.database_url], check=True, capture_output=True
    )
    rates: dict[str, list[float]] = {"pgbench -N": [], "journal, many accounts": [], "journal, one hot account": []}
    for _ in range(ROUNDS):
        rates["pgbench -N"].append(pgbench(options.database_url, options.pg_bin))
        rates["journal, many accounts"].append(uvloop.run(transfers_per_second(options.database_url, hot=False)))
        rates["journal, one hot account"].append(uvloop.run(transfers_per_second(options.database_url, hot=True)))
    base = statistics.median(rates["pgbench -N"])
    write(
        "journal_transfers",
        [Result(name, statistics.median(runs), "transfers/s", statistics.median(runs) / base) for name, runs in rates.items()],
        baseline="pgbench -N, 64 clients, prepared",
        runs=rates,
    )


if __name__ == "__main__":
    main()
