"""Sends requests that were made beforehand, over many connections, each exactly once. Costs little beside a server.

For what wrk cannot do: a fixed number of requests, each with its own signature. Prints one JSON line.
Run by benchmarks: python -m benchmarks.sender FILE HOST PORT CONNECTIONS
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

LIMIT_S = 1200.0
"""For all of it, on the busiest machine. An answer that never comes shall be a failure and not a benchmark that stands still."""


def raw_request(path: str, headers: dict[str, str], body: bytes) -> bytes:
    """A POST as it travels."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def send_all(url: str, requests: Iterable[bytes], file: Path, *, connections: int = 64) -> dict[str, Any]:
    """Sends them from a process of its own; `file` is where they are handed over.

    Returns count, seconds, rate, p50_ms, p99_ms and how many answers had which status.
    """
    with file.open("wb") as out:
        for request in requests:
            out.write(len(request).to_bytes(4, "big") + request)
    parts = urlsplit(url)
    command = [sys.executable, "-m", "benchmarks.sender", str(file), str(parts.hostname), str(parts.port)]
    done = subprocess.run([*command, str(connections)], capture_output=True, text=True, check=True)
    return cast("dict[str, Any]", json.loads(done.stdout))


class _Connection(asyncio.Protocol):
    """One connection: the next request goes out when the answer to the last one is complete."""

    def __init__(self, requests: Iterator[bytes], latencies: list[float], statuses: Counter[str]) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._latencies = latencies
        self._statuses = statuses
        self._buffer = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or len(body) < _content_length(head):
            return
        self._buffer = b""
        self._latencies.append(perf_counter() - self._sent_at)
        self._statuses[head[9:12].decode()] += 1
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed a connection before it answered"))

    def _next(self) -> None:
        assert self._transport is not None
        request = next(self._requests, None)
        if request is None:
            self.ended.set_result(None)
            self._transport.close()
            return
        self._sent_at = perf_counter()
        self._transport.write(request)


def _content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


async def _send(requests: list[bytes], host: str, port: int, connections: int) -> dict[str, Any]:
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    shared = iter(requests)
    loop = asyncio.get_running_loop()
    started = perf_counter()
    opened = [
        (await loop.create_connection(lambda: _Connection(shared, latencies, statuses), host, port))[1]
        for _ in range(connections)
    ]
    _, open_still = await asyncio.wait([connection.ended for connection in opened], timeout=LIMIT_S)
    if open_still:
        raise SystemExit(f"{len(open_still)} connections wait for an answer after {LIMIT_S:.0f} s; {dict(statuses)}")
    for connection in opened:
        connection.ended.result()
    seconds = perf_counter() - started
    ordered = sorted(latencies)
    return {
        "count": len(ordered),
        "seconds": seconds,
        "rate": len(ordered) / seconds,
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[len(ordered) * 99 // 100] * 1000,
        "statuses": dict(statuses),
    }


def _read(file: Path) -> list[bytes]:
    data, requests, at = file.read_bytes(), [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        requests.append(data[at + 4 : end])
        at = end
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("connections", type=int)
    options = parser.parse_args()
    print(json.dumps(uvloop.run(_send(_read(options.file), options.host, options.port, options.connections))))


if __name__ == "__main__":
    main()
