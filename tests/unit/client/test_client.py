"""The client against a real server: what it sends, what it repeats, and what it raises."""

from datetime import UTC, datetime
from typing import Any

import pytest

from kassa.client import AsyncKassa, Kassa, Topup, problems
from kassa.client.generate import TARGET, generated
from kassa.errors import (
    AuthInvalid,
    Busy,
    IdempotencyKeyReused,
    KassaError,
    OutcomeUnknown,
    PaymentNotFound,
    PaymentOrderExists,
    RequestInvalid,
    ServerUnreachable,
    WalletInsufficientFunds,
)
from unit.client.server import HANG_UP, Answer, serving

PAYMENT: dict[str, Any] = {
    "id": "pay_1", "object": "payment", "order_id": "123456", "amount": 100, "currency": "CNY", "state": "processing",
    "channel": "wechat", "method": "native", "next_action": {"type": "qr_code", "code_url": "weixin://x"},
    "amount_refunded": 0, "amount_refunding": 0, "fee": 0,
    "attempts": [{"id": "att_1", "state": "pending_payer", "channel": "wechat", "method": "native", "number": "1",
                  "channel_id": None, "failure": None, "from_the_future": 1}],
    "description": "", "metadata": {"table": "7"}, "created_at": "2026-11-23T10:00:00Z",
    "expires_at": "2026-11-23T10:15:00Z", "succeeded_at": None, "closed_at": None, "failure": None,
    "from_the_future": {"a": [1]},
}  # fmt: skip
CREATE: dict[str, Any] = {"order_id": "123456", "amount": 100, "currency": "CNY", "channel": "wechat"}


def problem(status: int, code: str, outcome: str = "not_processed", **facts: Any) -> Answer:
    body = {"type": "x", "title": "t", "status": status, "code": code, "outcome": outcome, "detail": "said", **facts}
    return Answer(status, body, {"Content-Type": "application/problem+json"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses as in life, only shorter."""
    monkeypatch.setattr(problems, "PAUSE_FIRST_S", 0.002)


def test_the_twin_is_the_one_that_is_generated() -> None:
    assert TARGET.read_text(encoding="utf-8") == generated()


def test_a_payment_is_typed_and_new_fields_are_ignored() -> None:
    with serving(Answer(201, PAYMENT)) as server, Kassa("sk_1", server.url) as kassa:
        payment = kassa.payments.create(**CREATE, wallet="wal_1", metadata={"table": "7"})

    assert payment.next_action is not None
    assert payment.next_action.code_url == "weixin://x"
    assert payment.attempts[0].state == "pending_payer"
    assert payment.created_at == datetime(2026, 11, 23, 10, tzinfo=UTC)
    [asked] = server.asked
    assert (asked.method, asked.path) == ("POST", "/v1/payments")
    assert asked.headers["authorization"] == "Bearer sk_1"
    assert asked.body == {**CREATE, "metadata": {"table": "7"}, "payer": {"wallet": "wal_1"}}
    assert asked.headers["idempotency-key"]


@pytest.mark.parametrize(
    "trouble",
    [
        HANG_UP,
        problem(503, "system.busy"),
        problem(503, "system.unknown", "unknown"),
        problem(500, "system.error", "unknown"),
        problem(429, "system.too_many"),
        problem(409, "idempotency.in_progress", "unknown"),
        Answer(502, b"<html>bad gateway</html>"),
    ],
)
async def test_a_lost_or_late_answer_is_asked_for_again_with_the_same_key(trouble: Answer) -> None:
    with serving(trouble, trouble, Answer(201, PAYMENT)) as server:
        async with AsyncKassa("sk_1", server.url) as kassa:
            payment = await kassa.payments.create(**CREATE)

    assert payment.id == "pay_1"
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1
    assert server.asked[0].body == server.asked[2].body


async def test_each_call_has_a_key_of_its_own() -> None:
    with serving(Answer(201, PAYMENT)) as server:
        async with AsyncKassa("sk_1", server.url) as kassa:
            await kassa.payments.create(**CREATE)
            await kassa.payments.create(**CREATE)
            await kassa.payments.create(**CREATE, idempotency_key="mine")

    assert len(set(server.keys)) == 3
    assert server.keys[2] == "mine"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "request.invalid", RequestInvalid),
        (401, "auth.invalid", AuthInvalid),
        (402, "wallet.insufficient_funds", WalletInsufficientFunds),
        (404, "payment.not_found", PaymentNotFound),
        (409, "payment.order_exists", PaymentOrderExists),
        (422, "idempotency.key_reused", IdempotencyKeyReused),
    ],
)
async def test_a_refusal_is_raised_by_its_class_and_not_repeated(
    status: int, code: str, kind: type[KassaError]
) -> None:
    with serving(problem(status, code, payment="pay_9", request_id="req_1")) as server:
        async with AsyncKassa("sk_1", server.url) as kassa:
            with pytest.raises(kind) as raised:
                await kassa.payments.create(**CREATE)

    assert len(server.asked) == 1
    assert raised.value.detail == "said"
    assert raised.value.facts["payment"] == "pay_9"
    assert raised.value.facts["request_id"] == "req_1"
    assert raised.value.facts["outcome"] == "not_processed"


def test_a_code_that_this_client_does_not_know_is_a_plain_error_with_its_facts() -> None:
    with (
        serving(problem(418, "teapot.short", spout="missing")) as server,
        Kassa("sk_1", server.url) as kassa,
        pytest.raises(KassaError) as raised,
    ):
        kassa.payments.get("pay_1")

    assert type(raised.value) is KassaError
    assert raised.value.facts == {"code": "teapot.short", "status": 418, "outcome": "not_processed", "spout": "missing"}


def test_an_answer_that_stays_away_is_unknown_and_names_the_key() -> None:
    with (
        serving(HANG_UP) as server,
        Kassa("sk_1", server.url, tries_max=3) as kassa,
        pytest.raises(OutcomeUnknown) as raised,
    ):
        kassa.payments.create(**CREATE)

    assert len(server.asked) == 3
    assert raised.value.facts["idempotency_key"] == server.keys[0]


def test_busy_to_the_end_is_busy() -> None:
    with (
        serving(problem(503, "system.busy", retry_after_s=1)) as server,
        Kassa("sk_1", server.url, tries_max=2) as kassa,
        pytest.raises(Busy),
    ):
        kassa.payments.create(**CREATE)

    assert len(server.asked) == 2


def test_a_server_that_is_not_there_took_nothing() -> None:
    with serving(Answer(200, {})) as server:
        url = server.url

    with Kassa("sk_1", url, tries_max=2) as kassa, pytest.raises(ServerUnreachable) as raised:
        kassa.payments.create(**CREATE)

    assert raised.value.outcome == "not_processed"


def test_busy_after_a_lost_answer_is_unknown() -> None:
    """The server refused the second try, but the first one may have been processed."""
    with (
        serving(HANG_UP, problem(503, "system.busy")) as server,
        Kassa("sk_1", server.url, tries_max=2) as kassa,
        pytest.raises(OutcomeUnknown) as raised,
    ):
        kassa.payments.create(**CREATE)

    assert raised.value.facts["idempotency_key"] == server.keys[0]


def test_an_answer_that_cannot_be_read_is_unknown() -> None:
    with (
        serving(Answer(200, b"<html>welcome to the hotel</html>")) as server,
        Kassa("sk_1", server.url) as kassa,
        pytest.raises(OutcomeUnknown) as raised,
    ):
        kassa.payments.create(**CREATE)

    assert raised.value.facts["idempotency_key"] == server.keys[0]


def test_lists_go_on_to_the_last_page() -> None:
    first = {"data": [{**PAYMENT, "id": "pay_3"}, {**PAYMENT, "id": "pay_2"}], "next_cursor": "c/1"}
    last = {"data": [PAYMENT], "next_cursor": None}
    with serving(Answer(200, first), Answer(200, last)) as server, Kassa("sk_1", server.url) as kassa:
        ids = [payment.id for payment in kassa.payments.list(created_from=datetime(2026, 1, 1, tzinfo=UTC), limit=2)]

    assert ids == ["pay_3", "pay_2", "pay_1"]
    assert server.asked[0].path == "/v1/payments?created_from=2026-01-01T00%3A00%3A00%2B00%3A00&limit=2"
    assert server.asked[1].path.endswith("&cursor=c%2F1")


async def test_lists_go_on_to_the_last_page_with_await_too() -> None:
    page = {"data": [PAYMENT], "next_cursor": "c"}
    with serving(Answer(200, page), Answer(200, {**page, "next_cursor": None})) as server:
        async with AsyncKassa("sk_1", server.url) as kassa:
            found = [payment.id async for payment in kassa.payments.list()]

    assert found == ["pay_1", "pay_1"]


def test_a_payment_is_found_by_its_order() -> None:
    answers = (Answer(200, {"data": [PAYMENT], "next_cursor": None}), Answer(200, {"data": [], "next_cursor": None}))
    with serving(*answers) as server, Kassa("sk_1", server.url) as kassa:
        assert kassa.payments.find("123456").id == "pay_1"
        with pytest.raises(PaymentNotFound):
            kassa.payments.find("nobody's")

    assert server.asked[0].path == "/v1/payments?order_id=123456"


def test_a_strange_name_does_not_reach_another_route() -> None:
    with (
        serving(problem(404, "payment.not_found")) as server,
        Kassa("sk_1", server.url) as kassa,
        pytest.raises(PaymentNotFound),
    ):
        kassa.payments.get("../balances?x=1")

    assert server.asked[0].path == "/v1/payments/..%2Fbalances%3Fx%3D1"


def test_an_event_gives_the_object_as_it_was() -> None:
    topup = {**PAYMENT, "id": "top_1", "object": "topup", "wallet": "wal_1"}
    event = {
        "id": "evt_1", "type": "topup.succeeded", "root": "top_1", "sequence": 2,
        "timestamp": "2026-11-23T10:00:00Z", "data": topup,
    }  # fmt: skip
    with serving(Answer(200, {"data": [event], "next_cursor": None})) as server, Kassa("sk_1", server.url) as kassa:
        [found] = kassa.events.list()

    assert isinstance(found.object, Topup)
    assert found.object.wallet == "wal_1"


def test_pauses_grow_to_a_bound_and_honour_the_server() -> None:
    assert problems.pause_s(1, None, 0) < problems.pause_s(3, None, 0) < problems.pause_s(9, None, 0)
    assert problems.pause_s(50, None, 1) == problems.PAUSE_MAX_S
    assert problems.pause_s(1, "2", 0) > 2
    assert problems.pause_s(1, "86400", 1) < problems.RETRY_AFTER_MAX_S + 1
