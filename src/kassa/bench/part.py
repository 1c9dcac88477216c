"""One broker's measurement, in a process of its own: what the client takes of the machine is then this broker's alone.

Reads its order as one line of JSON, writes what it finds as lines of JSON (`Said`) while it goes on, and ends by itself, by
SIGTERM, or when its standard input ends. What was made at the broker is removed in each case.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kassa.bench import proc
from kassa.bench.faults import CannotKill, Commands, OwnHub, OwnPostgres, Victim, recovery
from kassa.bench.loop import run
from kassa.bench.measure import latency, throughput
from kassa.bench.model import Gap, Latency, Memory, Recovery, Throughput, through_per_s
from kassa.bench.removal import remove
from kassa.bench.stage import ENVELOPES, SINGLE, UNORDERED, Stage
from kassa.db.pool import connect, open_pool
from kassa.errors import KassaError, SettingInvalid
from kassa.messaging.wake import Wakeups
from kassa.observability.log import configure_logging

CLIENTS = {
    "postgres": "asyncpg", "rabbitmq": "aiormq", "kafka": "confluent-kafka", "rocketmq": "grpcio", "zeromq": "pyzmq",
}  # fmt: skip
OPEN_S = 30.0
HUB_LEASE_S = 5
"""Of our own hub: what was on its way when it was killed comes again after so long. Kassa's default is 30 s."""
HALF = 0.5
BEFORE_KILL_S = 1.5
PORTS = {"amqp": 5672, "amqps": 5671, "kafka": 9092, "kafka+ssl": 9092, "rocketmq": 8081, "postgresql": 5432}


class Order(msgspec.Struct, kw_only=True):
    """What to measure."""

    name: str
    kind: str
    url: str
    database_url: str
    seconds: float
    batches: list[int]
    ways: list[str]
    loads_per_s: list[float]
    own_postgres: str | None = None
    """The directory of a PostgreSQL that may be killed."""
    kill: str | None = None
    start: str | None = None
    kills: bool = True
    server_pids: list[int] = []


class Said(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of what a part says; one of these."""

    step: str = ""
    """What it does now."""
    throughput: Throughput | None = None
    latency: Latency | None = None
    recovery: Recovery | None = None
    memory: Memory | None = None
    gap: Gap | None = None
    about: str = ""
    client: str = ""
    traits: dict[str, Any] | None = None
    left_behind: list[str] | None = None


def say(said: Said) -> None:
    """One line, at once."""
    sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")
    sys.stdout.buffer.flush()


class Part:
    """One broker, measured."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._before = proc.pss_bytes(os.getpid()) or 0
        self._client = 0
        self._server: int | None = None
        self._pids: list[int] = []
        self._hub: OwnHub | None = None
        self._most_per_s = 0.0

    async def run(self) -> None:
        """Everything that was ordered. What cannot be measured is said, and the rest goes on."""
        order = self._order
        pool = await open_pool(order.database_url, application="kassa bench")
        wakeups = Wakeups(lambda: connect(order.database_url, application="kassa bench wake"))
        telling = asyncio.create_task(wakeups.run())
        try:
            async with self._address() as url, self._opened(url, pool, wakeups) as stage:
                await self._measure(stage)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            pool.terminate()

    @asynccontextmanager
    async def _address(self) -> AsyncIterator[str]:
        """The URL, with our own hub behind it where it needs one."""
        order = self._order
        if order.kind != "zeromq" or (urlsplit(order.url).port and _is_open(order.url)):
            yield order.url
            return
        address = f"zeromq://127.0.0.1:{urlsplit(order.url).port or _free_port()}?lease_s={HUB_LEASE_S}"
        self._hub = OwnHub(order.database_url, f"{address}&role=hub")
        await self._hub.start()
        try:
            yield f"{address}&role=peer"
        finally:
            await self._hub.kill()

    @asynccontextmanager
    async def _opened(self, url: str, pool: Any, wakeups: Wakeups) -> AsyncIterator[Stage]:
        stage = Stage(url, pool, wakeups)
        say(Said(step="connects"))
        try:
            async with asyncio.timeout(OPEN_S):
                await stage.binder.open()
            say(Said(
                traits=stage.binder.traits._asdict(), client=_client(self._order.kind), about=await self._about(stage, pool)
            ))  # fmt: skip
            yield stage
        finally:
            made = list(stage.made)
            await stage.close()
            if made:
                say(Said(step="removes its topics"))
                say(Said(left_behind=await self._remove(url, made)))

    async def _remove(self, url: str, made: list[Any]) -> list[str]:
        if self._order.kind == "zeromq" and self._hub is None:
            return [f"the group's rows of {topic.name} in the database of the hub at that address" for topic in made]
        return await remove(self._order.kind, url, made)

    async def _about(self, stage: Stage, pool: Any) -> str:
        """What the server says of itself, where it says anything."""
        match self._order.kind:
            case "postgres":
                return f"PostgreSQL {await pool.fetchval('SHOW server_version')}"
            case "zeromq":
                import zmq

                return f"libzmq {zmq.zmq_version()}, " + (
                    "a hub of our own in a process of its own" if self._hub else "the hub at this address"
                )
            case "rabbitmq":
                # Only RabbitMQ comes here, and the port says nothing of its connections.
                live = await stage.binder.transport.receiving.live()  # type: ignore[attr-defined]
                return f"RabbitMQ {_text(live.connection.server_properties.get('version', '?'))}"
            case _:
                return ""

    # What is measured

    async def _measure(self, stage: Stage) -> None:
        for way in self._order.ways:
            await self._throughput(stage, way)
        await self._latencies(stage)
        if self._order.kills:
            await self._kill(stage)
        self._look()
        self._tell_memory()

    async def _throughput(self, stage: Stage, way: str) -> None:
        """Each batch size; records without order only at the two largest."""
        sizes = self._order.batches if way != UNORDERED else self._order.batches[-2:]
        line = await stage.line(way)
        try:
            for batch in sizes:
                say(Said(step=f"{_NAMES[way]}, batches of {batch}"))
                one = await throughput(line, way, batch, self._order.seconds)
                if way == SINGLE:
                    self._most_per_s = max(self._most_per_s, through_per_s(one))
                say(Said(throughput=one))
                self._look()
        except KassaError as error:
            say(Said(gap=_gap(f"throughput, {_NAMES[way]}", error)))
        finally:
            await stage.let_go(line)

    async def _latencies(self, stage: Stage) -> None:
        line = await stage.line("pace")
        half = round(self._most_per_s * HALF, -1 if self._most_per_s > 200 else 0)
        loads = [(per_s, False) for per_s in self._order.loads_per_s] + ([(half, True)] if half >= 1 else [])
        try:
            # What is too much comes last, so that nothing has to wait behind what it leaves.
            for per_s, is_half in sorted(loads):
                say(Said(step=f"latency at {per_s:,.0f} a second" + (", half of its most" if is_half else "")))
                # Few messages a second need longer to tell anything.
                seconds = self._order.seconds * (3 if per_s < 50 else 2)
                say(Said(latency=await latency(line, per_s, seconds, is_half_of_most=is_half)))
            self._look()
        except KassaError as error:
            say(Said(gap=_gap("latency", error)))
        finally:
            await stage.let_go(line)

    async def _kill(self, stage: Stage) -> None:
        victim = self._victim()
        if victim is None:
            fix = (
                f"--kill-command {self._order.name}='docker kill -s KILL NAME' --start-command {self._order.name}='docker start "
                "NAME', with the commands that kill and start your server. Only where nobody else uses it."
            )
            say(Said(gap=Gap(what="kill -9", why="Nobody said how this server may be killed.", fix=fix)))
            return
        line = await stage.line("kill")
        say(Said(step="kill -9 under load"))
        try:
            say(Said(recovery=await recovery(line, victim, before_s=max(BEFORE_KILL_S, 2 * self._order.seconds))))
        except KassaError as error:
            say(Said(gap=_gap("kill -9", error)))
        finally:
            await stage.let_go(line)

    def _victim(self) -> Victim | None:
        order = self._order
        if order.kill is not None:
            return Commands(order.kill, order.start)
        if order.kind == "postgres" and order.own_postgres:
            return OwnPostgres(Path(order.own_postgres))
        return self._hub

    # Memory

    def _look(self) -> None:
        """Memory of both sides, at the end of a measurement."""
        self._client = max(self._client, proc.pss_bytes(os.getpid()) or 0)
        # Looked for anew, since a server that was killed has other ones.
        pids = proc.family(self._order.server_pids or self._listeners())
        size = proc.sum_pss_bytes(pids)
        if size is not None:
            self._server, self._pids = max(self._server or 0, size), pids

    def _listeners(self) -> list[int]:
        if self._hub is not None:
            return [self._hub.pid] if self._hub.pid else []
        url = self._order.database_url if self._order.kind == "postgres" else self._order.url
        parts = urlsplit(url.partition(",")[0])
        if not parts.hostname or not proc.is_here(parts.hostname):
            return []
        return proc.listeners(parts.port or PORTS.get(parts.scheme, 0))

    def _tell_memory(self) -> None:
        memory = Memory(client=self._client, client_before=self._before, server=self._server, server_pids=self._pids)
        say(Said(memory=memory))
        if self._server is None:
            fix = f"--server-pid {self._order.name}=PID, where the server runs on this machine and we may look at it."
            say(Said(gap=Gap(what="memory of the server", why="Its process was not found on this machine.", fix=fix)))


_NAMES = {SINGLE: "one by one", ENVELOPES: "in envelopes", UNORDERED: "without order"}


def _gap(what: str, error: KassaError) -> Gap:
    fix = "Give commands that work by hand." if isinstance(error, CannotKill) else "See the log of the broker."
    return Gap(what=what, why=error.detail, fix=fix)


def _client(kind: str) -> str:
    name = CLIENTS.get(kind, kind)
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _is_open(url: str) -> bool:
    parts = urlsplit(url)
    with suppress(OSError), socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 0), timeout=2):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def main() -> None:
    order = msgspec.json.decode(await asyncio.to_thread(sys.stdin.buffer.readline), type=Order)
    configure_logging(level=logging.ERROR)
    task = asyncio.create_task(Part(order).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    # Whoever ordered it is gone when our input ends.
    loop.add_reader(sys.stdin.fileno(), lambda: _ended(loop, task))
    began = time.monotonic()
    try:
        await task
    except asyncio.CancelledError:
        say(
            Said(
                gap=Gap(
                    what="the rest",
                    why=f"It was interrupted after {time.monotonic() - began:.0f} s.",
                    fix="Run it again.",
                )
            )
        )
    except TimeoutError:
        say(Said(gap=Gap(what="everything", why=f"No answer within {OPEN_S:.0f} s.", fix=_REACH)))
    except ImportError as error:
        fix = f"Install Kassa with the extra `{order.kind}`: docs/guides/queues.md."
        say(Said(gap=Gap(what="everything", why=f"Its client is not installed ({error.name}).", fix=fix)))
    except SettingInvalid as error:
        say(Said(gap=Gap(what="everything", why=error.detail, fix="Correct the URL: docs/reference/broker-urls.md.")))
    except KassaError as error:
        say(Said(gap=Gap(what="everything", why=error.detail, fix=_REACH)))


_REACH = "Start the server, or correct its URL; see its log. The others were measured."


def _ended(loop: asyncio.AbstractEventLoop, task: "asyncio.Task[None]") -> None:
    if not os.read(sys.stdin.fileno(), 1):
        loop.remove_reader(sys.stdin.fileno())
        task.cancel()


if __name__ == "__main__":
    run(main())
