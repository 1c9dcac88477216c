"""Repeats: the same key, the same answer; whatever happened in between."""

import asyncio

import pytest

from flows.api.support import House, Shop

WAY = {"currency": "CNY", "channel": "wallet"}


async def test_a_repeat_gets_the_first_answer_and_nothing_happens_twice(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    order = {"order_id": "o-1", "amount": 100, **WAY, "payer": {"wallet": wallet}}

    first = await shop.post("/v1/payments", order, key="k")
    again = await shop.post("/v1/payments", order, key="k")

    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (await shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 900


async def test_the_same_body_written_otherwise_is_the_same_request(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    order = {"order_id": "o-1", "amount": 100, **WAY, "payer": {"wallet": wallet}}

    first = await shop.post("/v1/payments", order, key="k")
    again = await shop.post("/v1/payments", {**dict(reversed(order.items())), "metadata": {}}, key="k")

    assert again.json() == first.json()


async def test_a_repeat_shows_the_thing_as_it_stands_now(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    first = await shop.pay(wallet, 100, key="k", order_id="o-1")
    await shop.post(f"/v1/payments/{first.json()['id']}/refunds", {"refund_id": "r-1", "amount": 30})

    again = await shop.pay(wallet, 100, key="k", order_id="o-1")

    assert again.status_code == 201
    assert again.json()["amount_refunded"] == 30


async def test_another_body_under_the_key_is_refused(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    await shop.pay(wallet, 100, key="k", order_id="o-1")

    other = await shop.pay(wallet, 200, key="k", order_id="o-2")

    assert (other.status_code, other.json()["code"]) == (422, "idempotency.key_reused")
    assert other.json()["outcome"] == "unknown"


async def test_another_path_under_the_key_is_refused(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    paid = await shop.pay(wallet, 100, key="k")

    other = await shop.post(f"/v1/payments/{paid.json()['id']}/refunds", {"refund_id": "r"}, key="k")

    assert (other.status_code, other.json()["code"]) == (422, "idempotency.key_reused")


async def test_a_refusal_is_repeated_as_it_was_even_if_it_would_go_through_now(shop: Shop) -> None:
    wallet = await shop.wallet(50)
    refused = await shop.pay(wallet, 100, key="k", order_id="o-1")
    await shop.fund(wallet, 1000)

    again = await shop.pay(wallet, 100, key="k", order_id="o-1")
    fresh = await shop.pay(wallet, 100, key="k-2", order_id="o-1")

    assert (refused.status_code, refused.json()["code"]) == (402, "wallet.insufficient_funds")
    assert refused.json()["outcome"] == "not_processed"
    assert (again.status_code, again.json()) == (402, refused.json())
    assert again.headers["idempotent-replayed"] == "true"
    assert fresh.status_code == 201


async def test_a_refused_key_refuses_another_body_too(shop: Shop) -> None:
    wallet = await shop.wallet(50)
    await shop.pay(wallet, 100, key="k", order_id="o-1")

    other = await shop.pay(wallet, 10, key="k", order_id="o-1")

    assert other.status_code == 422


async def test_an_invalid_request_does_not_use_up_its_key(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    wrong = await shop.pay(wallet, 0, key="k", order_id="o-1")

    right = await shop.pay(wallet, 10, key="k", order_id="o-1")

    assert (wrong.status_code, right.status_code) == (400, 201)


@pytest.mark.parametrize("key", [None, "", "a b", "x" * 256])
async def test_a_request_that_moves_money_needs_a_key(house: House, shop: Shop, key: str | None) -> None:
    order = {"order_id": "o-1", "amount": 100, **WAY, "payer": {"wallet": "wal_" + "0" * 32}}

    answer = await shop.http.post("/v1/payments", json=order, headers={} if key is None else {"Idempotency-Key": key})

    assert (answer.status_code, answer.json()["code"]) == (400, "idempotency.key_missing")


async def test_a_wallet_may_be_opened_without_a_key(shop: Shop) -> None:
    body = {"user": "u-1", "currency": "CNY"}

    opened = await shop.http.post("/v1/wallets", json=body)
    second = await shop.http.post("/v1/wallets", json=body)

    assert opened.status_code == 201
    assert (second.status_code, second.json()["code"]) == (409, "wallet.exists")
    assert second.json()["wallet"] == opened.json()["id"]


async def test_keys_of_two_merchants_do_not_meet(house: House) -> None:
    one, other = await house.shop(), await house.shop()
    first = await one.pay(await one.wallet(100), 10, key="k", order_id="o")

    second = await other.pay(await other.wallet(100), 10, key="k", order_id="o")

    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]


async def test_a_hundred_equal_requests_at_once_are_one_payment(shop: Shop) -> None:
    wallet = await shop.wallet(100_000)
    order = {"order_id": "o-1", "amount": 100, **WAY, "payer": {"wallet": wallet}}

    answers = await asyncio.gather(*(shop.post("/v1/payments", order, key="k") for _ in range(100)))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert (await shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 99_900


async def test_a_hundred_payments_for_one_order_under_many_keys_are_one_payment(shop: Shop) -> None:
    wallet = await shop.wallet(100_000)

    answers = await asyncio.gather(*(shop.pay(wallet, 100, order_id="o-1") for _ in range(100)))

    paid = [answer for answer in answers if answer.status_code == 201]
    refused = [answer for answer in answers if answer.status_code == 409]
    assert (len(paid), len(refused)) == (1, 99)
    assert {answer.json()["code"] for answer in refused} == {"payment.order_exists"}
    assert {answer.json()["payment"] for answer in refused} == {paid[0].json()["id"]}


async def test_a_hundred_refunds_at_once_return_what_was_paid_and_no_more(shop: Shop) -> None:
    wallet = await shop.wallet(1000)
    paid = await shop.pay(wallet, 1000)
    path = f"/v1/payments/{paid.json()['id']}/refunds"

    answers = await asyncio.gather(
        *(shop.post(path, {"refund_id": f"r-{number}", "amount": 30}) for number in range(100))
    )

    taken = [answer for answer in answers if answer.status_code == 201]
    assert len(taken) == 33
    assert {answer.json()["code"] for answer in answers if answer.status_code != 201} == {"refund.exceeds_paid"}
    assert (await shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 990
    rest = await shop.post(path, {"refund_id": "rest"})
    assert (rest.status_code, rest.json()["amount"]) == (201, 10)
    (balance,) = (await shop.get("/v1/balances")).json()["data"]
    assert (balance["balance"], balance["fees"]) == (0, 0)
