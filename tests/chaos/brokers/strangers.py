"""What somebody else may do to a broker that Kassa uses, with the broker's own means."""

import asyncio
import json
from typing import Any

import aiormq
import asyncpg
import zmq
import zmq.asyncio
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from brokers import kafka_house, rocketmq_client, rocketmq_house
from chaos.brokers.chain import Chain
from chaos.brokers.posts import HubPost, KafkaPost, Post, Rabbit, Rocket
from kassa.messaging.binders.kafka import AGAIN
from kassa.messaging.binders.rabbitmq import exchange_of, lane_key, queues_of
from kassa.messaging.binders.rocketmq import topic_name
from kassa.messaging.topology import EVENTS, PAYMENT_ORDERS

GARBAGE = (
    b"", b"\xff\xfe\x00", b"[[[[", b'{"order_id": 1}', b'"text"', b'{"order_id":' + b"[" * 2000 + b"]" * 2000 + b"}"
)  # fmt: skip


async def take_events(chain: Chain) -> None:
    """Everything that waits for the books is gone."""
    match chain.post:
        case Rabbit() as rabbit:
            async with aiormq.connect(rabbit.url) as connection:
                channel = await connection.channel()
                for queue in queues_of(EVENTS, chain.group):
                    await channel.queue_purge(queue)
        case KafkaPost() as kafka:
            await asyncio.to_thread(_delete_records, kafka)
        case Rocket() as rocket:
            # It has no other way to empty a topic.
            await rocketmq_house.delete_topic(rocket.server, topic_name(EVENTS.name))
        case _:
            connection_: Any = await asyncpg.connect(chain.told["database"])
            await connection_.execute("DELETE FROM message WHERE topic = $1", f"{EVENTS.name}:{chain.group}")
            await connection_.close()


def _delete_records(post: KafkaPost) -> None:
    admin = AdminClient({"bootstrap.servers": post.server.bootstrap})
    partitions = admin.list_topics(EVENTS.name, timeout=10).topics[EVENTS.name].partitions
    ends = [TopicPartition(EVENTS.name, number, -1) for number in partitions]
    for future in admin.delete_records(ends).values():
        future.result(10)


async def delete_events_topic(post: KafkaPost) -> None:
    """The topic itself, with everything in it and where its groups were."""
    admin = AdminClient({"bootstrap.servers": post.server.bootstrap})
    for future in admin.delete_topics([EVENTS.name]).values():
        await asyncio.wrap_future(future)


async def has_events_topic(post: KafkaPost) -> bool:
    admin = AdminClient({"bootstrap.servers": post.server.bootstrap})
    return EVENTS.name in (await asyncio.to_thread(admin.list_topics, timeout=10)).topics


async def forget_that_it_was_made_again(post: KafkaPost) -> None:
    admin = AdminClient({"bootstrap.servers": post.server.bootstrap})
    for future in admin.delete_consumer_groups([f"{EVENTS.name}:{AGAIN}"]).values():
        await asyncio.wrap_future(future)


async def delete_exchanges(rabbit: Rabbit) -> None:
    """That of the events and that of the requests, with all their bindings."""
    async with aiormq.connect(rabbit.url) as connection:
        channel = await connection.channel()
        for topic in (EVENTS, PAYMENT_ORDERS):
            await channel.exchange_delete(exchange_of(topic))


async def flood(post: Post, database_url: str, count: int) -> None:
    """So many messages that are nobody's among the requests, and so many among the events (on RocketMQ only among the
    requests)."""
    pieces = [json.dumps({"reading": number, "of": "somebody else's"}).encode() for number in range(count)]
    match post:
        case Rabbit() as rabbit:
            async with aiormq.connect(rabbit.url) as connection:
                channel = await connection.channel(publisher_confirms=False)
                for number, piece in enumerate(pieces):
                    lane = lane_key(number % EVENTS.lanes)
                    for exchange, key in ((EVENTS.name, lane), (exchange_of(PAYMENT_ORDERS), PAYMENT_ORDERS.name)):
                        await channel.basic_publish(piece, exchange=exchange, routing_key=key)
        case KafkaPost() as kafka:
            for topic in (EVENTS.name, PAYMENT_ORDERS.name):
                messages = [{"value": piece} for piece in pieces]
                await asyncio.to_thread(kafka_house.publish, kafka.server.bootstrap, topic, *messages)
        case Rocket() as rocket:
            for piece in pieces:
                await rocketmq_client.send(rocket.server.endpoint, topic_name(PAYMENT_ORDERS.name), piece)
        case _:
            connection_: Any = await asyncpg.connect(database_url)
            for topic in (EVENTS.name, PAYMENT_ORDERS.name):
                await connection_.executemany(
                    "SELECT kassa_send($1, $2)", [(topic, piece.decode()) for piece in pieces]
                )
            await connection_.close()


async def litter(post: Post, database_url: str) -> int:
    """Garbage among the events and the requests; says how many pieces of it."""
    pieces = 2 * len(GARBAGE)
    match post:
        case Rabbit() as rabbit:
            async with aiormq.connect(rabbit.url) as connection:
                channel = await connection.channel()
                for piece in GARBAGE:
                    for exchange, key in ((EVENTS.name, lane_key(0)), ("payment", "payment_order")):
                        await channel.basic_publish(piece, exchange=exchange, routing_key=key)
        case KafkaPost() as kafka:
            for topic in (EVENTS.name, "payment_order"):
                messages = [{"value": piece} for piece in GARBAGE]
                await asyncio.to_thread(kafka_house.publish, kafka.server.bootstrap, topic, *messages)
        case Rocket() as rocket:
            # It takes no message that is empty.
            pieces -= 2
            for piece in GARBAGE[1:]:
                endpoint = rocket.server.endpoint
                await rocketmq_client.send(endpoint, topic_name("payment_order"), piece)
                await rocketmq_client.send(endpoint, topic_name(EVENTS.name), piece, message_group="somebody")
        case HubPost() as hub:
            pieces = await _into_queues(database_url) + await _at_the_hub(hub)
        case _:
            pieces = await _into_queues(database_url)
    return pieces


async def _into_queues(database_url: str) -> int:
    """As a program does that knows SQL alone; bytes that are no text it cannot send."""
    texts, topics = ("[[[[", '{"order_id": 1}', '"text"'), (EVENTS.name, "payment_order")
    connection: Any = await asyncpg.connect(database_url)
    for text in texts:
        for topic in topics:
            await connection.execute("SELECT kassa_send($1, $2)", topic, text)
    await connection.close()
    return len(texts) * len(topics)


async def _at_the_hub(hub: HubPost) -> int:
    """Frames that are no calls, from somebody who connects as a peer does."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{hub.port}")
    for piece in GARBAGE:
        await socket.send_multipart([piece, piece])
        await socket.send(piece)
    # Closing waits until they are gone.
    socket.close(linger=5000)
    await asyncio.to_thread(context.term)
    return 2 * len(GARBAGE)
