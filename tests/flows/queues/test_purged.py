"""Somebody empties payment_order at the broker while requests are on their way: who asks again pays once."""

import asyncio
from urllib.parse import urlsplit

import aiormq
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from flows.api.support import running
from flows.queues.house import Till, client_of, until
from flows.wechat_sandbox import SandboxProcess
from kassa.messaging.topology import PAYMENT_ORDERS

pytestmark = pytest.mark.parametrize(
    "broker_url",
    [
        pytest.param("amqp", marks=pytest.mark.needs("rabbitmq")),
        pytest.param("kafka", marks=pytest.mark.needs("kafka")),
    ],
    indirect=True,
)

QUEUE = "payment_order:kassa"
ORDERS = [f"purged-{number}" for number in range(4)]
SLOW_MS = 3_000
"""For so long the channel keeps Kassa waiting, while the queue is emptied."""


async def purge(url: str) -> None:
    """With the broker's own means, past Kassa."""
    match urlsplit(url).scheme:
        case "amqp":
            async with aiormq.connect(url.partition("?")[0]) as connection:
                await (await connection.channel()).queue_purge(PAYMENT_ORDERS.name)
        case "kafka":
            await asyncio.to_thread(_delete_records, urlsplit(url).netloc)


def _delete_records(bootstrap: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    partitions = admin.list_topics(PAYMENT_ORDERS.name, timeout=10).topics[PAYMENT_ORDERS.name].partitions
    ends = [TopicPartition(PAYMENT_ORDERS.name, number, -1) for number in partitions]
    for future in admin.delete_records(ends).values():
        future.result(10)


async def test_what_was_purged_before_anybody_had_it_is_paid_once_by_who_asks_again(
    database_url: str, broker_url: str
) -> None:
    """Of what is gone nothing was taken and nothing said. What is sent after it waits for Kassa."""
    async with running(database_url, brokers=(f"{broker_url}#shop.mails",)) as clients_house:
        (broker,) = clients_house.app.brokers
        await (await broker.binder()).provision([PAYMENT_ORDERS])
        client = await client_of(broker)
        shop = await clients_house.shop()
        wallet = await shop.wallet(1000)
        orders = [
            {"order_id": order_id, "amount": 100, "channel": "wallet", "payer": {"wallet": wallet}}
            for order_id in ORDERS
        ]
        for order in orders:
            await client.send(order)
        await purge(broker_url)
        again = [await client.send(order) for order in orders]

        async with running(database_url, brokers=(broker_url,), order_queue="plain"):
            answers = await client.answers(len(ORDERS))
            assert await client.hears_nothing()

        assert sorted(str(answer.correlation_id) for answer in answers) == sorted(again)
        assert sorted(answer.body["order_id"] for answer in answers) == ORDERS
        assert (await shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 1000 - 100 * len(ORDERS)


async def test_what_was_in_hand_when_its_queue_was_purged_is_answered_and_not_doubled(
    till: Till, sandbox: SandboxProcess, broker_url: str
) -> None:
    await asyncio.to_thread(sandbox.fault, "create", "delay", times=len(ORDERS), delay_ms=SLOW_MS)
    for order_id in ORDERS:
        await till.client.send({"order_id": order_id, "amount": 100})

    async def are_in_hand() -> bool:
        return all([await till.payments(order_id) for order_id in ORDERS])

    await until(are_in_hand, "the channel is asked for each")
    await purge(broker_url)

    answers = await till.client.answers(len(ORDERS))
    payments = {answer.body["order_id"]: answer.body["id"] for answer in answers}
    again = [(await till.client.ask({"order_id": order_id, "amount": 100})).body for order_id in ORDERS]
    assert sorted(payments) == ORDERS
    assert {payment["order_id"]: payment["id"] for payment in again} == payments
    for order_id in ORDERS:
        (payment,) = await till.payments(order_id)
        assert len(payment["attempts"]) == 1
    assert await till.dead(QUEUE) == []
