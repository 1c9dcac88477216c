"""Payments through a channel, over HTTP: the wire is the provider's, the sandbox is a process of its own."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from flows.api.support import House, Shop
from flows.wechat_sandbox import SandboxProcess

ORDER = {"amount": 100, "currency": "CNY", "channel": "wechat", "method": "native", "description": "两杯咖啡"}
TRIES = 2400
"""Looks, twenty a second, before something counts as not happening."""


async def until(shop: Shop, path: str, state: str) -> dict[str, Any]:
    """The thing, once it is in a state."""
    for _ in range(TRIES):
        seen: dict[str, Any] = (await shop.get(path)).json()
        if seen["state"] == state:
            return seen
        await asyncio.sleep(0.05)
    raise AssertionError(f"{path} is {seen['state']}, not {state}: {seen}")


async def until_payable(shop: Shop, path: str) -> None:
    """Returns once the payer can be shown what he needs."""
    for _ in range(TRIES):
        if (await shop.get(path)).json()["next_action"] is not None:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{path} never told what the payer needs")


async def test_a_payment_from_its_qr_code_to_its_refund(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop

    made = await shop.post("/v1/payments", {"order_id": "o-1", **ORDER, "metadata": {"table": "7"}})

    assert made.status_code == 201, made.text
    payment = made.json()
    assert payment["state"] == "processing"
    assert payment["next_action"]["type"] == "qr_code"
    assert payment["next_action"]["code_url"].startswith("weixin://")
    (attempt,) = payment["attempts"]
    assert attempt["state"] == "pending_payer"
    await asyncio.to_thread(sandbox.pay, attempt["number"])
    paid = await until(shop, f"/v1/payments/{payment['id']}", "succeeded")
    assert (paid["fee"], paid["next_action"], paid["attempts"][0]["state"]) == (1, None, "succeeded")
    refund = await shop.post(
        f"/v1/payments/{payment['id']}/refunds", {"amount": 30, "refund_id": "r-1", "reason": "cold coffee"}
    )
    assert refund.status_code == 201, refund.text
    await until(shop, f"/v1/refunds/{refund.json()['id']}", "succeeded")
    assert (await shop.get(f"/v1/payments/{payment['id']}")).json()["amount_refunded"] == 30
    (balance,) = (await shop.get("/v1/balances")).json()["data"]
    assert (balance["balance"] + balance["fees"], balance["receivable"], balance["held"]) == (70, 70, 0)
    story = (await shop.get(f"/v1/payments/{payment['id']}/timeline")).json()["data"]
    assert {"created", "request", "callback", "move", "posting", "event"} <= {entry["kind"] for entry in story}


async def test_a_topup_fills_a_wallet(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop
    wallet = await shop.wallet()

    made = await shop.post("/v1/topups", {"order_id": "t-1", "wallet": wallet, **ORDER, "amount": 5000})

    assert made.status_code == 201, made.text
    topup = made.json()
    assert (topup["object"], topup["wallet"]) == ("topup", wallet)
    await asyncio.to_thread(sandbox.pay, topup["attempts"][0]["number"])
    await until(shop, f"/v1/topups/{topup['id']}", "succeeded")
    assert (await shop.get(f"/v1/wallets/{wallet}")).json()["balance"] == 5000
    (line,) = (await shop.get(f"/v1/wallets/{wallet}/statement")).json()["data"]
    assert (line["kind"], line["amount"], line["balance"], line["resource"]) == ("topup", 5000, 5000, topup["id"])
    (owed,) = (await shop.get("/v1/balances/statement", account="channel_receivable")).json()["data"]
    assert (owed["kind"], owed["amount"], owed["resource"]) == ("topup", -5000, topup["id"])
    assert (await shop.get(f"/v1/payments/{topup['id']}")).status_code == 404
    assert (await shop.get("/v1/topups", order_id="t-1")).json()["data"][0]["id"] == topup["id"]


async def test_respond_async_answers_at_once_and_says_where_to_look(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop
    await asyncio.to_thread(sandbox.fault, "create", "delay", times=1, delay_ms=4000)

    made = await shop.post("/v1/payments", {"order_id": "o-1", **ORDER}, Prefer="respond-async")

    assert (made.status_code, made.headers["preference-applied"]) == (202, "respond-async")
    assert made.headers["location"] == f"/v1/payments/{made.json()['id']}"
    assert made.json()["attempts"][0]["state"] == "sending"
    for _ in range(TRIES):
        seen = (await shop.get(made.headers["location"])).json()
        if seen["attempts"][0]["state"] == "pending_payer":
            break
        await asyncio.sleep(0.05)
    assert seen["next_action"]["type"] == "qr_code"


@pytest.mark.parametrize("prefer", ["respond-async", "wait=1"])
async def test_a_repeat_of_what_was_answered_202_is_answered_202_with_the_thing_as_it_stands(
    wechat_shop: Shop, sandbox: SandboxProcess, prefer: str
) -> None:
    shop, order = wechat_shop, {"order_id": "o-1", **ORDER}
    made = await shop.post("/v1/payments", order, key="k", Prefer=prefer)
    await until_payable(shop, made.headers["location"])

    plain = await shop.post("/v1/payments", order, key="k")
    await asyncio.to_thread(sandbox.pay, made.json()["attempts"][0]["number"])
    await until(shop, made.headers["location"], "succeeded")
    preferring = await shop.post("/v1/payments", order, key="k", Prefer=prefer)

    assert (made.status_code, plain.status_code, preferring.status_code) == (202, 202, 202)
    assert plain.headers["idempotent-replayed"] == preferring.headers["idempotent-replayed"] == "true"
    assert plain.headers["location"] == made.headers["location"]
    assert plain.json()["next_action"]["type"] == "qr_code"
    assert (preferring.json()["id"], preferring.json()["state"]) == (made.json()["id"], "succeeded")


async def test_a_repeat_of_an_asynchronous_request_does_not_wait_for_the_channel(
    wechat_shop: Shop, sandbox: SandboxProcess
) -> None:
    """It was answered 202 already, so there is nothing in progress that a repeat could disturb."""
    shop, order = wechat_shop, {"order_id": "o-1", **ORDER}
    await asyncio.to_thread(sandbox.fault, "create", "delay", times=1, delay_ms=4000)
    made = await shop.post("/v1/payments", order, key="k", Prefer="respond-async")

    again = await shop.post("/v1/payments", order, key="k")

    assert (made.status_code, again.status_code) == (202, 202)
    assert again.json()["attempts"][0]["state"] == "sending"


async def test_a_repeat_that_prefers_otherwise_is_told_the_first_status(wechat_shop: Shop) -> None:
    shop, order = wechat_shop, {"order_id": "o-1", **ORDER}
    await shop.post("/v1/payments", order, key="k")

    again = await shop.post("/v1/payments", order, key="k", Prefer="respond-async")

    assert (again.status_code, again.json()["state"]) == (201, "processing")


async def test_wait_answers_when_it_is_final(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop
    waiting = asyncio.create_task(shop.post("/v1/payments", {"order_id": "o-1", **ORDER}, Prefer="wait=30"))
    for _ in range(TRIES):
        found = (await shop.get("/v1/payments", order_id="o-1")).json()["data"]
        if found and found[0]["next_action"]:
            break
        await asyncio.sleep(0.05)
    await asyncio.to_thread(sandbox.pay, found[0]["attempts"][0]["number"])

    answer = await waiting

    assert (answer.status_code, answer.json()["state"]) == (201, "succeeded")
    assert answer.headers["preference-applied"] == "wait=30"


async def test_wait_that_is_over_answers_202(wechat_shop: Shop) -> None:
    answer = await wechat_shop.post("/v1/payments", {"order_id": "o-1", **ORDER}, Prefer="wait=1")

    assert (answer.status_code, answer.json()["state"]) == (202, "processing")
    assert answer.headers["location"] == f"/v1/payments/{answer.json()['id']}"


async def test_a_repeat_while_the_first_still_runs_is_told_to_come_again(
    wechat_shop: Shop, sandbox: SandboxProcess
) -> None:
    shop = wechat_shop
    await asyncio.to_thread(sandbox.fault, "create", "delay", times=1, delay_ms=4000)
    order = {"order_id": "o-1", **ORDER}
    first = asyncio.create_task(shop.post("/v1/payments", order, key="k"))
    for _ in range(TRIES):
        if (await shop.get("/v1/payments", order_id="o-1")).json()["data"]:
            break
        await asyncio.sleep(0.05)

    early = await shop.post("/v1/payments", order, key="k")
    done = await first
    late = await shop.post("/v1/payments", order, key="k")

    assert (early.status_code, early.json()["code"]) == (409, "idempotency.in_progress")
    assert (early.headers["retry-after"], early.json()["retryable"], early.json()["outcome"]) == ("1", True, "unknown")
    assert done.status_code == 201
    assert (late.status_code, late.json()["id"]) == (201, done.json()["id"])
    assert late.json()["next_action"] == done.json()["next_action"]


async def test_a_lost_answer_is_not_an_error_of_ours(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    await asyncio.to_thread(sandbox.fault, "create", "drop_after", times=1)

    answer = await wechat_shop.post("/v1/payments", {"order_id": "o-1", **ORDER})

    assert answer.status_code == 201, answer.text
    assert answer.json()["attempts"][0]["state"] == "unknown"


async def test_closing_a_payment_closes_it_at_the_channel(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop
    payment = (await shop.post("/v1/payments", {"order_id": "o-1", **ORDER})).json()

    closed = await shop.post(f"/v1/payments/{payment['id']}/close")

    assert (closed.status_code, closed.json()["state"]) == (200, "closed"), closed.text
    charge = await asyncio.to_thread(sandbox.charge, payment["attempts"][0]["number"])
    assert charge is not None
    assert charge["state"] == "CLOSED"


async def test_a_paid_order_cannot_be_closed(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop
    payment = (await shop.post("/v1/payments", {"order_id": "o-1", **ORDER})).json()
    await asyncio.to_thread(sandbox.pay, payment["attempts"][0]["number"])
    await until(shop, f"/v1/payments/{payment['id']}", "succeeded")

    refused = await shop.post(f"/v1/payments/{payment['id']}/close")

    assert (refused.status_code, refused.json()["code"]) == (409, "payment.not_closable")
    assert refused.json()["outcome"] == "processed"


async def test_another_way_to_pay_the_same_order(wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    shop = wechat_shop
    payment = (await shop.post("/v1/payments", {"order_id": "o-1", **ORDER})).json()

    other = await shop.post(
        f"/v1/payments/{payment['id']}/attempts",
        {"channel": "wechat", "method": "h5", "payer": {"ip": "203.0.113.7"}},
    )

    assert other.status_code == 201, other.text
    assert [attempt["method"] for attempt in other.json()["attempts"]] == ["native", "h5"]
    assert other.json()["next_action"]["type"] == "redirect"


async def test_only_held_money_can_be_decided_about(wechat_shop: Shop) -> None:
    payment = (await wechat_shop.post("/v1/payments", {"order_id": "o-1", **ORDER})).json()

    refused = await wechat_shop.post(
        f"/v1/payments/{payment['id']}/resolve", {"decision": "accept", "reason": "they paid"}
    )

    assert (refused.status_code, refused.json()["code"]) == (409, "payment.not_held")


async def test_held_money_is_decided_about(house: House, sandbox: SandboxProcess) -> None:
    shop = await house.shop(late_success="hold")
    await house.app.merchants.set_channel(shop.merchant.id, "wechat", sandbox.credentials)
    payment = (await shop.post("/v1/payments", {"order_id": "o-1", **ORDER})).json()
    await shop.post(f"/v1/payments/{payment['id']}/close")
    await asyncio.to_thread(sandbox.pay, payment["attempts"][0]["number"], after_close=True)
    await until(shop, f"/v1/payments/{payment['id']}", "held")

    accepted = await shop.post(f"/v1/payments/{payment['id']}/resolve", {"decision": "accept", "reason": "they paid"})

    assert (accepted.status_code, accepted.json()["state"]) == (200, "succeeded"), accepted.text


async def test_a_merchant_without_an_account_at_the_channel_is_told(shop: Shop) -> None:
    refused = await shop.post("/v1/payments", {"order_id": "o-1", **ORDER})

    assert (refused.status_code, refused.json()["code"]) == (404, "channel.not_found")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/callbacks/wechat/mch_" + "0" * 32, 404, "merchant.not_found"),
        ("/v1/callbacks/wechat/me", 404, "merchant.not_found"),
    ],
)
async def test_a_callback_for_nobody_is_refused(house: House, path: str, status: int, code: str) -> None:
    answer = await house.http.post(path, json={})

    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_a_callback_for_a_channel_that_the_merchant_has_not_is_refused(house: House, shop: Shop) -> None:
    answer = await house.http.post(f"/v1/callbacks/alipay/mch_{shop.merchant.id}", json={})

    assert (answer.status_code, answer.json()["code"]) == (404, "channel.not_found")


async def test_a_forged_callback_changes_nothing(house: House, wechat_shop: Shop, sandbox: SandboxProcess) -> None:
    payment = (await wechat_shop.post("/v1/payments", {"order_id": "o-1", **ORDER})).json()
    path = f"/v1/callbacks/wechat/mch_{wechat_shop.merchant.id}"
    forged = {
        "Wechatpay-Timestamp": str(int(time.time())),
        "Wechatpay-Nonce": "n" * 32,
        "Wechatpay-Serial": sandbox.credentials["platform_public_key_id"],
        "Wechatpay-Signature": "Zm9yZ2Vk",
    }

    answers: list[httpx.Response] = []
    for headers in ({}, forged, forged | {"Wechatpay-Serial": "PUB_KEY_ID_0"}):
        answers.append(await house.http.post(path, json={"id": "x"}, headers=headers))

    assert all(answer.status_code in (401, 500) and answer.json()["code"] == "FAIL" for answer in answers)
    assert (await wechat_shop.get(f"/v1/payments/{payment['id']}")).json()["state"] == "processing"
