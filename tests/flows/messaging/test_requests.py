"""Thousands of requests over a queue from a program that is started again in the middle: each gets its answer, and is done once."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from brokers.rabbit_house import at_once
from conformance.messaging.house import PATIENCE_S, SERVERS
from flows.api.support import House, Shop, running
from kassa.ids import new_id
from kassa.messaging.binder import Binder, Resources, Subscription
from kassa.messaging.model import Ack, Confirmed, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import PAYMENT_ORDERS, Topic
from kassa.messaging.work import DeadLetters
from servers.server import free_ports

WALLETS = 10


@dataclass
class Notebook:
    """What a program that asks keeps over its restarts."""

    address: Topic
    payments: dict[str, set[str]] = field(default_factory=dict)
    """The payments that it was told of, by order."""


class Asker:
    """One run of the program, with a connection of its own."""

    def __init__(self, binder: Binder, answers: Subscription, notebook: Notebook) -> None:
        self._binder = binder
        self._answers = answers
        self._notebook = notebook

    async def ask(self, orders: Sequence[dict[str, Any]]) -> None:
        """Each under a new name, and under its order's number: whoever asks again does not know how it was named."""
        limit = self._binder.traits.batch_max
        records = [
            Record(
                new_id(), "", json.dumps(order).encode(),
                {"reply-to": self._notebook.address.name, "correlation-id": order["order_id"]},
            )
            for order in orders
        ]  # fmt: skip
        for start in range(0, len(records), limit):
            batch = records[start : start + limit]
            receipts = await self._binder.send(PAYMENT_ORDERS.name, batch, deadline_s=60.0)
            assert receipts == [Confirmed()] * len(batch)

    async def hear(self, count: int) -> None:
        """Until the notebook has answers to so many orders."""
        while len(self._notebook.payments) < count:
            deliveries = await self._answers.receive(100, PATIENCE_S)
            assert deliveries, f"answers to {len(self._notebook.payments)} of {count}, and no more come"
            for delivery in deliveries:
                payment = json.loads(delivery.record.body)
                assert payment["state"] == "succeeded"
                name = delivery.record.headers["correlation-id"]
                assert name == payment["order_id"]
                self._notebook.payments.setdefault(name, set()).add(payment["id"])
            await self._answers.settle([(delivery, Ack()) for delivery in deliveries])

    async def hold(self) -> int:
        """Some answers in hand, of which nothing is noted."""
        return len(await self._answers.receive(100, PATIENCE_S))


@dataclass
class Office:
    """A shop behind a broker, and how to start a program that asks it."""

    house: House
    shop: Shop
    url: str

    @asynccontextmanager
    async def asker(self, notebook: Notebook) -> AsyncIterator[Asker]:
        """Until it dies, at the end of the block, with all that it has in hand."""
        app = self.house.app
        (broker,) = app.brokers
        topics = (*await broker.topology(), notebook.address)
        async with make_binder(self.url, Resources(app.pool, app.wakeups, topics)) as binder:
            await binder.provision([notebook.address])
            answers = await binder.subscribe(notebook.address.name, "client")
            yield Asker(binder, answers, notebook)
            await answers.close(0.0)

    async def paid(self) -> int:
        """How many requests were done."""
        count: int = await self.house.app.pool.fetchval("SELECT count(*) FROM payment WHERE state = 'succeeded'")
        return count

    async def balance(self, wallet: str) -> int:
        balance: int = (await self.shop.get(f"/v1/wallets/{wallet}")).json()["balance"]
        return balance

    async def dead(self) -> list[str]:
        """What was given up of requests and of answers."""
        (broker,) = self.house.app.brokers
        letters = DeadLetters(self.house.app.pool)
        return [
            letter.reason
            for queue in (f"{PAYMENT_ORDERS.name}:kassa", f"replies:{broker.name}")
            for letter in await letters.browse(queue)
        ]


@pytest.fixture
async def office(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Office]:
    url = url_of(request.param, request)
    async with running(database_url, brokers=(url,), order_queue="plain") as house:
        for broker in house.app.brokers:
            # Until then a server that is new has no place for requests.
            await broker.binder()
        yield Office(house, await house.shop(fee_ppm=6000), url)


def url_of(scheme: str, request: pytest.FixtureRequest) -> str:
    """Where a program of its own finds the broker, too."""
    if scheme == "zeromq":
        (port,) = free_ports(1)
        return f"zeromq://127.0.0.1:{port}"
    server = SERVERS.get(scheme)
    url: str = scheme if server is None else request.getfixturevalue(server).url
    return at_once(url) if scheme == "amqp" else url


def row(scheme: str, count: int, *marks: pytest.MarkDecorator) -> object:
    """It needs the broker's server."""
    needed = [pytest.mark.needs(SERVERS[scheme])] if scheme in SERVERS else []
    return pytest.param(scheme, count, marks=[*needed, *marks])


ROWS = [
    *(row(scheme, 2_000) for scheme in ("postgres", "amqp")),
    *(row(scheme, 10_000, pytest.mark.long) for scheme in ("amqp", "kafka", "postgres", "rocketmq", "zeromq")),
]


@pytest.mark.parametrize(("office", "count"), ROWS, indirect=["office"])
async def test_thousands_of_requests_are_answered_and_done_once_though_who_asks_is_started_again(
    office: Office, count: int
) -> None:
    doubted, last = count // 5, count // 10
    wallets = [await office.shop.wallet((count + doubted) // WALLETS) for _ in range(WALLETS)]
    orders = [
        {"order_id": f"o-{number}", "amount": 1, "channel": "wallet", "payer": {"wallet": wallets[number % WALLETS]}}
        for number in range(count + doubted)
    ]
    notebook = Notebook(
        Topic(f"answers-{new_id()[-12:]}", ("client",), "Answers.", lanes=1, keyed=False, declaration="plain")
    )
    owed, doubtful = orders[:count], orders[count:]

    async with office.asker(notebook) as first:
        await first.ask(owed[:-last])
        await first.hear(count // 4)
        held = await first.hold()
        # So that it dies while answers are coming.
        await first.ask(owed[-last:])
        done = await office.paid()
    async with office.asker(notebook) as second:
        # What it is owed comes without being asked for again.
        await second.hear(count)
        await second.ask(doubtful)
    async with office.asker(notebook) as third:
        # It does not know what became of these.
        await third.ask(doubtful)
        await third.hear(len(orders))

    assert held > 0 and done < count
    assert notebook.payments.keys() == {order["order_id"] for order in orders}
    assert all(len(ids) == 1 for ids in notebook.payments.values())
    assert len(set().union(*notebook.payments.values())) == len(orders)
    assert [await office.balance(wallet) for wallet in wallets] == [0] * WALLETS
    assert await office.dead() == []
