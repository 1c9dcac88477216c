"""A consumer in a process of its own, to be killed: `python -m brokers.kafka_peer URL TOPIC GROUP LANES`. It says one line with
each packet that it has in hand, and settles none."""

import asyncio
import sys

from kassa.messaging.binders.kafka import KafkaTransport, read_url
from kassa.messaging.topology import Topic


async def main(url: str, topic: str, group: str, lanes: str) -> None:
    transport = KafkaTransport(read_url(url))
    await transport.open()
    stream = await transport.subscribe(Topic(topic, (group,), "", lanes=int(lanes)), group)
    while True:
        for arrival in await stream.receive(100, 60.0):
            print(arrival.packet.id, flush=True)


asyncio.run(main(*sys.argv[1:]))
