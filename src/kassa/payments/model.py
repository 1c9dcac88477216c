"""What may be decided about payments, top-ups and their attempts. Pure: rows in, a Change or a refusal out.

The tables of legal moves are in `states.py`, refunds in `refunds.py`, what is posted in `postings.py`.
Doubt belongs to the attempt: what is not known stays `unknown`, with a timer, until there is positive evidence.
"""

from dataclasses import replace
from datetime import datetime, timedelta

import msgspec

from kassa.channels.model import Charge, Closed, Failed, Method, NotFound, NotSent, Pending, Succeeded
from kassa.errors import (
    AmountInvalid,
    AttemptInDoubt,
    ChannelMismatch,
    KassaError,
    PaymentNotClosable,
    PaymentNotFound,
    PaymentNotHeld,
    PaymentNotPayable,
    TopupNotFound,
)
from kassa.ids import Id
from kassa.journal.change import AccountOpen, Aggregate, Change, Claim, Event, OnceKey, Reply, Timer
from kassa.ledger import chart
from kassa.ledger.model import Limit, single
from kassa.merchants.records import Merchant
from kassa.payments import postings, refunds, render
from kassa.payments.draft import (
    ATTEMPT_PAUSES_S,
    ATTEMPT_TIMER,
    EXPIRE_TIMER,
    GRACE,
    LATE_TIMER,
    RECOVER_AFTER,
    Act,
    Decided,
    Draft,
    News,
    Operation,
    pause,
)
from kassa.payments.fees import fee_of
from kassa.payments.records import Attempt, Exchange, Payment, Wallet
from kassa.payments.states import ATTEMPT_IN_DOUBT, ATTEMPT_OPEN, ATTEMPT_PAID, AttemptEvent, PaymentEvent

AMOUNT_MAX = 9_007_199_254_740_991
"""The largest whole number that every JSON reader keeps exactly."""

ATTEMPT_LIFE_MIN = timedelta(minutes=1)
"""A channel takes no order that ends sooner than this (WeChat Pay: time_expire)."""

CLOSING_LOOK = timedelta(hours=1)
"""A closing payment is looked at this often, whatever its attempts do."""


class Order(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a merchant asks to be paid."""

    order_id: str
    amount: int
    currency: str
    channel: str
    method: str
    description: str = ""
    metadata: str = "{}"
    """JSON text."""
    expires_in_s: int = 900
    return_url: str | None = None
    wallet: Id | None = None
    """The wallet that pays, or that is topped up."""
    openid: str | None = None
    payer_ip: str | None = None


class Way(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Another way to pay the same order."""

    channel: str
    method: str
    openid: str | None = None
    payer_ip: str | None = None


# A payment begins


def wallet_payment(order: Order, merchant: Merchant, payment_id: Id, now: datetime, once: OnceKey | None) -> Change:
    """A payment from a wallet: final in this one Change. Its result is the payment as JSON. The hot path.

    The ledger refuses it when the wallet does not hold enough or does not exist; then nothing is stored at all.
    """
    home, currency, amount, wallet = merchant.home, order.currency, order.amount, order.wallet
    if not 0 < amount <= AMOUNT_MAX:
        raise AmountInvalid(amount=amount)
    if wallet is None:
        raise PaymentNotPayable("A payment from a wallet names the wallet.")
    payment = Payment(
        home, payment_id, 0, 1, "succeeded", "payment", order.order_id, amount, currency, "wallet", "wallet", wallet,
        order.openid, order.payer_ip, order.description, order.metadata, order.return_url,
        merchant.fee_ppm, merchant.fee_on_refund, merchant.late_success,
        now, now + timedelta(seconds=order.expires_in_s), now,
    )  # fmt: skip
    data = render.payment_json(payment)
    fee = fee_of(amount, merchant.fee_ppm)
    source = chart.wallet(home, wallet, currency)
    net = single(chart.Posting.PAYMENT, source, chart.payable(home, currency), amount - fee)
    share = single(chart.Posting.FEE, source, chart.fee_income(home, currency), fee)
    return Change(
        home=home,
        once=once,
        claims=(Claim("order", order.order_id, payment_id),),
        new=(payment,),
        transfers=(net, share) if 0 < fee < amount else (share,) if fee else (net,),
        root=payment_id,
        events=(Event("payment.succeeded", data),),
        reply=Reply(201, payment_id),
        result=data,
    )


def channel_payment(
    order: Order,
    merchant: Merchant,
    payment_id: Id,
    attempt_id: Id,
    now: datetime,
    *,
    kind: str = "payment",
    notify_url: str,
    once: OnceKey | None,
) -> Change:
    """A payment or top-up through a channel: the intent, stored before the first byte is sent.

    The attempt is born `sending`; if we die now, its timer finds it and asks the channel first.
    """
    if not 0 < order.amount <= AMOUNT_MAX:
        raise AmountInvalid(amount=order.amount)
    payment = Payment(
        merchant.home, payment_id, 0, 0, "processing", kind, order.order_id, order.amount, order.currency,
        order.channel, order.method, order.wallet, order.openid, order.payer_ip, order.description, order.metadata,
        order.return_url, merchant.fee_ppm if kind == "payment" else 0, merchant.fee_on_refund, merchant.late_success,
        now, now + timedelta(seconds=order.expires_in_s),
    )  # fmt: skip
    way = Way(channel=order.channel, method=order.method, openid=order.openid, payer_ip=order.payer_ip)
    attempt = _attempt(payment, attempt_id, way, now, notify_url)
    return Change(
        home=merchant.home,
        once=once,
        claims=(Claim("order" if kind == "payment" else "topup", order.order_id, payment_id),),
        new=(payment, attempt),
        root=payment_id,
        timers=(
            Timer(payment_id, EXPIRE_TIMER, payment.expires_at, payment_id),
            Timer(attempt_id, ATTEMPT_TIMER, now + RECOVER_AFTER, payment_id),
        ),
        reply=Reply(201, payment_id),
        result=Decided(payment, (attempt,), act=Act(Operation.CREATE, order.channel, payment, attempt)),
    )


def new_wallet(
    merchant: Merchant, wallet_id: Id, user: str, currency: str, now: datetime, once: OnceKey | None
) -> Change:
    """A wallet and its account. A user has one per currency."""
    wallet = Wallet(merchant.home, wallet_id, 0, 0, "open", user, currency, now)
    data = render.wallet_json(wallet, balance=0, available=0)
    return Change(
        home=merchant.home,
        once=once,
        claims=(Claim("wallet", f"{currency}:{user}", wallet_id),),
        opens=(AccountOpen(chart.wallet(merchant.home, wallet_id, currency), Limit.DEBITS_WITHIN_CREDITS),),
        new=(wallet,),
        root=wallet_id,
        events=(Event("wallet.created", data),),
        reply=Reply(201, wallet_id),
        result=data,
    )


def add_attempt(
    aggregate: Aggregate, now: datetime, *, attempt_id: Id, way: Way, kind: str, notify_url: str
) -> Change | KassaError:
    """Another way to pay the same order. Open attempts that wait for the payer stay, until one of them is paid.

    Refused in this order: not this kind, PaymentNotPayable, AttemptInDoubt.
    """
    draft = Draft(aggregate, now)
    payment = draft.payment
    if payment.kind != kind:
        return not_found(kind)
    if payment.state != "processing" or payment.channel == "wallet" or now + ATTEMPT_LIFE_MIN > payment.expires_at:
        return PaymentNotPayable(payment=render.payment_name(payment), state=payment.state)
    for other in draft.open_attempts:
        if other.state in ATTEMPT_IN_DOUBT:
            return AttemptInDoubt(attempt=f"att_{other.id}", state=other.state)
        if other.state == "new":
            _end_unsent(draft, other)
    attempt = _attempt(payment, attempt_id, way, now, notify_url)
    draft.add(attempt)
    draft.due(attempt, ATTEMPT_TIMER, now + RECOVER_AFTER)
    return draft.decided(act=Operation.CREATE, subject=attempt)


def not_found(kind: str) -> KassaError:
    """There is no such payment, or no such top-up."""
    return TopupNotFound() if kind == "topup" else PaymentNotFound()


# An attempt goes on


def look_at_attempt(aggregate: Aggregate, now: datetime, *, attempt_id: Id, jitter: float) -> Change | KassaError:
    """What is to be said to the channel about an attempt now; stored as `sending` when it asks for money."""
    draft = Draft(aggregate, now, jitter)
    attempt = draft.attempts.get(attempt_id)
    if attempt is None:
        return PaymentNotFound(attempt=attempt_id)
    match attempt.state:
        case "new" if draft.wanted:
            attempt = draft.move_attempt(attempt, AttemptEvent.SEND)
            draft.due(attempt, ATTEMPT_TIMER, now + RECOVER_AFTER)
            return draft.decided(act=Operation.CREATE, subject=attempt)
        case "new":
            _end_unsent(draft, attempt)
            _finish_closing(draft)
            return draft.decided()
        case "sending" | "unknown":
            return draft.decided(act=Operation.QUERY, subject=attempt)
        case "pending_payer":
            return draft.decided(act=Operation.QUERY if draft.wanted else Operation.CLOSE, subject=attempt)
        case _:
            draft.due(attempt, ATTEMPT_TIMER, None)
            return draft.decided()


def record_attempt(
    aggregate: Aggregate, now: datetime, *, attempt_id: Id, news: News, spare: Id, jitter: float
) -> Change | KassaError:
    """What a channel's answer or callback means for an attempt and its payment.

    spare: a fresh id, used if this turns out to be a second payment that must be given back.
    """
    draft = Draft(aggregate, now, jitter)
    attempt = draft.attempts.get(attempt_id)
    if attempt is None:
        return ChannelMismatch("The channel speaks of a number that this payment does not have.", number=attempt_id)
    match news.outcome:
        case Succeeded() as outcome:
            return _record_success(draft, attempt, news, outcome, spare)
        case Pending() as outcome:
            draft.keep(news)
            return _record_pending(draft, attempt, news.operation, outcome)
        case Closed():
            draft.keep(news)
            return _record_closed(draft, attempt)
        case NotFound():
            draft.keep(news)
            return _record_not_found(draft, attempt, news.operation)
        case Failed() as outcome:
            draft.keep(news)
            return _record_failed(draft, attempt, news.operation, outcome)
        case NotSent():
            draft.keep(news)
            return _record_not_sent(draft, attempt, news.operation)
        case _:
            draft.keep(news)
            return _record_doubt(draft, attempt, news.operation)


def _record_success(draft: Draft, attempt: Attempt, news: News, outcome: Succeeded, spare: Id) -> Change:
    if news.operation in (Operation.CREATE, Operation.CLOSE) and outcome.amount is None:
        # "Paid already" without saying how much: the query will say.
        draft.keep(news)
        _wait(draft, attempt)
        return draft.decided(act=Operation.QUERY, subject=attempt)
    misfit = _misfit(draft.payment, attempt, outcome)
    if misfit is not None:
        draft.keep(news, quarantined=misfit)
        _wait(draft, attempt)
        return draft.decided(accepted=False)
    draft.keep(news)
    if attempt.state not in ATTEMPT_PAID:
        _take_money(draft, attempt, outcome, spare)
    return draft.decided()


def _misfit(payment: Payment, attempt: Attempt, outcome: Succeeded) -> str | None:
    """What of the channel's words does not fit our own record; money never moves on words that do not fit."""
    if not outcome.evidence.authentic:
        return "the message is not signed"
    if (outcome.amount, outcome.currency) != (payment.amount, payment.currency):
        return f"says {outcome.amount} {outcome.currency}, we have {payment.amount} {payment.currency}"
    if attempt.state in ATTEMPT_PAID and outcome.channel_id != attempt.channel_id:
        return f"says {outcome.channel_id}, it was paid as {attempt.channel_id}"
    return None


def _take_money(draft: Draft, attempt: Attempt, outcome: Succeeded, spare: Id) -> None:
    """The attempt is paid. The first one's money is the payment's, a late one's waits, a second one's goes back."""
    payment, now = draft.payment, draft.now
    paid = {"channel_id": outcome.channel_id, "doubt_since": None, "done_at": now, "failure_code": None,
            "failure_reason": None}  # fmt: skip
    draft.due(attempt, ATTEMPT_TIMER, None)
    match payment.state:
        case "processing" | "closing":
            draft.move_attempt(attempt, AttemptEvent.PAID, **paid)
            draft.move_payment(
                PaymentEvent.PAY, paid_attempt=attempt.id, succeeded_at=now, failure_code=None, failure_reason=None
            )
            draft.post(postings.success(draft.payment))
            draft.due(payment, EXPIRE_TIMER, None)
            _close_others(draft, now)
            draft.tell("succeeded")
        case "closed":
            draft.move_attempt(attempt, AttemptEvent.PAID, **paid)
            draft.move_payment(PaymentEvent.LATE_PAY, paid_attempt=attempt.id)
            draft.post(postings.late_success(draft.payment))
            draft.due(payment, LATE_TIMER, now)
            draft.tell("late_succeeded")
        case _:
            moved = draft.move_attempt(attempt, AttemptEvent.PAID_AGAIN, **paid)
            draft.post(postings.duplicate_success(draft.payment))
            draft.tell("duplicate_paid")
            refunds.give_back(draft, moved, spare, cause="duplicate", reason="The order was paid twice.")


def _record_pending(draft: Draft, attempt: Attempt, operation: Operation, outcome: Pending) -> Change:
    """The channel knows the order, and it is not paid."""
    if attempt.state not in ATTEMPT_OPEN or attempt.state == "new":
        # Older than what we know already.
        return draft.decided()
    first = attempt.state != "pending_payer"
    if operation is Operation.CREATE or outcome.next_action is not None:
        action = attempt.next_action
        if outcome.next_action is not None:
            action = next_action_json(outcome)
        attempt = draft.move_attempt(
            attempt, AttemptEvent.ACCEPTED, next_action=action, channel_id=outcome.channel_id or attempt.channel_id,
            doubt_since=None, tries=0,
        )  # fmt: skip
        draft.due_attempt(attempt)
        if first and draft.payment.state == "processing":
            draft.tell("processing")
    elif first and draft.wanted:
        # It exists there, but the answer with what the payer needs was lost: the same bytes bring it back.
        return _send_again(draft, attempt)
    else:
        attempt = _wait(draft, attempt)
    if not draft.wanted and operation is not Operation.CLOSE:
        return draft.decided(act=Operation.CLOSE, subject=attempt)
    return draft.decided()


def _send_again(draft: Draft, attempt: Attempt) -> Change:
    """The identical stored bytes, under the same number. It stays in doubt until the answer is there."""
    attempt = draft.move_attempt(
        attempt, AttemptEvent.SEND, doubt_since=attempt.doubt_since or draft.now, tries=attempt.tries + 1
    )
    draft.due(attempt, ATTEMPT_TIMER, draft.now + RECOVER_AFTER)
    return draft.decided(act=Operation.CREATE, subject=attempt)


def _record_closed(draft: Draft, attempt: Attempt) -> Change:
    """The channel says: closed, and not paid."""
    if attempt.state in ATTEMPT_OPEN:
        _end(draft, attempt)
        _finish_closing(draft)
    return draft.decided()


def _record_not_found(draft: Draft, attempt: Attempt, operation: Operation) -> Change:
    """The channel does not know the number *now*: evidence only after the order's end and a time of grace."""
    if attempt.state not in ATTEMPT_OPEN:
        return draft.decided()
    if operation is Operation.QUERY and draft.now >= draft.payment.expires_at + GRACE:
        return _record_closed(draft, attempt)
    if operation is Operation.QUERY and attempt.state in ATTEMPT_IN_DOUBT and draft.wanted:
        return _send_again(draft, attempt)
    _wait(draft, attempt)
    return draft.decided()


def _record_failed(draft: Draft, attempt: Attempt, operation: Operation, outcome: Failed) -> Change:
    """The channel refused. Of a repeat that proves nothing about the first sending, until grace is over."""
    if operation is Operation.CLOSE:
        _wait(draft, attempt)
        return draft.decided(act=Operation.QUERY, subject=attempt)
    if attempt.state not in ATTEMPT_OPEN or attempt.state == "new":
        return draft.decided()
    in_doubt = attempt.doubt_since is not None and draft.now < attempt.doubt_since + GRACE
    if operation is Operation.CREATE and (in_doubt or attempt.state == "pending_payer"):
        _wait(draft, attempt)
        return draft.decided()
    draft.move_attempt(
        attempt, AttemptEvent.FAILED, failure_code=outcome.code, failure_reason=outcome.reason, doubt_since=None,
        done_at=draft.now,
    )  # fmt: skip
    draft.due(attempt, ATTEMPT_TIMER, None)
    if draft.payment.state in ("processing", "closing"):
        draft.move_payment(PaymentEvent.ATTEMPT_FAILED, failure_code=outcome.code, failure_reason=outcome.reason)
        draft.tell("attempt_failed")
    _finish_closing(draft)
    return draft.decided()


def _record_not_sent(draft: Draft, attempt: Attempt, operation: Operation) -> Change:
    """Proven that this request was not taken in; of earlier ones under the same number it says nothing."""
    if operation is Operation.CREATE and attempt.state == "sending" and attempt.doubt_since is None:
        attempt = draft.move_attempt(attempt, AttemptEvent.NOT_SENT, tries=attempt.tries + 1)
        draft.due_attempt(attempt)
        return draft.decided()
    _wait(draft, attempt)
    return draft.decided()


def _record_doubt(draft: Draft, attempt: Attempt, operation: Operation) -> Change:
    """We do not know."""
    attempt = _wait(draft, attempt)
    if operation is Operation.CLOSE:
        return draft.decided(act=Operation.QUERY, subject=attempt)
    return draft.decided()


def _wait(draft: Draft, attempt: Attempt) -> Attempt:
    """Nothing new: the attempt is looked at again later, each time after a longer pause."""
    if attempt.state not in ATTEMPT_OPEN:
        return attempt
    if attempt.state == "sending":
        first = attempt.doubt_since is None
        attempt = draft.move_attempt(
            attempt, AttemptEvent.LOST, doubt_since=attempt.doubt_since or draft.now, tries=attempt.tries + 1
        )
        if first and draft.payment.state in ("processing", "closing"):
            draft.tell("unknown")
    elif attempt.state != "new":
        attempt = draft.move_attempt(attempt, AttemptEvent.ASKED, tries=attempt.tries + 1)
    draft.due_attempt(attempt)
    return attempt


# A payment ends


def close(aggregate: Aggregate, now: datetime, *, kind: str) -> Change | KassaError:
    """The merchant wants no money any more. Closed only when every attempt is closed at its channel.

    Raises nothing; refuses with PaymentNotClosable what has its money already.
    """
    draft = Draft(aggregate, now)
    payment = draft.payment
    if payment.kind != kind:
        return not_found(kind)
    match payment.state:
        case "processing":
            # Whoever closes drives the attempts at once; the timers are for the case that they die.
            _begin_closing(draft, now + RECOVER_AFTER)
        case "closing" | "closed":
            pass
        case _:
            return PaymentNotClosable(payment=render.payment_name(payment), state=payment.state)
    return draft.decided()


def expire(aggregate: Aggregate, now: datetime) -> Change:
    """The time to pay is over, or a closing payment is to be looked at."""
    draft = Draft(aggregate, now)
    payment = draft.payment
    match payment.state:
        case "processing" if now < payment.expires_at:
            draft.due(payment, EXPIRE_TIMER, payment.expires_at)
        case "processing":
            _begin_closing(draft, now)
        case "closing":
            draft.due(payment, EXPIRE_TIMER, now + CLOSING_LOOK)
            _finish_closing(draft)
        case _:
            draft.due(payment, EXPIRE_TIMER, None)
    return draft.decided()


def _begin_closing(draft: Draft, drive_at: datetime) -> None:
    draft.due(draft.payment, EXPIRE_TIMER, draft.now + CLOSING_LOOK)
    for attempt in draft.open_attempts:
        if attempt.state == "new":
            _end_unsent(draft, attempt)
    if draft.open_attempts:
        draft.move_payment(PaymentEvent.CLOSE)
        _close_others(draft, drive_at)
    else:
        _closed(draft)


def _finish_closing(draft: Draft) -> None:
    """A closing payment is closed as soon as no attempt is open."""
    if draft.payment.state == "closing" and not draft.open_attempts:
        _closed(draft)


def _closed(draft: Draft) -> None:
    draft.move_payment(PaymentEvent.CLOSE_DONE, closed_at=draft.now)
    draft.due(draft.payment, EXPIRE_TIMER, None)
    draft.tell("closed")


def _close_others(draft: Draft, at: datetime) -> None:
    """Open attempts of a payment that wants no more money are closed at their channels, once nothing is on its way."""
    for attempt in draft.open_attempts:
        draft.due(attempt, ATTEMPT_TIMER, draft.now + RECOVER_AFTER if attempt.state == "sending" else at)


def _end(draft: Draft, attempt: Attempt) -> None:
    draft.move_attempt(attempt, AttemptEvent.CLOSED, doubt_since=None, done_at=draft.now)
    draft.due(attempt, ATTEMPT_TIMER, None)


def _end_unsent(draft: Draft, attempt: Attempt) -> None:
    """The channel has never got it, so there is nobody to ask."""
    _end(draft, attempt)


# Late money


def apply_late_policy(aggregate: Aggregate, now: datetime, *, spare: Id) -> Change:
    """What the merchant wants done with money that came after the close, as it was when the payment was made."""
    draft = Draft(aggregate, now)
    draft.due(draft.payment, LATE_TIMER, None)
    if draft.payment.state == "late_succeeded":
        match draft.payment.late_success:
            case "accept":
                _accept_late(draft)
            case "hold":
                draft.move_payment(PaymentEvent.HOLD)
                draft.tell("held")
            case _:
                _refund_late(draft, spare, "The payment came after the order was closed.")
    return draft.decided()


def resolve(
    aggregate: Aggregate, now: datetime, *, kind: str, decision: str, reason: str, spare: Id, exchange_id: Id
) -> Change | KassaError:
    """A person decides about held money: accept or refund, with a reason that stays in the story.

    Late money first, then second payments that could not be given back, one at a time, the oldest first.
    """
    draft = Draft(aggregate, now)
    payment = draft.payment
    if payment.kind != kind:
        return not_found(kind)
    duplicate = refunds.held_duplicate(draft)
    if payment.state != "held" and duplicate is None:
        return PaymentNotHeld(payment=render.payment_name(payment), state=payment.state)
    draft.add(
        Exchange(
            payment.home, exchange_id, 0, payment.id, "received", payment.id, Operation.RESOLVE.value, None, None, None,
            decision, None, reason, now, 0,
        )
    )  # fmt: skip
    if payment.state != "held" and duplicate is not None:
        refunds.resolve_duplicate(draft, duplicate, decision, spare, reason)
    elif decision == "accept":
        _accept_late(draft)
    else:
        _refund_late(draft, spare, reason)
    return draft.decided()


def _accept_late(draft: Draft) -> None:
    draft.move_payment(PaymentEvent.ACCEPT, succeeded_at=draft.now, failure_code=None, failure_reason=None)
    draft.post(postings.late_accepted(draft.payment))
    draft.tell("succeeded")


def _refund_late(draft: Draft, spare: Id, reason: str) -> None:
    draft.move_payment(PaymentEvent.REFUND)
    paid = draft.attempts[draft.payment.paid_attempt or Id("")]
    draft.tell("late_refunding")
    refunds.give_back(draft, paid, spare, cause="late", reason=reason)


# Commands


def _attempt(payment: Payment, attempt_id: Id, way: Way, now: datetime, notify_url: str) -> Attempt:
    command = Charge(
        number=attempt_id,
        amount=payment.amount,
        currency=payment.currency,
        method=Method(way.method),
        description=payment.description or payment.order_id,
        expires_at=payment.expires_at,
        notify_url=notify_url,
        openid=way.openid,
        payer_ip=way.payer_ip,
        attach=payment.id,
        return_url=payment.return_url,
    )
    return Attempt(
        payment.home, attempt_id, 0, payment.id, "sending", way.channel, way.method, way.openid, way.payer_ip, now,
        msgspec.json.encode(command).decode(),
    )  # fmt: skip


def read_charge(attempt: Attempt) -> Charge:
    """The stored command, to be sent again as it was. `repeat`: an earlier sending may have been taken in."""
    command = msgspec.json.decode(attempt.request or "", type=Charge)
    return replace(command, repeat=attempt.doubt_since is not None)


def next_action_json(outcome: Pending) -> str | None:
    """What the payer needs, as the interface shows it: the type, then its data."""
    action = outcome.next_action
    if action is None:
        return None
    return msgspec.json.encode({"type": action.type.value, **action.data}).decode()


def rearmed(aggregate: Aggregate, now: datetime, *, jitter: float) -> Change:
    """Timers for everything of a payment that is not final: what the sweeper sets when one was lost."""
    draft = Draft(aggregate, now, jitter)
    soon = now + pause(ATTEMPT_PAUSES_S, 0, jitter)
    if draft.payment.state in ("processing", "closing"):
        draft.due(draft.payment, EXPIRE_TIMER, max(soon, draft.payment.expires_at))
    if draft.payment.state == "late_succeeded":
        draft.due(draft.payment, LATE_TIMER, soon)
    for attempt in draft.open_attempts:
        draft.due(attempt, ATTEMPT_TIMER, soon)
    refunds.rearm(draft, soon)
    return draft.decided()
