"""The merchant's fee: how much of a payment it is, and how much goes back with each refund. Pure, whole minor units."""

PPM = 1_000_000
"""Fees are parts per million of the amount."""


def fee_of(amount: int, fee_ppm: int) -> int:
    """The fee of an amount, rounded half up; what is left is the merchant's. So fee + net == amount, always."""
    return (amount * fee_ppm + PPM // 2) // PPM


def fee_part(*, amount: int, fee: int, taken: int, fee_taken: int, asked: int) -> int:
    """How much of a refund of `asked` comes out of fee income.

    amount, fee: of the payment; taken, fee_taken: of all refunds so far that succeeded or are on their way.
    The sum of all parts follows the rounded share of what was refunded in all, so errors never add up. The refund that
    completes the payment takes exactly what is left of the fee, whatever failed in between: net taken never exceeds
    the net of the payment, hence what is left of the fee fits into what is left of the amount.
    """
    target = (2 * fee * (taken + asked) + amount) // (2 * amount)
    return min(max(target - fee_taken, 0), asked)
