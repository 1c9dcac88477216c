"""Requests over a queue: on every broker the same effect once, and the same answer."""

import asyncio
from collections.abc import Sequence

import pytest

from flows.queues.house import PATIENCE_S, Answer, Client, Till, client_of, until
from flows.wechat_sandbox import SandboxProcess
from kassa.api.queue import Handled, QueueDoor
from kassa.ids import new_id
from kassa.messaging.model import Delivery, Record, RetryAfter, Settlement
from kassa.messaging.topology import Topic
from kassa.workers.orders import PAUSE_S, OrderWorker

QUEUE = "payment_order:kassa"
TALK = "Payments._go_on"
"""What asks a channel, as the loop knows it."""
SOON_S = 20.0
"""Less than an answer that is owed waits for whoever owes it."""
on_one_broker = pytest.mark.parametrize("broker_url", ["postgres"], indirect=True)
"""What happens behind the door is the same on each."""


async def test_the_shortest_request_is_a_payment_with_a_qr_code(till: Till, sandbox: SandboxProcess) -> None:
    answer = await till.client.ask({"order_id": "123456", "amount": 100})

    payment = answer.body
    assert payment["object"] == "payment"
    assert (payment["order_id"], payment["amount"], payment["currency"]) == ("123456", 100, "CNY")
    assert payment["next_action"]["code_url"].startswith("weixin://")
    assert answer.headers["kassa-status"] == "201"
    await asyncio.to_thread(sandbox.pay, payment["attempts"][0]["number"])

    async def is_paid() -> bool:
        return bool((await till.payments("123456"))[0]["state"] == "succeeded")

    await until(is_paid, "paid")
    assert (await till.client.ask({"action": "query", "order_id": "123456"})).body["state"] == "succeeded"


async def test_every_field_of_the_rest_body_may_be_given(till: Till) -> None:
    wallet = await till.shop.wallet(1000)

    answer = await till.client.ask(
        {
            "order_id": "w-1", "amount": 300, "currency": "CNY", "channel": "wallet", "payer": {"wallet": wallet},
            "description": "两杯咖啡", "metadata": {"table": "7"},
        }
    )  # fmt: skip

    assert (answer.body["state"], answer.body["description"], answer.body["metadata"]) == (
        "succeeded", "两杯咖啡", {"table": "7"},
    )  # fmt: skip
    assert (await till.payments("w-1"))[0] == answer.body


async def test_the_same_request_twice_is_one_payment_and_the_same_answer(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    order = {"order_id": "twice", "amount": 300, "channel": "wallet", "payer": {"wallet": wallet}}
    same_id = new_id()

    first = await till.client.ask(order, id=same_id)
    second = await till.client.ask(order)
    with_default = await till.client.ask(order | {"currency": "CNY"})

    assert first.body == second.body == with_default.body
    assert len(await till.payments("twice")) == 1
    assert (await till.shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 700


async def test_requests_at_once_for_one_order_all_get_the_one_payment(till: Till) -> None:
    names = {await till.client.send({"order_id": "at-once", "amount": 5}) for _ in range(5)}

    answers = await till.client.answers(5)

    assert {answer.correlation_id for answer in answers} == names
    assert len({answer.body["id"] for answer in answers}) == 1
    assert all(answer.body["next_action"] for answer in answers)


async def test_another_body_under_the_same_order_is_a_problem(till: Till) -> None:
    await till.client.ask({"order_id": "other", "amount": 100})

    answer = await till.client.ask({"order_id": "other", "amount": 101})

    assert (answer.body["code"], answer.headers["kassa-status"]) == ("idempotency.key_reused", "422")
    assert (await till.payments("other"))[0]["amount"] == 100


async def test_a_refusal_is_answered_and_repeated_as_it_was(till: Till) -> None:
    wallet = await till.shop.wallet(10)
    order = {"order_id": "poor", "amount": 300, "channel": "wallet", "payer": {"wallet": wallet}}

    first = await till.client.ask(order)
    await till.shop.fund(wallet, 1000)
    second = await till.client.ask(order)

    assert (first.body["code"], first.body["status"]) == ("wallet.insufficient_funds", 402)
    assert second.body == first.body


async def test_what_cannot_be_read_gets_a_problem_that_names_the_field(till: Till) -> None:
    unknown = await till.client.ask({"order_id": "1", "amount": 100, "colour": "red"})
    negative = await till.client.ask({"order_id": "1", "amount": -1})
    text = await till.client.ask(b"order 1 please")
    action = await till.client.ask({"action": "steal", "order_id": "1"})
    method = await till.client.ask({"order_id": "1", "amount": 1, "channel": "wechat"})

    assert [one.body["code"] for one in (unknown, negative, text, action, method)] == ["request.invalid"] * 5
    assert unknown.body["errors"] == [{"field": "colour", "message": "is not a field of this request"}]
    assert negative.body["errors"][0]["field"] == "amount"
    assert action.body["errors"][0]["field"] == "action"
    assert method.body["errors"][0]["field"] == "method"


async def test_without_an_address_a_malformed_request_is_a_dead_letter_with_its_reason(till: Till) -> None:
    await till.client.send({"order_id": "1", "amount": "much"}, reply_to=None)

    letters = await until(lambda: till.dead(QUEUE), "a dead letter")

    assert letters[0].reason.startswith("request.invalid: amount is not valid")
    assert letters[0].body == b'{"order_id": "1", "amount": "much"}'


async def test_without_an_address_a_good_request_is_a_payment(till: Till) -> None:
    await till.client.send({"order_id": "silent", "amount": 7}, reply_to=None)

    (payment,) = await until(lambda: till.payments("silent"), "the payment")

    assert payment["amount"] == 7
    assert await till.dead(QUEUE) == []


async def test_refund_query_and_close(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    paid = (
        await till.client.ask({"order_id": "r", "amount": 300, "channel": "wallet", "payer": {"wallet": wallet}})
    ).body
    open_ = (await till.client.ask({"order_id": "c", "amount": 300})).body

    refund = await till.client.ask({"action": "refund", "order_id": "r", "refund_id": "r-1", "amount": 120})
    again = await till.client.ask({"action": "refund", "payment": paid["id"], "refund_id": "r-1", "amount": 120})
    too_much = await till.client.ask({"action": "refund", "order_id": "r", "refund_id": "r-2", "amount": 500})
    asked = await till.client.ask({"action": "query", "refund": refund.body["id"]})
    closed = await till.client.ask({"action": "close", "payment": open_["id"]})
    closed_again = await till.client.ask({"action": "close", "order_id": "c"})
    not_closable = await till.client.ask({"action": "close", "order_id": "r"})
    unknown = await till.client.ask({"action": "query", "order_id": "never"})

    assert (refund.body["object"], refund.body["amount"], refund.body["payment"]) == ("refund", 120, paid["id"])
    assert again.body == refund.body == asked.body
    assert too_much.body["code"] == "refund.exceeds_paid"
    assert (closed.body["state"], closed_again.body["state"]) == ("closed", "closed")
    assert not_closable.body["code"] == "payment.not_closable"
    assert (unknown.body["code"], unknown.headers["kassa-status"]) == ("payment.not_found", "404")
    assert (await till.shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 820


async def test_requests_for_one_order_are_done_in_their_order(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    order = {"order_id": "row", "amount": 300, "channel": "wallet", "payer": {"wallet": wallet}}
    pay = await till.client.send(order)
    refund = await till.client.send({"action": "refund", "order_id": "row", "refund_id": "row-1"})

    answers = {answer.correlation_id: answer.body for answer in await till.client.answers(2)}

    assert answers[pay]["object"] == "payment"
    assert (answers[refund]["object"], answers[refund]["amount"]) == ("refund", 300)


async def test_an_answer_that_nobody_waits_for_holds_up_nothing_and_dies_after_an_hour(till: Till) -> None:
    queue = f"replies:{till.broker.name}"
    await till.client.send({"action": "query", "order_id": "x"}, reply_to="nobody-is-here")

    answer = await till.client.ask({"action": "query", "order_id": "y"})

    async def time_passes() -> object:
        due = "SELECT id FROM message WHERE topic = $1 FOR UPDATE SKIP LOCKED"
        await till.pool.execute(f"UPDATE message SET due = clock_timestamp() WHERE id IN ({due})", queue)
        return await till.dead(queue)

    assert answer.body["code"] == "payment.not_found"
    (letter,) = await until(time_passes, "a dead letter")
    assert letter.headers["reply-to"] == "nobody-is-here"
    assert "nobody-is-here" in letter.reason


async def test_a_client_that_comes_back_within_the_hour_gets_its_answer(till: Till) -> None:
    queue = f"replies:{till.broker.name}"
    late = await client_of(till.broker)
    gone = f"{late.address}-later"
    await till.client.send({"action": "query", "order_id": "x"}, reply_to=gone, correlation_id="late")

    async def was_tried() -> bool:
        return bool(await till.pool.fetchval("SELECT attempts FROM message WHERE topic = $1", queue))

    await until(was_tried, "a first try")
    binder = await till.broker.binder()
    answers = Topic(gone, ("client",), "Answers.", lanes=1, keyed=False, declaration="plain")
    await binder.provision([answers])
    there = Client(binder, answers, await binder.subscribe(gone, "client"))
    (answer,) = await there.answers()

    assert answer.correlation_id == "late"


@on_one_broker
async def test_what_names_a_payment_in_both_ways_means_one_payment(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    order = {"amount": 300, "channel": "wallet", "payer": {"wallet": wallet}}
    mine = (await till.client.ask(order | {"order_id": "mine"})).body
    other = (await till.client.ask(order | {"order_id": "other"})).body

    async def ask(action: str, payment: str, **more: object) -> Answer:
        return await till.client.ask({"action": action, "order_id": "mine", "payment": payment} | more)

    wrong = [
        await ask("refund", other["id"], refund_id="r-1", amount=100),
        await ask("query", other["id"]),
        await ask("close", other["id"]),
        await ask("refund", f"pay_{new_id()}", refund_id="r-2", amount=100),
    ]
    nobodys = await till.client.ask({"action": "query", "order_id": "nobody's", "payment": mine["id"]})
    right = await ask("refund", mine["id"], refund_id="r-1", amount=100)
    asked = await ask("query", mine["id"])

    assert [answer.body["code"] for answer in wrong] == ["request.invalid"] * 4
    refusal = {"field": "order_id", "message": "names another payment than payment does"}
    assert [answer.body["errors"] for answer in wrong] == [[refusal]] * 4
    assert nobodys.body["code"] == "payment.not_found"
    assert (right.body["object"], right.body["payment"]) == ("refund", mine["id"])
    assert asked.body["id"] == mine["id"]
    assert (await till.shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 500


@on_one_broker
async def test_a_query_for_a_refund_goes_without_a_payment(till: Till) -> None:
    wallet = await till.shop.wallet(1000)
    paid = await till.client.ask(
        {"order_id": "r", "amount": 300, "channel": "wallet", "payer": {"wallet": wallet}}
    )  # fmt: skip
    refund = await till.client.ask({"action": "refund", "order_id": "r", "refund_id": "r-1", "amount": 120})
    query = {"action": "query", "refund": refund.body["id"]}

    by_order = await till.client.ask(query | {"order_id": "r"})
    by_payment = await till.client.ask(query | {"payment": paid.body["id"]})
    alone = await till.client.ask(query)

    for answer in (by_order, by_payment):
        assert (answer.body["code"], answer.body["errors"][0]["field"]) == ("request.invalid", "refund")
    assert alone.body == refund.body


@on_one_broker
async def test_a_request_whose_conversation_was_stopped_is_tried_again(till: Till) -> None:
    """As it is where one conversation serves several requests, and another worker's end stops it."""

    class Stopped(QueueDoor):
        async def handle(self, record: Record, via: str) -> Handled:
            conversation = asyncio.create_task(asyncio.sleep(PATIENCE_S))
            conversation.cancel()
            await conversation
            return Handled()

    worker = OrderWorker(till.broker, Stopped(till.house.app))
    await worker._handle(delivery())

    ((_, settlement),) = worker._ended
    assert settlement == RetryAfter(PAUSE_S, "what it waited for was stopped", counts=False)


@on_one_broker
async def test_a_worker_that_is_stopped_itself_says_nothing_of_what_it_has_in_hand(till: Till) -> None:
    begun = asyncio.Event()

    class Slow(QueueDoor):
        async def handle(self, record: Record, via: str) -> Handled:
            begun.set()
            await asyncio.sleep(PATIENCE_S)
            return Handled()

    worker = OrderWorker(till.broker, Slow(till.house.app))
    handling = asyncio.create_task(worker._handle(delivery()))
    await begun.wait()
    handling.cancel()

    with pytest.raises(asyncio.CancelledError):
        await handling
    assert worker._ended == []


@on_one_broker
async def test_what_may_end_the_process_is_handled_with_nothing_beside_it(till: Till) -> None:
    under_way: set[str] = set()
    beside: dict[str, set[str]] = {}

    class Watched(QueueDoor):
        async def handle(self, record: Record, via: str) -> Handled:
            beside[record.id] = set(under_way)
            under_way.add(record.id)
            await asyncio.sleep(0.2)
            under_way.discard(record.id)
            return Handled()

    class Given:
        """Hands out at once what it was given, a batch each time."""

        def __init__(self, *batches: list[Delivery]) -> None:
            self._batches = list(batches)

        async def receive(self, limit: int, wait_s: float) -> list[Delivery]:
            return self._batches.pop(0)

        async def settle(self, settled: Sequence[tuple[Delivery, Settlement]]) -> list[bool]:
            return [True] * len(settled)

        async def close(self, drain_s: float) -> None:
            pass

    first, second, third, last = delivery(), delivery(), delivery(alone=True), delivery()
    given = Given([first, second], [third], [last])
    worker = OrderWorker(till.broker, Watched(till.house.app))
    for _ in range(3):
        await worker._step(given)
    await asyncio.wait(worker._running)

    assert beside[second.record.id] == {first.record.id}
    assert beside[third.record.id] == beside[last.record.id] == set()


def delivery(*, alone: bool = False) -> Delivery:
    """A request in a worker's hands."""
    return Delivery(Record(new_id(), "", b"{}", {}), 0, None, None, 1, (), alone)


@on_one_broker
async def test_a_payment_whose_conversation_is_stopped_is_answered_and_its_request_is_done(
    till: Till, sandbox: SandboxProcess
) -> None:
    await asyncio.to_thread(sandbox.fault, "create", "delay", times=1, delay_ms=5_000)
    await till.client.send({"order_id": "stopped", "amount": 100})

    async def is_stopped() -> bool:
        found = [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") == TALK]
        return any([task.cancel() for task in found])

    await until(is_stopped, "the channel is asked")
    async with asyncio.timeout(SOON_S):
        (answer,) = await till.client.answers()

    async def is_done() -> bool:
        return (await till.house.app.queues.one(QUEUE)).waiting == 0

    await until(is_done, "the request is done")
    assert (answer.body["object"], answer.body["order_id"]) == ("payment", "stopped")
    assert len(await till.payments("stopped")) == 1
    assert await till.dead(QUEUE) == []
