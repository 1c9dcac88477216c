"""Takes away what a measurement made at a broker. What cannot be removed is told by name, with how to do it."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from kassa.bench.stage import GROUP
from kassa.errors import KassaError
from kassa.messaging.topology import Topic

REMOVE_S = 20.0


async def remove(kind: str, url: str, topics: Sequence[Topic]) -> list[str]:
    """What is left behind. The binder is closed by now, so that nobody makes anything again."""
    removers = {"rabbitmq": _rabbitmq, "kafka": _kafka, "rocketmq": _rocketmq}
    remover = removers.get(kind)
    if remover is None or not topics:
        # PostgreSQL and our own ZeroMQ hub have everything in the database of this run, which is dropped.
        return []
    try:
        async with asyncio.timeout(REMOVE_S):
            return await remover(url, topics)
    except (KassaError, OSError, TimeoutError) as error:
        names = ", ".join(topic.name for topic in topics)
        return [f"{names} and their groups at {kind}: {error or 'no answer in time'}"]


async def _rabbitmq(url: str, topics: Sequence[Topic]) -> list[str]:
    """Queues, the group's queue of dead letters, and the exchange."""
    import aiormq.exceptions

    from kassa.messaging.binders import amqp, rabbitmq

    link = amqp.Link(amqp.read_url(url), "bench")
    left: list[str] = []
    try:
        live = await link.live()
        for topic in topics:
            queues = [*rabbitmq.queues_of(topic, GROUP), rabbitmq.dead_queue(topic, GROUP)]
            for queue in queues:
                try:
                    await amqp.ask(live, lambda channel, name=queue: channel.queue_delete(name))  # type: ignore[misc]
                except aiormq.exceptions.AMQPError as error:
                    left.append(f"queue {queue} ({error})")
            try:
                name = rabbitmq.exchange_of(topic)
                await amqp.ask(live, lambda channel, name=name: channel.exchange_delete(name))  # type: ignore[misc]
            except aiormq.exceptions.AMQPError as error:
                left.append(f"exchange {topic.name} ({error})")
    finally:
        await link.close()
    return left


async def _kafka(url: str, topics: Sequence[Topic]) -> list[str]:
    """Topics and consumer groups."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    from kassa.messaging.binders import kafka

    admin = AdminClient(dict(kafka.read_url(url).client))
    groups = [kafka.group_id(topic.name, GROUP) for topic in topics]
    asked: dict[str, Any] = admin.delete_topics([topic.name for topic in topics], request_timeout=10.0)
    # A group is only let go of once its last member has been missed.
    asked |= {f"group {name}": future for name, future in admin.delete_consumer_groups(groups).items()}
    left = []
    for name, future in asked.items():
        try:
            await asyncio.wrap_future(future)
        except KafkaException as error:
            if "GROUP_ID_NOT_FOUND" not in str(error):
                left.append(f"{name} ({error.args[0].str()})")
    # A client that is let go of while its thread hands over an answer takes the process along.
    await asyncio.sleep(0.2)
    return left


async def _rocketmq(url: str, topics: Sequence[Topic]) -> list[str]:
    """Topics at brokers and name server, and groups with their retries."""
    from kassa.messaging.binders import rocketmq
    from kassa.messaging.binders import rocketmq_wire as wire

    server = wire.read_url(url)
    if server.name_server is None:
        return [f"topic {rocketmq.topic_name(topic.name)}: the URL names no name server" for topic in topics]
    cluster = (await wire.ask(server, server.name_server, wire.CLUSTER)).json()
    left = []
    for broker in cluster.get("brokerAddrTable", {}).values():
        host, _, port = broker["brokerAddrs"].get("0", "").rpartition(":")
        for topic in topics if host else ():
            name = rocketmq.topic_name(topic.name)
            group = rocketmq.group_name(topic.name, GROUP)
            place = wire.Address(host, int(port))
            for code, fields in (
                (wire.DELETE_TOPIC, {"topic": name}),
                (wire.DELETE_GROUP, {"groupName": group, "cleanOffset": "true"}),
            ):
                answer = await wire.ask(server, place, code, fields)
                if answer.code != wire.SUCCESS:
                    left.append(f"{name} ({answer.remark})")
            with suppress(KassaError):
                await wire.ask(server, server.name_server, wire.DELETE_TOPIC_AT_NAME_SERVER, {"topic": name})
    return left
