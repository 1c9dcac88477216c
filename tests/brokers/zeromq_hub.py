"""A ZeroMQ hub in a process of its own, to be killed: `python -m brokers.zeromq_hub DATABASE_URL ADDRESS`."""

import asyncio
import sys

from kassa.db.pool import connect, open_pool
from kassa.messaging.binder import Resources
from kassa.messaging.binders.zeromq import make_binder
from kassa.messaging.wake import Wakeups


async def serve(database_url: str, address: str) -> None:
    pool = await open_pool(database_url, application="hub")
    wakeups = Wakeups(lambda: connect(database_url, application="hub wake"))
    async with make_binder(address, Resources(pool, wakeups)) as hub:
        print(hub.url, flush=True)
        await wakeups.run()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
