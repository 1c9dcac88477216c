"""A ZeroMQ hub in a process of its own: `python -m kassa.bench.hub ADDRESS`, its database in KASSA_DATABASE_URL.

It says its address, and ends with its standard input: whoever started it is gone then.
"""

import asyncio
import os
import sys

from kassa.bench.loop import run
from kassa.db.pool import connect, open_pool
from kassa.messaging.binder import Resources
from kassa.messaging.binders.zeromq import make_binder
from kassa.messaging.wake import Wakeups


async def serve(database_url: str, address: str) -> None:
    """Until the standard input ends."""
    pool = await open_pool(database_url, application="kassa bench hub")
    wakeups = Wakeups(lambda: connect(database_url, application="kassa bench hub wake"))
    async with make_binder(address, Resources(pool, wakeups)) as hub:
        print(hub.url, flush=True)
        telling = asyncio.create_task(wakeups.run())
        await asyncio.to_thread(sys.stdin.buffer.read)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
    pool.terminate()


if __name__ == "__main__":
    run(serve(os.environ["KASSA_DATABASE_URL"], sys.argv[1]))
