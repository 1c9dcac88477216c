"""Channels are made of credentials; what is wrong with those is said by name and never by value."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from kassa.channels.channel import Callbacks, Charges, KeyRefresh, Refunds
from kassa.channels.model import Method
from kassa.channels.registry import CHANNELS, open_channel
from kassa.channels.wechat import BASE_URL, WeChatPay
from kassa.errors import ChannelNotFound, SettingInvalid
from unit.channels.provider import APIV3_KEY, APPID, KEY_ID, MCHID, MERCHANT_KEY, PLATFORM, certificate_pem

PRIVATE_PEM = MERCHANT_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
PUBLIC_PEM = PLATFORM.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
CREDENTIALS: dict[str, Any] = {
    "base_url": "http://127.0.0.1:8081",
    "mchid": MCHID,
    "appid": APPID,
    "merchant_serial_no": "40ab",
    "merchant_private_key_pem": PRIVATE_PEM,
    "apiv3_key": APIV3_KEY.decode(),
    "platform_public_key_pem": PUBLIC_PEM,
    "platform_public_key_id": KEY_ID,
    "platform_certificate_serial": "AB12",
    "platform_certificate_pem": certificate_pem(PLATFORM, serial=0xAB12),
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CREDENTIALS.items() if name not in names}


def test_what_a_sandbox_prints_is_enough() -> None:
    opened = open_channel("wechat", CREDENTIALS)

    assert opened.base_url == "http://127.0.0.1:8081"
    assert isinstance(opened.channel, WeChatPay)
    account = opened.channel.account
    assert (account.mchid, account.appid, account.merchant_serial_no) == (MCHID, APPID, "40AB")
    assert set(account.platform_keys) == {KEY_ID, "AB12"}
    assert account.public_key_id == KEY_ID


def test_certificates_may_come_later_and_the_address_is_the_providers() -> None:
    opened = open_channel("wechat", {name: CREDENTIALS[name] for name in without("base_url") if "platform" not in name})

    assert opened.base_url == BASE_URL
    assert isinstance(opened.channel, WeChatPay)
    assert opened.channel.account.platform_keys == {}
    assert opened.channel.account.public_key_id is None


def test_further_keys_of_either_kind_may_be_given_for_a_rotation() -> None:
    further = {"PUB_KEY_ID_2": PUBLIC_PEM, "AB13": certificate_pem(PLATFORM, serial=0xAB13)}

    opened = open_channel("wechat", CREDENTIALS | {"platform_keys": further})

    assert isinstance(opened.channel, WeChatPay)
    keys = opened.channel.account.platform_keys
    assert set(keys) == {KEY_ID, "AB12", "PUB_KEY_ID_2", "AB13"}
    assert keys["PUB_KEY_ID_2"].is_bare
    assert not keys["AB13"].is_bare


@pytest.mark.parametrize(
    ("credentials", "word"),
    [
        (without("mchid"), "mchid"),
        (without("merchant_private_key_pem"), "merchant_private_key_pem"),
        (without("platform_public_key_id"), "platform_public_key_id"),
        (without("platform_public_key_pem"), "platform_public_key_pem"),
        (CREDENTIALS | {"apiv3_key": "a" * 31}, "apiv3_key"),
        (CREDENTIALS | {"apiv3_key": "密" * 32}, "apiv3_key"),
        (CREDENTIALS | {"apiv3_key": None}, "apiv3_key"),
        (CREDENTIALS | {"mchid": 'x"y'}, "mchid"),
        (CREDENTIALS | {"mchid": 1900007291}, "mchid"),
        (CREDENTIALS | {"merchant_serial_no": "serial"}, "merchant_serial_no"),
        (CREDENTIALS | {"base_url": "http://127.0.0.1/path"}, "base_url"),
        (CREDENTIALS | {"base_url": "http://user@127.0.0.1"}, "base_url"),
        (CREDENTIALS | {"merchant_private_key_pem": PUBLIC_PEM}, "private key"),
        (CREDENTIALS | {"platform_certificate_serial": "AB99"}, "serial"),
        (CREDENTIALS | {"platform_keys": "x"}, "platform_keys"),
        (CREDENTIALS | {"api_v3_key": "typo"}, "api_v3_key"),
    ],
)
def test_wrong_credentials_are_named_and_not_shown(credentials: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        open_channel("wechat", credentials)

    assert word in str(caught.value)
    for secret in ("a" * 31, "密", PRIVATE_PEM.splitlines()[2], PUBLIC_PEM.splitlines()[2], APIV3_KEY.decode()):
        assert secret not in str(caught.value)


def test_a_channel_that_does_not_exist_is_not_found() -> None:
    with pytest.raises(ChannelNotFound):
        open_channel("barter", {})


@pytest.mark.parametrize("name", CHANNELS)
def test_every_channel_says_what_it_can(name: str) -> None:
    kind = CHANNELS[name]

    assert kind.methods <= set(Method)
    assert kind.currencies
    assert kind.secrets


def test_wechat_can_all_of_it() -> None:
    channel = open_channel("wechat", CREDENTIALS).channel

    assert isinstance(channel, Charges)
    assert isinstance(channel, Refunds)
    assert isinstance(channel, Callbacks)
    assert isinstance(channel, KeyRefresh)
    assert (CHANNELS["wechat"].refunds_max, CHANNELS["wechat"].refund_gap_s) == (50, 60)
