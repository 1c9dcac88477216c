"""Fees and their way back: whatever the parts and whatever fails in between, the end is exactly zero."""

from hypothesis import given
from hypothesis import strategies as st

from kassa.payments.fees import PPM, fee_of, fee_part

amounts = st.integers(min_value=1, max_value=9_007_199_254_740_991)
rates = st.integers(min_value=0, max_value=PPM)


@given(amounts, rates)
def test_a_fee_is_never_more_than_the_amount_and_never_negative(amount: int, rate: int) -> None:
    assert 0 <= fee_of(amount, rate) <= amount


def test_a_fee_is_rounded_half_up() -> None:
    assert [fee_of(amount, 6000) for amount in (0, 83, 84, 100, 10_000)] == [0, 0, 1, 1, 60]


@given(st.integers(1, 10_000), rates, st.data())
def test_refunds_in_parts_that_fail_or_come_back_end_at_exactly_zero(
    amount: int, rate: int, data: st.DataObject
) -> None:
    """A model of what may happen to refunds: each ends well, fails, or comes back later; then all that is left goes."""
    fee = fee_of(amount, rate)
    live: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(0, 30))):
        taken, fee_taken = sum(part for part, _ in live), sum(part for _, part in live)
        if taken == amount:
            break
        asked = data.draw(st.integers(1, amount - taken))
        part = fee_part(amount=amount, fee=fee, taken=taken, fee_taken=fee_taken, asked=asked)
        assert 0 <= part <= asked
        live.append((asked, part))
        if data.draw(st.booleans()) and live:
            live.pop(data.draw(st.integers(0, len(live) - 1)))

    taken, fee_taken = sum(part for part, _ in live), sum(part for _, part in live)
    if taken < amount:
        rest = amount - taken
        live.append((rest, fee_part(amount=amount, fee=fee, taken=taken, fee_taken=fee_taken, asked=rest)))

    assert sum(part for part, _ in live) == amount
    assert sum(part for _, part in live) == fee


def test_ten_refunds_of_ten_give_the_fee_of_one_back_once() -> None:
    parts: list[int] = []
    for number in range(10):
        parts.append(fee_part(amount=100, fee=1, taken=number * 10, fee_taken=sum(parts), asked=10))

    assert sum(parts) == 1
    assert sorted(parts) == [0] * 9 + [1]
