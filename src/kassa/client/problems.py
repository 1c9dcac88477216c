"""From what the server answers to the error that is raised, and to whether a repeat can help. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from kassa import errors
from kassa.errors import KassaError

TRIES_MAX = 5
"""One call and four repeats: with the pauses below some ten seconds, which outlasts a restart of the server."""
PAUSE_FIRST_S = 0.2
PAUSE_MAX_S = 5.0
RETRY_AFTER_MAX_S = 30.0
"""A server that wants us to wait longer is told to the caller instead."""

_NOT_FACTS = frozenset({"type", "title", "status", "detail", "code"})
_BUSY = frozenset({429, 503})


def pause_s(tries: int, retry_after: str | None, chance: float) -> float:
    """How long to wait before the next try. chance: random, 0 to 1, so that clients do not come back together."""
    grown = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2.0 ** (tries - 1))
    asked = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
    return min(RETRY_AFTER_MAX_S, asked) + grown * (0.5 + chance / 2)


def may_repeat(status: int, problem: Mapping[str, Any]) -> bool:
    """Whether the same request with the same key may get another answer."""
    if status in _BUSY or problem.get("code") == "idempotency.in_progress":
        return True
    # A proxy's 502 or 504 says nothing about the request, and neither does an error without a problem document.
    return status >= 500 and problem.get("outcome", "unknown") == "unknown"


def read_problem(body: bytes) -> dict[str, Any]:
    """The members of a problem document; empty when it is none."""
    try:
        members = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return members if isinstance(members, dict) else {}


def error_of(status: int, problem: Mapping[str, Any], **more: Any) -> KassaError:
    """The error for a problem document. A code that this client does not know becomes a plain KassaError.

    Its facts are the document's: `outcome`, `retryable`, `errors`, `request_id` and those of the refusal itself.
    """
    facts = {name: value for name, value in problem.items() if name not in _NOT_FACTS} | more
    code = problem.get("code")
    detail = problem.get("detail")
    kind = _BY_CODE.get(code) if isinstance(code, str) else None
    if kind is not None:
        return kind(detail if isinstance(detail, str) else None, **facts)
    said = detail if isinstance(detail, str) else f"The server answered {status}."
    return KassaError(said, code=code, status=status, **facts)


def _all(kind: type[KassaError]) -> Iterator[type[KassaError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _all(inner)


_BY_CODE: dict[str, type[KassaError]] = {
    kind.code: kind for kind in _all(errors.KassaError) if kind.code != KassaError.code
} | {errors.Unexpected.code: errors.Unexpected}
