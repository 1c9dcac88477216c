"""An order service that learns of payments: its own table, its own database, and `kassa.messaging` beside it.

    python service.py BROKER_URL DATABASE_URL

An order is paid when Kassa says so. That and the note for the warehouse are one commit: whatever is killed, the parcel is
packed once for each paid order.
"""

import asyncio
import sys
from typing import Any

import asyncpg

from kassa.messaging import Message, Messaging, Topic

ORDERS = """
CREATE TABLE IF NOT EXISTS orders (
    number text PRIMARY KEY,
    amount bigint NOT NULL,
    state text NOT NULL DEFAULT 'waiting'
)"""
PACKED = "CREATE TABLE IF NOT EXISTS packed (number text NOT NULL)"
"""No unique key: what is packed twice is in here twice."""
PARCELS = Topic("shop.parcels", (), "Paid orders, for the warehouse.")


def order_service(broker: str, database_url: str) -> Messaging:
    """What the service does with the messages that it gets."""
    messaging = Messaging(broker, database_url, topics=[PARCELS], name="shop")

    @messaging.consumer("kassa.events", group="shop", types=["payment.succeeded"])
    async def paid(message: Message, connection: Any) -> None:
        payment = message.json()
        updated = await connection.execute(
            "UPDATE orders SET state = 'paid' WHERE number = $1 AND amount = $2", payment["order_id"], payment["amount"]
        )
        if updated == "UPDATE 1":
            await messaging.send(
                PARCELS.name, {"number": payment["order_id"]}, key=payment["order_id"], connection=connection
            )

    @messaging.consumer(PARCELS.name, group="warehouse")
    async def pack(message: Message, connection: Any) -> None:
        await connection.execute("INSERT INTO packed (number) VALUES ($1)", message.json()["number"])

    return messaging


async def main(broker: str, database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute(ORDERS)
    await connection.execute(PACKED)
    await connection.close()
    async with order_service(broker, database_url) as messaging:
        print("ready", flush=True)
        await messaging.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
