"""A route: who may call it, what goes in, what can come out. The router and the OpenAPI document are made of these."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, cast

from kassa.api.http import Handler, Later, Request, Response, problem_response
from kassa.api.limits import Fairness
from kassa.db.away import AWAY
from kassa.errors import AuthForbidden, AuthInvalid, DatabaseUnreachable, KassaError
from kassa.merchants.directory import Directory
from kassa.merchants.model import Caller

Answering = Callable[[Request, Caller], Awaitable[Response] | Response]
"""A handler that knows who asks."""


class Answer(NamedTuple):
    """One way to succeed."""

    type: Any
    """A msgspec type; None: no body."""
    says: str


class Route(NamedTuple):
    """One method of one path."""

    method: str
    pattern: str
    says: str
    """One sentence for the documentation."""
    handler: Answering | Handler
    answers: Mapping[int, Answer]
    scope: int | None = None
    """Any of these scopes will do; None: no API key is asked for."""
    body: Any = None
    query: Any = None
    problems: tuple[type[KassaError], ...] = ()
    """What else can be answered, besides what every route may answer."""
    is_keyed: bool = False
    """Takes an Idempotency-Key."""
    needs_key: bool = False
    """Refuses to go without one."""
    prefers: bool = False
    """Looks at Prefer."""
    example: Any = None
    """A body, as in the documentation."""


CHALLENGE = (("WWW-Authenticate", "Bearer"),)


class Guard:
    """Knows who asks before a handler runs."""

    def __init__(self, directory: Directory, fairness: Fairness) -> None:
        self._directory = directory
        self._fairness = fairness

    def handler(self, route: Route) -> Handler:
        """The route's handler behind its guard."""
        if route.scope is None:
            return _reading(cast(Handler, route.handler))
        # Plain integers: the operators of an IntFlag cost more than the look into the directory.
        known, answer, scope = self._directory.known, cast(Answering, route.handler), int(route.scope)
        late, admit = self._late, self._fairness.admit

        def guarded(request: Request) -> Awaitable[Response] | Response:
            header = request.headers.get("authorization", "")
            if header[:7].lower() != "bearer ":
                return _refuse(request, header)
            caller = known(header[7:])
            if caller is None:
                return late(request, header[7:], answer, scope)
            if not caller.scopes & scope:
                raise AuthForbidden
            places = admit(caller)
            try:
                result = answer(request, caller)
            except BaseException:
                places.leave()
                raise
            if isinstance(result, Later):
                result.then(places.leave)
                return result
            if isinstance(result, asyncio.Future):
                result.add_done_callback(places.leave)
                return result
            if isinstance(result, Response):
                places.leave()
                return result
            return places.held(_truthful(result))

        return guarded

    async def _late(self, request: Request, key: str, answer: Answering, scope: int) -> Response:
        """The way of a key that is not in memory: it must be read first."""
        caller = await self._directory.caller(key)
        if caller is None:
            return problem_response(AuthInvalid(), request, CHALLENGE)
        if not caller.scopes & scope:
            raise AuthForbidden
        return await self._fairness.admit(caller).held(_answered(answer, request, caller))


async def _answered(answer: Answering, request: Request, caller: Caller) -> Response:
    result = answer(request, caller)
    return result if isinstance(result, Response) else await _truthful(result)


def _refuse(request: Request, header: str) -> Response:
    detail = "Authorization must be: Bearer, one space, the API key." if header else None
    return problem_response(AuthInvalid(detail), request, CHALLENGE)


def _reading(handler: Handler) -> Handler:
    def guarded(request: Request) -> Awaitable[Response] | Response:
        result = handler(request)
        return result if isinstance(result, Response | Later) else _truthful(result)

    return guarded


async def _truthful(result: Awaitable[Response]) -> Response:
    """An answer; a database that is away is told as such and not as a fault of ours."""
    try:
        return await result
    except AWAY as error:
        raise DatabaseUnreachable(reason=type(error).__name__) from error
