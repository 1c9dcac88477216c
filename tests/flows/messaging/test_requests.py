"""Thousands of requests over a queue from a program that is started again in the middle: each gets its answer, and is done once."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from brokers.rabbit_house import at_once
from flows.api.support import House, Shop, running
from kassa.ids import new_id
from kassa.messaging.binder import Binder, Resources, Subscription
from kassa.messaging.model import Ack, Confirmed, Record
from kassa.messaging.registry import make_binder
from kassa.messaging.topology import PAYMENT_ORDERS, Topic
from kassa.messaging.work import DeadLetters

REQUESTS = 2000
WALLETS = 10
WAIT_S = 5.0
"""For the next answers; they are waited for again and again, as long as the test may take."""


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
            deliveries = await self._answers.receive(100, WAIT_S)
            for delivery in deliveries:
                payment = json.loads(delivery.record.body)
                assert payment["state"] == "succeeded"
                name = delivery.record.headers["correlation-id"]
                assert name == payment["order_id"]
                self._notebook.payments.setdefault(name, set()).add(payment["id"])
            await self._answers.settle([(delivery, Ack()) for delivery in deliveries])

    async def hold(self) -> int:
        """Some answers in hand, of which nothing is noted."""
        return len(await self._answers.receive(100, WAIT_S))


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


@pytest.fixture(params=["postgres", pytest.param("amqp", marks=pytest.mark.needs("rabbitmq"))])
async def office(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Office]:
    url: str = "postgres" if request.param == "postgres" else at_once(request.getfixturevalue("rabbitmq").url)
    async with running(database_url, brokers=(url,), order_queue="plain") as house:
        yield Office(house, await house.shop(fee_ppm=6000), url)


async def test_thousands_of_requests_are_answered_and_done_once_though_who_asks_is_started_again(
    office: Office,
) -> None:
    wallets = [await office.shop.wallet(REQUESTS // WALLETS) for _ in range(WALLETS)]
    orders = [
        {"order_id": f"o-{number}", "amount": 1, "channel": "wallet", "payer": {"wallet": wallets[number % WALLETS]}}
        for number in range(REQUESTS)
    ]
    notebook = Notebook(
        Topic(f"answers-{new_id()[-12:]}", ("client",), "Answers.", lanes=1, keyed=False, declaration="plain")
    )
    owed, doubtful = orders[: REQUESTS * 2 // 3], orders[REQUESTS * 2 // 3 :]

    async with office.asker(notebook) as first:
        await first.ask(owed)
        await first.hear(len(owed) // 4)
        held = await first.hold()
    async with office.asker(notebook) as second:
        # What it is owed comes without being asked for again.
        await second.hear(len(owed))
        await second.ask(doubtful)
    async with office.asker(notebook) as third:
        # It does not know what became of these.
        await third.ask(doubtful)
        await third.hear(len(orders))

    assert held > 0
    assert notebook.payments.keys() == {order["order_id"] for order in orders}
    assert all(len(ids) == 1 for ids in notebook.payments.values())
    assert len(set().union(*notebook.payments.values())) == REQUESTS
    assert [await office.balance(wallet) for wallet in wallets] == [0] * WALLETS
    assert await office.dead() == []
