"""Claim: with 10 000, 100 000 and (--full) 1 000 000 payments stored, wallet payments stay as quick within 20 %.

One API process takes them all, in one database. At each size: the rate (the median of rounds), the bytes of database for
each payment, by table too, and the memory of the API (PSS), which must stay flat.
"""

import asyncio
import statistics
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.processes import pss_bytes
from benchmarks.report import Result, write
from benchmarks.stage import Server, Stage, kassa_api, value
from benchmarks.wallet_payments import MERCHANTS, PAYMENTS, load, prepare

DATABASE = "growth"
SIZES, SIZE_FULL, SIZES_QUICK = (10_000, 100_000), 1_000_000, (2000, 6000)
WITHIN = 0.20
MEMORY_GROWTH_MAX = 0.10
"""Of what it was at the first size: allocators settle, leaks do not."""
FILL_S, FILL_S_MAX = 2, 1800
RUN_S = 3
"""Short, so that measuring at the first size does not make it the second."""
TABLES_SHOWN = 6
TABLES = """
    SELECT relname, pg_total_relation_size(oid)
    FROM pg_class
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""


def run(stage: Stage) -> None:
    """Fill, measure, fill on."""
    settings = stage.settings(stage.database(DATABASE))
    url = settings.database_url or ""
    targets = asyncio.run(prepare(settings, stage.folder, MERCHANTS))
    empty = asyncio.run(_sizes(url))
    sizes = SIZES_QUICK if stage.is_quick else (*SIZES, SIZE_FULL) if stage.is_full else SIZES
    runs: list[dict[str, Any]] = []
    with kassa_api(settings) as api:
        for size in sizes:
            _fill(url, api, targets, size)
            runs.append(_measure(stage, url, api, targets, empty))
            rate, each = runs[-1]["rate"], runs[-1]["bytes_each"]
            stage.tell(f"  {runs[-1]['payments']:,} payments: {rate:,.0f}/s, {each:,.0f} bytes each")
    stage.drop(DATABASE)
    first = f"the same API and database with {runs[0]['payments']:,} payments"
    write("growth", _results(runs), baseline=first, runs={"sizes": runs}, folder=stage.results)


def _fill(url: str, api: Server, targets: Path, size: int) -> None:
    for number in range(FILL_S_MAX // FILL_S):
        if value(url, PAYMENTS) >= size:
            return
        load(api.url, targets, f"fill-{size}-{number}", FILL_S)
    raise SystemExit(f"{size} payments were not made in {FILL_S_MAX} s")


def _measure(stage: Stage, url: str, api: Server, targets: Path, empty: dict[str, int]) -> dict[str, Any]:
    stored = value(url, PAYMENTS)
    rounds = [load(api.url, targets, f"run-{stored}-{number}", RUN_S) for number in range(stage.rounds)]
    if any(one["refused"] or one["errors"] for one in rounds):
        raise SystemExit(f"growth: {rounds}")
    after = value(url, PAYMENTS)
    grown = {name: size - empty.get(name, 0) for name, size in asyncio.run(_sizes(url)).items()}
    return {
        "payments": stored,
        "rate": statistics.median(one["rate"] for one in rounds),
        "p99_ms": statistics.median(one["p99_us"] for one in rounds) / 1000,
        "bytes_each": grown.pop(DATABASE) / after,
        "bytes_each_by_table": {name: size / after for name, size in grown.items() if size},
        "api_bytes": pss_bytes(api.pid),
        "rounds": rounds,
    }


async def _sizes(url: str) -> dict[str, int]:
    """Bytes of each table with its indexes, and of the whole database under the name DATABASE."""
    connection = await asyncpg.connect(url)
    try:
        sizes = {row[0]: row[1] for row in await connection.fetch(TABLES)}
        sizes[DATABASE] = await connection.fetchval("SELECT pg_database_size(current_database())")
        return sizes
    finally:
        await connection.close()


def _results(runs: list[dict[str, Any]]) -> list[Result]:
    first, results = runs[0], []
    for one in runs:
        ratio = one["rate"] / first["rate"]
        is_first = one is first
        results.append(
            Result(
                f"with {one['payments']:,} payments stored",
                one["rate"],
                "payments/s",
                ratio,
                f"p99 {one['p99_ms']:.1f} ms",
                "" if is_first else f"≥ {1 - WITHIN:g} ×",
                None if is_first else ratio >= 1 - WITHIN,
            )
        )
    last = runs[-1]
    tables = sorted(last["bytes_each_by_table"].items(), key=lambda item: -item[1])[:TABLES_SHOWN]
    note = ", ".join(f"{name} {size:,.0f}" for name, size in tables)
    results.append(Result("database for each payment, with indexes", last["bytes_each"], "bytes", note=note))
    growth = last["api_bytes"] / first["api_bytes"]
    results.append(
        Result(
            f"memory of the API after {last['payments']:,} payments",
            last["api_bytes"] / 1e6,
            "MB",
            growth,
            f"PSS; {first['api_bytes'] / 1e6:.1f} MB at the first size",
            f"≤ {1 + MEMORY_GROWTH_MAX:g} ×",
            growth <= 1 + MEMORY_GROWTH_MAX,
        )
    )
    return results
