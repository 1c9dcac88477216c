"""The merchant's own money: balances by currency, and the statement of each account."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from kassa.api.decode import read_query, refused
from kassa.api.http import Request, Response
from kassa.api.pages import read_number_cursor, write_cursor
from kassa.api.rest.fields import Currency, Line, Listed, Page
from kassa.api.route import Answer, Route
from kassa.ids import Id
from kassa.ledger.chart import Code, Posting
from kassa.ledger.model import Account, AccountKey, Kind
from kassa.ledger.store import LedgerStore, StatementLine
from kassa.merchants.model import Caller, Scope

_encode = msgspec.json.Encoder().encode


class Balance(msgspec.Struct, frozen=True):
    """The merchant's money in one currency."""

    object: Literal["balance"]
    currency: str
    balance: int
    """What we owe the merchant."""
    available: int
    """Less what is held for refunds on their way."""
    held: int
    fees: int
    """What Kassa's operator has taken."""
    receivable: int
    """What the channels still owe us for this merchant."""
    suspense: int
    """Late and duplicate payments that wait to be given back or decided about."""


class Balances(msgspec.Struct, frozen=True):
    """One entry per currency."""

    data: list[Balance]


class StatementQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which account's statement."""

    currency: Currency | None = None
    """Not needed by a merchant with money in one currency only."""
    account: Literal["merchant_payable", "fee_income", "channel_receivable", "suspense"] = "merchant_payable"


class AtQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The balances as they were."""

    at: Annotated[datetime, Meta(tz=True, description="As it was then; nothing is held in the past")] | None = None


class Roots(Protocol):
    """Knows the public ids of what money was moved for."""

    async def names_of(self, home: int, roots: Collection[Id]) -> dict[Id, str]: ...


def routes(ledger: LedgerStore, roots: Roots) -> list[Route]:
    """Balances and statements of the caller's own accounts."""

    async def balances(request: Request, caller: Caller) -> Response:
        at = read_query(request, AtQuery).at
        accounts = await ledger.own_accounts(caller.merchant.home)
        by_currency: dict[str, dict[int, Account]] = {}
        for account in accounts:
            by_currency.setdefault(account.key.currency, {})[account.key.code] = account
        if at is None:
            shown = [_balance(currency, own) for currency, own in by_currency.items()]
        else:
            shown = [await _balance_at(ledger, currency, own, at) for currency, own in by_currency.items()]
        return Response(200, _encode(Balances(shown)))

    async def statement(request: Request, caller: Caller) -> Response:
        query = read_query(request, StatementQuery)
        home, code = caller.merchant.home, Code[query.account.upper()]
        currency = query.currency or _only(await ledger.currencies(home))
        account = None if currency is None else await ledger.account(AccountKey(home, code, "", currency))
        return await statement_page(ledger, roots, account, query.cursor, query.limit)

    return [
        Route(
            "GET", "/v1/balances", "The merchant's money, by currency.", balances,
            {200: Answer(Balances, "The balances")}, Scope.READ, query=AtQuery,
        ),
        Route(
            "GET", "/v1/balances/statement", "What happened to one account, newest first, without gaps.", statement,
            {200: Answer(Listed[Line], "A page of lines")}, Scope.READ, query=StatementQuery,
        ),
    ]  # fmt: skip


async def statement_page(
    ledger: LedgerStore, roots: Roots, account: Account | None, cursor: str | None, limit: int
) -> Response:
    """A page of an account's statement. An account that nothing was posted to yet has an empty one."""
    before = read_number_cursor(cursor)
    lines = [] if account is None else await ledger.statement(account.id, before, limit)
    following = write_cursor(lines[-1].version) if len(lines) == limit and lines[-1].version > 1 else None
    made_for = {line.root for line in lines if line.root is not None}
    names = await roots.names_of(account.key.home, made_for) if account is not None and made_for else {}
    return Response(200, _encode(Listed([_line(line, names) for line in lines], following)))


def _line(line: StatementLine, names: Mapping[Id, str]) -> Line:
    writer, seq, ord = line.place
    kind = Posting(line.code).name.lower()
    return Line(
        f"trf_{writer:04x}{seq:016x}{ord:04x}",
        line.at,
        kind + {Kind.HOLD: "_held", Kind.RELEASE: "_released"}.get(line.kind, ""),
        line.amount,
        line.balance,
        line.held,
        line.version,
        None if line.root is None else names.get(line.root),
    )


def _only(currencies: Sequence[str]) -> str | None:
    """The one currency; None when there is no money yet. Raises RequestInvalid when there are several."""
    if len(currencies) > 1:
        raise refused("currency", f"is required; one of {', '.join(sorted(currencies))}")
    return currencies[0] if currencies else None


def _balance(currency: str, own: dict[int, Account]) -> Balance:
    payable = own.get(Code.MERCHANT_PAYABLE)
    return Balance(
        "balance",
        currency,
        0 if payable is None else payable.balance,
        0 if payable is None else payable.available,
        0 if payable is None else payable.debits_pending,
        _posted(own, Code.FEE_INCOME),
        -_posted(own, Code.CHANNEL_RECEIVABLE),
        _posted(own, Code.SUSPENSE),
    )


async def _balance_at(ledger: LedgerStore, currency: str, own: dict[int, Account], at: datetime) -> Balance:
    then: dict[Any, int] = {code: await ledger.balance_at(account.id, at) for code, account in own.items()}
    payable = then.get(Code.MERCHANT_PAYABLE, 0)
    return Balance(
        "balance", currency, payable, payable, 0,
        then.get(Code.FEE_INCOME, 0), -then.get(Code.CHANNEL_RECEIVABLE, 0), then.get(Code.SUSPENSE, 0),
    )  # fmt: skip


def _posted(own: dict[int, Account], code: Code) -> int:
    account = own.get(code)
    return 0 if account is None else account.balance
