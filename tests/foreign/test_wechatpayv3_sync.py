"""The published Python SDK drives the sandbox unchanged: only its base address is set."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wechatpayv3 import WeChatPay, WeChatPayType

from flows.wechat_sandbox import SandboxProcess, Shop, new_number, wait_until

AMOUNT = {"total": 100, "currency": "CNY"}
MODES = ("public_key", "certificate")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    running = SandboxProcess(tmp_path_factory.mktemp("wechat"))
    running.settings(signtest_every=0, refund_delay_ms=100, refund_gap_s=0)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _callbacks_as_asked(sandbox: SandboxProcess) -> None:
    sandbox.settings(callback_key="as_asked")


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()
    server = shop.serve()
    yield shop
    server.shutdown()
    server.server_close()


def client(sandbox: SandboxProcess, shop: Shop, mode: str, directory: Path) -> Any:
    """Public-key mode, or certificate mode with the certificate on disk (the SDK would call home to fetch it)."""
    credentials = sandbox.credentials
    modes: dict[str, dict[str, str]] = {
        "public_key": {
            "public_key": credentials["platform_public_key_pem"],
            "public_key_id": credentials["platform_public_key_id"],
        },
        "certificate": {"cert_dir": str(directory)},
    }
    (directory / f"{credentials['platform_certificate_serial']}.pem").write_text(
        credentials["platform_certificate_pem"]
    )
    made = WeChatPay(
        wechatpay_type=WeChatPayType.NATIVE,
        mchid=credentials["mchid"],
        private_key=credentials["merchant_private_key_pem"],
        cert_serial_no=credentials["merchant_serial_no"],
        appid=credentials["appid"],
        apiv3_key=credentials["apiv3_key"],
        notify_url=shop.url,
        timeout=(5, 20),
        **modes[mode],
    )
    made._core._gate_way = credentials["base_url"]
    return made


@pytest.fixture(params=MODES)
def pay(request: pytest.FixtureRequest, sandbox: SandboxProcess, shop: Shop, tmp_path: Path) -> Any:
    return client(sandbox, shop, request.param, tmp_path)


def test_each_kind_of_order_gives_what_its_payer_needs(pay: Any) -> None:
    payer = {"openid": "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"}
    scene = {"payer_client_ip": "14.23.150.211", "h5_info": {"type": "Wap"}}
    kinds: list[tuple[WeChatPayType, dict[str, Any], str]] = [
        (WeChatPayType.NATIVE, {}, "code_url"),
        (WeChatPayType.JSAPI, {"payer": payer}, "prepay_id"),
        (WeChatPayType.MINIPROG, {"payer": payer}, "prepay_id"),
        (WeChatPayType.APP, {}, "prepay_id"),
        (WeChatPayType.H5, {"scene_info": scene}, "h5_url"),
    ]

    for kind, more, name in kinds:
        status, text = pay.pay(description="咖啡", out_trade_no=new_number(), amount=AMOUNT, pay_type=kind, **more)

        assert status == 200, text
        assert json.loads(text)[name]


def test_an_order_is_paid_called_back_and_found_by_both_numbers(pay: Any, sandbox: SandboxProcess, shop: Shop) -> None:
    number = new_number()
    status, text = pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT, attach="桌子7")
    assert status == 200
    assert json.loads(pay.query(out_trade_no=number)[1])["trade_state"] == "NOTPAY"

    sandbox.door("POST", "/pay", {"code_url": json.loads(text)["code_url"], "payer": "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"})
    [callback] = shop.wait_for(1)

    notice = pay.callback(callback.headers, callback.body)
    assert notice["event_type"] == "TRANSACTION.SUCCESS"
    transaction = notice["resource"]
    assert transaction["out_trade_no"] == number
    assert transaction["amount"] == {"total": 100, "payer_total": 100, "currency": "CNY", "payer_currency": "CNY"}
    assert transaction["payer"] == {"openid": "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"}
    assert transaction["attach"] == "桌子7"
    assert json.loads(pay.query(out_trade_no=number)[1]) == transaction
    assert json.loads(pay.query(transaction_id=transaction["transaction_id"])[1]) == transaction


def test_a_closed_order_stays_closed(pay: Any) -> None:
    number = new_number()
    pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)

    assert pay.close(number)[0] == 204
    assert pay.close(number)[0] == 204
    assert json.loads(pay.query(out_trade_no=number)[1])["trade_state"] == "CLOSED"
    status, text = pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)
    assert (status, json.loads(text)["code"]) == (400, "ORDER_CLOSED")


def test_a_refund_is_accepted_succeeds_and_is_called_back(pay: Any, sandbox: SandboxProcess, shop: Shop) -> None:
    number, refund_number = new_number(), new_number()
    pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)
    sandbox.pay(number)

    status, text = pay.refund(refund_number, {"refund": 30, **AMOUNT}, out_trade_no=number, reason="凉了")

    assert (status, json.loads(text)["status"]) == (200, "PROCESSING")
    notices = [pay.callback(callback.headers, callback.body) for callback in shop.wait_for(2)]
    [notice] = [notice for notice in notices if notice["event_type"] == "REFUND.SUCCESS"]
    assert notice["resource"]["out_refund_no"] == refund_number
    assert notice["resource"]["refund_status"] == "SUCCESS"
    assert notice["resource"]["amount"] == {"total": 100, "refund": 30, "payer_total": 100, "payer_refund": 30}
    assert json.loads(pay.query_refund(refund_number)[1])["status"] == "SUCCESS"
    assert json.loads(pay.query(out_trade_no=number)[1])["trade_state"] == "REFUND"


def test_an_abnormal_refund_goes_another_way(sandbox: SandboxProcess, shop: Shop, tmp_path: Path) -> None:
    """The payer's name and card travel encrypted for the platform's key."""
    pay = client(sandbox, shop, "public_key", tmp_path)
    number, refund_number = new_number(), new_number()
    pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)
    sandbox.pay(number)
    refund = json.loads(pay.refund(refund_number, {"refund": 100, **AMOUNT}, out_trade_no=number)[1])
    sandbox.door("POST", "/refunds", {"out_refund_no": refund_number, "state": "ABNORMAL"})
    assert json.loads(pay.query_refund(refund_number)[1])["status"] == "ABNORMAL"

    status, text = pay.abnormal_refund(
        refund["refund_id"], refund_number, "USER_BANK_CARD", "CMB_DEBIT", "6222020000000000000", "张三"
    )

    assert (status, json.loads(text)["status"]) == (200, "PROCESSING")
    wait_until(lambda: json.loads(pay.query_refund(refund_number)[1])["status"] == "SUCCESS")


def test_a_rotated_certificate_is_fetched_and_then_trusted(sandbox: SandboxProcess, shop: Shop, tmp_path: Path) -> None:
    """The SDK meets an unknown serial, asks /v3/certificates, and opens the new one with the APIv3 key."""
    pay = client(sandbox, shop, "certificate", tmp_path)
    old = sandbox.credentials["platform_certificate_serial"]
    sandbox.credentials = sandbox.door("POST", "/rotate_key")
    new = sandbox.credentials["platform_certificate_serial"]
    number = new_number()

    status, _ = pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)
    sandbox.pay(number)
    [callback] = shop.wait_for(1)

    assert status == 200
    assert new != old
    assert callback.headers["wechatpay-serial"] == new
    assert pay.callback(callback.headers, callback.body)["resource"]["out_trade_no"] == number
    assert (tmp_path / f"{new}.pem").read_text() == sandbox.credentials["platform_certificate_pem"]


def test_a_callback_that_was_tampered_with_is_refused(pay: Any, sandbox: SandboxProcess, shop: Shop) -> None:
    number = new_number()
    pay.pay(description="咖啡", out_trade_no=number, amount=AMOUNT)
    sandbox.fault("callback", "bad_signature")
    sandbox.settings(callback_speed=1000.0)

    sandbox.pay(number)
    first, second, *_ = shop.wait_for(2)

    assert pay.callback(first.headers, first.body) is None
    assert pay.callback(second.headers, second.body)["resource"]["out_trade_no"] == number


def test_the_wrong_merchant_key_is_a_signature_error(sandbox: SandboxProcess, shop: Shop, tmp_path: Path) -> None:
    pay = client(sandbox, shop, "public_key", tmp_path)
    pay._core._cert_serial_no = "0" * 40

    status, text = pay.query(out_trade_no=new_number())

    assert (status, json.loads(text)["code"]) == (401, "SIGN_ERROR")
