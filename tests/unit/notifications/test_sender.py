"""Where webhooks may go, and what their signatures are."""

from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook

from kassa.errors import RequestInvalid
from kassa.notifications.model import OVERLAP, TRIES_AT_S, Secret, next_try, rotated, signature, valid_secrets
from kassa.notifications.sender import Sender, checked_url, is_public
from kassa.notifications.service import new_secret

NOW = datetime(2026, 8, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101", "2002:101:101::1"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "100.100.100.200", "192.0.0.192", "198.18.0.1", "192.0.2.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1",
        "2002:7f00:1::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "localhost", "", "1.2.3",
    ],
)  # fmt: skip
def test_all_other_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "ftp://example.com/", "https://", "https://user:secret@example.com/", "https://x:99999/",
        "https://127.0.0.1/", "https://[::1]/", "https://localhost/", "https://169.254.169.254/latest", "https://a b/",
        "https://example.com/#part", "https://[::ffff:10.0.0.1]/", "https://exa\u0301mple.com/", "/hook", "https://x:0/",
    ],
)  # fmt: skip
def test_urls_that_webhooks_must_not_go_to_are_refused(url: str) -> None:
    with pytest.raises(RequestInvalid):
        checked_url(url, allow_private=False)


def test_https_urls_and_with_the_setting_private_ones_are_taken() -> None:
    assert checked_url("https://example.com:8443/hook?shop=1", allow_private=False)
    assert checked_url("http://127.0.0.1:9000/", allow_private=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://localhost:9/", "http://[::1]:9/"])
async def test_address_is_checked_where_the_connection_is_made(url: str) -> None:
    """A name that looks public may lead to a private address."""
    sender = Sender(allow_private=False, timeout_s=5)
    await sender.start()

    answer = await sender.send(url, "evt_1", [Secret(new_secret())], NOW, b"{}")
    await sender.close()

    assert answer.status is None
    assert answer.error is not None and "is not a public address" in answer.error


def test_signature_is_that_of_the_standard() -> None:
    one, two, now = new_secret(), new_secret(), datetime.now(UTC)

    header = signature([Secret(one), Secret(two)], "evt_1", now, b'{"a":1}')

    assert header.split()[0] == Webhook(one).sign("evt_1", now, '{"a":1}')
    assert header.split()[1] == Webhook(two).sign("evt_1", now, '{"a":1}')


def test_rotated_secret_signs_for_a_day_more() -> None:
    secrets = rotated([Secret("old")], "new", NOW)

    assert [one.secret for one in valid_secrets(secrets, NOW + OVERLAP - timedelta(seconds=1))] == ["new", "old"]
    assert [one.secret for one in valid_secrets(secrets, NOW + OVERLAP)] == ["new"]
    assert [one.secret for one in rotated(secrets, "newer", NOW + OVERLAP)] == ["newer", "new"]


def test_tries_are_spread_over_a_day() -> None:
    waits = [next_try(tries, 0.5) for tries in range(1, 11)]

    assert waits[-1] is None
    assert sum(wait for wait in waits if wait) == pytest.approx(TRIES_AT_S[-1])
    assert waits[0] == pytest.approx(5)
