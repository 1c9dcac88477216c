"""One merchant that floods us leaves room for the others."""

import asyncio

from flows.api.support import running
from flows.wechat_sandbox import SandboxProcess


async def test_a_merchant_with_all_its_places_taken_is_told_429_and_others_go_on(
    database_url: str, sandbox: SandboxProcess
) -> None:
    order = {"amount": 100, "currency": "CNY", "channel": "wechat", "method": "native", "description": "tea"}
    async with running(database_url, merchant_requests_max=2) as house:
        shop, other = await house.shop(), await house.shop()
        await house.app.merchants.set_channel(shop.merchant.id, "wechat", sandbox.credentials)
        await asyncio.to_thread(sandbox.fault, "create", "delay", times=2, delay_ms=6000)
        slow = [asyncio.create_task(shop.post("/v1/payments", {"order_id": f"o-{n}", **order})) for n in range(2)]
        # Both have their places once their payments are stored; the channel holds them there.
        for _ in range(6000):
            if await house.app.pool.fetchval("SELECT count(*) FROM payment") == 2:
                break
            await asyncio.sleep(0.01)
        refused = await shop.get("/v1/balances")
        neighbour = await other.get("/v1/balances")
        answers = await asyncio.gather(*slow)
        after = await shop.get("/v1/balances")
        sandbox.door("DELETE", "/faults")

    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (refused.json()["code"], refused.json()["retryable"]) == ("system.too_many", True)
    assert neighbour.status_code == after.status_code == 200
    assert [answer.status_code for answer in answers] == [201, 201]


async def test_a_key_that_asks_too_fast_is_told_when_to_come_again(database_url: str) -> None:
    async with running(database_url, key_requests_per_s_max=0.02) as house:
        shop = await house.shop()
        wallet = await shop.wallet(1000)

        refused = await shop.pay(wallet, 100, key="k", order_id="o-1")
        other_key = await house.shop_of(shop.merchant)
        paid = await other_key.pay(wallet, 100, key="k", order_id="o-1")
        seen = (await house.http.get("/metrics")).text

    assert (refused.status_code, refused.json()["code"]) == (429, "system.too_many")
    assert 1 <= int(refused.headers["retry-after"]) <= 50
    assert paid.status_code == 201
    assert 'status="429"' in seen


async def test_answered_requests_give_their_places_back(database_url: str) -> None:
    async with running(database_url, merchant_requests_max=3) as house:
        shop = await house.shop()
        wallet = await shop.wallet(1000)

        paid = [await shop.pay(wallet, 1) for _ in range(10)]
        wrong = [await shop.pay(wallet, 0) for _ in range(10)]
        missing = [await shop.get("/v1/payments/pay_" + "0" * 32) for _ in range(10)]
        last = await shop.pay(wallet, 1)

    assert {answer.status_code for answer in paid} == {201}
    assert {answer.status_code for answer in wrong} == {400}
    assert {answer.status_code for answer in missing} == {404}
    assert last.status_code == 201
