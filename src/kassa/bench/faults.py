"""kill -9 of a server under a steady load, its start, and what became of every message."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

from kassa.bench.model import Moment, Recovery
from kassa.bench.proc import family
from kassa.bench.stage import KEYS, Line, place_of
from kassa.db import embedded
from kassa.errors import BrokerUnreachable, KassaError
from kassa.messaging.model import Ack, Confirmed, Delivery, Record

LOAD_PER_S = 200.0
TICK_S = 0.02
BUCKET_S = 0.25
PAUSE_S = 0.5
"""A server is left dead so long, so that the kernel is done with it."""
BETWEEN_TRIES_S = 0.1
SEND_S = 3.0
"""Deadline of one batch."""
SETTLES_MAX = 100
"""What could not be acknowledged while the server is away is tried again so often; then it is left to come again."""
BACK_S = 60.0
"""A broker that has not handed out everything by then counts as one that lost it."""
AFTERWARDS_S = 1.5
COMMAND_S = 180.0


class CannotKill(KassaError):
    """The server could not be killed, or could not be started again."""

    code = "bench.cannot_kill"


class Victim(Protocol):
    """A server that may be killed."""

    what: str

    async def kill(self) -> None:
        """SIGKILL, and the server is gone when this returns. Raises CannotKill."""
        ...

    async def start(self) -> None:
        """It can be used when this returns, or soon. Raises CannotKill."""
        ...


class Commands:
    """Killed and started by commands of the user's."""

    def __init__(self, kill: str, start: str | None) -> None:
        """start: None when something else starts it again by itself."""
        self.what = "the server, by the command that was given"
        self._kill = kill
        self._start = start

    async def kill(self) -> None:
        await _shell(self._kill)

    async def start(self) -> None:
        if self._start is not None:
            await _shell(self._start)


async def _shell(command: str) -> None:
    """What the command says goes nowhere but into the error."""
    # Not a pipe: a server that it starts would keep that open.
    with TemporaryFile() as said:
        process = await asyncio.create_subprocess_shell(
            command, stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            async with asyncio.timeout(COMMAND_S):
                code = await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            raise CannotKill(f"`{command}` did not end within {COMMAND_S:.0f} s.") from None
        if code != 0:
            said.seek(0)
            words = said.read().decode(errors="replace").strip()[-500:]
            raise CannotKill(f"`{command}` ended with {code}: {words or 'it said nothing'}.")


class OwnPostgres:
    """The embedded PostgreSQL of a directory, with all its processes."""

    what = "PostgreSQL with all its processes, by kill -9"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def kill(self) -> None:
        running = await asyncio.to_thread(embedded.find, self._directory)
        if running is None:
            raise CannotKill(f"No PostgreSQL runs on {self._directory}.")
        kill_all([running.pid])
        await _gone(running.pid)

    async def start(self) -> None:
        await asyncio.to_thread(embedded.start, self._directory)


class OwnHub:
    """A ZeroMQ hub in a process of its own, with a PostgreSQL as its memory."""

    what = "the hub's process, by kill -9 (its PostgreSQL lives)"

    def __init__(self, database_url: str, address: str) -> None:
        self._database_url = database_url
        self._address = address
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kassa.bench.hub", self._address, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "KASSA_DATABASE_URL": self._database_url},
        )  # fmt: skip
        assert self._process.stdout is not None
        if not await self._process.stdout.readline():
            raise CannotKill("The ZeroMQ hub did not start; what it says is above.")

    async def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None


def kill_all(pids: list[int]) -> None:
    """SIGKILL to processes and their descendants."""
    for pid in family(pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _gone(pid: int) -> None:
    """Nothing of it runs any more; a dead process that nobody has buried is gone too."""
    deadline = time.monotonic() + COMMAND_S
    while _lives(pid):
        if time.monotonic() > deadline:
            raise CannotKill(f"The process {pid} does not die.")
        await asyncio.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def recovery(line: Line, victim: Victim, *, before_s: float) -> Recovery:
    """A steady load, the kill after `before_s`, the start, and the load until everything has been handled.

    Raises CannotKill, NotTaken (nothing could be sent any more is a finding, not an error)."""
    watched = _Watched(line, LOAD_PER_S)
    is_dead = False
    working = [asyncio.create_task(watched.send()), asyncio.create_task(watched.receive())]
    try:
        await _while_working(asyncio.sleep(before_s), working)
        began, is_dead = time.monotonic(), True
        await _while_working(victim.kill(), working)
        watched.killed_at = time.monotonic()
        await _while_working(asyncio.sleep(PAUSE_S), working)
        await _while_working(victim.start(), working)
        is_dead = False
        started_s = time.monotonic() - watched.killed_at
        await _while_working(watched.caught_up(BACK_S), working)
        await _while_working(asyncio.sleep(AFTERWARDS_S), working)
        watched.is_over = True
        await _while_working(watched.settled(BACK_S), working)
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        if is_dead:
            # Whatever went wrong, or whoever interrupts this: nobody's server stays dead.
            await asyncio.shield(victim.start())
    return watched.told(victim.what, began, started_s)


async def _while_working(step: Coroutine[Any, Any, None], working: "list[asyncio.Task[None]]") -> None:
    """The step; what goes wrong with the work meanwhile ends it too."""
    task = asyncio.ensure_future(step)
    try:
        while not task.done():
            await asyncio.wait([task, *(one for one in working if not one.done())], return_when=asyncio.FIRST_COMPLETED)
            for one in working:
                if one.done():
                    one.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    task.result()


class _Watched:
    """Sends at a steady rate until each is confirmed, one of a key at a time, as Kassa's relays do; notes every hand-over."""

    def __init__(self, line: Line, per_s: float) -> None:
        self._line = line
        self._per_s = per_s
        self._run = line.new_run()
        self._began = time.monotonic()
        self.killed_at: float | None = None
        self.is_over = False
        self._made = 0
        self._confirmed: dict[int, float] = {}
        """Number to when."""
        self._first_sent: dict[int, float] = {}
        self._handled: dict[int, float] = {}
        self._last_of_key: dict[str, int] = {}
        self._repeated = 0
        self._out_of_order = 0
        self._unsettled: list[tuple[Delivery, Ack]] = []
        self._tries = 0
        self._refusal = ""

    async def send(self) -> None:
        pending: list[Record] = []
        while not self.is_over or pending:
            if not pending:
                pending = self._due()
            if not pending:
                await asyncio.sleep(TICK_S)
                continue
            now = time.monotonic()
            for record in pending:
                self._first_sent.setdefault(place_of(record)[1], now)
            receipts = await self._line.binder.send(self._line.topic.name, pending, deadline_s=SEND_S)
            now = time.monotonic()
            left = []
            for record, receipt in zip(pending, receipts, strict=True):
                if isinstance(receipt, Confirmed):
                    self._confirmed[place_of(record)[1]] = now
                else:
                    left.append(record)
                    self._refusal = receipt.reason
            pending = left
            if pending:
                await asyncio.sleep(BETWEEN_TRIES_S)

    def _due(self) -> list[Record]:
        """At most one of each key."""
        due = int((time.monotonic() - self._began) * self._per_s)
        count = 0 if self.is_over else max(0, min(due - self._made, KEYS))
        records = [self._line.record(self._run, number) for number in range(self._made, self._made + count)]
        self._made += count
        return records

    async def receive(self) -> None:
        while True:
            try:
                deliveries = await self._line.subscription.receive(100, 0.25)
            except BrokerUnreachable:
                await asyncio.sleep(BETWEEN_TRIES_S)
                deliveries = []
            now = time.monotonic()
            for delivery in deliveries:
                self._note(delivery.record, now)
            await self._settle([(one, Ack()) for one in deliveries])

    async def _settle(self, ends: list[tuple[Delivery, Ack]]) -> None:
        """What was handled is acknowledged again when the server was away, as long as that may help."""
        everything = self._unsettled + ends
        if not everything:
            return
        done = await self._line.subscription.settle(everything)
        left = [end for end, is_done in zip(everything, done, strict=True) if not is_done]
        self._tries = self._tries + 1 if left else 0
        self._unsettled = left if self._tries < SETTLES_MAX else []

    def _note(self, record: Record, now: float) -> None:
        run, number = place_of(record)
        if run != self._run:
            return
        if number in self._handled:
            self._repeated += 1
            return
        if number < self._last_of_key.get(record.key, -1):
            self._out_of_order += 1
        self._last_of_key[record.key] = max(number, self._last_of_key.get(record.key, -1))
        self._handled[number] = now

    async def caught_up(self, within_s: float) -> None:
        """A record that was sent after the kill is handled, and hardly anything waits."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            due = int((time.monotonic() - self._began) * self._per_s)
            if due - len(self._handled) <= 0.25 * self._per_s and self._first_handled() is not None:
                return
            await asyncio.sleep(0.05)

    async def settled(self, within_s: float) -> None:
        """Everything that was confirmed is handled."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if len(self._confirmed) == self._made and self._confirmed.keys() <= self._handled.keys():
                return
            await asyncio.sleep(0.05)

    def _first_handled(self) -> float | None:
        """When a record that was first sent after the kill was handled."""
        killed = self.killed_at or 0.0
        return min((at for number, at in self._handled.items() if self._first_sent[number] > killed), default=None)

    def _first_confirmed(self) -> float | None:
        killed = self.killed_at or 0.0
        return min((at for number, at in self._confirmed.items() if self._first_sent[number] > killed), default=None)

    def _caught_up_at(self, killed: float) -> float | None:
        """When the last record was handled that was due in the outage: sent, or to be sent, before the first came through."""
        first = self._first_confirmed()
        if first is None or self._confirmed.keys() - self._handled.keys():
            return None
        behind = [number for number in self._handled if self._began + number / self._per_s <= first]
        return max((self._handled[number] for number in behind), default=None)

    def told(self, what: str, began: float, started_s: float) -> Recovery:
        killed = self.killed_at or began

        def since(at: float | None) -> float | None:
            return None if at is None else max(0.0, at - killed)

        return Recovery(
            what=what, load_per_s=self._per_s, started_s=started_s, pause_s=PAUSE_S,
            sending_s=since(self._first_confirmed()), handling_s=since(self._first_handled()),
            caught_up_s=since(self._caught_up_at(killed)), sent=self._made, confirmed=len(self._confirmed),
            handled=len(self._handled), lost=len(self._confirmed.keys() - self._handled.keys()),
            unconfirmed_why=self._refusal if len(self._confirmed) < self._made else "",
            repeated=self._repeated, out_of_order=self._out_of_order, timeline=self._timeline(killed),
        )  # fmt: skip

    def _timeline(self, killed: float) -> list[Moment]:
        first = int((self._began - killed) // BUCKET_S)
        last = int((max((*self._handled.values(), killed)) - killed) // BUCKET_S)
        confirmed, handled = [0] * (last - first + 1), [0] * (last - first + 1)
        for counts, moments in ((confirmed, self._confirmed), (handled, self._handled)):
            for at in moments.values():
                place = int((at - killed) // BUCKET_S) - first
                if 0 <= place < len(counts):
                    counts[place] += 1
        return [
            Moment(round((first + place) * BUCKET_S, 3), sent / BUCKET_S, done / BUCKET_S)
            for place, (sent, done) in enumerate(zip(confirmed, handled, strict=True))
        ]
