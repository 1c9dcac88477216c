"""Where nobody but Kassa can make what travels over a broker."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import aiormq
import pytest
from structlog.testing import capture_logs

from flows.api.support import running
from flows.queues.house import until
from kassa.ids import new_id
from kassa.messaging.binders import rabbitmq as ours
from kassa.messaging.binders.rabbitmq import queues_of
from kassa.messaging.topology import EVENTS
from servers import RabbitMQ


@pytest.mark.parametrize("broker", ["postgres", "zeromq://127.0.0.1:0"])
async def test_verify_asks_nobody_for_what_is_in_our_own_tables(database_url: str, broker: str) -> None:
    async with running(database_url, brokers=(broker,), broker_topology="verify") as house:
        (opened,) = house.app.brokers
        await opened.binder()

        assert opened.away_since is None
        assert await opened.subscribed("payment_order")


@pytest.mark.needs("rabbitmq")
async def test_group_that_somebody_subscribes_later_is_looked_after_too(
    rabbitmq: RabbitMQ, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queues are made again by a process that began before it was there."""
    monkeypatch.setattr(ours, "MISSING_S", 0.3)
    url = await asyncio.to_thread(rabbitmq.virtual_host, f"place-{new_id()[-12:]}")
    (queue, *_) = queues_of(EVENTS, "books")
    async with running(database_url, brokers=(url,)) as house, running(database_url, brokers=(url,)) as elsewhere:
        (broker,), (other,) = house.app.brokers, elsewhere.app.brokers
        await broker.binder()
        await other.subscribe_group(EVENTS.name, "books")
        await other.close()
        await broker.learn_groups()
        with capture_logs() as logs:
            async with aiormq.connect(url) as connection:
                await (await connection.channel()).queue_delete(queue)
            await until(partial(made_again, logs), "it is made again")

    assert [one["queue"] for one in logs if one["event"] == "rabbitmq.queue_made_again"] == [[queue]]


async def made_again(logs: Sequence[Mapping[str, Any]]) -> bool:
    return any(one["event"] == "rabbitmq.queue_made_again" for one in logs)
