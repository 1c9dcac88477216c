"""`Idempotency-Key`: which requests are the same, and what a repeat is told. The journal keeps the keys."""

import hashlib
import re
from typing import Any

import msgspec

from kassa.api.http import Request, Response, problem_response
from kassa.api.problem import CONTENT_TYPE as PROBLEM
from kassa.api.problem import problem_body
from kassa.errors import IdempotencyKeyMissing, IdempotencyKeyReused, KassaError, Retry
from kassa.journal.change import Again, Change, KeyReused, OnceKey, Reply
from kassa.journal.journal import Journal

OPERATION = "rest"
"""One space of keys for the whole API; method and path are part of the digest."""
DIGEST_BYTES = 16
"""A client can only deceive itself with a collision, so 128 bits are plenty."""
REPLAYED = (("Idempotent-Replayed", "true"),)

_KEY = re.compile(r"[!-~]{1,255}")
_canonical = msgspec.json.Encoder(order="deterministic").encode


def read_key(request: Request) -> str | None:
    """The key of a request; None when there is none. Raises IdempotencyKeyMissing for what is not a key."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if _KEY.fullmatch(key) is None:
        raise IdempotencyKeyMissing("The Idempotency-Key must have 1 to 255 visible ASCII characters.")
    return key


def require_once(request: Request, body: Any) -> OnceKey:
    """The once key of a request that moves money. Raises IdempotencyKeyMissing."""
    key = read_key(request)
    if key is None:
        raise IdempotencyKeyMissing
    return OnceKey(OPERATION, key, digest(request, body))


def optional_once(request: Request, body: Any) -> OnceKey | None:
    """The once key of a request that may be made without one."""
    key = read_key(request)
    return None if key is None else OnceKey(OPERATION, key, digest(request, body))


def digest(request: Request, body: Any) -> bytes:
    """What makes two requests the same: method, path, and the body as it was understood (not as it was written)."""
    text = b"%b %b\n%b" % (request.method.encode(), request.path.encode(), _canonical(body))
    return hashlib.sha256(text).digest()[:DIGEST_BYTES]


def stored_problem(reply: Reply) -> Response | None:
    """The refusal that the first request got, as it was; None when it was not refused."""
    if reply.problem is None:
        return None
    return Response(reply.status, reply.problem, REPLAYED, PROBLEM)


def is_final(error: KassaError) -> bool:
    """Whether a refusal answers the key for good: it was judged, and no repeat would be judged otherwise."""
    return 400 <= error.status < 500 and error.retry is Retry.NEVER and not isinstance(error, IdempotencyKeyReused)


async def refuse(journal: Journal, home: int, once: OnceKey | None, error: KassaError, request: Request) -> Response:
    """Answers a judged refusal, and keeps it under the key, so that a repeat is refused as it was."""
    if once is None or not is_final(error):
        return problem_response(error, request)
    reply = Reply(error.status, None, problem_body(error, request.id or None))
    match await journal.commit(Change(home=home, once=once, reply=reply)):
        case Again(first) if first.problem is not None:
            # The same request came twice at once, and the other one was quicker to be refused.
            return Response(first.status, first.problem, REPLAYED, PROBLEM)
        case KeyReused():
            return problem_response(IdempotencyKeyReused(), request)
        case _:
            return problem_response(error, request)
