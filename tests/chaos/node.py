"""The program `kassa` as it is, in a process that can be killed at a named point of its path and whose clock can step.

`python -m chaos.node up …`. KASSA_CRASH_FILE names a file; when it appears, its text is a plan such as
`charge.answered>commit.before`: these points must be reached in this order, and at the last one the process kills itself
with SIGKILL; or, when the plan begins with `PID@`, that process and all that it started.
What a broker has confirmed is noted beside that file, in `.confirmed`: a line for each time, of names.
SIGUSR1 sets its clock forward by an hour, SIGUSR2 back.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import asyncpg

from kassa import clock
from kassa.channels import runner
from kassa.channels.model import Request, Response
from kassa.channels.runner import Runner
from kassa.cli.main import main
from kassa.ids import Id
from kassa.journal.change import Change
from kassa.journal.writer import PostgresJournal
from kassa.messaging.model import LogRecord
from kassa.messaging.relay import EventRelay
from kassa.messaging.work import Leased, MessageWork
from kassa.notifications.sender import Sender
from kassa.payments.records import Attempt, Payment
from kassa.payments.service import Payments

POINTS = (
    "wallet.intended",
    "charge.intended",
    "charge.request",
    "charge.sent",
    "charge.answered",
    "refund.intended",
    "refund.request",
    "refund.sent",
    "refund.answered",
    "query.request",
    "query.sent",
    "query.answered",
    "close.request",
    "close.sent",
    "close.answered",
    "callback.received",
    "commit.before",
    "commit.after",
    "webhook.request",
    "webhook.sent",
    "event.confirmed",
    "message.confirmed",
)
"""`intended`: handed to the journal, not stored. `request`: stored, not sent. `sent`: on its way. `answered`: not recorded.
`commit`: around the COMMIT itself. `webhook.sent`: the merchant has it, and that is not recorded. `confirmed`: the broker has it,
and the cursor stands before the event, the message is in its queue."""

SENT_S = 0.06
"""So long after a request was handed to the socket it has surely left, and a provider that is told to wait has it."""


class Plan:
    """Which points are still to be reached, in order."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._confirmed = file.with_suffix(".confirmed")
        self._left: list[str] = []
        self._victim = os.getpid()
        self._lock = threading.Lock()

    def reached(self, point: str) -> None:
        """Ends the process when this is the last point of the plan."""
        with self._lock:
            if not self._left and self._file.exists():
                victim, _, points = self._file.read_text().rpartition("@")
                self._victim, self._left = int(victim or os.getpid()), points.split(">")
                self._file.unlink()
                assert set(self._left) <= set(POINTS), self._left
            if self._left[:1] != [point]:
                return
            self._left.pop(0)
            if not self._left:
                kill_family(self._victim)

    def confirmed(self, kind: str, names: Iterable[str]) -> None:
        """A broker has these."""
        with self._confirmed.open("a") as notes:
            notes.write(f"{' '.join(names)}\n")
        self.reached(f"{kind}.confirmed")


def kill_family(pid: int) -> None:
    """kill -9 of a process and of every process that it started."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    for one in (pid, *map(int, children.split())):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def watch(plan: Plan) -> None:
    """Puts the points into the doors that everything goes through."""
    _watch_journal(plan)
    _watch_runner(plan)
    _watch_webhooks(plan)
    _watch_relays(plan)


def _watch_journal(plan: Plan) -> None:
    hand_in, execute, handle = PostgresJournal.hand_in, asyncpg.Connection.execute, Payments.handle_callback

    def handed_in(journal: PostgresJournal, change: Change, told: Any) -> None:
        if any(isinstance(row, Attempt) for row in change.new):
            plan.reached("charge.intended")
        elif any(isinstance(row, Payment) for row in change.new):
            plan.reached("wallet.intended")
        if any(claim.kind == "refund" for claim in change.claims):
            plan.reached("refund.intended")
        hand_in(journal, change, told)

    async def executed(connection: Any, query: str, *values: Any, **more: Any) -> Any:
        if query != "COMMIT":
            return await execute(connection, query, *values, **more)
        plan.reached("commit.before")
        done = await execute(connection, query, *values, **more)
        plan.reached("commit.after")
        return done

    async def handled(payments: Payments, *values: Any, **more: Any) -> Any:
        plan.reached("callback.received")
        return await handle(payments, *values, **more)

    PostgresJournal.hand_in = handed_in  # type: ignore[assignment,method-assign]
    asyncpg.Connection.execute = executed
    Payments.handle_callback = handled  # type: ignore[assignment,method-assign]


def _watch_runner(plan: Plan) -> None:
    run = Runner.run

    async def ran(runner: Runner, steps: Generator[Request, Response, Any], base_url: str, trace: Any) -> Any:
        return await run(runner, _watched(steps, plan), base_url, trace)

    Runner.run = ran  # type: ignore[assignment,method-assign]


def _watched(steps: Generator[Request, Response, Any], plan: Plan) -> Generator[Request, Response, Any]:
    try:
        request = next(steps)
        while True:
            name = _operation(request)
            plan.reached(f"{name}.request")
            threading.Timer(SENT_S, plan.reached, (f"{name}.sent",)).start()
            answer = yield request
            plan.reached(f"{name}.answered")
            request = steps.send(answer)
    except StopIteration as end:
        return end.value


def _operation(request: Request) -> str:
    if request.method != "POST":
        return "query"
    if request.path.endswith("/close"):
        return "close"
    return "refund" if "/refund/" in request.path else "charge"


def _watch_webhooks(plan: Plan) -> None:
    send: Callable[..., Awaitable[Any]] = Sender.send

    async def sent(sender: Sender, *values: Any, **more: Any) -> Any:
        plan.reached("webhook.request")
        answer = await send(sender, *values, **more)
        plan.reached("webhook.sent")
        return answer

    Sender.send = sent  # type: ignore[assignment,method-assign]


def _watch_relays(plan: Plan) -> None:
    handle, acknowledge = EventRelay.handle, MessageWork.acknowledge

    async def handled(relay: EventRelay, records: Sequence[LogRecord]) -> list[str | None]:
        answers = await handle(relay, records)
        plan.confirmed(
            "event", [record.name for record, failure in zip(records, answers, strict=True) if failure is None]
        )
        return answers

    async def acknowledged(work: MessageWork, claimed: Sequence[Leased]) -> set[Id]:
        plan.confirmed("message", [message.id for message in claimed])
        return await acknowledge(work, claimed)

    # Replaced from outside, like the methods above: the program has no points for tests. The types differ by the name of `self`.
    EventRelay.handle = handled  # type: ignore[assignment,method-assign]
    MessageWork.acknowledge = acknowledged  # type: ignore[assignment,method-assign]


class _Stepped(datetime):
    """A clock that can be set wrong."""

    by = timedelta(0)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + cls.by


def step_by_signal() -> None:
    """What this process takes for the time, an hour off per signal: its own decisions, signatures and ids."""
    time_ns = time.time_ns

    def stepped_ns() -> int:
        return time_ns() + int(_Stepped.by.total_seconds()) * 1_000_000_000

    def step(number: int, frame: object) -> None:
        _Stepped.by += timedelta(hours=1 if number == signal.SIGUSR1 else -1)

    assert runner.datetime is datetime  # type: ignore[attr-defined]
    runner.datetime = _Stepped  # type: ignore[attr-defined]
    clock.SystemClock.now = lambda self: _Stepped.now(UTC)  # type: ignore[method-assign]
    time.time_ns = stepped_ns
    signal.signal(signal.SIGUSR1, step)
    signal.signal(signal.SIGUSR2, step)


if __name__ == "__main__":
    watch(Plan(Path(os.environ["KASSA_CRASH_FILE"])))
    step_by_signal()
    main()
