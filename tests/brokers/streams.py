"""What the suites of all transports do with a stream."""

import asyncio

from conformance.messaging.house import Bench, collect, record
from kassa.errors import BrokerUnreachable
from kassa.messaging.model import Ack, Confirmed, Dead
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


async def ended_by_its_first(bench: Bench, deaths: int) -> None:
    """One record ends each consumer that has it, with another one in hand that is all right; so many, and then it is known."""
    group = bench.topic.groups[0]
    sent = await bench.binder.send(bench.topic.name, [record("bad"), record("good")], deadline_s=WAIT_S)
    assert sent == [Confirmed(), Confirmed()]
    for _ in range(deaths):
        subscription = await bench.binder.subscribe(bench.topic.name, group)
        first, *_ = await collect(subscription, 2)
        assert (first.record.id, first.alone) == ("bad", False)
        # Whoever closes without settling leaves it as one does who ends.
        await subscription.close(0.0)
    subscription = await bench.binder.subscribe(bench.topic.name, group)

    (bad,) = await collect(subscription, 1)
    assert (bad.record.id, bad.alone) == ("bad", True)
    assert await subscription.settle([(bad, Dead("it is the one"))]) == [True]
    (good,) = await collect(subscription, 1)
    assert good.record.id == "good" and await subscription.settle([(good, Ack())]) == [True]
    await subscription.close(1.0)
    assert await bench.pool.fetchval("SELECT count(*) FROM suspect") == 0
