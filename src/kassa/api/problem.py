"""How a refusal looks on the wire: RFC 9457 problem documents, `application/problem+json`.

What is refused, and why, is `errors.py`'s; who sends the bytes is `http.py`.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from kassa.errors import BrokerUnreachable, DatabaseFull, DatabaseUnreachable, KassaError, OutcomeUnknown, Retry

CONTENT_TYPE = "application/problem+json"

_RETRY_AFTER_S = {409: 1, 429: 1, 503: 1}
"""Seconds to wait when the error does not name its own: what is running or queued here takes well under one."""

_TOLD_AS: Mapping[type[KassaError], type[KassaError]] = {
    DatabaseUnreachable: OutcomeUnknown,
    DatabaseFull: OutcomeUnknown,
    BrokerUnreachable: OutcomeUnknown,
}
"""Which part of us is away is for the operator; a client can only repeat. docs/decisions/what-a-503-says.md"""

_encode = msgspec.json.Encoder(enc_hook=str, decimal_format="string").encode


def problem(error: KassaError, request_id: str | None = None) -> dict[str, Any]:
    """The members of the document. The error's facts follow under their own names and never replace a member.

    `errors` is a list of `{"field", "message"}`, empty unless the error names fields.
    What is our own fault is told in its class's sentence alone: detail and facts (addresses, SQL) are for the log.
    """
    is_ours = error.status >= 500
    told_as = next((told for kind, told in _TOLD_AS.items() if isinstance(error, kind)), None)
    code = error.code if told_as is None else told_as.code
    members: dict[str, Any] = {
        "type": f"urn:kassa:problem:{code}",
        "title": _sentence(told_as or type(error)),
        "status": error.status,
        "detail": _sentence(type(error)) if is_ours else error.detail,
        "code": code,
        "outcome": error.outcome,
        "retryable": error.retry is not Retry.NEVER,
        "errors": error.facts.get("errors", []),
        "request_id": request_id,
    }
    if is_ours:
        return members
    return members | {name: fact for name, fact in error.facts.items() if name not in members}


def problem_body(error: KassaError, request_id: str | None = None) -> bytes:
    """The document as JSON. Facts that JSON does not know travel as their text."""
    return _encode(problem(error, request_id))


def retry_after_s(error: KassaError) -> int | None:
    """Seconds for `Retry-After`, for answers that a repeat may change soon; None when there is nothing to wait for."""
    if error.retry is Retry.NEVER or error.status not in _RETRY_AFTER_S:
        return None
    asked = error.facts.get("retry_after_s")
    return asked if isinstance(asked, int) else _RETRY_AFTER_S[error.status]


def _sentence(kind: type[KassaError]) -> str:
    return " ".join((kind.__doc__ or kind.code).split())
