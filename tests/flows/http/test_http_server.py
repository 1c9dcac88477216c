"""The server against raw sockets: everything a client may do to a connection, well or badly."""

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kassa.api.http import Handler, Limits, Request, Response, Router, Server
from kassa.errors import Busy, PaymentNotFound

WAIT_S = 30.0


@dataclass
class House:
    """A running server and what its handlers saw."""

    server: Server
    seen: list[Request] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    finished: list[str] = field(default_factory=list)
    observed: list[tuple[str, int]] = field(default_factory=list)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"


@asynccontextmanager
async def house(limits: Limits | None = None) -> AsyncIterator[House]:
    def observe(request: Request, status: int, seconds: float) -> None:
        assert seconds >= 0
        place.observed.append((request.route, status))

    router = Router()
    place = House(Server(router, limits=limits or Limits(tick_s=0.05), observer=observe))

    def echo(request: Request) -> Response:
        place.seen.append(request)
        return Response(200, request.body)

    async def slow_echo(request: Request) -> Response:
        place.seen.append(request)
        await asyncio.sleep(0)
        return Response(200, request.body)

    async def gated(request: Request) -> Response:
        await place.gate.wait()
        place.finished.append(request.body.decode())
        return Response(201, b"{}")

    def later(request: Request) -> "asyncio.Future[Response]":
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        future.get_loop().call_soon(future.set_result, Response(202, b"later"))
        return future

    def refuses(request: Request) -> Response:
        raise PaymentNotFound(payment="pay_1")

    async def busy(request: Request) -> Response:
        raise Busy(retry_after_s=7)

    def breaks(request: Request) -> Response:
        raise ValueError("sk_SECRET")

    async def breaks_later(request: Request) -> Response:
        raise ValueError("sk_SECRET")

    def forges(request: Request) -> Response:
        return Response(200, headers=(("Location", "/x\r\nSet-Cookie: a=b"),))

    def wrong(request: Request) -> Any:
        return {"not": "a response"}

    async def wrong_later(request: Request) -> Any:
        return None

    handlers: list[tuple[str, str, Handler]] = [
        ("POST", "/echo", echo),
        ("GET", "/echo", echo),
        ("POST", "/slow", slow_echo),
        ("POST", "/gated", gated),
        ("GET", "/later", later),
        ("GET", "/refuses", refuses),
        ("GET", "/busy", busy),
        ("GET", "/breaks", breaks),
        ("GET", "/breaks-later", breaks_later),
        ("GET", "/forges", forges),
        ("GET", "/wrong", wrong),
        ("GET", "/wrong-later", wrong_later),
        ("GET", "/large", lambda request: Response(200, b"x" * 3_000_000)),
        ("GET", "/empty", lambda request: Response(204)),
        ("GET", "/things/{id}", lambda request: Response(200, request.params["id"].encode())),
        ("GET", "/things/new", lambda request: Response(200, b"the new one")),
        ("POST", "/things/{id}/close", lambda request: Response(200, request.params["id"].encode())),
    ]
    for method, pattern, handler in handlers:
        router.add(method, pattern, handler)
    await place.server.start()
    try:
        yield place
    finally:
        place.gate.set()
        await place.server.stop(1)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        found: dict[str, Any] = json.loads(self.body)
        assert found["status"] == self.status
        return found


class Wire:
    """A raw client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self, *, has_body: bool = True) -> Answer:
        async with asyncio.timeout(WAIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
            length = int(headers.get("content-length", "0")) if has_body else 0
            return Answer(int(lines[0].split()[1]), headers, await self.reader.readexactly(length))

    async def end(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


@asynccontextmanager
async def wire(place: House) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", place.server.port, limit=8_000_000)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def post(path: str, body: bytes, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: kassa", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path: str, *more: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: kassa", *more]).encode() + b"\r\n\r\n"


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_true():  # noqa: ASYNC110 - what is waited for is the server's state, which tells nobody
            await asyncio.sleep(0.01)


# What goes well


async def test_httpx_gets_along_with_it() -> None:
    async with house() as place, httpx.AsyncClient(base_url=place.base) as client:
        answers = [await client.post("/echo", json={"n": n}) for n in range(3)]
        later = await client.get("/later")
        large = await client.get("/large")
        empty = await client.get("/empty")

    assert [answer.json()["n"] for answer in answers] == [0, 1, 2]
    assert (later.status_code, later.text) == (202, "later")
    assert len(large.content) == 3_000_000
    assert (empty.status_code, empty.content) == (204, b"")
    assert "content-length" not in empty.headers
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", later.headers["date"])


async def test_a_request_arrives_as_it_was_sent() -> None:
    async with house() as place, wire(place) as client:
        await client.send(post("/echo?a=1&b=%C3%A9&c=", b"{}", "X-Twice: 1", "x-twice: 2", "X-Empty:"))
        await client.answer()

    request = place.seen[0]
    assert (request.method, request.path, request.query_string) == ("POST", "/echo", "a=1&b=%C3%A9&c=")
    assert request.query == {"a": "1", "b": "é", "c": ""}
    assert request.headers["x-twice"] == "1, 2"
    assert request.headers["x-empty"] == ""
    assert (request.body, request.peer, request.route) == (b"{}", "127.0.0.1", "/echo")


async def test_every_request_has_a_name_of_its_own() -> None:
    async with house() as place, wire(place) as client:
        await client.send(get("/echo") * 3)
        answers = [await client.answer() for _ in range(3)]

    assert len({answer.headers["request-id"] for answer in answers}) == 3
    assert place.observed == [("/echo", 200)] * 3


@pytest.mark.parametrize("path", ["/echo", "/slow"])
async def test_a_hundred_pipelined_requests_are_answered_in_order(path: str) -> None:
    async with house() as place, wire(place) as client:
        await client.send(b"".join(post(path, str(n).encode()) for n in range(100)))
        answers = [await client.answer() for _ in range(100)]

    assert [int(answer.body) for answer in answers] == list(range(100))


async def test_pipelined_requests_wait_for_the_one_before_them() -> None:
    async with house() as place, wire(place) as client:
        await client.send(post("/gated", b"first") + post("/echo", b"second"))
        await asyncio.sleep(0.05)
        assert place.seen == []

        place.gate.set()
        answers = [await client.answer(), await client.answer()]

    assert [answer.status for answer in answers] == [201, 200]


async def test_a_pipeline_deeper_than_the_limit_loses_nothing_and_stops_reading() -> None:
    async with house(Limits(pipeline_max=4, tick_s=0.05)) as place, wire(place) as client:
        sender = asyncio.create_task(client.send(post("/gated", b"") + post("/echo", b"x" * 1000) * 20_000))
        await asyncio.sleep(0.2)
        assert not sender.done()

        place.gate.set()
        assert (await client.answer()).status == 201
        answers = [await client.answer() for _ in range(20_000)]
        await sender

    assert {answer.status for answer in answers} == {200}


async def test_a_chunked_body_is_put_together() -> None:
    async with house() as place, wire(place) as client:
        head = get("/echo", "Transfer-Encoding: chunked", method="POST")
        await client.send(head + b"3\r\nabc\r\n5;ext=1\r\ndefgh\r\n0\r\nTrailer: x\r\n\r\n" + get("/echo"))
        first, second = await client.answer(), await client.answer()

    assert first.body == b"abcdefgh"
    assert "trailer" not in place.seen[0].headers
    assert second.status == 200


@pytest.mark.parametrize(
    "message",
    [
        post("/echo", b'{"a":1}'),
        get("/echo", "Transfer-Encoding: chunked", method="POST") + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_a_request_may_be_cut_at_every_byte(message: bytes) -> None:
    async with house() as place:
        for cut in range(1, len(message)):
            async with wire(place) as client:
                await client.send(message[:cut])
                await asyncio.sleep(0)
                await client.send(message[cut:])
                assert (await client.answer()).status == 200
        async with wire(place) as client:
            for at in range(len(message)):
                await client.send(message[at : at + 1])
            assert (await client.answer()).status == 200

    assert len({request.body for request in place.seen}) == 1


async def test_a_client_that_expects_100_gets_it_before_it_sends() -> None:
    async with house() as place, wire(place) as client:
        await client.send(get("/echo", "Content-Length: 3", "Expect: 100-continue", method="POST"))
        assert (await client.answer()).status == 100
        await client.send(b"abc")
        assert (await client.answer()).body == b"abc"


async def test_100_comes_after_the_answers_that_are_due_before_it() -> None:
    async with house() as place, wire(place) as client:
        expecting = get("/echo", "Content-Length: 3", "Expect: 100-continue", method="POST")
        await client.send(post("/gated", b"") + expecting)
        await asyncio.sleep(0.05)
        place.gate.set()

        assert [(await client.answer()).status for _ in range(2)] == [201, 100]
        await client.send(b"abc")
        assert (await client.answer()).body == b"abc"


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with house() as place, wire(place) as client:
        await client.send(get("/echo", "Content-Length: 2000000", "Expect: 100-continue", method="POST"))
        answer = await client.answer()

    assert (answer.status, answer.problem["code"]) == (413, "request.too_large")


@pytest.mark.parametrize(
    ("request_line", "headers", "stays"),
    [
        ("GET /echo HTTP/1.1", "Host: x\r\n", True),
        ("GET /echo HTTP/1.1", "Host: x\r\nConnection: close\r\n", False),
        ("GET /echo HTTP/1.0", "", False),
        ("GET /echo HTTP/1.0", "Connection: keep-alive\r\n", True),
    ],
)
async def test_a_connection_stays_as_its_client_wants(request_line: str, headers: str, stays: bool) -> None:
    async with house() as place, wire(place) as client:
        await client.send(f"{request_line}\r\n{headers}\r\n".encode())
        answer = await client.answer()
        if stays:
            await client.send(get("/echo"))
            assert (await client.answer()).status == 200
        else:
            assert answer.headers["connection"] == "close"
            assert await client.end() == b""


async def test_an_offer_of_another_protocol_is_passed_over() -> None:
    """Java's client offers h2c on every first request, also with a body; a websocket is answered like any GET."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
    async with house() as place, wire(place) as client:
        await client.send(post("/echo", b"abc", *offer) + get("/echo", "Connection: Upgrade", "Upgrade: websocket"))
        await client.send(post("/echo", b"12345678", *offer)[:-5])
        await asyncio.sleep(0.05)
        await client.send(b"45678" + get("/later"))
        answers = [await client.answer() for _ in range(4)]

    assert [(answer.status, answer.body) for answer in answers] == [
        (200, b"abc"),
        (200, b""),
        (200, b"12345678"),
        (202, b"later"),
    ]


async def test_a_client_that_only_stopped_sending_gets_its_answer() -> None:
    async with house() as place, wire(place) as client:
        await client.send(post("/gated", b"x"))
        client.writer.write_eof()
        await asyncio.sleep(0.05)
        place.gate.set()

        assert (await client.answer()).status == 201
        assert await client.end() == b""


@pytest.mark.parametrize("resets", [True, False])
async def test_a_client_that_hangs_up_does_not_cancel_what_it_asked_for(resets: bool) -> None:
    async with house() as place:
        async with wire(place) as client:
            await client.send(post("/gated", b"kept"))
            await asyncio.sleep(0.05)
            if resets:
                end = client.writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.writer.transport.abort()
        await asyncio.sleep(0.05)
        assert place.finished == []

        place.gate.set()
        await until(lambda: place.finished == ["kept"])
        await until(lambda: place.server.connections == 0)


# Routes


async def test_routes() -> None:
    async with house() as place, wire(place) as client:
        for path, expected in [
            ("/things/a%20b", (200, "a b")),
            ("/things/new", (200, "the new one")),
            ("/things/%E5%92%96", (200, "咖")),
            ("http://elsewhere/things/x?y", (200, "x")),
        ]:
            await client.send(get(path))
            answer = await client.answer()
            assert (answer.status, answer.body.decode()) == expected
        for path, status, code in [
            ("/none", 404, "request.not_found"),
            ("/things/", 404, "request.not_found"),
            ("/things/a/b/c", 404, "request.not_found"),
            ("/things/%00", 404, "request.not_found"),
            ("/things/%FF", 400, "request.invalid"),
            ("/things/x/close", 405, "request.method_not_allowed"),
        ]:
            await client.send(get(path))
            answer = await client.answer()
            assert (answer.status, answer.problem["code"]) == (status, code)
            assert answer.problem["outcome"] == "not_processed"
            assert answer.problem["request_id"] == answer.headers["request-id"]


async def test_other_methods() -> None:
    async with house() as place, wire(place) as client:
        await client.send(get("/later", method="HEAD") + get("/echo", method="DELETE") + get("/echo", method="OPTIONS"))
        head = await client.answer(has_body=False)
        refused, options = await client.answer(), await client.answer()

    assert (head.status, head.headers["content-length"]) == (202, "5")
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")
    assert (options.status, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS, POST")


# Refusals and faults of handlers


async def test_a_refusal_is_a_problem_document() -> None:
    async with house() as place, wire(place) as client:
        await client.send(get("/refuses") + get("/busy"))
        refused, busy = await client.answer(), await client.answer()

    assert refused.problem == {
        "type": "urn:kassa:problem:payment.not_found",
        "title": "There is no such payment.",
        "status": 404,
        "detail": "There is no such payment.",
        "code": "payment.not_found",
        "outcome": "not_processed",
        "retryable": False,
        "errors": [],
        "request_id": refused.headers["request-id"],
        "payment": "pay_1",
    }
    assert (busy.status, busy.headers["retry-after"], busy.problem["retryable"]) == (503, "7", True)


@pytest.mark.parametrize("path", ["/breaks", "/breaks-later", "/forges", "/wrong", "/wrong-later"])
async def test_a_broken_handler_says_that_the_outcome_is_not_known(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with house() as place, wire(place) as client:
        await client.send(get(path))
        answer = await client.answer()
        await client.send(get("/later"))
        next_answer = await client.answer()

    assert (answer.status, answer.problem["outcome"]) == (500, "unknown")
    assert "set-cookie" not in answer.headers
    assert next_answer.status == 202
    assert answer.problem["request_id"] in caplog.text
    assert "SECRET" not in caplog.text + answer.body.decode()


# What goes badly


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/2.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"NONSENSE / HTTP/1.1\r\n\r\n",
        b"GET /echo HTTP/1.1\r\n\r\n",
        b"GET /echo HTTP/1.1\nHost: x\n\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_gets_400_and_a_closed_door(garbage: bytes) -> None:
    async with house() as place:
        async with wire(place) as client:
            await client.send(get("/later") + garbage)
            first, refused = await client.answer(), await client.answer()
            assert await client.end() == b""

        assert first.status == 202
        assert (refused.status, refused.problem["code"]) == (400, "request.invalid")
        assert refused.headers["connection"] == "close"
        assert place.seen == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [
                    b"GET /echo HTTP/1.1\r\n",
                    b"POST /slow HTTP/1.1\r\n",
                    b"Host: x\r\n",
                    b"Content-Length: 5\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                    b"Expect: 100-continue\r\n",
                    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
                    b"Connection: close\r\n",
                    b"\r\n",
                    b"5\r\nabcde\r\n",
                    b"0\r\n\r\n",
                    b"abcde",
                ]
            ),
        ),
        max_size=12,
    ),
    cuts=st.booleans(),
)
def test_no_bytes_break_the_server(pieces: list[bytes], cuts: bool) -> None:
    """Whatever comes in, what goes out is whole answers, then the end; and the next client is served."""

    async def attack() -> None:
        async with house() as place:
            async with wire(place) as client:
                for piece in pieces if cuts else [b"".join(pieces)]:
                    try:
                        await client.send(piece)
                    except ConnectionError:
                        break
                    await asyncio.sleep(0)
                if client.writer.can_write_eof():
                    client.writer.write_eof()
                said = await client.end()
            assert whole_answers(said)
            async with wire(place) as client:
                await client.send(get("/later"))
                assert (await client.answer()).status == 202

    asyncio.run(attack())


def whole_answers(said: bytes) -> bool:
    while said:
        head, _, rest = said.partition(b"\r\n\r\n")
        if not re.match(rb"HTTP/1\.1 (100|200|400|404|405|413|431) ", head):
            return False
        length = re.search(rb"Content-Length: (\d+)", head)
        size = int(length.group(1)) if length else 0
        if len(rest) < size:
            return False
        said = rest[size:]
    return True


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /echo HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000,
        b"GET /echo HTTP/1.1\r\nHost: x\r\n" + b"A: a\r\n" * 200 + b"\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: a\r\n" * 10_000 + b"\r\n",
    ],
    ids=["target", "value", "endless", "many", "trailers"],
)
@pytest.mark.parametrize("piece", [1_000_000, 1000])
async def test_a_head_that_is_too_large_gets_431(head: bytes, piece: int) -> None:
    async with house() as place, wire(place) as client:
        for at in range(0, len(head), piece):
            await client.send(head[at : at + piece])
            await asyncio.sleep(0)
        answer = await client.answer()

    assert (answer.status, answer.problem["code"]) == (431, "request.headers_too_large")


async def test_a_body_of_exactly_the_limit_is_taken() -> None:
    body = b"x" * Limits().body_bytes_max
    async with house() as place, httpx.AsyncClient(base_url=place.base) as client:
        answer = await client.post("/echo", content=body)

    assert answer.content == body


@pytest.mark.parametrize("chunk", [1, 100_000])
async def test_a_chunked_body_without_end_gets_413_although_the_client_goes_on_sending(chunk: int) -> None:
    limits = Limits(body_bytes_max=20_000, tick_s=0.05)
    async with house(limits) as place, wire(place) as client:
        await client.send(get("/echo", "Transfer-Encoding: chunked", method="POST"))
        await client.send((b"%x\r\n" % chunk + b"x" * chunk + b"\r\n") * max(3, 30_000 // chunk))
        await client.send(b"%x\r\n" % chunk + b"x" * chunk + b"\r\n")
        answer = await client.answer()

    assert (answer.status, answer.problem["code"]) == (413, "request.too_large")
    assert place.seen == []


@pytest.mark.parametrize("start", [b"POST /echo HT", get("/echo", "Content-Length: 9", method="POST") + b"x"])
async def test_a_client_that_is_too_slow_gets_408(start: bytes) -> None:
    async with house(Limits(read_s=0.2, tick_s=0.05)) as place, wire(place) as client:
        await client.send(start)
        answer = await client.answer()
        assert await client.end() == b""

    assert (answer.status, answer.problem["outcome"]) == (408, "not_processed")


async def test_a_trickle_of_bytes_does_not_buy_time() -> None:
    async with house(Limits(read_s=0.3, tick_s=0.05)) as place, wire(place) as client:
        await client.send(b"GET /echo HTTP/1.1\r\n")
        for _ in range(20):
            if client.reader.at_eof() or place.observed:
                break
            await client.send(b"A: b\r\n")
            await asyncio.sleep(0.05)

        assert (await client.answer()).status == 408


async def test_an_idle_connection_is_closed_in_silence_and_a_busy_one_is_not() -> None:
    async with house(Limits(idle_s=0.2, read_s=0.2, tick_s=0.05)) as place, wire(place) as idle, wire(place) as busy:
        await busy.send(post("/gated", b""))
        assert await idle.end() == b""
        await asyncio.sleep(0.2)
        place.gate.set()
        assert (await busy.answer()).status == 201


async def test_a_client_that_does_not_read_is_cut_and_holds_up_nobody() -> None:
    async with house(Limits(write_s=0.3, tick_s=0.05)) as place:
        async with wire(place) as deaf, wire(place) as other:
            deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await deaf.send(get("/large") * 20)
            await other.send(get("/later"))
            assert (await other.answer()).status == 202
            await until(lambda: place.server.connections == 1)
        assert len(place.observed) < 21


async def test_one_connection_too_many_gets_503() -> None:
    async with house(Limits(connections_max=2, tick_s=0.05)) as place:
        async with wire(place) as first, wire(place) as second:
            await first.send(get("/later"))
            await second.send(get("/later"))
            assert [(await client.answer()).status for client in (first, second)] == [202, 202]
            async with wire(place) as third:
                answer = await third.answer()
        await until(lambda: place.server.connections == 0)
        async with wire(place) as fourth:
            await fourth.send(get("/later"))
            assert (await fourth.answer()).status == 202

    assert (answer.status, answer.problem["code"]) == (503, "system.busy")
    assert "retry-after" in answer.headers


# The end


async def test_stopping_finishes_what_is_running_and_takes_nothing_new() -> None:
    async with house() as place, wire(place) as idle, wire(place) as busy:
        await idle.send(get("/later"))
        await idle.answer()
        await busy.send(post("/gated", b"kept") + post("/echo", b"never begun"))
        await asyncio.sleep(0.05)

        stopping = asyncio.create_task(place.server.stop(WAIT_S))
        assert await idle.end() == b""
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", place.server.port)
        place.gate.set()
        answer = await busy.answer()
        assert await busy.end() == b""
        busy.writer.close()
        await stopping

    assert (answer.status, answer.headers["connection"]) == (201, "close")
    assert place.finished == ["kept"]
    assert place.seen == []


async def test_stopping_waits_for_handlers_whose_client_is_gone() -> None:
    async with house() as place:
        async with wire(place) as client:
            await client.send(post("/gated", b"kept"))
            await asyncio.sleep(0.05)
        await until(lambda: place.server.connections == 1)
        asyncio.get_running_loop().call_later(0.1, place.gate.set)

        await place.server.stop(WAIT_S)

        assert place.finished == ["kept"]


async def test_stopping_cuts_what_does_not_end() -> None:
    async with house() as place, wire(place) as client:
        await client.send(post("/gated", b""))
        await asyncio.sleep(0.05)

        await place.server.stop(0.1)

        assert place.server.connections == 0
        assert place.finished == []


async def test_many_clients_at_once() -> None:
    async with house() as place:

        async def one(number: int) -> list[bytes]:
            async with wire(place) as client:
                bodies = []
                for turn in range(20):
                    await client.send(post("/slow", f"{number}.{turn}".encode()))
                    bodies.append((await client.answer()).body)
                return bodies

        told = await asyncio.gather(*(one(number) for number in range(50)))

    assert told == [[f"{number}.{turn}".encode() for turn in range(20)] for number in range(50)]
