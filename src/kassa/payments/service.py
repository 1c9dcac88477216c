"""Composes what is done with payments: intend (a Change), act (the channel, through the runner), record (a Change).

Nothing is sent before its intent is stored, and no database transaction is open while we wait for a channel. A process
that dies in between is found by the attempt's or refund's timer, which asks the channel before it says anything again.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar, cast

import msgspec
import structlog

from kassa.channels.channel import Callbacks, Charges, FreshKeys, KeyRefresh, Nonces, Refunds
from kassa.channels.model import (
    Advice,
    Evidence,
    Nonce,
    Notice,
    NoticeKind,
    NotSent,
    Outcome,
    Request,
    Response,
    Steps,
    Unknown,
)
from kassa.channels.places import Crowded, Places
from kassa.channels.runner import Exchange as Sent
from kassa.clock import Clock
from kassa.errors import (
    ChannelKeyUnknown,
    ChannelMessageInvalid,
    ChannelMismatch,
    ChannelNotFound,
    InvariantBroken,
    KassaError,
    PaymentNotFound,
    RefundNotFound,
    RequestInvalid,
    TopupNotFound,
    WalletNotFound,
)
from kassa.ids import Id, new_id, read_id
from kassa.journal.change import AccountOpen, Again, Aggregate, Change, Claim, Committed, OnceKey, Reply, Rule, Verdict
from kassa.journal.journal import Journal
from kassa.journal.table import Table
from kassa.ledger import chart
from kassa.ledger.model import Account, Limit
from kassa.merchants.records import Merchant
from kassa.payments import model, refunds, render
from kassa.payments.draft import (
    Act,
    Decided,
    News,
    Operation,
)
from kassa.payments.model import Order, Way
from kassa.payments.records import ATTEMPT, PAYMENT, REFUND, Attempt, Exchange, Payment, Refund, Wallet
from kassa.payments.refusals import refusal
from kassa.supervisor import end_tasks

KEYS_APART = timedelta(minutes=1)
STOP_S = 30.0
"""More than any conversation takes whose parties answer."""
ACTS_MAX = 4
"""What one drive says to a channel at most (query, send again, close, query); the timer goes on from there."""

CROWDED = "this merchant has too many requests on their way to the channel"

log = structlog.get_logger("kassa.payments")

Decide = Callable[[Aggregate, datetime], Change | KassaError]


Result = TypeVar("Result")


class Runner(Protocol):
    """The only sender. Tells `trace` of each request when it is over."""

    async def run(
        self, steps: Generator[Request, Response, Result], base_url: str, trace: Callable[[Sent], None]
    ) -> Result | Unknown | NotSent: ...


class Channels(Protocol):
    """Merchants' channels, ready to talk to. Raises ChannelNotFound."""

    async def for_merchant(self, home: int, channel: str) -> tuple[Charges, str]: ...
    def learn(self, home: int, channel: str, fresh: Charges) -> None: ...


class Reads(Protocol):
    """What the service must know of what is stored; the store in PostgreSQL and the memory twin have it."""

    async def payment(self, home: int, payment_id: Id) -> tuple[Payment, tuple[Attempt, ...]] | None: ...
    async def refund(self, home: int, refund_id: Id) -> tuple[Refund, Payment] | None: ...
    async def wallet(self, home: int, wallet_id: Id) -> tuple[Wallet, Account] | None: ...
    async def root_of_attempt(self, home: int, attempt_id: Id) -> Id | None: ...
    async def root_of_refund(self, home: int, refund_id: Id) -> Id | None: ...


class Answer(NamedTuple):
    """What the API says: a status and the object as JSON."""

    status: int
    body: bytes
    name: str = ""
    """The resource's public id, for Location."""
    running: bool = False
    """True: the channel has not answered yet."""
    replayed: bool = False
    problem: bool = False
    """True: `body` is the stored problem document of the first answer."""


class CallbackAnswer(NamedTuple):
    """What the channel is told."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Payments:
    """Payments, top-ups, refunds and wallets."""

    def __init__(
        self,
        journal: Journal,
        store: Reads,
        channels: Channels,
        runner: Runner,
        clock: Clock,
        public_url: str,
        *,
        fresh_id: Callable[[], Id] = new_id,
        chance: Callable[[], float] = random.random,
        observe: Callable[[str, str, str], None] | None = None,
    ) -> None:
        """public_url: where channels reach the callbacks, without a slash at the end.

        fresh_id, chance (0 <= x < 1): passed in, so that a simulation can be repeated from its seed.
        observe: is told of each conversation: channel, operation, and the kind of its outcome.
        """
        self._journal = journal
        self._store = store
        self._channels = channels
        self._runner = runner
        self._clock = clock
        self._public_url = public_url
        self._fresh_id = fresh_id
        self._chance = chance
        self._observe = observe
        self._places = Places()
        self._running: set[asyncio.Task[Decided]] = set()
        self._keys_asked_at: dict[tuple[int, str], datetime] = {}

    async def stop(self) -> None:
        """Waits for the conversations that are under way, but not for ever: the database may be frozen. What is left of them the
        timers find."""
        deadline = time.monotonic() + STOP_S
        while self._running and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._running, timeout=left_s)
        await end_tasks(*self._running)

    # Payments and top-ups

    async def create(self, merchant: Merchant, order: Order, once: OnceKey | None, *, wait_s: float = 8.0) -> Answer:
        """A payment. From a wallet it is final; through a channel we wait `wait_s` for its first answer.

        Raises PaymentOrderExists, WalletInsufficientFunds, WalletNotFound, ChannelNotFound, IdempotencyKeyReused.
        """
        if order.channel == "wallet":
            return await self.pay_from_wallet(merchant, order, once)
        return await self._through_channel(merchant, order, once, "payment", wait_s)

    async def pay_from_wallet(self, merchant: Merchant, order: Order, once: OnceKey | None) -> Answer:
        """A payment from a wallet, final in one commit; reads nothing. The hot path."""
        payment_id = self._fresh_id()
        verdict = await self._journal.submit(model.wallet_payment(order, merchant, payment_id, self._clock.now(), once))
        if type(verdict) is Committed:
            return Answer(201, verdict.result, "pay_" + payment_id)
        return await self._repeat(merchant.home, verdict, self._payment_answer)

    async def topup(self, merchant: Merchant, order: Order, once: OnceKey | None, *, wait_s: float = 8.0) -> Answer:
        """A top-up of `order.wallet`. Raises WalletNotFound, RequestInvalid, and what `create` raises."""
        wallet_id = order.wallet or Id("")
        found = await self._store.wallet(merchant.home, wallet_id)
        if found is None:
            raise WalletNotFound(wallet=render.wallet_name(wallet_id))
        if found[0].currency != order.currency:
            message = f"The wallet holds {found[0].currency}."
            raise RequestInvalid(errors=[{"field": "currency", "message": message}])
        return await self._through_channel(merchant, order, once, "topup", wait_s)

    async def add_attempt(
        self,
        merchant: Merchant,
        payment_id: Id,
        way: Way,
        once: OnceKey | None,
        *,
        kind: str = "payment",
        wait_s: float = 8.0,
    ) -> Answer:
        """Pay the same order another way. Raises PaymentNotPayable, AttemptInDoubt, ChannelNotFound."""
        await self._channels.for_merchant(merchant.home, way.channel)
        attempt_id, notify_url = self._fresh_id(), self._notify_url(way.channel, merchant)

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.add_attempt(aggregate, now, attempt_id=attempt_id, way=way, kind=kind, notify_url=notify_url)

        change = _ruled(merchant.home, payment_id, decide, once=once, reply=Reply(201, payment_id))
        return await self._intend(merchant.home, change, 201, wait_s)

    async def close(
        self, merchant: Merchant, payment_id: Id, once: OnceKey | None, *, kind: str = "payment", wait_s: float = 8.0
    ) -> Answer:
        """No money is wanted any more. Raises PaymentNotClosable when it has come already, PaymentNotFound."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.close(aggregate, now, kind=kind)

        change = _ruled(merchant.home, payment_id, decide, once=once, reply=Reply(200, payment_id))
        verdict = await self._journal.commit(change)
        if not isinstance(verdict, Committed):
            return await self._repeat(merchant.home, verdict, self._payment_answer)
        decided = cast(Decided, verdict.result)
        if decided.payment.state != "closing":
            return _payment_answered(200, decided, running=False)
        return await self._wait_for(self._drive_all(decided), decided, 200, wait_s)

    async def resolve(
        self,
        merchant: Merchant,
        payment_id: Id,
        decision: str,
        reason: str,
        once: OnceKey | None,
        *,
        kind: str = "payment",
    ) -> Answer:
        """A person decides about held money, late or paid twice: `accept` or `refund`.

        Raises PaymentNotHeld, PaymentNotFound.
        """
        spare, exchange_id = self._fresh_id(), self._fresh_id()

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.resolve(
                aggregate, now, kind=kind, decision=decision, reason=reason, spare=spare, exchange_id=exchange_id
            )

        reply = Reply(200, payment_id)
        change = _ruled(merchant.home, payment_id, decide, once=once, reply=reply, children=(ATTEMPT, REFUND))
        return await self._intend(merchant.home, change, 200, 0.0)

    # Refunds

    async def refund(
        self,
        merchant: Merchant,
        payment_id: Id,
        request: refunds.Ask,
        once: OnceKey | None,
        *,
        wait_s: float = 8.0,
    ) -> Answer:
        """Give money back. Raises RefundExceedsPaid, RefundNotRefundable, RefundIdExists, RefundInsufficientBalance."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return _with_overdraft(merchant, aggregate, refunds.ask(aggregate, now, request))

        change = _ruled(
            merchant.home,
            payment_id,
            decide,
            once=once,
            reply=Reply(201, request.id),
            claims=(Claim("refund", request.refund_id, request.id),),
        )
        verdict = await self._journal.commit(change)
        if not isinstance(verdict, Committed):
            return await self._repeat(merchant.home, verdict, self._refund_answer)
        decided = cast(Decided, verdict.result)
        if decided.act is None:
            return _refund_answered(decided, running=False)
        return await self._wait_for(self._go_on(decided), decided, 201, wait_s)

    async def cancel_refund(self, home: int, payment_id: Id, refund_id: Id) -> Refund:
        """Take back a refund that the channel has never got. Raises RefundNotRefundable, RefundNotFound."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return refunds.cancel(aggregate, now, refund_id=refund_id)

        decided = await self._decide(_ruled(home, payment_id, decide, children=(ATTEMPT, REFUND)))
        if decided.refund is None:
            raise RefundNotFound
        return decided.refund

    # Wallets

    async def create_wallet(self, merchant: Merchant, user: str, currency: str, once: OnceKey | None) -> Answer:
        """A wallet for a user. Raises WalletExists."""
        wallet_id = self._fresh_id()
        change = model.new_wallet(merchant, wallet_id, user, currency, self._clock.now(), once)
        verdict = await self._journal.commit(change)
        if isinstance(verdict, Committed):
            return Answer(201, verdict.result, render.wallet_name(wallet_id))
        return await self._repeat(merchant.home, verdict, self._wallet_answer)

    # What channels tell us

    async def handle_callback(
        self, home: int, channel_name: str, headers: Mapping[str, str], body: bytes
    ) -> CallbackAnswer:
        """Verify, commit, then answer. «Taken» is said only after the commit, and only to what fits our records.

        Raises ChannelNotFound; what the database raises goes through, and the channel sends its callback again.
        """
        channel, _ = await self._channels.for_merchant(home, channel_name)
        if not _is_called_back(channel):
            raise ChannelNotFound(channel=channel_name)
        try:
            try:
                notice = channel.read_callback(headers, body, now=self._clock.now())
            except ChannelKeyUnknown:
                fresh = await self._with_fresh_keys(home, channel_name, channel)
                notice = fresh.read_callback(headers, body, now=self._clock.now())
            accepted = await self._record_notice(home, notice)
        except (ChannelMessageInvalid, ChannelMismatch, PaymentNotFound) as error:
            log.warning("callback.refused", channel=channel_name, home=home, reason=str(error))
            return CallbackAnswer(*channel.callback_refused(error.detail))
        if not accepted:
            return CallbackAnswer(*channel.callback_refused("It does not fit our record."))
        return CallbackAnswer(*channel.callback_accepted())

    async def _with_fresh_keys(self, home: int, channel_name: str, channel: Callbacks) -> Callbacks:
        """The channel with the keys that its provider uses now; as it was, if there are none or it was asked just now.

        Anybody can name an unknown key, so the provider is asked once a minute at most.
        """
        now = self._clock.now()
        asked_at = self._keys_asked_at.get((home, channel_name))
        if not isinstance(channel, KeyRefresh) or (asked_at is not None and now - asked_at < KEYS_APART):
            return channel
        self._keys_asked_at[home, channel_name] = now
        _, base_url = await self._channels.for_merchant(home, channel_name)
        fresh = await self._runner.run(channel.fetch_keys(self._nonces()), base_url, _ignore)
        if not isinstance(fresh, FreshKeys) or not isinstance(fresh.channel, Callbacks):
            log.warning("channel.keys_not_fetched", channel=channel_name, home=home)
            return channel
        self._channels.learn(home, channel_name, fresh.channel)
        return fresh.channel

    async def _record_notice(self, home: int, notice: Notice) -> bool:
        number = read_id("", notice.number)
        if number is None:
            raise ChannelMismatch("The channel speaks of a number that is not ours.", number=notice.number[:32])
        if notice.kind is NoticeKind.CHARGE:
            # What we attached to the order names its payment; the signature covers it.
            root = read_id("", notice.attach or "") or await self._store.root_of_attempt(home, number)
        else:
            root = await self._store.root_of_refund(home, number)
        if root is None:
            # Not stored here (yet): the channel shall send it again.
            raise ChannelMismatch("The channel speaks of a number that is not ours.", number=number)
        at = self._clock.now()
        exchange = _exchange(self._fresh_id(), home, root, number, Operation.CALLBACK, notice.outcome, None, at)
        news = News(Operation.CALLBACK, notice.outcome, (exchange,))
        decided = await self._record(home, root, number, news, is_refund=notice.kind is NoticeKind.REFUND)
        if decided.act is not None or decided.late:
            self._start(self._go_on(decided))
        if not decided.accepted:
            log.error("callback.quarantined", home=home, number=number, payment=root)
        return decided.accepted

    # What timers ask for

    async def fire(self, kind: str, home: int, root: Id, entity: Id) -> None:
        """Does what a timer asks for. May be repeated; decides by what is stored, not by the timer."""
        match kind:
            case "attempt":
                await self.drive_attempt(home, root, entity)
            case "refund":
                await self.drive_refund(home, root, entity)
            case "payment_expire":
                await self.expire(home, root)
            case "payment_late":
                await self.apply_late_policy(home, root)
            case _:
                raise InvariantBroken("A timer of another noun.", kind=kind)

    async def drive_attempt(self, home: int, payment_id: Id, attempt_id: Id) -> Decided:
        """Asks the channel about an attempt, sends it again or closes it, as what is stored demands."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.look_at_attempt(aggregate, now, attempt_id=attempt_id, jitter=self._chance())

        return await self._go_on(await self._decide(_ruled(home, payment_id, decide)))

    async def drive_refund(self, home: int, payment_id: Id, refund_id: Id) -> Decided:
        """Asks the channel about a refund, or sends it."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return refunds.look_at_refund(aggregate, now, refund_id=refund_id)

        return await self._go_on(await self._decide(_ruled(home, payment_id, decide, children=(ATTEMPT, REFUND))))

    async def expire(self, home: int, payment_id: Id) -> Decided:
        """The time to pay is over: closes the payment, once its attempts are closed at their channels."""
        return await self._decide(_ruled(home, payment_id, model.expire))

    async def apply_late_policy(self, home: int, payment_id: Id) -> Decided:
        """Accepts, gives back or holds money that came after the close."""
        spare = self._fresh_id()

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.apply_late_policy(aggregate, now, spare=spare)

        return await self._decide(_ruled(home, payment_id, decide))

    async def rearm(self, home: int, payment_id: Id) -> None:
        """Sets the timers of everything that is not final; for what the sweeper found without one."""

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            return model.rearmed(aggregate, now, jitter=self._chance())

        await self._decide(_ruled(home, payment_id, decide, children=(ATTEMPT, REFUND)))

    # Intend

    async def _through_channel(
        self, merchant: Merchant, order: Order, once: OnceKey | None, kind: str, wait_s: float
    ) -> Answer:
        await self._channels.for_merchant(merchant.home, order.channel)
        change = model.channel_payment(
            order,
            merchant,
            self._fresh_id(),
            self._fresh_id(),
            self._clock.now(),
            kind=kind,
            notify_url=self._notify_url(order.channel, merchant),
            once=once,
        )
        return await self._intend(merchant.home, change, 201, wait_s)

    async def _intend(self, home: int, change: Change, status: int, wait_s: float) -> Answer:
        """Stores an intent about a payment, and acts on it."""
        verdict = await self._journal.submit(change)
        if not isinstance(verdict, Committed):
            return await self._repeat(home, verdict, self._payment_answer)
        decided = cast(Decided, verdict.result)
        if decided.act is None:
            return _payment_answered(status, decided, running=False)
        return await self._wait_for(self._go_on(decided), decided, status, wait_s)

    async def _wait_for(
        self, work: Coroutine[Any, Any, Decided], intent: Decided, status: int, wait_s: float
    ) -> Answer:
        """Lets the work go on by itself, and answers with what it has come to after `wait_s`."""
        task = self._start(work)
        done, _ = await asyncio.wait({task}, timeout=wait_s)
        finished = bool(done) and not task.cancelled() and task.exception() is None
        decided = task.result() if finished else intent
        if intent.refund is not None:
            return _refund_answered(decided, running=not done)
        return _payment_answered(status, decided, running=not done)

    def _start(self, work: Coroutine[Any, Any, Decided]) -> "asyncio.Task[Decided]":
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Decided]") -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # What is stored has a timer, so nothing is lost; but somebody should know.
            log.error("conversation.failed", error=repr(error))

    # Act and record

    async def _drive_all(self, decided: Decided) -> Decided:
        """Closes every open attempt of a closing payment at its channel, one after the other."""
        payment = decided.payment
        for attempt in decided.attempts:
            if attempt.state in ("pending_payer", "unknown"):
                decided = await self.drive_attempt(payment.home, payment.id, attempt.id)
        return decided

    async def _go_on(self, decided: Decided) -> Decided:
        """Says what is to be said now, records what it brought, and so on, a few times at most."""
        for _ in range(ACTS_MAX):
            if decided.act is None:
                break
            decided = await self._perform(decided.act)
        if decided.late:
            decided = await self.apply_late_policy(decided.payment.home, decided.payment.id)
        return decided

    async def _perform(self, act: Act) -> Decided:
        payment, subject = act.payment, act.subject
        channel, base_url = await self._channels.for_merchant(payment.home, act.channel)
        trace: list[Sent] = []
        try:
            async with self._places.at((payment.home, act.channel)):
                outcome = await self._runner.run(self._steps(channel, act), base_url, trace.append)
        except Crowded:
            outcome = NotSent(Evidence("transport", authentic=False, text=CROWDED), CROWDED)
        if self._observe is not None:
            self._observe(act.channel, act.operation.value, type(outcome).__name__.lower())
        if isinstance(outcome, Unknown) and outcome.advice is Advice.REFRESH_KEYS and isinstance(channel, Callbacks):
            # What it meant will be known when the timer asks again, with the new keys.
            await self._with_fresh_keys(payment.home, act.channel, channel)
        exchanges = self._exchanges(act, outcome, trace)
        news = News(act.operation, outcome, exchanges, subject.version)
        return await self._record(payment.home, payment.id, subject.id, news, is_refund=isinstance(subject, Refund))

    def _steps(self, channel: Charges, act: Act) -> Steps:
        subject, nonces = act.subject, self._nonces()
        if isinstance(subject, Attempt):
            match act.operation:
                case Operation.CREATE:
                    return channel.charge(model.read_charge(subject), nonces)
                case Operation.CLOSE:
                    return channel.close(subject.id, nonces)
                case _:
                    return channel.query(subject.id, nonces)
        if not isinstance(channel, Refunds):
            raise ChannelNotFound("The channel cannot refund.", channel=act.channel)
        if act.operation is Operation.REFUND:
            return channel.refund(refunds.read_command(subject), nonces)
        return channel.query_refund(subject.id, nonces)

    def _exchanges(self, act: Act, outcome: Outcome, trace: Sequence[Sent]) -> tuple[Exchange, ...]:
        """The rows of a conversation; the last one says what we took it to mean."""
        home, root, subject, operation = act.payment.home, act.payment.id, act.subject.id, act.operation
        if not trace:
            return (_exchange(self._fresh_id(), home, root, subject, operation, outcome, None, self._clock.now()),)
        *before, last = trace
        return (
            *(
                _exchange(self._fresh_id(), home, root, subject, operation, None, sent, sent.started_at)
                for sent in before
            ),
            _exchange(self._fresh_id(), home, root, subject, operation, outcome, last, last.started_at),
        )

    async def _record(self, home: int, payment_id: Id, subject: Id, news: News, *, is_refund: bool) -> Decided:
        spare, jitter = self._fresh_id(), self._chance()

        def decide(aggregate: Aggregate, now: datetime) -> Change | KassaError:
            if is_refund:
                return refunds.record_refund(aggregate, now, refund_id=subject, news=news, jitter=jitter)
            return model.record_attempt(aggregate, now, attempt_id=subject, news=news, spare=spare, jitter=jitter)

        children = (ATTEMPT, REFUND) if is_refund else (ATTEMPT,)
        return await self._decide(_ruled(home, payment_id, decide, children=children))

    async def _decide(self, change: Change) -> Decided:
        """Commits a decision that has no idempotency key. Raises the refusal."""
        verdict = await self._journal.submit(change)
        if isinstance(verdict, Committed):
            return cast(Decided, verdict.result)
        raise refusal(verdict)

    # Repeats

    async def _repeat(
        self, home: int, verdict: Verdict, answer: Callable[[int, Id], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """The first status with the resource as it stands now, or the stored problem. Raises every other refusal."""
        if not isinstance(verdict, Again):
            raise refusal(verdict)
        reply = verdict.reply
        if reply.problem is not None or reply.resource is None:
            return Answer(reply.status, reply.problem or b"", replayed=True, problem=True)
        return (await answer(home, reply.resource))._replace(status=reply.status, replayed=True)

    async def _payment_answer(self, home: int, payment_id: Id) -> Answer:
        found = await self._store.payment(home, payment_id)
        if found is None:
            raise PaymentNotFound
        payment, attempts = found
        running = any(attempt.state == "sending" for attempt in attempts)
        return Answer(200, render.payment_json(payment, attempts), render.payment_name(payment), running)

    async def _refund_answer(self, home: int, refund_id: Id) -> Answer:
        found = await self._store.refund(home, refund_id)
        if found is None:
            raise RefundNotFound
        refund, payment = found
        return Answer(200, render.refund_json(refund, payment), f"rfd_{refund.id}", refund.state == "sending")

    async def _wallet_answer(self, home: int, wallet_id: Id) -> Answer:
        found = await self._store.wallet(home, wallet_id)
        if found is None:
            raise WalletNotFound
        wallet, account = found
        body = render.wallet_json(wallet, balance=account.balance, available=account.available)
        return Answer(200, body, render.wallet_name(wallet.id))

    # Reading

    async def get_payment(self, home: int, payment_id: Id, *, kind: str = "payment") -> Answer:
        """A payment or top-up as it stands. Raises PaymentNotFound, TopupNotFound."""
        found = await self._store.payment(home, payment_id)
        if found is None or found[0].kind != kind:
            raise TopupNotFound if kind == "topup" else PaymentNotFound
        payment, attempts = found
        running = any(attempt.state == "sending" for attempt in attempts)
        return Answer(200, render.payment_json(payment, attempts), render.payment_name(payment), running)

    async def get_refund(self, home: int, refund_id: Id) -> Answer:
        """A refund as it stands. Raises RefundNotFound."""
        return await self._refund_answer(home, refund_id)

    async def get_wallet(self, home: int, wallet_id: Id) -> Answer:
        """A wallet with its money. Raises WalletNotFound."""
        return await self._wallet_answer(home, wallet_id)

    # Small things

    def _notify_url(self, channel: str, merchant: Merchant) -> str:
        return f"{self._public_url}/v1/callbacks/{channel}/mch_{merchant.id}"

    def _nonces(self) -> Nonces:
        return lambda: Nonce(self._clock.now(), self._fresh_id())


def _with_overdraft(merchant: Merchant, aggregate: Aggregate, decided: Change | KassaError) -> Change | KassaError:
    """The refund may take the merchant's balance below zero, also where the account is younger than that policy."""
    if isinstance(decided, KassaError) or not merchant.overdraft:
        return decided
    account = chart.payable(merchant.home, cast(Payment, aggregate.root).currency)
    opening = AccountOpen(account, Limit.DEBITS_WITHIN_CREDITS, merchant.overdraft)
    return msgspec.structs.replace(decided, opens=(*decided.opens, opening))


def _is_called_back(channel: Charges) -> TypeGuard[Callbacks]:
    return _has_callbacks(type(channel))


@cache
def _has_callbacks(kind: type[Charges]) -> bool:
    """Asked once of each class: Python walks through a Protocol's methods at each isinstance."""
    return issubclass(kind, Callbacks)


def _ruled(
    home: int,
    payment_id: Id,
    decide: Decide,
    *,
    once: OnceKey | None = None,
    reply: Reply | None = None,
    claims: tuple[Claim, ...] = (),
    children: Sequence[Table] = (ATTEMPT,),
) -> Change:
    """A Change that is decided under the payment's lock. A move that the tables do not know refuses it alone."""

    def safely(aggregate: Aggregate, now: datetime) -> Change | KassaError:
        try:
            return decide(aggregate, now)
        except KassaError as error:
            return error

    rule = Rule(PAYMENT, payment_id, safely, tuple(children))
    return Change(home=home, once=once, claims=claims, reply=reply, rule=rule)


def _payment_answered(status: int, decided: Decided, *, running: bool) -> Answer:
    payment = decided.payment
    body = render.payment_json(payment, decided.attempts)
    return Answer(status, body, render.payment_name(payment), running)


def _refund_answered(decided: Decided, *, running: bool) -> Answer:
    refund = decided.refund
    if refund is None:
        raise InvariantBroken("A decision about a refund came back without it.", payment=decided.payment.id)
    return Answer(201, render.refund_json(refund, decided.payment), f"rfd_{refund.id}", running)


def _exchange(
    exchange_id: Id,
    home: int,
    root: Id,
    subject: Id,
    operation: Operation,
    outcome: Outcome | None,
    sent: Sent | None,
    at: datetime,
) -> Exchange:
    evidence = outcome.evidence if outcome is not None else None
    status = evidence.status if evidence is not None else None
    return Exchange(
        home, exchange_id, 0, root, "received" if operation is Operation.CALLBACK else "sent", subject, operation.value,
        sent.method if sent is not None else None,
        sent.path if sent is not None else None,
        sent.status if sent is not None else status,
        type(outcome).__name__ if outcome is not None else "Step",
        evidence.code if evidence is not None else None,
        _text(evidence, sent),
        at,
        sent.duration_ms if sent is not None else 0,
    )  # fmt: skip


def _text(evidence: Evidence | None, sent: Sent | None) -> str | None:
    """What a person reads of it: the channel's words, else why there are none, else the harmless part of the answer."""
    said = evidence.text if evidence is not None else None
    return said or (sent.error or sent.response_summary or None if sent is not None else None)


def _ignore(sent: Sent) -> None:
    """Fetching keys belongs to no payment, so no payment's story shows it."""
