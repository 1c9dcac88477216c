"""The whole error tree: what can be refused, whether a repeat can help, and the sentence that a person reads.

Codes are public API (`noun.reason`). The docstring of a class is its message; facts travel by name.
"""

from enum import Enum
from typing import Any, ClassVar


class Retry(Enum):
    """Whether, and how, the caller may try again."""

    NEVER = "never"
    """The same request will be refused again."""
    SAME_KEY = "same_key"
    """Repeat with the same idempotency key: what happened is not known, or is about to be."""
    LATER = "later"
    """Nothing happened; try again after a while."""


class KassaError(Exception):
    """Something was refused or failed."""

    code: ClassVar[str] = "system.error"
    retry: ClassVar[Retry] = Retry.NEVER
    status: ClassVar[int] = 500
    """The HTTP status that answers it."""
    outcome: ClassVar[str] = "not_processed"
    """What is known of the idempotency key: not_processed, processed or unknown."""

    def __init__(self, detail: str | None = None, **facts: Any) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.facts = facts
        super().__init__(self.detail)

    def __str__(self) -> str:
        facts = ", ".join(f"{name}={value}" for name, value in self.facts.items())
        return f"{self.code}: {self.detail}" + (f" ({facts})" if facts else "")


class InvariantBroken(KassaError):
    """Something that must never happen did; the work stops here."""

    code = "system.invariant_broken"
    outcome = "unknown"


# Requests


class RequestInvalid(KassaError):
    """The request is not valid; `errors` names each field and its fault."""

    code, status = "request.invalid", 400


class RequestTooLarge(KassaError):
    """The request is larger than this server takes."""

    code, status = "request.too_large", 413


class HeadersTooLarge(KassaError):
    """The request line and headers are larger than this server takes."""

    code, status = "request.headers_too_large", 431


class RequestTimeout(KassaError):
    """The request did not arrive in full in time; nothing of it was done."""

    code, status, retry = "request.timeout", 408, Retry.LATER


class MethodNotAllowed(KassaError):
    """This path exists, but not with this method."""

    code, status = "request.method_not_allowed", 405


class RouteNotFound(KassaError):
    """There is nothing at this path."""

    code, status = "request.not_found", 404


class MediaTypeUnsupported(KassaError):
    """The body must be application/json."""

    code, status = "request.media_type", 415


class IdempotencyKeyMissing(KassaError):
    """A request that moves money needs an Idempotency-Key header (1-255 visible ASCII characters)."""

    code, status = "idempotency.key_missing", 400


class IdempotencyKeyReused(KassaError):
    """This Idempotency-Key was used with another path or body."""

    code, status = "idempotency.key_reused", 422
    outcome = "unknown"


class IdempotencyInProgress(KassaError):
    """The first request with this Idempotency-Key is still running."""

    code, status, retry = "idempotency.in_progress", 409, Retry.SAME_KEY
    outcome = "unknown"


# Who asks


class AuthInvalid(KassaError):
    """The API key is missing, unknown or revoked."""

    code, status = "auth.invalid", 401


class AuthForbidden(KassaError):
    """This API key may not do that."""

    code, status = "auth.forbidden", 403


# Things


class PaymentNotFound(KassaError):
    """There is no such payment."""

    code, status = "payment.not_found", 404


class TopupNotFound(KassaError):
    """There is no such top-up."""

    code, status = "topup.not_found", 404


class RefundNotFound(KassaError):
    """There is no such refund."""

    code, status = "refund.not_found", 404


class WalletNotFound(KassaError):
    """There is no such wallet."""

    code, status = "wallet.not_found", 404


class EventNotFound(KassaError):
    """There is no such event."""

    code, status = "event.not_found", 404


class WebhookEndpointNotFound(KassaError):
    """There is no such webhook endpoint."""

    code, status = "webhook_endpoint.not_found", 404


class MerchantNotFound(KassaError):
    """There is no such merchant."""

    code, status = "merchant.not_found", 404


class ApiKeyNotFound(KassaError):
    """There is no such API key."""

    code, status = "api_key.not_found", 404


class ChannelNotFound(KassaError):
    """This merchant has no such channel."""

    code, status = "channel.not_found", 404


class QueueNotFound(KassaError):
    """There is no such queue, topic or group."""

    code, status = "queue.not_found", 404


class QueueMismatch(KassaError):
    """A queue, topic or exchange of that name is there in another form than the one that is asked for."""

    code, status = "queue.mismatch", 409


# Money


class CurrencyUnknown(KassaError):
    """The currency is not an ISO 4217 code that Kassa knows."""

    code, status = "currency.unknown", 400


class AmountInvalid(KassaError):
    """An amount is a whole number of minor units from 1 to 9007199254740991."""

    code, status = "amount.invalid", 400


class WalletInsufficientFunds(KassaError):
    """The wallet does not hold enough available money."""

    code, status = "wallet.insufficient_funds", 402


class RefundInsufficientBalance(KassaError):
    """The merchant's balance does not cover the refund."""

    code, status = "refund.insufficient_balance", 402


# Payments and refunds


class PaymentOrderExists(KassaError):
    """There is already a payment for this order_id."""

    code, status = "payment.order_exists", 409


class PaymentNotClosable(KassaError):
    """The payment cannot be closed in its present state."""

    code, status, outcome = "payment.not_closable", 409, "processed"


class PaymentNotPayable(KassaError):
    """The payment takes no further attempt in its present state."""

    code, status = "payment.not_payable", 409


class PaymentNotHeld(KassaError):
    """Only a payment whose money is held, late or paid twice, can be resolved."""

    code, status = "payment.not_held", 409


class AttemptInDoubt(KassaError):
    """An attempt is still in doubt; another way to pay is allowed when its outcome is known."""

    code, status, retry = "attempt.in_doubt", 409, Retry.LATER


class RefundExceedsPaid(KassaError):
    """A refund would return more than was paid."""

    code, status = "refund.exceeds_paid", 409


class RefundNotRefundable(KassaError):
    """The payment cannot be refunded in its present state."""

    code, status = "refund.not_refundable", 409


class RefundIdExists(KassaError):
    """There is already a refund with this refund_id."""

    code, status = "refund.id_exists", 409


class WalletExists(KassaError):
    """This user already has a wallet in this currency."""

    code, status = "wallet.exists", 409


class IllegalTransition(KassaError):
    """The table of legal moves has no such move."""

    code, status = "state.illegal_transition", 409


# The system


class TooMany(KassaError):
    """Too many requests at once, or too fast; nothing of this one was done. Wait as long as Retry-After says."""

    code, status, retry, outcome = "system.too_many", 429, Retry.LATER, "unknown"


class Busy(KassaError):
    """Kassa has more work than it can promise to do in time; nothing of this request was done."""

    code, status, retry, outcome = "system.busy", 503, Retry.LATER, "unknown"


class Unexpected(KassaError):
    """Something went wrong inside Kassa; repeat with the same Idempotency-Key to learn what became of the request."""

    code, status, retry, outcome = "system.error", 500, Retry.SAME_KEY, "unknown"


class OutcomeUnknown(KassaError):
    """It is not known whether the request took effect; repeat it with the same Idempotency-Key."""

    code, status, retry, outcome = "system.unknown", 503, Retry.SAME_KEY, "unknown"


class DatabaseUnreachable(KassaError):
    """The database cannot be reached."""

    code, status, retry, outcome = "database.unreachable", 503, Retry.SAME_KEY, "unknown"


class BrokerUnreachable(KassaError):
    """The message broker cannot be reached."""

    code, status, retry, outcome = "broker.unreachable", 503, Retry.LATER, "unknown"


class DatabaseRefused(KassaError):
    """The database is not one that this program may use; the detail says what to do."""

    code = "database.refused"


class SettingInvalid(KassaError):
    """A setting is not valid; the detail names it and where it came from."""

    code = "setting.invalid"


# Channels


class ChannelMessageInvalid(KassaError):
    """A message that claims to come from a channel is not authentic, too old or not readable."""

    code, status = "channel.message_invalid", 401


class ChannelKeyUnknown(ChannelMessageInvalid):
    """A message names a key of its channel that is not known here, or not valid at this time."""

    code = "channel.key_unknown"


class ChannelMismatch(KassaError):
    """A channel's authentic message does not fit our own record; it is quarantined."""

    code, status = "channel.mismatch", 409


# The client


class ServerUnreachable(KassaError):
    """Kassa cannot be reached or does not answer; this call may be made again."""

    code, status, retry = "client.server_unreachable", 503, Retry.LATER


class WebhookInvalid(KassaError):
    """A webhook is not signed with this secret, or it is too old or too new."""

    code, status = "webhook.invalid", 400
