"""Requests that are wrong: a problem document that names the field, whatever it is."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.api.support import House, Shop

WALLET = "wal_" + "0" * 32
GOOD: dict[str, Any] = {
    "order_id": "o-1", "amount": 100, "currency": "CNY", "channel": "wallet", "payer": {"wallet": WALLET},
}  # fmt: skip
REMOVED = object()

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"amount": 0}, "amount"),
    ({"amount": -1}, "amount"),
    ({"amount": 1.5}, "amount"),
    ({"amount": 1.0}, "amount"),
    ({"amount": "100"}, "amount"),
    ({"amount": True}, "amount"),
    ({"amount": None}, "amount"),
    ({"amount": [100]}, "amount"),
    ({"amount": 9007199254740992}, "amount"),
    ({"amount": 2**63}, "amount"),
    ({"amount": 10**400}, "amount"),
    ({"amount": REMOVED}, "amount"),
    ({"currency": "cny"}, "currency"),
    ({"currency": "XXX"}, "currency"),
    ({"currency": "CNYY"}, "currency"),
    ({"currency": ""}, "currency"),
    ({"currency": 156}, "currency"),
    ({"currency": REMOVED}, "currency"),
    ({"order_id": ""}, "order_id"),
    ({"order_id": "x" * 65}, "order_id"),
    ({"order_id": 1}, "order_id"),
    ({"order_id": "a\x00b"}, "order_id"),
    ({"order_id": REMOVED}, "order_id"),
    ({"channel": "carrier_pigeon"}, "channel"),
    ({"channel": ""}, "channel"),
    ({"channel": REMOVED}, "channel"),
    ({"method": "native"}, "method"),
    ({"channel": "wechat", "payer": None}, "method"),
    ({"channel": "wechat", "payer": None, "method": "telepathy"}, "method"),
    ({"channel": "wechat", "payer": None, "method": "jsapi"}, "payer.openid"),
    ({"channel": "wechat", "payer": None, "method": "h5"}, "payer.ip"),
    ({"channel": "wechat", "payer": None, "method": "native", "currency": "USD"}, "currency"),
    ({"channel": "wechat", "method": "native"}, "payer.wallet"),
    ({"payer": None}, "payer.wallet"),
    ({"payer": {"wallet": "pay_" + "0" * 32}}, "payer.wallet"),
    ({"payer": {"wallet": WALLET, "colour": "red"}}, "payer.colour"),
    ({"payer": []}, "payer"),
    ({"description": "x" * 128}, "description"),
    ({"description": None}, "description"),
    ({"expires_in_s": 59}, "expires_in_s"),
    ({"expires_in_s": 10**9}, "expires_in_s"),
    ({"return_url": "javascript:alert(1)"}, "return_url"),
    ({"metadata": {str(number): "x" for number in range(51)}}, "metadata"),
    ({"metadata": {"k": 1}}, "metadata[...]"),
    ({"metadata": {"k": "x" * 501}}, "metadata[...]"),
    ({"metadata": {"k" * 41: "x"}}, "metadata"),
    ({"metadata": {"": "x"}}, "metadata"),
    ({"metadata": {"k": {"k": {}}}}, "metadata[...]"),
    ({"colour": "red"}, "colour"),
    ({"Amount": 100}, "Amount"),
]


async def refuse(shop: Shop, raw: bytes, path: str = "/v1/payments", kind: str = "application/json") -> dict[str, Any]:
    """The problem that answers a body."""
    answer = await shop.http.post(path, content=raw, headers={"Content-Type": kind, "Idempotency-Key": "k"})
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["request-id"]
    return problem


async def test_each_wrong_field_is_named(shop: Shop) -> None:
    for change, field in WRONG:
        body = {name: value for name, value in (GOOD | change).items() if value is not REMOVED}

        problem = await refuse(shop, json.dumps(body).encode())

        assert (problem["status"], problem["code"]) == (400, "request.invalid"), change
        assert problem["outcome"] == "not_processed"
        assert [error["field"] for error in problem["errors"]] == [field], change
        assert problem["errors"][0]["message"]


RAW = [
    (b"", 400, ""),
    (b"{", 400, ""),
    (b"[]", 400, ""),
    (b"\xff", 400, ""),
    (b'{"amount":1,"amount":1}', 400, "order_id"),
    (json.dumps(GOOD)[:-1].encode() + b',"amount":1}', 400, "amount"),
    (json.dumps(GOOD)[:-1].encode() + b',"description":' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400, "description"),
    (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, 400, "x"),
]


@pytest.mark.parametrize(("raw", "status", "field"), RAW)
async def test_bytes_that_are_no_request_are_refused(shop: Shop, raw: bytes, status: int, field: str) -> None:
    problem = await refuse(shop, raw)

    assert problem["status"] == status
    assert problem["errors"][0]["field"] == field


async def test_a_body_that_is_too_large_is_refused(shop: Shop) -> None:
    problem = await refuse(shop, b" " * 70_000)

    assert (problem["status"], problem["code"]) == (413, "request.too_large")


async def test_another_media_type_is_refused(shop: Shop) -> None:
    problem = await refuse(shop, json.dumps(GOOD).encode(), kind="text/plain")

    assert (problem["status"], problem["code"]) == (415, "request.media_type")


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/payments?limit=0", "limit"),
        ("/v1/payments?limit=101", "limit"),
        ("/v1/payments?limit=x", "limit"),
        ("/v1/payments?cursor=x", "cursor"),
        ("/v1/payments?cursor=%00", "cursor"),
        ("/v1/payments?colour=red", "colour"),
        ("/v1/payments?state=PAID", "state"),
        ("/v1/payments?created_from=yesterday", "created_from"),
        ("/v1/payments?created_from=2026-01-01T00:00:00", "created_from"),
        ("/v1/payments?limit=1&limit=2", "limit"),
        ("/v1/refunds?payment=x", "payment"),
        ("/v1/events?type=%25", "type"),
        ("/v1/events?cursor=WzFd", "cursor"),
        ("/v1/balances/statement?currency=yuan", "currency"),
        ("/v1/balances/statement?currency=CNY&account=mine", "account"),
    ],
)
async def test_a_query_that_is_wrong_is_named(shop: Shop, path: str, field: str) -> None:
    answer = await shop.get(path) if "?" not in path else await shop.http.get(path)

    assert (answer.status_code, answer.json()["code"]) == (400, "request.invalid")
    assert answer.json()["errors"][0]["field"] == field


async def test_paths_and_methods_that_do_not_exist_are_refused(shop: Shop) -> None:
    nowhere = await shop.get("/v1/nowhere")
    wrong = await shop.http.put("/v1/payments", json={})

    assert (nowhere.status_code, nowhere.json()["code"]) == (404, "request.not_found")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "request.method_not_allowed")
    assert "POST" in wrong.headers["allow"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


async def test_whatever_is_sent_is_answered_and_never_with_a_fault_of_ours(house: House, shop: Shop) -> None:
    bodies: list[Any] = []

    @settings(max_examples=150, database=None, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({}, optional={name: values for name in (*GOOD, "metadata", "method", "description")}))
    def collect(change: dict[str, Any]) -> None:
        bodies.append(GOOD | change)

    collect()
    for path in ("/v1/payments", "/v1/topups", "/v1/wallets", "/v1/webhook_endpoints"):
        for number, body in enumerate(bodies):
            answer = await shop.post(path, body, key=f"{path}{number}")

            assert answer.status_code < 500, (path, body, answer.text)
            assert answer.status_code == 201 or answer.json()["code"], (path, body)
