"""The sandbox's signed wire: who gets in, in which form, and what is refused with which error."""

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from flows.wechat_sandbox import SandboxProcess, new_number, order_path, wait_until
from kassa.channels.wechat_crypto import load_certificate, load_public_key, response_text, verify

NATIVE = "/v3/pay/transactions/native"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxProcess]:
    running = SandboxProcess(tmp_path_factory.mktemp("wechat"))
    running.settings(refund_delay_ms=50)
    yield running
    running.stop()


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def is_signed(answer: httpx.Response, sandbox: SandboxProcess) -> bool:
    """By the key that the answer names, in either mode."""
    credentials, serial = sandbox.credentials, answer.headers["wechatpay-serial"]
    key = load_certificate(credentials["platform_certificate_pem"]).public_key
    if serial == credentials["platform_public_key_id"]:
        key = load_public_key(credentials["platform_public_key_pem"])
    text = response_text(answer.headers["wechatpay-timestamp"], answer.headers["wechatpay-nonce"], answer.content)
    return verify(key, text, answer.headers["wechatpay-signature"])


def test_answers_are_signed_with_the_key_that_the_request_asks_for(sandbox: SandboxProcess) -> None:
    number = new_number()
    raw = json.dumps(sandbox.order(number)).encode()
    asked_bare = sandbox.signed("POST", NATIVE, raw)
    asked_none = {**sandbox.signed("POST", NATIVE, raw)}
    del asked_none["Wechatpay-Serial"]

    bare = sandbox.client.post(NATIVE, content=raw, headers=asked_bare)
    certified = sandbox.client.post(NATIVE, content=raw, headers=asked_none)

    assert bare.headers["wechatpay-serial"] == sandbox.credentials["platform_public_key_id"]
    assert certified.headers["wechatpay-serial"] == sandbox.credentials["platform_certificate_serial"]
    for answer in (bare, certified, sandbox.close(number), sandbox.query("unknown-number")):
        assert is_signed(answer, sandbox)
        assert answer.headers["request-id"]
        assert answer.headers["content-type"] == "application/json; charset=utf-8"


def test_an_unknown_platform_key_is_refused(sandbox: SandboxProcess) -> None:
    path = f"{order_path('n' * 20)}?mchid={sandbox.credentials['mchid']}"
    headers = {**sandbox.signed("GET", path, b""), "Wechatpay-Serial": "PUB_KEY_ID_0"}

    assert code(sandbox.client.get(path, headers=headers)) == (400, "PARAM_ERROR")


@pytest.mark.parametrize("off_s", [-301, 301])
def test_a_timestamp_more_than_five_minutes_off_is_refused(sandbox: SandboxProcess, off_s: int) -> None:
    path = f"{order_path('n' * 20)}?mchid={sandbox.credentials['mchid']}"
    headers = sandbox.signed("GET", path, b"", at=time.time() + off_s + (1 if off_s > 0 else 0))

    assert code(sandbox.client.get(path, headers=headers)) == (401, "SIGN_ERROR")


def test_a_nonce_works_once(sandbox: SandboxProcess) -> None:
    path = f"{order_path('n' * 20)}?mchid={sandbox.credentials['mchid']}"
    headers = sandbox.signed("GET", path, b"")

    assert code(sandbox.client.get(path, headers=headers)) == (404, "ORDER_NOT_EXIST")
    assert code(sandbox.client.get(path, headers=headers)) == (401, "SIGN_ERROR")


def test_a_changed_body_or_path_or_a_missing_part_is_a_signature_error(sandbox: SandboxProcess) -> None:
    raw = json.dumps(sandbox.order(new_number())).encode()
    headers = sandbox.signed("POST", NATIVE, raw)
    authorization = headers["Authorization"]

    refused = [
        sandbox.client.post(NATIVE, content=raw + b" ", headers=headers),
        sandbox.client.post(NATIVE + "?x=1", content=raw, headers=headers),
        sandbox.client.post(NATIVE, content=raw, headers={**headers, "Authorization": ""}),
        sandbox.client.post(
            NATIVE, content=raw, headers={**headers, "Authorization": authorization.replace("nonce_str", "nonce")}
        ),
        sandbox.client.post(
            NATIVE,
            content=raw,
            headers={**headers, "Authorization": authorization.replace("RSA2048", "SM2-WITH-SM3")},
        ),
    ]

    assert [code(answer) for answer in refused] == [(401, "SIGN_ERROR")] * 5
    shown = refused[0].json()["detail"]["sign_information"]
    assert shown["method"] == "POST"
    assert shown["url"] == NATIVE
    assert shown["truncated_sign_message"].startswith(f"POST\n{NATIVE}\n")


def test_form_does_not_matter(sandbox: SandboxProcess) -> None:
    """Another order of the Authorization's parts, raw UTF-8 with spaces in the JSON, and an absolute-form target."""
    order = sandbox.order(new_number())
    raw = json.dumps(order, ensure_ascii=False, indent=1).encode()
    headers = sandbox.signed("POST", NATIVE, raw)
    scheme, _, parts = headers["Authorization"].partition(" ")
    headers["Authorization"] = f"{scheme} {', '.join(reversed(parts.split(',')))}"

    turned = sandbox.client.post(NATIVE, content=raw, headers=headers)
    with httpx.Client(proxy=sandbox.credentials["base_url"], trust_env=False) as through:
        path = f"{order_path(order['out_trade_no'])}?mchid={sandbox.credentials['mchid']}"
        absolute = through.get(f"http://api.mch.weixin.qq.com{path}", headers=sandbox.signed("GET", path, b""))

    assert turned.status_code == 200
    assert absolute.json()["trade_state"] == "NOTPAY"


def test_a_path_that_is_not_there(sandbox: SandboxProcess) -> None:
    assert code(sandbox.call("GET", "/v3/nothing")) == (404, "RESOURCE_NOT_EXISTS")
    assert code(sandbox.call("GET", NATIVE)) == (405, "METHOD_NOT_ALLOWED")


WRONG_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("native", {"description": ""}, "/description"),
    ("native", {"description": "x" * 128}, "/description"),
    ("native", {"description": None}, "/description"),
    ("native", {"out_trade_no": "short"}, "/out_trade_no"),
    ("native", {"out_trade_no": "x" * 33}, "/out_trade_no"),
    ("native", {"out_trade_no": "with space"}, "/out_trade_no"),
    ("native", {"out_trade_no": "number\n"}, "/out_trade_no"),
    ("native", {"mchid": "1900000000"}, "/mchid"),
    ("native", {"mchid": 7}, "/mchid"),
    ("native", {"notify_url": "http://127.0.0.1/x?y=1"}, "/notify_url"),
    ("native", {"notify_url": "ftp://127.0.0.1/x"}, "/notify_url"),
    ("native", {"notify_url": None}, "/notify_url"),
    ("native", {"amount": {"total": 0}}, "/amount/total"),
    ("native", {"amount": {"total": True}}, "/amount/total"),
    ("native", {"amount": {"total": 1.5}}, "/amount/total"),
    ("native", {"amount": {"total": "100"}}, "/amount/total"),
    ("native", {"amount": {"total": 1, "currency": "USD"}}, "/amount/currency"),
    ("native", {"amount": 100}, "/amount"),
    ("native", {"attach": "x" * 129}, "/attach"),
    ("native", {"goods_tag": 5}, "/goods_tag"),
    ("native", {"time_expire": "tomorrow"}, "/time_expire"),
    ("native", {"time_expire": "2020-01-01T00:00:00+08:00"}, "/time_expire"),
    ("native", {"time_expire": "2999-01-01T00:00:00+08:00"}, "/time_expire"),
    ("native", {"time_expire": "2026-01-01T00:00:00"}, "/time_expire"),
    ("native", {"detail": []}, "/detail"),
    ("jsapi", {}, "/payer"),
    ("jsapi", {"payer": {}}, "/payer/openid"),
    ("h5", {}, "/scene_info"),
    ("h5", {"scene_info": {"payer_client_ip": "1.2.3"}}, "/scene_info/payer_client_ip"),
    ("h5", {"scene_info": {"payer_client_ip": "1.2.3.4"}}, "/scene_info/h5_info"),
    ("h5", {"scene_info": {"payer_client_ip": "1.2.3.4", "h5_info": {}}}, "/scene_info/h5_info/type"),
]


@pytest.mark.parametrize(("kind", "changes", "named"), WRONG_FIELDS)
def test_a_wrong_field_of_an_order_is_named(
    sandbox: SandboxProcess, kind: str, changes: dict[str, Any], named: str
) -> None:
    answer = sandbox.create(new_number(), kind, **changes)

    assert code(answer) == (400, "PARAM_ERROR")
    assert answer.json()["detail"]["field"] == named


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_not_an_object_is_a_parameter_error(sandbox: SandboxProcess, raw: bytes) -> None:
    answer = sandbox.client.post(NATIVE, content=raw, headers=sandbox.signed("POST", NATIVE, raw))

    assert code(answer) == (400, "PARAM_ERROR")


def test_an_appid_of_somebody_else_is_refused(sandbox: SandboxProcess) -> None:
    assert code(sandbox.create(new_number(), appid="wx0000000000000000")) == (400, "APPID_MCHID_NOT_MATCH")


def test_a_body_that_is_too_large_is_refused(sandbox: SandboxProcess) -> None:
    assert sandbox.client.post(NATIVE, content=b"x" * 1_100_000).status_code == 413


def test_the_same_number_means_the_same_order(sandbox: SandboxProcess) -> None:
    number = new_number()

    first = sandbox.create(number)
    again = sandbox.create(number)
    other_amount = sandbox.create(number, amount={"total": 101, "currency": "CNY"})
    other_kind = sandbox.create(number, "app")

    assert (again.status_code, again.json()) == (200, first.json())
    assert code(other_amount) == code(other_kind) == (400, "INVALID_REQUEST")


def test_what_a_paid_order_refuses(sandbox: SandboxProcess) -> None:
    number = sandbox.paid()

    assert code(sandbox.create(number)) == (400, "ORDER_PAID")
    assert code(sandbox.close(number)) == (400, "ORDER_PAID")


def test_an_order_that_is_not_there(sandbox: SandboxProcess) -> None:
    missing = new_number()

    assert code(sandbox.query(missing)) == (404, "ORDER_NOT_EXIST")
    assert code(sandbox.close(missing)) == (404, "ORDER_NOT_EXIST")
    assert code(sandbox.refund(missing, new_number())) == (404, "RESOURCE_NOT_EXISTS")
    assert code(sandbox.refund_query(missing)) == (404, "RESOURCE_NOT_EXISTS")


def test_the_merchant_of_a_query_and_a_close_must_be_the_one_who_signed(sandbox: SandboxProcess) -> None:
    number = sandbox.paid()

    assert code(sandbox.call("GET", order_path(number))) == (400, "PARAM_ERROR")
    assert code(sandbox.call("GET", order_path(number) + "?mchid=1900000000")) == (400, "PARAM_ERROR")
    assert code(sandbox.call("POST", order_path(number) + "/close", {"mchid": "1"})) == (400, "PARAM_ERROR")


def test_refunds_never_exceed_what_was_paid(sandbox: SandboxProcess) -> None:
    sandbox.settings(refund_gap_s=0)
    number, first = sandbox.paid(), new_number()

    accepted = sandbox.refund(number, first, 70)
    again = sandbox.refund(number, first, 70)
    changed = sandbox.refund(number, first, 60)
    too_much = sandbox.refund(number, new_number(), 31)
    rest = sandbox.refund(number, new_number(), 30)

    assert (accepted.status_code, accepted.json()["status"]) == (200, "PROCESSING")
    assert again.json()["refund_id"] == accepted.json()["refund_id"]
    assert code(changed) == (400, "INVALID_REQUEST")
    assert code(too_much) == (400, "INVALID_REQUEST")
    assert rest.status_code == 200
    assert sandbox.query(number).json()["trade_state"] == "REFUND"
    wait_until(lambda: sandbox.refund_query(first).json()["status"] == "SUCCESS")
    wait_until(lambda: (sandbox.charge(number) or {})["refunded"] == 100)


def test_two_refunds_of_one_order_are_a_minute_apart(sandbox: SandboxProcess) -> None:
    sandbox.settings(refund_gap_s=60)
    number = sandbox.paid()
    assert sandbox.refund(number, new_number()).status_code == 200

    second = new_number()
    assert code(sandbox.refund(number, second)) == (429, "FREQUENCY_LIMITED")
    sandbox.door("POST", "/clock", {"advance_s": 61})
    assert sandbox.refund(number, second).status_code == 200


def test_an_order_takes_fifty_refunds(sandbox: SandboxProcess) -> None:
    sandbox.settings(refund_gap_s=0)
    number = sandbox.paid()

    statuses = [sandbox.refund(number, new_number(), 1).status_code for _ in range(50)]

    assert statuses == [200] * 50
    assert code(sandbox.refund(number, new_number(), 1)) == (400, "INVALID_REQUEST")


def test_what_else_a_refund_refuses(sandbox: SandboxProcess) -> None:
    sandbox.settings(refund_gap_s=0)
    number, unpaid = sandbox.paid(), new_number()
    sandbox.create(unpaid)
    wrong_total = {"refund": 1, "total": 99, "currency": "CNY"}
    no_currency = {"refund": 1, "total": 100}

    assert code(sandbox.refund(unpaid, new_number())) == (400, "INVALID_REQUEST")
    assert code(sandbox.refund(number, new_number(), 0)) == (400, "PARAM_ERROR")
    assert code(sandbox.call("POST", "/v3/refund/domestic/refunds", {"out_refund_no": "r"})) == (400, "PARAM_ERROR")
    assert code(_refund_with(sandbox, number, wrong_total)) == (400, "INVALID_REQUEST")
    assert code(_refund_with(sandbox, number, no_currency)) == (400, "PARAM_ERROR")
    assert code(sandbox.refund(number, "bad number")) == (400, "PARAM_ERROR")
    sandbox.settings(has_funds=False)
    assert code(sandbox.refund(number, new_number())) == (403, "NOT_ENOUGH")
    sandbox.settings(has_funds=True)
    sandbox.door("POST", "/clock", {"advance_s": 366 * 86_400})
    assert code(sandbox.refund(number, new_number())) == (400, "INVALID_REQUEST")


def _refund_with(sandbox: SandboxProcess, number: str, amount: dict[str, Any]) -> httpx.Response:
    body = {"out_trade_no": number, "out_refund_no": new_number(), "amount": amount}
    return sandbox.call("POST", "/v3/refund/domestic/refunds", body)


def test_the_address_in_the_credentials_is_where_it_listens(sandbox: SandboxProcess) -> None:
    assert sandbox.door("GET", "") == sandbox.credentials
    assert urlsplit(sandbox.credentials["base_url"]).hostname == "127.0.0.1"
