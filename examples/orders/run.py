"""The whole example, from nothing: Kassa, the order service, a shopper who pays, and parcels. Ends with exit code 0 only if
each order was packed once, though the service was killed in between.

    .venv/bin/python examples/orders/run.py [BROKER_URL]

Without a broker it is ZeroMQ, which needs none.
"""

import asyncio
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import asyncpg
import httpx

from kassa.client import AsyncKassa
from kassa.db.embedded import temporary_directory

HERE = Path(__file__).parent
WAIT_S = 60.0
REPEATS_S = 1.0
"""What was packed may come again for so long before it is counted."""


@contextmanager
def started(*command: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process, and the line by which it says that it is ready."""
    with (
        TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                said.seek(0)
                raise SystemExit(f"{' '.join(command)} did not start:\n{said.read()}")
            yield process, line
        finally:
            process.terminate()


def order_service(broker: str, database_url: str) -> AbstractContextManager[tuple["subprocess.Popen[str]", str]]:
    return started(sys.executable, str(HERE / "service.py"), broker, database_url)


async def shop_database(kassa_database: str) -> str:
    """A database of the shop's own, on the same server for convenience."""
    connection = await asyncpg.connect(kassa_database)
    await connection.execute("CREATE DATABASE shop")
    await connection.close()
    return kassa_database.rpartition("/")[0] + "/shop"


async def state_of(database_url: str, number: str) -> str:
    connection = await asyncpg.connect(database_url)
    try:
        state: str = await connection.fetchval("SELECT state FROM orders WHERE number = $1", number)
    finally:
        await connection.close()
    return state


async def packed(database_url: str) -> Counter[str]:
    """How often each order was packed."""
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("SELECT number FROM packed")
    finally:
        await connection.close()
    return Counter(row["number"] for row in rows)


async def until_packed(database_url: str, number: str) -> None:
    times = Counter[str]()
    async with asyncio.timeout(WAIT_S):
        while number not in times:
            times = await packed(database_url)
            await asyncio.sleep(0.1)


async def order(database_url: str, number: str, amount: int) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute("INSERT INTO orders (number, amount) VALUES ($1, $2)", number, amount)
    await connection.close()


async def paid(up: dict[str, Any], number: str, amount: int) -> None:
    """A payment of the order, and the shopper who scans its code."""
    async with AsyncKassa(up["api_key"], up["api"]) as kassa:
        payment = await kassa.payments.create(
            order_id=number, amount=amount, currency="CNY", channel="wechat", method="native", description="A book"
        )
    code = payment.next_action.code_url if payment.next_action else ""
    async with httpx.AsyncClient() as shopper:
        await shopper.post(f"{up['sandboxes']['wechat']['base_url']}/_sandbox/pay", json={"code_url": code})


async def tell(up: dict[str, Any], broker: str) -> None:
    database_url = await shop_database(up["database"])
    print(f"Kassa is at {up['api']}, its events go over {broker}.")
    if broker == "postgres":
        # Its queues are in Kassa's database, and the service finds them there.
        broker = up["database"]
    with order_service(broker, database_url):
        await order(database_url, "1001", 2500)
        await paid(up, "1001", 2500)
        await until_packed(database_url, "1001")
        print("Order 1001: paid, told by an event, packed.")
    with order_service(broker, database_url) as (service, _):
        await order(database_url, "1002", 900)
        service.kill()
        await paid(up, "1002", 900)
        print(f"Order 1002: paid while the order service was dead; it is {await state_of(database_url, '1002')}.")
    with order_service(broker, database_url):
        await until_packed(database_url, "1002")
        print("Order 1002: the service is back, heard of it, and packed it.")
        await asyncio.sleep(REPEATS_S)
    times = await packed(database_url)
    if times != {"1001": 1, "1002": 1}:
        raise SystemExit(f"Not each order was packed once: {dict(times)}")
    print("Each order was packed once.")


def main() -> None:
    broker = sys.argv[1] if len(sys.argv) > 1 else f"zeromq://127.0.0.1:{free_port()}"
    kassa = str(Path(sys.executable).with_name("kassa"))
    with (
        temporary_directory("kassa-orders-") as directory,
        started(kassa, "up", "--dir", str(directory), "--port", "0", "--broker", broker, "--json") as (_, up),
    ):
        asyncio.run(tell(json.loads(up), broker))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
