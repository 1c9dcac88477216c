"""Where nobody but Kassa can make what travels over a broker."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import aiormq
import pytest
from structlog.testing import capture_logs

from flows.api.support import running, settings_for
from flows.queues.house import until
from kassa.app import App
from kassa.ids import new_id
from kassa.messaging.binders import rabbitmq as ours
from kassa.messaging.binders.rabbitmq import queues_of
from kassa.messaging.topology import EVENTS
from kassa.workers import relay
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
    """Its queues are made again by a process that began before it was there, when who subscribed it is gone."""
    monkeypatch.setattr(relay, "GROUPS_S", 0.3)
    monkeypatch.setattr(ours, "MISSING_S", 0.3)
    url = await asyncio.to_thread(rabbitmq.virtual_host, f"place-{new_id()[-12:]}")
    (queue, *_) = queues_of(EVENTS, "books")
    with capture_logs() as logs:
        async with running(database_url, brokers=(url,)):
            app = App(settings_for(database_url, brokers=(url,)))
            await app.start()
            (elsewhere,) = app.brokers
            await elsewhere.subscribe_group(EVENTS.name, "books")
            await app.stop()
            await until(partial(is_said, logs, "relay.groups_learned"), "it has that one too")
            async with aiormq.connect(url) as connection:
                await (await connection.channel()).queue_delete(queue)
            await until(partial(is_said, logs, "rabbitmq.queue_made_again"), "it is made again")

    assert [one["queue"] for one in logs if one["event"] == "rabbitmq.queue_made_again"] == [[queue]]


async def is_said(logs: Sequence[Mapping[str, Any]], event: str) -> bool:
    return any(one["event"] == event for one in logs)
