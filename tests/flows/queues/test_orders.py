"""Requests over a queue: on every broker the same effect once, and the same answer."""

import asyncio

from flows.queues.house import Client, Till, client_of, until
from flows.wechat_sandbox import SandboxProcess
from kassa.ids import new_id
from kassa.messaging.topology import Topic

QUEUE = "payment_order:kassa"


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
