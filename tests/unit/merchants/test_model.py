"""Merchants, keys, scopes and policies."""

import re

import pytest

from kassa.clock import FrozenClock
from kassa.errors import ApiKeyNotFound, RequestInvalid, SettingInvalid
from kassa.ids import new_id
from kassa.journal.change import Aggregate, Change
from kassa.merchants import model
from kassa.merchants.model import ALL_SCOPES, Scope
from kassa.merchants.records import ApiKey, ChannelAccount, Merchant
from kassa.merchants.vault import Vault

NOW = FrozenClock().now()


def merchant() -> Merchant:
    made = model.create(7, new_id(), "Shop", {}, NOW).result
    assert isinstance(made, Merchant)
    return made


def test_a_key_is_long_random_and_kept_as_its_hash() -> None:
    one, other = model.new_key(), model.new_key()

    assert re.fullmatch(r"sk_[0-9A-Za-z]{32}", one)
    assert one != other
    row = model.add_key(Aggregate(merchant(), ()), new_id(), one, "", "all", NOW).result
    assert row.key_hash == model.hash_key(one)
    assert one[7:] not in repr(row)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("all", ALL_SCOPES), ("read", Scope.READ), ("read payments", Scope.READ | Scope.PAYMENTS)],
)
def test_scopes_are_read(text: str, bits: int) -> None:
    assert model.read_scopes(text) == bits


@pytest.mark.parametrize("text", ["", "  ", "everything", "READ", "read,payments"])
def test_scopes_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(RequestInvalid):
        model.read_scopes(text)


def test_policies_are_read_from_text() -> None:
    read = model.read_policies({"fee_ppm": "6000", "fee_on_refund": "kept", "late_success": "hold"})

    assert read == {"fee_ppm": 6000, "fee_on_refund": "kept", "late_success": "hold"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("fee_ppm", -1), ("fee_ppm", 1_000_001), ("fee_ppm", "x"), ("fee_ppm", True), ("fee_ppm", 1.5),
     ("fee_on_refund", "maybe"), ("late_success", ""), ("overdraft", -1), ("name", " "), ("colour", "red")],
)  # fmt: skip
def test_policies_that_are_wrong_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestInvalid) as refusal:
        model.read_policies({name: value})

    assert refusal.value.facts["errors"][0]["field"] == name


def test_setting_what_is_set_already_moves_nothing() -> None:
    change = model.set_policies(Aggregate(merchant(), ()), {"fee_ppm": 0}, ["CNY"])

    assert (change.moves, change.opens) == ((), ())


def test_an_overdraft_reaches_the_accounts_in_every_currency() -> None:
    change = model.set_policies(Aggregate(merchant(), ()), {"overdraft": 500}, ["CNY", "USD"])

    assert [(opened.key.currency, opened.overdraft) for opened in change.opens] == [("CNY", 500), ("USD", 500)]


def test_revoking_twice_moves_once() -> None:
    shop, key_id = merchant(), new_id()
    row = model.add_key(Aggregate(shop, ()), key_id, model.new_key(), "", "all", NOW).result
    first = model.revoke_key(Aggregate(shop, (row,)), key_id, NOW)
    assert isinstance(first, Change)
    assert isinstance(first.result, ApiKey)
    second = model.revoke_key(Aggregate(shop, (first.result,)), key_id, NOW)

    assert first.result.state == "revoked"
    assert isinstance(second, Change)
    assert second.moves == ()


def test_a_key_that_does_not_exist_cannot_be_revoked() -> None:
    assert isinstance(model.revoke_key(Aggregate(merchant(), ()), new_id(), NOW), ApiKeyNotFound)


def test_new_credentials_replace_the_old_ones() -> None:
    shop = merchant()
    first = model.set_channel(Aggregate(shop, ()), new_id(), "wechat", b"one", NOW).result
    assert isinstance(first, ChannelAccount)
    second = model.set_channel(Aggregate(shop, (first,)), new_id(), "wechat", b"two", NOW)

    assert second.new == ()
    assert (second.result.id, second.result.credentials) == (first.id, b"two")


def test_a_secret_opens_only_where_it_was_sealed() -> None:
    vault = Vault(b"k" * 32)
    sealed = vault.seal(7, "wechat", b"secret")

    assert b"secret" not in sealed
    assert vault.open(7, "wechat", sealed) == b"secret"
    for home, purpose in ((8, "wechat"), (7, "alipay")):
        with pytest.raises(SettingInvalid):
            vault.open(home, purpose, sealed)
    with pytest.raises(SettingInvalid):
        Vault(b"x" * 32).open(7, "wechat", sealed)
    with pytest.raises(SettingInvalid):
        vault.open(7, "wechat", sealed[:-1] + bytes([sealed[-1] ^ 1]))
