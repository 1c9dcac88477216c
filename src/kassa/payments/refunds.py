"""What may be decided about refunds. Pure: rows in, a Change or a refusal out.

A refund reserves its money in the ledger before the channel is asked. One whose outcome is not known counts as used,
keeps its number for ever, and is asked after for as long as it takes; it is never expired on our side.
"""

from dataclasses import replace
from datetime import datetime, timedelta

import msgspec

from kassa.channels import model as channel
from kassa.channels.model import Abnormal, Closed, Failed, NotFound, NotSent, Pending, Succeeded
from kassa.channels.registry import CHANNELS, ChannelKind
from kassa.errors import (
    AmountInvalid,
    ChannelMismatch,
    KassaError,
    PaymentNotFound,
    RefundExceedsPaid,
    RefundNotFound,
    RefundNotRefundable,
    TopupNotFound,
)
from kassa.ids import Id
from kassa.journal.change import Aggregate, Change
from kassa.payments import postings, render
from kassa.payments.draft import (
    ATTEMPT_PAUSES_S,
    GRACE,
    RECOVER_AFTER,
    REFUND_PAUSES_S,
    REFUND_TIMER,
    Draft,
    News,
    Operation,
    pause,
)
from kassa.payments.fees import fee_of, fee_part
from kassa.payments.records import Attempt, Payment, Refund
from kassa.payments.states import REFUND_OPEN, PaymentEvent, RefundEvent

GAP_SLACK = timedelta(seconds=1)
"""Added to the time that a channel wants between two refunds of one payment, because clocks differ."""


LOOK_AGAIN = timedelta(minutes=10)
"""How soon we ask again whether a refund that had succeeded still has."""


class Ask(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a merchant asks to be given back. `amount` None: all that is left."""

    id: Id
    refund_id: str
    amount: int | None
    reason: str | None = None
    metadata: str = "{}"
    """JSON text."""
    kind: str = "payment"


# A refund begins


def ask(aggregate: Aggregate, now: datetime, request: Ask) -> Change | KassaError:
    """Reserve a refund; one of a wallet payment is final at once.

    Refused in this order: not this kind, AmountInvalid, RefundNotRefundable (state, the channel's limit),
    RefundExceedsPaid; then the ledger, when the merchant's balance does not cover it.
    """
    draft = Draft(aggregate, now)
    payment = draft.payment
    left = payment.amount - payment.amount_refunded - payment.amount_refunding
    amount = left if request.amount is None else request.amount
    paid = draft.attempts.get(payment.paid_attempt or Id(""))
    kind = CHANNELS.get(paid.channel) if paid is not None else None
    refusal = _refusal(payment, request, amount, left, kind)
    if refusal is not None:
        return refusal
    fee = _fee_of_refund(payment, amount)
    if paid is None:
        return _refund_wallet(draft, request, amount, fee)
    slot = max(now, payment.refund_slot_at or now)
    refund = _refund(payment, paid, request, amount, fee, now, waits=slot > now)
    draft.move_payment(
        PaymentEvent.REFUND_RESERVED,
        amount_refunding=payment.amount_refunding + amount,
        fee_refunding=payment.fee_refunding + fee,
        refunds=payment.refunds + 1,
        refund_slot_at=slot + timedelta(seconds=kind.refund_gap_s) + GAP_SLACK if kind is not None else None,
    )
    draft.add(refund)
    draft.post(postings.refund_reserved(payment, refund))
    draft.tell_refund("created", refund)
    if slot > now:
        draft.due(refund, REFUND_TIMER, slot)
        return draft.decided(refund=refund)
    draft.due(refund, REFUND_TIMER, now + RECOVER_AFTER)
    return draft.decided(refund=refund, act=Operation.REFUND, subject=refund)


def _refusal(payment: Payment, request: Ask, amount: int, left: int, kind: ChannelKind | None) -> KassaError | None:
    name = render.payment_name(payment)
    if payment.kind != request.kind:
        return TopupNotFound() if request.kind == "topup" else PaymentNotFound()
    if request.amount is not None and amount < 1:
        return AmountInvalid(amount=amount)
    if payment.state != "succeeded":
        return RefundNotRefundable(payment=name, state=payment.state)
    if kind is not None and payment.refunds >= kind.refunds_max:
        return RefundNotRefundable(
            f"The channel takes at most {kind.refunds_max} refunds of one payment.", payment=name, state=payment.state
        )
    if amount > left or left == 0:
        return RefundExceedsPaid(
            payment=name, paid=payment.amount, refunded=payment.amount_refunded, refunding=payment.amount_refunding,
            asked=amount,
        )  # fmt: skip
    return None


def _fee_of_refund(payment: Payment, amount: int) -> int:
    if payment.fee_on_refund == "kept":
        return 0
    return fee_part(
        amount=payment.amount,
        fee=fee_of(payment.amount, payment.fee_ppm),
        taken=payment.amount_refunded + payment.amount_refunding,
        fee_taken=payment.fee_refunded + payment.fee_refunding,
        asked=amount,
    )


def _refund(
    payment: Payment, paid: Attempt, request: Ask, amount: int, fee: int, now: datetime, *, waits: bool
) -> Refund:
    return Refund(
        payment.home, request.id, 0, payment.id, "reserved" if waits else "sending", paid.id, request.refund_id, amount,
        payment.currency, fee, request.reason, "asked", request.metadata, now,
        _command(payment, paid, request.id, amount, request.reason), sent_at=None if waits else now,
    )  # fmt: skip


def _refund_wallet(draft: Draft, request: Ask, amount: int, fee: int) -> Change:
    payment, now = draft.payment, draft.now
    refund = Refund(
        payment.home, request.id, 0, payment.id, "succeeded", None, request.refund_id, amount, payment.currency, fee,
        request.reason, "asked", request.metadata, now, None, succeeded_at=now,
    )  # fmt: skip
    draft.move_payment(
        PaymentEvent.REFUND_DONE,
        amount_refunded=payment.amount_refunded + amount,
        fee_refunded=payment.fee_refunded + fee,
        refunds=payment.refunds + 1,
    )
    draft.add(refund)
    draft.post(postings.wallet_refund(payment, refund))
    draft.tell_refund("succeeded", refund)
    return draft.decided(refund=refund)


def give_back(draft: Draft, paid: Attempt, refund_id: Id, *, cause: str, reason: str) -> None:
    """Kassa itself gives back what it must not keep: late money, or money that came twice."""
    payment = draft.payment
    refund = Refund(
        payment.home, refund_id, 0, payment.id, "reserved", paid.id, f"rfd_{refund_id}", payment.amount,
        payment.currency, 0, reason, cause, "{}", draft.now,
        _command(payment, paid, refund_id, payment.amount, reason),
    )  # fmt: skip
    draft.add(refund)
    draft.post(postings.refund_reserved(payment, refund))
    draft.due(refund, REFUND_TIMER, draft.now)
    draft.tell_refund("created", refund)


def cancel(aggregate: Aggregate, now: datetime, *, refund_id: Id) -> Change | KassaError:
    """A refund that the channel has never got is taken back. RefundNotRefundable once it may have been sent."""
    draft = Draft(aggregate, now)
    refund = draft.refunds.get(refund_id)
    if refund is None:
        return RefundNotFound()
    if refund.state == "cancelled":
        return draft.decided(refund=refund)
    if refund.state != "reserved" or refund.doubt_since is not None or refund.cause != "asked":
        return RefundNotRefundable("The refund may be at the channel already.", state=refund.state)
    refund = draft.move_refund(refund, RefundEvent.CANCEL)
    _give_reservation_back(draft, refund)
    draft.tell_refund("cancelled", refund)
    return draft.decided(refund=refund)


# A refund goes on


def look_at_refund(aggregate: Aggregate, now: datetime, *, refund_id: Id) -> Change | KassaError:
    """What is to be said to the channel about a refund now; stored as `sending` when it asks for money back."""
    draft = Draft(aggregate, now)
    refund = draft.refunds.get(refund_id)
    if refund is None:
        return RefundNotFound()
    if refund.state == "reserved":
        refund = draft.move_refund(refund, RefundEvent.SEND, sent_at=draft.now, sent_before=refund.sent_at)
        draft.due(refund, REFUND_TIMER, now + RECOVER_AFTER)
        return draft.decided(refund=refund, act=Operation.REFUND, subject=refund)
    if refund.state in REFUND_OPEN:
        return draft.decided(refund=refund, act=Operation.REFUND_QUERY, subject=refund)
    if refund.state == "succeeded":
        # Something that contradicts it was heard: how it stands now is asked, and asked again until it is known.
        draft.due(refund, REFUND_TIMER, now + LOOK_AGAIN)
        return draft.decided(refund=refund, act=Operation.REFUND_QUERY, subject=refund)
    draft.due(refund, REFUND_TIMER, None)
    return draft.decided(refund=refund)


def record_refund(
    aggregate: Aggregate, now: datetime, *, refund_id: Id, news: News, jitter: float
) -> Change | KassaError:
    """What a channel's answer or callback means for a refund and its payment."""
    draft = Draft(aggregate, now, jitter)
    refund = draft.refunds.get(refund_id)
    if refund is None:
        return ChannelMismatch("The channel speaks of a refund that this payment does not have.", number=refund_id)
    misfit = _misfit(refund, news)
    if misfit is not None:
        draft.keep(news, quarantined=misfit)
        _wait(draft, refund)
        return draft.decided(refund=refund, accepted=False)
    draft.keep(news)
    if _contradicts(refund, news) and not _is_fresh(refund, news):
        draft.due(refund, REFUND_TIMER, now + RECOVER_AFTER)
        return draft.decided(refund=refund, act=Operation.REFUND_QUERY, subject=refund)
    if refund.state == "succeeded":
        _record_after_success(draft, refund, news)
        return draft.decided(refund=refund)
    if refund.state not in REFUND_OPEN:
        return draft.decided(refund=refund)
    return _record_open(draft, refund, news)


def _contradicts(refund: Refund, news: News) -> bool:
    """Whether a query or callback says otherwise than we know. Messages overtake each other: what is said may be older
    than what we know, and a refund can go from abnormal to succeeded and back."""
    if news.operation is Operation.REFUND:
        return False
    match refund.state:
        case "succeeded":
            return isinstance(news.outcome, Closed | Failed | Abnormal)
        case "abnormal":
            return isinstance(news.outcome, Succeeded)
        case _:
            return False


def _is_fresh(refund: Refund, news: News) -> bool:
    """Whether this answers a question that was asked after the refund came to where it stands."""
    return news.operation is Operation.REFUND_QUERY and news.seen == refund.version


def _record_after_success(draft: Draft, refund: Refund, news: News) -> None:
    if not _is_fresh(refund, news):
        return
    match news.outcome:
        case Closed() | Failed() | Abnormal() as outcome:
            draft.due(refund, REFUND_TIMER, None)
            _reverse(draft, refund, outcome)
        case Succeeded():
            draft.due(refund, REFUND_TIMER, None)
        case _:
            draft.due(refund, REFUND_TIMER, draft.now + LOOK_AGAIN)


def _record_open(draft: Draft, refund: Refund, news: News) -> Change:
    operation = news.operation
    match news.outcome:
        case Succeeded() as outcome:
            _succeed(draft, refund, outcome)
        case Pending() as outcome:
            _accept(draft, refund, outcome)
        case Abnormal() as outcome:
            _mark_abnormal(draft, refund, outcome)
        case Closed() as outcome if refund.state != "reserved":
            _fail(draft, refund, outcome.evidence.code or "closed", outcome.evidence.text)
        case Failed() as outcome if refund.state != "reserved" and _is_proof(draft, refund, operation):
            _fail(draft, refund, outcome.code, outcome.reason)
        case NotFound() if operation is Operation.REFUND_QUERY and refund.state in ("sending", "unknown"):
            # The signed answer says that it is not there: the same bytes under the same number again.
            refund = draft.move_refund(
                refund, RefundEvent.SEND, doubt_since=refund.doubt_since or draft.now, tries=refund.tries + 1,
                sent_at=draft.now, sent_before=refund.sent_at,
            )  # fmt: skip
            draft.due(refund, REFUND_TIMER, draft.now + RECOVER_AFTER)
            return draft.decided(refund=refund, act=Operation.REFUND, subject=refund)
        case NotSent() if operation is Operation.REFUND and refund.state == "sending" and refund.doubt_since is None:
            refund = draft.move_refund(refund, RefundEvent.NOT_SENT, tries=refund.tries + 1, sent_at=refund.sent_before)
            draft.due(refund, REFUND_TIMER, draft.now + pause(ATTEMPT_PAUSES_S, refund.tries, draft.jitter))
        case _:
            _wait(draft, refund)
    return draft.decided(refund=refund)


def _misfit(refund: Refund, news: News) -> str | None:
    """What of the channel's words does not fit our own record."""
    outcome = news.outcome
    if not isinstance(outcome, Succeeded):
        return None
    if not outcome.evidence.authentic:
        return "the message is not signed"
    if outcome.amount is not None and outcome.amount != refund.amount:
        return f"says {outcome.amount}, we have {refund.amount} {refund.currency}"
    if outcome.currency is not None and outcome.currency != refund.currency:
        return f"says {outcome.currency}, we have {refund.amount} {refund.currency}"
    if refund.state in ("failed", "cancelled"):
        return f"says done, but here it is {refund.state}"
    return None


def _is_proof(draft: Draft, refund: Refund, operation: Operation) -> bool:
    """Whether a refusal ends the refund. Of a repeat it proves nothing about the sending before it, which may still be on
    its way, until that one's grace is over."""
    if operation is not Operation.REFUND:
        return True
    return refund.state == "sending" and (refund.sent_before is None or draft.now >= refund.sent_before + GRACE)


def _accept(draft: Draft, refund: Refund, outcome: Pending) -> None:
    if refund.state in ("processing", "abnormal"):
        _wait(draft, refund)
        return
    moved = draft.move_refund(
        refund, RefundEvent.ACCEPTED, channel_id=outcome.channel_id or refund.channel_id, doubt_since=None, tries=0
    )
    draft.due(moved, REFUND_TIMER, draft.now + pause(REFUND_PAUSES_S, 0, draft.jitter))


def _succeed(draft: Draft, refund: Refund, outcome: Succeeded) -> None:
    moved = draft.move_refund(
        refund, RefundEvent.DONE, channel_id=outcome.channel_id or refund.channel_id, doubt_since=None,
        succeeded_at=draft.now, failure_code=None, failure_reason=None,
    )  # fmt: skip
    payment = draft.payment
    draft.due(moved, REFUND_TIMER, None)
    draft.post(postings.refund_done(payment, refund))
    if refund.cause == "asked":
        draft.move_payment(
            PaymentEvent.REFUND_DONE,
            amount_refunding=payment.amount_refunding - refund.amount,
            fee_refunding=payment.fee_refunding - refund.fee_returned,
            amount_refunded=payment.amount_refunded + refund.amount,
            fee_refunded=payment.fee_refunded + refund.fee_returned,
        )
    draft.tell_refund("succeeded", moved)
    if refund.cause == "late":
        draft.move_payment(PaymentEvent.LATE_REFUND_DONE)
        draft.tell("late_refunded")


def _fail(draft: Draft, refund: Refund, code: str, reason: str | None) -> None:
    moved = draft.move_refund(
        refund, RefundEvent.FAILED, failure_code=code, failure_reason=reason, doubt_since=_person_asked(draft, refund)
    )
    _give_reservation_back(draft, moved)
    draft.tell_refund("failed", moved)
    if refund.cause == "duplicate":
        draft.tell("duplicate_held")
    if refund.cause == "late":
        draft.move_payment(PaymentEvent.LATE_REFUND_FAILED)
        draft.tell("held")


def _give_reservation_back(draft: Draft, refund: Refund) -> None:
    payment = draft.payment
    draft.due(refund, REFUND_TIMER, None)
    draft.post(postings.refund_released(payment, refund))
    if refund.cause == "asked":
        draft.move_payment(
            PaymentEvent.REFUND_RELEASED,
            amount_refunding=payment.amount_refunding - refund.amount,
            fee_refunding=payment.fee_refunding - refund.fee_returned,
        )


def _mark_abnormal(draft: Draft, refund: Refund, outcome: Abnormal) -> None:
    """The channel cannot credit the payer. A person must act there; we go on asking, and keep the reservation."""
    if refund.state == "abnormal":
        _wait(draft, refund)
        return
    moved = draft.move_refund(
        refund, RefundEvent.ABNORMAL, channel_id=outcome.channel_id or refund.channel_id, doubt_since=None,
        failure_code=outcome.evidence.code or "abnormal", failure_reason=outcome.evidence.text, tries=0,
    )  # fmt: skip
    draft.due(moved, REFUND_TIMER, draft.now + pause(REFUND_PAUSES_S, 2, draft.jitter))
    draft.tell_refund("abnormal", moved)


def _reverse(draft: Draft, refund: Refund, outcome: Closed | Failed | Abnormal) -> None:
    """It had succeeded, and the money came back: new transfers, and what was refunded may be refunded again."""
    payment = draft.payment
    code = outcome.code if isinstance(outcome, Failed) else outcome.evidence.code
    moved = draft.move_refund(
        refund, RefundEvent.REVERSED, failure_code=code or "reversed", failure_reason=outcome.evidence.text,
        doubt_since=_person_asked(draft, refund),
    )  # fmt: skip
    draft.post(postings.refund_reversed(payment, refund))
    draft.tell_refund("reversed", moved)
    if refund.cause == "asked":
        draft.move_payment(
            PaymentEvent.REFUND_REVERSED,
            amount_refunded=payment.amount_refunded - refund.amount,
            fee_refunded=payment.fee_refunded - refund.fee_returned,
        )
    elif refund.cause == "late":
        draft.move_payment(PaymentEvent.LATE_REFUND_REVERSED)
        draft.tell("held")
    else:
        draft.tell("duplicate_held")


def _person_asked(draft: Draft, refund: Refund) -> datetime | None:
    """A second payment that cannot be given back lies in suspense and no state of its payment shows it: the refund says
    since when a person is waited for, and so stands on the stuck list until `resolve`."""
    return draft.now if refund.cause == "duplicate" else None


def held_duplicate(draft: Draft) -> Refund | None:
    """The oldest second payment that a person must decide about."""
    held = (
        refund
        for refund in draft.refunds.values()
        if refund.cause == "duplicate" and refund.state in ("failed", "reversed") and refund.doubt_since is not None
    )
    return min(held, key=lambda refund: refund.id, default=None)


def resolve_duplicate(draft: Draft, held: Refund, decision: str, spare: Id, reason: str) -> None:
    """A person's decision about it: the merchant takes it, or it is given back under a new number."""
    draft.move_refund(held, RefundEvent.RESOLVED, doubt_since=None)
    if decision == "accept":
        draft.post(postings.late_accepted(draft.payment))
        draft.tell("duplicate_accepted")
    else:
        give_back(draft, draft.attempts[held.attempt or Id("")], spare, cause="duplicate", reason=reason)


def _wait(draft: Draft, refund: Refund) -> None:
    """Nothing new: asked again later, each time after a longer pause."""
    match refund.state:
        case "reserved":
            draft.due(refund, REFUND_TIMER, draft.now + pause(ATTEMPT_PAUSES_S, refund.tries, draft.jitter))
        case "sending":
            moved = draft.move_refund(
                refund, RefundEvent.LOST, doubt_since=refund.doubt_since or draft.now, tries=refund.tries + 1
            )
            draft.due(moved, REFUND_TIMER, draft.now + pause(ATTEMPT_PAUSES_S, moved.tries, draft.jitter))
        case "unknown":
            moved = draft.move_refund(refund, RefundEvent.ASKED, tries=refund.tries + 1)
            draft.due(moved, REFUND_TIMER, draft.now + pause(ATTEMPT_PAUSES_S, moved.tries, draft.jitter))
        case "processing" | "abnormal":
            moved = draft.move_refund(refund, RefundEvent.ASKED, tries=refund.tries + 1)
            draft.due(moved, REFUND_TIMER, draft.now + pause(REFUND_PAUSES_S, moved.tries, draft.jitter))
        case _:
            pass


def rearm(draft: Draft, at: datetime) -> None:
    """Timers for every refund that is not final."""
    for refund in draft.refunds.values():
        if refund.state in REFUND_OPEN:
            draft.due(refund, REFUND_TIMER, at)


# Commands


def _command(payment: Payment, paid: Attempt, number: Id, amount: int, reason: str | None) -> str:
    charge = msgspec.json.decode(paid.request or "", type=channel.Charge)
    command = channel.Refund(
        number=number,
        charge_number=paid.id,
        amount=amount,
        charge_amount=payment.amount,
        currency=payment.currency,
        notify_url=charge.notify_url,
        reason=reason,
    )
    return msgspec.json.encode(command).decode()


def read_command(refund: Refund) -> channel.Refund:
    """The stored command, to be sent again as it was. `repeat`: an earlier sending may have been taken in."""
    command = msgspec.json.decode(refund.request or "", type=channel.Refund)
    return replace(command, repeat=refund.doubt_since is not None)
