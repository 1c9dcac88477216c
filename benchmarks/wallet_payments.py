"""Claim: durable wallet payments over HTTP, against the usual design doing the same work (usual_design.py).

64 connections by wrk; authenticated, validated, idempotency stored, payment and event rows, net and fee posted, chain; one
API process each with its reader of events beside it, one database, interleaved rounds. For the record, pgbench's simple
updates in the same rounds.
"""

import asyncio
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.report import Result, write
from benchmarks.stage import Stage, kassa_api, pgbench, usual_api, value
from kassa.app import App
from kassa.clock import SystemClock
from kassa.ids import new_id
from kassa.journal.change import AccountOpen, Change
from kassa.ledger import chart
from kassa.ledger.model import Limit, single
from kassa.payments.records import Wallet
from kassa.settings import Settings

CONNECTIONS = 64
MERCHANTS = 200
WALLETS = 2000
DATABASE = "wallet_payments"
PAYMENTS = "SELECT count(*) FROM payment"
USUAL, KASSA, PGBENCH = "usual design", "kassa", "pgbench -N"
TARGETS = {"many merchants": (7.0, MERCHANTS), "one hot merchant": (14.0, 1)}
"""How many times the usual design, and how many merchants the load is for."""
P99_MAX_MS = 25.0
PEERS = "the best peer measured: 0.115 ×, on a hot account 0.053 ×"
"""One durable payment per second against simple updates of pgbench per second, on this kind of machine."""


async def prepare(settings: Settings, folder: Path, merchants: int) -> Path:
    """Merchants with keys and funded wallets; returns a file with a line «key wallet» for each wallet."""
    app = App(settings)
    await app.start()
    lines = []
    for number in range(merchants):
        merchant = await app.merchants.create(f"m{number}", fee_ppm=6000)
        key = await app.merchants.create_key(merchant.id)
        for place in range(WALLETS // merchants):
            wallet = Wallet(
                home=merchant.home, id=new_id(), version=0, sequence=0, state="open", user=f"u{place}", currency="CNY",
                created_at=SystemClock().now(),
            )  # fmt: skip
            account = chart.wallet(merchant.home, wallet.id, "CNY")
            await app.journal.commit(
                Change(
                    home=merchant.home, new=(wallet,), root=wallet.id,
                    opens=(
                        AccountOpen(account, Limit.DEBITS_WITHIN_CREDITS),
                        AccountOpen(chart.payable(merchant.home, "CNY"), Limit.DEBITS_WITHIN_CREDITS),
                        AccountOpen(chart.fee_income(merchant.home, "CNY"), Limit.NONE),
                    ),
                    transfers=(single(chart.Posting.TOPUP, chart.receivable(merchant.home, "CNY"), account, 10**12),),
                )
            )  # fmt: skip
            lines.append(f"{key.key} wal_{wallet.id}")
    await app.stop()
    targets = folder / f"targets-{merchants}"
    targets.write_text("\n".join(lines) + "\n")
    return targets


def load(url: str, targets: Path, run: str, seconds: int) -> dict[str, Any]:
    """What wrk saw."""
    script = Path(__file__).with_name("payments.lua")
    output = subprocess.run(
        ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script), url, "--", str(targets), run],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    seen: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    seen["rate"] = seen["requests"] / seen["duration_us"] * 1e6
    return seen


def run(stage: Stage) -> None:
    """Interleaved rounds of both designs, with many merchants and with one."""
    settings = stage.settings(stage.database(DATABASE))
    url = settings.database_url or ""
    runs: dict[str, list[dict[str, Any]]] = {}
    updates: list[float] = []
    for kind, (_, merchants) in TARGETS.items():
        targets = asyncio.run(prepare(settings, stage.folder, merchants))
        for number in range(stage.rounds):
            updates.append(pgbench(stage, url))
            for name, server in ((USUAL, usual_api), (KASSA, kassa_api)):
                with server(settings) as api:
                    load(api.url, targets, f"warm-{name[0]}-{merchants}-{number}", 1)
                    before = value(url, PAYMENTS)
                    seen = load(api.url, targets, f"run-{name[0]}-{merchants}-{number}", stage.seconds)
                stored = value(url, PAYMENTS) - before
                if seen["refused"] or seen["errors"] or stored < seen["requests"]:
                    raise SystemExit(f"{name}: {seen}, stored {stored}")
                stage.tell(f"  {name}, {kind}: {seen['rate']:,.0f}/s")
                runs.setdefault(f"{name}, {kind}", []).append(seen)
    stage.drop(DATABASE)
    kept = {**runs, PGBENCH: updates}
    write(DATABASE, _results(runs, updates), baseline="the usual design, same load", runs=kept, folder=stage.results)


def _results(runs: dict[str, list[dict[str, Any]]], updates: list[float]) -> list[Result]:
    results = []
    for kind, (target, _) in TARGETS.items():
        base = statistics.median(run["rate"] for run in runs[f"{USUAL}, {kind}"])
        for name in (USUAL, KASSA):
            some = runs[f"{name}, {kind}"]
            rate = statistics.median(run["rate"] for run in some)
            p50 = statistics.median(run["p50_us"] for run in some) / 1000
            p99 = statistics.median(run["p99_us"] for run in some) / 1000
            note = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
            if name == USUAL:
                results.append(Result(f"{name}, {kind}", rate, "payments/s", 1.0, note))
                continue
            asked = f"≥ {target:g} ×, p99 < {P99_MAX_MS:g} ms"
            met = rate / base >= target and p99 < P99_MAX_MS
            results.append(Result(f"{name}, {kind}", rate, "payments/s", rate / base, note, asked, met))
    simple = statistics.median(updates)
    results.append(Result(PGBENCH, simple, "updates/s", note="64 clients, prepared, same server"))
    for kind in TARGETS:
        rate = statistics.median(run["rate"] for run in runs[f"{KASSA}, {kind}"])
        results.append(Result(f"{KASSA}, {kind}, against {PGBENCH}", rate, "payments/s", rate / simple, PEERS))
    return results
