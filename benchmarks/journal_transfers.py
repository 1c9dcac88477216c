"""Claim: the journal makes at least four times as many transfers durable as pgbench makes simple updates, on one server.

512 changes in flight, one transfer each, 10 000 accounts; against `pgbench -N` (simple-update, 64 clients, prepared) on the
same server in the same run, interleaved.
"""

import asyncio
import random
import statistics
from time import perf_counter

import asyncpg
import uvloop

from benchmarks.report import Result, write
from benchmarks.stage import Stage, pgbench
from kassa.ids import new_id
from kassa.journal.change import AccountOpen, Change, Committed
from kassa.journal.writer import PostgresJournal
from kassa.ledger import chart
from kassa.ledger.model import AccountKey, Limit, single
from kassa.tables import TABLES

IN_FLIGHT = 512
ACCOUNTS = 10_000
BASELINE, MANY, HOT = "pgbench -N", "journal, many accounts", "journal, one hot account"
TARGET = 4.0


async def transfers_per_second(url: str, seconds: int, *, hot: bool) -> float:
    """Transfers that became durable per second; `hot`: all credit one account."""
    journal = PostgresJournal(lambda: asyncpg.connect(url), TABLES)
    await journal.start()
    wallets = await _wallets(journal)
    merchants = [chart.payable(home, "CNY") for home in range(1, 2 if hot else 501)]
    chance = random.Random(1)
    count = 0
    end = perf_counter() + seconds

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


def run(stage: Stage) -> None:
    """Interleaved rounds."""
    url = stage.database("journal_transfers")
    rates: dict[str, list[float]] = {BASELINE: [], MANY: [], HOT: []}
    for _ in range(stage.rounds):
        rates[BASELINE].append(pgbench(stage, url))
        rates[MANY].append(uvloop.run(transfers_per_second(url, stage.seconds, hot=False)))
        rates[HOT].append(uvloop.run(transfers_per_second(url, stage.seconds, hot=True)))
        stage.tell("  " + ", ".join(f"{name}: {runs[-1]:,.0f}/s" for name, runs in rates.items()))
    stage.drop("journal_transfers")
    base = statistics.median(rates[BASELINE])
    results = [Result(BASELINE, base, "updates/s", 1.0)]
    for name in (MANY, HOT):
        rate = statistics.median(rates[name])
        met = rate / base >= TARGET
        results.append(Result(name, rate, "transfers/s", rate / base, target=f"≥ {TARGET:g} ×", met=met))
    write("journal_transfers", results, baseline="pgbench -N, 64 clients, prepared", runs=rates, folder=stage.results)
