"""The HTTP/1.1 of a sandbox: raw bytes in, raw bytes out, and a connection that can be dropped on purpose.

A framework hides exactly what a provider's double has to control: the request target as it was sent (absolute form too),
the untouched body, and hanging up without an answer. It would also cost half of the process's memory.
"""

import asyncio
import ssl
import sys
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import cast
from urllib.parse import urlsplit

import httptools

BODY_BYTES_MAX = 1024 * 1024
"""Far above any legal order; more is 413."""
HEAD_BYTES_MAX = 64 * 1024
"""Request line and headers together; more is 431."""
PIPELINE_MAX = 32
"""Requests of one connection that wait for their turn; then we stop reading."""
REPLY_BYTES_MAX = 64 * 1024
"""What a merchant may answer to a callback; the rest is not read."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whole. Header names are lower case."""

    method: str
    target: str
    """Path with query as it was sent; scheme and host of an absolute-form target are taken off."""
    headers: Mapping[str, str]
    body: bytes
    peer: str
    """The address of the other end of the connection."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole; its length is added when it is sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


Handler = Callable[[Request], Awaitable[Answer | None]]
"""None hangs up: the connection is closed without an answer."""


async def listen(handler: Handler, host: str, port: int) -> asyncio.Server:
    """Serve until the returned server is closed. Raises OSError when the port is taken."""
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: _Connection(handler), host, port, backlog=1024)


class _Connection(asyncio.Protocol):
    """One client; its requests are answered in their order. A client that leaves does not stop what it began."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Request, bool]] = deque()
        self._answering: asyncio.Task[None] | None = None
        self._is_done = False
        self._peer = ""
        self._begin_message()

    def _begin_message(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._peer = str(transport.get_extra_info("peername")[0])

    def data_received(self, data: bytes) -> None:
        if self._is_done:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(400)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_done = True
        self._waiting.clear()

    # httptools

    def on_message_begin(self) -> None:
        self._begin_message()

    def on_url(self, part: bytes) -> None:
        self._target += part
        self._count_head(len(part))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._count_head(len(name) + len(value))

    def on_body(self, part: bytes) -> None:
        self._body.append(part)
        self._body_bytes += len(part)
        if self._body_bytes > BODY_BYTES_MAX:
            self._refuse(413)

    def on_message_complete(self) -> None:
        if self._is_done:
            return
        request = Request(
            method=self._parser.get_method().decode("latin-1"),
            target=_origin_form(self._target.decode("latin-1")),
            headers=self._headers,
            body=b"".join(self._body),
            peer=self._peer,
        )
        self._waiting.append((request, self._parser.should_keep_alive()))
        if len(self._waiting) >= PIPELINE_MAX:
            self._transport.pause_reading()
        if self._answering is None:
            self._answering = asyncio.get_running_loop().create_task(self._answer_all())

    # Answers

    async def _answer_all(self) -> None:
        while self._waiting:
            request, keeps_alive = self._waiting.popleft()
            try:
                answer = await self._handler(request)
            except Exception:
                # The outermost loop of a connection: the fault is ours, the caller learns nothing, as with a crash.
                traceback.print_exc(file=sys.stderr)
                answer = None
            if answer is None:
                self._close()
            elif not self._transport.is_closing():
                self._transport.write(_encoded(request, answer, keeps_alive=keeps_alive))
                if not keeps_alive:
                    self._close()
            if not self._is_done and len(self._waiting) < PIPELINE_MAX:
                self._transport.resume_reading()
        self._answering = None

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(431)

    def _refuse(self, status: int) -> None:
        if not self._is_done:
            self._transport.write(f"HTTP/1.1 {status} \r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            self._close()

    def _close(self) -> None:
        self._is_done = True
        self._waiting.clear()
        self._transport.close()


def _origin_form(target: str) -> str:
    """`http://host/path?query` → `/path?query`: some published clients send the whole address."""
    if target.startswith("/") or "://" not in target:
        return target
    rest = target.partition("://")[2]
    slash = rest.find("/")
    return rest[slash:] if slash >= 0 else "/"


def _encoded(request: Request, answer: Answer, *, keeps_alive: bool) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    if answer.status != HTTPStatus.NO_CONTENT:
        lines.append(f"Content-Length: {len(answer.body)}")
    if not keeps_alive:
        lines.append("Connection: close")
    head = "\r\n".join(lines) + "\r\n\r\n"
    return head.encode("latin-1") + (b"" if request.method == "HEAD" else answer.body)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


# The other direction: a callback


class _Reply:
    """What httptools tells while an answer to one of our callbacks is read."""

    def __init__(self) -> None:
        self.is_complete = False

    def on_message_complete(self) -> None:
        self.is_complete = True


async def post(url: str, headers: Mapping[str, str], body: bytes, *, timeout_s: float) -> int | None:
    """The status that came back; None when none came in time. Redirects are not followed. Never raises for the network."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _post(url, headers, body, reads_reply=True)
    except (OSError, TimeoutError, ValueError, httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None


async def post_and_leave(url: str, headers: Mapping[str, str], body: bytes, *, timeout_s: float) -> None:
    """Send it all, then hang up without looking at the answer."""
    try:
        async with asyncio.timeout(timeout_s):
            await _post(url, headers, body, reads_reply=False)
    except (OSError, TimeoutError, ValueError):
        return


async def connect_and_leave(url: str, *, timeout_s: float) -> None:
    """Connect, send nothing, hang up."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await _connect(url)
            writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError, ValueError):
        return


async def _post(url: str, headers: Mapping[str, str], body: bytes, *, reads_reply: bool) -> int | None:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [f"POST {target} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    reader, writer = await _connect(url)
    try:
        writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        await writer.drain()
        return await _status(reader) if reads_reply else None
    finally:
        writer.close()


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    return await asyncio.open_connection(parts.hostname, port, ssl=ssl.create_default_context() if is_tls else None)


async def _status(reader: asyncio.StreamReader) -> int | None:
    reply = _Reply()
    parser = httptools.HttpResponseParser(reply)
    left = REPLY_BYTES_MAX
    while not reply.is_complete and left > 0:
        data = await reader.read(4096)
        if not data:
            break
        left -= len(data)
        parser.feed_data(data)
    status: int = parser.get_status_code()
    return status or None
