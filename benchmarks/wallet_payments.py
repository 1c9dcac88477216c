"""Claim: durable wallet payments over HTTP, against the usual design doing the same work (usual_design.py).

64 connections by wrk; authenticated, validated, idempotency stored, payment and event rows, net and fee posted, chain; one
API process each, one database, interleaved rounds. Run: python -m benchmarks.wallet_payments --database-url URL
"""

import argparse
import asyncio
import base64
import contextlib
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import asyncpg

from benchmarks.report import Result, write
from kassa.app import App
from kassa.clock import SystemClock
from kassa.db.migrate import migrate
from kassa.journal.change import AccountOpen, Change
from kassa.ledger import chart
from kassa.ledger.model import Limit, single
from kassa.payments.records import Wallet
from kassa.ids import new_id
from kassa.settings import Settings

ROUNDS = 3
SECONDS = 6
CONNECTIONS = 64
MERCHANTS = 200
WALLETS = 2000


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


@contextlib.contextmanager
def process(module: str, *arguments: str) -> Iterator[str]:
    """A server in its own process; yields its URL once it answers."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            if module.endswith("api_process"):
                yield server.stdout.readline().strip() if server.stdout else ""
            else:
                port = arguments[arguments.index("--port") + 1]
                _wait(f"http://127.0.0.1:{port}/openapi.json")
                yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait(url: str) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), urlopen(url, timeout=1):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise SystemExit(f"{url} does not answer")


def load(url: str, targets: Path, run: str, seconds: int = SECONDS) -> dict[str, Any]:
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


async def payments(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM payment"))
    finally:
        await connection.close()


def measure(settings: Settings, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Interleaved rounds of both designs, with many merchants and with one."""
    database_url = settings.database_url or ""
    runs: dict[str, list[dict[str, Any]]] = {}
    for merchants in (MERCHANTS, 1):
        targets = asyncio.run(prepare(settings, folder, merchants))
        kind = "one hot merchant" if merchants == 1 else "many merchants"
        for number in range(ROUNDS):
            for name, module, extra in (
                ("usual design", "benchmarks.usual_design", ("--port", "18931")),
                ("kassa", "benchmarks.api_process", ("--dir", str(folder))),
            ):
                with process(module, "--database-url", database_url, *extra) as url:
                    load(url, targets, f"warm-{name[0]}-{merchants}-{number}", 1)
                    before = asyncio.run(payments(database_url))
                    seen = load(url, targets, f"run-{name[0]}-{merchants}-{number}")
                stored = asyncio.run(payments(database_url)) - before
                if seen["refused"] or seen["errors"] or stored < seen["requests"]:
                    raise SystemExit(f"{name}: {seen}, stored {stored}")
                print(f"{name}, {kind}: {seen['rate']:,.0f}/s", file=sys.stderr)
                runs.setdefault(f"{name}, {kind}", []).append(seen)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    options = parser.parse_args()
    asyncio.run(migrate(options.database_url))
    with tempfile.TemporaryDirectory() as place:
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        (Path(place) / "secrets.key").write_text(key)
        settings = Settings(database_url=options.database_url, port=0, dir=place)
        runs = measure(settings, Path(place))
    results = []
    for kind in ("many merchants", "one hot merchant"):
        base = statistics.median(run["rate"] for run in runs[f"usual design, {kind}"])
        for name in ("usual design", "kassa"):
            some = runs[f"{name}, {kind}"]
            rate = statistics.median(run["rate"] for run in some)
            p50 = statistics.median(run["p50_us"] for run in some) / 1000
            p99 = statistics.median(run["p99_us"] for run in some) / 1000
            note = f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
            results.append(Result(f"{name}, {kind}", rate, "payments/s", rate / base, note))
    write("wallet_payments", results, baseline="the usual design, same load", runs=runs)


if __name__ == "__main__":
    main()
