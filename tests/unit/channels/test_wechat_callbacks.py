"""What WeChat Pay tells us by itself, and what somebody else would like us to believe."""

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.channels.model import Abnormal, Closed, Failed, Notice, NoticeKind, Outcome, Pending, Succeeded
from kassa.channels.wechat import CALLBACK_BYTES_MAX, PlatformKey, WeChatPay
from kassa.errors import ChannelKeyUnknown, ChannelMessageInvalid, ChannelMismatch
from unit.channels.provider import (
    CHANNEL,
    KEY_ID,
    NEXT_PLATFORM,
    NOW,
    NUMBER,
    OPENID,
    PLATFORM,
    REFUND_NUMBER,
    TRANSACTION_ID,
    account,
    encrypted,
    notification,
    refund_notice,
    signed_headers,
    to_bytes,
    trade,
)

PAID = notification("TRANSACTION.SUCCESS", trade())
PAID_HEADERS = signed_headers(PAID)


def read(body: bytes, **how: Any) -> Notice:
    return CHANNEL.read_callback(signed_headers(body, **how), body, now=NOW)


def test_a_payment_is_told_with_all_that_we_check_it_against() -> None:
    notice = read(PAID)

    assert notice.id == "EV-2018022511223320873"
    assert (notice.kind, notice.number, notice.attach) == (NoticeKind.CHARGE, NUMBER, "pay_1")
    assert isinstance(notice.outcome, Succeeded)
    assert (notice.outcome.amount, notice.outcome.currency) == (100, "CNY")
    assert (notice.outcome.channel_id, notice.outcome.payer) == (TRANSACTION_ID, OPENID)
    assert notice.outcome.evidence.authentic
    assert notice.outcome.evidence.source == "callback"
    assert OPENID not in repr(notice.facts)


@pytest.mark.parametrize(
    ("state", "kind"), [("REFUND", Succeeded), ("NOTPAY", Pending), ("CLOSED", Closed), ("PAYERROR", Failed)]
)
def test_the_state_in_the_message_decides_and_not_its_title(state: str, kind: type[Outcome]) -> None:
    assert type(read(notification("TRANSACTION.SUCCESS", trade(trade_state=state))).outcome) is kind


@pytest.mark.parametrize(
    ("event", "state", "kind"),
    [
        ("REFUND.SUCCESS", "SUCCESS", Succeeded),
        ("REFUND.ABNORMAL", "ABNORMAL", Abnormal),
        ("REFUND.CLOSED", "CLOSED", Failed),
        ("REFUND.PROCESSING", "PROCESSING", Pending),
    ],
)
def test_a_refund_is_told(event: str, state: str, kind: type[Outcome]) -> None:
    notice = read(notification(event, refund_notice(refund_status=state)))

    assert (notice.kind, notice.number, notice.charge_number) == (NoticeKind.REFUND, REFUND_NUMBER, NUMBER)
    assert type(notice.outcome) is kind
    assert notice.facts["refund"] == 30
    assert "招商" not in repr(notice)


def test_a_refund_notification_says_no_currency_and_none_is_made_up() -> None:
    notice = read(notification("REFUND.SUCCESS", refund_notice()))

    assert isinstance(notice.outcome, Succeeded)
    assert (notice.outcome.amount, notice.outcome.currency) == (30, None)


def test_header_names_come_in_any_case() -> None:
    headers = {name.title(): value for name, value in PAID_HEADERS.items()}

    assert CHANNEL.read_callback(headers, PAID, now=NOW).number == NUMBER


def test_the_signature_type_may_be_missing() -> None:
    headers = {name: value for name, value in PAID_HEADERS.items() if name != "wechatpay-signature-type"}

    assert CHANNEL.read_callback(headers, PAID, now=NOW).number == NUMBER


def test_the_same_message_is_read_twice_with_the_same_id() -> None:
    """Repeats are normal; whoever counts them needs the id."""
    assert read(PAID) == read(PAID, nonce="other")


@given(st.integers(0, len(PAID) - 1), st.integers(1, 255))
def test_one_changed_byte_is_refused(place: int, change: int) -> None:
    body = bytearray(PAID)
    body[place] ^= change

    with pytest.raises(ChannelMessageInvalid):
        CHANNEL.read_callback(PAID_HEADERS, bytes(body), now=NOW)


@given(st.integers(0, len(PAID)), st.binary(min_size=1, max_size=8))
def test_an_added_byte_is_refused(place: int, more: bytes) -> None:
    with pytest.raises(ChannelMessageInvalid):
        CHANNEL.read_callback(PAID_HEADERS, PAID[:place] + more + PAID[place:], now=NOW)


@given(st.integers(0, len(PAID) - 1))
def test_a_cut_message_is_refused(length: int) -> None:
    with pytest.raises(ChannelMessageInvalid):
        CHANNEL.read_callback(PAID_HEADERS, PAID[:length], now=NOW)


@given(st.data())
def test_one_changed_character_in_a_header_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["wechatpay-timestamp", "wechatpay-nonce", "wechatpay-signature"]))
    value = PAID_HEADERS[name]
    place = data.draw(st.integers(0, len(value) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda letter: letter != value[place]))

    with pytest.raises(ChannelMessageInvalid):
        CHANNEL.read_callback(PAID_HEADERS | {name: value[:place] + other + value[place + 1 :]}, PAID, now=NOW)


@given(
    st.dictionaries(st.sampled_from(list(PAID_HEADERS)), st.text(st.characters(exclude_categories=[]), max_size=30)),
    st.binary(max_size=50),
)
def test_strangers_are_refused_and_nothing_else_happens(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(ChannelMessageInvalid):
        CHANNEL.read_callback(headers, body, now=NOW)


@pytest.mark.parametrize("seconds", [-301, 301, -315_360_000])
def test_an_old_message_is_refused_though_its_signature_is_good(seconds: int) -> None:
    with pytest.raises(ChannelMessageInvalid):
        read(PAID, at=NOW + timedelta(seconds=seconds))


@pytest.mark.parametrize("seconds", [-300, 300])
def test_a_message_may_be_a_little_off_our_clock(seconds: int) -> None:
    assert read(PAID, at=NOW + timedelta(seconds=seconds)).number == NUMBER


def test_a_probe_is_refused_even_if_it_were_signed() -> None:
    probe = PAID_HEADERS | {"wechatpay-signature": "WECHATPAY/SIGNTEST/" + PAID_HEADERS["wechatpay-signature"]}

    with pytest.raises(ChannelMessageInvalid) as caught:
        CHANNEL.read_callback(probe, PAID, now=NOW)

    assert not isinstance(caught.value, ChannelKeyUnknown), "it must not make us fetch keys"


def test_an_unknown_key_is_told_apart_so_that_keys_can_be_fetched() -> None:
    with pytest.raises(ChannelKeyUnknown) as caught:
        read(PAID, key=NEXT_PLATFORM, serial="AB13")

    assert caught.value.facts == {"serial": "AB13"}


def test_another_key_under_a_known_name_is_refused() -> None:
    with pytest.raises(ChannelMessageInvalid) as caught:
        read(PAID, key=NEXT_PLATFORM)

    assert not isinstance(caught.value, ChannelKeyUnknown)


def test_both_kinds_of_key_are_taken_while_the_provider_changes_over() -> None:
    certificate = PlatformKey("AB13", NEXT_PLATFORM.public_key(), NOW - timedelta(days=1), NOW + timedelta(days=1))
    bare = PlatformKey(KEY_ID, PLATFORM.public_key())
    channel = WeChatPay(account(platform_keys={KEY_ID: bare, "AB13": certificate}))

    for key, serial in ((PLATFORM, KEY_ID), (NEXT_PLATFORM, "AB13")):
        headers = signed_headers(PAID, key=key, serial=serial)
        assert channel.read_callback(headers, PAID, now=NOW).number == NUMBER
    with pytest.raises(ChannelKeyUnknown):
        late = NOW + timedelta(days=2)
        channel.read_callback(signed_headers(PAID, key=NEXT_PLATFORM, serial="AB13", at=late), PAID, now=late)


@pytest.mark.parametrize(
    "body",
    [
        notification("TRANSACTION.SUCCESS", trade(mchid="1900000000")),
        notification("TRANSACTION.SUCCESS", trade(appid="wx0")),
        notification("REFUND.SUCCESS", refund_notice(mchid="1900000000")),
    ],
)
def test_a_message_for_another_account_is_a_mismatch(body: bytes) -> None:
    with pytest.raises(ChannelMismatch):
        read(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"resource":' + b"[" * 20_000,
        notification("TRANSACTION.SUCCESS", trade(), resource_type="plain"),
        notification("TRANSACTION.SUCCESS", trade(), id=""),
        notification("TRANSACTION.SUCCESS", trade(), resource=trade()),
        notification("TRANSACTION.SUCCESS", trade(), resource=encrypted(to_bytes(trade())) | {"algorithm": "NONE"}),
        notification("TRANSACTION.SUCCESS", trade(), resource=encrypted(to_bytes(trade()), key=b"x" * 32)),
        notification("TRANSACTION.SUCCESS", trade(), resource=encrypted(to_bytes(trade())) | {"nonce": "short"}),
        notification("TRANSACTION.SUCCESS", b"not JSON"),
        notification("TRANSACTION.SUCCESS", refund_notice()),
        notification("TRANSACTION.SUCCESS", trade(trade_state="SOMETHING_NEW")),
        notification("TRANSACTION.SUCCESS", trade(amount={"total": 100.0, "currency": "CNY"})),
        notification("TRANSACTION.SUCCESS", trade(amount={"total": True, "currency": "CNY"})),
        notification("TRANSACTION.SUCCESS", trade(amount={"total": "100", "currency": "CNY"})),
        notification("TRANSACTION.SUCCESS", trade(amount={"total": 100})),
        notification("TRANSACTION.SUCCESS", trade(amount=None)),
        notification("TRANSACTION.SUCCESS", trade(success_time="soon")),
        notification("REFUND.SUCCESS", trade()),
        notification("REFUND.SUCCESS", refund_notice(refund_status="SOMETHING_NEW")),
        notification("REFUND.SUCCESS", refund_notice(amount={"total": 100, "refund": 30.5})),
        notification("PAYSCORE.USER_OPEN_SERVICE", trade()),
        notification("", trade()),
    ],
)
def test_a_signed_message_that_is_not_fully_readable_is_refused(body: bytes) -> None:
    with pytest.raises(ChannelMessageInvalid):
        read(body)


def test_a_huge_message_is_refused() -> None:
    with pytest.raises(ChannelMessageInvalid):
        read(b" " * (CALLBACK_BYTES_MAX + 1))


def test_answers_to_the_provider() -> None:
    status, headers, body = CHANNEL.callback_refused("不行", status=401)

    assert CHANNEL.callback_accepted() == (204, {}, b"")
    assert (status, headers["Content-Type"]) == (401, "application/json; charset=utf-8")
    assert json.loads(body) == {"code": "FAIL", "message": "不行"}
