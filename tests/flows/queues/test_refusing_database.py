"""A database that answers, and takes nothing: what came from a broker stays there, and whoever took it goes on by himself."""

import asyncio
from functools import partial
from typing import Any

import pytest

from brokers.rabbit_house import open_bench
from conformance.messaging.house import collect, record
from flows.queues.house import Till, until
from flows.queues.refusing import BROKEN, FULL, READ_ONLY, consumers, refusals, refusing
from kassa.errors import BrokerUnreachable
from kassa.ids import new_id
from kassa.messaging.binder import Subscription
from kassa.messaging.model import Ack, Dead, RetryAfter, Settlement
from kassa.messaging.topology import Topic

QUEUE = "payment_order:kassa"


@pytest.mark.parametrize("code", [FULL, pytest.param(BROKEN, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "broker_url", ["memory", pytest.param("amqp", marks=pytest.mark.needs("rabbitmq"))], indirect=True
)
async def test_requests_go_on_with_one_consumer_when_they_can_be_settled_again(till: Till, code: str) -> None:
    """Also where something has ended by the time that the first refusal is known, so that ending has to settle it."""
    assert (await till.client.ask({"action": "query", "order_id": "never"})).body["code"] == "payment.not_found"
    before = consumers()

    async with refusing(till.pool, code, "dead_letter"):
        await till.client.send({"order_id": "1", "amount": "much"}, reply_to=None)
        await until(partial(refused, till.pool, 1), "it is being refused")
        await till.client.send({"order_id": "2", "amount": "much"}, reply_to=None)
        await until(partial(refused, till.pool, 3), "both were tried again")

    async def died() -> bool:
        return len(await till.dead(QUEUE)) == 2

    await until(died, "two dead letters")
    assert (await till.client.ask({"action": "query", "order_id": "never"})).body["code"] == "payment.not_found"
    assert consumers() == before


@pytest.mark.parametrize("end", [RetryAfter(0.0, "later"), Dead("never")], ids=["put off", "given up"])
@pytest.mark.parametrize("code", [FULL, READ_ONLY])
async def test_what_cannot_be_kept_comes_again_to_the_same_consumer(
    database_url: str, code: str, end: Settlement
) -> None:
    topic = new_topic()
    async with open_bench("memory", database_url, topic) as bench:
        subscription = await bench.binder.subscribe(topic.name, "shop")
        await bench.binder.send(topic.name, [record("r-1")], deadline_s=60)
        (delivery,) = await collect(subscription, 1)

        async with refusing(bench.pool, code, "message", "dead_letter"):
            assert await subscription.settle([(delivery, end)]) == [False]

        (again,) = await collect(subscription, 1)
        assert again.record == delivery.record
        assert await subscription.settle([(again, end)]) == [True]
        await assert_kept(subscription, bench.letters, topic, end)
        await subscription.close(0.0)


async def assert_kept(subscription: Subscription, letters: Any, topic: Topic, end: Settlement) -> None:
    if isinstance(end, Dead):
        assert [one.reason for one in await letters.browse(f"{topic.name}:shop")] == [end.reason]
        return
    (parked,) = await collect(subscription, 1)
    assert (parked.record.id, parked.attempts) == ("r-1", 1)
    assert await subscription.settle([(parked, Ack())]) == [True]


@pytest.mark.parametrize("code", [FULL, READ_ONLY])
async def test_sending_to_our_own_queue_is_in_doubt_and_not_a_fault(database_url: str, code: str) -> None:
    topic = new_topic()
    async with open_bench("postgres", database_url, topic) as bench, refusing(bench.pool, code, "message"):
        (receipt,) = await bench.binder.send(topic.name, [record("r-1")], deadline_s=60)

    assert type(receipt).__name__ == "Unknown"


async def test_closing_ends_also_where_nothing_can_be_given_back(database_url: str) -> None:
    """What was in hand comes again when its lease is over."""
    topic = new_topic()
    async with open_bench("postgres", database_url, topic) as bench:
        subscription = await bench.binder.subscribe(topic.name, "shop")
        await bench.binder.send(topic.name, [record("r-1")], deadline_s=60)
        await collect(subscription, 1)
        await bench.pool.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE 'no' USING ERRCODE = '{FULL}'; END $$"
        )
        await bench.pool.execute("CREATE TRIGGER refuse BEFORE UPDATE ON message EXECUTE FUNCTION refuse()")

        await subscription.close(0.0)

        assert await bench.pool.fetchval("SELECT count(*) FROM message") == 1


async def test_subscription_that_the_database_does_not_allow_leaves_no_consumer_behind(database_url: str) -> None:
    topic = new_topic()
    async with open_bench("memory", database_url, topic) as bench:
        await bench.binder.send(topic.name, [record("r-1")], deadline_s=60)
        await bench.pool.execute(
            # Our tables are asked before and after the broker; only the second question fails.
            "ALTER TABLE subscription RENAME TO hidden; CREATE SEQUENCE asked; "
            "CREATE FUNCTION shown() RETURNS SETOF hidden LANGUAGE plpgsql AS $$ BEGIN "
            f"IF nextval('asked') > 1 THEN RAISE 'no' USING ERRCODE = '{FULL}'; END IF; "
            "RETURN QUERY SELECT * FROM hidden; END $$; CREATE VIEW subscription AS SELECT * FROM shown()"
        )
        with pytest.raises(BrokerUnreachable):
            await bench.binder.subscribe(topic.name, "shop")
        await bench.pool.execute("DROP VIEW subscription; ALTER TABLE hidden RENAME TO subscription")

        subscription = await bench.binder.subscribe(topic.name, "shop")
        async with asyncio.timeout(20):
            assert [one.record.id for one in await collect(subscription, 1)] == ["r-1"]
        await subscription.close(0.0)


def new_topic() -> Topic:
    return Topic(f"orders-{new_id()[-12:]}", ("shop",), "Orders, for the tests.", lanes=1)


async def refused(pool: Any, times: int) -> bool:
    return await refusals(pool) >= times
