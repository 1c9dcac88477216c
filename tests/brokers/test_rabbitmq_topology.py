"""A RabbitMQ on which others make the queues: Kassa looks whether they are there, says by name what is not, and takes
`payment_order` as it finds it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from pamqp.commands import Basic
from structlog.testing import capture_logs

from brokers.rabbit_house import open_transport, packet
from flows.api.support import House, running
from flows.queues.house import PATIENCE_S, until
from kassa.ids import new_id
from kassa.messaging.binders.rabbitmq import exchange_of, queues_of
from kassa.messaging.topology import EVENT_BATCHES, EVENTS, PAYMENT_ORDERS, Topic
from servers import RabbitMQ

pytestmark = pytest.mark.needs("rabbitmq")

ORDERS = PAYMENT_ORDERS._replace(declaration="durable")
OTHERWISE: dict[str, Any] = {"x-max-length": 1000, "x-queue-mode": "lazy"}
"""How somebody declares a queue who does not know us."""


class Place(NamedTuple):
    """A virtual host of its own, so that our topics may have their names."""

    theirs: str
    """The URL of who may do everything there."""
    ours: str
    """That of an account which may send and receive, and declare nothing."""


@pytest.fixture
async def place(rabbitmq: RabbitMQ) -> Place:
    name = f"place_{new_id()[-12:]}"
    theirs = await asyncio.to_thread(rabbitmq.virtual_host, name)
    await asyncio.to_thread(
        rabbitmq.evaluate,
        f'rabbit_auth_backend_internal:add_user(<<"{name}">>, <<"secret">>, <<"kassa">>), '
        f'rabbit_auth_backend_internal:set_permissions(<<"{name}">>, <<"{name}">>, <<"^$">>, <<".*">>, <<".*">>, '
        '<<"kassa">>)',
    )
    return Place(theirs, f"amqp://{name}:secret@127.0.0.1:{rabbitmq.port('amqp')}/{name}")


@asynccontextmanager
async def stranger(place: Place) -> AsyncIterator[AbstractChannel]:
    """A program that is not ours."""
    async with aiormq.connect(place.theirs) as connection:
        yield await connection.channel()


async def make(place: Place, database_url: str, *topics: Topic) -> None:
    """What the operators of the broker do before, or after, Kassa comes."""
    async with open_transport(place.theirs, database_url) as transport:
        await transport.provision(topics, verify_only=False)


async def heard(channel: AbstractChannel, queue: str) -> "asyncio.Queue[Any]":
    messages: asyncio.Queue[Any] = asyncio.Queue()
    await channel.basic_consume(queue, messages.put, no_ack=True)
    return messages


async def ask(channel: AbstractChannel, body: dict[str, Any]) -> dict[str, Any]:
    """A request over the queue, and its answer."""
    address = (await channel.queue_declare(exclusive=True)).queue
    assert address is not None
    answers = await heard(channel, address)
    await channel.basic_publish(
        json.dumps(body).encode(), exchange=exchange_of(PAYMENT_ORDERS), routing_key=PAYMENT_ORDERS.name,
        properties=Basic.Properties(reply_to=address, message_id=new_id()), mandatory=True,
    )  # fmt: skip
    answer = await asyncio.wait_for(answers.get(), PATIENCE_S)
    told: dict[str, Any] = json.loads(answer.body)
    return told


def order(wallet: str) -> dict[str, Any]:
    """A payment that needs no channel but ours."""
    return {"order_id": "o-1", "amount": 300, "channel": "wallet", "payer": {"wallet": wallet}}


async def says(house: House) -> str:
    """What the readiness says of the broker; '' when nothing is wrong."""
    (check,) = [one for one in (await house.http.get("/readyz")).json()["checks"] if one["name"].startswith("broker")]
    return "" if check["ok"] else check["says"]


async def test_who_may_declare_nothing_answers_over_what_others_made(place: Place, database_url: str) -> None:
    await make(place, database_url, EVENTS, EVENT_BATCHES, ORDERS)
    async with stranger(place) as channel:
        queue = (await channel.queue_declare(exclusive=True)).queue
        assert queue is not None
        await channel.queue_bind(queue, EVENTS.name, "payment.*")
        events = await heard(channel, queue)
        async with running(database_url, brokers=(place.ours,), broker_topology="verify") as house:
            answer = await ask(channel, order(await (await house.shop()).wallet(1000)))
            event = await asyncio.wait_for(events.get(), PATIENCE_S)

            assert (answer["order_id"], answer["state"]) == ("o-1", "succeeded")
            assert json.loads(event.body)["id"] == answer["id"]
            assert await says(house) == ""


@pytest.mark.parametrize("missing", [EVENTS, ORDERS], ids=lambda topic: topic.name)
async def test_what_is_missing_is_named_and_taken_once_somebody_made_it(
    place: Place, database_url: str, missing: Topic
) -> None:
    """Payments over the API do not notice."""
    await make(place, database_url, *({EVENTS, EVENT_BATCHES, ORDERS} - {missing}))
    async with running(database_url, brokers=(place.ours,), broker_topology="verify") as house:
        (broker,) = house.app.brokers

        async def is_told() -> bool:
            return f"missing: {missing.name}" in broker.reason

        await until(is_told, "what is missing")
        assert await says(house)
        shop = await house.shop()
        wallet = await shop.wallet(1000)
        assert (await shop.pay(wallet, 100)).status_code == 201
        await make(place, database_url, missing)

        async with stranger(place) as channel:
            assert (await ask(channel, order(wallet)))["state"] == "succeeded"

        async def is_well() -> bool:
            return not await says(house)

        await until(is_well, "the broker is back")


@pytest.mark.parametrize("topic", [ORDERS, EVENTS._replace(groups=("kassa",), lanes=1)], ids=lambda topic: topic.name)
async def test_queue_that_others_made_and_deleted_is_missed_until_they_make_it_again(
    place: Place, database_url: str, topic: Topic
) -> None:
    """Also by an account that may declare: only to look is what it was told."""
    (queue,) = queues_of(topic, "kassa")
    await make(place, database_url, topic)
    async with open_transport(place.theirs, database_url) as transport:
        assert await transport.provision([topic], verify_only=True) == []
        stream = await transport.subscribe(topic, "kassa")
        with capture_logs() as logs:
            async with stranger(place) as channel:
                await channel.queue_delete(queue)
            # Nothing is waited for: it was made again within milliseconds, and must not be, however long one looks.
            await asyncio.sleep(3)
        async with stranger(place) as channel:
            with pytest.raises(aiormq.exceptions.ChannelNotFoundEntity):
                await channel.queue_declare(queue, passive=True)
        await make(place, database_url, topic)
        await transport.send(topic, [packet("r-1")], deadline_s=PATIENCE_S, must_arrive=True)

        (arrival,) = await stream.receive(1, PATIENCE_S)
        assert arrival.packet.id == "r-1"
        assert [one["event"] for one in logs] == ["rabbitmq.lane_ended", "rabbitmq.queue_missing"]


async def test_queue_that_a_stranger_declared_otherwise_is_taken_as_it_is(place: Place, database_url: str) -> None:
    async with stranger(place) as channel:
        await channel.exchange_declare(exchange_of(PAYMENT_ORDERS), exchange_type="direct")
        await channel.queue_declare(PAYMENT_ORDERS.name, durable=True, arguments=OTHERWISE)
        await channel.queue_bind(PAYMENT_ORDERS.name, exchange_of(PAYMENT_ORDERS), PAYMENT_ORDERS.name)
        async with running(database_url, brokers=(place.theirs,), order_queue="passive") as house:
            answer = await ask(channel, order(await (await house.shop()).wallet(1000)))

        assert (answer["order_id"], answer["state"]) == ("o-1", "succeeded")
        # The broker refuses whoever declares a queue that is there in another form.
        await channel.queue_declare(PAYMENT_ORDERS.name, durable=True, arguments=OTHERWISE)
