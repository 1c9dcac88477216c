"""From what a service has come to, to an HTTP answer: 201, 202 with Location, a repeat, or a refusal that is kept."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from kassa.api.http import Request, Response
from kassa.api.idempotency import REPLAYED, refuse
from kassa.api.prefer import Preference, read_prefer
from kassa.api.problem import CONTENT_TYPE as PROBLEM
from kassa.db.away import AWAY
from kassa.errors import IdempotencyInProgress, KassaError
from kassa.journal.change import OnceKey
from kassa.journal.journal import Journal
from kassa.merchants.model import Caller
from kassa.observability.log import logger
from kassa.payments.service import Answer

OPEN_STATES = frozenset(
    {
        "processing", "closing", "late_succeeded", "late_refunding",
        "reserved", "sending", "unknown",
    }
)  # fmt: skip
"""States of payments, top-ups and refunds in which something is still to come."""

LOOK_S = 0.05
LOOK_MAX_S = 0.5
"""Between looks at a thing that somebody waits for."""

Look = Callable[[str], Awaitable[Answer]]
"""Reads a thing by its public id, as it stands."""

log = logger("kassa.api.answers")


class Statuses(Protocol):
    """Keeps the status that the first request of a key was told."""

    async def note(self, home: int, once: OnceKey, status: int) -> None: ...


class _State(msgspec.Struct):
    state: str


_read_state = msgspec.json.Decoder(_State).decode


class Answers:
    """Turns a service's answers into responses, as the caller prefers."""

    def __init__(self, journal: Journal, statuses: Statuses, *, channel_wait_s: float, repeat_wait_s: float) -> None:
        """channel_wait_s: how long a caller without preference waits; repeat_wait_s: how long a repeat does."""
        self._journal = journal
        self._statuses = statuses
        self._channel_wait_s = channel_wait_s
        self._repeat_wait_s = repeat_wait_s

    async def answer(
        self,
        request: Request,
        caller: Caller,
        once: OnceKey | None,
        act: Callable[[float], Awaitable[Answer]],
        *,
        path: str,
        look: Look,
    ) -> Response:
        """Acts, and answers. act: takes how long it may wait for the channel. path: where `look` finds the thing.

        A judged refusal is kept under the key.
        """
        started = time.monotonic()
        preference = read_prefer(request.headers.get("prefer"))
        try:
            found = await act(self._wait_s(preference))
        except KassaError as error:
            return await refuse(self._journal, caller.merchant.home, once, error, request)
        if found.problem:
            return Response(found.status, found.body, REPLAYED, PROBLEM)
        if found.replayed and found.running and found.status != 202 and preference.applied is None:
            found = await self._until_answered(found, look)
        if preference.wait_s is not None:
            found = await self._until_final(found, look, started + preference.wait_s)
        response = _response(found, preference, path)
        if once is not None and not found.replayed and response.status != found.status:
            await self._note(caller.merchant.home, once, response.status)
        return response

    async def _note(self, home: int, once: OnceKey, status: int) -> None:
        """Repeats are told 202 too. The request was taken whether or not this succeeds."""
        try:
            await self._statuses.note(home, once, status)
        except AWAY as error:
            log.warning("answer.status_not_noted", error=type(error).__name__)

    def _wait_s(self, preference: Preference) -> float:
        if preference.is_async:
            return 0.0
        return self._channel_wait_s if preference.wait_s is None else float(preference.wait_s)

    async def _until_answered(self, found: Answer, look: Look) -> Answer:
        """The first request of this key is still talking to the channel: wait a little for it."""
        deadline = time.monotonic() + self._repeat_wait_s
        while found.running:
            if time.monotonic() >= deadline:
                raise IdempotencyInProgress(resource=found.name)
            await asyncio.sleep(LOOK_S)
            found = _as_now(found, await look(found.name))
        return found

    async def _until_final(self, found: Answer, look: Look, deadline: float) -> Answer:
        """The caller wants to wait for the end."""
        pause_s = LOOK_S
        while not _is_final(found) and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, LOOK_MAX_S)
            found = _as_now(found, await look(found.name))
        return found


def _as_now(found: Answer, seen: Answer) -> Answer:
    return seen._replace(status=found.status, replayed=found.replayed)


def _is_final(found: Answer) -> bool:
    return not found.running and _read_state(found.body).state not in OPEN_STATES


def _response(found: Answer, preference: Preference, path: str) -> Response:
    """202 only where the caller asked not to wait (any longer) and there is something left to wait for; a repeat is told
    the first status, whatever it prefers, unless the first request is still under way."""
    headers = REPLAYED if found.replayed else ()
    status = found.status
    if preference.applied is not None:
        headers = (*headers, ("Preference-Applied", preference.applied))
        if found.running or not (found.replayed or _is_final(found)):
            status = 202
    if status == 202:
        headers = (*headers, ("Location", path + found.name))
    return Response(status, found.body, headers)
