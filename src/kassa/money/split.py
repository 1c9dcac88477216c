"""Dividing an amount so that the parts are the whole: no minor unit appears or disappears."""

from collections.abc import Sequence

from kassa.errors import InvariantBroken

PPM = 1_000_000
"""Fees are written in parts per million: 6000 is 0.6 %."""


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Parts in proportion to the weights, which sum to `total` exactly (largest remainder method).

    Minor units left over by rounding down go to the largest remainders, the earlier one among equals, so the result is
    always the same. `split(-total)` is the mirror image of `split(total)`. A weight of zero gets nothing.
    Raises InvariantBroken for a negative weight, or when all are zero and there is something to divide.
    """
    if any(weight < 0 for weight in weights):
        raise InvariantBroken("A weight is negative.", weights=list(weights))
    weight_sum = sum(weights)
    if weight_sum == 0:
        if total != 0 or not weights:
            raise InvariantBroken("There is nobody to give the amount to.", total=total, weights=list(weights))
        return [0] * len(weights)
    size = abs(total)
    parts = [size * weight // weight_sum for weight in weights]
    remainders = [size * weight % weight_sum for weight in weights]
    # sorted() is stable: among equal remainders the earlier index stays first.
    by_remainder = sorted(range(len(weights)), key=lambda index: -remainders[index])
    for index in by_remainder[: size - sum(parts)]:
        parts[index] += 1
    return parts if total >= 0 else [-part for part in parts]


def fee(amount: int, ppm: int) -> int:
    """The fee on an amount, rounded to the nearest minor unit, halves up (away from zero); the rest is the net.

    ppm: 0 to 1000000. Raises InvariantBroken outside of that.
    """
    if not 0 <= ppm <= PPM:
        raise InvariantBroken("A fee is between 0 and 1000000 parts per million.", ppm=ppm)
    return split(amount, (ppm, PPM - ppm))[0]
