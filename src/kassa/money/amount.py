"""Amounts: whole minor units and a currency. No float, no Decimal, no bool ever becomes money.

Major units ("1.00") exist only at the edges: for people, and for channels that speak them.
"""

import re
from dataclasses import dataclass

from kassa.errors import AmountInvalid, CurrencyUnknown, InvariantBroken
from kassa.money.currencies import currency

MINOR_MAX = 9_007_199_254_740_991
"""2 to the 53rd minus 1: the largest whole number that every JSON reader keeps exactly."""

# At most as many digits as any 64-bit amount has, so that no text can make us build an enormous number.
_MAJOR = re.compile(r"(-?)([0-9]{1,19})(?:\.([0-9]{1,8}))?")


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of one currency; may be negative or zero, as differences are.

    Raises AmountInvalid when `minor` is not an int, CurrencyUnknown when the code is none. Arithmetic and comparison
    between two currencies are bugs of ours and raise InvariantBroken.
    """

    minor: int
    currency: str

    def __post_init__(self) -> None:
        # The annotation binds only those who run a type checker; JSON does not.
        if type(self.minor) is not int:
            raise AmountInvalid("An amount is a whole number of minor units.", given=type(self.minor).__name__)
        currency(self.currency)

    def __add__(self, other: "Amount") -> "Amount":
        self._same(other)
        return Amount(self.minor + other.minor, self.currency)

    def __sub__(self, other: "Amount") -> "Amount":
        self._same(other)
        return Amount(self.minor - other.minor, self.currency)

    def __neg__(self) -> "Amount":
        return Amount(-self.minor, self.currency)

    def __lt__(self, other: "Amount") -> bool:
        self._same(other)
        return self.minor < other.minor

    def __le__(self, other: "Amount") -> bool:
        self._same(other)
        return self.minor <= other.minor

    def __str__(self) -> str:
        return format_amount(self.minor, self.currency)

    def _same(self, other: "Amount") -> None:
        if self.currency != other.currency:
            raise InvariantBroken("Amounts in two currencies were mixed.", left=str(self), right=str(other))


def check_amount(minor: object, code: object) -> Amount:
    """The amount of a request: 1 to 9007199254740991 minor units of a known currency.

    Raises AmountInvalid, then CurrencyUnknown; both name the field.
    """
    if type(minor) is not int or not 1 <= minor <= MINOR_MAX:
        raise AmountInvalid(errors=[{"field": "amount", "message": f"must be a whole number from 1 to {MINOR_MAX}"}])
    if type(code) is not str:
        raise CurrencyUnknown(errors=[{"field": "currency", "message": "must be a text such as CNY"}])
    try:
        return Amount(minor, code)
    except CurrencyUnknown as fault:
        raise CurrencyUnknown(
            errors=[{"field": "currency", "message": "must be an ISO 4217 code such as CNY"}], **fault.facts
        ) from fault


def to_major(minor: int, code: str) -> str:
    """`1.00` of 100 CNY, `100` of 100 JPY, `0.100` of 100 KWD: as channels that speak major units want it."""
    sign, whole, fraction = _parts(minor, code)
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"


def format_amount(minor: int, code: str) -> str:
    """`1,234.50 CNY`, for people."""
    sign, whole, fraction = _parts(minor, code)
    number = f"{sign}{whole:,}.{fraction}" if fraction else f"{sign}{whole:,}"
    return f"{number} {code}"


def parse_major(text: str, code: str) -> int:
    """Minor units of `1.00`. Fewer fraction digits than the currency has are fine, more are refused, even zeros.

    Raises CurrencyUnknown, then AmountInvalid.
    """
    exponent = currency(code).exponent
    found = _MAJOR.fullmatch(text)
    fraction = (found.group(3) or "") if found is not None else ""
    if found is None or len(fraction) > exponent:
        raise AmountInvalid(
            f"This is not an amount in {code} with at most {exponent} fraction digits.", given=text[:40]
        )
    minor = int(found.group(2) + fraction.ljust(exponent, "0"))
    return -minor if found.group(1) else minor


def _parts(minor: int, code: str) -> tuple[str, int, str]:
    """(sign, whole units, fraction digits). Raises CurrencyUnknown, then AmountInvalid."""
    amount = Amount(minor, code)
    exponent = currency(code).exponent
    whole, fraction = divmod(abs(amount.minor), 10**exponent)
    return ("-" if minor < 0 else ""), whole, f"{fraction:0{exponent}d}" if exponent else ""
