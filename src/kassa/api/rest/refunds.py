"""Refunds of payments and top-ups."""

from datetime import datetime
from functools import partial
from typing import Any, Protocol

import msgspec

from kassa.api.answers import Answers
from kassa.api.decode import BodyDecoder, read_query, refused
from kassa.api.http import Request, Response
from kassa.api.idempotency import require_once
from kassa.api.pages import read_id_cursor, write_cursor
from kassa.api.rest.fields import Amount, Filters, Listed, Metadata, OrderId, Reason
from kassa.api.route import Answer, Route
from kassa.errors import (
    ChannelNotFound,
    PaymentNotFound,
    RefundExceedsPaid,
    RefundIdExists,
    RefundInsufficientBalance,
    RefundNotFound,
    RefundNotRefundable,
    TopupNotFound,
    WalletInsufficientFunds,
)
from kassa.ids import Id, new_id, read_id
from kassa.journal.change import OnceKey
from kassa.merchants.model import Caller, Scope
from kassa.payments import model, render
from kassa.payments.records import Payment, Refund
from kassa.payments.refunds import Ask
from kassa.payments.render import RefundView
from kassa.payments.service import Payments

_encode = msgspec.json.Encoder().encode


class CreateRefund(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Money to be given back."""

    refund_id: OrderId
    amount: Amount | None = None
    """Left out: all that is left."""
    reason: Reason | None = None
    metadata: Metadata = {}


class RefundFilters(Filters, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A list of refunds that can be narrowed."""

    payment: str | None = None
    """Of this payment or top-up only."""


class RefundReads(Protocol):
    """What lists need of the store."""

    async def refunds(
        self,
        home: int,
        *,
        payment: Id | None,
        before: Id | None,
        limit: int,
        order_id: str | None,
        state: str | None,
        created_from: datetime | None,
        created_to: datetime | None,
    ) -> list[tuple[Refund, Payment]]: ...


class RefundRoutes:
    """The handlers."""

    def __init__(self, payments: Payments, store: RefundReads, answers: Answers) -> None:
        self._payments = payments
        self._store = store
        self._answers = answers
        self._create = BodyDecoder(CreateRefund)

    async def create(self, request: Request, caller: Caller, kind: str) -> Response:
        """A refund of a payment or top-up."""
        body = self._create(request)
        once = require_once(request, body)
        payment_id = read_id("pay_" if kind == "payment" else "top_", request.params["id"])
        if payment_id is None:
            raise model.not_found(kind)
        return await self.take(request, caller, payment_id, body, once, kind=kind)

    async def take(
        self, request: Request, caller: Caller, payment_id: Id, body: CreateRefund, once: OnceKey, *, kind: str
    ) -> Response:
        """A refund whose body was read: also what comes over a queue goes through here."""
        ask = Ask(
            id=new_id(),
            refund_id=body.refund_id,
            amount=body.amount,
            reason=body.reason,
            metadata=_encode(body.metadata).decode(),
            kind=kind,
        )
        return await self._answers.answer(
            request,
            caller,
            once,
            lambda wait_s: self._payments.refund(caller.merchant, payment_id, ask, once, wait_s=wait_s),
            path="/v1/refunds/",
            look=partial(self._look, caller.merchant.home),
        )

    async def get(self, request: Request, caller: Caller) -> Response:
        """One refund as it stands."""
        refund_id = read_id("rfd_", request.params["id"])
        if refund_id is None:
            raise RefundNotFound
        return Response(200, (await self._payments.get_refund(caller.merchant.home, refund_id)).body)

    async def page(self, request: Request, caller: Caller) -> Response:
        """A page of refunds, newest first."""
        query = read_query(request, RefundFilters)
        payment: Id | None = None
        if query.payment is not None:
            payment = read_id("pay_", query.payment) or read_id("top_", query.payment)
            if payment is None:
                raise refused("payment", "is not the id of a payment or top-up")
        found = await self._store.refunds(
            caller.merchant.home,
            payment=payment,
            before=read_id_cursor(query.cursor),
            limit=query.limit,
            order_id=query.order_id,
            state=query.state,
            created_from=query.created_from,
            created_to=query.created_to,
        )
        views = [render.refund_view(refund, render.payment_name(payment)) for refund, payment in found]
        following = write_cursor(found[-1][0].id) if len(found) == query.limit else None
        return Response(200, _encode(Listed(views, following)))

    async def _look(self, home: int, name: str) -> Any:
        return await self._payments.get_refund(home, Id(name.removeprefix("rfd_")))

    def routes(self) -> list[Route]:
        """All routes of the noun."""
        answers = {
            201: Answer(RefundView, "Taken; its money is reserved"),
            202: Answer(RefundView, "Taken, and not final yet, as Prefer asked"),
        }
        problems = (
            PaymentNotFound, RefundNotFound, RefundExceedsPaid, RefundNotRefundable, RefundIdExists,
            RefundInsufficientBalance, WalletInsufficientFunds, ChannelNotFound,
        )  # fmt: skip
        example = {"amount": 30, "refund_id": "r-1", "reason": "cold coffee"}
        return [
            Route("POST", "/v1/payments/{id}/refunds", "Give money of a payment back.",
                  partial(self.create, kind="payment"), answers, Scope.REFUNDS, body=CreateRefund, is_keyed=True,
                  needs_key=True, prefers=True, problems=problems, example=example),
            Route("POST", "/v1/topups/{id}/refunds", "Give money of a top-up back, out of its wallet.",
                  partial(self.create, kind="topup"), answers, Scope.REFUNDS, body=CreateRefund, is_keyed=True,
                  needs_key=True, prefers=True, problems=(*problems, TopupNotFound), example=example),
            Route("GET", "/v1/refunds", "The refunds, newest first.", self.page,
                  {200: Answer(Listed[RefundView], "A page")}, Scope.READ | Scope.REFUNDS, query=RefundFilters),
            Route("GET", "/v1/refunds/{id}", "One refund as it stands.", self.get,
                  {200: Answer(RefundView, "The refund")}, Scope.READ | Scope.REFUNDS, problems=(RefundNotFound,)),
        ]  # fmt: skip
