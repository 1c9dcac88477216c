"""The project's RocketMQ, looked at through the official stubs."""

import asyncio
from uuid import uuid4

import pytest

from brokers import rocketmq_client
from servers import RocketMQ, ServerFailed


async def test_a_message_goes_in_and_comes_out(rocketmq: RocketMQ) -> None:
    name = uuid4().hex
    await asyncio.to_thread(rocketmq.make_topic, name)
    await asyncio.to_thread(rocketmq.make_group, name)

    await rocketmq_client.send(rocketmq.endpoint, name, b"a payment")

    assert await rocketmq_client.receive(rocketmq.endpoint, name, name) == b"a payment"


async def test_topics_are_not_made_unasked(rocketmq: RocketMQ) -> None:
    with pytest.raises(AssertionError):
        await rocketmq_client.send(rocketmq.endpoint, uuid4().hex, b"a payment")


def test_a_topic_of_an_unknown_kind_is_refused(rocketmq: RocketMQ) -> None:
    with pytest.raises(ServerFailed, match="refused"):
        rocketmq.make_topic(uuid4().hex, kind="MIXED")
