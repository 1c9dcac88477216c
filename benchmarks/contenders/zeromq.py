"""ZeroMQ by pyzmq: DEALERs that send batches to a ROUTER and wait for a frame that acknowledges them.

ZeroMQ keeps nothing, and Kassa's hub confirms what it has committed to PostgreSQL. So this one's does too: the ROUTER inserts
a batch before it acknowledges it, gives out from its table, and deletes what was acknowledged. The same table as in
`postgres.py`; hub and peers in one process, as in Kassa's row.

Twice, as there: with a lease, so that what a peer had in hand when it was killed comes again, and several hubs may share a table;
and with nothing but the place of the last one that was handed out in the ROUTER's memory. That one is quicker and no queue for more
than one peer: what was handed to one that is gone is lost until the ROUTER itself starts anew, and then all of it comes again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec
import zmq
import zmq.asyncio

from benchmarks.contenders.postgres import DONE, LEASE, TABLE, put
from benchmarks.contenders.shape import BATCH, GROUP, SENDERS, Failure, in_batches
from kassa.messaging.model import Record

HIGH_WATER = 10_000
"""Above all that can be under way: past it a ROUTER drops."""
NEXT = """
SELECT record, key, headers, body, seq FROM raw_queue WHERE queue = $1 AND seq > $2 ORDER BY seq LIMIT $3
"""
PUT, GET, ACK = b"put", b"get", b"ack"
_encode = msgspec.msgpack.Encoder().encode
_records = msgspec.msgpack.Decoder(list[Record]).decode
_numbers = msgspec.msgpack.Decoder(list[int]).decode
_handed = msgspec.msgpack.Decoder(list[tuple[str, str, str, bytes, int]]).decode
_headers = msgspec.json.Decoder(dict[str, str]).decode


class Router:
    """Acknowledges a batch when it is committed."""

    def __init__(self, socket: Any, pool: Any, quick: Any, queue: str, *, leases: bool) -> None:
        """quick: a pool whose commits do not wait for the disk; what a crash forgets of these is done again."""
        self._socket = socket
        self._pool = pool
        self._quick = quick
        self._queue = queue
        self._next = self._with_lease if leases else self._by_place
        self._handed = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as answers:
            while True:
                peer, number, kind, content = await self._socket.recv_multipart()
                answers.create_task(self._answer(peer, number, kind, content))

    async def _answer(self, peer: bytes, number: bytes, kind: bytes, content: bytes) -> None:
        answer = b""
        if kind == PUT:
            await put(self._pool, self._queue, _records(content))
        elif kind == ACK:
            await self._quick.execute(DONE, _numbers(content))
        else:
            answer = _encode([tuple(row) for row in await self._next()])
        await self._socket.send_multipart([peer, number, answer])

    async def _with_lease(self) -> Sequence[Any]:
        rows: Sequence[Any] = await self._quick.fetch(LEASE, self._queue, BATCH)
        return rows

    async def _by_place(self) -> Sequence[Any]:
        rows: Sequence[Any] = await self._quick.fetch(NEXT, self._queue, self._handed, BATCH)
        self._handed = rows[-1]["seq"] if rows else self._handed
        return rows


class Pyzmq:
    """The peer."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._number = 0

    async def listen(self) -> None:
        while True:
            number, content = await self._socket.recv_multipart()
            self._waiting.pop(number).set_result(content)

    async def publish(self, records: Sequence[Record]) -> None:
        await in_batches(records, BATCH, self._send)

    async def _send(self, batch: Sequence[Record]) -> None:
        await self._ask(PUT, _encode(batch))

    async def consume(self, count: int, began: Callable[[], None]) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            handed = _handed(await self._ask(GET, b""))
            if not handed:
                raise Failure(f"pyzmq: {len(found)} of {count} came")
            if not found:
                began()
            taken = [Record(id, key, body, _headers(headers)) for id, key, headers, body, _ in handed]
            found += [one.id for one in taken]
            await self._ask(ACK, _encode([one[4] for one in handed]))
        return found

    async def _ask(self, kind: bytes, content: bytes) -> bytes:
        self._number += 1
        number = str(self._number).encode()
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        await self._socket.send_multipart([number, kind, content])
        return await answer


@asynccontextmanager
async def by_pyzmq(database_url: str, name: str, *, leases: bool) -> AsyncIterator[Pyzmq]:
    context = zmq.asyncio.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket in (router, dealer):
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    dealer.connect(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
    async with (
        asyncpg.create_pool(database_url, min_size=1, max_size=SENDERS) as pool,
        asyncpg.create_pool(
            database_url, min_size=1, max_size=SENDERS, server_settings={"synchronous_commit": "off"}
        ) as quick,
    ):
        await pool.execute(TABLE)
        peer = Pyzmq(dealer)
        running = [
            asyncio.create_task(Router(router, pool, quick, f"{name}:{GROUP}", leases=leases).run()),
            asyncio.create_task(peer.listen()),
        ]
        yield peer
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    router.close(linger=0)
    dealer.close(linger=0)
    context.term()
