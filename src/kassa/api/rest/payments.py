"""Payments and top-ups: one life, two nouns. A payment from a wallet goes the shortest way there is."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from kassa.api.answers import Answers
from kassa.api.decode import BodyDecoder, read_query, refused
from kassa.api.http import Later, Request, Response
from kassa.api.idempotency import require_once
from kassa.api.pages import read_id_cursor, write_cursor
from kassa.api.rest.fields import (
    Amount,
    Channel,
    Currency,
    Description,
    ExpiresIn,
    Filters,
    Listed,
    Metadata,
    Method,
    Nothing,
    OrderId,
    Payer,
    Url,
    WalletName,
)
from kassa.api.route import Answer, Route
from kassa.channels import model as channel_model
from kassa.channels.registry import CHANNELS
from kassa.clock import Clock
from kassa.errors import (
    AttemptInDoubt,
    ChannelNotFound,
    KassaError,
    PaymentNotClosable,
    PaymentNotFound,
    PaymentNotHeld,
    PaymentNotPayable,
    PaymentOrderExists,
    TopupNotFound,
    Unexpected,
    WalletInsufficientFunds,
    WalletNotFound,
)
from kassa.ids import Id, new_id, read_id
from kassa.journal.change import Committed, OnceKey, Verdict
from kassa.journal.journal import Journal
from kassa.merchants.model import Caller, Scope
from kassa.money.currencies import CURRENCIES
from kassa.payments import model, render
from kassa.payments.model import Order, Way
from kassa.payments.records import Attempt, Payment
from kassa.payments.render import PaymentView, TopupView
from kassa.payments.service import Payments
from kassa.payments.timeline import Entry, Timeline

EXPIRES_S = 900
"""A quarter of an hour, unless the merchant says otherwise."""

_encode = msgspec.json.Encoder().encode
_EMPTY = "{}"


class CreatePayment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """An order to be paid."""

    order_id: OrderId
    amount: Amount
    currency: Currency
    channel: Channel
    method: Method | None = None
    """How the payer meets the channel; not needed for channel wallet."""
    description: Description = ""
    expires_in_s: ExpiresIn = EXPIRES_S
    return_url: Url | None = None
    """Where the payer goes back to, where the channel does that."""
    metadata: Metadata = {}
    payer: Payer | None = None


class CreateTopup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """Money from a channel into a wallet."""

    order_id: OrderId
    wallet: WalletName
    amount: Amount
    currency: Currency
    channel: Channel
    method: Method | None = None
    description: Description = ""
    expires_in_s: ExpiresIn = EXPIRES_S
    return_url: Url | None = None
    metadata: Metadata = {}
    payer: Payer | None = None


class CreateAttempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """Another way to pay the same order."""

    channel: Channel
    method: Method
    payer: Payer | None = None


class Resolve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A person's decision about money that came late."""

    decision: Literal["accept", "refund"]
    reason: Annotated[str, Meta(min_length=1, max_length=200, description="Why; kept for ever")]


class Story(msgspec.Struct, frozen=True):
    """What happened to it, in order."""

    data: list[Entry]


class PaymentReads(Protocol):
    """What lists need of the store."""

    async def payments(
        self,
        home: int,
        kind: str,
        *,
        before: Id | None,
        limit: int,
        order_id: str | None,
        state: str | None,
        created_from: datetime | None,
        created_to: datetime | None,
    ) -> list[tuple[Payment, tuple[Attempt, ...]]]: ...


class PaymentRoutes:
    """The handlers."""

    def __init__(
        self,
        journal: Journal,
        payments: Payments,
        store: PaymentReads,
        timeline: Timeline,
        answers: Answers,
        clock: Clock,
    ) -> None:
        self._journal = journal
        self._payments = payments
        self._store = store
        self._timeline = timeline
        self._answers = answers
        self._clock = clock
        self._create = BodyDecoder(CreatePayment)
        self._topup = BodyDecoder(CreateTopup)
        self._attempt = BodyDecoder(CreateAttempt)
        self._nothing = BodyDecoder(Nothing)
        self._resolve = BodyDecoder(Resolve)

    # Create

    def create(self, request: Request, caller: Caller) -> "Awaitable[Response]":
        """A payment. From a wallet: one look at the body, one change, one answer, and nothing is awaited in between."""
        body = self._create(request)
        return self.take(request, caller, body, require_once(request, body))

    def take(self, request: Request, caller: Caller, body: CreatePayment, once: OnceKey) -> "Awaitable[Response]":
        """A payment whose body was read: also what comes over a queue goes through here."""
        if body.channel != "wallet":
            _check_way(body.channel, body.method, body.payer, body.currency)
        order = _order(body, _payer_wallet(body))
        if body.channel != "wallet":
            return self._through_channel(request, caller, order, once)
        change = model.wallet_payment(order, caller.merchant, new_id(), self._clock.now(), once)
        answer = Later()
        self._journal.hand_in(change, partial(self._paid, answer, request, caller, order, once))
        return answer

    def _paid(
        self,
        answer: Later,
        request: Request,
        caller: Caller,
        order: Order,
        once: OnceKey,
        verdict: Verdict | KassaError,
    ) -> None:
        if type(verdict) is Committed:
            answer.give(Response(201, verdict.result))
            return
        if isinstance(verdict, KassaError):
            answer.give(verdict)
            return
        # Nothing of it happened. The long way asks again, and knows what to say to a repeat or a refusal.
        asyncio.ensure_future(self._through_channel(request, caller, order, once)).add_done_callback(
            partial(_hand_on, answer)
        )

    async def _through_channel(self, request: Request, caller: Caller, order: Order, once: OnceKey) -> Response:
        return await self._answers.answer(
            request,
            caller,
            once,
            lambda wait_s: self._payments.create(caller.merchant, order, once, wait_s=wait_s),
            path="/v1/payments/",
            look=self._look(caller, "payment"),
        )

    async def create_topup(self, request: Request, caller: Caller) -> Response:
        """A top-up."""
        body = self._topup(request)
        once = require_once(request, body)
        if body.channel == "wallet":
            raise refused("channel", "cannot be wallet: a top-up brings money in")
        _check_way(body.channel, body.method, body.payer, body.currency)
        order = _order(body, _wallet_id(body.wallet))
        return await self._answers.answer(
            request,
            caller,
            once,
            lambda wait_s: self._payments.topup(caller.merchant, order, once, wait_s=wait_s),
            path="/v1/topups/",
            look=self._look(caller, "topup"),
        )

    # Read

    async def get(self, request: Request, caller: Caller, kind: str) -> Response:
        """One payment or top-up as it stands."""
        found = await self._payments.get_payment(caller.merchant.home, _read_name(request, kind), kind=kind)
        return Response(200, found.body)

    async def page(self, request: Request, caller: Caller, kind: str) -> Response:
        """A page of payments or top-ups, newest first."""
        query = read_query(request, Filters)
        found = await self._store.payments(
            caller.merchant.home,
            kind,
            before=read_id_cursor(query.cursor),
            limit=query.limit,
            order_id=query.order_id,
            state=query.state,
            created_from=query.created_from,
            created_to=query.created_to,
        )
        views = [render.payment_view(payment, attempts) for payment, attempts in found]
        following = write_cursor(found[-1][0].id) if len(found) == query.limit else None
        return Response(200, _encode(Listed(views, following)))

    async def timeline(self, request: Request, caller: Caller, kind: str) -> Response:
        """The whole story of one payment or top-up, in order."""
        home, payment_id = caller.merchant.home, _read_name(request, kind)
        await self._payments.get_payment(home, payment_id, kind=kind)
        return Response(200, _encode(Story(await self._timeline.of(home, payment_id) or [])))

    # Change

    async def add_attempt(self, request: Request, caller: Caller, kind: str) -> Response:
        """Another way to pay the same order."""
        body = self._attempt(request)
        once = require_once(request, body)
        payment_id = _read_name(request, kind)
        if body.channel == "wallet":
            raise refused("channel", "cannot be wallet: a payment from a wallet is made with one request of its own")
        _check_way(body.channel, body.method, body.payer, None)
        payer = body.payer or Payer()
        way = Way(channel=body.channel, method=body.method, openid=payer.openid, payer_ip=payer.ip)
        return await self._answers.answer(
            request,
            caller,
            once,
            lambda wait_s: self._payments.add_attempt(caller.merchant, payment_id, way, once, kind=kind, wait_s=wait_s),
            path=_path(kind),
            look=self._look(caller, kind),
        )

    async def close(self, request: Request, caller: Caller, kind: str) -> Response:
        """No money is wanted any more."""
        body = self._nothing.optional(request)
        once = require_once(request, body)
        payment_id = _read_name(request, kind)
        return await self._answers.answer(
            request,
            caller,
            once,
            lambda wait_s: self._payments.close(caller.merchant, payment_id, once, kind=kind, wait_s=wait_s),
            path=_path(kind),
            look=self._look(caller, kind),
        )

    async def resolve(self, request: Request, caller: Caller, kind: str) -> Response:
        """A person's decision about held money."""
        body = self._resolve(request)
        once = require_once(request, body)
        payment_id = _read_name(request, kind)
        return await self._answers.answer(
            request,
            caller,
            once,
            lambda wait_s: self._payments.resolve(
                caller.merchant, payment_id, body.decision, body.reason, once, kind=kind
            ),
            path=_path(kind),
            look=self._look(caller, kind),
        )

    def _look(self, caller: Caller, kind: str) -> Callable[[str], Any]:
        home = caller.merchant.home

        async def look(name: str) -> Any:
            return await self._payments.get_payment(home, _inner(name, kind), kind=kind)

        return look

    def routes(self) -> list[Route]:
        """All routes of both nouns."""
        return [*self._own_routes(), *self._shared_routes("payment"), *self._shared_routes("topup")]

    def _own_routes(self) -> list[Route]:
        return [
            Route(
                "POST", "/v1/payments", "Take a payment.", self.create,
                {201: Answer(PaymentView, "Taken; final for channel wallet, else what the payer needs is in next_action"),
                 202: Answer(PaymentView, "Taken, and not final yet, as Prefer asked")},
                Scope.PAYMENTS, body=CreatePayment, is_keyed=True, needs_key=True, prefers=True,
                problems=(PaymentOrderExists, WalletInsufficientFunds, WalletNotFound, ChannelNotFound,
                          PaymentNotFound),
                example={"order_id": "123456", "amount": 100, "currency": "CNY", "channel": "wechat",
                         "method": "native", "description": "Two coffees", "metadata": {"table": "7"}},
            ),
            Route(
                "POST", "/v1/topups", "Bring money into a wallet.", self.create_topup,
                {201: Answer(TopupView, "Taken"), 202: Answer(TopupView, "Taken, and not final yet, as Prefer asked")},
                Scope.WALLETS, body=CreateTopup, is_keyed=True, needs_key=True, prefers=True,
                problems=(PaymentOrderExists, WalletNotFound, ChannelNotFound, TopupNotFound, PaymentNotFound),
                example={"order_id": "t-1", "wallet": "wal_01932b6f0c5a7d3e8f104b5c6d7e8f90", "amount": 5000,
                         "currency": "CNY", "channel": "wechat", "method": "native"},
            ),
        ]  # fmt: skip

    def _shared_routes(self, kind: str) -> list[Route]:
        path = _path(kind)
        view, listed, noun, scope, missing = _NOUNS[kind]
        one = {200: Answer(view, f"The {noun}")}
        later = {202: Answer(view, "Taken, and not final yet, as Prefer asked")}
        return [
            Route("GET", path[:-1], f"The {noun}s, newest first.", partial(self.page, kind=kind),
                  {200: Answer(listed, "A page")}, Scope.READ | scope, query=Filters),
            Route("GET", path + "{id}", f"One {noun} as it stands.", partial(self.get, kind=kind),
                  one, Scope.READ | scope, problems=(missing,)),
            Route("GET", path + "{id}/timeline", "The whole story, in order.", partial(self.timeline, kind=kind),
                  {200: Answer(Story, "What happened")}, Scope.READ | scope, problems=(missing,)),
            Route("POST", path + "{id}/close", f"Give up a {noun} that is not paid.", partial(self.close, kind=kind),
                  one | later, scope, body=Nothing, is_keyed=True, needs_key=True, prefers=True,
                  problems=(missing, PaymentNotClosable, PaymentNotFound, ChannelNotFound), example={}),
            Route("POST", path + "{id}/attempts", "Pay the same order another way.",
                  partial(self.add_attempt, kind=kind), {201: Answer(view, f"The {noun} with its new attempt")} | later,
                  scope, body=CreateAttempt, is_keyed=True, needs_key=True, prefers=True,
                  problems=(missing, PaymentNotPayable, AttemptInDoubt, ChannelNotFound, PaymentNotFound),
                  example={"channel": "wechat", "method": "h5", "payer": {"ip": "203.0.113.7"}}),
            Route("POST", path + "{id}/resolve", "Decide about held money: late, or paid twice.",
                  partial(self.resolve, kind=kind), one | later, scope, body=Resolve, is_keyed=True, needs_key=True,
                  prefers=True, problems=(missing, PaymentNotHeld, PaymentNotFound),
                  example={"decision": "accept", "reason": "The goods were sent anyway."}),
        ]  # fmt: skip


_NOUNS: dict[str, tuple[Any, Any, str, Scope, type[KassaError]]] = {
    "payment": (PaymentView, Listed[PaymentView], "payment", Scope.PAYMENTS, PaymentNotFound),
    "topup": (TopupView, Listed[TopupView], "top-up", Scope.WALLETS, TopupNotFound),
}


def _hand_on(answer: Later, done: "asyncio.Future[Response]") -> None:
    if done.cancelled():
        answer.give(Unexpected("The server stopped before the answer was known."))
    else:
        answer.give(done.exception() or done.result())


def _path(kind: str) -> str:
    return "/v1/payments/" if kind == "payment" else "/v1/topups/"


def _read_name(request: Request, kind: str) -> Id:
    """The id in the path. Raises PaymentNotFound or TopupNotFound for what cannot be one."""
    return _inner(request.params["id"], kind)


def _inner(name: str, kind: str) -> Id:
    inner = read_id("pay_" if kind == "payment" else "top_", name)
    if inner is None:
        raise model.not_found(kind)
    return inner


def _wallet_id(name: str) -> Id:
    return Id(name[4:])


def _payer_wallet(body: CreatePayment) -> Id | None:
    """The wallet that pays. Raises RequestInvalid where it is missing or has no business here."""
    wallet = None if body.payer is None else body.payer.wallet
    if body.channel != "wallet":
        if wallet is not None:
            raise refused("payer.wallet", "is only for channel wallet")
        return None
    if body.method not in (None, "wallet"):
        raise refused("method", "is not needed for channel wallet")
    if wallet is None:
        raise refused("payer.wallet", "is required for channel wallet")
    _check_currency(body.currency)
    return _wallet_id(wallet)


def _order(body: CreatePayment | CreateTopup, wallet: Id | None) -> Order:
    payer = body.payer
    return Order(
        order_id=body.order_id,
        amount=body.amount,
        currency=body.currency,
        channel=body.channel,
        method=body.method or "wallet",
        description=body.description,
        metadata=_encode(body.metadata).decode() if body.metadata else _EMPTY,
        expires_in_s=body.expires_in_s,
        return_url=body.return_url,
        wallet=wallet,
        openid=None if payer is None else payer.openid,
        payer_ip=None if payer is None else payer.ip,
    )


def _check_currency(currency: str) -> None:
    if currency not in CURRENCIES:
        raise refused("currency", "is not an ISO 4217 currency")


def _check_way(channel: str, method: str | None, payer: Payer | None, currency: str | None) -> None:
    """What is asked of a channel must make sense for it. Raises RequestInvalid, which names the first wrong field."""
    kind = CHANNELS.get(channel)
    if kind is None:
        raise refused("channel", "must be one of " + ", ".join(["wallet", *CHANNELS]))
    if currency is not None:
        _check_currency(currency)
        if currency not in kind.currencies:
            raise refused("currency", f"must be {' or '.join(sorted(kind.currencies))} for channel {channel}")
    methods = sorted(known.value for known in kind.methods)
    if method is None:
        raise refused("method", "is required; one of " + ", ".join(methods))
    if method not in methods:
        raise refused("method", "must be one of " + ", ".join(methods))
    if method == channel_model.Method.JSAPI.value and (payer is None or payer.openid is None):
        raise refused("payer.openid", "is required for method jsapi")
    if method == channel_model.Method.H5.value and (payer is None or payer.ip is None):
        raise refused("payer.ip", "is required for method h5")
