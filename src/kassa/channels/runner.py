"""The only place that sends to channels: drives a conversation, request by request, over one shared HTTP session.

It decides nothing about money but this: what was never on its way is NotSent; once it may be, silence is Unknown. It
repeats nothing and follows no redirect. Retrying belongs to whoever owns the state.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from ssl import SSLContext
from types import SimpleNamespace, TracebackType
from typing import Generic, Self, TypeVar

import aiohttp
from yarl import URL

from kassa.channels.model import Evidence, Nonce, NotSent, Request, Response, Unknown
from kassa.channels.summary import show_path, summarise

BODY_BYTES_MAX = 1 << 20
"""An answer may be so long. Real ones have a few kilobytes; this bounds what a broken peer can make us hold."""
CONNECT_TIMEOUT_S = 5.0
"""For name, connection and TLS together it is the request's own limit; for one address it is this."""
CONNECTIONS_PER_DESTINATION = 256
"""Requests on their way to one provider at once, of all merchants; further ones wait, within their own time limit. One
merchant gets a quarter of them at most (`places.py`)."""
IDLE_S = 10.0
"""A connection that was idle for longer is not used again: a provider may be closing it, and a request that meets
the close would be in doubt for nothing."""
SIGNING_THREADS = 2
"""An RSA signature takes 0.25 ms and lets go of the interpreter: a burst of hundred would stop everything else in this
process for 25 ms. In a thread one costs 0.1 ms more and stops nothing (docs/decisions/signing-threads.md)."""

Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what came of it, for the timeline: without keys, signatures, tokens and personal fields."""

    method: str
    path: str
    status: int | None
    """None: no answer."""
    started_at: datetime
    duration_ms: int
    error: str | None
    """Why there is no usable answer."""
    request_summary: str
    response_summary: str


Trace = Callable[[Exchange], None]
"""Is told of each exchange when it is over, cancelled ones too. Must not block."""


def fresh_nonce() -> Nonce:
    """The time, and 32 random characters."""
    return Nonce(datetime.now(UTC), secrets.token_hex(16))


class Runner:
    """Sends conversations. One per process; use it as `async with Runner() as runner`, or call `close`.

    ssl: a context of one's own, for a private certificate authority.
    """

    def __init__(
        self,
        *,
        connections_per_destination: int = CONNECTIONS_PER_DESTINATION,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        body_bytes_max: int = BODY_BYTES_MAX,
        ssl: SSLContext | None = None,
    ) -> None:
        self._connections_per_destination = connections_per_destination
        self._connect_timeout_s = connect_timeout_s
        self._body_bytes_max = body_bytes_max
        self._ssl = ssl
        self._session: aiohttp.ClientSession | None = None
        self._threads = ThreadPoolExecutor(SIGNING_THREADS, thread_name_prefix="channel-signing")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; conversations that are on their way end as Unknown."""
        if self._session is not None:
            await self._session.close()
        self._threads.shutdown(wait=False)

    async def run(
        self, steps: Generator[Request, Response, Done], base_url: str, trace: Trace
    ) -> "Done | Unknown | NotSent":
        """What the conversation came to.

        NotSent when its first request could not be sent; Unknown when a later one could not, or an answer did not come.
        Cancelled, it tells `trace` and raises: then nothing is known.
        """
        move = await asyncio.get_running_loop().run_in_executor(self._threads, _begin, steps)
        is_first = True
        while isinstance(move, Request):
            answer = await self._exchange(move, base_url, trace)
            if isinstance(answer, _Silence):
                steps.close()
                evidence = Evidence("transport", authentic=False, text=answer.why)
                if is_first and not answer.may_have_left:
                    return NotSent(evidence, answer.why)
                return Unknown(evidence, answer.why)
            move, is_first = _go_on(steps, answer), False
        return move.value

    async def _exchange(self, request: Request, base_url: str, trace: Trace) -> "Response | _Silence":
        """Sends one request and tells `trace`."""
        started_at, started, progress = datetime.now(UTC), time.perf_counter(), _Progress()
        answer: Response | _Silence | None = None
        try:
            answer = await self._send(request, base_url, progress)
        finally:
            response = answer if isinstance(answer, Response) else None
            silence = answer if isinstance(answer, _Silence) else None
            trace(
                Exchange(
                    method=request.method,
                    path=show_path(request.path),
                    status=response.status if response else progress.status,
                    started_at=started_at,
                    duration_ms=round((time.perf_counter() - started) * 1000),
                    error=silence.why if silence else None if response else "interrupted",
                    request_summary=summarise(request.body),
                    response_summary=summarise(response.body) if response else "",
                )
            )
        return answer

    async def _send(self, request: Request, base_url: str, progress: "_Progress") -> "Response | _Silence":
        timeout = aiohttp.ClientTimeout(total=request.timeout_s, sock_connect=self._connect_timeout_s)
        try:
            async with self._open().request(
                request.method,
                # Encoded already, and signed so: not one character may be written otherwise.
                URL(base_url + request.path, encoded=True),
                data=request.body or None,
                headers={"Accept-Encoding": "identity", "User-Agent": "kassa"} | dict(request.headers),
                skip_auto_headers=("Content-Type",),
                allow_redirects=False,
                timeout=timeout,
                trace_request_ctx=progress,
            ) as response:
                progress.status = response.status
                body = await _read(response, self._body_bytes_max)
                if body is None:
                    response.close()
                    return _Silence(f"the answer is longer than {self._body_bytes_max} bytes", may_have_left=True)
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Response(response.status, headers, body)
        except TimeoutError:
            why = "no answer in time" if progress.is_connected else "no connection in time"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = type(error).__name__
        return _Silence(why, may_have_left=progress.is_connected)

    def _open(self) -> aiohttp.ClientSession:
        """The session. Made at first use, since it belongs to the loop that runs then."""
        if self._session is None:
            tracing = aiohttp.TraceConfig()
            # Both say: from here on the request is being written.
            tracing.on_connection_create_end.append(_note_connection)
            tracing.on_connection_reuseconn.append(_note_connection)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,
                    limit_per_host=self._connections_per_destination,
                    keepalive_timeout=IDLE_S,
                    ssl=self._ssl if self._ssl is not None else True,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                trace_configs=[tracing],
            )
            # aiohttp would send a GET again by itself when a kept connection turns out to be closed, with the nonce that
            # the provider has perhaps seen, and be refused as a replay. It has no public switch; a test holds this one.
            self._session._retry_connection = False
        return self._session


class _Progress:
    """How far one request got. It counts as on its way from the moment that it has a connection."""

    __slots__ = ("is_connected", "status")

    def __init__(self) -> None:
        self.is_connected = False
        self.status: int | None = None


@dataclass(frozen=True, slots=True)
class _Silence:
    """No usable answer."""

    why: str
    may_have_left: bool


@dataclass(frozen=True, slots=True)
class _End(Generic[Done]):
    """The conversation is over."""

    value: Done


def _begin(steps: Generator[Request, Response, Done]) -> Request | _End[Done]:
    try:
        return next(steps)
    except StopIteration as end:
        return _End(end.value)


def _go_on(steps: Generator[Request, Response, Done], answer: Response) -> Request | _End[Done]:
    try:
        return steps.send(answer)
    except StopIteration as end:
        return _End(end.value)


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes | None:
    """The whole body; None when it is longer than `bytes_max`."""
    if response.content_length is not None and response.content_length > bytes_max:
        return None
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > bytes_max:
            return None
        parts.append(part)
    return b"".join(parts)


async def _note_connection(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    progress: _Progress = context.trace_request_ctx
    progress.is_connected = True
