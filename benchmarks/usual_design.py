"""The usual design, doing the same work as Kassa's wallet payment: what the claims are measured against.

FastAPI and pydantic on uvicorn (uvloop, httptools), an asyncpg pool of 16, one transaction per request: the idempotency key,
the order number, both accounts' locks, the payment, net and fee transfers with both sides' balances, three balances, the
event. The same tables in the same database. A relay reads the events beside it, as Kassa's own readers do.
Run by `benchmarks.wallet_payments`; on its own: python -m benchmarks.usual_design --database-url URL --port N
"""

import argparse
import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import asyncpg
import uvicorn
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from kassa.ids import new_id

WRITER = 99
POOL = 16


class Payer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    wallet: str | None = None
    openid: str | None = None
    ip: str | None = None


class NewPayment(BaseModel):
    """The same fields and limits as POST /v1/payments."""

    model_config = ConfigDict(extra="forbid", strict=True)
    order_id: str = Field(min_length=1, max_length=64)
    amount: int = Field(ge=1, le=9007199254740991)
    currency: str = Field(min_length=3, max_length=3)
    channel: str
    method: str | None = None
    description: str = Field(default="", max_length=127)
    expires_in_s: int = 900
    return_url: str | None = None
    metadata: dict[str, str] = {}
    payer: Payer = Payer()


def build(database_url: str) -> FastAPI:
    """The application."""
    keys: dict[bytes, int] = {}

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(database_url, min_size=POOL, max_size=POOL) as pool:
            app.state.pool = pool
            await pool.execute("CREATE SEQUENCE IF NOT EXISTS usual_seq")
            for row in await pool.fetch("SELECT key_hash, home FROM api_key WHERE state = 'active'"):
                keys[row["key_hash"]] = row["home"]
            relay = asyncio.create_task(_relay(pool))
            yield
            relay.cancel()

    app = FastAPI(lifespan=life)

    @app.post("/v1/payments", status_code=201)
    async def create(
        body: NewPayment, request: Request, authorization: Annotated[str, Header()],
        idempotency_key: Annotated[str, Header()],
    ) -> Response:  # fmt: skip
        home = keys.get(hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest())
        if home is None:
            raise HTTPException(401)
        digest = hashlib.sha256(b"POST /v1/payments" + await request.body()).digest()[:16]
        async with request.app.state.pool.acquire() as connection, connection.transaction():
            answer = await _pay(connection, home, body, idempotency_key, digest)
        return Response(answer, status_code=201, media_type="application/json")

    return app


async def _pay(connection: Any, home: int, body: NewPayment, key: str, digest: bytes) -> bytes:
    now = datetime.now(UTC)
    id, wallet = new_id(), (body.payer.wallet or "").removeprefix("wal_")
    taken = await connection.fetchval(
        "INSERT INTO once (home, operation, key, digest, status, resource, at) VALUES ($1, 'api', $2, $3, 201, $4, $5) "
        "ON CONFLICT DO NOTHING RETURNING 1",
        home, key, digest, id, now,
    )  # fmt: skip
    if taken is None:
        raise HTTPException(409)
    taken = await connection.fetchval(
        "INSERT INTO claim (home, kind, name, resource) VALUES ($1, 'order', $2, $3) ON CONFLICT DO NOTHING RETURNING 1",
        home, body.order_id, id,
    )  # fmt: skip
    if taken is None:
        raise HTTPException(409)
    rows = await connection.fetch(
        "SELECT id, code, credits_posted - debits_posted AS balance, version FROM account "
        "WHERE home = $1 AND currency = $2 AND (code = 1 AND owner = $3 OR code IN (2, 3) AND owner = '') "
        "ORDER BY id FOR UPDATE",
        home, body.currency, wallet,
    )  # fmt: skip
    accounts = {row["code"]: row for row in rows}
    payer, payable, income = accounts[1], accounts[2], accounts[3]
    if payer["balance"] < body.amount:
        raise HTTPException(402)
    fee = body.amount * 6000 // 1_000_000
    net = body.amount - fee
    seq = await connection.fetchval("SELECT nextval('usual_seq')")
    await connection.execute(
        "INSERT INTO payment (home, id, version, sequence, state, kind, order_id, amount, currency, channel, method, wallet, "
        "description, metadata, fee_ppm, fee_on_refund, late_success, created_at, expires_at, amount_refunded, "
        "amount_refunding, fee_refunded, fee_refunding, refunds, writer, seq, ord) "
        "VALUES ($1, $2, 0, 1, 'succeeded', 'payment', $3, $4, $5, 'wallet', 'wallet', $6, $7, $8, 6000, 'returned', "
        "'refund', $9, $10, 0, 0, 0, 0, 0, $11, $12, 0)",
        home, id, body.order_id, body.amount, body.currency, wallet, body.description, json.dumps(body.metadata),
        now, now + timedelta(seconds=body.expires_in_s), WRITER, seq,
    )  # fmt: skip
    balance, version = payer["balance"], payer["version"]
    for ord, (account, amount, code) in enumerate(((payable, net, 1), (income, fee, 2))):
        if amount == 0:
            continue
        balance, version = balance - amount, version + 1
        await connection.execute(
            "INSERT INTO transfer (debit, debit_version, debit_balance, credit, credit_version, credit_balance, amount, "
            "hold_amount, seq, at, root, writer, ord, kind, code) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, 0, $8, $9, $10, $11, $12, 1, $13)",
            payer["id"], version, balance, account["id"], account["version"] + 1, account["balance"] + amount, amount,
            seq, now, id, WRITER, ord + 1, code,
        )  # fmt: skip
        await connection.execute(
            "UPDATE account SET credits_posted = credits_posted + $2, version = version + 1 WHERE id = $1",
            account["id"], amount,
        )  # fmt: skip
    await connection.execute(
        "UPDATE account SET debits_posted = debits_posted + $2, version = $3 WHERE id = $1",
        payer["id"], body.amount, version,
    )  # fmt: skip
    answer = _rendered(id, body, fee, now)
    await connection.execute(
        "INSERT INTO event (writer, seq, ord, home, root, sequence, at, type, data) "
        "VALUES ($1, $2, 3, $3, $4, 1, $5, 'payment.succeeded', $6)",
        WRITER, seq, home, id, now, answer,
    )  # fmt: skip
    return answer


def _rendered(id: str, body: NewPayment, fee: int, now: datetime) -> bytes:
    at = now.isoformat(timespec="milliseconds")
    return json.dumps(
        {
            "id": f"pay_{id}", "object": "payment", "order_id": body.order_id, "amount": body.amount,
            "currency": body.currency, "state": "succeeded", "channel": "wallet", "method": "wallet", "next_action": None,
            "amount_refunded": 0, "amount_refunding": 0, "fee": fee, "attempts": [], "description": body.description,
            "metadata": body.metadata, "created_at": at,
            "expires_at": (now + timedelta(seconds=body.expires_in_s)).isoformat(timespec="milliseconds"),
            "succeeded_at": at, "closed_at": None, "failure": None,
        }
    ).encode()  # fmt: skip


async def _relay(pool: Any) -> None:
    """Reads what happened, in order, and keeps its place: what any outbox relay does."""
    cursor = await pool.fetchval("SELECT coalesce(max(seq), 0) FROM event WHERE writer = $1", WRITER)
    await pool.execute(
        "INSERT INTO cursor_position (group_name, writer, seq, ord) VALUES ('usual', $1, $2, 0) "
        "ON CONFLICT (group_name, writer) DO UPDATE SET seq = EXCLUDED.seq",
        WRITER, cursor,
    )  # fmt: skip
    while True:
        rows = await pool.fetch(
            "SELECT seq, root, sequence, type, data FROM event WHERE writer = $1 AND seq > $2 ORDER BY seq LIMIT 500",
            WRITER, cursor,
        )  # fmt: skip
        if rows:
            cursor = rows[-1]["seq"]
            await pool.execute("UPDATE cursor_position SET seq = $1 WHERE group_name = 'usual'", cursor)
        else:
            await asyncio.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database-url", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        build(options.database_url), host="127.0.0.1", port=options.port, loop="uvloop", http="httptools",
        log_level="warning", access_log=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
