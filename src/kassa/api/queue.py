"""Requests that come over a queue: the same types, checks, services and problem documents as those of the REST API.

Here a record becomes a request, and what the REST API would answer becomes a message to `reply_to`. The answer is in the
same commit as what it tells of (`AnsweringJournal`), so it is as durable as the payment itself.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import structlog
from msgspec import Meta

from kassa.api.answers import Answers
from kassa.api.decode import BodyDecoder, refused
from kassa.api.http import Request, Response, problem_response
from kassa.api.idempotency import digest
from kassa.api.problem import CONTENT_TYPE as PROBLEM
from kassa.api.rest.fields import Channel, Currency, OrderId
from kassa.api.rest.payments import CreatePayment, PaymentRoutes
from kassa.api.rest.refunds import CreateRefund, RefundRoutes
from kassa.app import App
from kassa.errors import (
    KassaError,
    PaymentNotFound,
    RefundNotFound,
    RequestTooLarge,
    Retry,
    SettingInvalid,
)
from kassa.ids import Id, read_id
from kassa.journal.change import Change, Committed, Message, MessageDone, OnceKey, Verdict
from kassa.journal.journal import Journal, Written, tell
from kassa.journal.replies import FirstStatuses
from kassa.journal.table import Tables
from kassa.merchants.model import ALL_SCOPES, Caller
from kassa.merchants.orders import merchant_of_orders
from kassa.merchants.store import MerchantStore
from kassa.messaging import replies
from kassa.messaging.model import Record
from kassa.messaging.packing import UNREADABLE
from kassa.messaging.replies import Address
from kassa.payments.service import Payments

log = structlog.get_logger("kassa.api.queue")

OPERATION = "queue"
"""A space of keys of its own: an Idempotency-Key of the REST API never meets an order_id of the queue."""
ACTIONS = ("pay", "refund", "query", "close")
OWED_AFTER = timedelta(seconds=5)
"""Beyond the time that a channel gets: then whoever asked it has died, and somebody else gives the answer."""
MERCHANT_S = 1.0
"""A merchant's policies are read again after so long."""

PaymentName = Annotated[str, Meta(pattern="^pay_[0-9a-f]{32}$", examples=["pay_01932b6f0c5a7d3e8f104b5c6d7e8f90"])]
RefundName = Annotated[str, Meta(pattern="^rfd_[0-9a-f]{32}$", examples=["rfd_01932b6f0c5a7d3e8f104b5c6d7e8f91"])]


class PayOrder(CreatePayment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A payment. What is not given is as the settings of the queue say; `order_id` is the idempotency key."""

    action: Literal["pay"] = "pay"
    currency: Currency | None = None  # type: ignore[assignment]
    channel: Channel | None = None  # type: ignore[assignment]


class RefundOrder(CreateRefund, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Money of a payment given back; `refund_id` is the idempotency key."""

    action: Literal["refund"]
    payment: PaymentName | None = None
    """The payment's id; or else `order_id`."""
    order_id: OrderId | None = None


class QueryOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a payment or a refund stands. One of the three."""

    action: Literal["query"]
    payment: PaymentName | None = None
    order_id: OrderId | None = None
    refund: RefundName | None = None
    """The refund's id."""


class CloseOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No money is wanted any more. One of the two."""

    action: Literal["close"]
    payment: PaymentName | None = None
    order_id: OrderId | None = None


QueueOrder = PayOrder | RefundOrder | QueryOrder | CloseOrder


class _Peek(msgspec.Struct, frozen=True):
    action: str = "pay"


class _ProblemHead(msgspec.Struct, frozen=True):
    code: str
    detail: str
    retryable: bool


_peek = msgspec.json.Decoder(_Peek).decode
_read_problem = msgspec.json.Decoder(_ProblemHead).decode
_READERS: dict[str, BodyDecoder[Any]] = {
    "pay": BodyDecoder(PayOrder),
    "refund": BodyDecoder(RefundOrder),
    "query": BodyDecoder(QueryOrder),
    "close": BodyDecoder(CloseOrder),
}


def read_order(body: bytes) -> QueueOrder:
    """What a record asks for. Raises RequestInvalid, as the REST API would."""
    try:
        action = _peek(body).action
    except msgspec.ValidationError as error:
        if "`$.action`" in str(error):
            raise refused("action", f"must be one of {', '.join(ACTIONS)}") from None
        action = "pay"
    except UNREADABLE:
        # The real reader says what is wrong with it.
        action = "pay"
    if action not in _READERS:
        raise refused("action", f"must be one of {', '.join(ACTIONS)}")
    order: QueueOrder = _READERS[action].read(body)
    return order


# Answers that are part of what they tell of


class Letter:
    """The answer to one request, on its way into a commit."""

    def __init__(self, address: Address, noun: str, owed_at: datetime) -> None:
        self.address = address
        self.owed: Message | None = None
        """Committed: an answer that somebody gives if we die."""
        self.is_written = False
        """Whether the whole answer is committed."""
        self._noun = noun
        self._owed_at = owed_at

    def in_change(self, change: Change) -> tuple[Change, Message]:
        """The change with the answer in it: whole where it is known, else owed."""
        message = self._message(change)
        return msgspec.structs.replace(change, messages=(*change.messages, message)), message

    def committed(self, message: Message, judged: "asyncio.Future[Verdict]") -> None:
        """Called when the journal has judged it."""
        if judged.cancelled() or judged.exception() is not None or not isinstance(judged.result(), Committed):
            return
        if message.body:
            self.is_written = True
        else:
            self.owed = message

    def _message(self, change: Change) -> Message:
        said = change.reply
        if said is not None and said.problem is not None:
            return replies.reply(self.address, said.status, said.problem)
        status = 200 if said is None else said.status
        if isinstance(change.result, bytes):
            return replies.reply(self.address, status, change.result)
        resource = None if said is None else said.resource
        return replies.owed(self.address, status, self._noun, resource or Id(""), self._owed_at)


class AnsweringJournal:
    """A journal in whose commits the answers are. Which change is a request's is told by its idempotency key."""

    def __init__(self, journal: Journal) -> None:
        self.tables: Tables = journal.tables
        self._journal = journal
        self._letters: dict[OnceKey, Letter] = {}

    def answer_with(self, once: OnceKey, letter: Letter) -> None:
        """The change with this key carries this letter."""
        self._letters[once] = letter

    def forget(self, once: OnceKey) -> None:
        """The request is over."""
        self._letters.pop(once, None)

    def submit(self, change: Change) -> "asyncio.Future[Verdict]":
        letter = None if change.once is None else self._letters.get(change.once)
        if letter is None:
            return self._journal.submit(change)
        with_answer, message = letter.in_change(change)
        judged = self._journal.submit(with_answer)
        judged.add_done_callback(partial(letter.committed, message))
        return judged

    def hand_in(self, change: Change, told: Callable[[Verdict | KassaError], None]) -> None:
        tell(self.submit(change), told)

    async def commit(self, change: Change) -> Verdict:
        return await self.submit(change)

    def on_commit(self, listener: Callable[[Written], None]) -> None:
        self._journal.on_commit(listener)


# The door


class MerchantUnclear(Exception):
    """Nobody can say at the moment whose payments the requests are. Nothing is wrong with them, and none of them is done."""


class Handled(NamedTuple):
    """What has become of a request, once that is durable."""

    problem: str | None = None
    """Refused, and nobody waits for the answer: why."""
    retry: str | None = None
    """Nothing is known to have happened yet, and it may be tried again: why."""
    fault: str | None = None
    """The fault is ours; a repeat may go better, but not for ever."""


class Defaults(NamedTuple):
    """What a request that does not say it means."""

    currency: str
    channel: str
    method: str


class QueueDoor:
    """Answers the requests of one queue. Made of an App that has started; `stop` it before the App."""

    def __init__(self, app: App) -> None:
        settings = app.settings
        self._app = app
        self._merchants = MerchantStore(app.pool)
        self._journal = AnsweringJournal(app.journal)
        self._payments = Payments(
            self._journal, app.payments_store, app.directory, app.runner, app.clock, settings.base_url,
            observe=app.metrics.channel_called,
        )  # fmt: skip
        # A repeat waits for the first request as long as that may take: nobody is told to come again in a second.
        answers = Answers(
            self._journal, FirstStatuses(app.pool), channel_wait_s=settings.channel_wait_s,
            repeat_wait_s=settings.channel_wait_s + 2.0,
        )  # fmt: skip
        self._answers = answers
        self._pay = PaymentRoutes(self._journal, self._payments, app.payments_store, app.timeline, answers, app.clock)
        self._refund = RefundRoutes(self._payments, app.payments_store, answers)
        self._defaults = Defaults(settings.order_currency, settings.order_channel, settings.order_method)
        self._owed_after = timedelta(seconds=settings.channel_wait_s) + OWED_AFTER
        self._known: Caller | None = None
        self._known_at = 0.0
        self._last_of: dict[str, asyncio.Event] = {}

    async def stop(self) -> None:
        """Waits for the conversations with channels that are under way."""
        await self._payments.stop()

    async def look(self) -> None:
        """Whether requests can be done. Raises MerchantUnclear."""
        await self._caller()

    async def handle(self, record: Record, broker: str) -> Handled:
        """Does what a record asks for, and commits the answer. May be given it again: each key has its effect once.

        Raises MerchantUnclear; whatever else it raises is a fault of ours.
        """
        try:
            address = replies.read_address(broker, record)
        except KassaError as error:
            return Handled(problem=str(error))
        request = Request("POST", "/v1/payments", body=record.body)
        try:
            letter, response = await self._answer(request, record, address)
        except KassaError as error:
            if error.retry is not Retry.NEVER:
                return Handled(retry=str(error))
            if error.status >= 500:
                return Handled(fault=str(error))
            letter, response = None, problem_response(error, request)
        return await self._deliver(response, address, letter)

    async def _deliver(self, response: Response, address: Address | None, letter: Letter | None) -> Handled:
        """Makes the answer durable, where the commit of the effect has not done so."""
        said: str | None = None
        if response.content_type == PROBLEM:
            head = _read_problem(response.body)
            said = f"{head.code}: {head.detail}"
            if head.retryable:
                return Handled(retry=said)
        if address is None:
            return Handled(problem=said)
        if letter is None or not letter.is_written:
            done = () if letter is None or letter.owed is None else (MessageDone(letter.owed.id),)
            message = replies.reply(address, response.status, response.body)
            caller = await self._caller()
            # Consumed: the answer that was owed has been taken to be sent already, so this one is not needed.
            await self._app.journal.commit(Change(home=caller.merchant.home, messages=(message,), done=done))
        return Handled()

    async def _answer(
        self, request: Request, record: Record, address: Address | None
    ) -> tuple[Letter | None, Response]:
        if len(record.body) > self._app.settings.body_bytes_max:
            raise RequestTooLarge
        order = read_order(record.body)
        async with self._in_turn(order.order_id):
            caller = await self._caller()
            match order:
                case PayOrder():
                    return await self._take_payment(request, caller, order, address)
                case RefundOrder():
                    return await self._take_refund(request, caller, order, address)
                case CloseOrder():
                    return await self._close(request, caller, order, record, address)
                case QueryOrder():
                    return None, await self._query(caller, order)

    async def _take_payment(
        self, request: Request, caller: Caller, order: PayOrder, address: Address | None
    ) -> tuple[Letter | None, Response]:
        body = _completed(order, self._defaults)
        once = OnceKey(OPERATION, f"pay:{body.order_id}", digest(request, body))
        async with self._answering(once, address, "payment") as letter:
            return letter, await self._pay.take(request, caller, body, once)

    async def _take_refund(
        self, request: Request, caller: Caller, order: RefundOrder, address: Address | None
    ) -> tuple[Letter | None, Response]:
        payment = await self._payment_id(caller, order.payment, order.order_id)
        body = msgspec.structs.replace(order, payment=f"pay_{payment}", order_id=None)
        once = OnceKey(OPERATION, f"refund:{body.refund_id}", digest(request, body))
        async with self._answering(once, address, "refund") as letter:
            return letter, await self._refund.take(request, caller, payment, body, once, kind="payment")

    async def _close(
        self, request: Request, caller: Caller, order: CloseOrder, record: Record, address: Address | None
    ) -> tuple[Letter | None, Response]:
        """Closing what is closed changes nothing, so a refusal is not kept: the next request is judged afresh."""
        payment = await self._payment_id(caller, order.payment, order.order_id)
        once = OnceKey(OPERATION, f"close:{payment}:{record.id}", digest(request, order))
        async with self._answering(once, address, "payment") as letter:
            response = await self._answers.answer(
                request,
                caller,
                None,
                lambda wait_s: self._payments.close(caller.merchant, payment, once, wait_s=wait_s),
                path="/v1/payments/",
                look=lambda name: self._payments.get_payment(caller.merchant.home, payment),
            )
            return letter, response

    async def _query(self, caller: Caller, order: QueryOrder) -> Response:
        home = caller.merchant.home
        if order.refund is not None:
            if order.payment is not None or order.order_id is not None:
                raise refused("refund", "goes without payment and order_id")
            refund = read_id("rfd_", order.refund)
            if refund is None:
                raise RefundNotFound
            return Response(200, (await self._payments.get_refund(home, refund)).body)
        payment = await self._payment_id(caller, order.payment, order.order_id)
        return Response(200, (await self._payments.get_payment(home, payment)).body)

    async def _payment_id(self, caller: Caller, payment: str | None, order_id: str | None) -> Id:
        """Who names a payment in both ways means one payment. Raises PaymentNotFound, RequestInvalid."""
        inner = None if payment is None else read_id("pay_", payment)
        if order_id is None:
            if payment is None:
                raise refused("order_id", "or payment is required")
            if inner is None:
                raise PaymentNotFound
            return inner
        found = await self._app.payments_store.payment_by_order(caller.merchant.home, "payment", order_id)
        if found is None:
            raise PaymentNotFound
        if payment is not None and found[0].id != inner:
            raise refused("order_id", "names another payment than payment does")
        return found[0].id

    @asynccontextmanager
    async def _answering(self, once: OnceKey, address: Address | None, noun: str) -> AsyncIterator[Letter | None]:
        """Inside, the commit that has this key has the answer too."""
        if address is None:
            yield None
            return
        letter = Letter(address, noun, self._app.clock.now() + self._owed_after)
        self._journal.answer_with(once, letter)
        try:
            yield letter
        finally:
            self._journal.forget(once)

    @asynccontextmanager
    async def _in_turn(self, order_id: str | None) -> AsyncIterator[None]:
        """Requests that name the same order go one after the other, in the order in which they came to this process."""
        if order_id is None:
            yield
            return
        before, mine = self._last_of.get(order_id), asyncio.Event()
        self._last_of[order_id] = mine
        try:
            if before is not None:
                await before.wait()
            yield
        finally:
            mine.set()
            if self._last_of.get(order_id) is mine:
                del self._last_of[order_id]

    async def _caller(self) -> Caller:
        """The merchant of the queue. Raises MerchantUnclear."""
        if self._known is None or monotonic() - self._known_at > MERCHANT_S:
            try:
                merchant = await merchant_of_orders(self._merchants, self._app.order_merchant)
            except SettingInvalid as error:
                raise MerchantUnclear(error.detail) from error
            self._known = Caller(merchant, Id(""), int(ALL_SCOPES))
            self._known_at = monotonic()
        return self._known


def _completed(order: PayOrder, defaults: Defaults) -> PayOrder:
    """The request with what the queue's settings add. A method belongs to its channel, so it is added only with it."""
    method = order.method
    if order.channel is None and method is None and defaults.channel != "wallet":
        method = defaults.method
    return msgspec.structs.replace(
        order,
        currency=order.currency or defaults.currency,
        channel=order.channel or defaults.channel,
        method=method,
    )
