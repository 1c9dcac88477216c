"""Whole lives of payments over the provider's signed wire, with its faults."""

import asyncio

import pytest

from flows.payments.house import HOME, Shop, eventually, inner, once, read
from kassa.errors import RefundExceedsPaid
from kassa.payments.model import Order, Way
from kassa.workers.payments import PaymentWorker


async def test_a_qr_code_is_shown_paid_called_back_and_refunded(shop: Shop) -> None:
    payment = await shop.order(1000)
    assert payment["state"] == "processing"
    assert payment["next_action"]["code_url"].startswith("weixin://")

    await shop.payer_pays(payment)
    paid = await shop.until(payment["id"], "succeeded")
    assert paid["fee"] == 10
    assert await shop.books.balances() == {"channel_receivable": -1000, "merchant_payable": 990, "fee_income": 10}

    refund = await shop.refund(payment["id"], 300)
    await shop.until_refund(refund["id"], "succeeded")
    assert (await shop.get(payment["id"]))["amount_refunded"] == 300
    assert await shop.books.balances() == {"channel_receivable": -700, "merchant_payable": 693, "fee_income": 7}
    assert await shop.books.events(inner(payment["id"])) == [
        "payment.processing", "payment.succeeded", "refund.created", "refund.succeeded"
    ]  # fmt: skip
    (charge,) = (await shop.provider("/books", method="GET"))["charges"]
    assert (charge["amount"], charge["refunded"]) == (1000, 300)


async def test_a_wallet_is_topped_up_pays_and_gets_its_money_back(shop: Shop) -> None:
    wallet = read(await shop.payments.create_wallet(shop.merchant, "u-1", "CNY", once()))
    order = Order(
        order_id="t-1", amount=5000, currency="CNY", channel="wechat", method="native", wallet=inner(wallet["id"])
    )
    topup = read(await shop.payments.topup(shop.merchant, order, once()))
    await shop.payer_pays(topup)
    await eventually(lambda: holds(shop, wallet["id"], 5000))

    payment = await shop.order(2000, channel="wallet", method="wallet", wallet=inner(wallet["id"]))
    assert (payment["state"], payment["fee"], payment["attempts"]) == ("succeeded", 20, [])
    refund = await shop.refund(payment["id"], None)

    assert (refund["state"], refund["amount"], refund["fee_returned"]) == ("succeeded", 2000, 20)
    assert read(await shop.payments.get_wallet(HOME, inner(wallet["id"])))["balance"] == 5000
    assert await shop.books.balances() == {"channel_receivable": -5000, "wallet": 5000}


async def test_the_same_key_gets_the_first_answer_as_it_stands_now(shop: Shop) -> None:
    key = once()
    order = Order(order_id="o-1", amount=100, currency="CNY", channel="wechat", method="native")
    first = await shop.payments.create(shop.merchant, order, key)
    await shop.payer_pays(read(first))
    await shop.until(read(first)["id"], "succeeded")

    again = await shop.payments.create(shop.merchant, order, key)

    assert (again.status, again.replayed) == (201, True)
    assert read(again)["id"] == read(first)["id"]
    assert read(again)["state"] == "succeeded"


@pytest.mark.parametrize("fault", ["drop_after", "status_5xx", "garbage", "bad_signature"])
async def test_edge_23_a_create_whose_answer_is_lost_is_found_and_sent_again(shop: Shop, fault: str) -> None:
    await shop.fault("create", fault)
    payment = await shop.order(100)
    assert payment["attempts"][0]["state"] == "unknown"

    await shop.payments.drive_attempt(HOME, inner(payment["id"]), inner(payment["attempts"][0]["id"]))

    found = await shop.get(payment["id"])
    assert found["attempts"][0]["state"] == "pending_payer"
    assert found["next_action"]["code_url"].startswith("weixin://")
    assert len((await shop.provider("/books", method="GET"))["charges"]) == 1


async def test_edge_02_a_close_that_races_with_a_payment_ends_as_the_provider_says(shop: Shop) -> None:
    payment = await shop.order(100)
    await shop.fault("callback", "missing", times=5)
    await shop.payer_pays(payment)

    closed = read(await shop.payments.close(shop.merchant, inner(payment["id"]), once()))

    assert closed["state"] == "succeeded"


async def test_a_close_is_agreed_by_the_channel_first(shop: Shop) -> None:
    payment = await shop.order(100)

    closed = read(await shop.payments.close(shop.merchant, inner(payment["id"]), once()))

    assert closed["state"] == "closed"
    assert closed["attempts"][0]["state"] == "closed"
    (charge,) = (await shop.provider("/books", method="GET"))["charges"]
    assert charge["state"] == "CLOSED"


async def test_edge_01_a_payment_after_the_close_goes_back(shop: Shop) -> None:
    payment = await shop.order(100)
    await shop.payments.close(shop.merchant, inner(payment["id"]), once())

    await shop.payer_pays(payment, after_close=True)
    await shop.until(payment["id"], "late_refunding")
    (refund,) = await shop.books.refunds()
    await shop.payments.drive_refund(HOME, inner(payment["id"]), inner(refund))
    await shop.until(payment["id"], "late_refunded")

    assert await shop.books.balances() == {}


async def test_edge_07_a_second_paid_attempt_goes_back_by_itself(shop: Shop) -> None:
    payment = await shop.order(100)
    way = Way(channel="wechat", method="native")
    both = read(await shop.payments.add_attempt(shop.merchant, inner(payment["id"]), way, once()))
    for attempt in both["attempts"]:
        await shop.provider("/pay", {"out_trade_no": attempt["number"]})
    await shop.until(payment["id"], "succeeded")
    await eventually(lambda: was_told(shop, payment["id"], "payment.duplicate_paid"))

    (refund,) = await shop.books.refunds()
    await shop.payments.drive_refund(HOME, inner(payment["id"]), inner(refund))
    await shop.until_refund(refund, "succeeded")

    assert await shop.books.balances() == {"channel_receivable": -100, "merchant_payable": 99, "fee_income": 1}


async def test_edge_04_a_wrong_amount_in_a_callback_is_refused_and_changes_nothing(shop: Shop) -> None:
    payment = await shop.order(100)
    await shop.fault("callback", "wrong_amount", times=1)

    await shop.payer_pays(payment)
    await eventually(lambda: was_called(shop))

    assert shop.callbacks[0] >= 400
    assert (await shop.get(payment["id"]))["state"] == "processing"
    await shop.payments.drive_attempt(HOME, inner(payment["id"]), inner(payment["attempts"][0]["id"]))
    assert (await shop.get(payment["id"]))["state"] == "succeeded"


@pytest.mark.parametrize("fault", ["drop_after", "status_5xx", "drop_before"])
async def test_edge_09_a_refund_whose_answer_is_lost_keeps_its_number(shop: Shop, fault: str) -> None:
    payment = await shop.order(100)
    await shop.payer_pays(payment)
    await shop.until(payment["id"], "succeeded")
    await shop.fault("callback", "missing", times=9)
    await shop.fault("refund", fault)

    refund = await shop.refund(payment["id"], 60)
    assert refund["state"] == "unknown"
    with pytest.raises(RefundExceedsPaid):
        await shop.refund(payment["id"], 41)
    await shop.payments.drive_refund(HOME, inner(payment["id"]), inner(refund["id"]))
    await shop.payments.drive_refund(HOME, inner(payment["id"]), inner(refund["id"]))

    assert (await shop.get_refund(refund["id"]))["state"] in ("processing", "succeeded")
    (booked,) = (await shop.provider("/books", method="GET"))["refunds"]
    assert (booked["out_refund_no"], booked["amount"]) == (refund["number"], 60)


@pytest.mark.parametrize(("state", "becomes"), [("ABNORMAL", "abnormal"), ("REVERSED", "reversed")])
async def test_edge_10_the_provider_s_surprises_with_refunds_are_booked(shop: Shop, state: str, becomes: str) -> None:
    payment = await shop.order(100)
    await shop.payer_pays(payment)
    await shop.until(payment["id"], "succeeded")
    if becomes == "abnormal":
        await shop.provider("/settings", {"refund_delay_ms": 60_000})
    refund = await shop.refund(payment["id"], 100)
    if becomes == "reversed":
        await shop.until_refund(refund["id"], "succeeded")

    await shop.provider("/refunds", {"out_refund_no": refund["number"], "state": state})

    await shop.until_refund(refund["id"], becomes)
    assert (await shop.get(payment["id"]))["amount_refunded"] == 0
    assert await shop.books.balances() == {"channel_receivable": -100, "merchant_payable": 99, "fee_income": 1}


async def test_edge_27_a_key_that_rotates_while_callbacks_are_in_flight_is_fetched(shop: Shop) -> None:
    payment = await shop.order(100)
    await shop.provider("/rotate_key", {})

    await shop.payer_pays(payment)

    await shop.until(payment["id"], "succeeded")


async def test_a_channel_that_cannot_be_reached_is_not_an_error_of_ours(shop: Shop) -> None:
    right, shop.line.base_url = shop.line.base_url, "http://127.0.0.1:9"

    payment = await shop.order(100)
    assert payment["attempts"][0]["state"] == "new"
    shop.line.base_url = right
    await shop.payments.drive_attempt(HOME, inner(payment["id"]), inner(payment["attempts"][0]["id"]))

    assert (await shop.get(payment["id"]))["attempts"][0]["state"] == "pending_payer"


async def test_edge_15_the_worker_finds_out_what_no_callback_told(shop: Shop) -> None:
    await shop.fault("callback", "missing", times=9)
    payments = [await shop.order(100) for _ in range(5)]
    for payment in payments:
        await shop.payer_pays(payment)
    worker = PaymentWorker(shop.books, shop.payments, shop.books, Never())

    await shop.books.hurry()
    await worker.step()
    await worker.settle()

    assert [(await shop.get(payment["id"]))["state"] for payment in payments] == ["succeeded"] * 5
    assert await shop.books.unarmed() == []


class Never:
    """No wake-up ever comes."""

    async def wait(self, timeout_s: float = 0.0) -> None:
        await asyncio.sleep(timeout_s)


async def holds(shop: Shop, wallet: str, balance: int) -> bool:
    """Whether a wallet holds this much."""
    return bool(read(await shop.payments.get_wallet(HOME, inner(wallet)))["balance"] == balance)


async def was_told(shop: Shop, payment: str, event: str) -> bool:
    """Whether a payment has told this."""
    return event in await shop.books.events(inner(payment))


async def was_called(shop: Shop) -> bool:
    """Whether the provider has called."""
    return bool(shop.callbacks)
