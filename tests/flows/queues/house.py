"""A shop whose requests come over a queue, and the program at the other end, which knows nothing of Kassa but the names."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from flows.api.support import House, Shop
from kassa.ids import new_id
from kassa.messaging.binder import Binder, Subscription
from kassa.messaging.brokers import Broker
from kassa.messaging.model import Ack, Delivery, Record
from kassa.messaging.topology import PAYMENT_ORDERS, Topic
from kassa.messaging.work import DeadLetter, DeadLetters

SERVERS = {"amqp": "rabbitmq", "kafka": "kafka", "rocketmq": "rocketmq"}
"""The fixture of the real server that a scheme needs; the others need none."""
PATIENCE_S = 90.0


async def until(claim: Callable[[], Awaitable[Any]], what: str) -> Any:
    """The first true answer of the claim."""
    async with asyncio.timeout(PATIENCE_S):
        answer = await claim()
        while not answer:
            await asyncio.sleep(0.02)
            answer = await claim()
        return answer


@dataclass
class Answer:
    """What came back."""

    correlation_id: str | None
    body: dict[str, Any]
    headers: dict[str, str]


class Client:
    """Puts requests into payment_order, and hears its answers at an address of its own."""

    def __init__(self, binder: Binder, answers: Topic, subscription: Subscription) -> None:
        self.binder = binder
        self.address = answers.name
        self._subscription = subscription

    async def send(
        self, body: Any, *, correlation_id: str | None = None, reply_to: str | None = "", id: str = ""
    ) -> str:
        """One request; its correlation id. reply_to: this client's address unless another, or None, is given."""
        correlation_id = correlation_id or new_id()
        address = self.address if reply_to == "" else reply_to
        headers = {"correlation-id": correlation_id} | ({} if address is None else {"reply-to": address})
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        record = Record(id or new_id(), "", raw, headers)
        (receipt,) = await self.binder.send(PAYMENT_ORDERS.name, [record], deadline_s=60.0)
        assert type(receipt).__name__ == "Confirmed", receipt
        return correlation_id

    async def answers(self, count: int = 1) -> list[Answer]:
        """The next answers, in the order in which they came."""
        found: list[Answer] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(found) < count:
                deliveries = await self._subscription.receive(count - len(found), 5.0)
                found += [_answer(delivery) for delivery in deliveries]
                await self._subscription.settle([(delivery, Ack()) for delivery in deliveries])
        return found

    async def ask(self, body: Any, **how: Any) -> Answer:
        """One request and its answer."""
        correlation_id = await self.send(body, **how)
        (answer,) = await self.answers()
        assert answer.correlation_id == correlation_id
        return answer

    async def hears_nothing(self, wait_s: float = 0.3) -> bool:
        """Whether no answer waits."""
        return await self._subscription.receive(1, wait_s) == []


def _answer(delivery: Delivery) -> Answer:
    headers = delivery.record.headers
    assert headers["content-type"] == "application/json"
    return Answer(headers.get("correlation-id"), json.loads(delivery.record.body), headers)


@dataclass
class Till:
    """A shop behind a queue: its API, its broker, and a client of it."""

    house: House
    shop: Shop
    broker: Broker
    client: Client

    @property
    def pool(self) -> Any:
        return self.house.app.pool

    async def dead(self, queue: str) -> list[DeadLetter]:
        return await DeadLetters(self.pool).browse(queue)

    async def payments(self, order_id: str) -> list[dict[str, Any]]:
        """What REST knows of an order."""
        found: list[dict[str, Any]] = (await self.shop.get("/v1/payments", order_id=order_id)).json()["data"]
        return found


async def client_of(broker: Broker) -> Client:
    """A client with an address that nobody else has."""
    binder = await broker.binder()
    answers = Topic(f"answers-{new_id()[-12:]}", ("client",), "Answers.", lanes=1, keyed=False, declaration="plain")
    await binder.provision([answers])
    return Client(binder, answers, await binder.subscribe(answers.name, "client"))
