"""What the suites of all transports do with a stream."""

import asyncio

from kassa.errors import BrokerUnreachable
from kassa.messaging.transport import Stream

WAIT_S = 60.0


async def see(stream: Stream, *names: str) -> None:
    """Takes and settles until each of these has come, however often and with whatever else."""
    missing = set(names)
    async with asyncio.timeout(WAIT_S):
        while missing:
            try:
                arrivals = await stream.receive(100, WAIT_S)
            except BrokerUnreachable:
                await asyncio.sleep(0.1)
                continue
            missing.difference_update(arrival.packet.id for arrival in arrivals)
            await stream.settle(arrivals)
