"""Somebody else empties what Kassa has sent, deletes where it sends to, litters and floods its topics, and repeats old
messages under Kassa's own ids."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import asyncpg
import pytest
from msgspec.structs import replace

import tally
from chaos.brokers.chain import DRAIN_S, Asker, Chain, judge_chain, under_load
from chaos.brokers.posts import KafkaPost, Rabbit
from chaos.brokers.strangers import (
    delete_events_topic,
    delete_exchanges,
    flood,
    forget_that_it_was_made_again,
    has_events_topic,
    litter,
    take_events,
)
from chaos.house import Client, hurried, until
from kassa.messaging.log import EARLIEST, EventLog
from kassa.messaging.model import Confirmed
from kassa.messaging.relay import event_record
from kassa.messaging.topology import EVENTS

pytestmark = pytest.mark.long

PAYMENTS = 200
FLOOD = 3_000
MORE = 25
DELETIONS = 3
DEAD_REQUESTS = "SELECT count(*) FROM dead_letter WHERE topic = 'payment_order:kassa' AND reason <> ''"
BEHIND = """
SELECT count(*) FROM event AS e LEFT JOIN cursor_position AS p ON p.group_name = $1 AND p.writer = e.writer
WHERE (e.seq, e.ord) > (coalesce(p.seq, -1), coalesce(p.ord, -1::smallint))
"""


async def relayed(chain: Chain, relay: str) -> None:
    """The broker has confirmed everything."""
    connection = await asyncpg.connect(chain.told["database"])

    async def is_empty() -> bool:
        return bool(await connection.fetchval(BEHIND, relay) == 0)

    try:
        await until(is_empty, "everything is at the broker")
    finally:
        await connection.close()


def relay_of(chain: Chain) -> str:
    name = {"amqp": "rabbitmq"}.get(chain.post.scheme, chain.post.scheme)
    return f"relay:{name}:{EVENTS.name}"


async def test_events_that_somebody_took_from_the_broker_come_again_out_of_the_log(chain: Chain) -> None:
    """Confirmed, then purged before anybody had them: `kassa queue replay relay:… --since`."""
    await lose_and_replay(chain, lambda client, wallet: take_events(chain))


@pytest.mark.brokers("kafka")
async def test_events_whose_topic_somebody_deleted_come_again_out_of_the_log(chain: Chain) -> None:
    """The relay makes it again, and the books, which were away and which it does not know, miss nothing of what came since."""
    assert isinstance(chain.post, KafkaPost)
    post = chain.post

    async def lose(client: Client, wallet: str) -> None:
        await delete_events_topic(post)
        await client.pay_from(wallet)
        await until(partial(has_events_topic, post), "the topic is there again")

    await lose_and_replay(chain, lose)
    # The groups of the tests that follow are new: they would begin with the first record of a topic that was made again.
    await forget_that_it_was_made_again(post)


async def lose_and_replay(chain: Chain, lose: Callable[[Client, str], Awaitable[None]]) -> None:
    """What is at the broker is lost while the books are away."""
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        async with hurried(chain):
            await relayed(chain, relay_of(chain))
            chain.parts["books"].end()
            since = datetime.now(UTC) - timedelta(minutes=5)
            for _ in range(PAYMENTS):
                await client.pay_from(wallet)
            await relayed(chain, relay_of(chain))
            await lose(client, wallet)
            await asyncio.to_thread(chain.parts["books"].start)
            await client.pay_from(wallet)

            had = await chain.count_effects()
            said = await asyncio.to_thread(
                chain.command, "queue", "replay", relay_of(chain), "--since", f"{since:%Y-%m-%dT%H:%M:%SZ}"
            )

            assert "events are sent again" in said and had < PAYMENTS
        await judge_chain(chain, client)
        tally.count(f"events taken from {chain.post.scheme} and sent again", PAYMENTS)


async def test_garbage_and_repeats_under_our_ids_change_nothing(chain: Chain) -> None:
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        async with Asker(chain, client) as asker, hurried(chain):
            for _ in range(20):
                await client.pay_from(wallet)
            order = {"order_id": "again", "amount": 3, "channel": "wallet", "payer": {"wallet": wallet}}
            first = await asker.ask(order)
            client.acknowledged.append(first)
            await relayed(chain, relay_of(chain))
            await repeat_all(asker)
            tally.count(f"pieces of garbage on {chain.post.scheme}", await litter(chain.post, chain.told["database"]))
            again = await asker.ask(order)
            for _ in range(5):
                await asker.pay(wallet)

            assert again == first
        await judge_chain(chain, client)


async def repeat_all(asker: Asker) -> None:
    """Every event of the log once more, with other contents under the same id."""
    connection = await asyncpg.connect(asker.database_url)
    home = await connection.fetchval("SELECT home FROM event LIMIT 1")
    await connection.close()
    events = await EventLog(asker.pool).of_time(home, EARLIEST, datetime.now(UTC) + timedelta(hours=1), 1000)
    forged = [replace(event_record(event), body=b'{"amount": 1}') for event in events]
    for start in range(0, len(forged), 50):
        receipts = await asker.binder.send(EVENTS.name, forged[start : start + 50], deadline_s=10.0)
        assert receipts == [Confirmed()] * len(receipts)


async def test_payments_go_on_in_a_flood_of_foreign_messages(chain: Chain) -> None:
    """Its own come through; those of the flood among the requests are dead letters, with a reason each."""
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        async with under_load(chain, client, wallet):
            await chain.progress(MORE)
            await flood(chain.post, chain.told["database"], FLOOD)
            await chain.progress(MORE)
        connection = await asyncpg.connect(chain.told["database"])

        async def is_all_dead() -> bool:
            return bool(await connection.fetchval(DEAD_REQUESTS) == FLOOD)

        try:
            await until(is_all_dead, f"{FLOOD} dead letters\n{chain.log()}", DRAIN_S)
        finally:
            await connection.close()
        await judge_chain(chain, client)
    tally.count(f"foreign messages on {chain.post.scheme}", FLOOD)


@pytest.mark.brokers("amqp")
async def test_exchanges_that_somebody_deletes_come_back_and_nothing_is_missing(chain: Chain) -> None:
    """Time and again while payments go on: who sends and who receives make them again, with the bindings of everybody."""
    assert isinstance(chain.post, Rabbit)
    async with chain.shop() as client:
        wallet = await client.wallet(1_000_000)
        async with under_load(chain, client, wallet) as asker:
            for _ in range(DELETIONS):
                await chain.progress(MORE)
                await delete_exchanges(chain.post)
                await asker.pay(wallet)
            await chain.progress(MORE)
        await judge_chain(chain, client)
    tally.count("deletions of both exchanges", DELETIONS)
