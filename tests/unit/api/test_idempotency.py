"""Which requests are the same."""

import pytest

from kassa.api.decode import BodyDecoder
from kassa.api.http import Request
from kassa.api.idempotency import digest, is_final, read_key, require_once, stored_problem
from kassa.api.rest.fields import Payer
from kassa.errors import (
    AttemptInDoubt,
    Busy,
    IdempotencyInProgress,
    IdempotencyKeyMissing,
    IdempotencyKeyReused,
    KassaError,
    PaymentOrderExists,
    WalletInsufficientFunds,
)
from kassa.journal.change import Reply

decode = BodyDecoder(Payer)


def request(path: str = "/v1/payments", key: str | None = "k") -> Request:
    return Request("POST", path, headers={} if key is None else {"idempotency-key": key})


def test_the_body_counts_as_it_was_understood_not_as_it_was_written() -> None:
    one = decode.read(b'{"openid":"o","ip":"::1"}')
    same = decode.read(b'{ "ip": "\\u003a:1", "wallet": null, "openid": "o" }')

    assert digest(request(), one) == digest(request(), same)


def test_another_body_or_path_is_another_request() -> None:
    one, other = decode.read(b'{"openid":"o"}'), decode.read(b'{"openid":"p"}')

    assert len({digest(request(), one), digest(request(), other), digest(request("/v1/topups"), one)}) == 3


@pytest.mark.parametrize("key", ["", "a b", "ä", "x" * 256, "a\tb"])
def test_what_is_not_a_key_is_refused(key: str) -> None:
    with pytest.raises(IdempotencyKeyMissing):
        read_key(request(key=key))


def test_a_request_that_moves_money_needs_a_key() -> None:
    with pytest.raises(IdempotencyKeyMissing):
        require_once(request(key=None), Payer())


@pytest.mark.parametrize(
    ("error", "final"),
    [(PaymentOrderExists(), True), (WalletInsufficientFunds(), True), (AttemptInDoubt(), False), (Busy(), False),
     (IdempotencyInProgress(), False), (IdempotencyKeyReused(), False)],
)  # fmt: skip
def test_only_what_a_repeat_cannot_change_is_kept(error: KassaError, final: bool) -> None:
    assert is_final(error) is final


def test_a_stored_refusal_is_told_as_it_was() -> None:
    told = stored_problem(Reply(409, None, b'{"code":"payment.order_exists"}'))

    assert told is not None
    assert (told.status, told.body) == (409, b'{"code":"payment.order_exists"}')
    assert ("Idempotent-Replayed", "true") in told.headers
