"""How many channel payments a second are made through the API and a provider's process, and how much of that is RSA.

Each is a POST that is answered with the code that the payer scans: the intent is stored, the request signed, the
provider checks it, stores the order and signs its answer, we check that and store it. The provider here is our sandbox,
on the same machine. RSA operations are timed alone in the same run and counted per payment: we sign one request and check
one answer, the provider checks one and signs one.
"""

import asyncio
import json
import statistics
from time import perf_counter
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from benchmarks.processes import cpu_s
from benchmarks.report import Result, write
from benchmarks.sender import raw_request, send_all
from benchmarks.stage import Server, Stage, kassa_api, value, wechat_sandbox
from kassa.app import App
from kassa.channels.wechat_crypto import sign, verify
from kassa.settings import Settings

DATABASE = "channel_payments"
PAYMENTS, PAYMENTS_QUICK = 3000, 400
WARM = 200
"""Before the clock runs."""
TEXT = b"x" * 300
"""As long as what is signed for an order."""
OPERATIONS = 400
WAITING = "SELECT count(*) FROM attempt WHERE state = 'pending_payer' AND next_action IS NOT NULL"


class Rsa(NamedTuple):
    """Seconds of one operation, alone on this machine."""

    sign_s: float
    verify_s: float

    @property
    def ours_s(self) -> float:
        """Per payment; the provider's side has the same operations the other way round."""
        return self.sign_s + self.verify_s


def run(stage: Stage) -> None:
    """Rounds of payments by one merchant over 64 connections."""
    settings = stage.settings(stage.database(DATABASE))
    url = settings.database_url or ""
    count = PAYMENTS_QUICK if stage.is_quick else PAYMENTS
    runs: list[dict[str, Any]] = []
    with wechat_sandbox(stage.folder / "wechat") as (credentials, sandbox):
        key = asyncio.run(_key(settings, credentials))
        with kassa_api(settings) as api:
            send_all(api.url, [_request(key, f"warm-{place}") for place in range(WARM)], stage.folder / "orders")
            for number in range(1, stage.rounds + 1):
                runs.append(_round(stage, api, sandbox, key, number, count))
                waiting = value(url, WAITING)
                if runs[-1]["statuses"] != {"201": count} or waiting != WARM + count * number:
                    raise SystemExit(f"channel payments: {runs[-1]}, waiting for the payer {waiting}")
    stage.drop(DATABASE)
    write("channel_payments", _results(runs, count), baseline="", runs={"rounds": runs}, folder=stage.results)


def _round(stage: Stage, api: Server, sandbox: int, key: str, number: int, count: int) -> dict[str, Any]:
    rsa = _rsa()
    before = cpu_s(api.pid), cpu_s(sandbox)
    seen = send_all(api.url, [_request(key, f"{number}-{place}") for place in range(count)], stage.folder / "orders")
    seen |= {
        "sign_ms": rsa.sign_s * 1000,
        "verify_ms": rsa.verify_s * 1000,
        "rsa_ours_s": rsa.ours_s * count,
        "cpu_api_s": cpu_s(api.pid) - before[0],
        "cpu_sandbox_s": cpu_s(sandbox) - before[1],
    }
    stage.tell(f"  {seen['rate']:,.0f}/s, signing {seen['sign_ms']:.2f} ms")
    return seen


def _results(runs: list[dict[str, Any]], count: int) -> list[Result]:
    def median(name: str) -> float:
        return float(statistics.median(one[name] for one in runs))

    share = statistics.median(one["rsa_ours_s"] / one["cpu_api_s"] for one in runs)
    share_of_provider = statistics.median(one["rsa_ours_s"] / one["cpu_sandbox_s"] for one in runs)
    each_ms = median("sign_ms") + median("verify_ms")
    return [
        Result(
            "channel payments made, API and sandbox",
            median("rate"),
            "payments/s",
            note=f"p50 {median('p50_ms'):.0f} ms, p99 {median('p99_ms'):.0f} ms at 64 connections",
        ),
        Result(
            "RSA in the API's processor time",
            share * 100,
            "%",
            note=f"{each_ms:.2f} ms a payment (sign {median('sign_ms'):.2f}, check {median('verify_ms'):.2f}) of "
            f"{median('cpu_api_s') / count * 1000:.2f} ms",
        ),
        Result(
            "RSA in the sandbox's processor time",
            share_of_provider * 100,
            "%",
            note=f"of {median('cpu_sandbox_s') / count * 1000:.2f} ms a payment",
        ),
    ]


async def _key(settings: Settings, credentials: dict[str, str]) -> str:
    app = App(settings)
    await app.start()
    try:
        merchant = await app.merchants.create("Shop", fee_ppm=6000)
        await app.merchants.set_channel(merchant.id, "wechat", credentials)
        return (await app.merchants.create_key(merchant.id)).key
    finally:
        await app.stop()


def _request(key: str, name: str) -> bytes:
    body = {"order_id": name, "amount": 100, "currency": "CNY", "channel": "wechat", "method": "native"}
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": name, "Content-Type": "application/json"}
    return raw_request("/v1/payments", headers, json.dumps(body).encode())


def _rsa() -> Rsa:
    key = generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key()
    signature = sign(key, TEXT)
    started = perf_counter()
    for _ in range(OPERATIONS):
        sign(key, TEXT)
    signed = perf_counter()
    for _ in range(OPERATIONS):
        verify(public, TEXT, signature)
    return Rsa((signed - started) / OPERATIONS, (perf_counter() - signed) / OPERATIONS)
