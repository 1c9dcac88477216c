"""Where benchmarks run: one PostgreSQL of their own for all of them, a fresh database for each, servers beside it."""

import asyncio
import base64
import json
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import asyncpg

from kassa.db import embedded
from kassa.db.embedded import Running
from kassa.db.migrate import migrate
from kassa.settings import Settings

SERVER_SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
}
"""As one would set a server of this size in production: what is acknowledged is on the disk."""
LOG_FILES = 160
"""Of 16 MB each: about what the longest benchmark writes."""
START_TIMEOUT_S = 30.0
PGBENCH_SCALE = 20
"""Two million rows, so that its clients do not wait for each other's."""


class Server(NamedTuple):
    """A server under test."""

    url: str
    pid: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What each benchmark gets."""

    running: Running
    folder: Path
    """Temporary; anybody may pass through."""
    results: Path
    rounds: int
    seconds: int
    """How long one run takes."""
    is_quick: bool
    is_full: bool

    @property
    def pgbench_program(self) -> str:
        """The one that belongs to the server."""
        return self.running.binaries.program("pgbench")

    def database(self, name: str) -> str:
        """A fresh, migrated database; its URL."""
        embedded.execute(self.running, f"CREATE DATABASE {name} OWNER {self.running.user}")
        url = self.running.dsn.rpartition("/")[0] + f"/{name}"
        asyncio.run(migrate(url))
        return url

    def drop(self, name: str) -> None:
        """Makes room for the next benchmark."""
        embedded.execute(self.running, f"DROP DATABASE {name} WITH (FORCE)")

    def settings(self, database_url: str) -> Settings:
        """Of an API process on a free port, with a key of its own."""
        key = self.folder / "secrets.key"
        if not key.exists():
            key.write_text(base64.b64encode(secrets.token_bytes(32)).decode())
        return Settings(database_url=database_url, port=0, dir=str(self.folder))

    def tell(self, text: str) -> None:
        """Progress."""
        print(text, file=sys.stderr, flush=True)


@contextmanager
def opened(results: Path, *, is_quick: bool, is_full: bool) -> Iterator[Stage]:
    """Starts the server, and stops and removes it at the end."""
    with embedded.temporary_directory("kassa-benchmarks-") as folder:
        running = embedded.start(folder, settings=SERVER_SETTINGS)
        try:
            if not is_quick:
                _lay_log(running)
            rounds, seconds = (1, 2) if is_quick else (3, 6)
            yield Stage(running, folder, results, rounds, seconds, is_quick, is_full)
        finally:
            embedded.stop(running)


def _lay_log(running: Running) -> None:
    """Makes the files of PostgreSQL's log, which a server uses again and again once it has run for a checkpoint or two.

    A new server has none, and whoever needs the next one makes it while everybody waits: 20 to 50 ms for every 16 MB.
    """
    switches = f"FROM generate_series(1, {LOG_FILES})"
    embedded.execute(running, f"SELECT pg_logical_emit_message(false, 'benchmarks', ''), pg_switch_wal() {switches}")
    embedded.execute(running, "CHECKPOINT")


@contextmanager
def kassa_api(settings: Settings, *, without: tuple[str, ...] = ()) -> Iterator[Server]:
    """One process of Kassa: the API, and all workers beside it but those of `without`."""
    arguments = ["--database-url", settings.database_url or "", "--dir", settings.dir, "--without", *without]
    with _process("benchmarks.api_process", *arguments) as server:
        yield Server(_first_line(server), server.pid)


@contextmanager
def usual_api(settings: Settings) -> Iterator[Server]:
    """The usual design, in one process too."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["--database-url", settings.database_url or "", "--port", str(port)]
    with _process("benchmarks.usual_design", *arguments) as server:
        _wait(f"{url}/openapi.json")
        yield Server(url, server.pid)


@contextmanager
def wechat_sandbox(folder: Path) -> Iterator[tuple[dict[str, str], int]]:
    """WeChat Pay's sandbox: what a merchant needs to use it, and its process."""
    folder.mkdir()
    with _process("kassa.channels.sandbox.wechat", "--dir", str(folder), "--json") as server:
        yield json.loads(_first_line(server)), server.pid


def pgbench(stage: Stage, url: str) -> float:
    """Simple updates per second, 64 clients, prepared statements; its tables are made at the first call on a database."""
    if value(url, "SELECT to_regclass('pgbench_accounts') IS NULL"):
        made = [stage.pgbench_program, "-i", "-q", "-s", str(PGBENCH_SCALE), url]
        subprocess.run(made, check=True, capture_output=True)
    command = [
        stage.pgbench_program,
        "-N",
        "-M",
        "prepared",
        "-c",
        "64",
        "-j",
        "2",
        "-n",
        "-T",
        str(stage.seconds),
        url,
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"tps = ([0-9.]+)", output)
    if found is None:
        raise SystemExit(f"pgbench said nothing of tps: {output}")
    return float(found.group(1))


def value(url: str, query: str) -> Any:
    """The one value of a query."""
    return asyncio.run(_value(url, query))


async def _value(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


@contextmanager
def _process(module: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.terminate()


def _first_line(server: "subprocess.Popen[str]") -> str:
    line = server.stdout.readline().strip() if server.stdout else ""
    if not line:
        raise SystemExit(f"{server.args!r} does not start")
    return line


def _wait(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urlopen(url):
                return
        except URLError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{url} does not answer") from error
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
