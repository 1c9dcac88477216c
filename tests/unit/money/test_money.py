"""Money: exact, in one currency, and divided without loss."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kassa.errors import AmountInvalid, CurrencyUnknown, InvariantBroken
from kassa.money.amount import MINOR_MAX, Amount, check_amount, format_amount, parse_major, to_major
from kassa.money.currencies import CURRENCIES, currency
from kassa.money.split import PPM, fee, split

codes = st.sampled_from(sorted(CURRENCIES))
minors = st.integers(-MINOR_MAX, MINOR_MAX)
weights = st.lists(st.integers(0, 10**9), min_size=1, max_size=20).filter(any)


@given(minors, weights)
def test_a_split_sums_to_its_total(total: int, shares: list[int]) -> None:
    assert sum(split(total, shares)) == total


@given(minors, weights)
def test_a_split_is_the_mirror_image_for_the_other_sign(total: int, shares: list[int]) -> None:
    assert split(-total, shares) == [-part for part in split(total, shares)]


@given(minors, weights)
def test_each_part_is_less_than_one_unit_from_its_exact_share(total: int, shares: list[int]) -> None:
    for part, share in zip(split(total, shares), shares, strict=True):
        assert abs(Fraction(total * share, sum(shares)) - part) < 1


@given(minors, weights)
def test_a_zero_weight_gets_nothing(total: int, shares: list[int]) -> None:
    assert split(total, [*shares, 0])[-1] == 0


@pytest.mark.parametrize(
    ("total", "shares", "parts"),
    [
        (100, [1, 1, 1], [34, 33, 33]),
        (101, [1, 1, 1], [34, 34, 33]),
        (-100, [1, 1, 1], [-34, -33, -33]),
        (1, [1, 1], [1, 0]),
        (0, [1, 2], [0, 0]),
        (0, [0, 0], [0, 0]),
        (1200, [6, 994], [7, 1193]),
        (5, [0, 7, 0], [0, 5, 0]),
    ],
)
def test_splits(total: int, shares: list[int], parts: list[int]) -> None:
    assert split(total, shares) == parts


@pytest.mark.parametrize(("total", "shares"), [(1, []), (0, []), (1, [0, 0]), (1, [2, -1])])
def test_a_split_without_takers_or_with_a_negative_one_is_refused(total: int, shares: list[int]) -> None:
    with pytest.raises(InvariantBroken):
        split(total, shares)


@pytest.mark.parametrize(
    ("amount", "ppm", "expected"),
    [(100, 6000, 1), (83, 6000, 0), (84, 6000, 1), (250, 6000, 2), (1, 500_000, 1), (100, 0, 0), (100, PPM, 100)],
)
def test_a_fee_is_rounded_to_the_nearest_unit_and_halves_go_up(amount: int, ppm: int, expected: int) -> None:
    assert fee(amount, ppm) == expected
    assert fee(-amount, ppm) == -expected


@given(st.integers(0, MINOR_MAX), st.integers(0, PPM))
def test_a_fee_is_half_up_exactly(amount: int, ppm: int) -> None:
    assert fee(amount, ppm) == (2 * amount * ppm + PPM) // (2 * PPM)


@pytest.mark.parametrize("ppm", [-1, PPM + 1])
def test_a_fee_outside_of_the_whole_is_refused(ppm: int) -> None:
    with pytest.raises(InvariantBroken):
        fee(100, ppm)


@given(minors, codes)
def test_what_is_written_in_major_units_reads_back(minor: int, code: str) -> None:
    assert parse_major(to_major(minor, code), code) == minor


@given(minors, codes)
def test_what_people_see_holds_the_same_number(minor: int, code: str) -> None:
    number, _, written_code = format_amount(minor, code).partition(" ")

    assert parse_major(number.replace(",", ""), code) == minor
    assert written_code == code


@pytest.mark.parametrize(
    ("minor", "code", "major", "people"),
    [
        (100, "CNY", "1.00", "1.00 CNY"),
        (-5, "CNY", "-0.05", "-0.05 CNY"),
        (123_456_789, "CNY", "1234567.89", "1,234,567.89 CNY"),
        (100, "JPY", "100", "100 JPY"),
        (1, "KWD", "0.001", "0.001 KWD"),
        (12_345, "CLF", "1.2345", "1.2345 CLF"),
    ],
)
def test_exponents_of_0_2_3_and_4_digits(minor: int, code: str, major: str, people: str) -> None:
    assert to_major(minor, code) == major
    assert format_amount(minor, code) == people
    assert parse_major(major, code) == minor


def test_fewer_fraction_digits_are_read() -> None:
    assert parse_major("1", "CNY") == 100
    assert parse_major("1.5", "KWD") == 1500


@pytest.mark.parametrize(
    "text",
    ["", "1.", ".5", "1.000", "1,00", "+1", " 1", "1 ", "1e2", "٣", "NaN", "--1", "1.0.0", "1\n", "9" * 20, "0x10"],
)
def test_what_is_not_an_amount_is_refused(text: str) -> None:
    with pytest.raises(AmountInvalid):
        parse_major(text, "CNY")


@given(st.text())
def test_any_text_is_an_amount_or_refused(text: str) -> None:
    try:
        minor = parse_major(text, "KWD")
    except AmountInvalid:
        return
    assert parse_major(to_major(minor, "KWD"), "KWD") == minor


def test_a_yen_has_no_fraction() -> None:
    with pytest.raises(AmountInvalid):
        parse_major("1.0", "JPY")


@pytest.mark.parametrize("minor", [1.0, True, "1", None, 1.5, b"1"])
def test_only_an_int_becomes_money(minor: object) -> None:
    with pytest.raises(AmountInvalid):
        Amount(minor, "CNY")  # type: ignore[arg-type]
    with pytest.raises(AmountInvalid):
        check_amount(minor, "CNY")


@pytest.mark.parametrize("minor", [0, -1, MINOR_MAX + 1])
def test_a_request_is_for_an_amount_within_bounds(minor: int) -> None:
    with pytest.raises(AmountInvalid) as refusal:
        check_amount(minor, "CNY")

    assert refusal.value.facts["errors"][0]["field"] == "amount"


@pytest.mark.parametrize("minor", [1, MINOR_MAX])
def test_both_bounds_are_within(minor: int) -> None:
    assert check_amount(minor, "CNY") == Amount(minor, "CNY")


@pytest.mark.parametrize("code", ["cny", "RMB", "", "CNYX", "XAU", "XXX", None, 156, ["CNY"]])
def test_an_unknown_currency_is_refused_with_its_field(code: object) -> None:
    with pytest.raises(CurrencyUnknown) as refusal:
        check_amount(1, code)

    assert refusal.value.facts["errors"][0]["field"] == "currency"


def test_amounts_of_one_currency_add_up_and_compare() -> None:
    two, three = Amount(2, "CNY"), Amount(3, "CNY")

    assert two + three == Amount(5, "CNY")
    assert two - three == -Amount(1, "CNY")
    assert two < three
    assert three >= two
    assert str(two) == "0.02 CNY"


def test_two_currencies_are_never_mixed() -> None:
    yuan, dollar = Amount(1, "CNY"), Amount(1, "USD")

    with pytest.raises(InvariantBroken):
        yuan + dollar
    with pytest.raises(InvariantBroken):
        yuan - dollar
    with pytest.raises(InvariantBroken):
        yuan < dollar  # noqa: B015
    with pytest.raises(InvariantBroken):
        yuan <= dollar  # noqa: B015
    assert yuan != dollar


def test_the_table_of_currencies_is_whole() -> None:
    assert all(len(code) == 3 and code.isupper() for code in CURRENCIES)
    assert len(CURRENCIES) == 165
    assert [currency(code).exponent for code in ("JPY", "CNY", "MGA", "KWD", "UYW")] == [0, 2, 2, 3, 4]
