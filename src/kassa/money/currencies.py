"""ISO 4217: the currencies in which money can be owed, and how many digits their minor unit has.

Source: ISO 4217:2015, list one (current currencies and funds), as in force on 2026-01-01: without BGN (euro since that
day), ANG (XCG since 2025-03-31), ZWL (ZWG since 2024-08-31); with XAD (2025). Metals, bond units, SDR and the codes for
tests and for "none" have no minor unit and are left out: an amount in them cannot be written.
"""

from dataclasses import dataclass

from kassa.errors import CurrencyUnknown


@dataclass(frozen=True, slots=True)
class Currency:
    """`exponent`: a major unit is 10 to its power minor units (0 for JPY, 2 for CNY, 3 for KWD, 4 for CLF)."""

    code: str
    exponent: int


_BY_EXPONENT = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    2: """
        AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF CHW
        CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF
        IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK
        MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP
        SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST XAD XCD XCG
        YER ZAR ZMW ZWG
    """,
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}

CURRENCIES: dict[str, Currency] = {
    code: Currency(code, exponent) for exponent, codes in _BY_EXPONENT.items() for code in codes.split()
}
"""By code, upper case."""


def currency(code: str) -> Currency:
    """The currency of an upper-case code. Raises CurrencyUnknown."""
    found = CURRENCIES.get(code)
    if found is None:
        raise CurrencyUnknown(currency=str(code)[:16])
    return found
