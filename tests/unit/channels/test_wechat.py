"""What WeChat Pay's answers mean. The rule behind each row: only what is proven is said."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.channels import wechat_crypto
from kassa.channels.channel import Callbacks, Charges, FreshKeys, KeyRefresh, Refunds
from kassa.channels.model import (
    Abnormal,
    ActionType,
    Advice,
    Closed,
    Failed,
    Method,
    NotFound,
    NotSent,
    Outcome,
    Pending,
    Request,
    Response,
    Steps,
    Succeeded,
    Unknown,
)
from kassa.channels.wechat import PlatformKey, WeChatPay
from kassa.channels.wechat_crypto import ClientKind
from unit.channels.provider import (
    APIV3_KEY,
    APPID,
    CHANNEL,
    KEY_ID,
    MCHID,
    MERCHANT_KEY,
    NEXT_PLATFORM,
    NOW,
    NUMBER,
    OPENID,
    PLATFORM,
    REFUND_NUMBER,
    TRANSACTION_ID,
    account,
    certificate_pem,
    charge,
    converse,
    encrypted,
    nonces,
    refund,
    refund_answer,
    signed,
    trade,
    unsigned,
)


def start(operation: str, *, repeat: bool = False) -> Steps:
    """A conversation of each kind."""
    match operation:
        case "create":
            return CHANNEL.charge(charge(repeat=repeat), nonces)
        case "query":
            return CHANNEL.query(NUMBER, nonces)
        case "query_by_channel_id":
            return CHANNEL.query_by_channel_id(TRANSACTION_ID, nonces)
        case "close":
            return CHANNEL.close(NUMBER, nonces)
        case "refund":
            return CHANNEL.refund(refund(repeat=repeat), nonces)
        case "refund_query":
            return CHANNEL.query_refund(REFUND_NUMBER, nonces)
    raise ValueError(operation)


OPERATIONS = ("create", "query", "query_by_channel_id", "close", "refund", "refund_query")
GOOD: dict[str, Response] = {
    "create": signed(200, {"code_url": "weixin://wxpay/bizpayurl?pr=p4lpSuKzz"}),
    "query": signed(200, trade()),
    "query_by_channel_id": signed(200, trade()),
    "close": signed(204),
    "refund": signed(200, refund_answer()),
    "refund_query": signed(200, refund_answer()),
}


def after(operation: str, answer: Response, *, repeat: bool = False) -> Outcome:
    outcome, _ = converse(start(operation, repeat=repeat), answer)
    return outcome


# Requests


PATHS = {
    "create": ("POST", "/v3/pay/transactions/native"),
    "query": ("GET", f"/v3/pay/transactions/out-trade-no/{NUMBER}?mchid={MCHID}"),
    "query_by_channel_id": ("GET", f"/v3/pay/transactions/id/{TRANSACTION_ID}?mchid={MCHID}"),
    "close": ("POST", f"/v3/pay/transactions/out-trade-no/{NUMBER}/close"),
    "refund": ("POST", "/v3/refund/domestic/refunds"),
    "refund_query": ("GET", f"/v3/refund/domestic/refunds/{REFUND_NUMBER}"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_request_is_signed_over_what_is_sent(operation: str) -> None:
    _, [request] = converse(start(operation), GOOD[operation])

    pairs = wechat_crypto.parse_authorization(request.headers["Authorization"])
    text = wechat_crypto.request_text(
        request.method, request.path, pairs["timestamp"], pairs["nonce_str"], request.body
    )
    assert (request.method, request.path) == PATHS[operation]
    assert (pairs["mchid"], pairs["serial_no"], pairs["timestamp"]) == (MCHID, "40AB", str(int(NOW.timestamp())))
    assert wechat_crypto.verify(MERCHANT_KEY.public_key(), text, pairs["signature"])
    assert request.headers["Wechatpay-Serial"] == KEY_ID
    assert ("Content-Type" in request.headers) == bool(request.body)


def test_certificate_mode_leaves_the_choice_of_key_to_the_provider() -> None:
    channel = WeChatPay(account(public_key_id=None))

    _, [request] = converse(channel.query(NUMBER, nonces), GOOD["query"])

    assert "Wechatpay-Serial" not in request.headers


BODIES: dict[Method, dict[str, Any]] = {
    Method.NATIVE: {},
    Method.APP: {},
    Method.JSAPI: {"payer": {"openid": OPENID}},
    Method.H5: {"scene_info": {"payer_client_ip": "203.0.113.7", "h5_info": {"type": "Wap"}}},
}


@pytest.mark.parametrize("method", Method)
def test_the_body_of_an_order(method: Method) -> None:
    command = charge(method=method, openid=OPENID, payer_ip="203.0.113.7")

    request = next(CHANNEL.charge(command, nonces))

    assert request.path == f"/v3/pay/transactions/{method.value}"
    assert json.loads(request.body) == {
        "appid": APPID,
        "mchid": MCHID,
        "description": "两杯咖啡",
        "out_trade_no": NUMBER,
        "time_expire": "2026-08-01T20:15:00+08:00",
        "attach": "pay_1",
        "notify_url": "https://shop.example/v1/callbacks/wechat/mch_1",
        "amount": {"total": 100, "currency": "CNY"},
        **BODIES[method],
    }


def test_the_body_of_a_refund() -> None:
    request = next(CHANNEL.refund(refund(), nonces))

    assert json.loads(request.body) == {
        "out_trade_no": NUMBER,
        "out_refund_no": REFUND_NUMBER,
        "reason": "cold coffee",
        "notify_url": "https://shop.example/v1/callbacks/wechat/mch_1",
        "amount": {"refund": 30, "total": 100, "currency": "CNY"},
    }


@pytest.mark.parametrize("operation", ["create", "refund"])
def test_a_repeat_sends_the_identical_bytes(operation: str) -> None:
    first, again = next(start(operation)), next(start(operation, repeat=True))

    assert first.body == again.body


@pytest.mark.parametrize(
    "changes",
    [
        {"number": "short"},
        {"number": "20260801120000abcde_01"},
        {"amount": 0},
        {"amount": -1},
        {"amount": True},
        {"amount": 1.0},
        {"amount": 1 << 53},
        {"currency": "USD"},
        {"description": ""},
        {"expires_at": datetime(2026, 8, 1)},
        {"attach": "x" * 129},
        {"method": Method.JSAPI},
        {"method": Method.H5},
        {"notify_url": "https://shop.example/?a=b"},
        {"notify_url": "ftp://shop.example/"},
    ],
)
def test_an_impossible_order_fails_before_it_is_sent(changes: dict[str, Any]) -> None:
    outcome, asked = converse(CHANNEL.charge(charge(**changes), nonces))
    again, _ = converse(CHANNEL.charge(charge(**changes, repeat=True), nonces))

    assert isinstance(outcome, Failed)
    assert outcome.code == "request.invalid"
    assert asked == []
    assert isinstance(again, Unknown), "an earlier sending may have been possible"


@pytest.mark.parametrize(
    "changes",
    [
        {"number": "short"},
        {"charge_number": "short"},
        {"amount": 0},
        {"amount": 101},
        {"amount": True},
        {"charge_amount": 100.0},
        {"currency": "USD"},
        {"notify_url": "nowhere"},
    ],
)
def test_an_impossible_refund_fails_before_it_is_sent(changes: dict[str, Any]) -> None:
    outcome, asked = converse(CHANNEL.refund(refund(**changes), nonces))

    assert isinstance(outcome, Failed)
    assert asked == []


# What the payer needs


def test_a_native_order_gives_a_code_to_scan() -> None:
    outcome = after("create", GOOD["create"])

    assert isinstance(outcome, Pending)
    assert outcome.evidence.authentic
    assert outcome.next_action is not None
    assert outcome.next_action.type is ActionType.QR_CODE
    assert outcome.next_action.data == {"code_url": "weixin://wxpay/bizpayurl?pr=p4lpSuKzz"}


def test_an_h5_order_gives_a_page_that_leads_back() -> None:
    command = charge(method=Method.H5, payer_ip="203.0.113.7", return_url="https://shop.example/thanks?a=b")

    outcome, _ = converse(CHANNEL.charge(command, nonces), signed(200, {"h5_url": "https://wx.tenpay.com/x?id=1"}))

    assert isinstance(outcome, Pending)
    assert outcome.next_action is not None
    assert outcome.next_action.type is ActionType.REDIRECT
    assert outcome.next_action.data == {
        "url": "https://wx.tenpay.com/x?id=1&redirect_url=https%3A%2F%2Fshop.example%2Fthanks%3Fa%3Db"
    }


@pytest.mark.parametrize(
    ("method", "kind", "signature_name"),
    [(Method.JSAPI, ClientKind.JSAPI, "paySign"), (Method.APP, ClientKind.APP, "sign")],
)
def test_a_client_gets_signed_parameters(method: Method, kind: ClientKind, signature_name: str) -> None:
    command = charge(method=method, openid=OPENID)

    outcome, _ = converse(CHANNEL.charge(command, nonces), signed(200, {"prepay_id": "wx2612"}))

    assert isinstance(outcome, Pending)
    assert outcome.next_action is not None
    params = dict(outcome.next_action.data["params"])
    timestamp = str(int(NOW.timestamp()))
    text = wechat_crypto.pay_text(kind, appid=APPID, timestamp=timestamp, nonce="n" * 32, prepay_id="wx2612")
    assert wechat_crypto.verify(MERCHANT_KEY.public_key(), text, params.pop(signature_name))
    assert params == (
        {
            "appId": APPID,
            "timeStamp": timestamp,
            "nonceStr": "n" * 32,
            "package": "prepay_id=wx2612",
            "signType": "RSA",
        }
        if method is Method.JSAPI
        else {
            "appid": APPID,
            "partnerid": MCHID,
            "prepayid": "wx2612",
            "package": "Sign=WXPay",
            "noncestr": "n" * 32,
            "timestamp": timestamp,
        }
    )


@pytest.mark.parametrize("body", [{}, {"code_url": ""}, {"code_url": 1}, {"prepay_id": "x"}, [], b"", b"<html>"])
def test_an_order_without_what_the_payer_needs_is_in_doubt(body: Any) -> None:
    assert isinstance(after("create", signed(200, body)), Unknown)


# States


@pytest.mark.parametrize("operation", ["query", "query_by_channel_id"])
@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("SUCCESS", Succeeded),
        ("REFUND", Succeeded),
        ("NOTPAY", Pending),
        ("USERPAYING", Pending),
        ("ACCEPT", Pending),
        ("CLOSED", Closed),
        ("REVOKED", Closed),
        ("PAYERROR", Failed),
        ("SOMETHING_NEW", Unknown),
        ("", Unknown),
        ("success", Unknown),
    ],
)
def test_states_of_an_order(operation: str, state: str, kind: type[Outcome]) -> None:
    outcome = after(operation, signed(200, trade(trade_state=state)))

    assert type(outcome) is kind
    assert outcome.evidence.authentic
    assert outcome.evidence.code == state


def test_an_unpaid_order_needs_no_more_than_its_state() -> None:
    answer = trade(trade_state="NOTPAY", transaction_id=None, success_time=None, amount=None, payer=None, trade_type="")

    assert type(after("query", signed(200, answer))) is Pending


def test_a_paid_order_says_how_much_when_and_who() -> None:
    outcome = after("query", GOOD["query"])

    assert isinstance(outcome, Succeeded)
    assert (outcome.amount, outcome.currency, outcome.channel_id) == (100, "CNY", TRANSACTION_ID)
    assert outcome.at == datetime(2026, 8, 1, 12, 1, 2, tzinfo=UTC)
    assert outcome.payer == OPENID
    assert OPENID not in repr(outcome.evidence)


@pytest.mark.parametrize(
    "changes",
    [
        {"amount": None},
        {"amount": {"total": 100}},
        {"amount": {"currency": "CNY"}},
        {"amount": {"total": 100.0, "currency": "CNY"}},
        {"amount": {"total": 1e2, "currency": "CNY"}},
        {"amount": {"total": True, "currency": "CNY"}},
        {"amount": {"total": "100", "currency": "CNY"}},
        {"amount": {"total": 0, "currency": "CNY"}},
        {"amount": {"total": -100, "currency": "CNY"}},
        {"amount": {"total": 1 << 53, "currency": "CNY"}},
        {"amount": {"total": 10**30, "currency": "CNY"}},
        {"amount": {"total": 100, "currency": ""}},
        {"amount": [100]},
        {"transaction_id": None},
        {"transaction_id": 1},
        {"success_time": None},
        {"success_time": "yesterday"},
        {"success_time": "2026-08-01T20:01:02"},
        {"mchid": "1900000000"},
        {"appid": "wx0"},
        {"out_trade_no": "20260801120000abcdef99"},
        {"trade_state": None},
        {"trade_state": 1},
    ],
)
def test_success_that_is_not_fully_readable_is_in_doubt(changes: dict[str, Any]) -> None:
    assert type(after("query", signed(200, trade(**changes)))) is Unknown


def test_a_query_by_their_number_takes_no_other_order() -> None:
    assert type(after("query_by_channel_id", signed(200, trade(transaction_id="4200")))) is Unknown


@pytest.mark.parametrize("operation", ["refund", "refund_query"])
@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("SUCCESS", Succeeded),
        ("PROCESSING", Pending),
        ("CLOSED", Failed),
        ("ABNORMAL", Abnormal),
        ("SOMETHING_NEW", Unknown),
    ],
)
def test_states_of_a_refund(operation: str, state: str, kind: type[Outcome]) -> None:
    outcome = after(operation, signed(200, refund_answer(status=state)))

    assert type(outcome) is kind
    assert outcome.evidence.authentic


def test_a_refund_says_how_much() -> None:
    outcome = after("refund_query", GOOD["refund_query"])

    assert isinstance(outcome, Succeeded)
    assert (outcome.amount, outcome.currency) == (30, "CNY")
    assert outcome.channel_id == "50000000382019052709732678859"
    assert outcome.payer is None


@pytest.mark.parametrize(
    "changes",
    [
        {"out_refund_no": "20260801130000abcdef99"},
        {"amount": None},
        {"amount": {"refund": 30.0, "total": 100}},
        {"amount": {"refund": True, "total": 100}},
        {"refund_id": ""},
        {"status": None},
    ],
)
@pytest.mark.parametrize("operation", ["refund", "refund_query"])
def test_a_refund_that_is_not_fully_readable_is_in_doubt(operation: str, changes: dict[str, Any]) -> None:
    assert type(after(operation, signed(200, refund_answer(**changes)))) is Unknown


def test_a_refund_of_another_order_is_in_doubt() -> None:
    assert type(after("refund", signed(200, refund_answer(out_trade_no="20260801120000abcdef99")))) is Unknown


def test_closing_is_believed_only_when_the_answer_is_empty() -> None:
    assert type(after("close", GOOD["close"])) is Closed
    assert type(after("close", unsigned(204))) is Unknown
    assert type(after("close", GOOD["query"])) is Unknown


# Errors


QUERY_FIRST, OPERATOR = (Unknown, Advice.QUERY), (Unknown, Advice.OPERATOR)
Meaning = tuple[type[Outcome], Advice | None]
FAILED, NOT_SENT, PENDING, CLOSED, NOT_FOUND = (
    (Failed, None), (NotSent, None), (Pending, None), (Closed, None), (NotFound, None),
)  # fmt: skip

# Status, code, then what it means to a first create, a query, a close, a first refund, a refund query; signed.
ERRORS: list[tuple[int, str, Meaning, Meaning, Meaning, Meaning, Meaning]] = [
    (202, "USER_PAYING", PENDING, PENDING, PENDING, QUERY_FIRST, QUERY_FIRST),
    (400, "USERPAYING", PENDING, PENDING, PENDING, QUERY_FIRST, QUERY_FIRST),
    (400, "PARAM_ERROR", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (400, "INVALID_REQUEST", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (400, "APPID_MCHID_NOT_MATCH", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (400, "MCH_NOT_EXISTS", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (404, "MCH_NOT_EXISTS", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (400, "ORDER_CLOSED", CLOSED, CLOSED, CLOSED, QUERY_FIRST, QUERY_FIRST),
    (403, "OUT_TRADE_NO_USED", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (400, "ORDER_PAID", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (403, "ORDERPAID", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (401, "SIGN_ERROR", OPERATOR, OPERATOR, OPERATOR, OPERATOR, OPERATOR),
    (403, "NO_AUTH", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (403, "RULE_LIMIT", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (403, "RULELIMIT", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (403, "ACCOUNT_ERROR", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (403, "USER_ACCOUNT_ABNORMAL", FAILED, OPERATOR, OPERATOR, FAILED, OPERATOR),
    (403, "NOT_ENOUGH", NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT),
    (404, "ORDER_NOT_EXIST", QUERY_FIRST, NOT_FOUND, NOT_FOUND, QUERY_FIRST, NOT_FOUND),
    (404, "ORDERNOTEXIST", QUERY_FIRST, NOT_FOUND, NOT_FOUND, QUERY_FIRST, NOT_FOUND),
    (404, "RESOURCE_NOT_EXISTS", QUERY_FIRST, NOT_FOUND, NOT_FOUND, QUERY_FIRST, NOT_FOUND),
    (429, "FREQUENCY_LIMITED", NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT),
    (403, "FREQUENCY_LIMITED", NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT, NOT_SENT),
    (429, "SYSTEM_ERROR", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (500, "SYSTEM_ERROR", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (400, "SYSTEMERROR", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (502, "BANK_ERROR", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (400, "NOBODY_KNOWS_THIS", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    # A failing server's words are not believed, whatever the code.
    (500, "PARAM_ERROR", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (503, "FREQUENCY_LIMITED", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (500, "ORDER_NOT_EXIST", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
    (302, "PARAM_ERROR", QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST, QUERY_FIRST),
]
ROWS = [
    (row[0], row[1], operation, meaning)
    for row in ERRORS
    for operation, meaning in zip(("create", "query", "close", "refund", "refund_query"), row[2:], strict=True)
]


def meaning_of(outcome: Outcome) -> Meaning:
    return type(outcome), outcome.advice if isinstance(outcome, Unknown) else None


@pytest.mark.parametrize(("status", "code", "operation", "meaning"), ROWS)
def test_each_error(status: int, code: str, operation: str, meaning: Meaning) -> None:
    outcome = after(operation, signed(status, {"code": code, "message": "原因"}))

    assert meaning_of(outcome) == meaning
    assert outcome.evidence.code == code
    assert outcome.evidence.status == status


@pytest.mark.parametrize(("status", "code", "operation", "meaning"), ROWS)
def test_an_unsigned_error_proves_only_that_a_first_order_was_refused(
    status: int, code: str, operation: str, meaning: Meaning
) -> None:
    outcome = after(operation, unsigned(status, {"code": code, "message": "原因"}))

    if meaning == NOT_SENT or (meaning == FAILED and operation == "create"):
        assert meaning_of(outcome) == meaning
    else:
        assert type(outcome) is Unknown
    assert not outcome.evidence.authentic


@pytest.mark.parametrize(("status", "code", "operation", "meaning"), ROWS)
def test_no_refusal_of_a_repeat_is_a_failure(status: int, code: str, operation: str, meaning: Meaning) -> None:
    """The first sending may have been taken, and its answer lost."""
    if operation in ("create", "refund"):
        outcome = after(operation, signed(status, {"code": code, "message": "原因"}), repeat=True)

        assert not isinstance(outcome, Failed)


STATUSES = (200, 201, 202, 204, 206, 301, 307, 400, 401, 403, 404, 408, 409, 418, 500, 502, 503)
UNREADABLE = (b"", b"<html>", b"{", b"[]", b'{"code":1}', b"\xff\xfe", b"[" * 5_000)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_neither_signed_nor_readable_is_in_doubt(operation: str) -> None:
    outcomes = {
        (status, body): type(after(operation, unsigned(status, body))) for status in STATUSES for body in UNREADABLE
    }

    assert {case: kind for case, kind in outcomes.items() if kind is not Unknown} == {}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_bare_429_was_not_taken(operation: str) -> None:
    assert type(after(operation, unsigned(429, b"slow down"))) is NotSent


def test_a_message_for_people_shows_nobody() -> None:
    outcome = after("create", signed(400, {"code": "PARAM_ERROR", "message": f"openid {OPENID} 无效" + "长" * 500}))

    assert isinstance(outcome, Failed)
    assert OPENID not in repr(outcome)
    assert "openid … 无效" in outcome.reason
    assert len(outcome.reason) < 300


def test_an_answer_with_a_nul_is_in_doubt_because_no_row_could_keep_it() -> None:
    assert type(after("create", signed(200, {"code_url": "weixin://wxpay/\0"}))) is Unknown


# Signatures of answers


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "fault",
    [
        "unsigned",
        "other key",
        "other body",
        "too old",
        "too new",
        "no serial",
        "other type",
        "probe",
        "bad time",
        "bad nonce",
    ],
)
def test_an_answer_that_cannot_be_verified_is_in_doubt(operation: str, fault: str) -> None:
    good = GOOD[operation]
    outcome = after(operation, _spoilt(good, fault))

    assert type(outcome) is Unknown
    assert not outcome.evidence.authentic
    assert outcome.advice is Advice.QUERY


def _spoilt(good: Response, fault: str) -> Response:
    headers = dict(good.headers)
    match fault:
        case "unsigned":
            return replace(good, headers={})
        case "other key":
            return signed(good.status, good.body, key=NEXT_PLATFORM)
        case "other body":
            return replace(good, body=good.body + b" ")
        case "too old":
            return signed(good.status, good.body, at=NOW - timedelta(seconds=301))
        case "too new":
            return signed(good.status, good.body, at=NOW + timedelta(seconds=301))
        case "no serial":
            del headers["wechatpay-serial"]
        case "other type":
            headers["wechatpay-signature-type"] = "WECHATPAY2-SM2-WITH-SM3"
        case "probe":
            headers["wechatpay-signature"] = "WECHATPAY/SIGNTEST/" + headers["wechatpay-signature"]
        case "bad time":
            headers["wechatpay-timestamp"] += "\n"
        case "bad nonce":
            headers["wechatpay-nonce"] = "\udcff"
    return replace(good, headers=headers)


@pytest.mark.parametrize("seconds", [-300, 300])
def test_an_answer_may_be_a_little_off_our_clock(seconds: int) -> None:
    assert type(after("query", signed(200, trade(), at=NOW + timedelta(seconds=seconds)))) is Succeeded


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_key_is_a_doubt_that_says_so(operation: str) -> None:
    good = GOOD[operation]

    outcome = after(operation, signed(good.status, good.body, key=NEXT_PLATFORM, serial="AB12"))

    assert meaning_of(outcome) == (Unknown, Advice.REFRESH_KEYS)


def test_a_not_found_by_an_unknown_key_says_so_too() -> None:
    answer = signed(404, {"code": "ORDER_NOT_EXIST"}, key=NEXT_PLATFORM, serial="AB12")

    assert meaning_of(after("query", answer)) == (Unknown, Advice.REFRESH_KEYS)


@pytest.mark.parametrize(
    ("since", "until", "kind"),
    [(-1, 1, Succeeded), (-2, -1, Unknown), (1, 2, Unknown)],
)
def test_a_certificate_counts_only_while_it_is_valid(since: int, until: int, kind: type[Outcome]) -> None:
    key = PlatformKey("AB12", PLATFORM.public_key(), NOW + timedelta(days=since), NOW + timedelta(days=until))
    channel = WeChatPay(account(platform_keys={"AB12": key}, public_key_id=None))

    outcome, _ = converse(channel.query(NUMBER, nonces), signed(200, trade(), serial="ab12"))

    assert type(outcome) is kind


@given(
    operation=st.sampled_from(OPERATIONS),
    status=st.integers(100, 599),
    body=st.one_of(
        st.binary(max_size=64),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["code", "message", "trade_state", "amount", "total", "status", "mchid"]), inner
                ),
            ),
            max_leaves=8,
        ),
    ),
    is_signed=st.booleans(),
)
def test_no_answer_makes_it_raise_or_invent_money(operation: str, status: int, body: Any, is_signed: bool) -> None:
    answer = signed(status, body) if is_signed else unsigned(status, body)

    assert not isinstance(after(operation, answer), Succeeded)


# Keys


def _certificates(*keys: tuple[Any, int], apiv3_key: bytes = APIV3_KEY, **how: Any) -> Response:
    data = [
        {
            "serial_no": f"{serial:X}",
            "effective_time": "2026-07-31T20:00:00+08:00",
            "expire_time": "2031-07-30T20:00:00+08:00",
            "encrypt_certificate": encrypted(
                certificate_pem(key, serial=serial).encode(), "certificate", key=apiv3_key
            ),
        }
        for key, serial in keys
    ]
    return signed(200, {"data": data}, **how)


def test_the_first_certificates_are_trusted_because_only_we_can_open_them() -> None:
    channel = WeChatPay(account(platform_keys={}, public_key_id=None))

    fresh, [request] = converse(channel.fetch_keys(nonces), _certificates((PLATFORM, 0xAB12), serial="AB12"))

    assert request.path == "/v3/certificates"
    assert isinstance(fresh, FreshKeys)
    assert fresh.serials == ("AB12",)
    outcome, _ = converse(fresh.channel.query(NUMBER, nonces), signed(200, trade(), serial="AB12"))
    assert type(outcome) is Succeeded


def test_old_and_new_certificates_count_while_the_provider_changes_over() -> None:
    old = WeChatPay(account(platform_keys={}, public_key_id=None))
    both, _ = converse(
        old.fetch_keys(nonces), _certificates((PLATFORM, 0xAB12), (NEXT_PLATFORM, 0xAB13), serial="AB12")
    )
    assert isinstance(both, FreshKeys)
    assert isinstance(both.channel, WeChatPay)

    for key, serial in ((PLATFORM, "AB12"), (NEXT_PLATFORM, "AB13")):
        outcome, _ = converse(both.channel.query(NUMBER, nonces), signed(200, trade(), key=key, serial=serial))
        assert type(outcome) is Succeeded

    last, _ = converse(
        both.channel.fetch_keys(nonces), _certificates((NEXT_PLATFORM, 0xAB13), key=NEXT_PLATFORM, serial="AB13")
    )
    assert isinstance(last, FreshKeys)
    outcome, _ = converse(last.channel.query(NUMBER, nonces), signed(200, trade(), serial="AB12"))
    assert meaning_of(outcome) == (Unknown, Advice.REFRESH_KEYS)


def test_bare_keys_stay_when_certificates_come() -> None:
    fresh, _ = converse(CHANNEL.fetch_keys(nonces), _certificates((NEXT_PLATFORM, 0xAB13)))

    assert isinstance(fresh, FreshKeys)
    assert set(fresh.serials) == {KEY_ID, "AB13"}


def test_an_empty_list_changes_nothing() -> None:
    fresh, _ = converse(CHANNEL.fetch_keys(nonces), _certificates())

    assert isinstance(fresh, FreshKeys)
    assert fresh.serials == (KEY_ID,)


def test_two_bare_keys_count_side_by_side() -> None:
    keys = {
        KEY_ID: PlatformKey(KEY_ID, PLATFORM.public_key()),
        "PUB_KEY_ID_2": PlatformKey("PUB_KEY_ID_2", NEXT_PLATFORM.public_key()),
    }
    channel = WeChatPay(account(platform_keys=keys))

    for key, serial in ((PLATFORM, KEY_ID), (NEXT_PLATFORM, "PUB_KEY_ID_2")):
        outcome, _ = converse(channel.query(NUMBER, nonces), signed(200, trade(), key=key, serial=serial))
        assert type(outcome) is Succeeded


@pytest.mark.parametrize(
    "answer",
    [
        _certificates((PLATFORM, 0xAB12), serial="AB12", apiv3_key=b"x" * 32),
        _certificates((NEXT_PLATFORM, 0xAB12), serial="AB12"),
        _certificates((PLATFORM, 0xAB12), serial="AB13"),
        _certificates((PLATFORM, 0xAB12), serial="AB12", at=NOW - timedelta(hours=1)),
        unsigned(200, {"data": []}),
        signed(200, {"data": [{"serial_no": "AB12"}]}),
        signed(200, {"data": [{"serial_no": "AB12", "encrypt_certificate": encrypted(b"not a certificate")}]}),
        signed(200, b"nothing"),
        signed(204),
        unsigned(401, {"code": "SIGN_ERROR"}),
        unsigned(404, {"code": "RESOURCE_NOT_EXISTS"}),
        unsigned(500, b""),
    ],
)
def test_keys_that_prove_nothing_are_not_taken(answer: Response) -> None:
    channel = WeChatPay(account(platform_keys={}, public_key_id=None))

    outcome, _ = converse(channel.fetch_keys(nonces), answer)

    assert type(outcome) is Unknown


def test_a_list_that_swaps_serials_is_not_taken() -> None:
    good = json.loads(_certificates((PLATFORM, 0xAB12)).body)
    good["data"][0]["serial_no"] = KEY_ID

    outcome, _ = converse(CHANNEL.fetch_keys(nonces), signed(200, good))

    assert type(outcome) is Unknown


def test_it_has_every_capability_and_shows_no_secret() -> None:
    assert isinstance(CHANNEL, Charges)
    assert isinstance(CHANNEL, Refunds)
    assert isinstance(CHANNEL, Callbacks)
    assert isinstance(CHANNEL, KeyRefresh)
    assert APIV3_KEY.decode() not in repr(CHANNEL.account)
    assert "RSA" not in repr(CHANNEL.account)


def test_an_answer_in_another_conversation_is_not_mixed_up() -> None:
    """Two conversations of one channel share nothing but the account."""

    def answer(request: Request) -> Response:
        return signed(200, trade(out_trade_no=request.path.split("/")[-1].split("?")[0]))

    for number in (NUMBER, REFUND_NUMBER):
        outcome, _ = converse(CHANNEL.query(number, nonces), answer)
        assert type(outcome) is Succeeded
