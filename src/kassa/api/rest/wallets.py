"""Users' wallets."""

from typing import Protocol

import msgspec

from kassa.api.decode import BodyDecoder, read_query, refused
from kassa.api.http import Request, Response, problem_response
from kassa.api.idempotency import REPLAYED, optional_once, refuse
from kassa.api.problem import CONTENT_TYPE as PROBLEM
from kassa.api.rest.balances import Roots, statement_page
from kassa.api.rest.fields import Currency, Line, Listed, Page, User
from kassa.api.route import Answer, Route
from kassa.errors import KassaError, WalletExists, WalletNotFound
from kassa.ids import Id, read_id
from kassa.journal.journal import Journal
from kassa.ledger import chart
from kassa.ledger.store import LedgerStore
from kassa.merchants.model import Caller, Scope
from kassa.money.currencies import CURRENCIES
from kassa.payments.render import WalletView
from kassa.payments.service import Payments, Reads


class CreateWallet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A wallet for a user; one per currency."""

    user: User
    currency: Currency


class WalletStatementQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which page of the statement."""


class WalletReads(Reads, Roots, Protocol):
    """What the routes need of the store."""


class WalletRoutes:
    """The handlers."""

    def __init__(self, journal: Journal, payments: Payments, store: WalletReads, ledger: LedgerStore) -> None:
        self._journal = journal
        self._payments = payments
        self._store = store
        self._ledger = ledger
        self._create = BodyDecoder(CreateWallet)

    async def create(self, request: Request, caller: Caller) -> Response:
        """A wallet. It moves no money, so it may be made without an Idempotency-Key."""
        body = self._create(request)
        if body.currency not in CURRENCIES:
            raise refused("currency", "is not an ISO 4217 currency")
        once = optional_once(request, body)
        try:
            found = await self._payments.create_wallet(caller.merchant, body.user, body.currency, once)
        except KassaError as error:
            if once is None:
                return problem_response(error, request)
            return await refuse(self._journal, caller.merchant.home, once, error, request)
        if found.problem:
            return Response(found.status, found.body, REPLAYED, PROBLEM)
        return Response(found.status, found.body, REPLAYED if found.replayed else ())

    async def get(self, request: Request, caller: Caller) -> Response:
        """One wallet with its money."""
        return Response(200, (await self._payments.get_wallet(caller.merchant.home, _read_name(request))).body)

    async def statement(self, request: Request, caller: Caller) -> Response:
        """What happened to the wallet's money."""
        query = read_query(request, WalletStatementQuery)
        home = caller.merchant.home
        found = await self._store.wallet(home, _read_name(request))
        if found is None:
            raise WalletNotFound
        wallet, _ = found
        account = await self._ledger.account(chart.wallet(home, wallet.id, wallet.currency))
        return await statement_page(self._ledger, self._store, account, query.cursor, query.limit)

    def routes(self) -> list[Route]:
        """All routes of the noun."""
        reading = Scope.READ | Scope.WALLETS
        return [
            Route("POST", "/v1/wallets", "Open a wallet for a user.", self.create,
                  {201: Answer(WalletView, "Opened")}, Scope.WALLETS, body=CreateWallet, is_keyed=True,
                  problems=(WalletExists, WalletNotFound), example={"user": "u-77", "currency": "CNY"}),
            Route("GET", "/v1/wallets/{id}", "One wallet with its money.", self.get,
                  {200: Answer(WalletView, "The wallet")}, reading, problems=(WalletNotFound,)),
            Route("GET", "/v1/wallets/{id}/statement", "What happened to the wallet's money, newest first.",
                  self.statement, {200: Answer(Listed[Line], "A page of lines")}, reading, query=WalletStatementQuery,
                  problems=(WalletNotFound,)),
        ]  # fmt: skip


def _read_name(request: Request) -> Id:
    wallet_id = read_id("wal_", request.params["id"])
    if wallet_id is None:
        raise WalletNotFound
    return wallet_id
