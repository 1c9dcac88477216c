"""`post`, rule by rule and as arithmetic: nothing is made or lost, limits hold, refusals leave no trace, replay equals state."""

from copy import deepcopy
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.ids import Id
from kassa.ledger import chart
from kassa.ledger.chart import Code, Posting
from kassa.ledger.model import (
    AMOUNT_MAX,
    Account,
    AccountKey,
    AccountMissing,
    Entry,
    Hold,
    HoldKey,
    HoldRefused,
    InsufficientFunds,
    Kind,
    LedgerRefusal,
    Limit,
    Transfer,
    TransferInvalid,
    hold,
    post,
    release,
    settle,
    single,
)

NOW = datetime(2026, 11, 23, tzinfo=UTC)
A, B, C = (AccountKey(1, Code.WALLET, owner, "CNY") for owner in "abc")
YEN = AccountKey(1, Code.WALLET, "a", "JPY")
ONE, TWO = HoldKey(Id("h"), 1), HoldKey(Id("h"), 2)


def _books(a: int = 100, limit: Limit = Limit.DEBITS_WITHIN_CREDITS, overdraft: int = 0) -> dict[AccountKey, Account]:
    return {
        A: Account(A, 1, limit, overdraft, credits_posted=a),
        B: Account(B, 2),
        C: Account(C, 3, debits_posted=a),
        YEN: Account(YEN, 4),
    }


@pytest.mark.parametrize(
    ("transfers", "refusal"),
    [
        ([single(1, A, B, 100)], None),
        ([single(1, A, B, 101)], InsufficientFunds(A, 100, 101)),
        ([single(1, A, B, 60), single(1, A, B, 60)], InsufficientFunds(A, 40, 60)),
        ([single(1, A, B, 0)], TransferInvalid(f"amount 0 is not between 1 and {AMOUNT_MAX}")),
        ([single(1, A, B, -5)], TransferInvalid(f"amount -5 is not between 1 and {AMOUNT_MAX}")),
        ([single(1, A, A, 5)], TransferInvalid("debit and credit are the same account")),
        ([single(1, A, YEN, 5)], TransferInvalid("two currencies: CNY and JPY")),
        ([single(1, A, A._replace(owner="z"), 5)], AccountMissing(A._replace(owner="z"))),
        ([single(1, B, C, AMOUNT_MAX), single(1, B, C, 1)], TransferInvalid("the account would overflow")),
        ([hold(1, A, B, 70, ONE), single(1, A, B, 31)], InsufficientFunds(A, 30, 31)),
        ([hold(1, A, B, 70, ONE), single(1, A, B, 30)], None),
        ([hold(1, A, B, 70, ONE), hold(1, A, B, 10, ONE)], HoldRefused(ONE, "exists")),
        ([hold(1, A, B, 70, ONE), settle(1, ONE, 71)], HoldRefused(ONE, "too small")),
        ([hold(1, A, B, 70, ONE), settle(1, ONE), settle(1, ONE)], HoldRefused(ONE, "settled")),
        ([hold(1, A, B, 70, ONE), release(1, ONE), settle(1, ONE)], HoldRefused(ONE, "released")),
        ([settle(1, ONE)], HoldRefused(ONE, "missing")),
        ([hold(1, A, B, 70, ONE, NOW), settle(1, ONE)], HoldRefused(ONE, "expired")),
        ([hold(1, A, B, 70, ONE, NOW), release(1, ONE)], None),
        ([hold(1, A, B, 70, ONE, NOW + timedelta(seconds=1)), settle(1, ONE)], None),
        ([Transfer(Kind.SINGLE, 1, None, B, 5)], TransferInvalid("both accounts must be named")),
        ([Transfer(Kind.HOLD, 1, A, B, 5)], TransferInvalid("a hold must be named")),
    ],
)
def test_transfers_are_judged_in_order(transfers: list[Transfer], refusal: LedgerRefusal | None) -> None:
    answer = post(_books(), {}, transfers, NOW)

    assert (None if isinstance(answer, list) else answer) == refusal


def test_a_settled_part_gives_the_rest_back() -> None:
    books = _books()
    holds: dict[HoldKey, Hold] = {}

    post(books, holds, [hold(1, A, B, 70, ONE), settle(1, ONE, 20)], NOW)

    assert (books[A].balance, books[A].available, books[A].debits_pending) == (80, 80, 0)
    assert (books[B].balance, books[B].credits_pending) == (20, 0)


def test_an_overdraft_is_room_below_zero() -> None:
    assert isinstance(post(_books(overdraft=50), {}, [single(1, A, B, 150)], NOW), list)
    assert post(_books(overdraft=50), {}, [single(1, A, B, 151)], NOW) == InsufficientFunds(A, 150, 151)


def test_an_asset_may_not_go_below_zero() -> None:
    books = _books()
    books[C].limit = Limit.CREDITS_WITHIN_DEBITS

    assert post(books, {}, [single(1, B, C, 101)], NOW) == InsufficientFunds(C, 100, 101)
    assert isinstance(post(books, {}, [single(1, B, C, 100)], NOW), list)


def test_the_chart_limits_what_it_opens() -> None:
    assert set(chart.LIMITS) == set(Code) - {Code.WALLET}
    assert set(chart.NAMES) == set(Code)
    assert len({int(posting) for posting in Posting}) == len(Posting)


_keys = st.sampled_from([A, B, C])
_amounts = st.integers(min_value=1, max_value=60)
_hold_keys = st.sampled_from([ONE, TWO, HoldKey(Id("g"), 0)])
_transfers = st.one_of(
    st.builds(lambda debit, credit, amount: single(1, debit, credit, amount), _keys, _keys, _amounts),
    st.builds(
        lambda debit, credit, amount, key: hold(1, debit, credit, amount, key), _keys, _keys, _amounts, _hold_keys
    ),
    st.builds(lambda key, amount: settle(1, key, amount), _hold_keys, st.integers(min_value=0, max_value=60)),
    st.builds(lambda key: release(1, key), _hold_keys),
)
_changes = st.lists(st.lists(_transfers, min_size=1, max_size=4), max_size=30)


@given(_changes)
def test_nothing_is_made_or_lost_and_limits_hold(changes: list[list[Transfer]]) -> None:
    books, holds = _books(), dict[HoldKey, Hold]()
    before = sum(account.balance for account in books.values())

    for change in changes:
        post(books, holds, change, NOW)

        assert sum(account.balance for account in books.values()) == before
        assert sum(account.debits_pending - account.credits_pending for account in books.values()) == 0
        assert books[A].available >= 0
        assert all(account.debits_pending >= 0 and account.credits_pending >= 0 for account in books.values())


@given(_changes)
def test_a_refusal_leaves_everything_as_it_was(changes: list[list[Transfer]]) -> None:
    books, holds = _books(), dict[HoldKey, Hold]()

    for change in changes:
        books_before, holds_before = deepcopy(books), deepcopy(holds)
        answer = post(books, holds, change, NOW)
        if not isinstance(answer, list):
            assert books == books_before
            assert holds == holds_before


@given(_changes)
def test_replay_of_the_entries_gives_the_state(changes: list[list[Transfer]]) -> None:
    books, holds = _books(), dict[HoldKey, Hold]()
    replayed = _books()

    for change in changes:
        answer = post(books, holds, change, NOW)
        for entry in answer if isinstance(answer, list) else []:
            _replay(replayed, entry)

    assert replayed == books


def _replay(books: dict[AccountKey, Account], entry: Entry) -> None:
    """What a statement says of an account, without asking any rule."""
    debit, credit = books[entry.debit.key], books[entry.credit.key]
    held = entry.hold_amount if entry.kind == Kind.HOLD else -entry.hold_amount
    debit.debits_pending += held
    credit.credits_pending += held
    if entry.kind in (Kind.SINGLE, Kind.SETTLE):
        debit.debits_posted += entry.amount
        credit.credits_posted += entry.amount
    debit.version += 1
    credit.version += 1
    assert (debit.version, debit.balance) == (entry.debit_version, entry.debit_balance)
    assert (credit.version, credit.balance) == (entry.credit_version, entry.credit_balance)
