"""The line to the broker is cut in the middle of a batch, slow and narrow, or open at one end: nothing is lost or doubled."""

import random
from collections.abc import AsyncIterator

import pytest

import tally
from chaos.brokers.chain import Chain, judge_chain, under_load
from chaos.brokers.line import Line
from chaos.brokers.posts import HubPost, KafkaPost, Post, Rabbit, Rocket, with_port
from chaos.house import until

pytestmark = [pytest.mark.long, pytest.mark.brokers("amqp", "kafka", "rocketmq", "zeromq")]
"""PostgreSQL's line is Kassa's own to its database: conformance/journal/test_writer.py cuts that one."""

CUTS = 4
MORE = 15


@pytest.fixture
async def line(post: Post) -> AsyncIterator[Line]:
    """Everybody in the chain reaches the broker through it."""
    match post:
        case KafkaPost() as kafka:
            # Kafka tells its clients where to go: to the port of the line.
            line = Line(kafka.server.port("line"))
            await line.start(kafka.server.port("proxy"))
            post.url = kafka.server.line_url
        case Rabbit() | Rocket() | HubPost():
            line = Line(post.port)
            post.url = with_port(post.url, await line.start())
        case _:
            raise AssertionError(post)
    yield line
    await line.stop()


async def test_each_effect_happens_once_whatever_the_line_does(line: Line, chain: Chain) -> None:
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        async with under_load(chain, client, wallet):
            for _ in range(CUTS):
                before = line.cuts
                line.cut_after(random.randint(500, 8_000))

                async def is_cut(before: int = before) -> bool:
                    return line.cuts > before

                await until(is_cut, "a cut in the middle of something")
                await chain.progress(MORE)
            line.cut()
            await chain.progress(MORE)
            line.delay_s, line.bytes_per_s = 0.05, 100_000.0
            await chain.progress(MORE)
            line.delay_s, line.bytes_per_s = 0.0, None
            line.forget()
            await chain.progress(MORE)
        await judge_chain(chain, client)
    tally.count(f"connections to {chain.post.scheme} cut or forgotten", line.cuts)
