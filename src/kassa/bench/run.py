"""One broker after the other, each in a process of its own; whatever happens to one of them, the rest is measured."""

import asyncio
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import msgspec

from kassa.bench import proc
from kassa.bench.model import Gap, Measured, Needs, Report
from kassa.bench.needs import recommend
from kassa.bench.part import Order, Said
from kassa.bench.stage import BODY_BYTES, ENVELOPES, SINGLE, UNORDERED
from kassa.db import embedded
from kassa.db.migrate import migrate
from kassa.db.pool import connect, without_password
from kassa.errors import DatabaseRefused
from kassa.messaging.broker_names import Named

GRACE_S = 30.0
"""A part that was told to end removes what it made; then it is killed."""
TELL = Callable[[str, Said], None]
"""Name of the broker, and what its part says."""
LINE_BYTES_MAX = 2**20

LIMITS = [
    "One machine: client, broker and database share its processors and its disk. Elsewhere the order may be another one.",
    "Loopback: a network adds its round trip to every latency, and to the throughput of small batches.",
    "Single nodes, nothing replicated: a cluster that copies every message is slower and survives more than a process.",
    "Short runs on empty topics: nothing here tells of long backlogs, of compaction, of full disks, or of days.",
    "Clients fetch ahead while we still send, Kafka's most of all: short runs show its receiving quicker than it is for hours.",
    "One process sends and receives, with one batch under way; several processes take more, up to what the server can.",
    "The processor time is the client's. What a broker, its database or a ZeroMQ hub takes comes on top.",
    "A kill of one process, not of a machine: what the operating system had in memory was not lost with it.",
]


class Plan(NamedTuple):
    """What is asked for."""

    brokers: list[Named]
    needs: Needs
    seconds: float = 1.0
    is_quick: bool = False
    kills: bool = True
    database_url: str | None = None
    """None: a PostgreSQL of our own, for this run."""
    kill: Mapping[str, str] = {}
    """Name of a broker to the command."""
    start: Mapping[str, str] = {}
    pids: Mapping[str, list[int]] = {}
    about: Mapping[str, str] = {}


class _Database(NamedTuple):
    url: str
    shown: str
    directory: str | None


async def measure(plan: Plan, tell: TELL, stop: asyncio.Event) -> Report:
    """The report of everything that was measured until the end, or until `stop`.

    Raises DatabaseRefused, DatabaseUnreachable when there is no database to work with."""
    began, at, load = time.monotonic(), datetime.now(UTC), [round(one, 2) for one in os.getloadavg()]
    brokers: list[Measured] = []
    async with _database(plan.database_url) as database:
        for named in plan.brokers:
            brokers.append(_skipped(named) if stop.is_set() else await _broker(plan, named, database, tell, stop))
    return Report(
        at=at.isoformat(timespec="seconds"), took_s=time.monotonic() - began, seconds=plan.seconds,
        is_quick=plan.is_quick, is_complete=not stop.is_set(), body_bytes=BODY_BYTES, machine=dict(proc.machine()),
        load_before=load, database=database.shown, needs=plan.needs,
        recommendation=recommend(plan.needs, brokers), brokers=brokers, limits=LIMITS,
    )  # fmt: skip


def _skipped(named: Named) -> Measured:
    gap = Gap(what="everything", why="The run was interrupted before.", fix="Run it again.")
    return Measured(name=named.name, kind=_kind(named), url=named.shown, gaps=[gap])


def _kind(named: Named) -> str:
    return named.name.partition("-")[0]


# The database


@asynccontextmanager
async def _database(url: str | None) -> AsyncIterator[_Database]:
    """Migrated, for this run alone: on the server of a URL, or on a server of our own."""
    if url is not None:
        async with _database_at(url) as found:
            yield found
        return
    # The directory goes when the server has stopped.
    with embedded.temporary_directory("kassa-bench-") as directory:
        running = await asyncio.to_thread(embedded.start, directory)
        try:
            await migrate(running.dsn)
            shown = f"PostgreSQL {running.binaries.version} of our own, fsync on"
            yield _Database(running.dsn, shown, str(directory))
        finally:
            # It may have been killed and started meanwhile.
            if (now := await asyncio.to_thread(embedded.find, directory)) is not None:
                await asyncio.to_thread(embedded.stop, now)


@asynccontextmanager
async def _database_at(url: str) -> AsyncIterator[_Database]:
    """A database of its own beside the named one, dropped afterwards."""
    name = f"kassa_bench_{secrets.token_hex(4)}"
    own = urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    connection = await connect(url, application="kassa bench")
    try:
        version = connection.get_server_version()
        try:
            await connection.execute(f"CREATE DATABASE {name}")
        except asyncpg.InsufficientPrivilegeError as error:
            raise DatabaseRefused(
                f"{without_password(url)}: a run needs a database of its own, and this user may make none. "
                "GRANT it with ALTER ROLE … CREATEDB, or leave --database-url out for a PostgreSQL of Kassa's own."
            ) from error
    finally:
        await connection.close()
    try:
        await migrate(own)
        yield _Database(own, f"PostgreSQL {version.major}.{version.minor} at {without_password(url)}", None)
    finally:
        connection = await connect(url, application="kassa bench")
        try:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        finally:
            await connection.close()


# One broker


def _order(plan: Plan, named: Named, database: _Database) -> Order:
    kind = _kind(named)
    # Envelopes are the wire's: where a record is a row, they are the same as single ones.
    ways = [SINGLE] if kind in ("postgres", "zeromq") else [SINGLE, ENVELOPES]
    return Order(
        name=named.name, kind=kind, url=named.url, database_url=database.url, seconds=plan.seconds,
        batches=[10, 100] if plan.is_quick else [1, 10, 100, 500],
        ways=ways if plan.is_quick else [*ways, UNORDERED],
        loads_per_s=sorted({plan.needs.rate_per_s, *((100.0,) if plan.is_quick else (10.0, 100.0, 1000.0))}),
        own_postgres=database.directory, kill=plan.kill.get(named.name), start=plan.start.get(named.name),
        kills=plan.kills, server_pids=plan.pids.get(named.name, []),
    )  # fmt: skip


async def _broker(plan: Plan, named: Named, database: _Database, tell: TELL, stop: asyncio.Event) -> Measured:
    """Everything that its part says until it ends; told to end when `stop` comes."""
    began = time.monotonic()
    if database.directory is not None:
        # Found running, unless the part before was interrupted when it had killed it.
        await asyncio.to_thread(embedded.start, Path(database.directory))
    part = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kassa.bench.part", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        start_new_session=True, limit=LINE_BYTES_MAX,
    )  # fmt: skip
    assert part.stdin is not None and part.stdout is not None
    part.stdin.write(msgspec.json.encode(_order(plan, named, database)) + b"\n")
    ending = asyncio.create_task(_end_on(stop, part))
    found = Measured(name=named.name, kind=_kind(named), url=named.shown, about=plan.about.get(named.name, ""))
    try:
        async for line in part.stdout:
            said = msgspec.json.decode(line, type=Said)
            found = _added(found, said)
            tell(named.name, said)
        code = await part.wait()
    finally:
        ending.cancel()
        if part.returncode is None:
            part.kill()
            await part.wait()
    if code != 0:
        why = f"Its process ended with {code}; what it said is above."
        found = _added(found, Said(gap=Gap(what="the rest", why=why, fix="Please report it, with what it said.")))
    return msgspec.structs.replace(found, took_s=time.monotonic() - began)


async def _end_on(stop: asyncio.Event, part: asyncio.subprocess.Process) -> None:
    await stop.wait()
    with suppress(ProcessLookupError):
        part.terminate()
        await asyncio.sleep(GRACE_S)
        part.kill()


def _added(found: Measured, said: Said) -> Measured:
    """What is known with one line more."""
    return msgspec.structs.replace(
        found,
        throughput=[*found.throughput, said.throughput] if said.throughput else found.throughput,
        latency=[*found.latency, said.latency] if said.latency else found.latency,
        recovery=said.recovery or found.recovery,
        memory=said.memory or found.memory,
        gaps=[*found.gaps, said.gap] if said.gap else found.gaps,
        about=found.about or said.about,
        client=said.client or found.client,
        traits=said.traits or found.traits,
        left_behind=said.left_behind if said.left_behind is not None else found.left_behind,
    )


def write(report: Report, page: Path) -> tuple[Path, Path]:
    """The page, and the document beside it."""
    from kassa.bench.page import rendered

    document = page.with_suffix(".json")
    page.parent.mkdir(parents=True, exist_ok=True)
    document.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    page.write_text(rendered(report), encoding="utf-8")
    return page, document
