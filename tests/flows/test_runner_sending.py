"""The runner against real sockets: what is proven not to have left, and what may have.

The peers here are a few lines of asyncio each, because a proper HTTP server refuses to behave so badly.
"""

import asyncio
import gzip
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kassa.channels import wechat_crypto
from kassa.channels.model import (
    Closed,
    Evidence,
    NotSent,
    Outcome,
    Pending,
    Request,
    Response,
    Steps,
    Succeeded,
    Unknown,
)
from kassa.channels.runner import Exchange, Runner, fresh_nonce
from kassa.channels.wechat import WeChatPay
from unit.channels.provider import (
    KEY_ID,
    NUMBER,
    OPENID,
    PLATFORM,
    account,
    certificate_pem,
    charge,
    signed_headers,
    to_bytes,
    trade,
)

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SEEN = Evidence("query", authentic=False)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def peer(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on a free port that talks so on each connection; its base URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            tasks.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await talk(reader, writer)
        writer.close()
        with suppress(ConnectionError, asyncio.CancelledError, ssl.SSLError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body, as they came."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return head, await reader.readexactly(length)


def saying(answer: bytes) -> Talk:
    """Takes one request, says this, and closes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()

    return talk


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    await asyncio.sleep(60)


def heard_by(arrived: asyncio.Event) -> Talk:
    """Takes one request, tells that it is there, and says nothing."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.set()
        # For ever: the test ends it.
        await asyncio.sleep(600)

    return talk


def request(method: str = "POST", path: str = "/pay", timeout_s: float = 30.0) -> Request:
    body = b'{"out_trade_no":"1","payer":{"openid":"secret-openid"}}' if method == "POST" else b""
    return Request(method, path, {"Authorization": 'X signature="secret"'}, body, timeout_s)


def ask(*requests: Request, heard: list[Response] | None = None) -> Steps:
    """A conversation that asks these and takes any answer for a close."""
    for one in requests:
        response = yield one
        if heard is not None:
            heard.append(response)
    return Closed(SEEN)


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    async with Runner() as runner:
        yield runner


@pytest.fixture
def trace() -> list[Exchange]:
    return []


# What was proven not to have left


async def test_a_refused_connection_was_not_sent(runner: Runner, trace: list[Exchange]) -> None:
    async with peer(saying(ANSWER)) as base_url:
        pass

    outcome = await runner.run(ask(request()), base_url, trace.append)

    assert type(outcome) is NotSent
    assert outcome.evidence.source == "transport"
    assert not outcome.evidence.authentic
    [exchange] = trace
    assert (exchange.status, exchange.error) == (None, "ClientConnectorError")


async def test_a_name_that_nobody_has_was_not_sent(runner: Runner, trace: list[Exchange]) -> None:
    outcome = await runner.run(ask(request()), "http://nobody.invalid", trace.append)

    assert type(outcome) is NotSent


async def test_a_peer_that_speaks_no_tls_was_not_sent_anything(runner: Runner, trace: list[Exchange]) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with peer(talk) as base_url:
        outcome = await runner.run(ask(request()), base_url.replace("http:", "https:"), trace.append)

    assert type(outcome) is NotSent


async def test_a_certificate_that_nobody_vouches_for_was_not_sent_anything(
    runner: Runner, trace: list[Exchange], tmp_path: Path
) -> None:
    async with peer(saying(ANSWER), _stranger(tmp_path)) as base_url:
        outcome = await runner.run(ask(request()), base_url, trace.append)

    assert type(outcome) is NotSent
    assert trace[0].error == "ClientConnectorCertificateError"


def _stranger(directory: Path) -> ssl.SSLContext:
    now = fresh_nonce().now
    file = directory / "stranger.pem"
    file.write_text(
        PLATFORM.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        + certificate_pem(PLATFORM, serial=1, valid_from=now - timedelta(days=1), valid_until=now + timedelta(days=1))
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


async def test_a_handshake_that_never_ends_was_not_sent(runner: Runner, trace: list[Exchange]) -> None:
    async with peer(silent) as base_url:
        steps = ask(request(timeout_s=0.2))
        outcome = await runner.run(steps, base_url.replace("http:", "https:"), trace.append)

    assert type(outcome) is NotSent
    assert outcome.reason == "no connection in time"


async def test_who_waited_in_vain_for_a_free_connection_was_not_sent(trace: list[Exchange]) -> None:
    talk = heard_by(arrived := asyncio.Event())
    async with peer(talk) as base_url, Runner(connections_per_destination=1) as runner:
        first = asyncio.create_task(runner.run(ask(request(timeout_s=2.0)), base_url, trace.append))
        await arrived.wait()
        second = await runner.run(ask(request(timeout_s=0.2)), base_url, trace.append)

        assert type(second) is NotSent
        assert type(await first) is Unknown


# What may have left


ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"\x00\x01\x02 what is this\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
    "a broken chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "half of the chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "a huge head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "a huge body": b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + b" " * 2_000_000,
    "endless chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "no status": b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
async def test_an_answer_that_is_none_leaves_a_doubt(
    answer: bytes, method: str, runner: Runner, trace: list[Exchange]
) -> None:
    async with peer(saying(answer)) as base_url:
        outcome = await runner.run(ask(request(method)), base_url, trace.append)

    assert type(outcome) is Unknown
    [exchange] = trace
    assert exchange.error
    assert exchange.response_summary == ""


async def test_an_endless_answer_is_cut(trace: list[Exchange]) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()

    async with peer(talk) as base_url, Runner(body_bytes_max=20_000) as runner:
        outcome = await runner.run(ask(request()), base_url, trace.append)

    assert type(outcome) is Unknown
    assert outcome.reason == "the answer is longer than 20000 bytes"


async def test_a_slow_answer_leaves_a_doubt(runner: Runner, trace: list[Exchange]) -> None:
    async with peer(silent) as base_url:
        outcome = await runner.run(ask(request(timeout_s=1.0)), base_url, trace.append)

    assert type(outcome) is Unknown
    assert outcome.reason == "no answer in time"
    assert 900 <= trace[0].duration_ms < 30_000


async def test_an_answer_that_drips_is_cut_by_the_total_time(runner: Runner, trace: list[Exchange]) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with peer(talk) as base_url:
        outcome = await runner.run(ask(request(timeout_s=1.0)), base_url, trace.append)

    assert type(outcome) is Unknown
    assert (trace[0].status, trace[0].error) == (200, "no answer in time")


async def test_a_connection_closed_at_once_leaves_a_doubt(runner: Runner, trace: list[Exchange]) -> None:
    """Perhaps the request was read, perhaps not: we cannot tell."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with peer(talk) as base_url:
        outcome = await runner.run(ask(request()), base_url, trace.append)

    assert type(outcome) is Unknown


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_kept_connection_that_dies_leaves_a_doubt_and_nothing_is_sent_twice(
    method: str, runner: Runner, trace: list[Exchange]
) -> None:
    """A request that goes out again carries a nonce that was used; a provider takes that for a replay."""
    heard = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        await read_request(reader)
        heard += 1
        writer.write(ANSWER)
        await read_request(reader)
        heard += 1
        writer.transport.abort()

    async with peer(talk) as base_url:
        first = await runner.run(ask(request(method)), base_url, trace.append)
        second = await runner.run(ask(request(method)), base_url, trace.append)

    assert type(first) is Closed
    assert type(second) is Unknown
    assert heard == 2


async def test_a_later_request_that_cannot_be_sent_leaves_a_doubt(runner: Runner, trace: list[Exchange]) -> None:
    """The first one was sent; what it did is not undone by the second one's failure."""
    served = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        served.set()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def steps() -> Steps:
        yield request()
        server.close()
        yield request()
        return Closed(SEEN)

    outcome = await runner.run(steps(), base_url, trace.append)

    assert served.is_set()
    assert type(outcome) is Unknown
    assert [exchange.status for exchange in trace] == [200, None]


async def test_closing_the_runner_leaves_a_doubt(trace: list[Exchange]) -> None:
    async with peer(heard_by(arrived := asyncio.Event())) as base_url:
        runner = Runner()
        running = asyncio.create_task(runner.run(ask(request(timeout_s=60.0)), base_url, trace.append))
        await arrived.wait()
        await runner.close()

        assert type(await running) is Unknown


async def test_who_is_cancelled_still_leaves_a_trace(runner: Runner, trace: list[Exchange]) -> None:
    async with peer(heard_by(arrived := asyncio.Event())) as base_url:
        running = asyncio.create_task(runner.run(ask(request(timeout_s=60.0)), base_url, trace.append))
        await arrived.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    [exchange] = trace
    assert exchange.error == "interrupted"


# What is sent, and what is heard


async def test_not_one_byte_of_a_request_is_written_otherwise(runner: Runner, trace: list[Exchange]) -> None:
    path = "/v3/a%2fb/%E4%B8%AD/x%20y?mchid=1&z=%2B+~!'()*&a=&empty"
    body = '{ "description" : "两杯咖啡",\n"a":1.0 }'.encode()
    heard: list[tuple[bytes, bytes]] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await read_request(reader))
        writer.write(ANSWER)
        await writer.drain()

    async with peer(talk) as base_url:
        headers = {"Authorization": "X y", "Content-Type": "application/json"}
        await runner.run(ask(Request("POST", path, headers, body)), base_url, trace.append)

    [(head, sent)] = heard
    assert head.startswith(f"POST {path} HTTP/1.1\r\n".encode())
    assert sent == body
    lines = head.split(b"\r\n")
    assert b"Authorization: X y" in lines
    assert b"Content-Type: application/json" in lines
    assert b"Accept-Encoding: identity" in lines


async def test_a_get_has_no_body_and_no_content_type(runner: Runner, trace: list[Exchange]) -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append((await read_request(reader))[0].lower())
        writer.write(ANSWER)
        await writer.drain()

    async with peer(talk) as base_url:
        await runner.run(ask(request("GET")), base_url, trace.append)

    assert b"content-type" not in heard[0]
    assert b"content-length" not in heard[0]


async def test_an_answer_is_given_as_it_came(runner: Runner, trace: list[Exchange]) -> None:
    """Also a compressed one, which was not asked for: what was signed are the bytes of the body."""
    body = gzip.compress(b"{}")
    head = (
        f"HTTP/1.1 418 Nobody\r\nContent-Encoding: gzip\r\nX-Mixed-CASE: Value\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    heard: list[Response] = []

    async with peer(saying(head.encode() + body)) as base_url:
        await runner.run(ask(request(), heard=heard), base_url, trace.append)

    [response] = heard
    assert (response.status, response.body) == (418, body)
    assert response.headers["x-mixed-case"] == "Value"


async def test_a_redirect_is_an_answer_and_is_not_followed(runner: Runner, trace: list[Exchange]) -> None:
    heard: list[Response] = []
    redirect = b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"

    async with peer(saying(redirect)) as base_url:
        await runner.run(ask(request(), heard=heard), base_url, trace.append)

    assert [response.status for response in heard] == [307]
    assert len(trace) == 1


async def test_cookies_are_not_kept(runner: Runner, trace: list[Exchange]) -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heard.append((await read_request(reader))[0])
            writer.write(ANSWER.replace(b"OK\r\n", b"OK\r\nSet-Cookie: a=b\r\n"))
            await writer.drain()

    async with peer(talk) as base_url:
        await runner.run(ask(request(), request()), base_url, trace.append)

    assert len(heard) == 2
    assert b"Cookie" not in heard[1]


async def test_no_more_are_on_their_way_than_a_destination_may_have(trace: list[Exchange]) -> None:
    now, most = 0, 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        while True:
            await read_request(reader)
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.01)
            now -= 1
            writer.write(ANSWER)
            await writer.drain()

    async with peer(talk) as base_url, Runner(connections_per_destination=4) as runner:
        outcomes = await asyncio.gather(*(runner.run(ask(request()), base_url, trace.append) for _ in range(40)))

    assert {type(outcome) for outcome in outcomes} == {Closed}
    assert most == 4


async def test_a_slow_destination_does_not_hold_up_another(trace: list[Exchange]) -> None:
    talk = heard_by(arrived := asyncio.Event())
    async with peer(talk) as slow, peer(saying(ANSWER)) as quick, Runner(connections_per_destination=1) as runner:
        stuck = asyncio.create_task(runner.run(ask(request(timeout_s=300.0)), slow, trace.append))
        await arrived.wait()
        outcome = await asyncio.wait_for(runner.run(ask(request()), quick, trace.append), timeout=60)
        assert not stuck.done()
        stuck.cancel()

    assert type(outcome) is Closed


async def test_signing_is_done_beside_the_loop(runner: Runner, trace: list[Exchange]) -> None:
    names: list[str] = []

    def steps() -> Generator[Request, Response, Outcome]:
        names.append(threading.current_thread().name)
        yield request()
        return Closed(SEEN)

    async with peer(saying(ANSWER)) as base_url:
        await runner.run(steps(), base_url, trace.append)

    assert names[0].startswith("channel-signing")


async def test_a_conversation_may_end_without_a_word(runner: Runner, trace: list[Exchange]) -> None:
    outcome = await runner.run(ask(), "http://127.0.0.1:1", trace.append)

    assert type(outcome) is Closed
    assert trace == []


async def test_a_fault_in_a_channel_is_not_hidden(runner: Runner, trace: list[Exchange]) -> None:
    def steps() -> Steps:
        yield request()
        raise ZeroDivisionError

    async with peer(saying(ANSWER)) as base_url:
        with pytest.raises(ZeroDivisionError):
            await runner.run(steps(), base_url, trace.append)


async def test_a_trace_tells_what_was_said_and_no_secret(runner: Runner, trace: list[Exchange]) -> None:
    body = to_bytes(trade())
    answer = b"HTTP/1.1 200 OK\r\nWechatpay-Signature: secret\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async with peer(saying(answer)) as base_url:
        await runner.run(ask(request(path="/pay?mchid=19&token=secret")), base_url, trace.append)

    [exchange] = trace
    assert (exchange.method, exchange.path, exchange.status, exchange.error) == (
        "POST",
        "/pay?mchid=19&token=…",
        200,
        None,
    )
    assert '"out_trade_no":"1"' in exchange.request_summary
    assert NUMBER in exchange.response_summary
    assert exchange.duration_ms >= 0
    assert "secret" not in repr(exchange)
    assert OPENID not in repr(exchange)


# With WeChat Pay


async def test_an_order_is_made_and_asked_for_over_a_real_connection(runner: Runner, trace: list[Exchange]) -> None:
    channel = WeChatPay(account())
    merchant_key = channel.account.private_key.public_key()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            line, *fields = head.decode().rstrip().split("\r\n")
            method, path, _ = line.split(" ")
            header = next(field for field in fields if field.startswith("Authorization: "))
            pairs = wechat_crypto.parse_authorization(header.removeprefix("Authorization: "))
            text = wechat_crypto.request_text(method, path, pairs["timestamp"], pairs["nonce_str"], body)
            is_genuine = wechat_crypto.verify(merchant_key, text, pairs["signature"])
            answer = to_bytes(trade() if method == "GET" else {"code_url": "weixin://x"})
            signature = signed_headers(answer, at=fresh_nonce().now, serial=KEY_ID)
            head_out = "".join(f"{name}: {value}\r\n" for name, value in signature.items())
            status = 200 if is_genuine else 401
            writer.write(f"HTTP/1.1 {status} X\r\n{head_out}Content-Length: {len(answer)}\r\n\r\n".encode() + answer)
            await writer.drain()

    async with peer(talk) as base_url:
        expires_at = fresh_nonce().now + timedelta(minutes=15)
        made = await runner.run(channel.charge(charge(expires_at=expires_at), fresh_nonce), base_url, trace.append)
        paid = await runner.run(channel.query(NUMBER, fresh_nonce), base_url, trace.append)

    assert type(made) is Pending
    assert type(paid) is Succeeded
    assert (paid.amount, paid.currency) == (100, "CNY")


def test_nonces_are_fresh() -> None:
    nonces = [fresh_nonce() for _ in range(100)]

    assert len({nonce.token for nonce in nonces}) == 100
    assert {len(nonce.token) for nonce in nonces} == {32}
    assert all(nonce.now.tzinfo is not None for nonce in nonces)
