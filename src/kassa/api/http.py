"""The HTTP/1.1 server: bytes of a connection in, requests to one handler, answers out in order.

Our own, because on the hottest route a framework costs more than the payment does. No TLS, no HTTP/2, no streaming: a
proxy in front does the first two, and nothing here needs the third. What a request means is not decided here.
"""

import asyncio
import functools
import inspect
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from itertools import count
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, unquote

import httptools

from kassa.api.problem import CONTENT_TYPE as PROBLEM
from kassa.api.problem import problem_body, retry_after_s
from kassa.errors import (
    Busy,
    HeadersTooLarge,
    InvariantBroken,
    KassaError,
    MethodNotAllowed,
    RequestInvalid,
    RequestTimeout,
    RequestTooLarge,
    RouteNotFound,
    Unexpected,
)
from kassa.observability.log import logger

JSON = "application/json"

log = logger("kassa.api.http")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection, and all of them together, may ask of this process."""

    head_bytes_max: int = 32 * 1024
    """Request line and headers; more is 431."""
    headers_max: int = 100
    """Header lines; more is 431. Trailers are not kept, and count by their bytes alone."""
    body_bytes_max: int = 1024 * 1024
    """More is 413."""
    read_s: float = 15.0
    """For the head, and again for the body; then 408. Stops those who send a byte a minute."""
    idle_s: float = 75.0
    """A kept-alive connection without a request; longer than the usual 60 s of proxies, so that they close first."""
    write_s: float = 30.0
    """A client that does not read its answers; then the connection is cut."""
    linger_s: float = 2.0
    """After a fault we go on reading so long, because closing on unread bytes would destroy the answer on its way."""
    pipeline_max: int = 32
    """Requests of one connection that wait for their turn; then we stop reading."""
    connections_max: int = 10_000
    """More are answered 503."""
    tick_s: float = 1.0
    """How often time-outs are looked at, and the Date header renewed: at least once a second."""


class Request:
    """One request, whole. Header names are lower case; `path` is as sent (percent-encoded), `params` are decoded."""

    __slots__ = (
        "_query",
        "body",
        "headers",
        "id",
        "keep_alive",
        "method",
        "params",
        "path",
        "peer",
        "query_string",
        "received_at_s",
        "route",
        "version",
    )

    def __init__(
        self,
        method: str,
        path: str,
        query_string: str = "",
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        peer: str = "",
    ) -> None:
        self.method = method
        self.path = path
        self.query_string = query_string
        self.headers = headers if headers is not None else {}
        self.body = body
        self.peer = peer
        """The address of the other end of the connection; empty when there is none."""
        self.params: dict[str, str] = {}
        """What stood for `{name}` in the route."""
        self.route = ""
        """The pattern that matched, for metrics; empty when none did."""
        self.id = ""
        """Names this request in problems and logs; sent back as `Request-Id`."""
        self.keep_alive = True
        self.version = "1.1"
        self.received_at_s = 0.0
        """`time.perf_counter()` when the last byte was there."""
        self._query: dict[str, str] | None = None

    @property
    def query(self) -> dict[str, str]:
        """The query's fields, decoded. Raises RequestInvalid when one comes twice or is not UTF-8."""
        if self._query is None:
            self._query = _parse_query(self.query_string)
        return self._query


@dataclass(slots=True)
class Response:
    """One answer, whole. Header values are ASCII without line breaks; length, date and connection are added here."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = JSON


class Later:
    """An answer that somebody will give: a future without the event loop, for the hottest route. Can be awaited too."""

    __slots__ = ("_answer", "_listeners")

    def __init__(self) -> None:
        self._answer: Response | BaseException | None = None
        self._listeners: list[Callable[[Response | BaseException], None]] = []

    def give(self, answer: Response | BaseException) -> None:
        """The answer, or why there is none. What comes after the first one is not heard."""
        if self._answer is None:
            self._answer = answer
            for listener in self._listeners:
                listener(answer)

    def then(self, listener: Callable[[Response | BaseException], None]) -> None:
        """Whom else to tell, in this order; it may be at once."""
        self._listeners.append(listener)
        if self._answer is not None:
            listener(self._answer)

    def __await__(self) -> Generator[Any, None, Response]:
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def given(answer: Response | BaseException) -> None:
            if future.done():
                return
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        self.then(given)
        return future.__await__()


Handler = Callable[[Request], Awaitable[Response] | Response]
"""May answer at once, say that somebody will (Later), return a future (no task is made), or be a coroutine function.

Raises KassaError to refuse. A client that hangs up does not cancel it: what was begun is finished."""


class Observer(Protocol):
    """Told of every answer; must be quick and must not raise."""

    def __call__(self, request: Request, status: int, seconds: float) -> None: ...


def problem_response(error: KassaError, request: Request, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """The answer that tells of a refusal."""
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers = (*headers, ("Retry-After", str(wait_s)))
    return Response(error.status, problem_body(error, request.id or None), headers, PROBLEM)


def _parse_query(query_string: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query_string, keep_blank_values=True, errors="strict", max_num_fields=100)
    except ValueError as fault:
        raise RequestInvalid("The query is not readable.", errors=[{"field": "", "message": str(fault)}]) from fault
    fields = dict(pairs)
    if len(fields) != len(pairs):
        repeated = next(name for name in fields if sum(name == other for other, _ in pairs) > 1)
        raise RequestInvalid(errors=[{"field": repeated, "message": "is given more than once"}])
    return fields


# Routes


class _Route:
    """One pattern and its handlers by method."""

    __slots__ = ("handlers", "pattern", "segments")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.segments = pattern.split("/")
        self.handlers: dict[str, Handler] = {}

    def names(self) -> list[bool]:
        return [segment.startswith("{") for segment in self.segments]

    def match(self, segments: list[str]) -> dict[str, str] | None:
        """What stands for each name; None when this is another path. A name never stands for nothing."""
        params: dict[str, str] = {}
        for expected, given in zip(self.segments, segments, strict=True):
            if expected.startswith("{"):
                if not given:
                    return None
                params[expected[1:-1]] = given
            elif expected != given:
                return None
        return {name: _decoded(value) for name, value in params.items()}


def _decoded(segment: str) -> str:
    if "%" not in segment:
        return segment
    try:
        text = unquote(segment, errors="strict")
    except UnicodeDecodeError as fault:
        raise RequestInvalid("The path is not UTF-8.") from fault
    if not text.isprintable():
        raise RouteNotFound
    return text


class Router:
    """Finds the handler of a path and method; is itself a handler.

    Paths without names are one look in a dict. Of patterns, literal segments win over names. HEAD is answered by GET's
    handler (the server leaves the body out), OPTIONS here.
    """

    def __init__(self) -> None:
        self._exact: dict[str, _Route] = {}
        self._patterns: dict[int, list[_Route]] = {}

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Raises InvariantBroken when this method and pattern has a handler already."""
        route = self._route(pattern)
        if method in route.handlers:
            raise InvariantBroken("Two handlers for one route.", method=method, pattern=pattern)
        route.handlers[method] = handler

    def routes(self) -> list[tuple[str, str]]:
        """(method, pattern) of all that was added."""
        routes = [*self._exact.values(), *(route for same in self._patterns.values() for route in same)]
        return [(method, route.pattern) for route in routes for method in route.handlers]

    def __call__(self, request: Request) -> Awaitable[Response] | Response:
        route = self._exact.get(request.path) or self._search(request)
        request.route = route.pattern
        handler = route.handlers.get(request.method)
        if handler is not None:
            return handler(request)
        return self._other_method(route, request)

    def _route(self, pattern: str) -> _Route:
        if "{" not in pattern:
            return self._exact.setdefault(pattern, _Route(pattern))
        same = self._patterns.setdefault(pattern.count("/"), [])
        known = next((route for route in same if route.pattern == pattern), None)
        if known is not None:
            return known
        route = _Route(pattern)
        same.append(route)
        same.sort(key=_Route.names)
        return route

    def _search(self, request: Request) -> _Route:
        if request.method == "OPTIONS" and request.path == "*":
            return _Route("*")
        segments = request.path.split("/")
        for route in self._patterns.get(len(segments) - 1, ()):
            params = route.match(segments)
            if params is not None:
                request.params = params
                return route
        raise RouteNotFound(path=request.path[:200])

    def _other_method(self, route: _Route, request: Request) -> Awaitable[Response] | Response:
        if request.method == "HEAD" and "GET" in route.handlers:
            return route.handlers["GET"](request)
        allow = (("Allow", ", ".join(_allowed(route.handlers))),)
        if request.method == "OPTIONS":
            return Response(204, headers=allow)
        return problem_response(MethodNotAllowed(method=request.method), request, allow)


def _allowed(methods: Iterable[str]) -> list[str]:
    with_head = {"HEAD"} if "GET" in methods else set()
    return sorted({*methods, "OPTIONS"} | with_head)


# Bytes


@functools.lru_cache(maxsize=256)
def _head_start(status: int, content_type: str) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {content_type}\r\nContent-Length: ".encode("ascii")


def _bodiless_head(status: int) -> bytes:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode("ascii")


def _header_lines(headers: tuple[tuple[str, str], ...]) -> bytes:
    """Raises InvariantBroken for what would end the header early: that is how answers get forged."""
    text = "".join(f"\r\n{name}: {value}" for name, value in headers)
    if text.count("\n") != len(headers) or text.count("\r") != len(headers) or not text.isascii():
        raise InvariantBroken("A response header holds a line break or is not ASCII.", names=[n for n, _ in headers])
    return text.encode("ascii")


def _encoded(request: Request, response: Response, date: bytes, *, is_last: bool) -> bytes:
    """The whole answer, in one piece, so that it leaves in one send."""
    lines = _header_lines(response.headers) if response.headers else b""
    if is_last:
        lines += b"\r\nConnection: close"
    elif request.version == "1.0":
        lines += b"\r\nConnection: keep-alive"
    if response.status in (204, 304):
        return b"".join((_bodiless_head(response.status), date, request.id.encode(), lines, b"\r\n\r\n"))
    body = response.body
    head = _head_start(response.status, response.content_type)
    length = b"%d" % len(body)
    if request.method == "HEAD":
        body = b""
    return b"".join((head, length, date, request.id.encode(), lines, b"\r\n\r\n", body))


_COMMON_NAMES = {
    spelling.encode("ascii"): name
    for name in (
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "prefer",
        "user-agent",
    )
    for spelling in (name, name.title())
}
"""Header names as nearly everybody writes them: found sooner than made lower case."""


class _Fault:
    """A request that could not be read: it gets its answer in its turn, and nothing after it is read."""

    __slots__ = ("error", "request")

    def __init__(self, error: KassaError, request: Request) -> None:
        self.error = error
        self.request = request


# Connections


class _Connection(asyncio.Protocol):
    """One client. Requests are served one after the other, because a later one may rely on what an earlier one did."""

    SLICE = 16 * 1024
    """Bytes parsed at a time, so that a read full of tiny requests cannot fill the memory with them."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._peer = ""
        self._queue: deque[Request | _Fault] = deque()
        self._busy: Request | None = None
        self._unread = b""
        self._pumping = False
        self._is_paused = False
        self._is_closing = False
        self._is_eof = False
        self._deaf = False
        self._since = server.now
        self._write_since: float | None = None
        # The message being read.
        self._in_message = False
        self._in_head = False
        self._head_fed = 0
        self._trailers_bytes = 0
        self._target = b""
        self._head: list[tuple[bytes, bytes]] = []
        self._reading: Request | None = None
        self._body: bytes | bytearray = b""
        self._raw_left = 0
        self._owes_continue = False
        self._fault: KassaError | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        address = transport.get_extra_info("peername")
        self._peer = str(address[0]) if isinstance(address, tuple) else ""
        if not self._server.admit(self):
            self._refuse(Busy("There are too many connections."))

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self._is_paused:
            self._unread += data
            return
        self._feed(data)
        self._pump()

    def eof_received(self) -> bool:
        """True keeps our half open: a client that only stopped sending still gets what it asked for."""
        self._is_eof = True
        self._deaf = True
        return self._busy is not None or bool(self._queue)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._deaf = True
        self._queue.clear()
        self._unread = b""
        # The parser holds our bound methods: without this each connection would wait for the garbage collector.
        del self._parser
        self._server.forget(self)

    def pause_writing(self) -> None:
        self._write_since = self._server.now

    def resume_writing(self) -> None:
        self._write_since = None
        self._pump()

    # Reading

    def _feed(self, data: bytes) -> None:
        """Parses what has come, as far as the pipeline is not too deep; the rest waits."""
        for start in range(0, len(data), self.SLICE):
            if len(self._queue) >= self._server.limits.pipeline_max:
                self._unread = data[start:]
                self._pause_reading()
                return
            self._parse(data[start : start + self.SLICE])
            if self._deaf:
                return

    def _parse(self, data: bytes) -> None:
        if self._raw_left:
            data = self._cut_off_body(data)
        if self._in_head:
            self._head_fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # An offer to speak another protocol (h2c, websocket) is declined by answering as if it were not there.
            rest = data[upgrade.args[0] :]
            if rest and not self._deaf:
                self._parse(rest)
        except httptools.HttpParserError as fault:
            if not self._deaf and self._fault is None:
                self._fault = RequestInvalid(f"This is not HTTP/1.1: {_plain(str(fault))}.")
        if self._in_head and self._head_fed > self._server.limits.head_bytes_max:
            self._fault = HeadersTooLarge()
        if self._fault is not None and not self._deaf:
            self._refuse(self._fault)

    def _cut_off_body(self, data: bytes) -> bytes:
        """After an offered upgrade the parser leaves what follows the head to the other protocol, body included."""
        body = data[: self._raw_left]
        self._raw_left -= len(body)
        self._owes_continue = False
        self._gather(body)
        if self._raw_left == 0:
            self._complete()
        return data[len(body) :]

    # Callbacks of the parser. They must not raise: they note the fault, and `_parse` answers it.

    def on_message_begin(self) -> None:
        self._in_message = True
        self._in_head = True
        self._head_fed = 0
        self._trailers_bytes = 0
        self._target = b""
        self._head = []
        self._since = self._server.now

    def on_url(self, target: bytes) -> None:
        self._target += target

    def on_header(self, name: bytes, value: bytes) -> None:
        # Only collected here, and looked at all together: this runs once for every header of every request.
        if self._in_head:
            self._head.append((name, value))
        else:
            self._trailers_bytes += len(name) + len(value) + 4
            if self._trailers_bytes > self._server.limits.head_bytes_max:
                self._fault = self._fault or HeadersTooLarge()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._fault is None:
            self._fault = self._start_request()

    def on_body(self, part: bytes) -> None:
        if self._fault is not None:
            return
        self._owes_continue = False
        if len(self._body) + len(part) > self._server.limits.body_bytes_max:
            self._fault = RequestTooLarge(bytes_max=self._server.limits.body_bytes_max)
        else:
            self._gather(part)

    def _gather(self, part: bytes) -> None:
        if not self._body:
            self._body = part
            return
        # A client may send a mebibyte byte by byte: a bytearray takes each in constant time.
        if type(self._body) is bytes:
            self._body = bytearray(self._body)
        self._body += part

    def on_message_complete(self) -> None:
        if self._fault is None and not self._raw_left:
            self._complete()

    def _read_headers(self) -> tuple[dict[str, str], bool]:
        """(the headers, whether they keep within the limits)."""
        headers: dict[str, str] = {}
        size = len(self._target)
        for name, value in self._head:
            size += len(name) + len(value) + 4
            key = _COMMON_NAMES.get(name) or name.decode("latin-1").lower()
            text = value.decode("latin-1")
            if key in headers:
                text = headers[key] + ("; " if key == "cookie" else ", ") + text
            headers[key] = text
        limits = self._server.limits
        return headers, size <= limits.head_bytes_max and len(self._head) <= limits.headers_max

    def _start_request(self) -> KassaError | None:
        """Reads the head. Returns what is wrong with it."""
        headers, is_within = self._read_headers()
        target = self._target.decode("latin-1")
        if not target.startswith("/"):
            target = _origin_form(target)
        path, _, query = target.partition("?")
        request = Request(_method(self._parser.get_method()), path, query, headers, peer=self._peer)
        request.id = self._server.next_request_id()
        request.keep_alive = self._parser.should_keep_alive()
        # Whoever speaks 1.0 shows it by one of these; asking the parser builds a text each time.
        if not request.keep_alive or "connection" in headers or "host" not in headers:
            request.version = self._parser.get_http_version()
        self._reading = request
        self._body = b""
        self._since = self._server.now
        if not is_within:
            return HeadersTooLarge()
        if "host" not in headers and request.version != "1.0":
            return RequestInvalid(errors=[{"field": "Host", "message": "is required in HTTP/1.1"}])
        if "transfer-encoding" in headers or "content-length" in headers or "expect" in headers:
            return self._start_body(headers)
        return None

    def _start_body(self, headers: dict[str, str]) -> KassaError | None:
        length = int(headers.get("content-length", "0"))
        if length > self._server.limits.body_bytes_max:
            return RequestTooLarge(bytes_max=self._server.limits.body_bytes_max)
        if headers.get("transfer-encoding", "chunked").lower() != "chunked":
            return RequestInvalid(errors=[{"field": "Transfer-Encoding", "message": "must be chunked"}])
        if self._parser.should_upgrade():
            if "transfer-encoding" in headers:
                return RequestInvalid(errors=[{"field": "Upgrade", "message": "does not go with a chunked body"}])
            self._raw_left = length
        self._owes_continue = headers.get("expect", "").lower() == "100-continue"
        return None

    def _complete(self) -> None:
        """The message is whole: it takes its place in the pipeline."""
        request = self._reading
        if request is None:
            raise InvariantBroken("A message ended that never began.")
        self._reading = None
        self._in_message = False
        self._owes_continue = False
        request.body = bytes(self._body)
        request.received_at_s = time.perf_counter()
        self._queue.append(request)
        if not request.keep_alive:
            self._deaf = True

    def _refuse(self, error: KassaError) -> None:
        """Nothing more is read; the refusal goes out after the answers that are due before it."""
        request = self._reading or Request("", "", peer=self._peer)
        request.id = request.id or self._server.next_request_id()
        request.received_at_s = time.perf_counter()
        self._in_message = False
        self._deaf = True
        self._unread = b""
        self._queue.append(_Fault(error, request))
        self._pump()

    # Serving

    def _pump(self) -> None:
        """Serves what waits, until a handler needs time, the client does not read, or nothing is left."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._busy is None and self._write_since is None and not self._is_closing:
                if self._queue:
                    self._serve(self._queue.popleft())
                elif self._unread:
                    unread, self._unread = self._unread, b""
                    self._feed(unread)
                else:
                    self._rest()
                    return
        finally:
            self._pumping = False

    def _rest(self) -> None:
        """Everything that came has been answered."""
        if self._transport is None:
            return
        if self._is_eof or self._server.is_draining:
            self._close()
            return
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        if self._owes_continue:
            self._owes_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _serve(self, item: Request | _Fault) -> None:
        if type(item) is _Fault:
            self._busy = item.request
            item.request.keep_alive = False
            self._answer(item.request, problem_response(item.error, item.request))
            return
        request = cast(Request, item)
        self._busy = request
        result = self._server.call(request)
        if type(result) is Response:
            self._answer(request, result)
            return
        if type(result) is Later:
            result.then(functools.partial(self._given, request))
            return
        future = cast("asyncio.Future[Response]", result)
        future.add_done_callback(functools.partial(self._finished, request))

    def _given(self, request: Request, given: Response | BaseException) -> None:
        self._answer(request, self._server.response_of(request, given))
        self._pump()

    def _finished(self, request: Request, future: "asyncio.Future[Response]") -> None:
        self._answer(request, self._server.outcome(request, future))
        self._pump()

    def _answer(self, request: Request, response: Response) -> None:
        server = self._server
        self._busy = None
        self._since = server.now
        server.observe(request, response.status)
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        is_last = not request.keep_alive or server.is_draining or (self._is_eof and not self._queue)
        try:
            answer = _encoded(request, response, server.date, is_last=is_last)
        except Exception as fault:
            # The outermost loop of a request: whatever a handler put into its answer, the client gets one.
            refusal = problem_response(server.unexpected(request, fault), request)
            answer = _encoded(request, refusal, server.date, is_last=is_last)
        transport.write(answer)
        if is_last:
            self._part()

    def _part(self) -> None:
        """After the last answer: close, but let the client finish sending first, lest the answer be lost on its way."""
        if self._transport is None:
            return
        self._is_closing = True
        self._queue.clear()
        if self._is_eof or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._deaf = True
        self._since = self._server.now
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        self._transport.write_eof()

    def _close(self) -> None:
        self._is_closing = True
        if self._transport is not None:
            self._transport.close()

    def _pause_reading(self) -> None:
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    # Called by the server

    def tick(self, now: float, limits: Limits) -> None:
        """Looks at what has taken too long."""
        waited_s = now - self._since
        if self._write_since is not None:
            if now - self._write_since > limits.write_s:
                self.abort()
        elif self._is_closing:
            is_sending = self._transport is not None and self._transport.get_write_buffer_size() > 0
            if waited_s > (limits.write_s if is_sending else limits.linger_s):
                self.abort()
        elif self._busy is not None:
            return
        elif self._in_message:
            if waited_s > limits.read_s:
                self._refuse(RequestTimeout())
        elif waited_s > limits.idle_s:
            self._close()

    def drain(self) -> None:
        """No further request is taken. What is being read or waits behind the one being served was not begun."""
        if self._busy is None and not self._is_closing:
            self._close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _method(name: bytes) -> str:
    return name.decode("ascii")


def _plain(text: str) -> str:
    return text.replace("`", "").rstrip(".")


def _origin_form(target: str) -> str:
    """`/path?query` of what proxies send, `http://host/path?query`; `*` stays."""
    _, scheme, rest = target.partition("://")
    if not scheme:
        return target
    slash = rest.find("/")
    return rest[slash:] if slash >= 0 else "/"


# The server


class Server:
    """Listens on one address and gives every request to one handler."""

    def __init__(
        self,
        handler: Handler,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.limits = limits if limits is not None else Limits()
        self.now = 0.0
        """The loop's time at the last tick; exact enough for time-outs, and free."""
        self.date = b""
        self.is_draining = False
        self._handler = handler
        self._host = host
        self._port = port
        self._observer = observer
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Future[Response]] = set()
        self._listener: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ids = count(1)
        self._id_start = f"req_{os.urandom(6).hex()}"
        self._is_empty = asyncio.Event()

    @property
    def port(self) -> int:
        """The port that was asked for, or the one that was found when that was 0."""
        return self._port

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def start(self) -> None:
        """Listens. Raises OSError when the address is taken."""
        loop = asyncio.get_running_loop()
        self._tick()
        self._listener = await loop.create_server(
            functools.partial(_Connection, self), self._host, self._port, backlog=2048
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    async def stop(self, drain_s: float = 10.0) -> None:
        """Takes no new work, lets what is running finish for at most `drain_s` seconds, then cuts the rest."""
        self.is_draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.drain()
        await self._wait_until_empty(drain_s)
        for connection in tuple(self._connections):
            connection.abort()
        await self._end_tasks()
        if self._timer is not None:
            self._timer.cancel()

    # Called by connections

    def admit(self, connection: _Connection) -> bool:
        """False: there are too many. It is counted all the same until it has read its refusal."""
        self._connections.add(connection)
        if self.is_draining or len(self._connections) > self.limits.connections_max * 2:
            connection.abort()
        return len(self._connections) <= self.limits.connections_max

    def forget(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._note_empty()

    def next_request_id(self) -> str:
        return f"{self._id_start}{next(self._ids):08x}"

    def call(self, request: Request) -> "Response | Later | asyncio.Future[Response]":
        """Runs the handler. What it raises at once is answered at once; the rest comes later."""
        try:
            result = self._handler(request)
            if type(result) is Response or type(result) is Later:
                return result
            if isinstance(result, asyncio.Future):
                future: asyncio.Future[Response] = result
            elif inspect.isawaitable(result):
                future = asyncio.ensure_future(result)
            else:
                raise InvariantBroken("A handler answered with something else than a Response.", route=request.route)
        except Exception as error:
            return problem_response(self.unexpected(request, error), request)
        self._tasks.add(future)
        future.add_done_callback(self._forget_task)
        return future

    def outcome(self, request: Request, future: "asyncio.Future[Response]") -> Response:
        """The answer of a handler that took its time."""
        if future.cancelled():
            return problem_response(Unexpected("The server stopped before the answer was known."), request)
        return self.response_of(request, future.exception() or future.result())

    def response_of(self, request: Request, given: Response | BaseException) -> Response:
        """The answer of what a handler gave."""
        if type(given) is Response:
            return given
        if isinstance(given, BaseException):
            return problem_response(self.unexpected(request, given), request)
        error = InvariantBroken("A handler answered with something else than a Response.", route=request.route)
        return problem_response(self.unexpected(request, error), request)

    def unexpected(self, request: Request, error: BaseException) -> KassaError:
        """A refusal stays what it is; anything else is logged, and its outcome is not known."""
        if isinstance(error, KassaError) and error.status < 500:
            return error
        log.error("request.failed", request_id=request.id, method=request.method, route=request.route, exc_info=error)
        return error if isinstance(error, KassaError) else Unexpected()

    def observe(self, request: Request, status: int) -> None:
        if self._observer is not None:
            self._observer(request, status, time.perf_counter() - request.received_at_s)

    def _forget_task(self, task: "asyncio.Future[Response]") -> None:
        self._tasks.discard(task)
        self._note_empty()

    def _note_empty(self) -> None:
        if self.is_draining and not self._connections and not self._tasks:
            self._is_empty.set()

    async def _wait_until_empty(self, drain_s: float) -> None:
        self._note_empty()
        try:
            async with asyncio.timeout(drain_s):
                await self._is_empty.wait()
        except TimeoutError:
            log.warning("server.drain_cut", connections=len(self._connections), requests=len(self._tasks))

    async def _end_tasks(self) -> None:
        """Handlers that outlived the drain are cancelled; what they gave to the journal goes on there."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        self.date = f"\r\nDate: {formatdate(usegmt=True)}\r\nRequest-Id: ".encode("ascii")
        for connection in tuple(self._connections):
            connection.tick(self.now, self.limits)
        self._timer = loop.call_later(self.limits.tick_s, self._tick)
