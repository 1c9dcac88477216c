"""The broker is away while payments go through: the API does not notice, and afterwards every event arrives."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.sender import raw_request, send_all

import tally
from chaos.brokers.chain import Asker, Chain, drained, judge_chain
from chaos.brokers.posts import Post, Rabbit
from chaos.house import Client, House, hurried, judge
from kassa.ids import new_id

BEFORE = 1_000
AT_ONCE = 10_000
"""So many are made beforehand and sent in one go."""
SLOWER_MAX = 3.0
"""Times the median of before. Seen: 0.1 to 0.8, as nothing is relayed meanwhile; 6 where each payment waits 20 ms."""


async def pay_many(chain: Chain, client: Client, wallet: str, count: int) -> list[dict[str, Any]]:
    """So many payments, each sent once and acknowledged; what the sender says of each part."""
    said = []
    for part in range(0, count, AT_ONCE):
        orders = [_order(chain, wallet) for _ in range(min(AT_ONCE, count - part))]
        said.append(await asyncio.to_thread(send_all, chain.api, orders, chain.directory / "orders", connections=16))
        assert said[-1]["statuses"] == {"201": len(orders)}, (said[-1], chain.log())
    tally.count(f"payments over the API beside {chain.post.scheme}", count)
    return said


def _order(chain: Chain, wallet: str) -> bytes:
    name = new_id()
    headers = {
        "Authorization": f"Bearer {chain.told['api_key']}", "Idempotency-Key": name, "Content-Type": "application/json",
    }  # fmt: skip
    body = f'{{"order_id":"{name}","amount":1,"currency":"CNY","channel":"wallet","payer":{{"wallet":"{wallet}"}}}}'
    return raw_request("/v1/payments", headers, body.encode())


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
async def test_payments_do_not_notice_that_the_broker_is_away(chain: Chain, count: int) -> None:
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        (before,) = await pay_many(chain, client, wallet, BEFORE)
        await asyncio.to_thread(chain.shut)
        for part in ("orders", "api"):
            # Started while the broker is away: timers, webhooks and payments do not wait for it.
            chain.strike(part)
            await asyncio.to_thread(chain.revive, part)
        during = await pay_many(chain, client, wallet, count)
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"{chain.api}/readyz")).status_code == 200

        await asyncio.to_thread(chain.open)
        began = time.monotonic()
        async with hurried(chain):
            await drained(chain)
        drained_s = time.monotonic() - began
        await judge_chain(chain, client, unnamed=BEFORE + count)
    worst = max(during, key=lambda part: part["p50_ms"])
    assert worst["p50_ms"] <= SLOWER_MAX * before["p50_ms"]
    tally.tell(
        f"{chain.post.scheme} away for {count:,} payments: latency {worst['p50_ms'] / before['p50_ms']:.2f} × (p50), "
        f"{worst['p99_ms'] / before['p99_ms']:.2f} × (p99) of before; the backlog drained in {drained_s:.1f} s"
    )


@pytest.mark.long
@pytest.mark.brokers("amqp")
@pytest.mark.parametrize("alarm", ["memory", "disk"])
async def test_payments_do_not_notice_that_rabbitmq_is_short_of_something(chain: Chain, alarm: str) -> None:
    """It blocks everybody who publishes, also the programs that ask for payments; theirs are answered afterwards."""
    assert isinstance(chain.post, Rabbit)
    server = chain.post.server
    raise_alarm, clear_alarm = {
        "memory": (server.raise_memory_alarm, server.clear_memory_alarm),
        "disk": (server.raise_disk_alarm, server.clear_disk_alarm),
    }[alarm]
    async with chain.shop() as client, Asker(chain, client) as asker:
        wallet = await client.wallet(1_000_000)
        await pay_many(chain, client, wallet, BEFORE)
        await drained(chain)
        await asyncio.to_thread(raise_alarm)
        try:
            had = await chain.count_effects()
            asked = asyncio.create_task(asker.pay(wallet))
            await pay_many(chain, client, wallet, BEFORE)
            async with httpx.AsyncClient(trust_env=False) as http:
                assert (await http.get(f"{chain.api}/readyz")).status_code == 200
            assert await chain.count_effects() == had and not asked.done()
        finally:
            await asyncio.to_thread(clear_alarm)
        await asked
        await judge_chain(chain, client, unnamed=2 * BEFORE)
    tally.count(f"{alarm} alarms of RabbitMQ")


@pytest.mark.long
@pytest.mark.brokers("amqp", "kafka", "rocketmq", "zeromq")
async def test_kassa_up_is_started_again_while_its_broker_is_away(
    post: Post, tmp_path: Path, database_url: str
) -> None:
    """`kassa up` at its first start wants its broker; after that it takes payments without it."""
    house = House(tmp_path / "kassa", database_url, "--broker", post.url)
    try:
        await asyncio.to_thread(house.start)
        async with house.shop() as client:
            wallet = await client.wallet(1_000)
            house.kill()
            post.kill()
            await asyncio.to_thread(house.start)
            await client.pay_from(wallet)
            await asyncio.to_thread(post.start)
            await judge(client)
    finally:
        await asyncio.to_thread(house.stop)
