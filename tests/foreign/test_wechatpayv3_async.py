"""The asynchronous half of the published SDK, which fetches its certificates from the sandbox by itself."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from wechatpayv3.async_ import AsyncWeChatPay
from wechatpayv3.async_.type import WeChatPayType

from flows.wechat_sandbox import SandboxProcess, Shop, new_number

AMOUNT = {"total": 100, "currency": "CNY"}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    running = SandboxProcess(tmp_path_factory.mktemp("wechat"))
    running.settings(signtest_every=0, refund_delay_ms=100)
    yield running
    running.stop()


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    server = shop.serve()
    yield shop
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mode", ["public_key", "certificate"])
async def test_an_order_lives_through_all_operations(sandbox: SandboxProcess, shop: Shop, mode: str) -> None:
    credentials = sandbox.credentials
    keys: dict[str, str] = {}
    if mode == "public_key":
        keys["public_key"] = credentials["platform_public_key_pem"]
        keys["public_key_id"] = credentials["platform_public_key_id"]
    pay: Any = AsyncWeChatPay(
        wechatpay_type=WeChatPayType.NATIVE,
        mchid=credentials["mchid"],
        private_key=credentials["merchant_private_key_pem"],
        cert_serial_no=credentials["merchant_serial_no"],
        appid=credentials["appid"],
        apiv3_key=credentials["apiv3_key"],
        notify_url=shop.url,
        **keys,
    )
    pay._core._gate_way = credentials["base_url"]
    number, refund_number = new_number(), new_number()

    async with pay:
        status, text = await pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)
        assert (status, "code_url" in json.loads(text)) == (200, True)
        sandbox.pay(number)
        [callback] = shop.wait_for(1)
        transaction = pay.callback(callback.headers, callback.body)["resource"]
        assert json.loads((await pay.query(out_trade_no=number))[1]) == transaction
        assert (await pay.query(transaction_id=transaction["transaction_id"]))[0] == 200
        status, text = await pay.close(number)
        assert (status, json.loads(text)["code"]) == (400, "ORDER_PAID")

        status, _ = await pay.refund(refund_number, {"refund": 100, **AMOUNT}, out_trade_no=number)

        assert status == 200
        refunded = shop.wait_for(2)[1]
        assert pay.callback(refunded.headers, refunded.body)["event_type"] == "REFUND.SUCCESS"
        assert json.loads((await pay.query_refund(refund_number))[1])["status"] == "SUCCESS"
        await pay.pay(description="咖啡", out_trade_no=number + "x", amount=AMOUNT)
        assert (await pay.close(number + "x"))[0] == 204
