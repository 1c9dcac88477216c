"""The objects of the interface, field by field and in order."""

import msgspec

from kassa.journal.change import Committed
from kassa.payments import render
from kassa.payments.draft import Operation
from unit.payments.house import QR, REFUSED, World, paid

PAYMENT_FIELDS = [
    "id", "object", "order_id", "amount", "currency", "state", "channel", "method", "next_action", "amount_refunded",
    "amount_refunding", "fee", "attempts", "description", "metadata", "created_at", "expires_at", "succeeded_at",
    "closed_at", "failure",
]  # fmt: skip


def test_a_payment_has_the_interface_s_fields_in_order() -> None:
    world = World()
    payment_id, attempt_id = world.waiting(metadata='{"table":"7"}', order_id="123456")

    shown = msgspec.json.decode(render.payment_json(world.payment(payment_id), [world.attempt(attempt_id)]))

    assert list(shown) == PAYMENT_FIELDS
    assert shown["id"] == f"pay_{payment_id}"
    assert shown["next_action"] == {"type": "qr_code", "code_url": "weixin://pay"}
    assert shown["metadata"] == {"table": "7"}
    assert shown["created_at"] == "2026-01-01T00:00:00Z"
    assert shown["attempts"] == [
        {
            "id": f"att_{attempt_id}", "state": "pending_payer", "channel": "wechat", "method": "native",
            "number": attempt_id, "channel_id": None, "failure": None,
        }
    ]  # fmt: skip


def test_a_payment_that_has_its_money_asks_nothing_of_the_payer() -> None:
    world = World()
    payment_id, attempt_id = world.waiting()
    world.says(payment_id, attempt_id, Operation.CALLBACK, paid())

    shown = world.event_data(payment_id, "payment.succeeded")

    assert (shown["next_action"], shown["fee"], shown["state"]) == (None, 1, "succeeded")
    assert shown["attempts"][0]["channel_id"] == "t-1"


def test_a_refusal_is_shown_with_its_code_and_reason() -> None:
    world = World()
    payment_id, attempt_id = world.create()
    world.says(payment_id, attempt_id, Operation.CREATE, REFUSED)

    shown = world.event_data(payment_id, "payment.attempt_failed")

    assert shown["failure"] == {"code": "PARAM_ERROR", "reason": "no"}
    assert shown["attempts"][0]["failure"] == {"code": "PARAM_ERROR", "reason": "no"}


def test_a_top_up_is_a_payment_that_names_its_wallet() -> None:
    world = World()
    wallet_id = world.wallet()
    topup_id, attempt_id = world.create("topup", wallet=wallet_id)
    world.says(topup_id, attempt_id, Operation.CREATE, QR)

    shown = msgspec.json.decode(render.payment_json(world.payment(topup_id), [world.attempt(attempt_id)]))

    assert [name for name in shown if name != "wallet"] == PAYMENT_FIELDS
    assert (shown["id"], shown["object"], shown["wallet"]) == (f"top_{topup_id}", "topup", f"wal_{wallet_id}")


def test_a_refund_has_the_interface_s_fields_in_order() -> None:
    world = World()
    payment_id = world.succeeded()
    refund_id = world.refund(payment_id, 30)

    shown = msgspec.json.decode(render.refund_json(world.refund_row(refund_id), world.payment(payment_id)))

    assert list(shown) == [
        "id", "object", "payment", "refund_id", "amount", "currency", "state", "reason", "number", "channel_id",
        "fee_returned", "failure", "metadata", "created_at", "succeeded_at",
    ]  # fmt: skip
    assert (shown["payment"], shown["number"]) == (f"pay_{payment_id}", refund_id)


def test_a_wallet_payment_s_answer_and_event_are_the_same_bytes() -> None:
    world = World()
    payment_id, verdict = world.pay_from_wallet(world.wallet(100), 100)

    assert isinstance(verdict, Committed)
    (event,) = [event for event in world.journal.events if event.root == payment_id]
    assert event.data is verdict.result
