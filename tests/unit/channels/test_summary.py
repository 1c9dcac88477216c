"""What a timeline shows of a message: nothing that names a person, opens a door or lets somebody pay."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.channels.summary import SHOWN, TEXT_MAX, show_path, summarise
from unit.channels.provider import (
    CHANNEL,
    NUMBER,
    OPENID,
    charge,
    nonces,
    notification,
    refund,
    refund_answer,
    to_bytes,
    trade,
)


def test_an_order_is_shown_without_its_payer() -> None:
    shown = json.loads(summarise(to_bytes(trade())))

    assert shown["out_trade_no"] == NUMBER
    assert shown["trade_state"] == "SUCCESS"
    assert shown["amount"]["total"] == 100
    assert shown["payer"] == "…"


@pytest.mark.parametrize(
    "body",
    [
        to_bytes(trade()),
        to_bytes(refund_answer()),
        to_bytes({"prepay_id": "SECRET", "code_url": "weixin://SECRET", "h5_url": "https://SECRET"}),
        to_bytes({"code": "PARAM_ERROR", "message": f"{OPENID} SECRET", "detail": {"value": "SECRET"}}),
        notification("TRANSACTION.SUCCESS", {"SECRET": 1}),
        next(
            CHANNEL.charge(charge(description="for Zhang SECRET", openid=OPENID, payer_ip="203.0.113.7"), nonces)
        ).body,
        next(CHANNEL.refund(refund(reason="SECRET"), nonces)).body,
        b'"SECRET"',
        b"SECRET",
        b'{"a":' * 2_000 + b'"SECRET"' + b"}" * 2_000,
    ],
)
def test_secrets_and_persons_are_never_shown(body: bytes) -> None:
    shown = summarise(body)

    for word in ("SECRET", OPENID, "203.0.113.7", "招商", 'ciphertext":"A'):
        assert word not in shown


def test_nothing_that_lets_somebody_in_is_on_the_list() -> None:
    doors = {"openid", "payer", "sign", "paySign", "prepay_id", "code_url", "h5_url", "ciphertext", "message"}

    assert not SHOWN & doors
    assert not SHOWN & {"description", "reason", "user_received_account", "payer_client_ip", "key", "token"}


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v3/certificates", "/v3/certificates"),
        (f"/v3/pay/x/{NUMBER}?mchid=19", f"/v3/pay/x/{NUMBER}?mchid=19"),
        ("/gateway?mchid=19&sign=abc&openid=o", "/gateway?mchid=19&sign=…&openid=…"),
    ],
)
def test_of_a_query_only_harmless_values_are_shown(path: str, shown: str) -> None:
    assert show_path(path) == shown


@given(st.one_of(st.binary(), st.recursive(
    st.one_of(st.none(), st.integers(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.one_of(st.text(), st.sampled_from(sorted(SHOWN))), inner)),
).map(to_bytes)))  # fmt: skip
def test_any_body_has_a_short_summary(body: bytes) -> None:
    assert len(summarise(body)) <= TEXT_MAX
